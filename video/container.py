"""An open film: its packets from the first one or from a key frame, with stamps that count, and its decoded frames."""

import re
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from foundation.errors import UserError
from foundation.extras import import_extra
from foundation.media import open_media
from video.stamps import JoinedStamps

if TYPE_CHECKING:
    from video.timeline import Timeline

# Containers that store when a frame is shown. The others (AVI, ASF, ...) store the order of decoding, and FFmpeg
# guesses the rest: wrongly for the codecs of _ANY_ORDER.
_STORES_DISPLAY = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "mpeg", "flv", "live_flv", "nut", "ogg", "mxf")
_ANY_ORDER = ("h264", "hevc", "vvc")
DISCONTINUOUS = ("mpegts", "mpeg")  # containers in which a long jump of the stamps is no pause
# Decoders that begin with grey pictures where the film is cut off before its first key frame; others wait for that.
_GREY_START = ("mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "h263", "flv", "wmv1", "wmv2", "rv10", "rv20")
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave out the alpha channel


class Undecodable(Exception):
    """The decoder does not give the frame of a packet."""


def pyav() -> ModuleType:
    """The module of PyAV, an optional extra."""
    return import_extra("av", "video", "video")


@dataclass
class Video:
    """An open file.

    Attributes:
        file: from which the container reads.
        container, stream, decoder: PyAV's.
        width, height, pixel_format: of a decoded frame.
        shown_width: the width in square pixels.
        matrix: (a, b, c, d) of the display matrix.
        has_alpha: whether transparent parts are to be drawn over white.
        interlaced: whether the first frame consists of two fields.
        decoding_stamps: whether the packets' stamps of display are FFmpeg's guess, and only those of decoding count.
        is_joined: whether the stamps begin again somewhere.
        skips_packets: whether the timeline leaves out packets that another reader might count as frames.
        first_packet: stamp of decoding and size of the stream's first packet.
        num_grey: packets before the first key frame that would give grey pictures.
    """

    file: BinaryIO
    container: Any
    stream: Any
    decoder: Any
    timeline: "Timeline" = field(init=False)  # `open_video` finds it
    width: int = 0
    height: int = 0
    pixel_format: str = ""
    shown_width: int = 0
    matrix: tuple[int, int, int, int] = (1, 0, 0, 1)
    has_alpha: bool = False
    interlaced: bool = False
    decoding_stamps: bool = False
    is_joined: bool = False
    skips_packets: bool = False
    first_packet: tuple[int | None, int] | None = None
    num_grey: int = 0

    @classmethod
    def of(cls, file: BinaryIO) -> "Video":
        """Open the container that starts at the file's beginning, and choose its video stream."""
        container = open_media(file, "video")
        try:
            stream = _choose_stream(container)
            return cls(file, container, stream, _decoder(stream))
        except BaseException:
            container.close()
            raise

    def reopen(self) -> None:
        """Start again at the beginning, for containers in which a seek does not lead there."""
        index = self.stream.index
        self.container.close()
        self.file.seek(0)
        self.container = open_media(self.file, "video")
        self.stream = self.container.streams[index]
        self.decoder = _decoder(self.stream)


def _choose_stream(container: Any) -> Any:
    """The main video stream of an open container."""
    av = pyav()
    streams = [stream for stream in container.streams.video if not _is_cover(av, stream)]
    if not streams:
        raise UserError("no video stream" + (" (sound only)" if container.streams.audio else ""))
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise UserError("its codec is not supported")
    return stream


def _decoder(stream: Any) -> Any:
    """The stream's decoder; for WebM with an alpha channel, one that decodes it."""
    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in _ALPHA_DECODERS:
        decoder = pyav().CodecContext.create(_ALPHA_DECODERS[decoder.name], "r")
    decoder.thread_count = 1  # data loaders run one process per core
    return decoder


def _is_cover(av: ModuleType, stream: Any) -> bool:
    """Whether a stream is a cover image."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def stores_order_of_decoding(video: Video) -> bool:
    """Whether the packets' only true stamps are those of decoding."""
    if video.stream.codec_context.name not in _ANY_ORDER:
        return False
    # A tag in Matroska is that of AVI: the film was copied from there, with its stamps.
    tag = video.stream.codec_context.codec_tag.strip("\0 ") if video.container.format.name == "matroska,webm" else ""
    return tag != "" or video.container.format.name not in _STORES_DISPLAY


def mend_stamps(packet: Any, joined: JoinedStamps, decoding_stamps: bool) -> None:
    """Change a packet's stamps to those that count. Frames that the decoder reorders keep their packets' stamps."""
    if decoding_stamps:
        packet.pts = packet.dts  # where that is missing, a guess would be taken for the truth
    offset = joined.advance(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe)
    packet.pts = None if packet.pts is None else packet.pts + offset
    packet.dts = None if packet.dts is None else packet.dts + offset


def decode_frames(video: Video, deadline: float, start: int | None = None) -> Generator[Any, None, None]:
    """Decode frames from the first one, or from a key frame; broken packets are skipped.

    The stamps of joined files go on over the joint.

    Args:
        deadline: a value of `time.monotonic`.
        start: the key frame's stamp. If a seek leads past it, no frame comes.

    Raises:
        UserError: the deadline has passed.
    """
    packets = _packets_from_the_first(video) if start is None else _packets_from_key(video, start)
    yield from decode_packets(video, packets, deadline)


def decode_packets(video: Video, packets: Iterator[Any], deadline: float) -> Generator[Any, None, None]:
    """Decode packets of the video's stream, as `decode_frames`."""
    error = pyav().error
    joined = JoinedStamps(video.stream.time_base, video.container.format.name in DISCONTINUOUS)
    mends = video.decoding_stamps or video.is_joined
    try:
        for packet in packets:
            if time.monotonic() > deadline:
                raise UserError("decoding takes longer than the time limit")
            if mends and packet.size:
                mend_stamps(packet, joined, video.decoding_stamps)
            try:
                yield from video.decoder.decode(packet)
            except (error.InvalidDataError, error.PatchWelcomeError):
                continue
    except error.FFmpegError:
        return  # truncated


def _packets_from_the_first(video: Video) -> Iterator[Any]:
    """The packets from the first one, by a seek or, where that leads elsewhere, by opening the file again."""
    # FFmpeg guesses other stamps after a seek.
    packets = None if video.decoding_stamps else _packets_after_rewind(video)
    if packets is None:
        video.reopen()
        packets = video.container.demux(video.stream)
    yield from islice(packets, video.num_grey, None)


def _packets_after_rewind(video: Video) -> Iterator[Any] | None:
    """The packets after a seek to the start; None if the first one is not the file's first."""
    try:
        video.container.seek(min(0, video.stream.start_time or 0), stream=video.stream)
        video.decoder.flush_buffers()
        packets = video.container.demux(video.stream)
        first = next(packets)
    except (pyav().error.FFmpegError, StopIteration):
        return None
    return chain([first], packets) if (first.dts, first.size) == video.first_packet else None


def _packets_from_key(video: Video, start: int) -> Iterator[Any]:
    """The packets from the last key frame up to the stamp `start`; none if the seek leads past it."""
    video.container.seek(start, stream=video.stream)
    video.decoder.flush_buffers()
    packets = video.container.demux(video.stream)
    for packet in packets:
        if packet.size and packet.is_keyframe and not packet.is_discard:
            stamp = packet.dts if video.decoding_stamps else packet.pts
            if stamp is not None and stamp <= start:
                yield packet
                yield from packets
            return


def begins_grey(stream: Any) -> bool:
    """Whether packets before the first key frame give grey pictures."""
    return stream.codec_context.name in _GREY_START


def starts_afresh(video: Video, packet: Any) -> bool:
    """Whether no frame after a key frame's packet refers back over it, as far as the packet tells.

    In H.264, only an IDR picture (a NAL unit of type 5) does that; a recovery point, from which the picture is repaired
    bit by bit, is marked as a key frame too.
    """
    if video.stream.codec_context.name != "h264":
        return True
    data, header = bytes(packet), video.stream.codec_context.extradata
    if not header or header[0] != 1:  # start codes
        return re.search(rb"\x00\x00\x01[\x05\x25\x45\x65]", data) is not None
    length_size, position = (header[4] & 3) + 1, 0
    while position + length_size < len(data):
        if data[position + length_size] & 31 == 5:
            return True
        position += length_size + int.from_bytes(data[position : position + length_size], "big")
    return False
