"""`mm caption`, `mm ask` and `mm transcribe`: media files in, the model's text on stdout."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

import mm
from app.commands.ranks import add_parallel_options, on_ranks
from foundation.errors import UserError, is_user_error, one_line
from foundation.options import new_parser, read_options
from mm.device import device_line, resolve_device
from mm.inference.quantisation import QUANTISATIONS
from mm.inference.request import check_sampling
from mm.transcription import transcribe_tokens
from shards.tars import KeyRule
from speech.prompts import TRANSCRIBE
from video.readers import is_animation, open_animation
from video.timeline import MAX_PIXELS

DEFAULT_MODEL = "runs/demo"
MODEL_HELP = "a run folder, or a Llama 3.2 Vision folder"
MEDIA = {"image": "images", "video": "video clips", "audio": "audio files"}  # type of a message's part -> its help
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".ogv", ".flv", ".wmv", ".asf"),
    *(".mpg", ".mpeg", ".m2v", ".ts", ".mts", ".m2ts", ".vob", ".mxf", ".dv", ".rm"),
)
CLIP_HELP = (
    f"a file with the suffix {', '.join(VIDEO_SUFFIXES)} is a clip; so is a GIF or WebP file of several pictures if "
    "the model has a video adapter; every other file is an image, of which the first picture counts"
)
logger = logging.getLogger(__name__)


def caption(argv: Sequence[str]) -> int:
    """Caption images and video clips."""
    parser = new_parser("mm caption", "Caption images and video clips.")
    parser.add_argument("files", nargs="+", help=f"images and clips: {CLIP_HELP}")
    add_model_options(parser)
    add_length_option(parser, max_new_tokens=64)
    options = read_options(parser, argv)
    with on_ranks(options) as share:
        model, processor = load_model(options, share)

        def describe(file: str) -> str:
            kind = "video" if is_clip(file, animations=model.video_adapter is not None) else "image"
            sample = processor.caption_prompt_for(file, kind)
            return processor.decode(mm.generate_tokens(model, [sample], options.max_new_tokens)[0])

        return print_for_each(options.files, describe)


def ask(argv: Sequence[str]) -> int:
    """Ask a question about images, video clips and audio.

    Raises:
        UserError: an empty question or one that is not UTF-8, no media, or an option of sampling out of range, besides
            what the model and the processor refuse.
    """
    parser = new_parser("mm ask", "Ask a question about images, video clips and audio.")
    parser.add_argument("question", help="what to ask about the media")
    for kind, description in MEDIA.items():
        parser.add_argument(
            f"--{kind}",
            dest="media",
            action="extend",
            nargs="+",
            type=MediaFile(kind),
            metavar="FILE",
            help=f"{description}; the model gets all media in the order of the command line, then the question",
        )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    add_model_options(parser)
    add_length_option(parser, max_new_tokens=128)
    options = read_options(parser, argv)
    check_text(options.question, "the question")
    check_sampling(options.temperature, options.top_p, options.seed)
    if not options.media:
        raise UserError("there is nothing to ask about: give --image, --video or --audio, each with one file or more")
    content = [{"type": kind, kind: file} for kind, file in options.media]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": options.question}]}]
    with on_ranks(options) as share:
        model, processor = load_model(options, share)
        for piece in mm.stream(
            model,
            processor,
            messages,
            options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        ):
            print(piece, end="", flush=True)
        print()
    return 0


def transcribe(argv: Sequence[str]) -> int:
    """Transcribe the speech in audio or video files.

    Raises:
        UserError: a language that is empty or not UTF-8, or a model without a speech encoder.
    """
    parser = new_parser("mm transcribe", "Transcribe the speech in audio or video files.")
    parser.add_argument("files", nargs="+", help="audio files, or videos with sound")
    parser.add_argument("--language", default="English", help="English name of the transcript's language")
    add_model_options(parser)
    add_length_option(parser, max_new_tokens=256)
    options = read_options(parser, argv)
    check_text(options.language, "the language")
    request = {"type": "text", "text": f"{TRANSCRIBE} {options.language}:"}
    with on_ranks(options) as share:
        model, processor = load_model(options, share)
        if model.speech_encoder is None:
            raise UserError(f"{options.model} has no speech_encoder; `mm train train_speech_adapter` trains one")

        def write_down(file: str) -> str:
            content = [request, {"type": "audio", "audio": file}]
            sample = processor.prompt([{"role": "user", "content": content}])
            return processor.decode(transcribe_tokens(model, [sample], options.max_new_tokens)[0])

        return print_for_each(options.files, write_down)


def check_text(text: str, name: str) -> None:
    """Check a text of the command line, which Python decodes with a surrogate for each byte that is not UTF-8.

    Args:
        name: for messages.

    Raises:
        UserError: it is empty, or holds surrogates.
    """
    if not text.strip():
        raise UserError(f"{name} is empty: write some text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name} is not UTF-8: {text!r}; set a UTF-8 locale, or type the text again")


def printable(text: str) -> str:
    """A text or a file's name with each surrogate escaped, so that any UTF-8 terminal takes it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def add_device_option(parser: ArgumentParser) -> None:
    """Add `--device`, for `mm.device.resolve_device`."""
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA where there is one, else the CPU), cpu, cuda:1, ..."
    )


