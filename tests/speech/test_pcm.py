"""Plain PCM in WAV files has FFmpeg's samples; what is not plain is left to FFmpeg."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speech.containers import Data
from speech.pcm import Pcm, find_pcm
from speech.reading import read_sound
from tests.speech.sound_files import decoded, sound_file, tone


def chunk(kind: bytes, body: bytes, size: int | None = None) -> bytes:
    return struct.pack("<4sI", kind, len(body) if size is None else size) + body + b"\0" * (len(body) % 2)


def form(tag: int = 1, channels: int = 1, rate: int = 16_000, bits: int = 16) -> bytes:
    frame_size = channels * bits // 8
    return chunk(b"fmt ", struct.pack("<HHIIHH", tag, channels, rate, rate * frame_size, frame_size, bits))


def wav(*chunks: bytes) -> bytes:
    return chunk(b"RIFF", b"WAVE" + b"".join(chunks))


def pcm_of(file: bytes) -> Pcm | None:
    return find_pcm(Data(io.BytesIO(file)))


NOISE = np.random.default_rng(0).integers(-9_000, 9_000, 4_000, dtype=np.int16).tobytes()
SOUND = chunk(b"data", NOISE)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_32", "FLOAT"])
@pytest.mark.parametrize("channels", [1, 2])
def test_plain_files_need_no_decoder_and_have_the_samples_of_ffmpeg(subtype, channels, monkeypatch):
    samples = np.stack([tone(16_000, hertz=440.0 * (1 + channel)) for channel in range(channels)], axis=1)
    file = sound_file(samples, subtype=subtype)
    expected = np.concatenate([frame for _, frame in decoded(file)], axis=1).mean(axis=0)
    monkeypatch.setattr("speech.reading.open_media", None)
    monkeypatch.setattr("speech.reading.BLOCK", 1_000)
    np.testing.assert_allclose(read_sound(file).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize(
    "file",
    [
        sound_file(tone(16_000), subtype="PCM_24"),
        sound_file(tone(16_000), subtype="ALAW"),
        sound_file(tone(16_000), subtype="PCM_16", kind="WAVEX"),
        wav(SOUND),
        wav(form(), chunk(b"data", b"")),
        wav(form(channels=0), SOUND),
        wav(form(channels=3), SOUND),
        wav(form(), chunk(b"data", NOISE, size=len(NOISE) + 2)),
        wav(form(), SOUND, SOUND),
        wav(form(), form(rate=8_000), SOUND),
        wav(form(), chunk(b"LIST", b"abc"), SOUND),
        wav(form(), chunk(b"SMV0", b"abcd"), SOUND),
        wav(form(channels=2), chunk(b"data", bytes(4_096) + b"\xff\x1f\x00\xe8" + NOISE)),
        wav(form(channels=2), chunk(b"data", bytes(12) + b"\x72\xf8\x1f\x4e" + NOISE)),
        wav(form(channels=2), chunk(b"data", bytes(12) + b"\x0b\x77" + NOISE[:-2])),
        wav(form(), SOUND) + b"\0",
    ],
)
def test_what_is_not_plain_is_left_to_ffmpeg(file):
    assert pcm_of(wav(form(), SOUND)) is not None
    assert pcm_of(file) is None


# Without those whose contents FFmpeg reads, and refuses where they are broken.
KINDS = (b"fact", b"JUNK", b"PEAK", b"cue ", b"data", b"fmt ", b"abcd")
TITLE = chunk(b"LIST", b"INFOINAM\4\0\0\0abc\0")


@st.composite
def wav_files(draw: st.DrawFn) -> bytes:
    """A WAV file of odd chunks around its sound, some of them with wrong sizes, now and then cut."""
    bits, tag = draw(st.sampled_from([(8, 1), (16, 1), (16, 1), (24, 1), (32, 1), (32, 3), (64, 3)]))
    channels = draw(st.sampled_from([1, 1, 2, 3, 6]))
    values = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).uniform(-0.5, 0.5, 600 * channels)
    body = (values * 2**31).astype("<i4").tobytes() if tag == 1 else values.astype(f"<f{bits // 8}").tobytes()
    body = body[: draw(st.sampled_from([len(body), 256 * bits // 8 * channels, 1_001]))]
    chunks = []
    for _ in range(draw(st.integers(0, 4))):
        other = draw(st.binary(max_size=24))
        size = draw(st.sampled_from([None, None, None, len(other) + 1, 0]))
        chunks.append(draw(st.sampled_from([TITLE, *(chunk(kind, other, size) for kind in KINDS)])))
    chunks.insert(draw(st.integers(0, len(chunks))), form(tag, channels, draw(st.sampled_from([8_000, 16_000])), bits))
    size = draw(st.sampled_from([None, None, None, 0, len(body) - 7, len(body) + 5, 0xFFFFFFFF]))
    chunks.insert(draw(st.integers(0, len(chunks))), chunk(b"data", body, size))
    file = wav(*chunks)
    return file[: draw(st.sampled_from([len(file), len(file), len(file) - 1, len(file) - 30]))]


@pytest.mark.fuzz
@given(wav_files())
def test_plain_samples_of_random_files_are_those_of_ffmpeg(file):
    pcm = pcm_of(file)
    if pcm is None:
        return
    frames = decoded(file)
    assert {rate for rate, _ in frames} == {pcm.rate}
    expected = np.concatenate([samples for _, samples in frames], axis=1)
    found = np.concatenate(list(pcm.blocks(100)), axis=1).astype(np.float64)
    scale = {"u1": 2**7, "i2": 2**15, "i4": 2**31, "f4": 1}[pcm.dtype.str[1:]]
    found = (found - 128 if pcm.dtype == np.uint8 else found) / scale
    np.testing.assert_allclose(found, expected, atol=1e-7)
