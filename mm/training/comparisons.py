"""Samples and batches of answers that are compared: preferences for DPO, and for reward models.

All answers of a comparison continue one prompt and hold the same objects of its media, so that `mm.batch.collate` puts
each picture into the batch once: it is encoded once, and its keys and values are computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from foundation.errors import UserError
from mm.batch import IGNORED, Batch, Sample, collate
from mm.modalities import MODALITIES
from mm.processor import Processor
from mm.records import record_messages
from shards.format import Record
from shards.preferences import Preference, read_preference


@dataclass
class Comparison:
    """Answers to one prompt, best first.

    Attributes:
        answers: each the whole sequence; labels are at the answer's tokens, its end token included.
        margin: how much better the chosen answer is than the rejected one, 0 to 3; None: unknown.
        reference: log-probability of each answer under a reference model, see `answer_log_probs`; None: not known.
    """

    answers: list[Sample]
    margin: int | None = None
    reference: list[float] | None = None

    @property
    def num_tokens(self) -> int:
        return max(len(answer.tokens) for answer in self.answers)


@dataclass
class ComparisonBatch:
    """Comparisons side by side.

    Attributes:
        rows: all answers of all comparisons, one after another.
        groups: of each comparison the rows of its answers, best first. Dummy samples are in no group.
        margins: of each comparison. references: of each row; None where they are not known.
    """

    rows: Batch
    groups: list[list[int]]
    margins: list[int | None]
    references: list[float] | None = None

    def to(self, device: torch.device | str) -> "ComparisonBatch":
        return replace(self, rows=self.rows.to(device))


def comparison(
    record: Record, processor: Processor, best: int | None = None, max_tokens: int | None = None
) -> Comparison:
    """The answers of a preference record after its prompt.

    Args:
        best: keep so many answers at most, of the best and the worst; 2 compares the best answer with the rejected one.
        max_tokens: longer sequences are cut at the end of their answer. None: the context.

    Raises:
        UserError: what `read_preference` and the processor refuse, a prompt that leaves no room for an answer, an
            answer that holds a token of an image, clip or sound, or answers that are equal once they are cut.
    """
    preference = read_preference(record)
    texts = preference.answers if best is None else [*preference.answers[: best - 1], preference.rejected]
    samples = answer_samples(record, processor, preference, texts, max_tokens)
    if any(one.tokens == other.tokens for n, one in enumerate(samples) for other in samples[:n]):
        raise UserError(
            f"record {record.id}: two of its answers have the same tokens: leave it out, or raise max_tokens"
        )
    return Comparison(samples, preference.margin)


def answer_samples(
    record: Record, processor: Processor, preference: Preference, texts: Sequence[str], max_tokens: int | None = None
) -> list[Sample]:
    """The sequences of a record's prompt and each of some answers; arguments and errors as in `comparison`."""
    limit = processor.context if max_tokens is None else min(max_tokens, processor.context)
    prompt = processor.prompt(record_messages(replace(record, json={**record.json, "messages": preference.messages})))
    if len(prompt.tokens) >= limit:
        raise UserError(
            f"record {record.id}: its prompt has {len(prompt.tokens)} tokens and leaves no room for an answer within "
            f"{limit}; prompts are not cut"
        )
    answered = {**record.json, "messages": [*preference.messages, {"role": "assistant", "content": texts[0]}]}
    answers = processor.record_answer_tokens(replace(record, json=answered), texts)
    # By id, so that also tokens that a text spells, where control tokens are allowed, are found.
    placeholders = {modality.token_id(processor.config) for modality in MODALITIES}
    samples = []
    for text, answer in zip(texts, answers, strict=True):
        if found := placeholders & set(answer):
            raise UserError(
                f"record {record.id}: the answer {text[:40]!r} holds the token {min(found)}, which stands for an "
                "image, clip or sound: an answer is text alone"
            )
        tokens = prompt.tokens + answer  # what is cut is of the answer, in which there are no placeholders
        labels = [IGNORED] * len(prompt.tokens) + answer
        samples.append(replace(prompt, tokens=tokens[:limit], labels=labels[:limit]))
    return samples


def collate_comparisons(comparisons: Sequence[Comparison]) -> ComparisonBatch:
    """A batch of comparisons; one whose answers have no labels is a dummy and in no group.

    Raises:
        UserError: as `mm.batch.collate`.
    """
    rows = [answer for one in comparisons for answer in one.answers]
    groups, margins, references, start = [], [], list[float](), 0
    for one in comparisons:
        indices = list(range(start, start + len(one.answers)))
        start += len(one.answers)
        references += one.reference or [0.0] * len(indices)
        if any(label != IGNORED for label in one.answers[0].labels or ()):
            groups.append(indices)
            margins.append(one.margin)
    known = any(one.reference is not None for one in comparisons)
    return ComparisonBatch(collate(rows), groups, margins, references if known else None)
