"""Pieces of `mm.stream` join to the text of `mm.generate`, whatever the vocabulary, its clean-up and its tokens."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import mm
from tests.mm.vocabularies import CHATML, VOCABULARIES, fast_tokenizer

FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
CLEAN_UP = (
    {"clean_up_tokenization_spaces": False},
    {"clean_up_tokenization_spaces": True},
    {name: True for name in ("clean_up_tokenization_spaces", FORCED)},
)
MESSAGES = [{"role": "user", "content": "say it"}]


@pytest.fixture(scope="module")
def answer(tiny_config):
    """answer(kind, options, tokens) -> what `stream` and `generate` make of a model's tokens, and the tokenizer."""
    processors = {}

    def processor_of(kind: str, options: dict) -> mm.Processor:
        key = (kind, *options)
        if key not in processors:
            tokenizer = fast_tokenizer(kind, CHATML, **options)
            language_model = replace(tiny_config.language_model, vocab_size=len(tokenizer))
            config = replace(tiny_config, language_model=language_model, image_token_id=len(tokenizer))
            processors[key] = mm.Processor(tokenizer, config)
        return processors[key]

    def both(
        kind: str, options: dict, tokens: list[int] | Callable[[], Iterable[int]], **more
    ) -> tuple[list[str], str]:
        processor = processor_of(kind, options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                mm.generation, "stream_tokens", lambda *_, **__: tokens() if callable(tokens) else iter(tokens)
            )
            pieces = list(mm.stream(None, processor, MESSAGES, **more))
            return pieces, mm.generate(None, processor, MESSAGES, **more)

    return both


@pytest.mark.parametrize("kind", VOCABULARIES)
@pytest.mark.parametrize("options", CLEAN_UP, ids=["none", "clean-up", "clean-up forced"])
@pytest.mark.parametrize("text", ["I do n't , it 's a ' b ' !", "Hello . Is it ? no", "naïve 😀 中文 x", " a  b \n"])
def test_pieces_join_to_the_answer(answer, kind, options, text):
    tokens = fast_tokenizer(kind).encode(text, add_special_tokens=False)
    pieces, whole = answer(kind, options, tokens)
    assert "".join(pieces) == whole == text.strip()
    assert len(pieces) > 1 and all(pieces)


@pytest.mark.parametrize("control", ["<s>", "<|im_start|>"])  # the second is special in `tokenizers` alone
def test_a_byte_that_breaks_those_before_it(answer, control):
    """A SentencePiece decoder reads a run of byte tokens at once: a lone byte after é makes three broken characters."""
    tokenizer = fast_tokenizer("sentencepiece")
    tokens = tokenizer.convert_tokens_to_ids(["▁a", "<0xC3>", "<0xA9>", control, "<0xE4>", "▁red"])
    pieces, whole = answer("sentencepiece", {}, tokens)
    assert "".join(pieces) == whole == "a\ufffd\ufffd\ufffd red"


@pytest.mark.fuzz
@given(st.sampled_from(VOCABULARIES), st.sampled_from(CLEAN_UP), st.lists(st.integers(0, 1000), max_size=24))
@example("unigram", CLEAN_UP[1], [])
def test_pieces_of_any_tokens_join(answer, kind, options, tokens):
    size = len(fast_tokenizer(kind))
    pieces, whole = answer(kind, options, [token % size for token in tokens])
    assert "".join(pieces) == whole
    assert all(pieces)


@pytest.mark.parametrize("kind", VOCABULARIES)
@pytest.mark.parametrize(
    ("stops", "kept"),
    [
        (["red car"], "a "),
        (["cars", "car"], "a red "),
        ([" rex", "d c"], "a re"),
        (["blue"], "a red car, red"),
        (["redx", "a"], ""),
    ],
)
def test_answers_end_before_the_first_stop_string(answer, kind, stops, kept):
    """No piece holds a part of it, and what merely begins like one is given in the end."""
    tokens = fast_tokenizer(kind).encode("a red car, red", add_special_tokens=False)
    pieces, whole = answer(kind, {}, tokens, stop_strings=stops)
    assert "".join(pieces) == whole == kept
    assert all(pieces)


def test_no_token_is_asked_for_after_a_stop_string(answer):
    tokens = fast_tokenizer("sentencepiece").encode("a red car, red", add_special_tokens=False)
    drawn = []
    draw = lambda: (drawn.append(token) or token for token in tokens)  # noqa: E731
    answer("sentencepiece", {}, draw, stop_strings=["red"])
    assert 0 < len(drawn) < 2 * len(tokens)


def test_an_empty_stop_string_is_refused(answer):
    with pytest.raises(ValueError, match="a stop string is empty"):
        answer("sentencepiece", {}, [], stop_strings=["x", ""])
