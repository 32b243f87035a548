"""The run folder: training writes it, and `mm.load` reads it.

config.yaml                     description: configurations, processor settings, hashes (`mm.run_files`)
vision_encoder.safetensors      one file per part that the model has
image_adapter.safetensors       (video_adapter, speech_encoder, speech_adapter)
extra_embeddings.safetensors
tokenizer/                      the language model's tokenizer
language_model.safetensors      only with `bundle`; else the frozen LM is named by path and SHA-256
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

import mm.convert.llama
import mm.convert.mllama
from foundation.errors import UserError
from layers.meta import meta_device
from layers.sources import materialise
from mm.config import ModelConfig, from_dict, to_dict
from mm.convert import mllama_config
from mm.convert.folder import read_config as folder_config
from mm.convert.report import load_tensors
from mm.device import resolve_device
from mm.inference.quantisation import quantise
from mm.language_model import LanguageModel, LanguageModelConfig
from mm.model import MultimodalModel
from mm.processor import Processor
from mm.run_files import (
    CONFIG_FILE,
    ENCODERS,
    Description,
    hash_weights,
    read_description,
    read_part,
    replaced_files,
    take_part,
    why_not_a_model,
    write_description,
    write_parts,
)
from mm.tokenizer_fit import use_stop_tokens

# The model's parts besides the language model, each with a file of its name: fields of `ModelConfig`.
PARTS = tuple(
    field.name for field in dataclasses.fields(ModelConfig) if field.name not in ("language_model", "image_token_id")
)


def load(
    folder: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    language_model: str | Path | None = None,
    quantisation: str | None = None,
    share: Callable[[MultimodalModel], MultimodalModel] | None = None,
) -> tuple[MultimodalModel, Processor]:
    """A model and its processor, ready to generate.

    Args:
        folder: a run folder of ours, or a Llama 3.2 Vision folder from Hugging Face.
        device: None is the CPU.
        dtype: of the weights; None is the language model's own dtype.
        language_model: the present path of a run's language model, if it moved.
        quantisation: "fp8" or "int8", see `mm.inference.quantisation.quantise`.
        share: gives the part of a model that this rank holds, before weights are read from their files, as
            `mm.parallel.inference.part_of_rank` does.

    Raises:
        UserError: the folder is neither, is incomplete, or its language model is missing or differs from the one in
            training; the machine does not have the device.
    """
    device = None if device is None else resolve_device(device)
    model, processor = open_model(folder, language_model)
    dtype = dtype or model.language_model.model.norm.weight.dtype
    if share is not None:
        model = share(model)
    materialise(model, device, dtype, threads=torch.get_num_threads())
    model.eval()
    if quantisation is not None:
        quantise(model, quantisation)
    return model, processor


def open_model(folder: str | Path, language_model: str | Path | None = None) -> tuple[MultimodalModel, Processor]:
    """As `load`, but the weights stay in their files until they are used, each in its own type (`layers.sources`)."""
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        model, processor = _load_run(folder, language_model)
    elif _is_mllama(folder):
        model = mm.convert.mllama.load(folder)
        processor = Processor(mm.convert.llama.load_tokenizer(folder), model.config)
    else:
        raise UserError(why_not_a_model(folder))
    use_stop_tokens(model, processor)
    return model, processor


def save(
    folder: str | Path,
    model: MultimodalModel,
    processor: Processor,
    language_model: str | Path | None = None,
    bundle: bool = False,
    write: bool = True,
) -> None:
    """Write a run folder, tensor by tensor; an older one under the same name keeps its other files.

    Args:
        write: False on the ranks that do not write. After training on several ranks all of them must call this, because
            they gather the trained weights together.
        language_model: the folder or GGUF file that the frozen LM was loaded from.
        bundle: copy the LM's tensors in, so that the run folder needs no other file.

    Raises:
        UserError: neither `language_model` nor `bundle`.
    """
    if language_model is None and not bundle:
        raise UserError("name the language model's path (language_model=...), or copy it in (bundle=True)")
    parts: dict[str, dict[str, Tensor]] = {"extra_embeddings": {"extra_embeddings": model.extra_embeddings}}
    for name in PARTS:
        if getattr(model, name) is not None:
            parts[name] = getattr(model, name).state_dict(keep_vars=True)
    if bundle:
        state = model.language_model.state_dict(keep_vars=True)
        if model.config.language_model.tied_embeddings:
            del state["lm_head.weight"]
        parts["language_model"] = state
    if not write:
        take_part(parts)
        return
    with replaced_files(folder, last=CONFIG_FILE) as new:
        hashes = write_parts(new, parts)
        processor.tokenizer.save_pretrained(new / "tokenizer")
        origin = None
        if language_model is not None and not bundle:
            origin = {"path": str(Path(language_model).resolve()), "sha256": hash_weights(language_model)}
        write_description(
            new,
            "model",
            model=to_dict(model.config),
            processor=processor.settings(),
            language_model=origin,
            parts=hashes,
        )


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
    """The path of a run folder's language model; None where the folder itself holds it."""
    folder = Path(folder)
    origin = read_description(folder)["language_model"] if (folder / CONFIG_FILE).is_file() else None
    return None if origin is None else origin["path"]


def _load_run(folder: Path, language_model: str | Path | None) -> tuple[MultimodalModel, Processor]:
    description = read_description(folder)
    config = _run_config(folder, description)
    with meta_device():
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


def _run_config(folder: Path, description: Description) -> ModelConfig:
    if description["kind"] in ENCODERS:
        raise UserError(
            f"{folder} holds only the {ENCODERS[description['kind']]} of a model; train an adapter on it first "
            "(mm train)"
        )
    try:
        return from_dict(description["model"])
    except ValueError as error:
        raise UserError(f"{folder / CONFIG_FILE}: {error}") from error


def _load_origin(
    folder: Path, origin: dict[str, str], config: LanguageModelConfig, moved_to: str | Path | None
) -> LanguageModel:
    path = Path(moved_to or origin["path"])
    if not path.exists():
        raise UserError(
            f"the language model of {folder} is not at {path}; name its path (language_model=...), or save runs with "
            "bundle=True"
        )
    if hash_weights(path) != origin["sha256"]:
        raise UserError(f"{path} is not the language model that {folder} was trained with: its SHA-256 differs")
    model = mm.convert.llama.open_model(path)
    # The hash covers the weights alone; the configuration beside them also determines what they compute.
    found, stored = asdict(model.config), asdict(config)
    changed = [name for name in stored if found[name] != stored[name] and name not in ("context", "stop_tokens")]
    if changed:
        raise UserError(
            f"{path} is not configured as {folder} was trained with: "
            + ", ".join(f"{name} is {found[name]}, was {stored[name]}" for name in changed)
        )
    return model


def _is_mllama(folder: Path) -> bool:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == "mllama"
