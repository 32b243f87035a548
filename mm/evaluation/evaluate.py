"""Asks a model every question of a set and scores what it says.

Flow: records -> prompts (`mm.processor`) -> batches of similar length -> answers (`mm.generation`) -> scores.
"""

import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from foundation.errors import UserError
from mm.batch import IGNORED, Sample
from mm.evaluation import metrics as scoring
from mm.evaluation.baselines import FRAMES, blank, with_other_sound
from mm.evaluation.likelihood import answer_log_likelihoods
from mm.evaluation.metrics import Score
from mm.generation import generate_tokens, transcribe_tokens
from mm.model import MultimodalModel
from mm.processor import Processor
from mm.records import record_answer
from mm.run_files import replaced_files
from shards.format import Record
from shards.reader import ShardSet
from speech.features import FRAMES_PER_SECOND
from speech.prompts import TRANSCRIBE

METRICS = ("vqa_accuracy", "exact_match", "choice", "bleu", "chrf", "wer", "cer")
MAX_SHARED_ANSWERS = 200  # a set with more different answers is no choice among given ones
_WINDOW = 16  # batches that are read ahead and sorted by length together; bounds the pictures held at a time


@dataclass
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        scores: by metric name, in the order asked for.
        predictions: per record that could be read, in the order of the set: id, question, reference, prediction
            (unless only `choice` was asked for), choice (with `choice`), and scores, the record's own averages.
        failed: per record that could not be read: id and reason. They count in no score.
        blank_images: whether the model was shown grey in place of the pictures.
        replaced_speech: whether each record was given another one's sound.
        frames: of clips, which the model was shown.
        real_time_factor: seconds that answering took per second of sound, with what is in a batch at once; None where
            nothing was heard. real_time_interval: half of its 95% interval over batches; None of a single one.
    """

    scores: dict[str, Score]
    predictions: list[dict]
    failed: list[dict]
    blank_images: bool = False
    replaced_speech: bool = False
    frames: str = "all"
    real_time_factor: float | None = None
    real_time_interval: float | None = None

    def __str__(self) -> str:
        control = " with blanked images" if self.blank_images else ""
        control += " with another record's sound" if self.replaced_speech else ""
        control += (
            "" if self.frames == "all" else {"one": " of one frame", "shuffled": " of shuffled frames"}[self.frames]
        )
        lines = [str(score) + control for score in self.scores.values()]
        if self.real_time_factor is not None:
            lines.append(f"real-time factor {self.shown_factor()}")
        return "\n".join([*lines, *(f"not read: {row['id']}: {row['reason']}" for row in self.failed)])

    def shown_factor(self) -> str:
        """The real-time factor, with its interval where there is one."""
        interval = "" if self.real_time_interval is None else f" ± {self.real_time_interval:.2f}"
        return f"{self.real_time_factor:.2f}{interval}"

    def write(self, folder: str | Path) -> None:
        """scores.json and predictions.jsonl; scores.json comes last, so that a folder with it is whole."""
        scores = {
            name: {"value": score.value, "interval": score.interval, "num_samples": score.num_samples}
            for name, score in self.scores.items()
        }
        summary = {"scores": scores, "blank_images": self.blank_images, "frames": self.frames, "failed": self.failed}
        if self.real_time_factor is not None:
            factor = {"real_time_factor": self.real_time_factor, "real_time_interval": self.real_time_interval}
            summary |= {"replaced_speech": self.replaced_speech, **factor}
        with replaced_files(folder, last="scores.json") as new:
            rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.predictions)
            (new / "predictions.jsonl").write_text("".join(rows), encoding="utf-8")
            (new / "scores.json").write_text(json.dumps(summary, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def evaluate(
    model: MultimodalModel,
    processor: Processor,
    records: ShardSet | Sequence[Record],
    metrics: Sequence[str],
    *,
    blank_images: bool = False,
    replace_speech: bool = False,
    frames: str = "all",
    batch_size: int = 32,
    max_new_tokens: int = 32,
    limit: int | None = None,
    seed: int = 0,
) -> EvaluationReport:
    """Greedy answers to the last question of every record, scored.

    A record's reference is its last assistant turn or its caption; `"answers"` in its json, a list of strings, gives
    several (the ten of VQA). The answers do not depend on `batch_size` nor on the order of the records.

    Args:
        metrics: of METRICS. `choice` is the share of records where the likeliest of the given answers is a reference.
            The given answers are the `"choices"` in the record's json, else all references of the whole set. An
            answer's likelihood is the product over its tokens *and its stop token*, the probability that the model
            says just that: so it needs no division by the number of tokens, which would favour long answers.
        blank_images: every picture becomes mid-grey with as many tiles: the control that sees nothing.
        max_new_tokens: of an answer. What is asked about one sound in the words of `TRANSCRIBE` is answered as by
            `mm transcribe`, see `mm.generation.transcribe_tokens`; all else as by `mm ask`.
        replace_speech: every record is given the sound of the next one (the first follows the last) that wants another
            answer: the control that hears something else.
        frames: of every clip: "all", the middle "one" alone, or "shuffled" under the true times (see
            `mm.evaluation.baselines`).
        limit: so many records, drawn with `seed`; None takes all.

    Raises:
        UserError: an option out of range, no records, not one that could be read, or no answers to choose from.
    """
    _check_options(metrics, frames, batch_size, limit, len(records))
    numbers = list(range(len(records)))
    if limit is not None and limit < len(records):
        numbers = sorted(random.Random(seed).sample(numbers, limit))
    choosing, saying = "choice" in metrics, set(metrics) != {"choice"}
    shared = _shared_answers(records) if choosing else None
    known: dict[tuple[bool, str], list[int]] = {}
    context = model.config.language_model.context
    predictions: list[dict] = []
    failed: list[dict] = []
    references: list[list[str]] = []
    languages: list[str] = []
    seconds: list[float] = []  # of each batch, and of the sound in it
    heard: list[float] = []

    with tqdm(total=len(numbers), desc="evaluate", unit="record", disable=None) as progress:
        for start in range(0, len(numbers), _WINDOW * batch_size):
            window = []
            for number in numbers[start : start + _WINDOW * batch_size]:
                try:
                    record = records[number]
                    if replace_speech:
                        record = with_other_sound(records, numbers, number)
                    asked = _ask(processor, record, context, shared, known)
                except Exception as error:  # a record can be malformed in any way; the others are still asked
                    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                    failed.append({"id": _name(records, number), "reason": reason})
                    progress.update()
                    continue
                if blank_images:
                    asked.sample = blank(asked.sample)
                asked.sample = FRAMES[frames](asked.sample)
                window.append(asked)
            by_length = sorted(window, key=lambda asked: len(asked.sample.tokens))
            for first in range(0, len(by_length), batch_size):
                group = by_length[first : first + batch_size]
                started = time.perf_counter()
                _answer(model, processor, group, max_new_tokens, saying, choosing)
                seconds.append(time.perf_counter() - started)
                heard.append(sum(len(mel) for asked in group for mel in asked.sample.speech) / FRAMES_PER_SECOND)
                progress.update(len(group))
            for asked in window:
                predictions.append(asked.row)
                references.append(asked.references)
                languages.append(asked.language)

    if not predictions:
        raise UserError(f"none of the {len(numbers)} records could be read; the first: {failed[0]['reason']}")
    scores = _score(metrics, predictions, references, languages)
    factor = sum(seconds) / sum(heard) if any(heard) else None
    interval = scoring.ratio_interval(np.array(seconds), np.array(heard)) if factor and len(heard) > 1 else None
    return EvaluationReport(scores, predictions, failed, blank_images, replace_speech, frames, factor, interval)


@dataclass
class _Asked:
    """One record on its way: its prompt, what it may be answered with, and the row of the report it becomes."""

    sample: Sample
    references: list[str]
    choices: list[str]
    choice_tokens: list[list[int]]
    row: dict
    language: str
    transcribes: bool


def _ask(
    processor: Processor,
    record: Record,
    context: int,
    shared: list[str] | None,
    known: dict[tuple[bool, str], list[int]],
) -> _Asked:
    """Reads a record.

    Args:
        shared: answers to choose from for records without their own; None where nothing is to be chosen.
        known: tokens of answers met before, added to.
    """
    for name in ("answers", "choices"):
        if not isinstance(record.json.get(name) or [], list):
            raise UserError(f"{name} of record {record.id} is {record.json[name]!r}; it must be a list")
    sample, reference = processor.record_prompt(record)
    references = [str(answer) for answer in record.json.get("answers") or [reference]]
    choices = [] if shared is None else [str(choice) for choice in record.json.get("choices") or shared]
    in_messages = "messages" in record.json
    for choice in choices:
        if (in_messages, choice) not in known:
            known[in_messages, choice] = _answer_tokens(processor, in_messages, choice)
    choice_tokens = [known[in_messages, choice] for choice in choices]
    length, longest = len(sample.tokens), max((len(tokens) for tokens in choice_tokens), default=1)
    if length + longest > context:
        raise UserError(f"the prompt has {length} tokens; with an answer that is over the context of {context}")
    row = {"id": record.id, "question": _question(processor, record), "reference": reference, "scores": {}}
    transcribes = len(sample.speech) == 1 and row["question"].startswith(TRANSCRIBE)
    return _Asked(sample, references, choices, choice_tokens, row, str(record.json.get("language")), transcribes)


def _answer(
    model: MultimodalModel, processor: Processor, group: list[_Asked], max_new_tokens: int, saying: bool, choosing: bool
) -> None:
    """Fills the rows of one batch."""
    samples = [asked.sample for asked in group]
    if saying:
        for generate, transcribes in ((transcribe_tokens, True), (generate_tokens, False)):
            part = [asked for asked in group if asked.transcribes == transcribes]
            new = generate(model, [asked.sample for asked in part], max_new_tokens) if part else []
            for asked, tokens in zip(part, new, strict=True):
                asked.row["prediction"] = processor.decode(tokens)
    if choosing:
        likelihoods = answer_log_likelihoods(model, samples, [asked.choice_tokens for asked in group])
        for asked, values in zip(group, likelihoods, strict=True):
            asked.row["choice"] = asked.choices[max(range(len(values)), key=values.__getitem__)]


def _score(
    metrics: Sequence[str], predictions: list[dict], references: list[list[str]], languages: list[str]
) -> dict[str, Score]:
    """Scores by name; each average's value per record is added to its row."""
    averages = {
        "vqa_accuracy": ("prediction", scoring.vqa_accuracy),
        "exact_match": ("prediction", scoring.exact_match),
        "choice": ("choice", scoring.exact_match),
    }
    corpus = {"bleu": scoring.bleu, "chrf": scoring.chrf}
    for name in ("wer", "cer"):
        corpus[name] = partial(scoring.error_rate, name, languages=languages)
    scores = {}
    for name in metrics:
        if name in corpus:
            scores[name] = corpus[name]([row["prediction"] for row in predictions], references)
            continue
        column, function = averages[name]
        values = [function(row[column], given) for row, given in zip(predictions, references, strict=True)]
        scores[name] = scoring.average(name, values)
        for row, value in zip(predictions, values, strict=True):
            row["scores"][name] = value
    return scores


