"""Tokenizers of Hugging Face folders: tokenizer.json, or tokenizer.model of SentencePiece or tiktoken, and templates.

A chat template may stand in tokenizer_config.json, in chat_template.jinja, in additional_chat_templates/, or only in
the processor's chat_template.json or processor_config.json.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.errors import UserError
from mm.convert.folder import read_json
from mm.convert.gguf_tokenizer import build_tokenizer
from mm.convert.tokenizer_model import read_tokenizer_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "tokenizer_config.json"
PROCESSOR_FILES = ("chat_template.json", "processor_config.json")
SIDE_FILES = (CONFIG, "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates")
# Of tokenizer_config.json, but written into tokenizer.json as rules, or naming classes with rules of their own.
REPLACED_SETTINGS = ("tokenizer_class", "auto_map", "add_bos_token", "add_eos_token", "legacy", "sp_model_kwargs")


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder, with its chat template: the default one as text, or several by name without one.

    Raises:
        UserError: there is no tokenizer, or none that can be read; the message says why.
    """
    if (folder / "tokenizer.json").is_file():
        tokenizer = _from_pretrained(folder, fast=True)
    elif (folder / "tokenizer.model").is_file():
        with tempfile.TemporaryDirectory() as converted:
            _convert_model_file(folder, Path(converted))
            tokenizer = _from_pretrained(Path(converted), fast=True, source=folder)
    else:
        tokenizer = _from_pretrained(folder, fast=False)
    tokenizer.chat_template = _chat_template(folder, tokenizer.chat_template)
    return tokenizer


def _from_pretrained(folder: Path, fast: bool, source: Path | None = None) -> "PreTrainedTokenizerBase":
    # AutoTokenizer of transformers 5 rebuilds some tokenizers from vocabulary and merges only. From SmolLM2's folder, a
    # GPT2Tokenizer, it loses the rule that splits digits. A tokenizer.json holds all rules.
    kind: Any
    if fast:
        from transformers import PreTrainedTokenizerFast as kind
    else:
        from transformers import AutoTokenizer as kind  # imported here only: it takes a quarter of a second
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds of errors
        raise UserError(f"{source or folder} holds no tokenizer that transformers can read: {error}") from error


def _chat_template(folder: Path, loaded: Any) -> str | dict[str, str] | None:
    """The template called default, or the only one; all by name where several have another name.

    Args:
        loaded: what transformers has read. It drops the template of tokenizer_config.json where there is a folder of
            additional ones, and never reads the processor's files.
    """
    named = _by_name(folder, loaded)
    sources = [CONFIG, *PROCESSOR_FILES]
    for file in (folder / name for name in sources):
        if "default" not in named and file.is_file():
            named = {**_by_name(file, read_json(file).get("chat_template")), **named}
    if "default" in named or len(named) == 1:
        return named.get("default") or next(iter(named.values()))
    return named or None


def _by_name(source: Path, template: Any) -> dict[str, str]:
    """Chat templates by name, from a text, an object, or a list of {"name", "template"}."""
    if isinstance(template, list) and all(isinstance(one, dict) for one in template):
        template = {one.get("name"): one.get("template") for one in template}
    named = {"default": template} if isinstance(template, str) else template or {}
    if not isinstance(named, dict) or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise UserError(f'{source}: chat_template must be a text, or a list of {{"name": ..., "template": ...}}')
    return {name: text.removeprefix("\ufeff") for name, text in named.items() if text}


def _convert_model_file(folder: Path, converted: Path) -> None:
    """Write the tokenizer of a folder with tokenizer.model as tokenizer.json, and copy its other files."""
    settings = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    values = read_tokenizer_model(folder / "tokenizer.model", _added_tokens(folder, settings), settings)
    tokenizer = build_tokenizer(values, source=folder / "tokenizer.model")
    for name in SIDE_FILES:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, converted / name)
        elif (folder / name).is_file():
            shutil.copyfile(folder / name, converted / name)
    tokenizer.backend_tokenizer.save(str(converted / "tokenizer.json"))
    kept = {name: value for name, value in settings.items() if name not in REPLACED_SETTINGS}
    found = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    defaults = {name: token for name, token in found.items() if token is not None}
    (converted / CONFIG).write_text(
        json.dumps({"clean_up_tokenization_spaces": False, **defaults, **kept}, ensure_ascii=False), encoding="utf-8"
    )


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens that the folder adds to the model file's, by id: the text, and whether it is a control token."""
    added: dict[int, tuple[str, bool]] = {}
    try:
        if (folder / "added_tokens.json").is_file():  # of transformers before 4.34
            for text, token_id in read_json(folder / "added_tokens.json").items():
                added[int(token_id)] = (text, True)
        for token_id, token in (settings.get("added_tokens_decoder") or {}).items():
            added[int(token_id)] = (str(token["content"]), bool(token.get("special", False)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder}: the added tokens of its tokenizer cannot be read: {error!r}") from error
    return added
