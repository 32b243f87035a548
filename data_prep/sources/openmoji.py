"""OpenMoji (drawings with a name each) -> captioned shard records.

The set: `color/svg/{hexcode}.svg` and `data/openmoji.json`, a list of objects with "hexcode" and "annotation".
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.files import to_png
from data_prep.sources.splits import join_concepts, split_of
from foundation.errors import UserError
from shards.format import Record, image_id, make_id

PICTURE_SIZE = 128  # px, the long side; pictures are compared at this size, whatever size is written
VALIDATION_SHARE, TEST_SHARE = 0.02, 0.08  # of the concepts

_SKIN_TONE = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")
# Women, men and persons of one role are near copies of one drawing, and so are mirrored drawings.
_VARIANT = re.compile(r"\b(?:(?:wo)?m[ae]n|persons?|people|boys?|girls?|child(?:ren)?|and|facing right)\b")


def to_samples(
    folder: str | Path, dropped: list[tuple[str, str]] | None = None, picture_size: int = PICTURE_SIZE
) -> Iterator[Record]:
    """Yields one captioned record per drawing; all variants of a concept are in the same split.

    Of several names of equal pictures only the shortest is used: the others name details that the picture does not show
    (one drawing of a couple has 21 names with pairs of skin tones).

    Args:
        folder: holds `color/svg` and `data/openmoji.json`.
        dropped: gets (file, reason) for each drawing left out.
        picture_size: pixels of the long side; records and splits are the same for every size.

    Raises:
        UserError: the list of drawings is missing or not as described above.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    drawings = []  # (annotation, file, PNG), 25 MB; a split depends on all names of equal pictures
    for annotation, name in read_annotations(folder):
        try:
            drawings.append((annotation, name, to_png(folder / name, PICTURE_SIZE)))
        except UserError as error:
            dropped.append((name, str(error)))
    # "flag: Norway" and "flag: Svalbard & Jan Mayen" have different names and equal pictures.
    concepts = join_concepts((concept_of(annotation), image_id(png)) for annotation, _, png in drawings)
    first: dict[str, str] = {}
    for annotation, name, png in sorted(drawings, key=lambda drawing: len(drawing[0])):
        first_name = first.setdefault(image_id(png), name)
        if first_name != name:
            dropped.append((name, f"{annotation!r} is the same picture as {first_name}"))
            continue
        record_id = make_id(f"openmoji/{name}")
        content = {
            "id": record_id,
            "split": split_of(concepts[concept_of(annotation)], VALIDATION_SHARE, TEST_SHARE),
            "task": "caption",
            "language": "en",
            "caption": caption_of(annotation),
        }
        data = png if picture_size == PICTURE_SIZE else to_png(folder / name, picture_size)
        yield Record(record_id, content, {"png": data})


def caption_of(annotation: str) -> str:
    """The caption of an annotation: "man cook, dark skin tone" of "man cook: dark skin tone", "flag of Chad"."""
    text = " ".join(annotation.split())
    text = re.sub(r"^flag: ", "flag of ", text)
    text = re.sub(r"^keycap: ", "keycap ", text)
    return text.replace(": ", ", ")


def concept_of(annotation: str) -> str:
    """An annotation without words for variants: "cook" of "woman cook: dark skin tone"."""
    text = " ".join(re.findall(r"\w+", _SKIN_TONE.sub(" ", annotation.lower())))
    without = " ".join(_VARIANT.sub(" ", text).split())
    return without or text


def read_annotations(folder: Path) -> list[tuple[str, str]]:
    """(annotation, file) of each drawing, in the set's order.

    Raises:
        UserError: `data/openmoji.json` is missing or not a list of drawings.
    """
    path = folder / "data" / "openmoji.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [(row["annotation"].strip(), f"color/svg/{row['hexcode']}.svg") for row in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a list of drawings with hexcode and annotation ({error!r})") from None
