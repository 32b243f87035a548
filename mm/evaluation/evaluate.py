"""Evaluate a model on a set: answer the question of every record, and score the answers.

Records -> prompts (`mm.processor`) -> batches of similar length -> answers (`mm.generation`) -> scores.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from foundation.errors import UserError
from mm.batch import Sample, blank_pixels
from mm.evaluation import metrics as scoring
from mm.evaluation.baselines import FRAMES, replace_media
from mm.evaluation.choices import AnswerTokens, distinct_answers, draw_choices, shared_choices
from mm.evaluation.likelihood import answer_log_likelihoods
from mm.evaluation.metrics import Score
from mm.evaluation.pmi import PmiScorer, share_of_tied
from mm.inference import Engine, Request, decode
from mm.modalities import AUDIO, IMAGE
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.processor import Processor
from mm.records import content_texts, record_answers, record_choices
from mm.run_files import replaced_files
from mm.training.partition import split_into_micro_batches
from mm.transcription import transcribe_tokens
from shards.format import Record
from shards.reader import ShardSet
from speech.features import FRAMES_PER_SECOND
from speech.prompts import TRANSCRIBE

Item = TypeVar("Item")
Generate = Callable[[Sequence[Request]], list[list[int]]]  # requests -> the tokens of their answers

METRICS = ("vqa_accuracy", "exact_match", "choice", "pmi_choice", "bleu", "chrf", "wer", "cer")
_WINDOW = 16  # batches that are read ahead and sorted by length together; it bounds the images in memory


@dataclass
class EvaluationReport:
    """The result of an evaluation.

    Attributes:
        scores: by metric name, in the order of the request.
        predictions: for each record that could be read, in the order of the set: id, question, reference, prediction
            (unless choices are the only metrics), choice (with the metric `choice`), pmi (with `pmi_choice`: the score
            of each choice in nats, the reference first), and scores, the values that the averages are made of.
        failed: for each record that could not be read: id and reason. They do not count in any score.
        blank_images: whether images were replaced by grey.
        replaced_speech: whether each record had another record's sound.
        replaced_images: whether each record had another record's images.
        frames: which frames of clips the model had, see `mm.evaluation.baselines.FRAMES`.
        real_time_factor: seconds of computation per second of sound, at this batch size; None without sound.
        real_time_interval: half the width of its 95% confidence interval over batches; None for a single batch.
    """

    scores: dict[str, Score]
    predictions: list[dict[str, Any]]
    failed: list[dict[str, str]]
    blank_images: bool = False
    replaced_speech: bool = False
    frames: str = "all"
    real_time_factor: float | None = None
    real_time_interval: float | None = None
    replaced_images: bool = False

    def __str__(self) -> str:
        baseline = " with blanked images" if self.blank_images else ""
        baseline += " with another record's sound" if self.replaced_speech else ""
        baseline += " with another record's images" if self.replaced_images else ""
        baseline += {"all": "", "one": " of one frame", "shuffled": " of shuffled frames"}[self.frames]
        lines = [str(score) + baseline for score in self.scores.values()]
        if self.real_time_factor is not None:
            lines.append(f"real-time factor {self.real_time_text()}")
        return "\n".join([*lines, *(f"not read: {row['id']}: {row['reason']}" for row in self.failed)])

    def real_time_text(self) -> str:
        """The real-time factor with its interval, such as "0.12 ± 0.01"."""
        interval = "" if self.real_time_interval is None else f" ± {self.real_time_interval:.2f}"
        return f"{self.real_time_factor:.2f}{interval}"

    def write(self, folder: str | Path) -> None:
        """Write predictions.jsonl and then scores.json, so that a folder with scores.json is complete."""
        scores = {
            name: {"value": score.value, "interval": score.interval, "num_samples": score.num_samples}
            for name, score in self.scores.items()
        }
        summary = {"scores": scores, "blank_images": self.blank_images, "frames": self.frames, "failed": self.failed}
        if self.replaced_images:
            summary["replaced_images"] = True
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
    replace_images: bool = False,
    frames: str = "all",
    batch_size: int = 32,
    max_new_tokens: int = 32,
    limit: int | None = None,
    seed: int = 0,
    generate: Generate | None = None,
) -> EvaluationReport:
    """Answer the last question of every record greedily, and score the answers.

    A record's reference is its last assistant turn or its caption; a list `"answers"` in its json gives several, such
    as the ten of VQA, as strings or as VQAv2's own objects (see `mm.records.record_answers`). The model's answers do
    not depend on `batch_size` or on the order of the records.

    Args:
        metrics: of METRICS. `choice` is the share of records for which the most probable choice is a reference. The
            choices are `"choices"` in the record's json, else all references of the set. A choice's probability is the
            product over its tokens *and its stop token*: that the model gives exactly this answer. So it is not divided
            by the number of tokens, which would favour long answers. `pmi_choice` is the share of records for which,
            of the reference and 19 answers of other records, drawn with `seed`, the reference has the highest pointwise
            mutual information with the record's images and clips; one of n tied answers counts 1/n, so that a model
            that ignores them reaches one in 20, in a set with fewer answers one in as many (see `mm.evaluation.pmi`).
        blank_images: baseline without images: their pixels become mid-grey, in as many tiles.
        replace_speech: baseline with wrong sound: every record gets the sound of the next one with another answer.
        replace_images: baseline with wrong images, likewise.
        frames: frames of every clip: "all", only the middle "one", or "shuffled" in a random order (see
            `mm.evaluation.baselines`).
        max_new_tokens: limit of an answer. A question with one sound that starts with `TRANSCRIBE` is answered like by
            `mm transcribe`, see `mm.transcription.transcribe_tokens`; others like by `mm ask`.
        limit: number of records, drawn with `seed`; None takes all.
        generate: answers requests other than transcripts; None: one engine for the whole set, so that batches share
            what is computed of equal pictures and clips, as far as their pages have not been needed for others.

    Raises:
        UserError: an option is out of range, there are no records, none can be read, or there are too many choices.
    """
    _check_options(metrics, frames, batch_size, limit, len(records))
    if replace_speech and replace_images:
        raise UserError("replace_speech and replace_images are two baselines: choose one")
    replaced = AUDIO if replace_speech else IMAGE if replace_images else None
    indices = list(range(len(records)))
    if limit is not None and limit < len(records):
        indices = sorted(random.Random(seed).sample(indices, limit))
    answer_tokens = AnswerTokens(processor)
    choices = shared_choices(records) if "choice" in metrics else None
    answers = distinct_answers(records, answer_tokens) if "pmi_choice" in metrics else None
    pmi_scorer = PmiScorer(model) if "pmi_choice" in metrics else None
    generate = generate or partial(decode, Engine(model, batch_size))
    if set(metrics) <= {"choice", "pmi_choice"}:
        generate = None
    build = _PromptBuilder(processor, answer_tokens, model.config.language_model.context, choices, answers, seed)

    def read(index: int) -> _Prompt:
        prompt = build(replace_media(records, indices, index, replaced) if replaced else records[index])
        if blank_images:
            prompt.sample = blank_pixels(prompt.sample)
        prompt.sample = FRAMES[frames](prompt.sample)
        return prompt

    # Records of one image are read one after another and answered in one batch, which encodes it once.
    image_of = records.first_of_image() if isinstance(records, ShardSet) else np.arange(len(records))
    answered: dict[int, tuple[dict[str, Any], list[str], str]] = {}  # of each record: row, references, language
    reasons: dict[int, str] = {}  # of records that could not be read
    compute_seconds: list[float] = []  # of each batch
    sound_seconds: list[float] = []
    hidden = None if Ranks.current().is_main else True  # None: where stderr is not a terminal
    with tqdm(total=len(indices), desc="evaluate", unit="record", disable=hidden) as progress:
        for window in _chunks(sorted(indices, key=lambda index: (image_of[index], index)), _WINDOW * batch_size):
            prompts: dict[int, _Prompt] = {}
            for index in window:
                try:
                    prompts[index] = read(index)
                except Exception as error:  # a record can be malformed in any way; the others are still evaluated
                    reasons[index] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                    progress.update()
            by_length = sorted(prompts, key=lambda index: prompts[index].lengths())
            images = [int(image_of[index]) for index in by_length]
            for part in split_into_micro_batches(range(len(by_length)), batch_size, None, images):
                batch = [prompts[by_length[place]] for place in part]
                started = time.perf_counter()
                _answer(model, processor, batch, max_new_tokens, generate, choices is not None, pmi_scorer)
                compute_seconds.append(time.perf_counter() - started)
                num_frames = sum(len(mel) for prompt in batch for mel in prompt.sample.speech)
                sound_seconds.append(num_frames / FRAMES_PER_SECOND)
                progress.update(len(batch))
            answered |= {index: (prompt.row, prompt.references, prompt.language) for index, prompt in prompts.items()}

    failed = [{"id": _record_id(records, index), "reason": reasons[index]} for index in sorted(reasons)]
    in_order = [answered[index] for index in sorted(answered)]
    predictions = [row for row, _, _ in in_order]
    if not predictions:
        raise UserError(f"none of the {len(indices)} records could be read; the first: {failed[0]['reason']}")
    references, languages = [texts for _, texts, _ in in_order], [language for _, _, language in in_order]
    scores = _score(metrics, predictions, references, languages)
    factor = sum(compute_seconds) / sum(sound_seconds) if any(sound_seconds) else None
    interval = None
    if factor and len(sound_seconds) > 1:
        interval = scoring.ratio_interval(np.array(compute_seconds), np.array(sound_seconds))
    return EvaluationReport(
        scores, predictions, failed, blank_images, replace_speech, frames, factor, interval, replace_images
    )


def _chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@dataclass
class _Prompt:
    """A record's prompt, its references and choices, and its row of the report."""

    sample: Sample
    references: list[str]
    choices: list[str]
    choice_tokens: list[list[int]]
    pmi_choices: list[str]
    pmi_tokens: list[list[int]]
    row: dict[str, Any]
    language: str
    transcribes: bool

    def lengths(self) -> tuple[int, int]:
        """The lengths of the prompt and of all answers to compare: prompts of similar ones are computed together."""
        return len(self.sample.tokens), sum(map(len, [*self.choice_tokens, *self.pmi_tokens]))


