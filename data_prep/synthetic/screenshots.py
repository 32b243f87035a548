"""Screenshots with a boxed element -> that element's HTML (paper §7), of given pages or of random ones."""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageDraw

from data_prep.sources.files import Locate, licenses_of, png
from data_prep.sources.splits import check_shares, split_of
from data_prep.synthetic.browser import require, screenshot, without_scripts
from data_prep.synthetic.building import Builder, LeftOut, conversation, printable_name
from data_prep.synthetic.pages import random_page
from foundation.errors import UserError
from shards.format import Record

QUESTIONS = (
    "Write the HTML of the boxed element.",
    "Give the HTML code of what is in the box.",
    "Which HTML makes the element within the red box?",
)
COLOUR = "#e6194b"
MAX_AREA = 0.5  # of the picture; a larger element is most of the page


@dataclass(frozen=True)
class Page:
    """A page: its name, and its file; None for a random page."""

    name: str
    path: Path | None


@dataclass(frozen=True, kw_only=True)
class Screenshots(Builder):
    """Settings.

    Attributes:
        pages: a folder of .html files; null: random pages.
        count: number of random pages, or the largest number of files.
        width, height: pixels of the window.
        boxes: at most this many elements of a page, each boxed in a picture of its own.
        max_chars: elements with longer HTML are not used.
        seed: of random pages, and of the choice of elements.
        validation, test: shares of the pages that are held out.
    """

    pages: str | None = None
    count: int = 1000
    width: int = 672
    height: int = 672
    boxes: int = 3
    max_chars: int = 1200
    seed: int = 0
    validation: float = 0.0
    test: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation, self.test)
        for name in ("count", "boxes", "max_chars"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if min(self.width, self.height) < 500:  # Chromium's smallest window
            raise UserError(f"width is {self.width} and height {self.height}; each must be at least 500 pixels")

    def jobs(self, locate: Locate) -> Sequence[Page]:
        """See Builder."""
        require()
        if self.pages is None:
            return [Page(f"invented/{index}", None) for index in range(self.count)]
        folder = locate(self.pages)
        files = sorted(path for kind in ("html", "htm") for path in folder.rglob(f"*.{kind}") if path.is_file())
        if not files:
            raise UserError(f"{self.pages}: has no .html files")
        return [Page(printable_name(path.relative_to(folder).as_posix()), path) for path in files[: self.count]]

    def records(self, job: Page) -> list[Record | LeftOut]:
        """See Builder."""
        source = f"screenshot/{self.seed}/{job.name}"
        rng = random.Random(source)
        try:
            code = random_page(rng) if job.path is None else job.path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return [LeftOut(job.name, error.strerror or str(error))]
        try:
            picture, elements = screenshot(without_scripts(code), self.width, self.height)
        except UserError as error:
            return [LeftOut(job.name, str(error))]
        if picture.convert("L").getextrema()[0] == 255:
            return [LeftOut(job.name, "is white all over")]
        box_of: dict[str, tuple[float, float, float, float]] = {}
        for (left, top, right, bottom), html in elements:
            text = tidy(html)
            fits = len(text) <= self.max_chars and re.search(r"\w", re.sub(r"<[^>]*>", "", text)) is not None
            if fits and (right - left) * (bottom - top) <= MAX_AREA * picture.width * picture.height:
                box_of[text] = (left, top, right, bottom)
        if not box_of:
            return [LeftOut(job.name, "no element with text is whole in the picture and short enough")]
        split = split_of(hashlib.sha256(code.encode(errors="replace")).hexdigest(), self.validation, self.test)
        records: list[Record | LeftOut] = []
        # Elements are chosen in proportion to the length of their HTML; else most of them would be single words.
        order = sorted(box_of, key=lambda text: rng.random() ** (1 / len(text)), reverse=True)
        for index, text in enumerate(order[: self.boxes]):
            boxed = picture.copy()
            left, top, right, bottom = box_of[text]
            corners = (
                max(0, left - 3),
                max(0, top - 3),
                min(picture.width - 1, right + 2),
                min(picture.height - 1, bottom + 2),
            )
            ImageDraw.Draw(boxed).rectangle(corners, outline=COLOUR, width=3)
            turn = (rng.choice(QUESTIONS), text)
            records.append(conversation(f"{source}/{index}", split, "screenshot", {"png": png(boxed)}, [turn]))
        return records

    def files(self, locate: Locate) -> dict[str, str]:
        """See Builder."""
        return licenses_of({self.pages: locate(self.pages)}) if self.pages is not None else {}


def tidy(html: str) -> str:
    """An element's HTML without invisible attributes (ids, data, ARIA) and without spaces between lines."""
    html = re.sub(r"\s(?:id|data-[\w-]+|tabindex|accesskey|rel|aria-[\w-]+)=\"[^\"]*\"", "", html)
    return re.sub(r"\s+", " ", html).strip()
