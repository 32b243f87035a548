"""easy-VQA (questions about one coloured shape, 64 x 64 px) -> shard records: questions, captions or conversations.

The set: `{train,test}/images/{n}.png` and `{train,test}/questions.json`, a list of [question, answer, n].
"""

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.conversations import CAPTION_REQUEST, conversations
from data_prep.sources.splits import split_of
from foundation.errors import UserError
from shards.format import Record, make_id
from vision.reading import read_picture

VALIDATION_SHARE = 0.02  # of the training pictures, with all their questions
SHAPES = ("circle", "rectangle", "triangle")


def to_samples(folder: str | Path, dropped: list[tuple[str, str]] | None = None) -> Iterator[Record]:
    """Yields a record for each question: the set's test split, and its train split, a part of which is for validation.

    Args:
        folder: holds `train` and `test`.
        dropped: gets (file, reason) for each picture that cannot be read; its questions are left out.

    Raises:
        UserError: the folder lacks a split, or its questions are not as described above.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    for part in ("train", "test"):
        pictures: dict[int, bytes | None] = {}
        for index, (question, answer, image) in enumerate(_questions(folder / part / "questions.json")):
            name = f"{part}/images/{image}.png"
            if image not in pictures:
                pictures[image] = _read(folder, name, dropped)
            picture = pictures[image]
            if picture is None:
                continue
            record_id = make_id(f"easy-vqa/{part}/{index}")
            content = {
                "id": record_id,
                "split": _split(name),
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
            yield Record(record_id, content, {"png": picture})


def to_names(folder: str | Path, dropped: list[tuple[str, str]] | None = None) -> Iterator[Record]:
    """Yields the training and validation records of `to_samples` whose answer names a colour or a shape.

    Args, Raises: see `to_samples`.
    """
    for record in to_samples(folder, dropped):
        if record.json["split"] != "test" and _turn(record)[1] not in ("yes", "no"):
            yield record


def to_balanced_yes_no(folder: str | Path, dropped: list[tuple[str, str]] | None = None) -> Iterator[Record]:
    """Yields pairs of training records of `to_samples`: the same question, about one picture "yes", about another "no".

    In the set, wording alone gives 85% of these answers: "is there a blue shape?" is mostly answered "no". Without that
    bias only the picture tells the answer, as in VQA v2 (Goyal et al. 2017); a step that holds whole pairs teaches no
    bias at all. Records are paired in the order of their ids, which are hashes: at random, but the same each time.

    The ids of a pair begin alike, so that they follow each other in shards.

    Args, Raises: see `to_samples`.
    """
    by_question: dict[str, dict[str, list[Record]]] = {}
    for record in to_samples(folder, dropped):
        question, answer = _turn(record)
        if record.json["split"] == "train" and answer in ("yes", "no"):
            by_question.setdefault(question, {"yes": [], "no": []})[answer].append(record)
    for by_answer in by_question.values():
        yes, no = (sorted(by_answer[answer], key=lambda record: record.id) for answer in ("yes", "no"))
        for pair in zip(yes, no, strict=False):  # the rest of the more frequent answer is left out
            for record in pair:  # shards are sorted by id
                record_id = f"{pair[0].id}_{_turn(record)[1]}"
                yield Record(record_id, {**record.json, "id": record_id}, record.media)


def to_captions(folder: str | Path, dropped: list[tuple[str, str]] | None = None) -> Iterator[Record]:
    """Yields a captioned record, "a blue circle", for each training picture whose answers name both colour and shape.

    Splits are those of `to_samples`; test pictures are left out, so that no training uses them.

    Args, Raises: see `to_samples`.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    for image, turns in _by_picture(folder, "train").items():
        name, caption = f"train/images/{image}.png", _caption(turns)
        picture = None if caption is None else _read(folder, name, dropped)
        if picture is None:
            continue
        record_id = make_id(f"easy-vqa/caption/{image}")
        content = {"id": record_id, "split": _split(name), "task": "caption", "language": "en", "caption": caption}
        yield Record(record_id, content, {"png": picture})


def to_conversations(folder: str | Path, dropped: list[tuple[str, str]] | None = None) -> Iterator[Record]:
    """Yields conversations of several turns, which together have all questions about a picture and its caption.

    Splits are those of `to_samples`.

    Args, Raises: see `to_samples`.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    for part in ("train", "test"):
        for image, turns in _by_picture(folder, part).items():
            name, caption = f"{part}/images/{image}.png", _caption(turns)
            picture = _read(folder, name, dropped)
            if picture is None:
                continue
            request = [] if caption is None else [(CAPTION_REQUEST, caption)]
            yield from conversations(f"easy-vqa/{name}", _split(name), {"png": picture}, [*turns, *request])


def _turn(record: Record) -> tuple[str, str]:
    """The question and the answer of a record of `to_samples`."""
    question, answer = record.json["messages"]
    return question["content"][1]["text"], answer["content"][0]["text"]


def _split(name: str) -> str:
    return "test" if name.startswith("test/") else split_of(name, validation=VALIDATION_SHARE, test=0.0)


def _by_picture(folder: Path, part: str) -> dict[int, list[tuple[str, str]]]:
    """The (question, answer) pairs of each picture, by its number."""
    turns: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in _questions(folder / part / "questions.json"):
        turns.setdefault(image, []).append((question, answer))
    return turns


def _caption(turns: list[tuple[str, str]]) -> str | None:
    """A caption such as "a blue circle", where the answers name both colour and shape."""
    named = {"shape" if answer in SHAPES else "color": answer for _, answer in turns if answer not in ("yes", "no")}
    return f"a {named['color']} {named['shape']}" if len(named) == 2 else None


def _questions(path: Path) -> list[tuple[str, str, int]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [(str(question), str(answer), int(image)) for question, answer, image in rows]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a list of [question, answer, picture number] ({error})") from None


def _read(folder: Path, name: str, dropped: list[tuple[str, str]]) -> bytes | None:
    try:
        read_picture(folder / name)
        return (folder / name).read_bytes()
    except UserError as error:
        dropped.append((name, str(error)))
        return None
