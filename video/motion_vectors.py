"""How fast a film's blocks move by the codec's own motion vectors: what its encoder found, without a look at pixels."""

import io
import time
from dataclasses import replace

import numpy as np

from video.timeline import MAX_PIXELS, MAX_SECONDS, TIME_LIMIT, decoded, open_video, pyav


def codec_speed(source: bytes) -> float | None:
    """Mean speed of a film's pixels, in short sides a second, by the vectors of its predicted (P) frames.

    Such a frame's vectors are taken to point at the I or P frame before it; where the encoder chose an older one, the
    speed comes out too high. Blocks that are coded anew count as still. Bidirectional frames and broken packets are
    left out.

    Returns:
        None where the file has no vectors: a codec that keeps none or that FFmpeg does not export them of, or I frames
        alone.

    Raises:
        UserError: as `video.timeline.open_video`.
    """
    av = pyav()
    picture = av.video.frame.PictureType
    moved = seconds = 0.0
    deadline = time.monotonic() + TIME_LIMIT
    with open_video(source, MAX_PIXELS, MAX_SECONDS) as video:
        number = video.stream.index
    # Opened anew: a codec that has decoded a frame exports no vectors any more.
    with av.open(io.BytesIO(source)) as container:
        stream, before = container.streams[number], None
        stream.codec_context.options = {"flags2": "+export_mvs"}
        stream.codec_context.thread_count = 1
        for frame in decoded(av, replace(video, container=container, stream=stream), deadline):
            if frame.pict_type == picture.B or frame.pts is None:
                continue
            vectors = frame.side_data.get("MOTION_VECTORS")
            if frame.pict_type == picture.P and vectors is not None and before is not None:
                moved += _mean_shift(vectors.to_ndarray(), frame.width * frame.height) / min(frame.width, frame.height)
                seconds += float((frame.pts - before) * stream.time_base)
            before = frame.pts
    return moved / seconds if seconds > 0 else None


def _mean_shift(vectors: np.ndarray, area: int) -> float:
    """Pixels by which a picture of so many pixels moved: the vectors of blocks, weighed by their size."""
    past = vectors[vectors["source"] < 0]
    shift = np.hypot(past["motion_x"], past["motion_y"]) / np.maximum(past["motion_scale"], 1)
    return float((shift * past["w"] * past["h"]).sum()) / area
