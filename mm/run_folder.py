"""The run folder: what training leaves, and what `mm.load` brings back.

    config.yaml                     shapes of all parts, the processor's settings, hashes; written last
    vision_encoder.safetensors      one file per part that there is
    image_adapter.safetensors       (video_adapter, speech_encoder, speech_adapter)
    extra_embeddings.safetensors
    tokenizer/                      the language model's tokenizer
    language_model.safetensors      only with `bundle`; else the frozen LM is named by path and SHA-256

An encoder alone has the same form, with its one part.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mm.convert.llama
import mm.convert.mllama
from foundation.errors import UserError
from mm.config import ModelConfig, from_dict, to_dict
from mm.convert import mllama_config
from mm.convert.folder import read_config as folder_config
from mm.convert.report import load_tensors
from mm.device import resolve_device
from mm.language_model import LanguageModel, LanguageModelConfig
from mm.model import MultimodalModel
from mm.processor import Processor
from vision.encoder import VisionEncoder, VisionEncoderConfig, at_tile_size

FORMAT = 1
CONFIG_FILE = "config.yaml"
PARTS = ("vision_encoder", "image_adapter", "video_adapter", "speech_encoder", "speech_adapter")


def load(
    folder: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    language_model: str | Path | None = None,
) -> tuple[MultimodalModel, Processor]:
    """A model and its processor, ready to generate.

    Args:
        folder: a run folder of ours, or a Llama 3.2 Vision folder from Hugging Face.
        device, dtype: where to and as what; None means the CPU and the language model's own dtype.
        language_model: where a run's language model lies now, if it moved.

    Raises:
        UserError: the folder is neither, is half-written, or its language model is missing or another one; a device
            that is not there.
    """
    folder = Path(folder)
    device = None if device is None else resolve_device(device)
    if (folder / CONFIG_FILE).is_file():
        model, processor = _load_run(folder, language_model)
    elif _is_mllama(folder):
        model = mm.convert.mllama.load(folder)
        processor = Processor(mm.convert.llama.load_tokenizer(folder), model.config)
    else:
        raise UserError(_why_not_a_model(folder))
    dtype = dtype or model.language_model.model.norm.weight.dtype
    return model.to(device=device, dtype=dtype).eval(), processor


def save(
    folder: str | Path,
    model: MultimodalModel,
    processor: Processor,
    language_model: str | Path | None = None,
    bundle: bool = False,
) -> None:
    """Write a run folder; an older one under the same name keeps its other files.

    Args:
        language_model: the folder or GGUF file that the frozen LM was loaded from.
        bundle: copy the LM's tensors in, so that the run folder is whole by itself.

    Raises:
        UserError: neither a place of the language model nor `bundle`.
    """
    if language_model is None and not bundle:
        raise UserError("say where the language model lies (language_model=...), or copy it in (bundle=True)")
    parts: dict[str, dict[str, Tensor]] = {"extra_embeddings": {"extra_embeddings": model.extra_embeddings}}
    for name in PARTS:
        if getattr(model, name) is not None:
            parts[name] = getattr(model, name).state_dict()
    if bundle:
        state = model.language_model.state_dict()
        if model.config.language_model.tied_embeddings:
            del state["lm_head.weight"]
        parts["language_model"] = state
    with replaced_files(folder, last=CONFIG_FILE) as new:
        hashes = write_parts(new, parts)
        processor.tokenizer.save_pretrained(new / "tokenizer")
        origin = None
        if not bundle:
            origin = {"path": str(Path(language_model).resolve()), "sha256": hash_weights(language_model)}
        description = {
            "format": FORMAT,
            "model": to_dict(model.config),
            "processor": processor.settings(),
            "language_model": origin,
            "parts": hashes,
        }
        write_yaml(new / CONFIG_FILE, description)


def save_encoder(folder: str | Path, encoder: VisionEncoder) -> None:
    """Write an image encoder alone, for `load_encoder` and the adapter stage."""
    with replaced_files(folder, last=CONFIG_FILE) as new:
        hashes = write_parts(new, {"vision_encoder": encoder.state_dict()})
        write_yaml(new / CONFIG_FILE, {"format": FORMAT, "vision_encoder": asdict(encoder.config), "parts": hashes})


def load_encoder(folder: str | Path, tile_size: int | None = None) -> VisionEncoder:
    """An image encoder from a folder of `save_encoder` or from a run folder.

    Args:
        tile_size: another tile resolution than the stored one; the position tables are resized.

    Raises:
        UserError: the folder holds no whole encoder.
    """
    folder = Path(folder)
    description = read_description(folder)
    with torch.device("meta"):
        encoder = VisionEncoder(read_encoder_shape(folder))
    load_tensors(encoder, read_part(folder, "vision_encoder", description), source=folder)
    return encoder if tile_size is None else at_tile_size(encoder, tile_size)


def read_encoder_shape(folder: str | Path) -> VisionEncoderConfig:
    """The configuration of the encoder that `load_encoder` would load, without its weights; raises as that does."""
    folder = Path(folder)
    description = read_description(folder)
    values = description.get("vision_encoder") or description.get("model", {}).get("vision_encoder")
    if values is None:
        raise UserError(f"{folder} holds no image encoder")
    try:
        return VisionEncoderConfig(**{**values, "tap_points": tuple(values["tap_points"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder / CONFIG_FILE} does not describe an image encoder: {error}") from error


def read_shape(folder: str | Path) -> ModelConfig:
    """The configuration of the model that `load` would load, without its weights.

    Raises:
        UserError: the folder is neither a run folder nor a Llama 3.2 Vision folder, or does not describe a model.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() and _is_mllama(folder):
        return mllama_config.model_config(*folder_config(folder), tap_points=None)[0]
    return _run_config(folder, read_description(folder))


