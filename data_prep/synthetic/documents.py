"""Pages of documents -> their text: PDF files, HTML files printed by Chromium, text files set by Pillow."""

import hashlib
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from PIL import Image, ImageDraw

from data_prep.sources.files import Locate, licenses_beside, png
from data_prep.sources.splits import check_shares, split_of
from data_prep.synthetic.browser import print_pdf, require
from data_prep.synthetic.building import Builder, LeftOut, conversation, writable
from data_prep.synthetic.plotting import FONT_FILES, font, signs_of
from foundation.errors import UserError
from foundation.extras import import_extra
from shards.format import Record

QUESTION = "Write down the text of this page."
MOST_GARBAGE = 0.05  # share of characters that no font's table gives a meaning to
MOST_UNDRAWN = 0.01  # share of a text file's characters, of a page, that stay unseen or are not drawn as they are read
COLUMNS, LINES = 84, 58  # of a page of a text file


@dataclass(frozen=True)
class Pages:
    """Some pages of a file: their numbers, from 0; None where the file has to be printed to know them."""

    name: str
    path: Path
    digest: str
    pages: tuple[int, ...] | None


@dataclass(frozen=True)
class Page:
    """A page of a file, by its number from 0: its picture and text, or the problem for which it has none."""

    number: int
    picture: Image.Image | None = None
    text: str = ""
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Documents(Builder):
    """Settings.

    Attributes:
        folder: holds .pdf, .html and .txt files, in folders of its own as it may be.
        kinds: endings of the files that are taken.
        long_side: pixels of a rendered page's long side.
        min_chars, max_chars: pages with less text, or more, are left out.
        validation, test: shares of the documents that are held out, with all their pages.
    """

    folder: str
    kinds: tuple[str, ...] = ("pdf", "html", "txt")
    long_side: int = 1344
    min_chars: int = 80
    max_chars: int = 6000
    validation: float = 0.0
    test: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation, self.test)
        unknown = set(self.kinds) - {"pdf", "html", "txt"}
        if unknown or not self.kinds:
            raise UserError(f"kinds are {', '.join(self.kinds) or 'empty'}; they can be pdf, html and txt")
        if not 64 <= self.long_side <= 8192:
            raise UserError(f"long_side is {self.long_side}; it can be 64 to 8192 pixels")
        if not 1 <= self.min_chars <= self.max_chars:
            raise UserError(f"min_chars {self.min_chars} and max_chars {self.max_chars}: 1 <= min <= max is needed")

    def tasks(self, locate: Locate) -> Sequence[Pages | LeftOut]:
        folder = locate(self.folder)
        files = sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in self.kinds and path.is_file())
        if not files:
            raise UserError(f"{self.folder}: there are no files of {', '.join(self.kinds)} in it")
        kinds = {path.suffix[1:].lower() for path in files}
        if kinds & {"pdf", "html"}:
            _pdfium()
        if "html" in kinds:
            require()
        tasks: list[Pages | LeftOut] = []
        seen: dict[str, str] = {}
        for path in files:
            name = writable(path.relative_to(folder).as_posix())
            try:
                data = path.read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                if digest in seen:
                    raise UserError(f"the same file as {seen[digest]}")
                seen[digest] = name
                if path.suffix.lower() != ".pdf":
                    tasks.append(Pages(name, path, digest, None))
                    continue
                with _opened(data) as document:
                    count = len(document)
                step = 8
                tasks += [
                    Pages(name, path, digest, tuple(range(start, min(start + step, count))))
                    for start in range(0, count, step)
                ]
            except (OSError, ValueError) as error:
                tasks.append(LeftOut(name, str(error)))
        return tasks

    def records(self, task: Pages) -> list[Record | LeftOut]:
        try:
            data = task.path.read_bytes()
            if task.path.suffix.lower() == ".txt":
                pages = set_text(data, task.digest, self.long_side)
            else:
                if task.path.suffix.lower() == ".html":
                    data = print_pdf(data.decode("utf-8", errors="replace"))
                pages = _rendered(data, task.pages, self.long_side)
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            return [LeftOut(task.name, str(error))]
        return [self._record(task, page) for page in pages]

    def files(self, locate: Locate) -> dict[str, str]:
        return licenses_beside({self.folder: locate(self.folder)})

    def _record(self, task: Pages, page: Page) -> Record | LeftOut:
        name, text = f"{task.name}, page {page.number + 1}", page.text
        if page.picture is None:
            return LeftOut(name, page.problem or "cannot be drawn")
        garbage = sum(unicodedata.category(sign) in ("Co", "Cn") or sign == "\ufffd" for sign in text)
        if not self.min_chars <= len(text) <= self.max_chars:
            return LeftOut(name, f"has {len(text)} characters of text, not {self.min_chars} to {self.max_chars}")
        if garbage > MOST_GARBAGE * len(text):
            return LeftOut(name, f"{garbage} of {len(text)} characters of its text mean nothing")
        split = split_of(task.digest, self.validation, self.test)
        source = f"document/{task.digest}/{page.number}"
        return conversation(source, split, "document", {"png": png(page.picture)}, [(QUESTION, text)], language="und")


