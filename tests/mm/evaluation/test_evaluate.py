"""Evaluation of a tiny model: answers do not depend on the batch, and broken records are reported."""

import io
import json
from dataclasses import replace

import pytest
import torch

import mm
import mm.evaluation.evaluate
from mm.batch import blank_pixels
from mm.evaluation.evaluate import evaluate
from mm.evaluation.likelihood import answer_log_likelihoods
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards

SHAPES = ("red circle", "blue square", "green triangle", "no", "yes, there is one")


@pytest.fixture(scope="module")
def png(random_picture):
    def encoded(seed: int, width: int = 28, height: int = 28) -> bytes:
        out = io.BytesIO()
        random_picture(width, height, seed).save(out, format="png")
        return out.getvalue()

    return encoded


@pytest.fixture(scope="module")
def question(png):
    def record(index: int, answer: str | None = None, text: str | None = None, **fields) -> Record:
        name = f"q{index:03d}"
        asked = text or "what is in the picture? " * (1 + index % 3) + "shape" * (index % 5)
        messages = [
            {"role": "user", "content": [{"type": "image", "image": "png"}, {"type": "text", "text": asked}]},
            {"role": "assistant", "content": answer or SHAPES[index % len(SHAPES)]},
        ]
        values = {"id": name, "split": "test", "task": "vqa", "language": "en", "messages": messages, **fields}
        return Record(name, values, {"png": png(index, width=28 * (1 + index % 2))})

    return record


@pytest.fixture(scope="module")
def records(question) -> list[Record]:
    return [question(number) for number in range(9)]


@pytest.fixture
def ask(tiny_model, tiny_processor):
    def run(records, metrics=("vqa_accuracy",), **options):
        return evaluate(tiny_model, tiny_processor, records, metrics, **{"max_new_tokens": 6, **options})

    return run


def predictions(report) -> dict[str, str]:
    return {row["id"]: row["prediction"] for row in report.predictions}


def test_answers_do_not_depend_on_the_batch(build_model, tiny_config, records, tiny_processor):
    model = build_model(tiny_config, seed=4)
    report = evaluate(model, tiny_processor, records, ["vqa_accuracy"], max_new_tokens=6, batch_size=4)
    for record, row in zip(records, report.predictions, strict=True):
        prompt, reference = tiny_processor.record_prompt(record)
        (tokens,) = mm.generate_tokens(model, [prompt], 6)
        assert row["prediction"] == tiny_processor.decode(tokens)
        assert row["reference"] == reference
        assert row["question"] == record.json["messages"][0]["content"][1]["text"].strip()
    assert len(set(predictions(report).values())) > 5  # the model distinguishes the questions


@pytest.mark.parametrize("metrics", [("exact_match", "choice"), ("choice",)])
def test_batch_size_and_order_do_not_change_the_report(monkeypatch, ask, records, metrics):
    many = ask(list(reversed(records)), metrics, batch_size=32)
    monkeypatch.setattr(mm.evaluation.evaluate, "_WINDOW", 2)  # several windows of two batches of two
    one = ask(records, metrics, batch_size=2)
    assert one.scores == many.scores
    assert one.predictions == many.predictions[::-1]
    assert ("prediction" in one.predictions[0]) == ("exact_match" in metrics)


def test_a_picture_is_encoded_once_for_its_questions(
    monkeypatch, build_model, tiny_config, question, tiny_processor, tmp_path
):
    """Four questions about each of five pictures, apart in the set; batches of eight hold those of two pictures."""
    asked = [question(number) for number in range(20)]
    for number, record in enumerate(asked):
        record.media = question(number % 5).media
    write_shards(asked, tmp_path / "set")
    model, encoded = build_model(tiny_config, seed=4), []
    hook = model.vision_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    monkeypatch.setattr(mm.evaluation.evaluate, "_WINDOW", 2)
    options = {"max_new_tokens": 6, "batch_size": 8}
    report = evaluate(model, tiny_processor, ShardSet(tmp_path / "set"), ["exact_match"], **options)
    hook.remove()
    assert encoded == [2, 2, 1]
    alone = evaluate(model, tiny_processor, asked, ["exact_match"], **{**options, "batch_size": 1})
    assert report.predictions == alone.predictions and len(set(predictions(report).values())) > 5


