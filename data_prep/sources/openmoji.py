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

PICTURE_SIZE = 128  # px, the long side; whatever size is asked for, pictures are compared at this one
VALIDATION_SHARE, TEST_SHARE = 0.02, 0.08  # of the concepts

_SKIN_TONE = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")
# Women, men and persons of one role are near copies of one drawing (many are the very same file), and so is the
# mirrored drawing of a movement.
_VARIANT = re.compile(r"\b(?:(?:wo)?m[ae]n|persons?|people|boys?|girls?|child(?:ren)?|and|facing right)\b")


def to_samples(
    folder: str | Path, dropped: list[tuple[str, str]] | None = None, picture_size: int = PICTURE_SIZE
) -> Iterator[Record]:
    """Yields one captioned record per drawing; all variants of a concept are in the same split.

    Of names that have the very same picture only the shortest is used: the others claim what the picture does not show
    (a couple without skin colours is there under 21 pairs of skin tones).

    Args:
        folder: holds `color/svg` and `data/openmoji.json`.
        dropped: gets (file, reason) for each drawing left out.
        picture_size: of the long side, in pixels; records and splits are the same at every size.

    Raises:
        UserError: the list of drawings is missing or not as described above.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    drawings = []  # (annotation, file, PNG): some 25 MB, since a name's split depends on all names of the same picture
    for annotation, name in read_annotations(folder):
        try:
            drawings.append((annotation, name, to_png(folder / name, PICTURE_SIZE)))
        except ValueError as error:
            dropped.append((name, str(error)))
    # "flag: Norway" and "flag: Svalbard & Jan Mayen" are two concepts by name and one by picture.
    concepts = join_concepts((concept_of(annotation), image_id(png)) for annotation, _, png in drawings)
    first: dict[str, str] = {}
    for annotation, name, png in sorted(drawings, key=lambda drawing: len(drawing[0])):
        same = first.setdefault(image_id(png), name)
        if same != name:
            dropped.append((name, f"{annotation!r} is the same picture as {same}"))
            continue
        record_id = make_id(f"openmoji/{name}")
        content = {
            "id": record_id,
            "split": split_of(concepts[concept_of(annotation)], VALIDATION_SHARE, TEST_SHARE),
            "task": "caption",
            "language": "en",
            "caption": caption_of(annotation),
        }
        shown = png if picture_size == PICTURE_SIZE else to_png(folder / name, picture_size)
        yield Record(record_id, content, {"png": shown})


def caption_of(annotation: str) -> str:
    """ "man cook: dark skin tone" -> "man cook, dark skin tone"; "flag: Chad" -> "flag of Chad"."""
    text = " ".join(annotation.split())
    text = re.sub(r"^flag: ", "flag of ", text)
    text = re.sub(r"^keycap: ", "keycap ", text)
    return text.replace(": ", ", ")


def concept_of(annotation: str) -> str:
    """What a drawing shows, without the variant: "woman cook: dark skin tone" -> "cook"."""
    text = " ".join(re.findall(r"\w+", _SKIN_TONE.sub(" ", annotation.lower())))
    without = " ".join(_VARIANT.sub(" ", text).split())
    return without or text


def read_annotations(folder: Path) -> list[tuple[str, str]]:
    """(annotation, file) of each drawing, in the set's order."""
    path = folder / "data" / "openmoji.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [(row["annotation"].strip(), f"color/svg/{row['hexcode']}.svg") for row in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: no list of drawings with hexcode and annotation ({error!r})") from None
