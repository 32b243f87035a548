"""Reading sound files: formats, rates, and errors."""

import io
import struct
import sys

import av
import numpy as np
import pytest
import torch

from speech import reading
from speech.reading import read_sound
from tests.speech.sound_files import KINDS, encoded, sound_file, tone


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_channels_are_averaged(dtype):
    left = tone(16_000)
    samples = read_sound(sound_file(np.stack([2 * left * 0.9, 2 * left * 0.1, left], 1)), dtype=dtype)
    assert_is_the_tone(samples if dtype is torch.float32 else samples / 32_768)


def test_unrelated_channels_are_averaged():
    channels = np.random.default_rng(0).uniform(-0.9, 0.9, (6, 16_000)).astype(np.float32)
    for count in (2, 6):
        data = encoded(channels[:count], 16_000, KINDS["wav float"])
        assert torch.equal(read_sound(data), torch.from_numpy(channels[:count].mean(axis=0)))
    alone = np.zeros((6, 16_000), np.float32)
    alone[2] = channels[0]  # the centre of a film's sound
    assert torch.allclose(read_sound(encoded(alone, 16_000, KINDS["wav float"])), torch.from_numpy(channels[0] / 6))


def test_eight_channels_that_lie_apart_are_averaged():
    """PyAV gives a frame of theirs a ninth plane, whose address is none."""
    channels = np.random.default_rng(0).uniform(-0.5, 0.5, (8, 5_000)).astype(np.float32)
    out = io.BytesIO()
    with av.open(out, "w", format="wv") as file:
        stream = file.add_stream("wavpack", rate=16_000, layout="7.1")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels.T).reshape(1, -1), "flt", "7.1")
        frame.rate, frame.pts = 16_000, 0
        for piece in av.AudioResampler("fltp", "7.1", 16_000).resample(frame):
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    # The encoder keeps 8 bits.
    assert torch.allclose(read_sound(out.getvalue()), torch.from_numpy(channels.mean(axis=0)), atol=1 / 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_of_channels_in_opposite_phase_the_loudest_is_read(dtype, noise):
    random = np.random.default_rng(0)
    signal, left, right = random.uniform(-0.5, 0.5, (3, 16_000)).astype(np.float32)
    channels = np.stack([0.9 * signal + noise * left, -signal + noise * right])
    data = encoded(channels, 16_000, KINDS["wav float"])
    samples = read_sound(data, dtype=dtype).float() / (1 if dtype is torch.float32 else 32_768)
    assert torch.allclose(samples, torch.from_numpy(channels[1]), atol=1e-4)


def test_each_stretch_of_a_sound_has_its_own_channels():
    """Mono, then stereo in opposite phase, then stereo, in one FLAC stream."""
    signal = tone(16_000)
    pieces = [signal, np.stack([-signal, signal], 1), np.stack([signal, signal], 1)]
    data = b"".join(sound_file(piece, kind="FLAC") for piece in pieces)
    samples = read_sound(data)
    expected = np.concatenate([signal, -signal, signal])  # of equally loud channels, the first
    assert np.abs(samples.numpy() - expected).max() < 1e-4


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


@pytest.mark.parametrize("kind", ["WAV", "AIFF"])
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
        if kind != "mp4":  # whose index is at its end
            samples = read_sound(truncated, allow_truncated=True)
            assert len(samples) == pytest.approx(share * 48_000, abs=17_000 if kind == "OGG" else 8_000)  # a page


def with_sizes(riff: int, data: int) -> bytes:
    """A second of the tone as a WAV file that states these sizes, of the file and of its sound."""
    file = bytearray(sound_file(tone(16_000)))
    offset = file.index(b"data") + 4
    file[4:8], file[offset : offset + 4] = struct.pack("<I", riff), struct.pack("<I", data)
    return bytes(file)


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_file_of_a_stream_that_was_not_closed_is_read_whole(size):
    assert_is_the_tone(read_sound(with_sizes(size, size)))
    assert_is_the_tone(read_sound(with_sizes(36 if size == 0 else size, size)))


@pytest.mark.parametrize("extra", [1, 8, 36, 44, 78])
def test_a_wav_file_with_sizes_a_few_bytes_too_large_is_read(extra):
    """Writers that count the header in."""
    assert_is_the_tone(read_sound(with_sizes(36 + 32_000 + extra, 32_000 + extra)))


@pytest.mark.parametrize("shares", [(0.2, 1.0), (1.0, 0.2), (0.0, 1.0)])
def test_the_length_of_a_variable_rate_mp3_is_not_guessed(shares):
    """Without a Xing header, the first frames' bit rate says nothing of the length."""
    loudness = np.repeat(shares, 10 * 44_100)
    noise = loudness * np.random.default_rng(0).uniform(-0.5, 0.5, len(loudness))
    samples = read_sound(encoded(noise, 44_100, KINDS["mp3 vbr, no Xing"]))
    assert len(samples) / 16_000 == pytest.approx(20, abs=0.08)
    for half, share in zip(samples.split(10 * 16_000), shares, strict=False):
        assert float(half.std()) == pytest.approx(share * 0.5 / 3**0.5, rel=0.5, abs=0.01)


@pytest.mark.parametrize(
    "kind", ["aac", "mp3 cbr", "mp3 vbr, no Xing", "ogg vorbis", "ogg opus", "wav", "flac", "mp4 aac"]
)
@pytest.mark.parametrize("rates", [(44_100, 22_050), (8_000, 44_100), (48_000, 48_000)])
def test_both_of_joined_files_play_at_their_own_speed(kind, rates):
    if "opus" in kind:
        rates = tuple(48_000 if rate > 16_000 else 8_000 for rate in rates)
    data = b"".join(encoded(tone(rate, 1.5), rate, KINDS[kind]) for rate in rates)
    samples = read_sound(data)
    assert len(samples) / 16_000 == pytest.approx(3, abs=0.3)
    for half in (samples[:20_000], samples[-20_000:]):
        spectrum = torch.fft.rfft(half[2_000:18_000] * torch.hann_window(16_000)).abs()  # bins of 1 Hz
        assert int(spectrum.argmax()) == 440


def test_tags_between_joined_mp3_files_are_skipped_with_a_word(caplog):
    mp3 = encoded(tone(44_100), 44_100, KINDS["mp3 cbr"])
    tags = b"ID3\x03\0\0\0\0\x0f\x76" + bytes(2038) + b"TAG" + bytes(125)
    samples = read_sound(mp3 + tags + mp3)
    assert len(samples) / 16_000 == pytest.approx(2, abs=0.1)
    assert "sound: skipped" in caplog.text


def test_a_broken_packet_in_a_container_is_an_error():
    data = bytearray(encoded(np.random.default_rng(0).uniform(-0.5, 0.5, 96_000), 48_000, KINDS["matroska flac"]))
    data[len(data) // 2 : len(data) // 2 + 6000] = bytes(6000)
    with pytest.raises(ValueError, match=r"sound: broken or truncated after [01]\.\d\d s of sound"):
        read_sound(bytes(data))


def tracks(container: str, defaults: tuple[bool, ...]) -> bytes:
    """Tracks of 1, 2, ... seconds, with and without the mark of the default one."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        streams = [file.add_stream("aac", rate=16_000, layout="mono") for _ in defaults]
        for stream, default in zip(streams, defaults, strict=True):
            stream.disposition = av.stream.Disposition(int(default))
        for seconds, stream in enumerate(streams, 1):
            samples = tone(16_000, seconds)[None].astype(np.float32)
            for start in range(0, samples.shape[1], 1024):
                piece = np.ascontiguousarray(samples[:, start : start + 1024])
                frame = av.AudioFrame.from_ndarray(piece, "fltp", "mono")
                frame.rate, frame.pts = 16_000, start
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    return out.getvalue()


@pytest.mark.parametrize("container", ["matroska", "mp4"])
@pytest.mark.parametrize(
    ("defaults", "seconds"),
    [((False, True), 2), ((True, False), 1), ((False, False), 1), ((False, True, True), 2), ((True, True), 1)],
)
def test_of_several_tracks_the_one_marked_default_is_read(container, defaults, seconds):
    assert len(read_sound(tracks(container, defaults))) / 16_000 == pytest.approx(seconds, abs=0.15)


def test_lengths_in_headers_are_hints():
    """A raw AAC stream, whose estimated length is ten times too long, within the limit; a wrong length in a tag."""
    quiet_first = np.concatenate([np.zeros(8 * 44_100), np.random.default_rng(0).uniform(-0.5, 0.5, 8 * 44_100)])
    data = encoded(quiet_first, 44_100, KINDS["aac"])
    with av.open(io.BytesIO(data)) as file:
        assert float(file.streams.audio[0].duration * file.streams.audio[0].time_base) > 60
    assert len(read_sound(data, max_seconds=20)) / 16_000 == pytest.approx(16, abs=0.1)
    webm = encoded(tone(48_000, 2.0), 48_000, KINDS["webm opus"])
    assert len(read_sound(webm.replace(b"00:00:02.", b"00:59:02."))) / 16_000 == pytest.approx(2, abs=0.1)
    with pytest.raises(ValueError, match=r"over the limit of 1 s"):
        read_sound(webm.replace(b"00:00:02.", b"00:00:00."), max_seconds=1)


def test_a_joined_file_that_is_truncated_is_named():
    data = sound_file(tone(16_000))
    with pytest.raises(ValueError, match=rf"part 2 of 2 joined files, from byte {len(data):,}: truncated: 4,000 bytes"):
        read_sound(data + data[:-4000])
    assert len(read_sound(data + data[:-4000], allow_truncated=True)) == 30_000


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_int16_samples_are_those_of_the_file_or_resampled(rate):
    samples = read_sound(sound_file(np.stack([tone(rate)] * 2, 1), rate, subtype="PCM_16"), dtype=torch.int16)
    assert samples.dtype is torch.int16
    assert_is_the_tone(samples.float() / 32_768, atol=0.05)
    stored = (0.5 * np.random.default_rng(0).standard_normal(1000) * 8_000).astype(np.int16)
    assert np.array_equal(read_sound(sound_file(stored), dtype=torch.int16).numpy(), stored)


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
    data = sound_file(np.zeros(7205 * 1000, np.float32), 1000, "FLAC", "PCM_16")
    with pytest.raises(ValueError, match=r"7,20\d s .*limit of 7,200 s; cut it into parts"):
        read_sound(data)
    for short in (sound_file(tone(16_000)), movie()):
        with pytest.raises(ValueError, match=r"over the limit of 0 s"):
            read_sound(short, max_seconds=0.4)


def test_rates_outside_the_limits_are_errors():
    for kind in ("FLAC", "WAV"):
        with pytest.raises(ValueError, match=r"100 samples per second .*1,000 to 768,000 Hz"):
            read_sound(sound_file(np.zeros(500), 100, kind))


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"needs the package av: pip install 'mm-adapters\[speech\]'"):
        read_sound(sound_file(tone(16_000), kind="MP3"))


def test_resampling_an_odd_rate_keeps_the_duration():
    samples = torch.from_numpy(tone(11_127, 20.0).astype(np.float32))
    assert len(reading.resample(samples, 11_127)) == pytest.approx(20 * 16_000, abs=3)
