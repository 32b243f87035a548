"""Rebuild the tokenizer of a GGUF file with `tokenizers`.

`transformers` can read such a tokenizer too, but ignores the pre-tokenizer: it splits "\\n\\n" before a digit in
another way than SmolLM2. So the pre-tokenizers that llama.cpp names are defined here.
"""

import re
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from foundation.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # llama.cpp's token types, which are SentencePiece's

# Llama 3's pre-tokenizer: contractions, words, up to three digits, other characters, line ends, white space.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # where the metadata does not give them, as in llama.cpp
_CONTROL_FORM = re.compile(r"<[^<>\s]{2,}>")  # such as <|im_end|> or </s>


def special_ids(values: dict[str, Any], num_tokens: int) -> tuple[dict[str, int], list[str]]:
    """The ids of special tokens, by llama.cpp's names ("bos", "eos", "eot", "eom", "unknown", "padding").

    An id outside the vocabulary stands for an absent token, as in llama.cpp: converters write 4294967295 (-1) or the
    size of the vocabulary.

    Args:
        values: metadata, see `build_tokenizer`.
        num_tokens: size of the vocabulary.

    Returns:
        ids, and a note for each that lies outside.
    """
    ids, notes = {}, []
    types = values.get("ggml.token_type") or []
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        key = f"ggml.{name}_token_id"
        token_id = values.get(key)
        if type(token_id) is int and 0 <= token_id < num_tokens:
            ids[name] = token_id
            continue
        if token_id is not None:
            notes.append(f"tokenizer.{key} is {token_id}, outside the vocabulary of {num_tokens} tokens: left out")
        default = _SENTENCEPIECE_IDS.get(name, num_tokens) if values.get("ggml.model") == "llama" else num_tokens
        if default < min(len(types), num_tokens) and types[default] in (UNKNOWN, CONTROL):
            ids[name] = default
    return ids, notes


def build_tokenizer(values: dict[str, Any], source: object) -> "PreTrainedTokenizerFast":
    """Build a `transformers` tokenizer from the metadata of a GGUF file.

    Args:
        values: "ggml.model", "ggml.tokens", "ggml.merges", "chat_template", ..., without the prefix "tokenizer.".
        source: the file, for messages.

    Raises:
        UserError: a kind of tokenizer or pre-tokenizer is not supported; the message names it.
    """
    from transformers import PreTrainedTokenizerFast

    kind, pre_tokenizer = values.get("ggml.model"), values.get("ggml.pre")
    pieces = values.get("ggml.tokens")
    if not pieces:
        raise UserError(f"{source} holds no tokenizer")
    types = list(values.get("ggml.token_type") or [NORMAL] * len(pieces))
    ids, _ = special_ids(values, len(pieces))
    if kind == "gpt2":
        tokenizer = _byte_level(values, source)
    elif kind == "llama":
        tokenizer = _sentencepiece(values, types, ids.get("unknown"))
    else:
        raise UserError(f"{source}: tokenizer {kind!r} is not supported; it can be gpt2 or llama")
    template = _chat_template(values)
    for token_id in _mistyped_control_tokens(tokenizer, pieces, types, template):
        types[token_id] = CONTROL
    added = [
        AddedToken(piece, special=piece_type == CONTROL, normalized=False)
        for piece, piece_type in zip(pieces, types, strict=True)
        if piece_type in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    special = {name: pieces[ids[key]] for name, key in _SPECIAL_TOKENS.items() if key in ids}
    add_bos = values.get("ggml.add_bos_token", kind == "llama" or pre_tokenizer in _LLAMA3_NAMES)
    before = ["bos_token"] if add_bos and "bos_token" in special else []
    after = ["eos_token"] if values.get("ggml.add_eos_token", False) and "eos_token" in special else []
    if before or after:
        single = [*(special[name] for name in before), "$A", *(special[name] for name in after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=single + [piece.replace("$A", "$B") for piece in single],
            special_tokens=sorted({(special[name], ids[_SPECIAL_TOKENS[name]]) for name in (*before, *after)}),
        )
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    built.chat_template = template
    return built


def _chat_template(values: dict[str, Any]) -> str | dict[str, str] | None:
    """The default template; without one the only named template, or all of several by name."""
    if values.get("chat_template"):
        return str(values["chat_template"])
    prefix = "chat_template."
    named = {name.removeprefix(prefix): str(text) for name, text in values.items() if name.startswith(prefix)}
    return (next(iter(named.values())) if len(named) == 1 else named) or None


def _mistyped_control_tokens(
    tokenizer: Tokenizer, pieces: list[str], types: list[int], template: str | dict[str, str] | None
) -> list[int]:
    """Ids of tokens that the file calls normal, though only a chat template can write them.

    Such a token has the form <...>, the template writes it, and no text gives it: no merge makes it. Without this the
    template's turns would end with the characters of <|im_end|>, which no generation stops at. llama.cpp, too,
    overrides the type of tokens that look like control tokens.
    """
    text = template if isinstance(template, str) else "".join((template or {}).values())
    numbers = {piece: token_id for token_id, piece in enumerate(pieces)}
    written = [numbers[piece] for piece in sorted(set(_CONTROL_FORM.findall(text))) if piece in numbers]
    plain = [token_id for token_id in written if types[token_id] == NORMAL]
    return [
        token_id
        for token_id in plain
        if tokenizer.encode(pieces[token_id], add_special_tokens=False).ids[-1:] != [token_id]
    ]


def _byte_level(values: dict[str, Any], source: object) -> Tokenizer:
    """Byte-level BPE with one of the known pre-tokenizers."""
    name = values.get("ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer: pre_tokenizers.PreTokenizer
    if name in ("gpt-2", "gpt2"):
        pre_tokenizer = byte_level
    elif name == "smollm":
        pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif name in _LLAMA3_NAMES or name == "qwen2":
        pattern = "|".join(_LLAMA3)
        if name == "qwen2":  # single digits
            pattern = pattern.replace("{1,3}", "")
        pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])
    else:
        raise UserError(
            f"{source}: pre-tokenizer {name!r} is not supported; it can be smollm, llama-bpe, qwen2 or gpt-2. Load the "
            "tokenizer from the model's Hugging Face folder instead"
        )
    vocabulary = {piece: token_id for token_id, piece in enumerate(values["ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("ggml.merges") or []]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in _LLAMA3_NAMES))
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(values: dict[str, Any], types: list[int], unknown: int | None) -> Tokenizer:
    """SentencePiece BPE with byte fallback: a pair merges if it spells a piece; the piece with the best score first.

    Control tokens, bytes and the unknown token are no pieces of a text: the text "<s>" never merges into the token.
    """
    pieces, scores = values["ggml.tokens"], values["ggml.scores"]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    spelled = {piece: n for piece, n in vocabulary.items() if types[n] not in (UNKNOWN, CONTROL, BYTE)}
    ranked = []
    for piece, token_id in spelled.items():
        for split in range(1, len(piece)):
            left, right = spelled.get(piece[:split]), spelled.get(piece[split:])
            if left is not None and right is not None:
                ranked.append((-scores[token_id], left, right))
    merges = [(pieces[left], pieces[right]) for _, left, right in sorted(ranked)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=None if unknown is None else pieces[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = values.get("ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if space else [])])
    return tokenizer
