"""tokenizer.model files without tokenizer.json: the tokens are those of SentencePiece and of tiktoken themselves."""

import base64
import builtins
import io
import json
import sys
from dataclasses import replace

import pytest
import sentencepiece
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mm.convert import llama
from mm.processor import Processor

CORPUS = ["Hello world, the first user of the year will see café items", "a b  c hello <s> hello </s> 12 345"] * 20
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CONTROLS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
VARIANTS = {
    "llama": {},
    "no prefix": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False},
    "more control tokens": {"control_symbols": ["<|im_end|>", "he"]},
}


def train(**options) -> bytes:
    """A SentencePiece model of Llama's kind."""
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "vocab_size": 350,
        "character_coverage": 1.0,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    out = io.BytesIO()
    if not options.get("byte_fallback", True):
        settings["vocab_size"] = 90
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, **{**settings, **options}
    )
    return out.getvalue()


def write_folder(folder, model: bytes, config=None, **files):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def sentencepiece_pairs(tmp_path_factory):
    """By variant: ours, and SentencePiece's own."""
    pairs = {}
    for name, options in VARIANTS.items():
        model = train(**options)
        ours = llama.load_tokenizer(write_folder(tmp_path_factory.mktemp("model"), model))
        pairs[name] = ours, sentencepiece.SentencePieceProcessor(model_proto=model)
    return pairs


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """A byte-level vocabulary as tiktoken has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return {bytes(bytes_of[letter] for letter in piece): number for piece, number in tokenizer.get_vocab().items()}


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    lines = sorted(ranks.items(), key=lambda pair: pair[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in lines)


def tiktoken_config(ranks) -> dict:
    decoder = {str(len(ranks) + n): {"content": text, "special": True} for n, text in enumerate(CONTROLS)}
    return {
        "added_tokens_decoder": decoder,
        "bos_token": CONTROLS[0],
        "eos_token": {"__type": "AddedToken", "content": CONTROLS[2]},
    }


@pytest.fixture(scope="module")
def tiktoken_pair(ranks, tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("model"), tiktoken_file(ranks), tiktoken_config(ranks))
    encoding = tiktoken.Encoding("x", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
    return llama.load_tokenizer(folder), encoding


ODD = "ab ceHlo1,<>s/|\n\t▁é你𝄞\u0301\u00a0\x00"
WORDS = [*"  \n", *CORPUS[0].split(), *CORPUS[1].split(), "<0x0A>"]
odd_text = st.text(st.sampled_from(ODD) | st.characters(exclude_categories=["Cs"]))
worded = st.lists(st.sampled_from(WORDS) | odd_text).map("".join)


@pytest.mark.fuzz
@given(text=worded, variant=st.sampled_from(sorted(VARIANTS)))
@example(text=" two  spaces ", variant="llama")
@example(text="", variant="llama")
def test_sentencepiece_files_give_the_tokens_of_sentencepiece(sentencepiece_pairs, text, variant):
    ours, theirs = sentencepiece_pairs[variant]
    # Control tokens spelled in a text are text to SentencePiece, which `split_special_tokens` asks of transformers.
    tokens = ours.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokens == theirs.encode(text)


@pytest.mark.fuzz
@given(text=worded)
def test_tiktoken_files_give_the_tokens_of_tiktoken(tiktoken_pair, text):
    ours, theirs = tiktoken_pair
    assert ours.encode(text, add_special_tokens=False) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


def test_a_sentencepiece_folder_has_its_special_tokens(tmp_path, sentencepiece_pairs):
    ours, theirs = sentencepiece_pairs["llama"]
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
    assert ours("Hello").input_ids == [theirs.bos_id(), *theirs.encode("Hello")]
    assert ours.decode(ours("Hello  world").input_ids, skip_special_tokens=True) == "Hello  world"
    config = {"add_bos_token": False, "add_eos_token": True, "chat_template": "T", "eos_token": "<end>"}
    size = theirs.get_piece_size()
    folder = write_folder(tmp_path, train(), config, added_tokens={"<end>": size + 1, "[PAD]": size})
    ours = llama.load_tokenizer(folder)
    assert ours("Hello").input_ids == [*theirs.encode("Hello"), size + 1]
    assert (ours.eos_token_id, ours.convert_tokens_to_ids("[PAD]"), len(ours)) == (size + 1, size, size + 2)
    assert ours.chat_template == "T"
    ours.save_pretrained(tmp_path / "again")
    assert llama.load_tokenizer(tmp_path / "again")("Hello").input_ids == ours("Hello").input_ids


def test_a_tiktoken_folder_has_its_special_tokens(tiktoken_pair, ranks):
    ours, theirs = tiktoken_pair
    assert ours.convert_tokens_to_ids(CONTROLS) == [len(ranks), len(ranks) + 1, len(ranks) + 2]
    assert (ours.bos_token_id, ours.eos_token_id) == (len(ranks), len(ranks) + 2)
    assert ours("Hello<|eot_id|>").input_ids == [len(ranks), *theirs.encode("Hello"), len(ranks) + 2]
    assert ours.decode(ours("Hello<|eot_id|>").input_ids, skip_special_tokens=True) == "Hello"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("sentencepiece"):
            raise ImportError(name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name.startswith("sentencepiece")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.import_module", refuse)
    folder = write_folder(tmp_path, train())
    with pytest.raises(ValueError, match=r"package sentencepiece: pip install 'mm-adapters\[sentencepiece\]'"):
        llama.load_tokenizer(folder)


def test_other_files_are_refused_with_the_way_out(tmp_path, ranks):
    for model, config, reason in (
        (train(model_type="unigram"), None, "another kind than BPE"),
        (train(normalization_rule_name="nmt_nfkc"), None, "normalisation 'nmt_nfkc'"),
        (train(remove_extra_whitespaces=True), None, "remove_extra_whitespaces"),
        (train(user_defined_symbols=["<sep>"]), None, "user-defined symbols"),
        (b"", None, "no pieces"),
        (b"\x00\x01 nothing of the kind", None, "neither a SentencePiece nor a tiktoken file"),
        (tiktoken_file(ranks), None, "holds no control tokens"),
        (tiktoken_file(ranks)[7:], tiktoken_config(ranks), "its ranks are not 0 to"),
        (train(), {"added_tokens_decoder": {"five": {}}}, "added tokens of its tokenizer cannot be read"),
    ):
        with pytest.raises(ValueError, match=reason):
            llama.load_tokenizer(write_folder(tmp_path, model, config or {}))


def test_a_processor_works_with_both(sentencepiece_pairs, tiktoken_pair, tiny_config):
    for tokenizer in (sentencepiece_pairs["llama"][0], tiktoken_pair[0]):
        language_model = replace(tiny_config.language_model, vocab_size=400, stop_tokens=())
        processor = Processor(tokenizer, replace(tiny_config, language_model=language_model, image_token_id=400))
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "the first  user"}]
        example = processor.example(messages)
        targets = [token for token in example.labels if token >= 0]
        assert targets[-1] == tokenizer.eos_token_id and targets[-1] in processor.stop_tokens
        assert processor.decode(targets) == "the first  user"
