"""The timeline of a video file: when each frame is shown, from its packets, without decoding them.

All times come from here. Readers are given the frames to decode and do not report times. Where the packets' stamps
cannot be trusted, the whole film is decoded once instead.
"""

import io
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from foundation.errors import UserError
from video.container import (
    DISCONTINUOUS,
    Video,
    begins_grey,
    decode_frames,
    mend_stamps,
    pyav,
    starts_afresh,
    stores_order_of_decoding,
)
from video.pixels import square_width
from video.stamps import JoinedStamps, display_stamps, median_step

MAX_PIXELS = 2**25  # per frame; 8K (7680 x 4320) is just below
MAX_SECONDS = 3600.0
TIME_LIMIT = 120.0  # seconds for one reader and one clip
MAX_PACKETS = 2**20  # an hour at 240 frames per second has 864,000
MIN_PRESENT = (
    0.5  # of the frames that a container announces; its count may be off by a few, a truncated file lacks many
)
SEEK_FRAMES = 12  # a seek costs about as much as decoding this many frames


@dataclass
class Timeline:
    """Times of the frames in presentation order.

    Attributes:
        ticks: int64 [N], when each frame is shown; 0 for the first. Of frames with equal ticks the last is shown.
        duration: ticks from the first frame's start to the last frame's end.
        time_base: seconds per tick.
        origin: the stream's timestamp of the first frame, in ticks.
        keys: ascending indices of the key frames.
        from_packets: whether timestamps and key frames come from the packets. Otherwise they come from decoding, and
            frames are found by counting.
        open_groups: whether some frames refer back over a key frame: they are decoded after it and shown before it
            (open GOP), or decoding cannot start there (intra refresh).
    """

    ticks: np.ndarray
    duration: int
    time_base: Fraction
    origin: int = 0
    keys: tuple[int, ...] = (0,)
    from_packets: bool = True
    open_groups: bool = False

    @property
    def seconds(self) -> float:
        """The duration in seconds."""
        return self.duration * float(self.time_base)


def plan_seeks(indices: np.ndarray, keys: tuple[int, ...]) -> list[int | None]:
    """For each frame to decode, in order: the key frame to seek to first, or None to go on decoding.

    A seek pays off if it skips more than `SEEK_FRAMES` frames.
    """
    plan: list[int | None] = []
    position = 0
    for index in indices.tolist():
        key = keys[bisect_right(keys, index) - 1] if keys and keys[0] <= index else 0
        plan.append(key if key - position > SEEK_FRAMES else None)
        position = index + 1
    return plan


