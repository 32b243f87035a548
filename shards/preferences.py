"""Preferences: two answers to one conversation, of which one is better, as records of shards and in Hugging Face forms.

A record's json has `messages` up to the last user turn and, in place of an answer, the fields of `Preference`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from foundation.errors import UserError
from shards.format import Record

TASK = "preference"
MAX_MARGIN = 3  # a 7-point scale runs from -3 to 3; the better answer is the chosen one, so 0 to 3 are left


@dataclass(frozen=True)
class Preference:
    """Answers to one conversation, and how they compare.

    Attributes:
        messages: up to the last user turn.
        chosen, rejected: the better and the worse answer; they are text alone.
        edited: a person's correction of the chosen answer, better than both; None: there is none.
        margin: how much better the chosen answer is, 0 (hardly) to 3 (much), of a 7-point scale; None: unknown.
        model: that wrote the answers; round: of collection, from 0; source: of the record. None: unknown.
        perturbation: what was made wrong in the rejected answer, such as "count"; None: it was not made so.
    """

    messages: list[dict[str, Any]]
    chosen: str
    rejected: str
    edited: str | None = None
    margin: int | None = None
    model: str | None = None
    round: int | None = None
    source: str | None = None
    perturbation: str | None = None

    @property
    def answers(self) -> list[str]:
        """The answers, best first: edited, chosen, rejected (paper §7.5.3)."""
        return [*([] if self.edited is None else [self.edited]), self.chosen, self.rejected]


def read_preference(record: Record) -> Preference:
    """A record's preference.

    Raises:
        UserError: a field is missing or has another form; the message names the record and the field.
    """
    return parse_preference(record.json, f"record {record.id}")


def parse_preference(values: Mapping[str, Any], where: str) -> Preference:
    """A preference from the fields of a record's json.

    Args:
        where: the record, for errors.

    Raises:
        UserError: as `read_preference`.
    """
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages are {_shown(messages)}; write the conversation up to the last user turn")
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role") == "assistant":
        raise UserError(
            f"{where}: messages end with {_shown(last)}; end them with a user's turn, and give the answers as chosen "
            "and rejected"
        )
    chosen, rejected = (_completion(values.get(name), where, name) for name in ("chosen", "rejected"))
    edited = None if values.get("edited") is None else _completion(values["edited"], where, "edited")
    answers = {"chosen": chosen, "rejected": rejected} | ({} if edited is None else {"edited": edited})
    if rejected in [answer for name, answer in answers.items() if name != "rejected"]:
        raise UserError(f"{where}: rejected equals a better answer, {_shown(rejected)}: leave the record out")
    margin = _whole_number(values.get("margin"), where, "margin")
    if margin is not None and margin > MAX_MARGIN:
        raise UserError(
            f"{where}: margin is {margin}; it can be 0 to {MAX_MARGIN}, the side of a 7-point scale on which chosen is "
            "the better answer"
        )
    names = {name: _name(values.get(name), where, name) for name in ("model", "source", "perturbation")}
    return Preference(
        messages, chosen, rejected, edited, margin, round=_whole_number(values.get("round"), where, "round"), **names
    )


def preference_record(
    record_id: str, split: str, preference: Preference, media: dict[str, bytes], language: str = "en", **more: Any
) -> Record:
    """A record of a preference.

    Args:
        media: member suffix -> file; the preference's messages name these suffixes.
        more: further fields of the json.

    Raises:
        UserError: as `read_preference`.
    """
    fields = {name: value for name, value in asdict(preference).items() if value is not None}
    parse_preference(fields, f"record {record_id}")
    return Record(
        record_id, {"id": record_id, "split": split, "task": TASK, "language": language, **fields, **more}, media
    )


def from_hugging_face(row: Mapping[str, Any], where: str) -> Preference:
    """A preference from a row of a Hugging Face set.

    With an explicit prompt, `prompt` holds the conversation (messages, or the text of one user turn), and `chosen` and
    `rejected` an answer each: text, or a list of one assistant turn. With an implicit prompt, `chosen` and `rejected`
    are whole conversations, which differ in their last turn alone. Further fields are those of `Preference`. A part
    `{"type": "image"}` without a picture stands for the next item of the row's `images`; it comes back as
    `{"type": "image", "image": index}`.

    Raises:
        UserError: the row has another form; the message names the field.
    """
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing; a preference has chosen and rejected")
    prompt = row.get("prompt")
    if prompt is None:
        prompt, chosen, rejected = _implicit_prompt(row["chosen"], row["rejected"], where)
    else:
        chosen, rejected = row["chosen"], row["rejected"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise UserError(f"{where}: prompt is {_shown(prompt)}; it can be text or a list of messages")
    images = row.get("images")
    messages = _numbered_images(prompt, 0 if images is None else len(images), where)
    optional = {name: row.get(name) for name in ("edited", "margin", "model", "round", "source", "perturbation")}
    return parse_preference({"messages": messages, "chosen": chosen, "rejected": rejected, **optional}, where)


def _implicit_prompt(chosen: Any, rejected: Any, where: str) -> tuple[list[Any], Any, Any]:
    """The turns that two conversations have in common, and the last turn of each."""
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(turns, list):
            raise UserError(
                f"{where}: there is no prompt and {name} is {_shown(turns)}; give a prompt, or whole conversations as "
                "lists of messages"
            )
        if len(turns) < 2:
            raise UserError(f"{where}: there is no prompt and {name} has {len(turns)} messages; it needs at least 2")
    if chosen[:-1] != rejected[:-1]:
        raise UserError(
            f"{where}: the conversations of chosen and rejected differ before their last turn; give prompts that are "
            "equal"
        )
    return chosen[:-1], chosen[-1:], rejected[-1:]


def _numbered_images(messages: Sequence[Any], num_images: int, where: str) -> list[Any]:
    """Messages in which the n-th picture without a name is named n.

    Raises:
        UserError: another number of pictures than `num_images`.
    """
    index = 0
    numbered = []
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            content = []
            for part in message["content"]:
                # Tables give every part the keys of all: they hold null where the part has none.
                part = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part
                if part == {"type": "image"}:
                    part, index = {"type": "image", "image": index}, index + 1
                content.append(part)
            message = {**message, "content": content}
        numbered.append(message)
    if num_images and not index:  # the older form: pictures without a place stand before the first user turn's text
        first = next((n for n, message in enumerate(numbered) if message.get("role") == "user"), None)
        if first is not None:
            content = numbered[first]["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            pictures = [{"type": "image", "image": n} for n in range(num_images)]
            numbered[first], index = {**numbered[first], "content": [*pictures, *parts]}, num_images
    if index != num_images:
        raise UserError(f"{where}: images has {num_images} pictures and the prompt places {index}: give one for each")
    return numbered


def _completion(value: Any, where: str, name: str) -> str:
    """An answer's text.

    Args:
        value: text, or a list of one assistant turn.
    """
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            raise UserError(f"{where}: {name} is {_shown(value)}; a list must hold one assistant turn")
        value = value[0].get("content")
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type") != "text":
                raise UserError(
                    f"{where}: {name} holds {_shown(part)}; an answer is text alone: pictures, clips and sounds belong "
                    "into messages"
                )
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name} is {_shown(value)}; it must be a text that is not empty")
    return value


def _whole_number(value: Any, where: str, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        raise UserError(f"{where}: {name} is {_shown(value)}; it must be a whole number from 0 on, or left out")
    return int(value)


def _name(value: Any, where: str, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {name} is {_shown(value)}; it must be text, or left out")
    return value


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