@pytest.mark.parametrize("blank", [False, True])
def test_batches_share_pictures(build_model, tiny_config, question, tiny_processor, blank):
    """Without an index that says which records share one: three pictures in turn, or all grey, two to a batch."""
    asked = [question(number) for number in range(9)]
    for number, record in enumerate(asked):
        record.media = question(number % 3).media
    model, encoded = build_model(tiny_config, seed=4), []
    hook = model.vision_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    options = {"max_new_tokens": 6, "blank_images": blank}
    report = evaluate(model, tiny_processor, asked, ["exact_match"], batch_size=2, **options)
    hook.remove()
    assert sum(encoded) == (2 if blank else 3)  # of one tile and of two
    alone = [evaluate(model, tiny_processor, [record], ["exact_match"], **options) for record in asked]
    assert report.predictions == [one.predictions[0] for one in alone]


def test_the_models_own_answers_score_full_marks(ask, records, question):
    answers = list(predictions(ask(records)).values())
    right = [question(index, answer=answer or "?") for index, answer in enumerate(answers)]
    half = right[:4] + records[4:]
    metrics = ("vqa_accuracy", "exact_match", "bleu", "chrf")
    full = ask(right, metrics)
    assert full.scores["vqa_accuracy"].value == full.scores["exact_match"].value == 1.0
    assert full.scores["chrf"].value == pytest.approx(100)
    report = ask(half, metrics)
    assert list(report.scores) == list(metrics)
    assert report.scores["exact_match"].value == pytest.approx(4 / 9)
    assert 0 < report.scores["chrf"].value < 90
    assert [row["scores"]["exact_match"] for row in report.predictions] == [1.0] * 4 + [0.0] * 5


def test_the_answers_of_ten_people_are_references(ask, records, question):
    answers = list(predictions(ask(records)).values())
    others = [f"other {k}" for k in range(8)]
    asked = [question(n, answers=[answer, answer, *others]) for n, answer in enumerate(answers)]
    assert ask(asked).scores["vqa_accuracy"].value == pytest.approx(0.6)


def test_vqav2s_own_answer_objects_score_as_strings_do(ask, records, question):
    answers = list(predictions(ask(records)).values())
    given = [[*[answer] * 2, *(f"other {k}" for k in range(8))] for answer in answers]
    objects = [
        [{"answer": text, "answer_confidence": "yes", "answer_id": k} for k, text in enumerate(texts, 1)]
        for texts in given
    ]
    asked = [question(n, answers=texts) for n, texts in enumerate(objects)]
    assert ask(asked).scores["vqa_accuracy"].value == pytest.approx(0.6)
    asked[4].json["answers"][3] = None
    report = ask(asked)
    assert report.scores["vqa_accuracy"].num_samples == 8
    assert [row["id"] for row in report.failed] == ["q004"] and "answers of record q004" in report.failed[0]["reason"]


def test_a_caption_that_is_null_is_not_the_reference_none(ask, records):
    fields = {"id": "c", "split": "test", "task": "caption", "language": "en", "caption": None}
    report = ask([Record("c", fields, records[0].media), records[0]])
    assert [row["reason"] for row in report.failed] == ["the caption of record c is null: write it as one string"]


def test_parts_of_a_table_with_a_column_for_each_key_are_read(ask, question):
    """Such tables write null under the keys that a part does not have."""
    plain, padded = question(0), question(0)
    for part in padded.json["messages"][0]["content"]:
        part.update({"text": part.get("text"), "image": part.get("image"), "video": None})
    assert ask([padded]).predictions == ask([plain]).predictions


