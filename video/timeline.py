"""The timeline of a video file: when each frame is shown, from its packets, without decoding them.

All times come from here. Readers are given the frames to decode and do not report times.
"""

import io
import time
from bisect import bisect_right
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from foundation.errors import UserError
from foundation.extras import import_extra
from foundation.media import open_media

MAX_PIXELS = 2**25  # per frame; 8K (7680 x 4320) is just below
MAX_SECONDS = 3600.0
TIME_LIMIT = 120.0  # seconds for one reader and one clip
MAX_PACKETS = 2**20  # an hour at 240 frames per second has 864,000
MIN_PRESENT = (
    0.5  # of the frames that a container announces; its count may be off by a few, a truncated file lacks many
)
SEEK_FRAMES = 12  # a seek costs about as much as decoding this many frames


class Undecodable(Exception):
    """The decoder does not give the frame of a packet."""


@dataclass
class Timeline:
    """Times of the frames in presentation order.

    Attributes:
        ticks: int64 [N], when each frame is shown; 0 for the first.
        duration: ticks from the first frame's start to the last frame's end.
        time_base: seconds per tick.
        origin: the stream's timestamp of the first frame, in ticks.
        keys: ascending indices of the key frames.
        from_packets: whether timestamps and key frames come from the packets.
        open_groups: whether some frames are decoded after a key frame and shown before it (open GOP).
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


@dataclass
class Video:
    """An open file.

    Attributes:
        container, stream: PyAV's.
        width, height, pixel_format: of a decoded frame, before the display matrix is applied.
        matrix: (a, b, c, d) of the display matrix.
        skips_packets: whether the timeline leaves out packets that another reader might count as frames.
    """

    container: Any
    stream: Any
    timeline: Timeline
    width: int
    height: int
    pixel_format: str
    matrix: tuple[int, int, int, int] = (1, 0, 0, 1)
    skips_packets: bool = False

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """Apply the display matrix (x' = a x + c y, y' = b x + d y) to frames [F, H, W, 3]: rotate and mirror them."""
        a, b, c, d = self.matrix
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(1, 2), c, b
        pixels = pixels[:, :, ::-1] if a < 0 else pixels
        pixels = pixels[:, ::-1] if d < 0 else pixels
        return np.ascontiguousarray(pixels)


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


def pyav() -> ModuleType:
    """The module of PyAV, an optional extra."""
    return import_extra("av", "video", "video")


@contextmanager
def open_video(source: str | Path | bytes, max_pixels: int, max_seconds: float) -> Iterator[Video]:
    """Open a file with PyAV, check the limits, find its timeline, and decode its first frame.

    Raises:
        UserError: the file is not a video, is broken, or is over a limit; the message does not name the file.
    """
    av = pyav()
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        if not file.read(1):
            raise UserError("the file is empty (0 bytes)")
        file.seek(0)
        with open_media(file, "video") as container:
            yield _probe(av, container, max_pixels, max_seconds)


def _probe(av: ModuleType, container: Any, max_pixels: int, max_seconds: float) -> Video:
    """The main video stream of an open container, as a `Video`."""
    streams = [stream for stream in container.streams.video if not _is_cover(av, stream)]
    if not streams:
        raise UserError("no video stream" + (" (sound only)" if container.streams.audio else ""))
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise UserError("its codec is not supported")
    stream.codec_context.thread_count = 1  # data loaders run one process per core
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > max_pixels:
        raise UserError(f"{width} x {height} = {width * height:,} pixels per frame, over the limit of {max_pixels:,}")
    seconds = (container.duration or 0) / av.time_base
    if seconds > max_seconds:
        raise UserError(f"{seconds:,.0f} seconds long, over the limit of {max_seconds:,.0f}; cut it")
    timeline, skips = _demux(av, container, stream)
    first = _first_frame(av, container, stream)
    if first.width * first.height > max_pixels:
        raise UserError(f"{first.width} x {first.height} pixels per frame, over the limit of {max_pixels:,}")
    video = Video(container, stream, timeline, first.width, first.height, first.format.name, _matrix(first), skips)
    if not timeline.from_packets:
        video.timeline = timeline_by_decoding(video)
    return video


def _is_cover(av: ModuleType, stream: Any) -> bool:
    """Whether a stream is a cover image."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) of a frame's display matrix."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    return (a, b, c, d)


