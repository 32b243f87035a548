"""Fluent Emoji, animated (256 x 256 px WebP clips named by code point) -> captioned shard records.

The set: `assets/{code points}.webp`, a third of which moves. It has no names: OpenMoji has them.
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
    """Yields one captioned record per moving emoji, its file as it is; variants of a concept are in the same split.

    Args:
        folder: holds `assets`.
        openmoji: the folder of OpenMoji, for `data/openmoji.json`.
        dropped: gets (file, reason) for each emoji left out: those that stand still, too.

    Raises:
        UserError: one of the sets is not there.
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
            dropped.append((path.name, "stands still"))
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
    """ "1F468-200D-1F373" and "1f468-fe0f_1f373" alike: without joiners and variation selectors."""
    points = name.lower().replace("_", "-").split("-")
    return "-".join(point.lstrip("0") for point in points if point not in ("fe0f", "200d"))


def _length(data: bytes) -> tuple[int, float]:
    """(frames, seconds) of a WebP file. Seconds are known once each frame has been decoded."""
    with Image.open(io.BytesIO(data)) as clip:
        num_frames = getattr(clip, "n_frames", 1)
        if num_frames == 1:
            return 1, 0.0
        milliseconds = 0
        for number in range(num_frames):
            clip.seek(number)
            clip.load()
            milliseconds += clip.info["duration"]
    return num_frames, milliseconds / 1000
