"""Rebuild the tokenizer of a GGUF file with `tokenizers`.

`transformers` can read such a tokenizer too, but ignores the pre-tokenizer: it splits "\\n\\n" before a digit in
another way than SmolLM2. So the pre-tokenizers that llama.cpp names are defined here.
"""

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from foundation.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types

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
    if kind == "gpt2":
        tokenizer = _byte_level(values, source)
    elif kind == "llama":
        tokenizer = _sentencepiece(values)
    else:
        raise UserError(f"{source}: tokenizer {kind!r} is not supported; it can be gpt2 or llama")
    types = values.get("ggml.token_type") or [1] * len(pieces)
    added = [
        AddedToken(piece, special=piece_type == CONTROL, normalized=False)
        for piece, piece_type in zip(pieces, types, strict=True)
        if piece_type in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    ids = {name: values.get(f"ggml.{key}_token_id") for name, key in _SPECIAL_TOKENS.items()}
    special = {name: pieces[token_id] for name, token_id in ids.items() if token_id is not None}
    add_bos = values.get("ggml.add_bos_token", kind == "llama" or pre_tokenizer in _LLAMA3_NAMES)
    before = ["bos_token"] if add_bos and "bos_token" in special else []
    after = ["eos_token"] if values.get("ggml.add_eos_token", False) and "eos_token" in special else []
    if before or after:
        single = [*(special[name] for name in before), "$A", *(special[name] for name in after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=single + [piece.replace("$A", "$B") for piece in single],
            special_tokens=sorted({(special[name], ids[name]) for name in (*before, *after)}),
        )
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    built.chat_template = values.get("chat_template")
    return built


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


def _sentencepiece(values: dict[str, Any]) -> Tokenizer:
    """SentencePiece BPE with byte fallback: a pair merges if it spells a piece; the piece with the best score first."""
    pieces, scores = values["ggml.tokens"], values["ggml.scores"]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    ranked = []
    for piece, token_id in vocabulary.items():
        for split in range(1, len(piece)):
            left, right = vocabulary.get(piece[:split]), vocabulary.get(piece[split:])
            if left is not None and right is not None:
                ranked.append((-scores[token_id], left, right))
    merges = [(pieces[left], pieces[right]) for _, left, right in sorted(ranked)]
    unknown = values.get("ggml.unknown_token_id")
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