def test_blanked_images_do_not_matter(ask, question, png):
    asked = [question(number, text="what is it?") for number in (0, 2, 4)]
    other = [replace(record, media={"png": png(50 + n)}) for n, record in enumerate(asked)]
    assert predictions(ask(asked)) != predictions(ask(other))
    blanked, again = ask(asked, blank_images=True), ask(other, blank_images=True)
    assert predictions(blanked) == predictions(again)
    assert len(set(predictions(blanked).values())) == 1
    assert blanked.blank_images
    assert "blanked" in str(blanked)


def test_blank_pixels_keeps_tiles_and_tokens(make_sample):
    sample = make_sample(".i.i")
    grey = blank_pixels(sample)
    assert grey.tokens == sample.tokens
    assert [tiles.grid for tiles in grey.images] == [tiles.grid for tiles in sample.images]
    assert all((tiles.pixels == 128).all() for tiles in grey.images)
    assert not (sample.images[0].pixels == 128).all()


def test_limit_draws_the_same_records_for_a_seed(ask, records):
    drawn = [row["id"] for row in ask(records, limit=4, seed=1).predictions]
    assert drawn == [row["id"] for row in ask(records, limit=4, seed=1, batch_size=2).predictions]
    assert drawn == sorted(drawn)
    assert len(drawn) == 4
    others = {tuple(row["id"] for row in ask(records, limit=4, seed=seed).predictions) for seed in range(2, 5)}
    assert others - {tuple(drawn)}
    assert len(ask(records, limit=100).predictions) == len(records)


def test_broken_records_are_listed_and_the_others_scored(ask, records, question):
    broken = replace(records[1], media={"png": b"not a picture"})
    no_answer = replace(records[2], json={**records[2].json, "messages": records[2].json["messages"][:1]})
    malformed = replace(records[3], json={"id": "q003"})
    too_long = question(4, text="shape " * 100)
    report = ask([records[0], broken, no_answer, malformed, too_long, *records[5:]], ("exact_match", "choice"))
    assert [row["id"] for row in report.failed] == ["q001", "q002", "q003", "q004"]
    reasons = [row["reason"] for row in report.failed]
    for part, reason in zip(("picture", "assistant", "caption", "context"), reasons, strict=True):
        assert part in reason
    assert report.scores["exact_match"].num_samples == 5
    whole = predictions(ask(records))
    assert predictions(report) == {name: whole[name] for name in predictions(report)}
    assert all(row["id"] in str(report) for row in report.failed)


def test_no_readable_record_is_an_error(ask, records):
    with pytest.raises(ValueError, match="none of the 1 records"):
        ask([replace(records[0], media={})])


@pytest.mark.parametrize(
    ("metrics", "options", "message"),
    [
        (("bleu", "rouge"), {}, "rouge"),
        ((), {}, "choose from"),
        (("bleu",), {"batch_size": 0}, "batch_size"),
        (("bleu",), {"limit": 0}, "limit"),
    ],
)
def test_options_out_of_range_are_errors(ask, records, metrics, options, message):
    with pytest.raises(ValueError, match=message):
        ask(records, metrics, **options)
    with pytest.raises(ValueError, match="no records"):
        ask([])


def test_a_shard_with_a_damaged_record(ask, records, tmp_path):
    write_shards(records, tmp_path / "set")
    whole = ask(ShardSet(tmp_path / "set"))
    assert predictions(whole) == predictions(ask(records))
    (tar,) = (tmp_path / "set").glob("*.tar")
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b'"id": "q002"', b'"id": q002  '))
    report = ask(ShardSet(tmp_path / "set"), ("exact_match", "choice"))
    assert [row["id"] for row in report.failed] == ["q002"]
    assert len(report.predictions) == len(records) - 1


@pytest.mark.parametrize("caption_prompt", ["Describe the picture.", None])
def test_captions_and_choices_among_them(tokenizer, tiny_config, tiny_model, png, caption_prompt):
    processor = mm.Processor(tokenizer, tiny_config, caption_prompt=caption_prompt)
    fields = {"split": "test", "task": "caption", "language": "en"}
    captioned = [
        Record(f"c{n}", {"id": f"c{n}", "caption": SHAPES[n], **fields}, {"png": png(n)}) for n in range(len(SHAPES))
    ]
    report = evaluate(tiny_model, processor, captioned, ("chrf", "choice"), max_new_tokens=4)
    assert [row["reference"] for row in report.predictions] == list(SHAPES)
    assert {row["question"] for row in report.predictions} == {caption_prompt or ""}
    assert {row["choice"] for row in report.predictions} <= set(SHAPES)
    assert report.scores["chrf"].num_samples == 5


