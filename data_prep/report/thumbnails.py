"""Figures of pairs for the report: a thumbnail or contact sheet, a value, the caption and the id."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.pipeline.pool import LocatedSources, read_verified
from data_prep.report.contact_sheets import FRAMES, contact_sheet
from data_prep.steps.clips import read_clip
from data_prep.steps.faces import Faces
from foundation import html
from vision.reading import read_picture

THUMBNAIL = 96  # px


class Thumbnails:
    """Makes the figures of some pairs. Faces are blurred as in the shards."""

    def __init__(
        self, set_folder: Path, sources: LocatedSources, svg_size: int, ids: set[str], faces_steps: Sequence[Faces]
    ):
        """Args:
        set_folder: of `merging.merge`.
        svg_size: px, of the run.
        ids: of all pairs that figures are made of.
        faces_steps: the run's step that blurs faces, or none.
        """
        of_ids = pc.field("id").isin(pa.array(sorted(ids), pa.string()))
        captions = pq.read_table(set_folder / "pairs.parquet", columns=["id", "caption"], filters=of_ids)
        self._captions = {row["id"]: row["caption"] for row in captions.to_pylist()}
        positions = pq.read_table(set_folder / "sources.parquet", filters=of_ids).to_pylist()
        first: dict[str, dict[str, Any]] = {row["id"]: row for row in reversed(positions)}
        self._sources, self._svg_size, self._faces_steps = sources, svg_size, faces_steps
        self._of_clips = any(source.media == "clips" for source, _ in sources.values())
        self._faces: dict[str, list[list[float]]] = {}
        if faces_steps:
            image_ids = pa.array({row["image_id"] for row in first.values()}, pa.string())
            of_images = pc.field("image_id").isin(image_ids)
            faces = pq.read_table(set_folder / "pictures.parquet", columns=["image_id", "faces"], filters=of_images)
            self._faces = {row["image_id"]: row["faces"] for row in faces.to_pylist()}
        in_pool = sorted(first.values(), key=lambda row: (row["source"], row["path"], row["place"] or 0))
        self._images = {row["id"]: self._image(row) for row in in_pool}

    def figure(self, pair: str, value: float) -> str:
        """A figure element, as HTML; without a picture where the pool has changed since the run."""
        caption = html.escape((self._captions.get(pair) or "")[:120])
        kind = ' class="clip"' if self._of_clips else ""
        return f"<figure{kind}>{self._images[pair]}<b>{value:.4g}</b> {caption}<br><small>{pair[:12]}</small></figure>"

    def _image(self, row: dict[str, Any]) -> str:
        try:
            data = read_verified(row, self._sources)
            if self._of_clips:
                picture = contact_sheet(read_clip(data, FRAMES), THUMBNAIL)
            else:
                picture = read_picture(data, svg_size=min(self._svg_size, THUMBNAIL), svg_fonts=False)
        except ValueError:  # the pool has changed since the run
            return ""
        if not self._of_clips:
            for step in self._faces_steps:
                picture = step.blur(picture, self._faces.get(row["image_id"]))
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        picture.save(out, "WEBP", quality=70)
        return html.picture(out.getvalue(), alt="")
