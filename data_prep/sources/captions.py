"""Finds the captions of a folder's pictures: in text files beside them, in SVG titles, or in the format of a known set.

Each function takes the set's folder and returns a function of (a picture's path in the folder, its bytes) that returns
the picture's captions as (key, bytes) pairs; a picture without a caption gives [(path, None)].
"""

import html
import re
from collections.abc import Callable
from pathlib import Path

from data_prep.sources.openmoji import caption_of, read_annotations

Captions = Callable[[str, bytes], list[tuple[str, bytes | None]]]

_TITLE = re.compile(rb"<(?:dc:)?title\b[^>]*>([^<]*)</(?:dc:)?title\s*>")
_TRANSLATION = re.compile(rb"([A-Za-z_@]+)\.utf8=(.*)", re.DOTALL)


def text_file(folder: Path) -> Captions:
    """The whole content of `{name}.txt`, or `{name}.TXT`, beside `{name}.jpg`."""

    def captions(name: str, picture: bytes) -> list[tuple[str, bytes | None]]:
        paths = ((folder / name).with_suffix(suffix) for suffix in (".txt", ".TXT", ".Txt"))
        return [(name, next((path.read_bytes() for path in paths if path.is_file()), None))]

    return captions


def svg_title(folder: Path) -> Captions:
    """The first title in an SVG file, which is that of its metadata where there is one."""

    def captions(name: str, picture: bytes) -> list[tuple[str, bytes | None]]:
        title = _TITLE.search(picture)
        if title is None:
            return [(name, None)]
        try:
            return [(name, html.unescape(title.group(1).decode()).encode())]
        except UnicodeDecodeError:
            return [(name, title.group(1))]

    return captions


def openmoji(folder: Path) -> Captions:
    """The drawing's name in `data/openmoji.json`."""
    names = {path: caption_of(annotation).encode() for annotation, path in read_annotations(folder)}

    def captions(name: str, picture: bytes) -> list[tuple[str, bytes | None]]:
        return [(name, names.get(name))]

    return captions


def tuxpaint(folder: Path) -> Captions:
    """Each line of the stamp's text file: the English sentence (key `{path}#en`) and its translations."""

    def captions(name: str, picture: bytes) -> list[tuple[str, bytes | None]]:
        stem = (folder / name).with_suffix("")
        for text_stem in (stem, stem.with_name(stem.name.removesuffix("_mirror"))):
            path = text_stem.with_name(f"{text_stem.name}.txt")
            if path.is_file():
                lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
                return [
                    _with_language(name, line, first=index == 0) for index, line in enumerate(lines) if line.strip()
                ]
        return [(name, None)]

    return captions


def tuxpaint_english(folder: Path) -> Captions:
    """The English sentence of the stamp's text file alone (key `{path}#en`)."""
    all_captions = tuxpaint(folder)

    def captions(name: str, picture: bytes) -> list[tuple[str, bytes | None]]:
        english = [(key, text) for key, text in all_captions(name, picture) if key.endswith("#en")]
        return english or [(name, None)]

    return captions


def _with_language(name: str, line: bytes, first: bool) -> tuple[str, bytes]:
    """(key, text) of a line; the key ends with the language, "?" where it is not known."""
    translation = _TRANSLATION.match(line)
    if translation:
        return f"{name}#{translation.group(1).decode()}", translation.group(2)
    return f"{name}#{'en' if first else '?'}", line


# The values of a source's `captions` in a curation's configuration.
CAPTIONS: dict[str, Callable[[Path], Captions]] = {
    "text": text_file,
    "title": svg_title,
    "openmoji": openmoji,
    "tuxpaint": tuxpaint,
    "tuxpaint_english": tuxpaint_english,
}
