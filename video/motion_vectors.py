"""Motion speed of a video from the codec's motion vectors, which its encoder stored; no pixels are compared."""

import io
import time
from dataclasses import replace

import numpy as np

from foundation.media import open_media
from video.container import decode_packets, pyav
from video.timeline import MAX_PIXELS, MAX_SECONDS, TIME_LIMIT, open_video


def codec_speed(source: bytes) -> float | None:
    """Mean speed of a video's pixels, in short sides per second, from the vectors of its predicted (P) frames.

    A P frame's vectors are assumed to point at the previous I or P frame. If the encoder chose an older reference
    frame, the speed is too high. Intra-coded blocks count as still. Bidirectional (B) frames and broken packets are
    ignored.

    Args:
        source: the file's bytes.

    Returns:
        the speed, or None if the file has no vectors: only I frames, or a codec of which FFmpeg exports none.

    Raises:
        UserError: as `video.timeline.open_video`.
    """
    av = pyav()
    picture_type = av.video.frame.PictureType
    moved = seconds = 0.0
    deadline = time.monotonic() + TIME_LIMIT
    with open_video(source, MAX_PIXELS, MAX_SECONDS) as video:
        stream_index = video.stream.index
    # The file is opened again, because a codec that has decoded a frame no longer exports vectors.
    with open_media(io.BytesIO(source), "video") as container:
        stream, previous_pts = container.streams[stream_index], None
        decoder = stream.codec_context
        decoder.options = {"flags2": "+export_mvs"}
        decoder.thread_count = 1
        again = replace(video, container=container, stream=stream, decoder=decoder)
        for frame in decode_packets(again, container.demux(stream), deadline):
            if frame.pict_type == picture_type.B or frame.pts is None:
                continue
            vectors = frame.side_data.get("MOTION_VECTORS")
            if frame.pict_type == picture_type.P and vectors is not None and previous_pts is not None:
                moved += _mean_shift(vectors.to_ndarray(), frame.width * frame.height) / min(frame.width, frame.height)
                seconds += float((frame.pts - previous_pts) * stream.time_base)
            previous_pts = frame.pts
    return moved / seconds if seconds > 0 else None


def _mean_shift(vectors: np.ndarray, area: int) -> float:
    """Mean shift in pixels of a frame of `area` pixels: the lengths of its blocks' vectors, weighted by block size."""
    past = vectors[vectors["source"] < 0]
    shift = np.hypot(past["motion_x"], past["motion_y"]) / np.maximum(past["motion_scale"], 1)
    return float((shift * past["w"] * past["h"]).sum()) / area