def _shared_answers(records: ShardSet | Sequence[Record]) -> list[str]:
    """Every different reference of the set, sorted, for records that bring no choices of their own."""
    found: set[str] = set()
    for record in _readable(records):
        try:
            if not record.json.get("choices"):
                found |= {record_answer(record)} - {""}  # to say nothing is no choice
        except Exception:  # said once, where the record is asked
            continue
    if len(found) > MAX_SHARED_ANSWERS:
        raise UserError(
            f"the set has {len(found):,} different answers, over the {MAX_SHARED_ANSWERS} that `choice` chooses from; "
            "give each record its own 'choices', or leave this metric out"
        )
    return sorted(found)


def _readable(records: ShardSet | Sequence[Record]) -> Iterable[Record]:
    for number in range(len(records)):
        try:
            yield records[number]
        except ValueError:
            continue


def _answer_tokens(processor: Processor, in_messages: bool, answer: str) -> list[int]:
    """An answer as the model is trained to say it, stop token included. The picture has no part in that."""
    if in_messages:
        example = processor.example([{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}])
    else:
        example = processor.caption_example(Image.new("RGB", (1, 1)), answer)
    return [label for label in example.labels if label != IGNORED]


def _question(processor: Processor, record: Record) -> str:
    """The text of what the user asked last; the caption prompt for a captioned picture."""
    if "messages" not in record.json:
        return processor.caption_prompt or ""
    for message in reversed(record.json["messages"][:-1]):
        if message["role"] == "user":
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            return " ".join(part.strip() for part in parts if part.strip())
    return ""


def _name(records: ShardSet | Sequence[Record], number: int) -> str:
    """The id of a record that may not be readable."""
    return records.index["id"][number].as_py() if isinstance(records, ShardSet) else records[number].id


def _check_options(metrics: Sequence[str], frames: str, batch_size: int, limit: int | None, num_records: int) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise UserError(f"metrics are {list(metrics)}; choose from {', '.join(METRICS)}")
    if frames not in FRAMES:
        raise UserError(f"frames is {frames!r}; it can be {', '.join(FRAMES)}")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1, or None for all records")
    if not num_records:
        raise UserError("there are no records to evaluate on")
