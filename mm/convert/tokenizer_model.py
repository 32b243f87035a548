"""tokenizer.model files, which come in two forms: SentencePiece's protocol buffer, and tiktoken's text.

Both become the metadata of a GGUF file's tokenizer, as in llama.cpp's converter, so `gguf_tokenizer` builds all three.
`transformers` converts them too, but loses the space that SentencePiece puts before a text where the folder names no
class of tokenizer, and leaves a tiktoken file without its control tokens, which stand elsewhere.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from foundation.errors import UserError
from foundation.extras import import_extra
from mm.convert.gguf_tokenizer import CONTROL, NORMAL, USER_DEFINED

TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")
BPE = 2  # SentencePiece's number of the kind of model


def read_tokenizer_model(path: Path, added: dict[int, tuple[str, bool]], settings: dict[str, Any]) -> dict[str, Any]:
    """The metadata that `gguf_tokenizer.build_tokenizer` takes.

    Args:
        added: tokens that the folder adds, by id: text, and whether it is a control token.
        settings: tokenizer_config.json; {} without one.

    Raises:
        UserError: another form or kind of tokenizer, or a tiktoken file whose folder names no control tokens.
        MissingExtraError: a SentencePiece file, and the package that reads it is not installed.
    """
    data = path.read_bytes()
    values = _tiktoken(path, data, added) if TIKTOKEN_LINE.match(data) else _sentencepiece(path, data)
    tokens, types = values["ggml.tokens"], values["ggml.token_type"]
    for token_id in range(len(tokens), max(added, default=-1) + 1):
        tokens.append(f"<|reserved_token_{token_id}|>")
        types.append(CONTROL)
    for token_id, (text, is_control) in added.items():
        if is_control or tokens[token_id] != text:
            tokens[token_id], types[token_id] = text, CONTROL if is_control else USER_DEFINED
    if "ggml.scores" in values:
        values["ggml.scores"] += [0.0] * (len(tokens) - len(values["ggml.scores"]))
    for name in ("bos", "eos"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in tokens:
            values[f"ggml.{name}_token_id"] = tokens.index(token)
        if isinstance(add := settings.get(f"add_{name}_token"), bool):
            values[f"ggml.add_{name}_token"] = add
    return values


def _tiktoken(path: Path, data: bytes, added: dict[int, tuple[str, bool]]) -> dict[str, Any]:
    """Llama 3's form: a line of base64 and rank for each token, none of them a control token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if not added:
        raise UserError(
            f"{path} is a tiktoken file, which holds no control tokens, and its folder has no added_tokens_decoder in "
            "tokenizer_config.json: take tokenizer.json of the model's Hugging Face folder"
        )
    try:
        pairs = [line.split() for line in data.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{path} is not a tiktoken file: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path} is damaged: its ranks are not 0 to {len(ranks) - 1}")
    letters = bytes_to_unicode()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):  # the merge of the lowest rank comes first
        pairs_of = [(token[:split], token[split:]) for split in range(1, len(token))]
        known = [pair for pair in pairs_of if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [f"{spelled[left]} {spelled[right]}" for left, right in known]
    tokens = [spelled[token] for token in sorted(ranks, key=ranks.__getitem__)]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "llama-bpe",
        "ggml.tokens": tokens,
        "ggml.token_type": [NORMAL] * len(tokens),
        "ggml.merges": merges,
    }


def _sentencepiece(path: Path, data: bytes) -> dict[str, Any]:
    """The form of Llama 1 and 2 and Mistral: BPE with bytes for unknown characters, without normalisation."""
    proto = import_extra("sentencepiece.sentencepiece_model_pb2", "sentencepiece", f"{path}, a SentencePiece file,")
    model = proto.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # of the protobuf package, which is imported where sentencepiece is
        raise UserError(f"{path} is neither a SentencePiece nor a tiktoken file: {error}") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    others = {
        "no pieces": not model.pieces,
        "another kind than BPE": trainer.model_type != BPE,
        f"normalisation {normalizer.name!r}": bool(normalizer.precompiled_charsmap),
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        # `tokenizers` splits a text at such symbols first, and then puts a space before each part.
        "user-defined symbols": any(piece.type == USER_DEFINED for piece in model.pieces),
    }
    found = [name for name, present in others.items() if present]
    if found:
        raise UserError(
            f"{path} is a SentencePiece file with {', '.join(found)}, which Llama's and Mistral's have not: not "
            "supported; take tokenizer.json of the model's Hugging Face folder"
        )
    ids = {"unknown": trainer.unk_id, "bos": trainer.bos_id, "eos": trainer.eos_id, "padding": trainer.pad_id}
    return {
        "ggml.model": "llama",
        "ggml.tokens": [piece.piece for piece in model.pieces],
        "ggml.scores": [piece.score for piece in model.pieces],
        "ggml.token_type": [piece.type for piece in model.pieces],
        "ggml.add_space_prefix": normalizer.add_dummy_prefix,
        **{f"ggml.{name}_token_id": token_id for name, token_id in ids.items() if token_id >= 0},
    }
