"""Visual grounding: the place of objects, as numbered boxes in the picture or as coordinates in the text (paper §7).

Coordinates are shares of the picture's width and height between plain-text marks, since a frozen language model has no
special tokens for them. Pictures with known boxes come from a table, or are composed of cut-outs (`scenes`).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_prep.pipeline.pool import RawSource
from data_prep.sources.conversations import Turn
from data_prep.sources.files import Locate, licenses_of, png
from data_prep.sources.splits import check_shares, split_of
from data_prep.synthetic.building import Builder, LeftOut, conversation
from data_prep.synthetic.questions import read_table
from data_prep.synthetic.scenes import Box, CutoutFile, compose, find_cutouts
from foundation.errors import UserError
from shards.format import Record
from vision.reading import read_picture

COLOURS = ("#e6194b", "#0b6efd", "#0a8f3c", "#c2410c", "#7e22ce", "#111111")
MAX_BOXES = 12  # more numbered boxes hide one another


@dataclass(frozen=True)
class GroundingScene:
    """A picture to compose: its index, its split, and its objects."""

    index: int
    split: str
    cutouts: tuple[CutoutFile, ...]


@dataclass(frozen=True)
class BoxedPicture:
    """A picture of the table with its labelled boxes."""

    name: str
    path: Path
    boxes: tuple[tuple[str, Box], ...]


@dataclass(frozen=True, kw_only=True)
class Grounding(Builder):
    """Settings; cutouts, a table, or both must be given.

    Attributes:
        cutouts: folders of pictures with transparency and captions, written as the sources of a curation.
        without: a regular expression; objects with a matching name are left out, such as "skin tone" variants.
        count: scenes to compose of cutouts.
        max_objects: in a scene.
        side: pixels of a scene's sides.
        table: a file .jsonl, .csv or .parquet whose rows are image, label, xmin, ymin, xmax, ymax (in pixels).
        marked: share of the pictures with questions about numbered boxes; the others have coordinates.
        seed: of all random choices.
        validation, test: shares that are held out, of the objects (each is in the scenes of one split only) and of the
            table's pictures.
    """

    cutouts: tuple[RawSource, ...] = ()
    without: str | None = None
    count: int = 1000
    max_objects: int = 6
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
            raise UserError("neither cutouts nor a table is given; give one of them")
        try:
            re.compile(self.without or "")
        except re.error as error:
            raise UserError(f"without {self.without!r} is not a regular expression ({error})") from None
        if any(source.kind != "folder" for source in self.cutouts):
            raise UserError("the kind of every source in cutouts must be folder")
        if self.count < 1 or self.side < 64 or not 2 <= self.max_objects <= MAX_BOXES or not 0 <= self.marked <= 1:
            raise UserError(
                f"count is {self.count}, side {self.side}, max_objects {self.max_objects}, marked {self.marked}; count "
                f"must be at least 1, side at least 64, max_objects 2 to {MAX_BOXES}, and marked 0 to 1"
            )

    def jobs(self, locate: Locate) -> Sequence[GroundingScene | BoxedPicture | LeftOut]:
        """See Builder."""
        jobs: list[GroundingScene | BoxedPicture | LeftOut] = []
        if self.table is not None:
            jobs += self._boxed_pictures(locate(self.table))
        if self.cutouts:
            cutouts, left_out = find_cutouts([(source, locate(source.path)) for source in self.cutouts], self.without)
            jobs += left_out
            by_split: dict[str, list[CutoutFile]] = {"train": [], "validation": [], "test": []}
            for cutout in cutouts:
                by_split[split_of(cutout.label, self.validation, self.test)].append(cutout)
            for index in range(self.count):
                split = split_of(f"scene/{self.seed}/{index}/split", self.validation, self.test)
                available = by_split[split]
                if len(available) < self.max_objects:
                    raise UserError(
                        f"{len(available)} objects are in the split {split}, and a scene may hold {self.max_objects}; "
                        f"give more cutouts, a larger share of {split}, or a smaller max_objects"
                    )
                rng = random.Random(f"scene/{self.seed}/{index}")
                chosen = rng.sample(available, rng.randint(2, self.max_objects))
                jobs.append(GroundingScene(index, split, tuple(chosen)))
        return jobs

    def records(self, job: GroundingScene | BoxedPicture) -> list[Record | LeftOut]:
        """See Builder."""
        if isinstance(job, GroundingScene):
            source, split = f"scene/{self.seed}/{job.index}", job.split
            rng = random.Random(f"{source}/composed")
            try:
                picture, boxes = compose(rng, job.cutouts, self.side)
            except UserError as error:
                return [LeftOut(source, str(error))]
        else:
            source, split = f"boxes/{self.seed}/{job.name}", split_of(job.name, self.validation, self.test)
            rng = random.Random(source)
            try:
                picture, boxes = read_picture(job.path), list(job.boxes)
            except UserError as error:
                return [LeftOut(job.name, str(error))]
            for label, (left, top, right, bottom) in boxes:
                if not (0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height):
                    return [
                        LeftOut(
                            job.name,
                            f"the box of {label!r} is not within the picture of {picture.width} x {picture.height} px",
                        )
                    ]
        rng.shuffle(boxes)
        if rng.random() < self.marked:
            picture = draw_numbered_boxes(picture, [box for _, box in boxes], rng.choice(COLOURS))
            turns = _questions_by_number(rng, boxes)
        else:
            turns = _questions_by_coordinates(rng, boxes, picture.size)
        return [conversation(source, split, "grounding", {"png": png(picture)}, turns)]

    def files(self, locate: Locate) -> dict[str, str]:
        """See Builder."""
        folders = {source.path: locate(source.path) for source in self.cutouts}
        if self.table is not None:
            folders[self.table] = locate(self.table).parent
        return licenses_of(folders)

    def _boxed_pictures(self, table: Path) -> list[BoxedPicture | LeftOut]:
        pictures: dict[str, list[tuple[str, Box]]] = {}
        jobs: list[BoxedPicture | LeftOut] = []
        for row_number, row in enumerate(read_table(table), 1):
            try:
                left, top, right, bottom = (float(row[name]) for name in ("xmin", "ymin", "xmax", "ymax"))
                image, label = ("" if row[name] is None else str(row[name]).strip() for name in ("image", "label"))
                if not image or not label:
                    raise ValueError("an empty cell")
                pictures.setdefault(image, []).append((label, (left, top, right, bottom)))
            except (KeyError, TypeError, ValueError) as error:
                jobs.append(LeftOut(f"{table.name}:{row_number}", f"no image, label and box ({error!r})"))
        for name, boxes in sorted(pictures.items()):
            if len(boxes) > MAX_BOXES:
                jobs.append(LeftOut(name, f"{len(boxes)} boxes, over the limit of {MAX_BOXES}"))
            else:
                jobs.append(BoxedPicture(name, table.parent / name, tuple(boxes)))
        return jobs


def box_text(box: Box, size: tuple[int, int]) -> str:
    """A box in pixels as text: (0, 32, 64, 64) in 128 x 64 px is "<box>0.000, 0.500, 0.500, 1.000</box>"."""
    shares = [value / size[axis % 2] for axis, value in enumerate(box)]
    return f"<box>{', '.join(f'{share:.3f}' for share in shares)}</box>"


def draw_numbered_boxes(picture: Image.Image, boxes: Sequence[Box], colour: str) -> Image.Image:
    """A copy of the picture with each box and its number, from 1, in its corner; above a small box."""
    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    long_side = max(picture.size)
    width, face = max(2, long_side // 220), ImageFont.load_default(max(12, long_side // 26))
    for number, box in enumerate(boxes, 1):
        pen.rectangle(box, outline=colour, width=width)
        tag = pen.textbbox((0, 0), str(number), font=face)
        tag_width, tag_height = tag[2] + 3 * width, tag[3] + 2 * width
        is_small = min(box[2] - box[0], box[3] - box[1]) < 4 * tag_height
        top = box[1] - tag_height if is_small and box[1] >= tag_height else box[1]
        pen.rectangle((box[0], top, box[0] + tag_width, top + tag_height), fill=colour)
        pen.text((box[0] + 1.5 * width, top + width / 2), str(number), fill="white", font=face)
    return picture


def _questions_by_number(rng: random.Random, boxes: Sequence[tuple[str, Box]]) -> list[Turn]:
    labels = [label for label, _ in boxes]
    turns = []
    for number, label in enumerate(labels, 1):
        others = [str(other_number) for other_number, other in enumerate(labels, 1) if other == label]
        if rng.random() < 0.5:
            turns.append((f"What is in box {number}?", label))
        elif len(others) == 1:
            turns.append((f"Which box holds this: {label}? Answer with its number.", str(number)))
        elif others[0] == str(number):
            turns.append((f"Which boxes hold this: {label}? Answer with their numbers.", ", ".join(others)))
    listed = "\n".join(f"{number}. {label}" for number, label in enumerate(labels, 1))
    if not turns or rng.random() < 0.25:
        return [("List what is in the numbered boxes.", listed)]
    return rng.sample(turns, min(3, len(turns)))


def _questions_by_coordinates(
    rng: random.Random, boxes: Sequence[tuple[str, Box]], size: tuple[int, int]
) -> list[Turn]:
    texts_of: dict[str, list[str]] = {}
    for label, box in boxes:
        texts_of.setdefault(label, []).append(box_text(box, size))
    form = "<box>xmin, ymin, xmax, ymax</box>, each from 0 to 1"
    turns = []
    for label, texts in texts_of.items():
        if rng.random() < 0.5:
            turns.append((f"Where is this: {label}? Answer with {form}.", " ".join(texts)))
        else:
            turns.append((f"What is at {texts[0]}?", label))
    listed = "\n".join(f"{label} {text}" for label, texts in texts_of.items() for text in texts)
    if rng.random() < 0.25:
        return [(f"List the things in the picture, each with {form}.", listed)]
    return rng.sample(turns, min(3, len(turns)))
