"""Fluent Emoji, animated (256 x 256 px WebP clips named by code point) -> captioned shard records.

The set: `assets/{code points}.webp`, a third of which is animated. The captions are OpenMoji's names.
"""

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from data_prep.sources.openmoji import TEST_SHARE, VALIDATION_SHARE, caption_of, concept_of, read_annotations
from data_prep.sources.splits import split_of
from foundation.errors import UserError
from shards.format import Record, make_id

SUFFIX = "clip.webp"


def to_samples(
    folder: str | Path, openmoji: str | Path, dropped: list[tuple[str, str]] | None = None
) -> Iterator[Record]:
    """Yields one captioned record per animated emoji with its unchanged file; variants of a concept are in one split.

    Args:
        folder: holds `assets`.
        openmoji: the folder of OpenMoji; holds `data/openmoji.json`.
        dropped: gets (file, reason) for each emoji left out, those with a single frame among them.

    Raises:
        UserError: one of the sets is missing.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    names = {_code_points(Path(path).stem): annotation for annotation, path in read_annotations(Path(openmoji))}
    paths = sorted((folder / "assets").glob("*.webp"))
    if not paths:
        raise UserError(f"{folder}: no WebP files under 'assets'")
    for path in paths:
        annotation = names.get(_code_points(path.stem))
        if annotation is None:
            dropped.append((path.name, "OpenMoji has no name for it"))
            continue
        data = path.read_bytes()
        try:
            num_frames, duration = _length(data)
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on broken files
            dropped.append((path.name, f"broken or truncated clip ({type(error).__name__}: {error})"))
            continue
        if num_frames == 1:
            dropped.append((path.name, "has a single frame"))
            continue
        record_id = make_id(f"fluent-emoji/{path.stem}")
        content = {
            "id": record_id,
            "split": split_of(concept_of(annotation), VALIDATION_SHARE, TEST_SHARE),
            "task": "caption",
            "language": "en",
            "caption": caption_of(annotation),
            "num_frames": num_frames,
            "duration": duration,
        }
        yield Record(record_id, content, {SUFFIX: data})


def _code_points(name: str) -> str:
    """Code points without joiners and variation selectors: "1F468-200D-1F373" and "1f468-fe0f_1f373" are equal."""
    points = name.lower().replace("_", "-").split("-")
    return "-".join(point.lstrip("0") for point in points if point not in ("fe0f", "200d"))


def _length(data: bytes) -> tuple[int, float]:
    """(frames, seconds) of a WebP file. Pillow knows a frame's duration once it has decoded it."""
    with Image.open(io.BytesIO(data)) as clip:
        num_frames = getattr(clip, "n_frames", 1)
        if num_frames == 1:
            return 1, 0.0
        milliseconds = 0
        for index in range(num_frames):
            clip.seek(index)
            clip.load()
            milliseconds += clip.info["duration"]
    return num_frames, milliseconds / 1000