def _first_frame(av: ModuleType, container: Any, stream: Any) -> Any:
    """Decode the first frame, for what the header lacks: the real size and pixel format, and the display matrix."""
    rewind(av, container, stream)
    try:
        for frame in container.decode(stream):
            return frame
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(f"its first frame does not decode ({stream.codec_context.name}: {error})") from None
    raise UserError("no frame in it decodes")


def rewind(av: ModuleType, container: Any, stream: Any) -> None:
    """Seek to the first packet."""
    start = stream.start_time
    try:
        container.seek(min(0, start or 0) if start is not None else 0, stream=stream)
    except av.error.FFmpegError as error:
        raise UserError(
            f"a raw stream without times (0 frames per second), which cannot be rewound ({error.strerror}); "
            "put it into a container such as MP4 or Matroska"
        ) from None


def _demux(av: ModuleType, container: Any, stream: Any) -> tuple[Timeline, bool]:
    """The timeline from the packets, and whether it leaves out packets that another reader might count as frames."""
    shown: list[tuple[int, int, bool]] = []  # timestamp, duration, key frame; in the order of decoding
    timed, skips, num_packets = True, False, 0
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue  # flushes the decoder at the end
            num_packets += 1
            if num_packets > MAX_PACKETS:
                raise UserError(f"over {MAX_PACKETS:,} frames, the limit")
            hidden = stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10
            if packet.is_discard or packet.is_corrupt or hidden:
                skips = True
                continue
            if packet.pts is None:
                timed = False
                continue
            shown.append((packet.pts, packet.duration or 0, packet.is_keyframe))
    except av.error.FFmpegError:
        pass  # truncated: the packets before count
    announced = stream.frames
    if announced and num_packets < MIN_PRESENT * announced:
        raise UserError(f"truncated: it holds {num_packets} of the {announced} frames that it announces")
    if not num_packets:
        raise UserError("its video stream holds no frame")
    stamps = [pts for pts, _, _ in shown]
    if not timed or not shown or len(set(stamps)) < len(stamps):
        return Timeline(np.zeros(1, np.int64), 0, stream.time_base, from_packets=False), skips
    order = sorted(range(len(shown)), key=stamps.__getitem__)
    timeline = _timeline([stamps[i] for i in order], shown[order[-1]][1], stream)
    timeline.keys = tuple(rank for rank, i in enumerate(order) if shown[i][2])
    last_key = None
    for pts, _, is_key in shown:
        timeline.open_groups |= last_key is not None and pts < last_key
        last_key = pts if is_key else last_key
    return timeline, skips


def _timeline(stamps: list[int], last_duration: int, stream: Any) -> Timeline:
    """Ascending timestamps -> timeline. A last frame without a duration gets the median one."""
    if last_duration <= 0 and len(stamps) > 1:
        last_duration = int(np.median(np.diff(stamps)))
    if last_duration <= 0 and stream.average_rate:
        last_duration = round(1 / (stream.average_rate * stream.time_base))
    ticks = np.array(stamps, dtype=np.int64) - stamps[0]
    return Timeline(ticks, int(ticks[-1]) + last_duration, stream.time_base, origin=stamps[0])


def timeline_by_decoding(video: Video, time_limit: float = 600.0) -> Timeline:
    """The timeline from decoding the whole file, for packets without times or with wrong ones."""
    av, stream = pyav(), video.stream
    stamps: list[int | None] = []
    duration, deadline = 0, time.monotonic() + time_limit
    for frame in decode_frames(av, video, deadline):
        stamps.append(frame.pts)
        duration = frame.duration or 0
    if not stamps:
        raise UserError("no frame in it decodes")
    timed = [stamp for stamp in stamps if stamp is not None]
    if len(timed) < len(stamps) or any(b <= a for a, b in pairwise(timed)):
        raise UserError("0 frames per second: its frames have no times")
    timeline = _timeline(timed, duration, stream)
    timeline.keys, timeline.from_packets = (0,), False
    return timeline


def decode_frames(
    av: ModuleType, video: Video, deadline: float, start: int | None = None
) -> Generator[Any, None, None]:
    """Decode frames from the first one, or from the key frame with timestamp `start`; broken packets are skipped.

    Raises:
        UserError: `deadline`, a value of `time.monotonic`, has passed.
    """
    if start is None:
        rewind(av, video.container, video.stream)
    else:
        video.container.seek(start, stream=video.stream)
    try:
        for packet in video.container.demux(video.stream):
            if time.monotonic() > deadline:
                raise UserError("decoding takes longer than the time limit")
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                continue
    except av.error.FFmpegError:
        return  # truncated