def add_key_option(parser: ArgumentParser) -> None:
    """Add `--key`, for `shards.reader.ShardSet`."""
    parser.add_argument(
        "--key",
        type=KeyRule,
        default="first_dot",
        help="last_dot divides names such as photo.v1.jpg at their last dot, in folders of tars without an index",
    )


def add_model_options(parser: ArgumentParser) -> None:
    """Add the options that `load_model` reads."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help=MODEL_HELP)
    add_loading_options(parser)


def add_loading_options(parser: ArgumentParser) -> None:
    """Add the options that `load_model` reads besides the model's folder."""
    parser.add_argument("--language-model", help="where the run's language model is now, if it has moved")
    parser.add_argument(
        "--quantisation", choices=QUANTISATIONS, help="of the language model: fp8 feed-forwards, or int8 weights"
    )
    add_device_option(parser)
    add_parallel_options(parser)


def add_length_option(parser: ArgumentParser, max_new_tokens: int) -> None:
    """Add `--max-new-tokens`."""
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="longest answer, in tokens")


def load_model(
    options: Namespace, share: Callable[[mm.MultimodalModel], mm.MultimodalModel] | None = None
) -> tuple[mm.MultimodalModel, mm.Processor]:
    """The model and the processor that the options of `add_model_options` name; logs the device first.

    Args:
        share: of `on_ranks`.
    """
    device = resolve_device(options.device)
    logger.info(device_line(device))
    return mm.load(
        options.model,
        device=device,
        language_model=options.language_model,
        quantisation=options.quantisation,
        share=share,
    )


class MediaFile:
    """An option's type that keeps its kind, so that the options of all kinds fill one list in order.

    Calling it gives (kind, file).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return "path"  # shown by --help

    def __call__(self, file: str | tuple[str, str]) -> tuple[str, str]:
        return file if isinstance(file, tuple) else (self.kind, file)  # jsonargparse checks parsed values once more


def is_clip(file: str, animations: bool) -> bool:
    """Whether a file is a video clip and not an image, see CLIP_HELP.

    Args:
        animations: a GIF or WebP file of several pictures is a clip.

    Raises:
        UserError: a GIF or WebP file that is broken.
        OSError: the file cannot be read.
    """
    path = Path(file)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return True
    if not animations or not path.is_file():
        return False
    data = path.read_bytes()
    if not is_animation(data):
        return False
    with open_animation(data, MAX_PIXELS) as picture:
        return getattr(picture, "n_frames", 1) > 1


def print_for_each(files: Sequence[str], answer: Callable[[str], str]) -> int:
    """Print `FILE: answer(FILE)` for each file, then log the files that could not be read, and why.

    Returns:
        The exit code: 1 if a file failed.
    """
    failures = []
    for file in files:
        try:
            print(f"{printable(file)}: {answer(file)}", flush=True)
        except (ValueError, OSError) as error:
            if not is_user_error(error):
                raise
            reason = one_line(error)
            failures.append(reason if reason.startswith(file) else f"{file}: {reason}")
    for failure in failures:
        logger.error(printable(failure))
    return 1 if failures else 0
