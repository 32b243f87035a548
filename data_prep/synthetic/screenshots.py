"""Screenshots with a boxed element -> that element's HTML (paper §7): of the user's pages, or of invented ones."""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageDraw

from data_prep.sources.files import Locate, licenses_beside, png
from data_prep.sources.splits import check_shares, split_of
from data_prep.synthetic.browser import require, screenshot, without_scripts
from data_prep.synthetic.building import Builder, LeftOut, conversation, writable
from data_prep.synthetic.pages import page_of
from foundation.errors import UserError
from shards.format import Record

QUESTIONS = (
    "Write the HTML of the boxed element.",
    "Give the HTML code of what is in the box.",
    "Which HTML makes the element within the red box?",
)
COLOUR = "#e6194b"
MOST_OF_THE_PICTURE = 0.5  # of its area; a larger element is most of the page


@dataclass(frozen=True)
class Page:
    """A page: a file's place, or the number of an invented one."""

    name: str
    path: Path | None


@dataclass(frozen=True, kw_only=True)
class Screenshots(Builder):
    """Settings.

    Attributes:
        pages: a folder of .html files; null: invented pages.
        count: invented pages, or files at most.
        width, height: pixels of the window.
        boxes: elements of a page at most, each boxed in a picture of its own.
        max_chars: longer code is not asked for.
        seed: another one boxes others, and invents other pages.
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
        if min(self.width, self.height) < 500:  # the browser makes no window narrower than this
            raise UserError(f"a window of {self.width} x {self.height} is too small; each side needs 500 pixels")

    def tasks(self, locate: Locate) -> Sequence[Page]:
        require()
        if self.pages is None:
            return [Page(f"invented/{number}", None) for number in range(self.count)]
        folder = locate(self.pages)
        files = sorted(path for kind in ("html", "htm") for path in folder.rglob(f"*.{kind}") if path.is_file())
        if not files:
            raise UserError(f"{self.pages}: there are no .html files in it")
        return [Page(writable(path.relative_to(folder).as_posix()), path) for path in files[: self.count]]

    def records(self, task: Page) -> list[Record | LeftOut]:
        source = f"screenshot/{self.seed}/{task.name}"
        chance = random.Random(source)
        try:
            code = page_of(chance) if task.path is None else task.path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return [LeftOut(task.name, error.strerror or str(error))]
        try:
            picture, elements = screenshot(without_scripts(code), self.width, self.height)
        except ValueError as error:
            return [LeftOut(task.name, str(error))]
        if picture.convert("L").getextrema()[0] == 255:
            return [LeftOut(task.name, "shows nothing but white")]
        wanted: dict[str, tuple[float, float, float, float]] = {}
        for (left, top, right, bottom), html in elements:
            text = tidy(html)
            fits = len(text) <= self.max_chars and re.search(r"\w", re.sub(r"<[^>]*>", "", text)) is not None
            if fits and (right - left) * (bottom - top) <= MOST_OF_THE_PICTURE * picture.width * picture.height:
                wanted[text] = (left, top, right, bottom)
        if not wanted:
            return [LeftOut(task.name, "no element with words is seen whole, and short enough")]
        split = split_of(hashlib.sha256(code.encode(errors="replace")).hexdigest(), self.validation, self.test)
        made = []
        # One element in proportion to its code's length: else most of them would be single words.
        order = sorted(wanted, key=lambda text: chance.random() ** (1 / len(text)), reverse=True)
        for number, text in enumerate(order[: self.boxes]):
            shown = picture.copy()
            left, top, right, bottom = wanted[text]
            corners = (
                max(0, left - 3),
                max(0, top - 3),
                min(picture.width - 1, right + 2),
                min(picture.height - 1, bottom + 2),
            )
            ImageDraw.Draw(shown).rectangle(corners, outline=COLOUR, width=3)
            turn = (chance.choice(QUESTIONS), text)
            made.append(conversation(f"{source}/{number}", split, "screenshot", {"png": png(shown)}, [turn]))
        return made

    def files(self, locate: Locate) -> dict[str, str]:
        return licenses_beside({self.pages: locate(self.pages)}) if self.pages is not None else {}


def tidy(html: str) -> str:
    """An element's code without what says nothing of what is seen: ids, data, and spaces between lines."""
    html = re.sub(r"\s(?:id|data-[\w-]+|tabindex|accesskey|rel|aria-[\w-]+)=\"[^\"]*\"", "", html)
    return re.sub(r"\s+", " ", html).strip()
