"""Tux Paint stamps (cut-out photographs and drawings with a sentence each) -> captioned shard records.

The set: under `stamps`, a `{name}.svg` and/or `{name}.png` beside `{name}.txt`, whose first line is the English
sentence and whose other lines are translations (`de.utf8=...`). `{name}_mirror.png` is the mirrored picture.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.files import to_png
from data_prep.sources.splits import join_concepts, split_of
from foundation.errors import UserError
from shards.format import Record, make_id

PICTURE_SIZE = 128  # px, the long side
VALIDATION_SHARE, TEST_SHARE = 0.02, 0.08  # of the concepts


def to_samples(
    folder: str | Path, dropped: list[tuple[str, str]] | None = None, picture_size: int = PICTURE_SIZE
) -> Iterator[Record]:
    """Yields one captioned record per stamp; stamps with the same sentence, mirrored ones too, are in the same split.

    Of a stamp with an SVG and a PNG file the SVG is used, as Tux Paint does, or the PNG where the SVG cannot be used.

    Args:
        folder: holds `stamps`.
        dropped: gets (file, reason) for each picture left out.
        picture_size: pixels of the long side at most; of an SVG's exactly.

    Raises:
        UserError: there are no stamps in the folder.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    stamps: dict[Path, list[Path]] = {}  # path without its suffix -> its pictures, SVG first
    for kind in ("svg", "png"):
        for path in folder.glob(f"stamps/**/*.{kind}"):
            stamps.setdefault(path.with_suffix(""), []).append(path)
    if not stamps:
        raise UserError(f"{folder}: no pictures under 'stamps'")
    captions: dict[Path, str] = {}
    for stem in sorted(stamps):
        try:
            captions[stem] = sentence_of(stem)
        except UserError as error:
            dropped.append((_name(stem, folder), str(error)))
    concepts = join_concepts(
        (concept_of(caption), _name(_unmirrored(stem), folder)) for stem, caption in captions.items()
    )
    for stem, caption in captions.items():
        picture = _first_readable(stamps[stem], folder, picture_size, dropped)
        if picture is None:
            continue
        record_id = make_id(f"tuxpaint/{_name(stem, folder)}")
        content = {
            "id": record_id,
            "split": split_of(concepts[concept_of(caption)], VALIDATION_SHARE, TEST_SHARE),
            "task": "caption",
            "language": "en",
            "caption": caption,
        }
        yield Record(record_id, content, {"png": picture})


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _first_readable(paths: list[Path], folder: Path, size: int, dropped: list[tuple[str, str]]) -> bytes | None:
    for path in paths:
        try:
            return to_png(path, size)
        except UserError as error:
            dropped.append((_name(path, folder), str(error)))
    return None


def _unmirrored(stem: Path) -> Path:
    return stem.with_name(stem.name.removesuffix("_mirror"))


def concept_of(caption: str) -> str:
    """The sentence in lower case without punctuation and leading article: "red apple" of "A Red Apple."."""
    words = re.findall(r"\w+", caption.lower())
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the", "some") else words)


def sentence_of(stem: Path) -> str:
    """The English sentence of a stamp, or of its unmirrored stamp where a mirrored one has none.

    Raises:
        UserError: there is no sentence, or it is not UTF-8.
    """
    for text_stem in (stem, _unmirrored(stem)):
        path = text_stem.with_name(f"{text_stem.name}.txt")
        if path.is_file():
            lines = path.read_bytes().splitlines() or [b""]
            try:
                caption = " ".join(lines[0].decode("utf-8-sig").split())
            except UnicodeDecodeError:
                raise UserError(f"{path}: its sentence is not UTF-8") from None
            if not caption or re.match(r"[a-z_A-Z]+\.utf8=", caption):
                raise UserError(f"{path}: has no English sentence in its first line")
            return caption
    raise UserError(f"{stem}: has no .txt file with a sentence beside it")
