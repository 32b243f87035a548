"""Comparisons from preference records: the tokens, truncation at the answer's end, and what is refused."""

from dataclasses import replace

import pytest

import mm
from foundation.errors import UserError
from mm.batch import IGNORED
from mm.modalities import IMAGE
from mm.training.comparisons import collate_comparisons, comparison
from shards.format import Record
from shards.preferences import Preference, preference_record


@pytest.fixture(scope="module")
def record(square_record):
    """record(**changes) -> a preference about two pictures."""

    def make(**changes) -> Record:
        media = {"0.png": square_record(0).media["png"], "1.png": square_record(1).media["png"]}
        content = [{"type": "image", "image": name} for name in media]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "which colours?"}]}]
        values = {"messages": messages, "chosen": "red and green", "rejected": "blue", "margin": 2, **changes}
        return preference_record("pair", "train", Preference(**values), media)

    return make


def answer_text(processor, sample) -> str:
    return processor.tokenizer.decode([label for label in sample.labels if label != IGNORED])


def test_the_answers_have_the_tokens_of_training_after_one_prompt(record, tiny_processor):
    one = record(edited="red, green")
    found = comparison(one, tiny_processor)
    assert [answer_text(tiny_processor, answer) for answer in found.answers] == [
        "red, green<|end|>",
        "red and green<|end|>",
        "blue<|end|>",
    ]
    for answer, text in zip(found.answers, ("red, green", "red and green", "blue"), strict=True):
        turns = [*one.json["messages"], {"role": "assistant", "content": text}]
        whole = tiny_processor.record_example(Record("x", {"messages": turns}, one.media))
        assert (answer.tokens, answer.labels) == (whole.tokens, whole.labels)
    pair = comparison(one, tiny_processor, best=2)
    assert [answer_text(tiny_processor, answer) for answer in pair.answers] == ["red, green<|end|>", "blue<|end|>"]
    assert pair.margin == 2


def test_pictures_stand_in_the_batch_once(record, tiny_processor):
    batch = collate_comparisons([comparison(record(), tiny_processor), comparison(record(chosen="x"), tiny_processor)])
    assert len(batch.rows.images) == 2 and batch.rows.row_images == [[0, 1]] * 4
    assert batch.groups == [[0, 1], [2, 3]] and batch.margins == [2, 2] and batch.references is None


def test_an_answer_is_cut_at_its_end_and_a_prompt_never(record, tiny_processor, tiny_config):
    whole = comparison(record(), tiny_processor).answers[0]
    num_prompt = whole.labels.count(IGNORED)
    for limit in range(num_prompt + 1, len(whole.tokens)):
        cut = comparison(record(), tiny_processor, max_tokens=limit).answers[0]
        assert cut.tokens == whole.tokens[:limit] and cut.labels == whole.labels[:limit]
        assert cut.tokens.count(tiny_config.image_token_id) == len(cut.images) == 2
    with pytest.raises(UserError, match="leaves no room for an answer within"):
        comparison(record(), tiny_processor, max_tokens=num_prompt)
    with pytest.raises(UserError, match="same tokens"):
        comparison(record(chosen="blue sky"), tiny_processor, max_tokens=num_prompt + 1)


def test_an_answer_that_spells_an_image_token_is_refused(record, tokenizer, tiny_config):
    """A released model's image token is in the vocabulary, and with control tokens allowed a text can spell it."""
    spelled = tokenizer.convert_tokens_to_ids("<|start|>")
    config = replace(tiny_config, image_token_id=spelled)
    processor = mm.Processor(tokenizer, config, allow_control_tokens=True)
    with pytest.raises(UserError, match=r"record pair.*holds the token .* an answer is text alone"):
        comparison(record(chosen="red <|start|>"), processor)


def test_a_mark_of_a_picture_in_an_answer_is_refused(record, tiny_processor):
    with pytest.raises(UserError, match="stands for media"):
        comparison(record(chosen=f"red {IMAGE.mark}"), tiny_processor)
