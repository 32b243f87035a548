"""Language models of the Llama family, out of Hugging Face folders and GGUF files.

    path -> configuration (anything that this decoder does not compute is refused by name) -> tensors -> LanguageModel

The state-dict names of a Hugging Face Llama folder are the decoder's own, so tensors of a folder go in as they are;
`mm/convert/gguf_file.py` renames those of a GGUF file.
"""

import dataclasses
from pathlib import Path

import torch

from foundation.errors import UserError
from layers.meta import meta_device
from mm.convert import gguf_file
from mm.convert.folder import read_config, read_tensors
from mm.convert.llama_config import check_num_layers, language_model_config, stop_tokens
from mm.convert.report import load_tensors
from mm.language_model import LanguageModel, LanguageModelConfig


def load(path: str | Path, dtype: torch.dtype | None = None) -> LanguageModel:
    """A language model from a Hugging Face folder (config.json and safetensors) or a `.gguf` file.

    Args:
        dtype: of the weights; None keeps a folder's own, and gives float32 for a GGUF file.

    Returns:
        the model, with what happened to each tensor in its attribute `report`.

    Raises:
        UserError: an architecture, setting or tensor that the decoder does not have, by name; a damaged file;
            weights stored as pickles.
    """
    path = Path(path)
    if path.is_file():
        config, tensors, ignored, notes = gguf_file.read(path, dtype)
    else:
        values, generation = read_config(path)
        config, notes = language_model_config(values, stop_tokens(values, generation))
        tensors = read_tensors(path, dtype)
        ignored = {name: "rotary frequencies are computed" for name in tensors if name.endswith("rotary_emb.inv_freq")}
    for name in ignored:
        tensors.pop(name, None)
    return build(config, tensors, path, ignored, notes)


def read_shape(path: str | Path) -> LanguageModelConfig:
    """What `load` would load, without its weights.

    Raises:
        UserError: an architecture or setting that the decoder does not have, by name; a damaged file.
    """
    path = Path(path)
    if path.is_file():
        return gguf_file.read_shape(path)
    values, generation = read_config(path)
    return language_model_config(values, stop_tokens(values, generation))[0]


def build(
    config: LanguageModelConfig, tensors: dict, source: Path, ignored: dict[str, str], notes: list[str]
) -> LanguageModel:
    """A language model around tensors under its own names; `lm_head.weight` may be left out when tied."""
    if config.tied_embeddings and "lm_head.weight" in tensors:
        table = tensors.get("model.embed_tokens.weight")
        if table is not None and torch.equal(tensors["lm_head.weight"], table):
            del tensors["lm_head.weight"]
            ignored = ignored | {"lm_head.weight": "tied to model.embed_tokens.weight, which has the same values"}
        else:
            # As transformers does: the stored values win over the setting.
            config = dataclasses.replace(config, tied_embeddings=False)
            notes = [*notes, "tie_word_embeddings is set, but lm_head.weight has values of its own: not tied"]
    check_num_layers(config.num_layers, len(tensors))
    with meta_device():
        model = LanguageModel(config)
    model.report = load_tensors(model, tensors, source=source, ignored=ignored, notes=notes)
    return model


def load_tokenizer(path: str | Path):
    """The `transformers` tokenizer, with its chat template, of a Hugging Face folder or a `.gguf` file.

    Raises:
        UserError: no tokenizer there, or a kind of tokenizer in a GGUF file that is not known, by name.
    """
    path = Path(path)
    if path.is_file():
        return gguf_file.read_tokenizer(path)
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor a file")
    # AutoTokenizer of transformers 5 rebuilds some classes from vocabulary and merges alone: of SmolLM2's folder, a
    # GPT2Tokenizer, it loses the rule that cuts digits apart. Where there is a tokenizer.json, it holds every rule.
    if (path / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast as kind
    else:
        from transformers import AutoTokenizer as kind  # takes a quarter of a second more
    try:
        return kind.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here
        raise UserError(f"{path} holds no tokenizer that transformers can read: {error}") from error