class _PromptBuilder:
    """Turns records into prompts.

    Args:
        context: the model's limit of tokens.
        shared_choices: choices of records without their own; None without the metric `choice`.
        pmi_answers: the different answers of the set; None without the metric `pmi_choice`.
        seed: of the choices among them.
    """

    def __init__(
        self,
        processor: Processor,
        answer_tokens: AnswerTokens,
        context: int,
        shared_choices: list[str] | None,
        pmi_answers: list[str] | None,
        seed: int,
    ) -> None:
        self.processor, self.answer_tokens, self.context = processor, answer_tokens, context
        self.shared_choices, self.pmi_answers, self.seed = shared_choices, pmi_answers, seed

    def __call__(self, record: Record) -> _Prompt:
        references, own_choices = record_answers(record), record_choices(record)
        sample, reference = self.processor.record_prompt(record)
        choices = [] if self.shared_choices is None else own_choices or self.shared_choices
        pmi_choices: list[str] = []
        if self.pmi_answers is not None:
            pmi_choices = draw_choices([reference, *references], self.pmi_answers, record.id, self.seed)
        tokens = self.answer_tokens(record, [*choices, *pmi_choices])
        length, longest = len(sample.tokens), max((len(answer) for answer in tokens), default=1)
        if length + longest > self.context:
            raise UserError(
                f"the prompt has {length} tokens, and its answer {longest} or more; the context has {self.context}"
            )
        question = _question(self.processor, record)
        row = {"id": record.id, "question": question, "reference": reference, "scores": {}}
        transcribes = len(sample.speech) == 1 and question.startswith(TRANSCRIBE)
        choice_tokens, pmi_tokens = tokens[: len(choices)], tokens[len(choices) :]
        language = str(record.json.get("language"))
        return _Prompt(sample, references, choices, choice_tokens, pmi_choices, pmi_tokens, row, language, transcribes)


