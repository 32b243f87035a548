"""What a shard's record holds, as training and evaluation read it: its messages, its caption's medium, its answers."""

import math
from collections.abc import Iterable
from typing import Any

from foundation.errors import UserError
from mm.modalities import IMAGE, MODALITIES, VIDEO
from shards.format import Record

KINDS = tuple(modality.name for modality in MODALITIES)


def record_pictures(record: Record) -> list[bytes]:
    """The record's pictures, in the order of their members.

    Raises:
        UserError: there is none.
    """
    pictures = [record.media[suffix] for suffix in IMAGE.suffixes(record.media)]
    if not pictures:
        raise UserError(f"record {record.id} holds no picture; {_members(record)}")
    return pictures


def record_medium(record: Record) -> tuple[str, bytes]:
    """What a captioned record's caption describes: ("image", its first picture) or ("video", its clip).

    Raises:
        UserError: there is neither.
    """
    for modality in (IMAGE, VIDEO):
        if suffixes := modality.suffixes(record.media):
            return modality.name, record.media[suffixes[0]]
    raise UserError(f"record {record.id} holds neither picture nor clip; {_members(record)}")


def record_caption(record: Record) -> str:
    """The caption of a record without messages.

    Raises:
        UserError: there is none, or it is not text.
    """
    if "caption" not in record.json:
        raise UserError(f"record {record.id} has neither messages nor a caption")
    caption = record.json["caption"]
    if not isinstance(caption, str):
        raise UserError(f"the caption of record {record.id} is {_shorten(caption)}: write it as one string")
    return caption


def record_answer(record: Record) -> str:
    """The reference answer of a record: its last assistant turn, or its caption.

    Raises:
        UserError: the conversation does not end with an assistant's turn, or the answer has another form.
    """
    if "messages" not in record.json:
        return record_caption(record)
    messages = _messages(record)
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise UserError(f"record {record.id} does not end with an assistant's turn")
    return "".join(content_texts(last.get("content"), _where(record, len(messages) - 1)))


def record_answers(record: Record) -> list[str]:
    """The references of a record: its json's `answers`, such as the ten of VQA, or else its `record_answer`.

    Each is a string, a number, or an object with its text under "answer", as in the files of VQAv2.

    Raises:
        UserError: `answers` has another form, is null or empty, or holds a null; or as `record_answer`.
    """
    answer = record_answer(record)
    return _texts(record, "answers") if "answers" in record.json else [answer]


def record_choices(record: Record) -> list[str] | None:
    """The json's `choices` of a record, in the forms of `record_answers`; None where it has none of its own.

    Raises:
        UserError: they have another form, or one is null.
    """
    return _texts(record, "choices") if record.json.get("choices") not in (None, []) else None


