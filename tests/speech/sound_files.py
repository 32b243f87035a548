"""Sound files for tests, encoded by libsndfile and FFmpeg, and what FFmpeg's own decoder makes of them."""

import io
from dataclasses import dataclass, field

import av
import numpy as np
import soundfile


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    """[samples] at half of full scale"""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def sound_file(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """A file written by libsndfile. samples: [samples] or [samples, channels]"""
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=subtype)
    return out.getvalue()


@dataclass(frozen=True)
class Kind:
    """A container and a codec, with what an encoder takes.

    Attributes:
        rates: that the codec knows.
        channels: at most.
        stream: raw frames or packets that FFmpeg reads on through a joint; else each joined file is one of its own.
        sized: the container says how many bytes it has.
        options, codec_options: for the muxer and the encoder.
    """

    container: str
    codec: str
    rates: tuple[int, ...] = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000)
    channels: int = 2
    stream: bool = False
    sized: bool = True
    options: dict[str, str] = field(default_factory=dict)
    codec_options: dict[str, str] = field(default_factory=dict)


VBR = {"flags": "+qscale", "global_quality": "472"}
NO_XING = {"write_xing": "0"}
OPUS = (8_000, 16_000, 48_000)
ODD = (8_000, 11_127, 16_000, 44_100)
KINDS = {
    "wav": Kind("wav", "pcm_s16le", ODD, 6),
    "wav u8": Kind("wav", "pcm_u8"),
    "wav s24": Kind("wav", "pcm_s24le"),
    "wav float": Kind("wav", "pcm_f32le", ODD, 6),
    "wav double": Kind("wav", "pcm_f64le"),
    "wav adpcm": Kind("wav", "adpcm_ms"),
    "rf64": Kind("wav", "pcm_s16le", options={"rf64": "always"}),
    "w64": Kind("w64", "pcm_s16le"),
    "caf": Kind("caf", "pcm_s16le"),
    "aiff": Kind("aiff", "pcm_s16be"),
    "au": Kind("au", "pcm_s16be"),
    "mp4 aac": Kind("mp4", "aac"),
    "mp4 alac": Kind("ipod", "alac"),
    "mp4 fragments": Kind(
        "mp4", "aac", sized=False, options={"movflags": "frag_keyframe+empty_moov", "frag_duration": "300000"}
    ),
    "mov": Kind("mov", "pcm_s16le"),
    "matroska aac": Kind("matroska", "aac"),
    "matroska flac": Kind("matroska", "flac"),
    "webm opus": Kind("webm", "libopus", OPUS),
    "avi": Kind("avi", "pcm_s16le"),
    "flv": Kind("flv", "aac", (11_025, 22_050, 44_100), sized=False),
    "ogg opus": Kind("ogg", "libopus", OPUS),
    "ogg flac": Kind("ogg", "flac"),
    "ogg vorbis": Kind("OGG", "VORBIS"),  # by libsndfile, as the next
    "ogg opus of libsndfile": Kind("OGG", "OPUS", OPUS),
    "flac": Kind("flac", "flac", channels=6),
    "tta": Kind("tta", "tta"),
    "amr": Kind("amr", "libopencore_amrnb", (8_000, 8_000), 1, sized=False),
    "mp3 cbr": Kind("mp3", "libmp3lame", stream=True),
    "mp3 vbr": Kind("mp3", "libmp3lame", stream=True, codec_options=VBR),
    "mp3 cbr, no Xing": Kind("mp3", "libmp3lame", stream=True, sized=False, options=NO_XING),
    "mp3 vbr, no Xing": Kind("mp3", "libmp3lame", stream=True, sized=False, options=NO_XING, codec_options=VBR),
    "mp2": Kind("mp2", "mp2", (16_000, 22_050, 44_100, 48_000), stream=True, sized=False),
    "aac": Kind("adts", "aac", channels=6, stream=True, sized=False),
    "aac in latm": Kind("latm", "aac", stream=True, sized=False),
    "ac3": Kind("ac3", "ac3", (32_000, 44_100, 48_000), 6, stream=True, sized=False),
    "mpeg-ts aac": Kind("mpegts", "aac", (44_100, 48_000), stream=True, sized=False),
    "mpeg-ts mp2": Kind("mpegts", "mp2", (44_100, 48_000), stream=True, sized=False),
}
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def encoded(samples: np.ndarray, rate: int, kind: Kind) -> bytes:
    """A file of `kind`. samples: [samples] or [channels, samples]"""
    samples = np.atleast_2d(samples).astype(np.float32)
    if kind.container == "OGG":
        return sound_file(samples.T, rate, kind.container, kind.codec)
    out, layout = io.BytesIO(), LAYOUTS[len(samples)]
    with av.open(out, "w", format=kind.container, options=kind.options) as file:
        stream = file.add_stream(kind.codec, rate=rate, layout=layout, options=kind.codec_options)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", layout)
        frame.rate, frame.pts = rate, 0
        resampler = av.AudioResampler(stream.format, stream.layout, stream.rate, stream.frame_size or None)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return out.getvalue()


def decoded(data: bytes) -> list[tuple[int, np.ndarray]]:
    """What FFmpeg decodes: (rate, float64 [channels, samples]) for each frame; broken packets are skipped."""
    frames = []
    with av.open(io.BytesIO(data)) as file:
        packets = file.demux(file.streams.audio[0])
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return frames
                for frame in packet.decode():
                    to_double = av.AudioResampler("dblp", frame.layout, frame.sample_rate)
                    for piece in [*to_double.resample(frame), *to_double.resample(None)]:
                        frames.append((frame.sample_rate, piece.to_ndarray()))
            except av.error.FFmpegError:
                continue


def seconds_of(frames: list[tuple[int, np.ndarray]]) -> float:
    return sum(samples.shape[1] / rate for rate, samples in frames)
