"""Visual grounding: where things are, by numbered marks in the picture or by coordinates in the text (paper §7).

Coordinates are shares of the picture's width and height, between plain-text marks: a frozen language model cannot emit
tokens that it does not have. Pictures with known boxes come from a table, or are composed of cut-outs here.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_prep.pipeline.pool import RawSource
from data_prep.sources.conversations import Turn
from data_prep.sources.files import Locate, licenses_beside, png
from data_prep.sources.splits import check_shares, split_of
from data_prep.synthetic.building import Builder, LeftOut, conversation
from data_prep.synthetic.questions import read_table
from data_prep.synthetic.scenes import Cutout, compose, cutouts_of
from foundation.errors import UserError
from shards.format import Record
from vision.reading import read_picture

COLOURS = ("#e6194b", "#0b6efd", "#0a8f3c", "#c2410c", "#7e22ce", "#111111")
MOST_BOXES = 12  # more marks hide one another

Box = tuple[float, float, float, float]  # xmin, ymin, xmax, ymax in pixels


@dataclass(frozen=True)
class GroundingScene:
    """A picture to compose: its number, and what it may be composed of."""

    number: int
    split: str
    cutouts: tuple[Cutout, ...]


@dataclass(frozen=True)
class Boxed:
    """A picture with known boxes."""

    name: str
    path: Path
    boxes: tuple[tuple[str, Box], ...]


@dataclass(frozen=True, kw_only=True)
class Grounding(Builder):
    """Settings; at least one of the two kinds of pictures must be named.

    Attributes:
        cutouts: folders of pictures with transparency and a name each, as curation's sources name them.
        without: names that fit this regular expression are left out, such as "skin tone": things that look alike.
        count: scenes to compose of them.
        most: things in a scene at most.
        side: pixels of a scene's sides.
        table: a file .jsonl, .csv or .parquet whose rows are image, label, xmin, ymin, xmax, ymax (in pixels).
        marked: share of the pictures that are asked about by numbered marks, not by coordinates.
        seed: another one composes, and asks, otherwise.
        validation, test: shares of the things (of scenes; none of them is in two splits) and of the table's pictures.
    """

    cutouts: tuple[RawSource, ...] = ()
    without: str | None = None
    count: int = 1000
    most: int = 6
    side: int = 448
    table: str | None = None
    marked: float = 0.5
    seed: int = 0
    validation: float = 0.0
    test: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation, self.test)
        if not self.cutouts and self.table is None:
            raise UserError("neither cutouts nor a table is named; name what has known boxes")
        try:
            re.compile(self.without or "")
        except re.error as error:
            raise UserError(f"without {self.without!r} is no regular expression ({error})") from None
        if any(source.kind != "folder" for source in self.cutouts):
            raise UserError("cutouts are folders of pictures: kind: folder")
        if self.count < 1 or self.side < 64 or not 2 <= self.most <= MOST_BOXES or not 0 <= self.marked <= 1:
            raise UserError(
                f"count {self.count}, side {self.side}, most {self.most}, marked {self.marked}: at least 1 scene of 64 "
                f"pixels with 2 to {MOST_BOXES} things, and a share of 0 to 1, are needed"
            )

    def tasks(self, locate: Locate) -> Sequence[GroundingScene | Boxed | LeftOut]:
        tasks: list[GroundingScene | Boxed | LeftOut] = []
        if self.table is not None:
            tasks += self._boxed(locate(self.table))
        if self.cutouts:
            found, left_out = cutouts_of([(source, locate(source.path)) for source in self.cutouts], self.without)
            tasks += left_out
            sides: dict[str, list[Cutout]] = {"train": [], "validation": [], "test": []}
            for cutout in found:
                sides[split_of(cutout.label, self.validation, self.test)].append(cutout)
            for number in range(self.count):
                split = split_of(f"scene/{self.seed}/{number}/split", self.validation, self.test)
                there = sides[split]
                if len(there) < self.most:
                    raise UserError(
                        f"{len(there)} things are for {split}, and a scene may hold {self.most}; name more cutouts, or "
                        f"set another share for {split} or a smaller `most`"
                    )
                chance = random.Random(f"scene/{self.seed}/{number}")
                chosen = chance.sample(there, chance.randint(2, self.most))
                tasks.append(GroundingScene(number, split, tuple(chosen)))
        return tasks

    def records(self, task: GroundingScene | Boxed) -> list[Record | LeftOut]:
        if isinstance(task, GroundingScene):
            source, split = f"scene/{self.seed}/{task.number}", task.split
            chance = random.Random(f"{source}/composed")
            try:
                picture, boxes = compose(chance, task.cutouts, self.side)
            except ValueError as error:
                return [LeftOut(source, str(error))]
        else:
            source, split = f"boxes/{self.seed}/{task.name}", split_of(task.name, self.validation, self.test)
            chance = random.Random(source)
            try:
                picture, boxes = read_picture(task.path), list(task.boxes)
            except ValueError as error:
                return [LeftOut(task.name, str(error))]
            for label, (left, top, right, bottom) in boxes:
                if not (0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height):
                    return [LeftOut(task.name, f"the box of {label!r} is not within the picture's {picture.size}")]
        chance.shuffle(boxes)
        if chance.random() < self.marked:
            picture = with_marks(picture, [box for _, box in boxes], chance.choice(COLOURS))
            turns = _by_marks(chance, boxes)
        else:
            turns = _by_coordinates(chance, boxes, picture.size)
        return [conversation(source, split, "grounding", {"png": png(picture)}, turns)]

    def files(self, locate: Locate) -> dict[str, str]:
        folders = {source.path: locate(source.path) for source in self.cutouts}
        if self.table is not None:
            folders[self.table] = locate(self.table).parent
        return licenses_beside(folders)

    def _boxed(self, table: Path) -> list[Boxed | LeftOut]:
        pictures: dict[str, list[tuple[str, Box]]] = {}
        left_out = []
        for number, row in enumerate(read_table(table), 1):
            try:
                box = tuple(float(row[name]) for name in ("xmin", "ymin", "xmax", "ymax"))
                image, label = ("" if row[name] is None else str(row[name]).strip() for name in ("image", "label"))
                if not image or not label:
                    raise UserError("an empty cell")
                pictures.setdefault(image, []).append((label, box))
            except (KeyError, TypeError, ValueError) as error:
                left_out.append(LeftOut(f"{table.name}:{number}", f"no image, label and box ({error!r})"))
        for name, boxes in sorted(pictures.items()):
            if len(boxes) > MOST_BOXES:
                left_out.append(LeftOut(name, f"{len(boxes)} boxes, over the limit of {MOST_BOXES}"))
            else:
                left_out.append(Boxed(name, table.parent / name, tuple(boxes)))
        return left_out


def box_text(box: Box, size: tuple[int, int]) -> str:
    """A box in pixels as its text: (0, 32, 64, 64) in 128 x 64 px is "<box>0.000, 0.500, 0.500, 1.000</box>"."""
    shares = [value / size[place % 2] for place, value in enumerate(box)]
    return f"<box>{', '.join(f'{share:.3f}' for share in shares)}</box>"


def with_marks(picture: Image.Image, boxes: Sequence[Box], colour: str) -> Image.Image:
    """The picture with each box drawn, and its number, from 1 on, in its corner; above it where the box is small."""
    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    long = max(picture.size)
    width, letters = max(2, long // 220), ImageFont.load_default(max(12, long // 26))
    for number, box in enumerate(boxes, 1):
        pen.rectangle(box, outline=colour, width=width)
        tag = pen.textbbox((0, 0), str(number), font=letters)
        wide, high = tag[2] + 3 * width, tag[3] + 2 * width
        is_small = min(box[2] - box[0], box[3] - box[1]) < 4 * high
        top = box[1] - high if is_small and box[1] >= high else box[1]
        pen.rectangle((box[0], top, box[0] + wide, top + high), fill=colour)
        pen.text((box[0] + 1.5 * width, top + width / 2), str(number), fill="white", font=letters)
    return picture


def _by_marks(chance: random.Random, boxes: Sequence[tuple[str, Box]]) -> list[Turn]:
    labels = [label for label, _ in boxes]
    turns = []
    for number, label in enumerate(labels, 1):
        others = [str(place) for place, other in enumerate(labels, 1) if other == label]
        if chance.random() < 0.5:
            turns.append((f"What is in box {number}?", label))
        elif len(others) == 1:
            turns.append((f"Which box holds this: {label}? Answer with its number.", str(number)))
        elif others[0] == str(number):
            turns.append((f"Which boxes hold this: {label}? Answer with their numbers.", ", ".join(others)))
    listed = "\n".join(f"{number}. {label}" for number, label in enumerate(labels, 1))
    if not turns or chance.random() < 0.25:
        return [("List what is in the numbered boxes.", listed)]
    return chance.sample(turns, min(3, len(turns)))


def _by_coordinates(chance: random.Random, boxes: Sequence[tuple[str, Box]], size: tuple[int, int]) -> list[Turn]:
    known: dict[str, list[str]] = {}
    for label, box in boxes:
        known.setdefault(label, []).append(box_text(box, size))
    form = "<box>xmin, ymin, xmax, ymax</box>, each from 0 to 1"
    turns = []
    for label, texts in known.items():
        if chance.random() < 0.5:
            turns.append((f"Where is this: {label}? Answer with {form}.", " ".join(texts)))
        else:
            turns.append((f"What is at {texts[0]}?", label))
    listed = "\n".join(f"{label} {text}" for label, texts in known.items() for text in texts)
    if chance.random() < 0.25:
        return [(f"List the things in the picture, each with {form}.", listed)]
    return chance.sample(turns, min(3, len(turns)))