def record_kinds(record: Record) -> set[str]:
    """The modalities of which training shows items of a record: those that its messages name, or its caption's."""
    if "messages" not in record.json:
        return {modality.name for modality in (IMAGE, VIDEO) if modality.suffixes(record.media)}
    contents = [message.get("content") for message in _messages(record) if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return {part["type"] for part in parts if part.get("type") in KINDS}


def record_transcript(record: Record) -> str | None:
    """The transcript of a record's recording: its json's `said`, or the answer of a transcription or of silence.

    None where it is not known.
    """
    if "said" in record.json:
        return record.json["said"]
    return record_answer(record) if record.json.get("task") in ("transcription", "silence") else None


def record_messages(record: Record) -> list[dict[str, Any]]:
    """The record's messages, with the bytes of its media in place of their members' suffixes.

    Raises:
        UserError: a message names a member that the record does not have, or a part has another form.
    """

    def resolve(part: Any, index: int) -> dict[str, Any]:
        match part:
            case {"type": "text", "text": str()}:
                return part
            case {"type": str(kind)} if kind in KINDS and part.get(kind) is not None:
                name = part[kind]
                suffix = name.lower() if isinstance(name, str) else name  # the reader writes suffixes in lower case
                if not isinstance(name, str) or suffix not in record.media:
                    raise UserError(f"record {record.id} names the {kind} {_shorten(name)}; {_members(record)}")
                return {**part, kind: record.media[suffix]}
        raise part_error(part, _where(record, index), record.media)

    resolved = []
    for index, message in enumerate(_messages(record)):
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            message = {**message, "content": [resolve(part, index) for part in message["content"]]}
        resolved.append(message)
    return resolved


def content_texts(content: Any, where: str) -> list[str]:
    """The texts of a message's content, without its media.

    Args:
        where: the message, for errors.

    Raises:
        UserError: the content is neither text nor a list of parts, or a part has another form.
    """
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise UserError(f"{where} has {_shorten(content)} as content; it can be text or a list of parts")
    texts = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": str(kind)} if kind in KINDS:
                pass
            case _:
                raise part_error(part, where)
    return texts


def part_error(part: Any, where: str, members: Iterable[str] | None = None) -> UserError:
    """The error of a part that messages cannot hold; it says what to write.

    Args:
        where: the message. members: the record's member suffixes, by which its messages name media; None where they
            name files.
    """
    file = "file" if members is None else "member"
    forms = {"text": '{"type": "text", "text": ...}'}
    forms |= {kind: f'{{"type": "{kind}", "{kind}": {file}}}' for kind in KINDS}
    keys = list(part) if isinstance(part, dict) else []
    kind = part.get("type") if isinstance(part, dict) else None
    meant: str | None = None
    if isinstance(part, str):
        found, meant = f"the text {_shorten(part)} in a list of parts", "text"
    elif isinstance(kind, str) and kind in forms:
        found = f'a part of type "{kind}" without its "{kind}"' if part.get(kind) is None else _shorten(part)
        meant = kind
    elif isinstance(kind, str):  # such as the "image_url" and "input_audio" of other chat formats
        found, meant = f'a part of type "{kind[:40]}"', next((name for name in forms if name in kind), None)
    elif isinstance(part, dict):
        found = f"a part without a type, with the keys {_shorten(keys)}"
        meant = next((name for name in forms if any(name in str(key) for key in keys)), None)
    else:
        found = _shorten(part)
    *others, last = forms.values()
    form = f"write {forms[meant]}" if meant else f"a part is {', '.join(others)} or {last}"
    names = "" if members is None or meant == "text" else f", where member is one of {', '.join(members) or 'none'}"
    return UserError(f"{where} holds {found}: {form}{names}")


def _messages(record: Record) -> list[Any]:
    messages = record.json["messages"]
    if not isinstance(messages, list):
        raise UserError(
            f"the messages of record {record.id} are {_shorten(messages)}: write a list, or leave them out and write a "
            "caption"
        )
    return messages


def _texts(record: Record, name: str) -> list[str]:
    """The texts in the list `name` of a record's json; see `record_answers`."""
    values = record.json[name]
    if not isinstance(values, list) or not values:
        raise UserError(
            f"{name} of record {record.id} is {_shorten(values)}; it must be a list of strings, or of objects such as "
            '{"answer": "red"}: leave it out where there are none'
        )
    texts = []
    for index, value in enumerate(values):
        text = value.get("answer") if isinstance(value, dict) else value
        is_number = type(text) is int or (isinstance(text, float) and math.isfinite(text))  # True and NaN are none
        if not isinstance(text, str) and not is_number:
            raise UserError(
                f"{name} of record {record.id} holds {_shorten(value)} at place {index}: write a string or "
                '{"answer": "red"}, or leave it out'
            )
        texts.append(str(text))
    return texts


def _where(record: Record, index: int) -> str:
    return f"message {index} of record {record.id}"


def _members(record: Record) -> str:
    return f"its members are {', '.join(record.media) or 'none'}"


def _shorten(value: Any) -> str:
    """A value for an error; files in it are cut."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