@contextmanager
def open_video(source: str | Path | bytes, max_pixels: int, max_seconds: float) -> Iterator[Video]:
    """Open a file with PyAV, check the limits, find its timeline, and decode its first frame.

    Raises:
        UserError: the file is not a video, is broken, or is over a limit; the message does not name the file.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        if not file.read(1):
            raise UserError("the file is empty (0 bytes)")
        file.seek(0)
        video = Video.of(file)
        try:
            _probe(video, max_pixels, max_seconds)
            yield video
        finally:
            video.container.close()


def _probe(video: Video, max_pixels: int, max_seconds: float) -> None:
    """Check an open file against the limits, and find out what `Video` says of it."""
    av = pyav()
    width, height = video.stream.codec_context.width, video.stream.codec_context.height
    if width * height > max_pixels:
        raise UserError(f"{width} x {height} = {width * height:,} pixels per frame, over the limit of {max_pixels:,}")
    seconds = (video.container.duration or 0) / av.time_base
    if seconds > max_seconds and video.container.format.name not in DISCONTINUOUS:
        raise UserError(f"{seconds:,.0f} seconds long, over the limit of {max_seconds:,.0f}; cut it")
    video.decoding_stamps = stores_order_of_decoding(video)
    video.timeline = _demux(video)
    first = _first_frame(video)
    video.width, video.height, video.pixel_format = first.width, first.height, first.format.name
    video.matrix, video.interlaced = _matrix(first), first.interlaced_frame
    # Uncompressed AVI has 32 bits for each pixel, of which 8 have no meaning.
    meaningless = video.container.format.name == "avi" and video.decoder.name == "rawvideo"
    video.has_alpha = any(component.is_alpha for component in first.format.components) and not meaningless
    video.shown_width = square_width(first.width, float(video.stream.sample_aspect_ratio or 1))
    width = max(video.width, video.shown_width)
    if width * video.height > max_pixels:
        raise UserError(f"{width} x {video.height} pixels per frame, over the limit of {max_pixels:,}")
    if not video.timeline.from_packets:
        video.timeline = timeline_by_decoding(video)


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) of a frame's display matrix."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    return (a, b, c, d)


def _first_frame(video: Video) -> Any:
    """Decode the first frame, for what the header lacks: the real size and pixel format, and the display matrix."""
    for frame in decode_frames(video, time.monotonic() + TIME_LIMIT):
        return frame
    raise UserError(f"no frame in it decodes (codec {video.decoder.name})")


def _demux(video: Video) -> Timeline:
    """The timeline from the packets; what else they tell goes into `video`."""
    stream = video.stream
    shown: list[tuple[int, int, bool]] = []  # stamp, duration, key frame; in the order of decoding
    joined = JoinedStamps(stream.time_base, video.container.format.name in DISCONTINUOUS)
    timed, open_groups, num_packets, num_keys = True, False, 0, 0
    try:
        for packet in video.container.demux(stream):
            if packet.size == 0:
                continue  # flushes the decoder at the end
            num_packets += 1
            if num_packets > MAX_PACKETS:
                raise UserError(f"over {MAX_PACKETS:,} frames, the limit")
            if num_packets == 1:
                video.first_packet = packet.dts, packet.size
            mend_stamps(packet, joined, video.decoding_stamps)
            hidden = stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10
            if packet.is_keyframe and num_keys == 0 and begins_grey(stream):
                video.num_grey, shown, timed = num_packets - 1, [], True
            num_keys += packet.is_keyframe
            if packet.is_discard or packet.is_corrupt or hidden:
                video.skips_packets = True
                continue
            if packet.pts is None:
                timed = False
                continue
            shown.append((packet.pts, packet.duration or 0, packet.is_keyframe))
            open_groups = open_groups or (packet.is_keyframe and not starts_afresh(video, packet))
    except pyav().error.FFmpegError:
        pass  # truncated: the packets before count
    announced = stream.frames
    if announced and num_packets < MIN_PRESENT * announced:
        raise UserError(f"truncated: it holds {num_packets} of the {announced} frames that it announces")
    if not num_packets:
        raise UserError("its video stream holds no frame")
    video.is_joined = joined.num_parts > 1
    stamps = [pts for pts, _, _ in shown]
    equal = len(set(stamps)) < len(stamps)
    reordered = video.decoding_stamps and stream.codec_context.has_b_frames
    if not timed or not shown or equal or video.is_joined or reordered:
        return Timeline(np.zeros(1, np.int64), 0, stream.time_base, from_packets=False)
    order = sorted(range(len(shown)), key=stamps.__getitem__)
    timeline = _timeline([stamps[i] for i in order], shown[order[-1]][1], stream)
    timeline.keys = tuple(rank for rank, i in enumerate(order) if shown[i][2])
    timeline.open_groups = open_groups
    last_key = None
    for pts, _, is_key in shown:
        timeline.open_groups |= last_key is not None and pts < last_key
        last_key = pts if is_key else last_key
    return timeline


def _timeline(stamps: list[int], last_duration: int, stream: Any) -> Timeline:
    """Ascending timestamps -> timeline. A last frame without a duration gets the median one."""
    if last_duration <= 0:
        last_duration = median_step(stamps) or _frame_step(stream)
    ticks = np.array(stamps, dtype=np.int64) - stamps[0]
    return Timeline(ticks, int(ticks[-1]) + last_duration, stream.time_base, origin=stamps[0])


def _frame_step(stream: Any) -> int:
    """Ticks of a frame by the stream's average rate; 0 if it states none."""
    return round(1 / (stream.average_rate * stream.time_base)) if stream.average_rate else 0


def timeline_by_decoding(video: Video, time_limit: float = 600.0) -> Timeline:
    """The timeline from decoding the whole file, for packets without times or with wrong ones."""
    stamps: list[int | None] = []
    durations: list[int] = []
    for frame in decode_frames(video, time.monotonic() + time_limit):
        stamps.append(frame.pts)
        durations.append(frame.duration or 0)
    if not stamps:
        raise UserError("no frame in it decodes")
    timeline = _timeline(display_stamps(stamps, durations, _frame_step(video.stream)), durations[-1], video.stream)
    timeline.keys, timeline.from_packets = (0,), False
    return timeline
