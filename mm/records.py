"""What a shard's record holds, as training and evaluation read it: its messages, its caption's medium, its answer."""

from typing import Any

from foundation.errors import UserError
from mm.modalities import IMAGE, MODALITIES, VIDEO
from shards.format import Record


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


def record_answer(record: Record) -> str:
    """The reference answer of a record: its last assistant turn, or its caption.

    Raises:
        UserError: the conversation does not end with an assistant's turn.
    """
    if "messages" not in record.json:
        return record.json["caption"]
    if not record.json["messages"] or record.json["messages"][-1]["role"] != "assistant":
        raise UserError(f"record {record.id} does not end with an assistant's turn")
    content = record.json["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


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
        UserError: a message names a member that the record does not have.
    """
    kinds = {modality.name for modality in MODALITIES}

    def resolve(part: dict[str, Any]) -> dict[str, Any]:
        kind = part.get("type")
        if kind not in kinds:
            return part
        if part[kind] not in record.media:
            raise UserError(f"record {record.id} names the {kind} {part[kind]!r}; {_members(record)}")
        return {**part, kind: record.media[part[kind]]}

    resolved = []
    for message in record.json["messages"]:
        content = message["content"]
        parts = content if isinstance(content, str) else [resolve(part) for part in content]
        resolved.append({**message, "content": parts})
    return resolved


def _members(record: Record) -> str:
    return f"its members are {', '.join(record.media) or 'none'}"
