"""Tiny tokenizers of the kinds that language models have, and chat templates as they write them."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "The answer is a red circle. I see 1 picture. The picture shows a blue square and I like it.",
    "A user asks an assistant: is there a circle? yes. no, 1 square. Hello, this is a test of the system.",
    "[INST] what is it? [/INST] The colour is red [INST] user [/INST] assistant",
] * 3

# Every token of a turn's frame is a control token, as in ChatML.
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Llama 2: the frame is text, and spaces stand between it and the texts.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% endgeneration %}{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
# The prompt ends with a space, as in many templates of models trained from Mistral.
TRAILING_SPACE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.role.upper() }}: {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
# As Zephyr and TinyLlama: the names of roles are text, a line break stands before each text.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "trailing space": TRAILING_SPACE, "zephyr": ZEPHYR}
VOCABULARIES = ("byte-level", "sentencepiece", "sentencepiece legacy", "unigram")


@cache
def vocabulary(kind: str) -> Tokenizer:
    """A tokenizer whose words begin with white space, as those trained on much text have them."""
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    options = {"special_tokens": special, "show_progress": False}
    words = pre_tokenizers.Metaspace(prepend_scheme="always")
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, **options)
        tokenizer.train_from_iterator(TEXT, trainer)
        return tokenizer
    spelled = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = words
        options["special_tokens"] = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.UnigramTrainer(vocab_size=380, unk_token="<unk>", **options)
        tokenizer.train_from_iterator(TEXT, trainer)
        pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
        pieces += [("▁The", -4.0), ("▁I", -4.5), ("▁1", -5.0)]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.pre_tokenizer = words
        trainer = trainers.BpeTrainer(vocab_size=240, **options)
        tokenizer.train_from_iterator(TEXT, trainer)
        pieces = tokenizer.get_vocab()
        pieces |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
        merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
        tokenizer = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if kind == "sentencepiece legacy":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_tokens(special)
    tokenizer.decoder = decoders.Sequence([*spelled, decoders.Strip(" ", 1, 0)])
    return tokenizer


def fast_tokenizer(kind: str, chat_template: str | None = None, **options) -> PreTrainedTokenizerFast:
    """The tokenizer as one of `transformers`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary(kind),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
        **options,
    )