def language_model_of(folder: str | Path) -> str | None:
    """Where the language model of a run folder lies; None where the folder itself holds it."""
    folder = Path(folder)
    origin = read_description(folder)["language_model"] if (folder / CONFIG_FILE).is_file() else None
    return None if origin is None else origin["path"]


def hash_weights(path: str | Path) -> str:
    """SHA-256 of a GGUF file, or of a folder's safetensors files taken in the order of their names."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} is neither a file nor a folder with safetensors files")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def replaced_files(folder: str | Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files are moved into `folder` when the block succeeds, the file `last` at the end.

    The old file `last` goes first, so that a folder with it is always whole. On an error nothing of the new is left.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".new-*"):  # of a save that was killed
        shutil.rmtree(leftover)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        yield new
        (folder / last).unlink(missing_ok=True)
        for entry in sorted(new.iterdir(), key=lambda entry: entry.name == last):
            target = folder / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _load_run(folder: Path, language_model: str | Path | None) -> tuple[MultimodalModel, Processor]:
    description = read_description(folder)
    config = _run_config(folder, description)
    with torch.device("meta"):
        model = MultimodalModel(config)
    origin = description["language_model"]
    if origin is None:
        load_tensors(model.language_model, read_part(folder, "language_model", description), source=folder)
    else:
        model.language_model = _load_origin(folder, origin, config.language_model, language_model)
    for name in PARTS:
        if getattr(model, name) is not None:
            load_tensors(
                getattr(model, name), read_part(folder, name, description), source=folder / f"{name}.safetensors"
            )
    rows = read_part(folder, "extra_embeddings", description)["extra_embeddings"]
    model.extra_embeddings = nn.Parameter(rows, requires_grad=False)
    tokenizer = mm.convert.llama.load_tokenizer(folder / "tokenizer")
    return model, Processor(tokenizer, config, **description["processor"])


def _run_config(folder: Path, description: dict) -> ModelConfig:
    if "model" not in description:
        raise UserError(f"{folder} holds an image encoder alone; train an adapter on it first (mm train)")
    try:
        return from_dict(description["model"])
    except ValueError as error:
        raise UserError(f"{folder / CONFIG_FILE}: {error}") from error


def _load_origin(folder: Path, origin: dict, config: LanguageModelConfig, moved_to: str | Path | None) -> LanguageModel:
    path = Path(moved_to or origin["path"])
    if not path.exists():
        raise UserError(
            f"the language model of {folder} is not at {path}; say where it lies (language_model=...), or save runs "
            "with bundle=True"
        )
    if hash_weights(path) != origin["sha256"]:
        raise UserError(f"{path} is not the language model that {folder} was trained with: its SHA-256 differs")
    model = mm.convert.llama.load(path)
    # The hash is of the weights; a configuration beside them can change what they compute.
    found, stored = asdict(model.config), asdict(config)
    changed = [name for name in stored if found[name] != stored[name] and name not in ("context", "stop_tokens")]
    if changed:
        raise UserError(
            f"{path} is not configured as {folder} was trained with: "
            + ", ".join(f"{name} is {found[name]}, was {stored[name]}" for name in changed)
        )
    return model


def write_parts(folder: Path, parts: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    """Write each part's tensors to its file; return the files' SHA-256."""
    hashes = {}
    for name, state in parts.items():
        file = folder / f"{name}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, file)
        hashes[name] = hash_weights(file)
    return hashes


def read_part(folder: Path, name: str, description: dict) -> dict[str, Tensor]:
    """A part's tensors.

    Raises:
        UserError: its file is missing, or is not the one that the description was written with.
    """
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        raise UserError(f"{folder} is incomplete: {file.name} is missing; write the run anew")
    if hash_weights(file) != description["parts"].get(name):
        raise UserError(f"{file} is not what {CONFIG_FILE} describes: it was damaged or exchanged; write the run anew")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def write_yaml(file: Path, description: dict) -> None:
    """Write a run's description."""
    plain = json.loads(json.dumps(description))  # tuples as lists
    file.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")


def read_description(folder: Path) -> dict:
    """A run's description, or that of an encoder alone.

    Raises:
        UserError: there is none, or it is not whole.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UserError(_why_not_a_model(folder))
    try:
        description = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{file} is not a run of format {FORMAT}")
    if not isinstance(description.get("parts"), dict):  # the last entry
        raise UserError(f"{file} is not whole: it does not list its parts; write the run anew")
    if "model" in description and not (
        isinstance(description.get("processor"), dict) and "language_model" in description
    ):
        raise UserError(f"{file} is not whole: it lacks the processor or the language model; write the run anew")
    return description


def _is_mllama(folder: Path) -> bool:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == "mllama"


def _why_not_a_model(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}; `make demo` makes runs/demo, `mm train` makes others"
    if any(folder.glob("checkpoints/*")):
        return (
            f"{folder} holds a training run that has not finished: no {CONFIG_FILE}; run the same `mm train` command "
            "again and it resumes"
        )
    return f"{folder} is neither a run folder ({CONFIG_FILE}) nor a Llama 3.2 Vision folder (config.json of mllama)"
