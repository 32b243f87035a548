"""The text of a PDF page that can be read in the page's picture.

A PDF's text layer also holds what the picture does not show: text outside the crop box, invisible text (render mode 3,
such as the text layer of a scan), white text on white, nearly transparent or covered text, and tiny print. The page is
rendered with and without its text; a character is visible where this changes the pixels of its box.
"""

import ctypes
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pypdfium2 import PdfObject, PdfPage, PdfTextPage

MIN_CONTRAST = 16  # of 255: difference to the background that half of a visible word's characters have
MIN_TRACE = 4  # of 255: ... and that each of them has; points and hyphens are thin
MIN_SIDE = 4  # px: the longer side of a readable character's box, ascent and descent included

Box = tuple[float, float, float, float]  # left, bottom, right, top; on the page


@dataclass(frozen=True)
class Character:
    """A character of a page.

    Attributes:
        text: one unit of UTF-16, or none; a line ends with two, "\\r" and "\\n".
        box: where it is drawn; None where it has no box of its own, such as a space.
        height: longer side of its box in points, with ascent and descent.
        colour: RGB; None for invisible text.
    """

    text: str
    box: Box | None
    height: float
    colour: tuple[int, int, int] | None


def visible_text(page: "PdfPage", shown: np.ndarray, scale: float, raw: ModuleType) -> str:
    """The text that can be read in a rendered page. It is taken off the page, which is not to be used afterwards.

    Args:
        page: of an open document.
        shown: uint8 [H, W, 3], the page rendered with this scale and without annotations.
        scale: pixels per point.
        raw: the module pypdfium2.raw.

    Returns:
        the text as pdfium gives it, with "\\r\\n" at line ends, without the words and lines that cannot be seen.
    """
    with closing(page.get_textpage()) as textpage:
        if not textpage.count_chars():
            return ""
        characters = _characters(page, textpage, raw)
        for item in page.get_objects(filter=[raw.FPDF_PAGEOBJ_TEXT]):
            raw.FPDFPageObj_SetIsActive(item.raw, False)
    hidden = np.asarray(page.render(scale=scale, draw_annots=False).to_pil().convert("RGB"))
    to_pixels = _page_to_pixels(page, shown.shape[1], shown.shape[0], raw)
    contrasts = _contrasts(characters, shown, hidden, to_pixels, MIN_SIDE / scale)
    text = "".join(_visible_lines(list(zip((item.text for item in characters), contrasts, strict=True))))
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")  # joins pairs of surrogates


def _characters(page: "PdfPage", textpage: "PdfTextPage", raw: ModuleType) -> list[Character]:
    units = textpage.get_text_range(errors="surrogatepass").encode("utf-16-le", "surrogatepass")
    objects = {_address(item.raw): item for item in page.get_objects(filter=[raw.FPDF_PAGEOBJ_TEXT])}
    bounds: dict[int, Box | None] = {}
    colours: dict[int, tuple[int, int, int] | None] = {}
    characters = []
    for index in range(textpage.count_chars()):
        place = raw.FPDFText_GetTextIndexFromCharIndex(textpage, index)  # negative: it is not in the text
        text = units[2 * place : 2 * place + 2].decode("utf-16-le", "surrogatepass") if place >= 0 else ""
        address = _address(raw.FPDFText_GetTextObject(textpage, index))
        if address not in bounds:
            bounds[address] = _bounds(objects[address]) if address in objects else None
            colours[address] = _colour(textpage, index, raw)
        box, within = textpage.get_charbox(index), bounds[address]
        # pdfium puts characters that have a replacement text (ActualText) somewhere else.
        if within and (box[0] > within[2] or within[0] > box[2] or box[1] > within[3] or within[1] > box[3]):
            box = within
        loose = textpage.get_charbox(index, loose=True)
        characters.append(
            Character(
                text,
                box if box[0] < box[2] and box[1] < box[3] else None,
                max(loose[2] - loose[0], loose[3] - loose[1]),
                colours[address],
            )
        )
    return characters


def _address(pointer: Any) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


def _bounds(item: "PdfObject") -> Box:
    """Where an object of a page lies; one point is added on each side."""
    box, container = item.get_bounds(), item.container
    while container is not None:  # a form's objects have coordinates of its own
        box, container = container.get_matrix().on_rect(*box), container.container
    return box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1


