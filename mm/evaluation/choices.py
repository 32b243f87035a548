"""The answers that the metrics `choice` and `pmi_choice` choose from."""

import random
from collections.abc import Iterable, Sequence

from foundation.errors import UserError
from mm.processor import Processor
from mm.records import record_answer, record_choices, record_medium
from shards.format import Record
from shards.reader import ShardSet

MAX_SHARED_ANSWERS = 200  # `choice` refuses a set with more different answers
NUM_CHOICES = 20  # of `pmi_choice`: the reference and 19 distractors


def shared_choices(records: ShardSet | Sequence[Record]) -> list[str]:
    """All different references of the set, sorted: the choices of records without their own.

    Raises:
        UserError: there are more than MAX_SHARED_ANSWERS.
    """
    answers: set[str] = set()
    for record in _readable(records):
        try:
            if record_choices(record) is None:
                answers |= {record_answer(record)} - {""}  # an empty answer is not a choice
        except Exception:  # reported when the record is evaluated
            continue
    if len(answers) > MAX_SHARED_ANSWERS:
        raise UserError(
            f"the set has {len(answers):,} different answers; `choice` chooses from at most {MAX_SHARED_ANSWERS}. Give "
            "each record its own 'choices', or leave out this metric"
        )
    return sorted(answers)


class AnswerTokens:
    """The tokens of answers after a record's prompt, as `Processor.record_answer_tokens`.

    Those of captions, whose prompts have one text for all records, are kept.
    """

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.captions: dict[tuple[str, str], list[int]] = {}  # (kind of medium, caption) -> tokens

    def __call__(self, record: Record, answers: Sequence[str]) -> list[list[int]]:
        """Raises UserError as `Processor.record_answer_tokens`."""
        if "messages" in record.json:
            return self.processor.record_answer_tokens(record, answers)
        kind, _ = record_medium(record)
        missing = [answer for answer in dict.fromkeys(answers) if (kind, answer) not in self.captions]
        for answer, tokens in zip(missing, self.processor.record_answer_tokens(record, missing), strict=True):
            self.captions[kind, answer] = tokens
        return [self.captions[kind, answer] for answer in answers]


def distinct_answers(records: ShardSet | Sequence[Record], tokens_of: AnswerTokens) -> list[str]:
    """The answers of a set that differ by more than case and outer spaces, and that the processor takes; sorted.

    Args:
        tokens_of: knows the processor.

    Raises:
        UserError: there are fewer than two.
    """
    answers: dict[str, str] = {}
    for record in _readable(records):
        try:
            answer = record_answer(record)
            tokens_of(record, [answer])
        except Exception:  # reported when the record is evaluated
            continue
        text = _normalise(answer)
        answers[text] = min(answer, answers.get(text, answer))
    if len(answers) < 2:
        raise UserError("`pmi_choice` chooses among answers of several records, and the set has fewer than two")
    return sorted(answers.values())


def draw_choices(references: Sequence[str], answers: Sequence[str], record_id: str, seed: int) -> list[str]:
    """The first reference and up to NUM_CHOICES - 1 distractors, each once, the same ones for a record and seed.

    Args:
        references: of the record; none of them becomes a distractor, whatever its case and outer spaces.
        answers: the different answers of the set, sorted, so that their order does not depend on that of the records.

    Raises:
        UserError: all answers of the set are the record's own.
    """
    own = {_normalise(reference) for reference in references}
    others = [answer for answer in answers if _normalise(answer) not in own]
    if not others:
        raise UserError("the record's references are all answers of the set: `pmi_choice` has nothing to compare")
    rng = random.Random(f"{seed} {record_id}")
    return [references[0], *rng.sample(others, min(NUM_CHOICES - 1, len(others)))]


def _readable(records: ShardSet | Sequence[Record]) -> Iterable[Record]:
    for index in range(len(records)):
        try:
            yield records[index]
        except ValueError:
            continue


def _normalise(answer: str) -> str:
    return answer.strip().casefold()
