"""The tokenizer inside a GGUF file, rebuilt with `tokenizers`.

`transformers` can read such a tokenizer too, but drops how the text is cut before merging (it would join "\\n\\n"
before a digit differently from SmolLM2), so the cutting rules that llama.cpp names are spelled out here.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from foundation.errors import UserError

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types

# How Llama 3 cuts text: contractions, words, runs of up to three digits, other signs, line ends, white space.
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


def build_tokenizer(values: dict, source: object):
    """A `transformers` tokenizer from the metadata under "tokenizer." of a GGUF file.

    Args:
        values: "ggml.model", "ggml.tokens", "ggml.merges", "chat_template", ... without the common prefix.
        source: the file, for messages.

    Raises:
        UserError: a kind of tokenizer, or a way of cutting the text, that is not known, by name.
    """
    from transformers import PreTrainedTokenizerFast

    kind, cut = values.get("ggml.model"), values.get("ggml.pre")
    pieces = values.get("ggml.tokens")
    if not pieces:
        raise UserError(f"{source} holds no tokenizer")
    if kind == "gpt2":
        tokenizer = _byte_level(values, source)
    elif kind == "llama":
        tokenizer = _sentence_pieces(values)
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
    named = {name: pieces[number] for name, number in ids.items() if number is not None}
    begins = values.get("ggml.add_bos_token", kind == "llama" or cut in _LLAMA3_NAMES)
    before = ["bos_token"] if begins and "bos_token" in named else []
    after = ["eos_token"] if values.get("ggml.add_eos_token", False) and "eos_token" in named else []
    if before or after:
        single = [*(named[name] for name in before), "$A", *(named[name] for name in after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=single + [piece.replace("$A", "$B") for piece in single],
            special_tokens=sorted({(named[name], ids[name]) for name in (*before, *after)}),
        )
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    built.chat_template = values.get("chat_template")
    return built


def _byte_level(values: dict, source: object) -> Tokenizer:
    """Byte-level BPE with one of the known ways of cutting text."""
    cut = values.get("ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if cut in ("gpt-2", "gpt2"):
        cutting = byte_level
    elif cut == "smollm":
        cutting = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif cut in _LLAMA3_NAMES or cut == "qwen2":
        pattern = "|".join(_LLAMA3)
        if cut == "qwen2":  # digits stand alone
            pattern = pattern.replace("{1,3}", "")
        cutting = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain])
    else:
        raise UserError(
            f"{source}: its tokenizer cuts text the way {cut!r}, which is not known (smollm, llama-bpe, qwen2 and "
            "gpt-2 are); load the tokenizer from the model's Hugging Face folder instead"
        )
    vocabulary = {piece: number for number, piece in enumerate(values["ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("ggml.merges") or []]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut in _LLAMA3_NAMES))
    tokenizer.normalizer = normalizers.NFC() if cut == "qwen2" else None
    tokenizer.pre_tokenizer = cutting
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_pieces(values: dict) -> Tokenizer:
    """SentencePiece BPE with byte fallback: a pair that spells a piece merges, the best-scored piece first."""
    pieces, scores = values["ggml.tokens"], values["ggml.scores"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    ranked = []
    for piece, number in vocabulary.items():
        for place in range(1, len(piece)):
            left, right = vocabulary.get(piece[:place]), vocabulary.get(piece[place:])
            if left is not None and right is not None:
                ranked.append((-scores[number], left, right))
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