def _answer(
    model: MultimodalModel,
    processor: Processor,
    batch: list[_Prompt],
    max_new_tokens: int,
    generate: Generate | None,
    chooses: bool,
    pmi_scorer: PmiScorer | None,
) -> None:
    """Add the answers and choices of one batch to its rows."""
    samples = [prompt.sample for prompt in batch]
    if generate is not None:
        spoken = [prompt for prompt in batch if prompt.transcribes]
        others = [prompt for prompt in batch if not prompt.transcribes]
        answers = transcribe_tokens(model, [prompt.sample for prompt in spoken], max_new_tokens) if spoken else []
        answers += generate([Request(prompt.sample, max_new_tokens) for prompt in others]) if others else []
        for prompt, tokens in zip([*spoken, *others], answers, strict=True):
            prompt.row["prediction"] = processor.decode(tokens)
    if chooses:
        likelihoods = answer_log_likelihoods(model, samples, [prompt.choice_tokens for prompt in batch])
        for prompt, values in zip(batch, likelihoods, strict=True):
            prompt.row["choice"] = prompt.choices[max(range(len(values)), key=values.__getitem__)]
    if pmi_scorer is not None:
        scores = pmi_scorer(samples, [prompt.pmi_tokens for prompt in batch])
        for prompt, values in zip(batch, scores, strict=True):
            prompt.row["pmi"] = {text: round(value, 3) for text, value in zip(prompt.pmi_choices, values, strict=True)}
            prompt.row["scores"]["pmi_choice"] = share_of_tied(values)


