"""`mm convert`: other projects' weights into our folders, and a run back into a Llama 3.2 Vision folder."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

import mm
from foundation.errors import UserError
from foundation.options import new_parser, read_options
from mm.encoder_folders import save_vision_encoder
from mm.run_files import CONFIG_FILE
from mm.run_folder import save


def open_clip(argv: Sequence[str]) -> int:
    """Write an encoder folder from an open_clip image tower."""
    from mm.convert.open_clip import load

    parser = new_parser("mm convert open-clip", "Convert an open_clip image tower into an encoder folder.")
    parser.add_argument("name", help="open_clip's name of the model, such as ViT-H-14-quickgelu")
    parser.add_argument("pretrained", help="open_clip's tag of the weights, such as metaclip_fullcc, or a file")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--tile-size", type=int, help="tile size in pixels, if not the tower's")
    options = read_options(parser, argv)
    refuse_existing_run(options.output)
    encoder = load(options.name, options.pretrained, tile_size=options.tile_size)
    save_vision_encoder(options.output, encoder)
    print(encoder.report)
    return 0


def whisper(argv: Sequence[str]) -> int:
    """Write a speech encoder folder from one of OpenAI's Whisper files."""
    from mm.convert.whisper import load
    from mm.encoder_folders import save_speech_encoder

    parser = new_parser("mm convert whisper", "Convert a Whisper file into a speech encoder folder.")
    parser.add_argument("file", help="such as tiny.en.pt")
    parser.add_argument("output", help="folder to write")
    parser.add_argument(
        "--max-seconds", type=float, default=30.0, help="window in seconds; a shorter one than Whisper's 30 costs less"
    )
    options = read_options(parser, argv)
    refuse_existing_run(options.output)
    encoder = load(options.file, options.max_seconds)
    save_speech_encoder(options.output, encoder)
    print(encoder.report)
    return 0


def from_mllama(argv: Sequence[str]) -> int:
    """Write a run folder, language model included, from a Llama 3.2 Vision folder."""
    options = _read_folders("mm convert from-mllama", "Convert a Llama 3.2 Vision folder into a run folder.", argv)
    refuse_existing_run(options.output)
    model, processor = mm.load(options.folder)
    save(options.output, model, processor, bundle=True)
    print(getattr(model, "report", "converted"))
    return 0


def to_mllama(argv: Sequence[str]) -> int:
    """Write a Llama 3.2 Vision folder from a run folder."""
    from mm.convert.mllama import save as save_mllama

    options = _read_folders("mm convert to-mllama", "Convert a run folder into a Llama 3.2 Vision folder.", argv)
    model, processor = mm.load(options.folder)
    save_mllama(model, options.output)
    if getattr(model, "mllama_source", None) is None:  # else `save_mllama` has copied the tokenizer of its source
        processor.tokenizer.save_pretrained(options.output)
    return 0


def refuse_existing_run(output: str) -> None:
    """Raises UserError if the folder holds a run."""
    if (Path(output) / CONFIG_FILE).exists():
        raise UserError(f"{output} holds a run already; name another folder, or remove it first")


def _read_folders(prog: str, description: str, argv: Sequence[str]) -> Namespace:
    parser = new_parser(prog, description)
    parser.add_argument("folder", help="folder to convert")
    parser.add_argument("output", help="folder to write")
    return read_options(parser, argv)
