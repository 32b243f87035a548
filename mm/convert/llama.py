"""Load language models of the Llama family from Hugging Face folders and GGUF files.

    path -> configuration (settings that the decoder does not support are errors) -> tensors -> LanguageModel

The decoder has the state-dict names of a Hugging Face Llama folder; `mm/convert/gguf_file.py` renames a GGUF file's
tensors.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foundation.errors import UserError
from layers.meta import meta_device
from layers.sources import materialise
from mm.convert import gguf_file, tokenizer_folder
from mm.convert.folder import read_config, read_tensors
from mm.convert.llama_config import check_num_layers, language_model_config, stop_tokens
from mm.convert.report import load_tensors
from mm.language_model import LanguageModel, LanguageModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(path: str | Path, dtype: torch.dtype | None = None) -> LanguageModel:
    """Load a language model from a Hugging Face folder (config.json and safetensors) or a `.gguf` file.

    Args:
        dtype: of the weights; None keeps a folder's, and gives float32 for a GGUF file.

    Returns:
        the model; its attribute `report` is a `LoadingReport`.

    Raises:
        UserError: an architecture, setting or tensor is not supported, a file is damaged, or the weights are pickles;
            the message names it.
    """
    model = open_model(path)
    materialise(model, dtype=dtype, threads=torch.get_num_threads())
    return model


def open_model(path: str | Path) -> LanguageModel:
    """As `load`, but the weights stay in the file until they are used: those of a folder as memory-mapped tensors of
    their own types, those of a GGUF file as sources (`layers.sources`)."""
    path = Path(path)
    if path.is_file():
        config, tensors, ignored, notes = gguf_file.read(path)
    else:
        values, generation = read_config(path)
        config, notes = language_model_config(values, stop_tokens(values, generation))
        tensors = read_tensors(path)
        ignored = {name: "rotary frequencies are computed" for name in tensors if name.endswith("rotary_emb.inv_freq")}
    for name in ignored:
        tensors.pop(name, None)
    return build(config, tensors, path, ignored, notes)


def read_shape(path: str | Path) -> LanguageModelConfig:
    """The configuration of the model that `load` would load, without reading weights.

    Raises:
        UserError: an architecture or setting is not supported, or a file is damaged.
    """
    path = Path(path)
    if path.is_file():
        return gguf_file.read_shape(path)
    values, generation = read_config(path)
    return language_model_config(values, stop_tokens(values, generation))[0]


def build(
    config: LanguageModelConfig, tensors: dict[str, Tensor], source: Path, ignored: dict[str, str], notes: list[str]
) -> LanguageModel:
    """Build a language model from tensors under its own names; of two tied tables one may be missing."""
    if config.tied_embeddings and HEAD in tensors:
        table = tensors.get(TABLE)
        if table is None:
            tensors[TABLE] = tensors.pop(HEAD)
            notes = [*notes, f"{HEAD} is the embedding table too: tied, and stored under this name alone"]
        elif torch.equal(tensors[HEAD], table):
            del tensors[HEAD]
            ignored = ignored | {HEAD: f"tied to {TABLE}, which has the same values"}
        else:
            # As in transformers, the stored values override the setting.
            config = dataclasses.replace(config, tied_embeddings=False)
            notes = [*notes, "tie_word_embeddings is set, but lm_head.weight has other values: not tied"]
    check_num_layers(config.num_layers, len(tensors))
    with meta_device():
        model = LanguageModel(config)
    model.report = load_tensors(model, tensors, source=source, ignored=ignored, notes=notes)
    return model


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """Load the `transformers` tokenizer, with its chat template, of a Hugging Face folder or a `.gguf` file.

    Raises:
        UserError: there is no tokenizer, or one of an unknown kind; the message says what to do.
    """
    path = Path(path)
    if path.is_file():
        return gguf_file.read_tokenizer(path)
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor a file")
    return tokenizer_folder.read_tokenizer(path)
