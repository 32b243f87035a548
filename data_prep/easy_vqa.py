"""easy-VQA (questions about one coloured shape, 64 x 64 px) -> shard records, one for each question.

The set: `{train,test}/images/{n}.png` and `{train,test}/questions.json`, a list of [question, answer, n].
"""

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.splits import split_of
from shards.format import Record, make_id
from vision.reading import read_picture

VALIDATION_SHARE = 0.02  # of the training pictures, with all their questions


def to_samples(folder: str | Path, dropped: list[tuple[str, str]] | None = None) -> Iterator[Record]:
    """Yields the records of the whole set: its own test split, and its train split less some validation pictures.

    Args:
        folder: holds `train` and `test`.
        dropped: gets (file, reason) for each picture that cannot be read; its questions are left out.

    Raises:
        ValueError: the folder lacks a split, or its questions are not as described above.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    for part in ("train", "test"):
        pictures: dict[int, bytes | None] = {}
        for number, (question, answer, image) in enumerate(_questions(folder / part / "questions.json")):
            name = f"{part}/images/{image}.png"
            if image not in pictures:
                pictures[image] = _read(folder, name, dropped)
            if pictures[image] is None:
                continue
            record_id = make_id(f"easy-vqa/{part}/{number}")
            content = {
                "id": record_id,
                "split": "test" if part == "test" else split_of(name, validation=VALIDATION_SHARE, test=0.0),
                "task": "vqa",
                "language": "en",
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": "png"}, {"type": "text", "text": question}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ],
            }
            yield Record(record_id, content, {"png": pictures[image]})


def _questions(path: Path) -> list[tuple[str, str, int]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [(str(question), str(answer), int(image)) for question, answer, image in rows]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: no list of [question, answer, picture number] ({error})") from None


def _read(folder: Path, name: str, dropped: list[tuple[str, str]]) -> bytes | None:
    try:
        read_picture(folder / name)
        return (folder / name).read_bytes()
    except ValueError as error:
        dropped.append((name, str(error)))
        return None