def full_forward_log_likelihood(model, prompt: mm.Sample, whole: mm.Sample) -> float:
    scores = model(mm.collate([whole]))[0].log_softmax(-1)
    start = len(prompt.tokens)
    assert whole.tokens[:start] == prompt.tokens
    positions = [i for i in range(start, len(whole.tokens)) if whole.labels[i] != -100]
    return sum(float(scores[i - 1, whole.tokens[i]]) for i in positions)


def test_choice_takes_the_most_probable_answer(ask, tiny_model, tiny_processor, question):
    choices = [*"abcdefghijklmnopqrstuvwxyz", "ab", "xyz"]
    records = [question(number, answer=choices[3 * number], choices=choices) for number in range(9)]
    report = ask(records, ("choice",))
    hits = 0
    for number, (record, row) in enumerate(zip(records, report.predictions, strict=True)):
        prompt, reference = tiny_processor.record_prompt(record)
        likelihoods = {}
        for choice in choices:
            with torch.inference_mode():
                example = tiny_processor.record_example(question(number, answer=choice))
                likelihoods[choice] = full_forward_log_likelihood(tiny_model, prompt, example)
        assert row["choice"] == max(likelihoods, key=likelihoods.get)
        hits += row["choice"] == reference
    assert report.scores["choice"].value == pytest.approx(hits / len(records))
    assert len({row["choice"] for row in report.predictions}) > 1


def test_a_record_may_have_its_own_choices(ask, question):
    asked = [question(0, answer="maybe", choices=["maybe"]), question(1), question(2)]
    report = ask(asked, ("choice",))
    assert report.predictions[0]["choice"] == "maybe"
    assert {row["choice"] for row in report.predictions[1:]} <= {SHAPES[1], SHAPES[2]}


def test_too_many_choices_are_an_error(ask, question):
    with pytest.raises(ValueError, match="201 different answers"):
        ask([question(number, answer=f"answer {number}") for number in range(201)], ("choice",))


def test_log_likelihoods_equal_those_of_a_full_pass(tiny_model, make_sample):
    samples = [make_sample(".i..", 1), make_sample("......", 2), make_sample(".ii.i....", 3)]
    answers = [[[5, 6, 7], [8]], [[9]], [[8, 9], [10, 11, 12, 13], [5]]]
    found = answer_log_likelihoods(tiny_model, samples, answers)
    assert [len(row) for row in found] == [2, 1, 3]
    for sample, candidates, values in zip(samples, answers, found, strict=True):
        for answer, value in zip(candidates, values, strict=True):
            tokens = sample.tokens + answer
            labels = [-100] * len(sample.tokens) + answer
            with torch.inference_mode():
                expected = full_forward_log_likelihood(tiny_model, sample, mm.Sample(tokens, labels, sample.images))
            assert value == pytest.approx(expected, abs=1e-4)


def test_log_likelihoods_of_impossible_answers_are_errors(tiny_model, make_sample):
    with pytest.raises(ValueError, match="no tokens"):
        answer_log_likelihoods(tiny_model, [make_sample("..")], [[[]]])
    with pytest.raises(ValueError, match="context"):
        answer_log_likelihoods(tiny_model, [make_sample("." * 158)], [[[3, 4, 5]]])


def test_a_report_is_written_completely(ask, records, tmp_path):
    report = ask([replace(records[0], media={}), *records[1:]], ("exact_match",))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.json").write_text("old")
    report.write(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.jsonl", "scores.json"]
    summary = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert summary["scores"]["exact_match"]["value"] == report.scores["exact_match"].value
    assert summary["scores"]["exact_match"]["num_samples"] == 8
    assert [row["id"] for row in summary["failed"]] == ["q000"]
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == report.predictions
