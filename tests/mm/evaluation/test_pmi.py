"""Choice by pointwise mutual information: its scores, its draws, and what a model that ignores pictures gets."""

import copy
import io
import json
from dataclasses import replace

import pytest
import torch

import mm
import mm.evaluation.choices
import mm.evaluation.likelihood
from mm.batch import blank_pixels
from mm.evaluation.choices import AnswerTokens, distinct_answers, draw_choices
from mm.evaluation.evaluate import evaluate
from mm.evaluation.likelihood import answer_log_likelihoods
from mm.evaluation.pmi import PmiScorer, share_of_tied
from shards.format import Record

CAPTIONS = ("red circle", "blue square", "a red square", "Blue", "green", "a", "a b", "two circles", "Yes.", "no")


@pytest.fixture(scope="module")
def processor(tokenizer, tiny_config) -> mm.Processor:
    return mm.Processor(tokenizer, tiny_config, caption_prompt="Describe the picture.")


@pytest.fixture(scope="module")
def captioned(random_picture):
    def record(index: int, caption: str | None = None, seed: int | None = None) -> Record:
        out = io.BytesIO()
        random_picture(28 * (1 + index % 2), 28, index if seed is None else seed).save(out, format="png")
        values = {"split": "test", "task": "caption", "language": "en", "caption": caption or CAPTIONS[index]}
        return Record(f"c{index}", {"id": f"c{index}", **values}, {"png": out.getvalue()})

    return record


@pytest.fixture(scope="module")
def records(captioned) -> list[Record]:
    return [captioned(index) for index in range(len(CAPTIONS))]


def passes(model, prompt: mm.Sample, answers: list[list[int]]) -> list[float]:
    """The log-likelihoods of answers by a whole pass over each."""
    found = []
    for answer in answers:
        scores = model(mm.collate([mm.Sample(prompt.tokens + answer, None, prompt.images)]))[0].log_softmax(-1)
        start = len(prompt.tokens) - 1
        found.append(sum(float(scores[start + place, token]) for place, token in enumerate(answer)))
    return found


@torch.inference_mode()
def test_scores_are_differences_of_whole_passes(tiny_model, processor, records, captioned):
    more = [captioned(index, caption=text, seed=50 + index) for index, text in enumerate(reversed(CAPTIONS))]
    records = [*records, *(replace(record, id=f"more-{record.id}") for record in more)]
    report = evaluate(tiny_model, processor, records, ["pmi_choice"], batch_size=4)
    hits = []
    for record, row in zip(records, report.predictions, strict=True):
        assert next(iter(row["pmi"])) == record.json["caption"] and sorted(row["pmi"]) == sorted(CAPTIONS)
        prompt, _ = processor.record_prompt(record)
        tokens = processor.record_answer_tokens(record, list(row["pmi"]))
        seen, blind = passes(tiny_model, prompt, tokens), passes(tiny_model, blank_pixels(prompt), tokens)
        expected = [one - other for one, other in zip(seen, blind, strict=True)]
        assert list(row["pmi"].values()) == pytest.approx(expected, abs=1e-3)
        hits.append(float(expected[0] == max(expected)))
        assert row["scores"] == {"pmi_choice": hits[-1]} and "prediction" not in row
    assert report.scores["pmi_choice"].value == pytest.approx(sum(hits) / len(hits))
    assert 0 < sum(hits) < len(hits)
    assert max(abs(value) for row in report.predictions for value in row["pmi"].values()) > 0.1


def test_without_pictures_every_answer_is_tied(tiny_model, processor, records, captioned):
    blind = evaluate(tiny_model, processor, records, ["pmi_choice"], blank_images=True)
    assert {value for row in blind.predictions for value in row["pmi"].values()} == {0.0}
    assert blind.scores["pmi_choice"].value == pytest.approx(1 / len(CAPTIONS))
    many = [captioned(index, caption=f"thing {index}") for index in range(24)]
    assert evaluate(tiny_model, processor, many, ["pmi_choice"], blank_images=True).scores[
        "pmi_choice"
    ].value == pytest.approx(1 / 20)


def test_a_model_that_ignores_pictures_gets_chance(build_model, tiny_config, processor, records):
    model = build_model(tiny_config, seed=4)
    for block in model.blocks().values():
        torch.nn.init.zeros_(block.gate_attn)
        torch.nn.init.zeros_(block.gate_ffn)
    for batch_size in (3, 32):  # rounding differs, and does not decide
        report = evaluate(model, processor, records, ["pmi_choice"], batch_size=batch_size)
        assert report.scores["pmi_choice"].value == pytest.approx(1 / len(CAPTIONS))


def test_a_pictures_own_answer_wins_where_the_model_knows_it(tiny_model, processor, records, monkeypatch):
    """A model whose likelihood of a caption is high with that caption's own picture, and low for short answers."""
    pictures = [processor.record_prompt(record)[0].images[0].pixels for record in records]
    own = [processor.record_answer_tokens(record, [record.json["caption"]])[0] for record in records]

    def known(_, samples, answers):
        values = []
        for sample, candidates in zip(samples, answers, strict=True):
            (images,) = (tiles.pixels for tiles in sample.images)
            owner = next((n for n, pixels in enumerate(pictures) if pixels.equal(images)), None)
            values.append(
                [-len(answer) + 5.0 * (owner is not None and own[owner] == list(answer)) for answer in candidates]
            )
        return values

    monkeypatch.setattr("mm.evaluation.pmi.answer_log_likelihoods", known)
    metrics = ["pmi_choice"]
    assert evaluate(tiny_model, processor, records, metrics).scores["pmi_choice"].value == 1.0
    other = evaluate(tiny_model, processor, records, metrics, replace_images=True)
    assert other.scores["pmi_choice"].value == 0.0 and other.replaced_images
    assert "with another record's images" in str(other)


