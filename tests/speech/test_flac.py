"""FLAC files that libsndfile reads have FFmpeg's samples; all others are left to FFmpeg."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import speech.reading
from foundation.errors import UserError
from speech.containers import Data
from speech.flac import find_flac
from speech.reading import read_sound
from speech.sndfile import DamagedError, WholeFile
from tests.speech.sound_files import KINDS, decoded, encoded, sound_file

RATES = (8_000, 11_127, 12_000, 16_000, 22_050, 32_000, 44_100, 48_000, 65_530, 96_000, 192_000)


def find(data: bytes) -> WholeFile | None:
    return find_flac(Data(io.BytesIO(data)))


def noise(length: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """[samples, channels]"""
    return 0.5 * np.random.default_rng(seed).uniform(-1, 1, (length, channels))


def samples_of(flac: WholeFile) -> np.ndarray:
    """[channels, samples]"""
    return np.concatenate(list(flac.blocks(1000)), axis=1)


def stated(data: bytes, num_samples: int) -> bytes:
    """The file with another length in its header."""
    return data[:22] + num_samples.to_bytes(4, "big") + data[26:]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_whole_files_have_the_samples_of_ffmpeg(rate, subtype):
    for channels, length in ((1, 9_000), (2, 4_096), (6, 4_097), (3, 1)):
        data = sound_file(noise(length, channels), rate, "FLAC", subtype)
        flac = find(data)
        assert (flac.rate, flac.channels, flac.num_samples) == (rate, channels, length)
        expected = np.concatenate([samples for _, samples in decoded(data)], axis=1)
        assert np.array_equal(samples_of(flac), expected.astype(np.float32))


def test_blocks_of_any_size_and_the_coding_of_stereo_are_known():
    pair = noise(9_000, 2)
    pair[:, 1] = 0.9 * pair[:, 0]
    for options in ({"frame_size": "16"}, {"frame_size": "1000"}, {"ch_mode": "mid_side"}, {"ch_mode": "right_side"}):
        kind = KINDS["flac"].__class__("flac", "flac", codec_options=options)
        data = encoded(pair.T, 44_100, kind)
        assert np.array_equal(
            samples_of(find(data)), np.concatenate([samples for _, samples in decoded(data)], axis=1).astype(np.float32)
        )


def test_what_is_not_plain_and_whole_is_left_to_ffmpeg():
    data = sound_file(noise(20_000), 16_000, "FLAC")
    other = sound_file(noise(20_000), 8_000, "FLAC")
    pair = sound_file(noise(20_000, 2), 16_000, "FLAC")
    frames = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xf8"]
    frames = [at for at in frames if data[at + 4] in range(5) and data[at + 2] & 15 == data[frames[0] + 2] & 15]
    tail = [file[file.index(b"\xff\xf8", 42) :] for file in (data, other, pair)]
    assert find(data) and len(frames) == 5
    for left_out in (
        data[: frames[1]] + data[frames[2] :],  # a frame is missing
        data[: frames[2]] + data[frames[1] :],  # a frame comes twice
        stated(data, 19_999),
        stated(data, 16_384),  # a frame beyond the end
        stated(data, 16_384)[: frames[4]] + data[frames[0] : frames[1]],
        stated(data, 0),
        data[:10] + (4095).to_bytes(2, "big") + data[12:],  # frames larger than the largest that is stated
        data + tail[0],
        stated(data, 40_000) + tail[0],  # joined without the second header
        stated(data, 40_000) + tail[1],
        stated(data, 40_000) + tail[2],
        data[: frames[0]] + tail[1],  # the frames have another rate than the header
        data[: frames[0]] + tail[2],
        b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + data,
        sound_file(noise(20_000), 16_000),
        b"fLaC\0\0\0\x22",
        data[: frames[0]],
        b"",
    ):
        assert find(left_out) is None


@pytest.mark.parametrize("change", ["damaged", "cut"])
def test_a_broken_frame_is_left_to_ffmpeg(monkeypatch, change):
    data = bytearray(sound_file(noise(20_000), 16_000, "FLAC"))
    if change == "damaged":
        data[len(data) // 2] ^= 1
    else:
        del data[-1000:]
    assert find(bytes(data))  # the beginnings of all frames are there
    with pytest.raises(DamagedError):
        samples_of(find(bytes(data)))
    fast = outcome(bytes(data))
    monkeypatch.setattr(speech.reading, "find_flac", lambda _: None)
    assert fast == outcome(bytes(data))


def test_short_sounds_are_read_without_ffmpeg(monkeypatch):
    monkeypatch.setattr(speech.reading, "open_media", None)
    pair = noise(20_000, 2).astype(np.float32).astype(np.float16)
    data = sound_file(pair.astype(np.float64), 16_000, "FLAC")
    assert torch.allclose(read_sound(data), torch.from_numpy(pair.mean(axis=1, dtype=np.float32)), atol=1e-4)
    opposite = sound_file(pair[:, :1] * [1.0, -1.0], 16_000, "FLAC")
    assert torch.allclose(read_sound(opposite), torch.from_numpy(pair[:, 0].astype(np.float32)), atol=1e-4)
    with pytest.raises(UserError, match="over the limit of 1 s"):
        read_sound(data, max_seconds=1)


def outcome(data: bytes) -> list[float] | str:
    """The samples, or the error."""
    try:
        return read_sound(data, allow_truncated=True).tolist()
    except UserError as error:
        return str(error)


@st.composite
def odd_files(draw: st.DrawFn) -> bytes:
    """A file by one of two encoders that may be joined, cut, damaged, or changed in its header or its frames."""
    rate = draw(st.sampled_from(RATES))
    channels = draw(st.sampled_from([1, 2, 3, 6]))
    seed = draw(st.integers(0, 2**32 - 1))
    samples = noise(draw(st.integers(1, 12_000) | st.sampled_from([4_096, 8_192])), channels, seed)
    if draw(st.booleans()):
        samples[:, -1] = draw(st.sampled_from([-1, 1, 0])) * samples[:, 0]
    samples *= draw(st.sampled_from([0, 0.001, 1]))
    if channels != 3 and draw(st.booleans()):
        options = {"frame_size": str(draw(st.sampled_from([16, 192, 1000, 4096, 5000])))}
        data = encoded(samples.T, rate, KINDS["flac"].__class__("flac", "flac", codec_options=options))
    else:
        data = sound_file(samples, rate, "FLAC", draw(st.sampled_from(["PCM_S8", "PCM_16", "PCM_24"])))
    first = data.index(b"\xff\xf8", 42)
    changed = bytearray(data)
    match draw(st.sampled_from(["nothing", "cut", "byte", "header", "tail", "frames", "tags", "joined"])):
        case "cut":
            del changed[draw(st.integers(1, len(data))) :]
        case "byte":
            changed[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
        case "header":
            changed[draw(st.integers(8, 41))] ^= draw(st.integers(1, 255))
        case "tail":
            changed += draw(st.binary(max_size=200) | st.sampled_from([b"TAG" + bytes(125), b"\xff\xf8" * 40]))
        case "frames":
            changed += sound_file(samples[: draw(st.integers(1, 5000)), :1], draw(st.sampled_from(RATES)), "FLAC")[86:]
        case "tags":
            size = draw(st.integers(0, 3000))
            changed[first:first] = b"\x01" + size.to_bytes(3, "big") + draw(st.sampled_from([b"\0", b"\xff"])) * size
            changed[4] &= 0x7F
        case "joined":
            changed += data[draw(st.sampled_from([0, first])) :]
    return bytes(changed)


@pytest.mark.fuzz
@given(odd_files())
def test_odd_files_are_read_as_ffmpeg_reads_them(file):
    fast = outcome(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech.reading, "find_flac", lambda _: None)
        assert fast == outcome(file)