def _colour(textpage: "PdfTextPage", index: int, raw: ModuleType) -> tuple[int, int, int] | None:
    """The colour in which a character is drawn; None for invisible text."""
    item = raw.FPDFText_GetTextObject(textpage, index)
    mode = raw.FPDFTextObj_GetTextRenderMode(item) if item else raw.FPDF_TEXTRENDERMODE_FILL
    if mode in (raw.FPDF_TEXTRENDERMODE_INVISIBLE, raw.FPDF_TEXTRENDERMODE_CLIP):
        return None
    strokes = mode in (raw.FPDF_TEXTRENDERMODE_STROKE, raw.FPDF_TEXTRENDERMODE_STROKE_CLIP)
    get_colour = raw.FPDFText_GetStrokeColor if strokes else raw.FPDFText_GetFillColor
    red, green, blue, alpha = (ctypes.c_uint() for _ in range(4))
    get_colour(textpage, index, red, green, blue, alpha)
    return red.value, green.value, blue.value


def _page_to_pixels(page: "PdfPage", width: int, height: int, raw: ModuleType) -> np.ndarray:
    """The matrix [2, 3] that turns (x, y, 1) on the page into pixels of its picture."""
    fine = 1000  # pdfium gives whole pixels: those of a picture so many times as large
    corners = []
    for x, y in ((0, 0), (fine, 0), (0, fine)):
        column, row = ctypes.c_int(), ctypes.c_int()
        raw.FPDF_PageToDevice(page, 0, 0, width * fine, height * fine, 0, x, y, column, row)
        corners.append(np.array((column.value, row.value)) / fine)
    origin, right, up = corners
    return np.stack(((right - origin) / fine, (up - origin) / fine, origin), axis=1)


def _contrasts(
    characters: list[Character], shown: np.ndarray, hidden: np.ndarray, to_pixels: np.ndarray, min_height: float
) -> list[int | None]:
    """How much each character changes the page at most, 0 to 255; None for one without a box, which follows its word.

    A change away from the character's own colour is not its own: other text lies in its place.

    Args:
        shown, hidden: the page with and without text, uint8 [H, W, 3].
        to_pixels: see `_page_to_pixels`.
        min_height: points; 0 for smaller characters.
    """
    height, width = shown.shape[:2]
    change = np.maximum(shown, hidden) - np.minimum(shown, hidden)
    change = np.maximum(np.maximum(change[:, :, 0], change[:, :, 1]), change[:, :, 2])  # faster than max(2)
    boxes = np.array([item.box or (0, 0, 0, 0) for item in characters])  # [n, 4]
    ends = np.stack([boxes[:, [0, 1]] @ to_pixels[:, :2].T, boxes[:, [2, 3]] @ to_pixels[:, :2].T]) + to_pixels[:, 2]
    # Fonts are fitted to the pixels' grid, so thin marks are drawn up to one pixel beside their box.
    first, last = np.floor(ends.min(0)).astype(int) - 1, np.floor(ends.max(0)).astype(int) + 1
    inside = ((ends.mean(0) >= 0) & (ends.mean(0) < (width, height))).all(1)
    contrasts: list[int | None] = []
    for item, (left, top), (right, bottom), is_inside in zip(characters, first, last, inside, strict=True):
        if item.colour is None or (item.box and (not is_inside or item.height < min_height)):
            contrasts.append(0)
            continue
        if item.box is None:
            contrasts.append(None)
            continue
        left, top = max(0, left), max(0, top)
        part = change[top : bottom + 1, left : right + 1]
        row, column = divmod(int(part.argmax()), part.shape[1])
        place = (top + row, left + column)
        own = sum(
            (int(with_text) - int(without)) * (colour - int(without))
            for with_text, without, colour in zip(shown[place], hidden[place], item.colour, strict=True)
        )
        contrasts.append(int(part[row, column]) if own > 0 else 0)
    return contrasts


def _visible_lines(characters: list[tuple[str, int | None]]) -> Iterator[str]:
    """The visible ones of (character, contrast), without the lines of which nothing can be seen."""
    line: list[tuple[str, int | None]] = []
    for text, contrast in [*characters, ("\n", None)]:
        line.append((text, contrast))
        if text != "\n":
            continue
        words = []
        for is_space, group in groupby(line, key=lambda item: not item[0].strip()):
            word = list(group)
            words += [text for text, _ in word] if is_space else _visible_characters(word)
        if "".join(words).strip() or not any(text.strip() for text, _ in line):
            yield "".join(words)
        line = []


def _visible_characters(word: list[tuple[str, int | None]]) -> list[str]:
    """The characters of a word that can be seen: none where most are faint, else all but those without any trace."""
    traces = [contrast for _, contrast in word if contrast]
    if 2 * sum(contrast >= MIN_CONTRAST for contrast in traces) < max(1, len(traces)):
        return []
    return [text for text, contrast in word if contrast is None or contrast >= MIN_TRACE]