def test_draws_are_distinct_and_depend_on_id_and_seed_alone():
    answers = sorted(f"thing {number}" for number in range(100))
    drawn = draw_choices(["Thing 7 "], answers, "a", 0)
    assert len(drawn) == len(set(drawn)) == 20 and drawn[0] == "Thing 7 " and "thing 7" not in drawn
    assert drawn == draw_choices(["Thing 7 "], answers, "a", 0)
    assert drawn != draw_choices(["Thing 7 "], answers, "b", 0)
    assert drawn != draw_choices(["Thing 7 "], answers, "a", 1)
    assert draw_choices(["x"], ["x", "y"], "a", 0) == ["x", "y"]


def test_the_choices_of_a_record_do_not_depend_on_limit_and_order(tiny_model, processor, captioned):
    records = [captioned(index, caption=f"thing {index}") for index in range(30)]

    def choices(records, **options) -> dict[str, list[str]]:
        rows = evaluate(tiny_model, processor, records, ["pmi_choice"], **options).predictions
        return {row["id"]: list(row["pmi"]) for row in rows}

    whole = choices(records)
    limited = choices(records, limit=5)
    assert len(limited) == 5 and all(whole[name] == texts for name, texts in limited.items())
    assert choices(records[::-1]) == whole
    assert choices(records, seed=1) != whole


def test_answers_that_differ_in_case_alone_are_one(processor, captioned):
    texts = ["A cat", "a cat ", "dog", "half \ud800", "a cat"]
    records = [captioned(index, caption=text) for index, text in enumerate(texts)]
    bad = [captioned(7, caption=" ")]
    assert distinct_answers([*records, *bad], AnswerTokens(processor)) == ["A cat", "dog"]
    with pytest.raises(ValueError, match="fewer than two"):
        distinct_answers(records[:2], AnswerTokens(processor))


def test_ties_share_the_point():
    assert share_of_tied([1.0, 0.0]) == 1 and share_of_tied([0.0, 1.0]) == 0
    assert share_of_tied([2.0, 2.0 + 1e-6, 1.0]) == 0.5 and share_of_tied([0.0] * 20) == 1 / 20


@torch.inference_mode()
def test_equal_grey_prompts_are_computed_once(tiny_model, processor, records):
    prompts = [processor.record_prompt(record)[0] for record in records]
    answers = [processor.record_answer_tokens(record, CAPTIONS) for record in records]
    encoded = []
    hook = tiny_model.vision_encoder.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    try:
        scorer = PmiScorer(tiny_model)
        together = scorer(prompts, answers)
        assert sum(encoded) == len(records) + 2  # two grids of grey tiles
        encoded.clear()
        assert scorer(prompts[:1], answers[:1])[0] == pytest.approx(together[0], abs=1e-4)
        assert encoded == [1]
    finally:
        hook.remove()


@torch.inference_mode()
def test_answers_that_begin_alike_share_their_tokens(tiny_model, processor, records, monkeypatch):
    prompt, _ = processor.record_prompt(records[0])
    answers = [[5, 6, 7], [5, 6, 8, 9], [5], [4, 6, 7], [5, 6, 7], [11] * 12]
    (tree,) = mm.evaluation.likelihood._prefix_trees(answers)
    assert len(tree.tokens) == 3 + 2 + 11  # 5, 5 6, 5 6 8; 4, 4 6; the last token of an answer is not run
    (values,) = answer_log_likelihoods(tiny_model, [prompt], [answers])
    assert values == pytest.approx(passes(tiny_model, prompt, answers), abs=1e-4)
    monkeypatch.setattr(mm.evaluation.likelihood, "MAX_TREE_TOKENS", 4)  # several passes over one cache
    monkeypatch.setattr(mm.evaluation.likelihood, "_LOGIT_ROWS", 3)
    split, first = answer_log_likelihoods(tiny_model, [prompt, prompt], [answers, answers[:1]])
    assert split == pytest.approx(values, abs=1e-4) and first == pytest.approx(values[:1], abs=1e-4)


def test_a_report_names_its_baseline(tiny_model, processor, records, tmp_path):
    evaluate(tiny_model, processor, records, ["pmi_choice"], replace_images=True).write(tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text())["replaced_images"] is True
    with pytest.raises(ValueError, match="choose one"):
        evaluate(tiny_model, processor, records, ["pmi_choice"], replace_images=True, replace_speech=True)


def test_a_record_whose_references_are_all_answers_of_the_set_has_nothing_to_compare():
    with pytest.raises(ValueError, match="nothing to compare"):
        draw_choices(["cat", "Dog"], ["cat", "dog"], "r", seed=0)


def test_weights_that_are_not_finite_are_named_as_the_cause(tiny_model, processor, records):
    broken = copy.deepcopy(tiny_model)
    broken.language_model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not a finite number"):
        evaluate(broken, processor, records[:3], ["pmi_choice"])
