"""When each frame of a video file is shown, found by reading its packets without decoding them.

The one place that times come from: readers are told which frames to decode and never asked when those are shown.
"""

import io
import time
from bisect import bisect_right
from collections.abc import Iterator
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

MAX_PIXELS = 2**25  # of a frame; 8K (7680 x 4320) is just below
MAX_SECONDS = 3600.0
TIME_LIMIT = 120.0  # seconds that one reader may take over one clip
MAX_PACKETS = 2**20  # an hour at 240 frames per second has 864,000
MIN_PRESENT = 0.5  # of the frames that a container announces; it may be out by a few, a file cut off by many
SEEK_FRAMES = 12  # a seek costs about as much as decoding this many frames

# Containers of video, and of sound so that such a file is refused for what it is. Others are not opened: playlists and
# the like make the demuxer open further files, and text and pictures would be taken for films.
_CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,obu,flv,asf,ogg,mxf,nut,dv,rm,mjpeg,"
    "wav,mp3,flac,aac,aiff,amr"
)


class Undecodable(Exception):
    """A packet whose frame does not come out of the decoder."""


@dataclass
class Timeline:
    """Frames in the order of showing.

    Attributes:
        ticks: int64 [N], when each is shown, from 0 for the first.
        duration: ticks until the last one ends.
        time_base: seconds of a tick.
        origin: the stream's own timestamp of the first frame, in ticks.
        keys: ascending indices of the frames from which decoding can start.
        from_packets: whether timestamps and key frames are those of the packets.
        open_groups: whether some frames are decoded after a key frame and shown before it.
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
        return self.duration * float(self.time_base)


@dataclass
class Video:
    """An open file: `container` and `stream` are PyAV's; sizes are as coded, before the frame is turned upright."""

    container: Any
    stream: Any
    timeline: Timeline
    width: int
    height: int
    pixel_format: str
    matrix: tuple[int, int, int, int] = (1, 0, 0, 1)
    skips_packets: bool = False

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """[F, H, W, 3] turned and mirrored as the display matrix says: x' = a x + c y, y' = b x + d y."""
        a, b, c, d = self.matrix
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(1, 2), c, b
        pixels = pixels[:, :, ::-1] if a < 0 else pixels
        pixels = pixels[:, ::-1] if d < 0 else pixels
        return np.ascontiguousarray(pixels)


