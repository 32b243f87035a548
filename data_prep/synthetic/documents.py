"""Pages of documents -> their text: PDF files, HTML files printed by Chromium, text files drawn with Pillow."""

import hashlib
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from data_prep.sources.files import Locate, licenses_of, png
from data_prep.sources.splits import check_shares, split_of
from data_prep.synthetic.browser import installed_code_points, print_pdf, require
from data_prep.synthetic.building import Builder, LeftOut, conversation, printable_name
from data_prep.synthetic.plotting import FONT_FILES, code_points_of, font
from data_prep.synthetic.visible_text import visible_text
from foundation.errors import UserError
from foundation.extras import import_extra
from shards.format import Record

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument

QUESTION = "Write down the text of this page."
MAX_GARBAGE = 0.05  # share of a page's characters that are private, unassigned or replacement characters
MAX_UNDRAWN = 0.01  # share of the characters of a text file's page that cannot be drawn in reading order
COLUMNS, LINES = 84, 58  # characters and lines on a page of a text file


@dataclass(frozen=True)
class DocumentPages:
    """Some pages of a file by index; None stands for all pages of a file that is not a PDF."""

    name: str
    path: Path
    digest: str  # SHA-256 of the file
    pages: tuple[int, ...] | None


@dataclass(frozen=True)
class RenderedPage:
    """A page of a file by index: its picture and text, or the problem why it has none."""

    index: int
    picture: Image.Image | None = None
    text: str = ""
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Documents(Builder):
    """Settings.

    Attributes:
        folder: searched with all its subfolders.
        kinds: suffixes of the files to use, some of pdf, html and txt.
        long_side: pixels of a rendered page's long side.
        min_chars, max_chars: pages with less or more text are left out.
        validation, test: shares of the documents that are held out; all pages of a document are in one split.
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

    def jobs(self, locate: Locate) -> Sequence[DocumentPages | LeftOut]:
        """See Builder."""
        folder = locate(self.folder)
        files = sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in self.kinds and path.is_file())
        if not files:
            raise UserError(f"{self.folder}: has no files with a suffix of {', '.join(self.kinds)}")
        kinds = {path.suffix[1:].lower() for path in files}
        if kinds & {"pdf", "html"}:
            _pdfium()
        if "html" in kinds:
            require()
        jobs: list[DocumentPages | LeftOut] = []
        name_of: dict[str, str] = {}
        for path in files:
            name = printable_name(path.relative_to(folder).as_posix())
            try:
                data = path.read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                if digest in name_of:
                    jobs.append(LeftOut(name, f"the same file as {name_of[digest]}"))
                    continue
                name_of[digest] = name
                if path.suffix.lower() != ".pdf":
                    jobs.append(DocumentPages(name, path, digest, None))
                    continue
                with _open_pdf(data) as document:
                    count = len(document)
                step = 8
                jobs += [
                    DocumentPages(name, path, digest, tuple(range(start, min(start + step, count))))
                    for start in range(0, count, step)
                ]
            except (OSError, UserError) as error:
                jobs.append(LeftOut(name, str(error)))
        return jobs

    def records(self, job: DocumentPages) -> list[Record | LeftOut]:
        """See Builder."""
        try:
            data = job.path.read_bytes()
            kind = job.path.suffix.lower()
            if kind == ".txt":
                pages = draw_text_pages(data, job.digest, self.long_side)
            elif kind == ".html":
                html = data.decode("utf-8", errors="replace")
                pages = [_with_fonts(page, html) for page in render_pdf(print_pdf(html), None, self.long_side)]
            else:
                pages = render_pdf(data, job.pages, self.long_side)
        except TimeoutError:  # an overloaded machine, and not a fault of this page
            raise
        except (OSError, UserError) as error:
            return [LeftOut(job.name, str(error))]
        return [self._record(job, page) for page in pages]

    def files(self, locate: Locate) -> dict[str, str]:
        """See Builder."""
        return licenses_of({self.folder: locate(self.folder)})

    def _record(self, job: DocumentPages, page: RenderedPage) -> Record | LeftOut:
        name, text = f"{job.name}, page {page.index + 1}", page.text
        if page.picture is None:
            return LeftOut(name, page.problem or "cannot be drawn")
        garbage = sum(unicodedata.category(char) in ("Co", "Cn") or char == "\ufffd" for char in text)
        if not self.min_chars <= len(text) <= self.max_chars:
            limits = f"{self.min_chars} to {self.max_chars}"
            return LeftOut(name, f"has {len(text)} characters of visible text, not {limits}")
        if garbage > MAX_GARBAGE * len(text):
            return LeftOut(name, f"{garbage} of {len(text)} characters of its text have no meaning in Unicode")
        split = split_of(job.digest, self.validation, self.test)
        source = f"document/{job.digest}/{page.index}"
        return conversation(source, split, "document", {"png": png(page.picture)}, [(QUESTION, text)], language="und")


def page_text(text: str) -> str:
    """A PDF's text with words hyphenated at line ends joined, and with plain spaces and line ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[\ufffe\u0002]\n?", "", text)  # pdfium's marks of a hyphen at a line's end
    text = "".join(char for char in text if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf"))
    lines = [" ".join(line.split()) for line in unicodedata.normalize("NFC", text).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def draw_text_pages(data: bytes, digest: str, long_side: int) -> list[RenderedPage]:
    """A text file drawn as pages of LINES lines.

    A page has a problem in place of a picture where over 1% of its characters cannot be drawn: the font lacks them, or
    they need a layout that is not implemented (right-to-left text, combining marks).

    Args:
        data: the file.
        digest: of the file; it decides the font.
        long_side: of a page, in pixels.

    Raises:
        UserError: the file is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
    lines: list[str] = []
    for line in unicodedata.normalize("NFC", text).expandtabs().splitlines():
        line = "".join(char for char in line if unicodedata.category(char) not in ("Cc", "Cf"))
        lines += textwrap.wrap(line, COLUMNS, replace_whitespace=False, drop_whitespace=False) or [""]
    line_step = long_side / (LINES + 8)  # pixels
    file, height, margin = (
        FONT_FILES[int(digest[:8], 16) % len(FONT_FILES)],
        max(6, round(line_step * 0.72)),
        4 * line_step,
    )
    widest = max((font(file, height).getlength(line) for line in lines), default=0)
    if widest > long_side - 2 * margin:
        height = max(1, int(height * (long_side - 2 * margin) / widest))
    face = font(file, height)
    size = (min(long_side, max(round(widest + 2 * margin), round(long_side * 0.7))), long_side)
    pages = []
    for index, start in enumerate(range(0, len(lines), LINES)):
        shown = lines[start : start + LINES]
        text = page_text("\n".join(shown))
        undrawn = sum(not _is_drawable(char, file) for char in text)
        if undrawn > MAX_UNDRAWN * len(text):
            problem = f"{undrawn} of {len(text)} characters cannot be drawn with {file}; use HTML or PDF"
            pages.append(RenderedPage(index, problem=problem))
            continue
        picture = Image.new("L", size, "white")
        pen = ImageDraw.Draw(picture)
        for row, line in enumerate(shown):
            pen.text((margin, margin + row * line_step), line, fill="black", font=face)
        pages.append(RenderedPage(index, picture, text))
    return pages


def _with_fonts(page: RenderedPage, html: str) -> RenderedPage:
    """A page printed by Chromium; one with a problem where fonts are missing for over 1% of its characters."""
    known = installed_code_points() if "@font-face" not in html else None  # a page may hold fonts of its own
    if page.picture is None or known is None:
        return page
    undrawn = sum(ord(char) not in known and char != "\n" for char in page.text)
    if undrawn <= MAX_UNDRAWN * len(page.text):
        return page
    problem = f"no font of this machine has {undrawn} of its {len(page.text)} characters: install fonts of its language"
    return RenderedPage(page.index, problem=problem)


def _is_drawable(char: str, file: str) -> bool:
    if char == "\n":
        return True
    is_left_to_right = unicodedata.bidirectional(char) not in ("R", "AL", "AN")
    return ord(char) in code_points_of(file) and is_left_to_right and unicodedata.category(char) not in ("Mn", "Me")


def render_pdf(data: bytes, indices: Sequence[int] | None, long_side: int) -> list[RenderedPage]:
    """Pages of a PDF, RGB; None renders all. A broken page, or one of an odd shape, does not affect the others."""
    pdfium = _pdfium()
    pages = []
    with _open_pdf(data) as document:
        for index in range(len(document)) if indices is None else indices:
            try:
                pages.append(_render_page(document, index, long_side))
            except pdfium.PdfiumError as error:
                pages.append(RenderedPage(index, problem=f"cannot be read ({error})"))
    return pages


def _render_page(document: "PdfDocument", index: int, long_side: int) -> RenderedPage:
    page = document[index]
    with closing(page):
        width, height = page.get_size()
        if not (0 < width < 20 * height and 0 < height < 20 * width):
            return RenderedPage(index, problem=f"measures {width:.0f} x {height:.0f} points")
        scale = long_side / max(width, height) * (1 - 1e-9)  # rounding must not make it one pixel longer
        picture = page.render(scale=scale, draw_annots=False).to_pil().convert("RGB")
        text = visible_text(page, np.asarray(picture), scale, import_extra("pypdfium2.raw", "data", "PDF"))
        return RenderedPage(index, picture, page_text(text))


def _pdfium() -> ModuleType:
    return import_extra("pypdfium2", "data", "PDF")


def _open_pdf(data: bytes) -> "PdfDocument":
    """A PDF; the caller closes it."""
    pdfium = _pdfium()
    try:
        return pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        raise UserError(f"it cannot be opened as PDF ({error}); it may be broken, or need a password") from None
