"""What can be said about one picture -> conversation records of several turns, for finetuning on chat.

Questions and answers come from a set as they are; captions become requests and yes/no questions here.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from shards.format import Record, make_id, picture_suffixes

MAX_TURNS = 4  # questions per conversation; more of them and the earlier answers give most of the later ones away
REQUEST = "Describe the picture."  # as a caption is asked for where it is evaluated


Turn = tuple[str, str]  # question, answer


def conversations(
    source: str, split: str, media: dict[str, bytes], turns: Sequence[Turn], language: str = "en"
) -> Iterator[Record]:
    """Yields conversations of up to MAX_TURNS turns about one picture, about equally long, in an order drawn once.

    Args:
        source: what names the picture in its set; ids and order follow from it.
        media: the picture under its member's suffix. It is shown in the first turn.
        turns: one that is there twice is asked once.
        language: of the answers; "und" where it is not known.
    """
    order = sorted(dict.fromkeys(turns), key=lambda turn: _hash(f"{source}/{turn[0]}/{turn[1]}"))
    number = -(-len(order) // MAX_TURNS)
    (suffix,) = picture_suffixes(media)
    for start in range(number):
        record_id = make_id(f"{source}/conversation/{start}")
        content = {"id": record_id, "split": split, "task": "chat", "language": language}
        yield Record(record_id, {**content, "messages": messages_of(suffix, order[start::number])}, media)


def messages_of(suffix: str, turns: Sequence[Turn]) -> list[dict]:
    """Questions and answers as a record's messages; the first question shows the picture of that member suffix."""
    messages = []
    for question, answer in turns:
        shown = [] if messages else [{"type": "image", "image": suffix}]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def caption_conversations(records: Iterable[Record]) -> Iterator[Record]:
    """Yields for each captioned record a conversation: to describe the picture, and whether two captions describe it.

    One of the two is its own; the other, of a picture of the same split, has no word in common with it.
    """
    records = list(records)
    captions: dict[str, list[str]] = {}
    for split in {record.json["split"] for record in records}:
        captions[split] = sorted({record.json["caption"] for record in records if record.json["split"] == split})
    for record in records:
        caption = record.json["caption"]
        turns = [(REQUEST, caption), (_whether(caption), "yes")]
        wrong = _another(caption, captions[record.json["split"]], record.id)
        if wrong is not None:
            turns.append((_whether(wrong), "no"))
        yield from conversations(record.id, record.json["split"], record.media, turns)


def _whether(caption: str) -> str:
    return f'Does "{caption.rstrip(".")}" describe the picture?'


def _another(caption: str, captions: Sequence[str], record_id: str) -> str | None:
    """The first caption without a common word, from a place on that the record's id decides; None if there is none."""
    start = _hash(record_id) % len(captions)
    for other in (*captions[start:], *captions[:start]):
        if not _words(other) & _words(caption):
            return other
    return None


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - {"a", "an", "the", "of"}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