def _score(
    metrics: Sequence[str], predictions: list[dict[str, Any]], references: list[list[str]], languages: list[str]
) -> dict[str, Score]:
    """Scores by name; the value of each record in an average is added to its row."""
    averages = {
        "vqa_accuracy": ("prediction", scoring.vqa_accuracy),
        "exact_match": ("prediction", scoring.exact_match),
        "choice": ("choice", scoring.exact_match),
    }
    corpus: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], Score]]
    corpus = {"bleu": scoring.bleu, "chrf": scoring.chrf}
    for name in ("wer", "cer"):
        corpus[name] = partial(scoring.error_rate, name, languages=languages)
    scores = {}
    for name in metrics:
        if name in corpus:
            scores[name] = corpus[name]([row["prediction"] for row in predictions], references)
            continue
        if name == "pmi_choice":
            scores[name] = scoring.average(name, [row["scores"][name] for row in predictions])
            continue
        column, function = averages[name]
        values = [function(row[column], texts) for row, texts in zip(predictions, references, strict=True)]
        scores[name] = scoring.average(name, values)
        for row, value in zip(predictions, values, strict=True):
            row["scores"][name] = value
    return scores


def _question(processor: Processor, record: Record) -> str:
    """The text of the last user turn; the caption prompt for a captioned record."""
    if "messages" not in record.json:
        return processor.caption_prompt or ""
    for message in reversed(record.json["messages"][:-1]):
        if message["role"] == "user":
            texts = content_texts(message["content"], f"a message of record {record.id}")
            return " ".join(text.strip() for text in texts if text.strip())
    return ""


def _record_id(records: ShardSet | Sequence[Record], index: int) -> str:
    """The id of a record that may not be readable."""
    return records.index["id"][index].as_py() if isinstance(records, ShardSet) else records[index].id


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
        raise UserError("there are no records to evaluate")