def page_text(text: str) -> str:
    """Text as a PDF holds it, in order: words that a line's end divides are joined, spaces and line ends made plain."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[\ufffe\u0002]\n?", "", text)  # what stands for a hyphen at a line's end
    text = "".join(sign for sign in text if sign in "\n\t" or unicodedata.category(sign) not in ("Cc", "Cf"))
    lines = [" ".join(line.split()) for line in unicodedata.normalize("NFC", text).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def set_text(data: bytes, digest: str, long_side: int) -> list[Page]:
    """A text file as pages of LINES lines. The font follows from the digest.

    A page has a problem in place of a picture where over 1% of its characters cannot be drawn: the font lacks them, or
    they are not read from left to right, or lie over others, which the plain layout does not know.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    lines: list[str] = []
    for line in unicodedata.normalize("NFC", text).expandtabs().splitlines():
        line = "".join(sign for sign in line if unicodedata.category(sign) not in ("Cc", "Cf"))
        lines += textwrap.wrap(line, COLUMNS, replace_whitespace=False, drop_whitespace=False) or [""]
    size = long_side / (LINES + 8)  # pixels from line to line
    file, height, margin = FONT_FILES[int(digest[:8], 16) % len(FONT_FILES)], max(6, round(size * 0.72)), 4 * size
    widest = max((font(file, height).getlength(line) for line in lines), default=0)
    if widest > long_side - 2 * margin:
        height = max(1, int(height * (long_side - 2 * margin) / widest))
    letters = font(file, height)
    shape = (min(long_side, max(round(widest + 2 * margin), round(long_side * 0.7))), long_side)
    pages = []
    for number, start in enumerate(range(0, len(lines), LINES)):
        shown = lines[start : start + LINES]
        text = page_text("\n".join(shown))
        undrawn = sum(not _is_drawn(sign, file) for sign in text)
        if undrawn > MOST_UNDRAWN * len(text):
            problem = f"{undrawn} of {len(text)} characters cannot be drawn with {file}: HTML and PDF bring their fonts"
            pages.append(Page(number, problem=problem))
            continue
        picture = Image.new("L", shape, "white")
        pen = ImageDraw.Draw(picture)
        for place, line in enumerate(shown):
            pen.text((margin, margin + place * size), line, fill="black", font=letters)
        pages.append(Page(number, picture, text))
    return pages


def _is_drawn(sign: str, file: str) -> bool:
    if sign == "\n":
        return True
    in_order = unicodedata.bidirectional(sign) not in ("R", "AL", "AN")
    return ord(sign) in signs_of(file) and in_order and unicodedata.category(sign) not in ("Mn", "Me")


def _rendered(data: bytes, wanted: Sequence[int] | None, long_side: int) -> list[Page]:
    """A PDF's pages, RGB; one that is broken, or of an odd shape, does not harm the others."""
    pdfium = _pdfium()
    pages = []
    with _opened(data) as document:
        for number in range(len(document)) if wanted is None else wanted:
            try:
                pages.append(_rendered_page(document, number, long_side))
            except pdfium.PdfiumError as error:
                pages.append(Page(number, problem=f"cannot be read ({error})"))
    return pages


def _rendered_page(document, number: int, long_side: int) -> Page:
    page = document[number]
    with closing(page):
        width, height = page.get_size()
        if not (0 < width < 20 * height and 0 < height < 20 * width):
            return Page(number, problem=f"measures {width:.0f} x {height:.0f} points")
        picture = page.render(scale=long_side / max(width, height), draw_annots=False).to_pil().convert("RGB")
        with closing(page.get_textpage()) as textpage:
            return Page(number, picture, page_text(textpage.get_text_range()))


def _pdfium() -> ModuleType:
    return import_extra("pypdfium2", "data", "PDF")


def _opened(data: bytes):
    """A PDF, to be closed."""
    pdfium = _pdfium()
    try:
        return pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        raise UserError(f"cannot be opened as PDF ({error}); it may be broken, or need a password") from None