def hops(indices: np.ndarray, keys: tuple[int, ...]) -> list[int | None]:
    """For each frame to be decoded, in order: the key frame to seek to first, or None where going on is cheaper.

    Seeking pays where it leaves out more frames than it costs, so samples close to one another against the distance of
    the key frames are decoded in one go.
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
    """Opens a file with PyAV, checks it against the limits and finds its timeline and its first frame.

    Raises:
        UserError: what is wrong with it, without the file's name.
    """
    av = pyav()
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        if not file.read(1):
            raise UserError("the file is empty (0 bytes)")
        file.seek(0)
        try:
            container = av.open(file, options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"})
        except av.error.FFmpegError as error:
            raise UserError(f"not a video, or one cut off or broken at its start ({error.strerror})") from None
        with container:
            yield _probe(av, container, max_pixels, max_seconds)


def _probe(av: ModuleType, container: Any, max_pixels: int, max_seconds: float) -> Video:
    streams = [stream for stream in container.streams.video if not _is_cover(av, stream)]
    if not streams:
        raise UserError("no video stream" + (" (sound only)" if container.streams.audio else ""))
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise UserError("its codec is not supported")
    stream.codec_context.thread_count = 1  # loaders run one process per core
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > max_pixels:
        raise UserError(f"{width} x {height} = {width * height:,} pixels a frame, over the limit of {max_pixels:,}")
    seconds = (container.duration or 0) / av.time_base
    if seconds > max_seconds:
        raise UserError(f"{seconds:,.0f} seconds long, over the limit of {max_seconds:,.0f}; cut it")
    timeline, skips = _demux(av, container, stream)
    first = _first_frame(av, container, stream)
    if first.width * first.height > max_pixels:
        raise UserError(f"{first.width} x {first.height} pixels a frame, over the limit of {max_pixels:,}")
    video = Video(container, stream, timeline, first.width, first.height, first.format.name, _matrix(first), skips)
    if not timeline.from_packets:
        video.timeline = timeline_by_decoding(video)
    return video


def _is_cover(av: ModuleType, stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    return (a, b, c, d)


def _first_frame(av: ModuleType, container: Any, stream: Any) -> Any:
    """Tells what the header does not: the true size and format, the display matrix, and that something decodes."""
    rewind(av, container, stream)
    try:
        for frame in container.decode(stream):
            return frame
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(f"its first frame does not decode ({stream.codec_context.name}: {error})") from None
    raise UserError("no frame in it decodes")


def rewind(av: ModuleType, container: Any, stream: Any) -> None:
    """Back to the first packet."""
    start = stream.start_time
    try:
        container.seek(min(0, start or 0) if start is not None else 0, stream=stream)
    except av.error.FFmpegError as error:
        raise UserError(
            f"a bare stream, with no times (0 frames per second) and no way back to its start ({error.strerror}); "
            "put it into a container such as MP4 or Matroska"
        ) from None


def _demux(av: ModuleType, container: Any, stream: Any) -> tuple[Timeline, bool]:
    """The timeline by packets, and whether packets were left out that another reader might count."""
    shown: list[tuple[int, int, bool]] = []  # timestamp, duration, key frame; in the order of decoding
    timed, skips, packets = True, False, 0
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue  # the end
            packets += 1
            if packets > MAX_PACKETS:
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
        pass  # cut off: what came before it counts
    announced = stream.frames
    if announced and packets < MIN_PRESENT * announced:
        raise UserError(f"cut off: holds {packets} of the {announced} frames that it announces")
    if not packets:
        raise UserError("its video stream holds no frame")
    stamps = [pts for pts, _, _ in shown]
    if not timed or not shown or len(set(stamps)) < len(stamps):
        return Timeline(np.zeros(1, np.int64), 0, stream.time_base, from_packets=False), skips
    order = sorted(range(len(shown)), key=stamps.__getitem__)
    timeline = _timeline([stamps[i] for i in order], shown[order[-1]][1], stream)
    timeline.keys = tuple(rank for rank, i in enumerate(order) if shown[i][2])
    latest = None
    for pts, _, key in shown:
        timeline.open_groups |= latest is not None and pts < latest
        latest = pts if key else latest
    return timeline, skips


def _timeline(stamps: list[int], last: int, stream: Any) -> Timeline:
    """Ascending timestamps -> timeline; a last frame without a duration stays as long as frames do in the middle."""
    if last <= 0 and len(stamps) > 1:
        last = int(np.median(np.diff(stamps)))
    if last <= 0 and stream.average_rate:
        last = round(1 / (stream.average_rate * stream.time_base))
    ticks = np.array(stamps, dtype=np.int64) - stamps[0]
    return Timeline(ticks, int(ticks[-1]) + last, stream.time_base, origin=stamps[0])


def timeline_by_decoding(video: Video, time_limit: float = 600.0) -> Timeline:
    """The timeline of the frames that come out when everything is decoded: where packets carry no times, or lie."""
    av, stream = pyav(), video.stream
    stamps: list[int | None] = []
    duration, deadline = 0, time.monotonic() + time_limit
    for frame in decoded(av, video, deadline):
        stamps.append(frame.pts)
        duration = frame.duration or 0
    if not stamps:
        raise UserError("no frame in it decodes")
    if any(stamp is None for stamp in stamps) or any(b <= a for a, b in pairwise(stamps)):
        raise UserError("0 frames per second: its frames have no times")
    timeline = _timeline(stamps, duration, stream)
    timeline.keys, timeline.from_packets = (0,), False
    return timeline


def decoded(av: ModuleType, video: Video, deadline: float, start: int | None = None) -> Iterator[Any]:
    """Frames from the first one, or from the key frame with the timestamp `start`; broken packets are left out."""
    if start is None:
        rewind(av, video.container, video.stream)
    else:
        video.container.seek(start, stream=video.stream)
    try:
        for packet in video.container.demux(video.stream):
            if time.monotonic() > deadline:
                raise UserError("takes longer to decode than the time limit")
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                continue
    except av.error.FFmpegError:
        return  # cut off
