"""Reading sound files: formats, rates, and errors."""

import io
import struct
import sys

import av
import numpy as np
import pytest
import soundfile
import torch

from speech import reading
from speech.reading import read_sound


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def sound_file(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=subtype)
    return out.getvalue()


def movie(
    container: str = "mp4", codec: str | None = "aac", rate: int = 44_100, seconds: float = 1.0, video: bool = True
) -> bytes:
    """A clip of grey frames at 10 per second, and a tone of 440 Hz."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        if video:
            pictures = file.add_stream("mpeg4" if container == "mp4" else "libvpx", rate=10)
            pictures.width = pictures.height = 32
            pictures.pix_fmt = "yuv420p"
        if codec:
            sound = file.add_stream(codec, rate=rate, layout="mono")
        for _ in range(int(10 * seconds) if video else 0):
            grey = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")
            file.mux(pictures.encode(grey))
        if video:
            file.mux(pictures.encode(None))
        if codec:
            frame = av.AudioFrame.from_ndarray(tone(rate, seconds)[None].astype(np.float32), "fltp", "mono")
            frame.rate, frame.pts = rate, 0
            resampler = av.AudioResampler(sound.format, sound.layout, sound.rate, sound.frame_size or None)
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                file.mux(sound.encode(piece))
            file.mux(sound.encode(None))
    return out.getvalue()


def assert_is_the_tone(samples: torch.Tensor, seconds: float = 1.0, slack: float = 0.0, atol: float = 0.02) -> None:
    """440 Hz at half of full scale, `seconds` long; lossy coders may add up to `slack` seconds and shift the phase."""
    assert samples.dtype is torch.float32 and samples.dim() == 1
    assert seconds * 16_000 <= len(samples) <= (seconds + slack) * 16_000 + 1
    middle = samples[4000:12_000]
    time = torch.arange(len(middle)) / 16_000 * 2 * torch.pi * 440
    basis = torch.stack([time.sin(), time.cos()], 1)
    fit = torch.linalg.lstsq(basis, middle[:, None]).solution
    assert float(fit.norm()) == pytest.approx(0.5, abs=atol)
    assert float((middle - (basis @ fit)[:, 0]).abs().max()) < atol


@pytest.mark.parametrize("rate", [8_000, 11_025, 11_127, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_every_rate_becomes_16_khz(rate):
    assert_is_the_tone(read_sound(sound_file(tone(rate), rate)))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_every_sample_format_is_read(subtype):
    assert_is_the_tone(read_sound(sound_file(tone(16_000), subtype=subtype)))


def test_channels_are_averaged():
    left = tone(16_000)
    assert_is_the_tone(read_sound(sound_file(np.stack([2 * left * 0.9, 2 * left * 0.1, left], 1))))


@pytest.mark.parametrize(
    ("kind", "subtype", "slack"),
    [
        ("FLAC", None, 0),
        ("FLAC", "PCM_24", 0),
        ("OGG", "VORBIS", 0),
        ("OGG", "OPUS", 0.1),
        ("MP3", None, 0.2),
        ("AIFF", None, 0),
        ("AU", None, 0),
        ("RF64", None, 0),
    ],
)
def test_every_file_format_is_read(kind, subtype, slack, tmp_path):
    data = sound_file(tone(16_000), 16_000, kind, subtype)
    assert_is_the_tone(read_sound(data), slack=slack, atol=0.05)
    (tmp_path / "sound").write_bytes(data)
    assert torch.equal(read_sound(tmp_path / "sound"), read_sound(data))


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [("mp4", "aac", 44_100), ("webm", "libopus", 48_000), ("matroska", "pcm_s16le", 22_050)],
)
def test_the_sound_of_videos_is_read(container, codec, rate):
    assert_is_the_tone(read_sound(movie(container, codec, rate)), slack=0.15, atol=0.05)


def test_g722_is_known_by_its_suffix(tmp_path):
    data = movie("g722", "g722", 16_000, video=False)
    (tmp_path / "hello.g722").write_bytes(data)
    samples = read_sound(tmp_path / "hello.g722")
    assert_is_the_tone(samples, slack=0.01, atol=0.05)
    assert torch.equal(samples, read_sound(data, raw_format="g722"))


def test_silence_and_clipped_sound_are_read():
    assert not read_sound(sound_file(np.zeros(1000))).any()
    clipped = np.clip(4 * tone(16_000), -1, 1)
    assert float(read_sound(sound_file(clipped, subtype="FLOAT")).abs().max()) == 1.0


@pytest.mark.parametrize("kind", ["WAV", "AU"])
def test_no_samples_are_an_error(kind):
    with pytest.raises(ValueError, match="sound: holds no samples"):
        read_sound(sound_file(np.zeros(0), kind=kind))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_an_error(value, tmp_path):
    samples = tone(16_000)
    samples[[3, 700]] = value
    (tmp_path / "broken.wav").write_bytes(sound_file(samples, subtype="FLOAT"))
    with pytest.raises(ValueError, match=r"broken\.wav: 2 samples are not finite numbers"):
        read_sound(tmp_path / "broken.wav")


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "mp4", "webm"])
def test_truncated_files_are_an_error_unless_allowed(kind):
    if kind in ("mp4", "webm"):
        data = movie(kind, "aac" if kind == "mp4" else "libopus", 48_000, seconds=3)
    else:
        noise = 0.3 * np.random.default_rng(0).standard_normal(48_000)
        data = sound_file(noise, kind=kind)
    read_sound(data)
    for share in (0.95, 0.6) if kind != "webm" else (0.6,):
        if kind in ("MP3", "mp4") and share == 0.95:
            continue  # less than a quarter of a second is within what coders add
        truncated = data[: int(share * len(data))]
        with pytest.raises(ValueError, match="truncated"):
            read_sound(truncated)
        if kind in ("WAV", "MP3", "webm"):  # the other decoders fail on a truncated file
            samples = read_sound(truncated, allow_truncated=True)
            assert len(samples) == pytest.approx(share * 48_000, abs=8_000)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_int16_samples_are_those_of_the_file_or_resampled(rate):
    samples = read_sound(sound_file(np.stack([tone(rate)] * 2, 1), rate, subtype="PCM_16"), dtype=torch.int16)
    assert samples.dtype is torch.int16
    assert_is_the_tone(samples.float() / 32_768, atol=0.05)
    stored = (0.5 * np.random.default_rng(0).standard_normal(1000) * 8_000).astype(np.int16)
    assert np.array_equal(read_sound(sound_file(stored), dtype=torch.int16).numpy(), stored)


def test_a_wav_from_a_pipe_is_read_though_its_length_is_unknown():
    data = bytearray(sound_file(tone(16_000)))
    offset = data.index(b"data") + 4
    data[offset : offset + 4] = data[4:8] = struct.pack("<I", 0xFFFFFFFF)
    assert_is_the_tone(read_sound(bytes(data)))


def test_a_video_without_sound_is_an_error(tmp_path):
    (tmp_path / "silent.mp4").write_bytes(movie(codec=None))
    with pytest.raises(ValueError, match=r"silent\.mp4: is a video or picture without sound"):
        read_sound(tmp_path / "silent.mp4")


@pytest.mark.parametrize("data", [b"x", b"hello, this is text" * 50, b"RIFF\0\0\0\0WAVE", b"fLaC\0\0", b"OggS", b"ID3"])
def test_other_files_are_errors(data):
    with pytest.raises(ValueError, match=r"^sound: "):
        read_sound(data)


def test_paths_that_are_not_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_sound(tmp_path / "absent.wav")
    with pytest.raises(ValueError, match="is a folder"):
        read_sound(tmp_path)
    (tmp_path / "empty.wav").touch()
    with pytest.raises(ValueError, match=r"empty\.wav: the file is empty"):
        read_sound(tmp_path / "empty.wav")


def test_longer_sounds_than_the_limit_are_errors():
    """The header alone decides where it has the length; both decoders hold a smaller limit."""
    data = sound_file(np.zeros(7201 * 100, np.float32), 100, "FLAC", "PCM_16")
    with pytest.raises(ValueError, match=r"7,201 s .*limit of 7,200 s; cut it into parts"):
        read_sound(data)
    for short in (sound_file(tone(16_000)), movie()):
        with pytest.raises(ValueError, match=r"over the limit of 0 s"):
            read_sound(short, max_seconds=0.4)


def test_rates_outside_the_limits_are_errors():
    with pytest.raises(ValueError, match=r"100 samples per second .*1,000 to 768,000 Hz"):
        read_sound(sound_file(np.zeros(500), 100, "FLAC"))


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match=r"needs the package soundfile: pip install 'mm-adapters\[speech\]'"):
        read_sound(sound_file(tone(16_000)))


def test_resampling_an_odd_rate_keeps_the_duration():
    samples = torch.from_numpy(tone(11_127, 20.0).astype(np.float32))
    assert len(reading.resample(samples, 11_127)) == pytest.approx(20 * 16_000, abs=3)
