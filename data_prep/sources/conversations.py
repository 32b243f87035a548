"""Questions, answers and captions of one picture -> conversation records of several turns, for chat finetuning.

Questions and answers of a set are used unchanged; captions become requests and yes/no questions.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from shards.format import Record, make_id, picture_suffixes

MAX_TURNS = 4  # questions per conversation; with more, the earlier answers give most of the later ones away
CAPTION_REQUEST = "Describe the picture."  # the same words as in evaluation


Turn = tuple[str, str]  # (question, answer)


def conversations(
    source: str, split: str, media: dict[str, bytes], turns: Sequence[Turn], language: str = "en"
) -> Iterator[Record]:
    """Yields conversations of up to MAX_TURNS turns about one picture, of about equal length.

    Args:
        source: unique name of the picture; ids and the order of turns follow from it.
        split: of the records.
        media: the picture under its member's suffix. It is shown in the first turn.
        turns: questions and answers; duplicates are used once.
        language: of the answers; "und" where it is not known.
    """
    order = sorted(dict.fromkeys(turns), key=lambda turn: _hash(f"{source}/{turn[0]}/{turn[1]}"))
    num_conversations = -(-len(order) // MAX_TURNS)
    (suffix,) = picture_suffixes(media)
    for start in range(num_conversations):
        record_id = make_id(f"{source}/conversation/{start}")
        content = {"id": record_id, "split": split, "task": "chat", "language": language}
        yield Record(record_id, {**content, "messages": messages_of(suffix, order[start::num_conversations])}, media)


def messages_of(suffix: str, turns: Sequence[Turn]) -> list[dict]:
    """Questions and answers as a record's messages; the first one shows the picture with the member suffix `suffix`."""
    messages: list[dict] = []
    for question, answer in turns:
        picture = [] if messages else [{"type": "image", "image": suffix}]
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def caption_conversations(records: Iterable[Record]) -> Iterator[Record]:
    """Yields a conversation for each captioned record: a request for the caption, and yes/no questions about captions.

    One question is about the picture's own caption, and one about a caption of the same split without a common word.
    """
    records = list(records)
    captions: dict[str, list[str]] = {}
    for split in {record.json["split"] for record in records}:
        captions[split] = sorted({record.json["caption"] for record in records if record.json["split"] == split})
    for record in records:
        caption = record.json["caption"]
        turns = [(CAPTION_REQUEST, caption), (_yes_no_question(caption), "yes")]
        wrong = _unrelated_caption(caption, captions[record.json["split"]], record.id)
        if wrong is not None:
            turns.append((_yes_no_question(wrong), "no"))
        yield from conversations(record.id, record.json["split"], record.media, turns)


def _yes_no_question(caption: str) -> str:
    return f'Does "{caption.rstrip(".")}" describe the picture?'


def _unrelated_caption(caption: str, captions: Sequence[str], record_id: str) -> str | None:
    """The first caption without a common word, searched from a start that the id decides; None where there is none."""
    start = _hash(record_id) % len(captions)
    for other in (*captions[start:], *captions[:start]):
        if not _words(other) & _words(caption):
            return other
    return None


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - {"a", "an", "the", "of"}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
