"""Where the captions of a folder's pictures are: beside them, inside them, or as a known set keeps them.

Each function takes the set's folder and returns a function of (a picture's path in it, its bytes) that gives the
picture's captions as (key, bytes) pairs; a picture without a caption gives [(key, None)].
"""

import html
import re
from collections.abc import Callable
from pathlib import Path

from data_prep.sources.openmoji import caption_of, read_annotations

Captions = Callable[[str, bytes], list[tuple[str, bytes | None]]]

_TITLE = re.compile(rb"<(?:dc:)?title\b[^>]*>([^<]*)</(?:dc:)?title\s*>")
_TRANSLATION = re.compile(rb"([A-Za-z_@]+)\.utf8=(.*)", re.DOTALL)


def text_beside(folder: Path) -> Captions:
    """The whole text of `{name}.txt` beside `{name}.jpg`."""

    def captions(name: str, picture: bytes) -> list[tuple[str, bytes | None]]:
        path = (folder / name).with_suffix(".txt")
        return [(name, path.read_bytes() if path.is_file() else None)]

    return captions


def svg_title(folder: Path) -> Captions:
    """The first title in an SVG file, of the file's metadata where it has any."""

    def captions(name: str, picture: bytes) -> list[tuple[str, bytes | None]]:
        found = _TITLE.search(picture)
        if found is None:
            return [(name, None)]
        try:
            return [(name, html.unescape(found.group(1).decode()).encode())]
        except UnicodeDecodeError:
            return [(name, found.group(1))]

    return captions


def openmoji(folder: Path) -> Captions:
    """The drawing's name in `data/openmoji.json`."""
    names = {path: caption_of(annotation).encode() for annotation, path in read_annotations(folder)}

    def captions(name: str, picture: bytes) -> list[tuple[str, bytes | None]]:
        return [(name, names.get(name))]

    return captions


def tuxpaint(folder: Path) -> Captions:
    """Every line of the stamp's text: the sentence in English (key `{name}#en`) and in each other language."""

    def captions(name: str, picture: bytes) -> list[tuple[str, bytes | None]]:
        stem = (folder / name).with_suffix("")
        for source in (stem, stem.with_name(stem.name.removesuffix("_mirror"))):
            path = source.with_name(f"{source.name}.txt")
            if path.is_file():
                lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
                return [_labelled(name, line, first=number == 0) for number, line in enumerate(lines) if line.strip()]
        return [(name, None)]

    return captions


def tuxpaint_english(folder: Path) -> Captions:
    """The first line of the stamp's text alone (key `{name}#en`)."""
    every = tuxpaint(folder)

    def captions(name: str, picture: bytes) -> list[tuple[str, bytes | None]]:
        found = every(name, picture)
        return [one for one in found if one[0].endswith("#en")] or [(name, None)]

    return captions


def _labelled(name: str, line: bytes, first: bool) -> tuple[str, bytes]:
    translation = _TRANSLATION.match(line)
    if translation:
        return f"{name}#{translation.group(1).decode()}", translation.group(2)
    return f"{name}#{'en' if first else '?'}", line


CAPTIONS: dict[str, Callable[[Path], Captions]] = {
    "text": text_beside,
    "title": svg_title,
    "openmoji": openmoji,
    "tuxpaint": tuxpaint,
    "tuxpaint_english": tuxpaint_english,
}
