"""Ogg Vorbis files that libsndfile reads have FFmpeg's samples; all others are left to FFmpeg."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import speech.reading
from foundation.errors import UserError
from speech.containers import Data
from speech.reading import read_sound
from speech.sndfile import DamagedError, WholeFile
from speech.vorbis import _checksum, find_vorbis
from tests.speech.sound_files import decoded, sound_file

RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000)


def find(data: bytes) -> WholeFile | None:
    return find_vorbis(Data(io.BytesIO(data)))


def noise(length: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """[samples, channels]"""
    return 0.3 * np.random.default_rng(seed).uniform(-1, 1, (length, channels))


def vorbis(length: int, rate: int = 16_000, channels: int = 1, seed: int = 0) -> bytes:
    return sound_file(noise(length, channels, seed), rate, "OGG", "VORBIS")


def pages(data: bytes) -> list[bytes]:
    starts = [at for at in range(len(data)) if data[at : at + 4] == b"OggS"]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def sealed(page: bytes) -> bytes:
    """The page with the checksum of its content."""
    checksum = _checksum(page[:22] + bytes(4) + page[26:])
    return page[:22] + checksum.to_bytes(4, "little") + page[26:]


def with_granule(page: bytes, granule: int) -> bytes:
    return sealed(page[:6] + granule.to_bytes(8, "little", signed=True) + page[14:])


def with_flags(page: bytes, flags: int) -> bytes:
    return sealed(page[:5] + bytes([flags]) + page[6:])


def samples_of(vorbis: WholeFile, length: int = 10_000) -> np.ndarray:
    """[channels, samples]"""
    return np.concatenate(list(vorbis.blocks(length)), axis=1)


def test_the_checksum_is_that_of_ogg():
    for page in pages(vorbis(30_000)):
        assert sealed(page) == page
    assert _checksum(b"123456789") == 0x89A1897F  # CRC-32/CKSUM without its final complement and length


@pytest.mark.parametrize("rate", RATES)
def test_whole_files_have_the_samples_of_ffmpeg(rate):
    for channels, length in ((1, 100_000), (2, 65_536), (1, 60_001)):
        data = vorbis(length, rate, channels)
        found = find(data)
        assert (found.rate, found.channels, found.num_samples) == (rate, channels, length)
        expected = np.concatenate([samples for _, samples in decoded(data)], axis=1)
        assert samples_of(found).shape == expected.shape
        assert np.abs(samples_of(found) - expected).max() < 1e-5


@pytest.mark.parametrize("length", [1, 64, 4_000, 8_000])
def test_a_file_of_one_page_has_all_its_samples(length):
    data = vorbis(length)
    assert len(pages(data)) == 3  # two of headers
    assert len(read_sound(data)) == length


def test_what_is_not_plain_and_whole_is_left_to_ffmpeg():
    data = vorbis(100_000)
    parts = pages(data)
    assert find(data) and len(parts) > 5
    last = int.from_bytes(parts[-1][6:14], "little")
    damaged = bytearray(parts[-2])
    damaged[-1] ^= 1
    for left_out in (
        b"".join(parts[:4] + parts[5:]),  # a page is missing
        b"".join([*parts[:4], parts[4], *parts[4:]]),  # a page comes twice
        b"".join([*parts[:-2], bytes(damaged), parts[-1]]),
        b"".join(parts[:-1]),  # the end is missing
        b"".join([*parts[:-1], with_flags(parts[-1], 0)]),  # the end is not marked
        b"".join([*parts[:-1], with_granule(parts[-1], 0)]),  # shorter than the page before says
        b"".join([*parts[:-1], with_granule(parts[-1], -1)]),
        data[:-1],
        data + b"\0",
        data + data,
        b"".join([parts[0], pages(vorbis(100, seed=1))[0], *parts[1:]]),  # two streams
        b"".join([with_flags(parts[0], 0), *parts[1:]]),
        vorbis(20_000, channels=3),
        sound_file(noise(20_000), 16_000, "OGG", "OPUS"),
        data[:28],
        data[:40],
        b"",
    ):
        assert find(left_out) is None
    longer = find(b"".join([*parts[:-1], with_granule(parts[-1], last + 100_000)]))
    with pytest.raises(DamagedError):
        samples_of(longer)


def test_short_sounds_are_read_without_ffmpeg(monkeypatch):
    monkeypatch.setattr(speech.reading, "open_media", None)
    tone = 0.5 * np.sin(np.arange(30_000) / 7)
    sound = read_sound(sound_file(tone[:, None], 16_000, "OGG", "VORBIS"))
    assert (sound - torch.from_numpy(tone).float()).abs().mean() < 0.01
    opposite = read_sound(sound_file(tone[:, None] * [1.0, -1.0], 16_000, "OGG", "VORBIS"))
    assert (opposite - torch.from_numpy(tone).float()).abs().mean() < 0.01
    with pytest.raises(UserError, match="over the limit of 1 s"):
        read_sound(sound_file(tone[:, None], 16_000, "OGG", "VORBIS"), max_seconds=1)


@st.composite
def odd_files(draw: st.DrawFn) -> bytes:
    """A file that may be joined, cut, damaged, or have pages that are missing, repeated, or changed in their heads."""
    rate, channels = draw(st.sampled_from(RATES)), draw(st.sampled_from([1, 2, 6]))
    data = vorbis(draw(st.integers(1, 120_000)), rate, channels, draw(st.integers(0, 9)))
    parts = pages(data)
    at = draw(st.integers(0, len(parts) - 1))
    match draw(st.sampled_from(["nothing", "cut", "byte", "granule", "flags", "missing", "twice", "tail", "joined"])):
        case "cut":
            return data[: draw(st.integers(1, len(data)))]
        case "byte":
            where = draw(st.integers(0, len(data) - 1))
            return data[:where] + bytes([data[where] ^ draw(st.integers(1, 255))]) + data[where + 1 :]
        case "granule":
            own = int.from_bytes(parts[at][6:14], "little", signed=True)
            parts[at] = with_granule(parts[at], own + draw(st.integers(-9_000, 9_000)))
        case "flags":
            parts[at] = with_flags(parts[at], draw(st.integers(0, 7)))
        case "missing":
            del parts[at]
        case "twice":
            parts.insert(at, parts[at])
        case "tail":
            parts.append(draw(st.binary(max_size=200)))
        case "joined":
            parts += pages(vorbis(draw(st.integers(1, 50_000)), rate, channels, 11))
    return b"".join(parts)


@pytest.mark.fuzz
@given(odd_files())
def test_odd_files_are_read_as_ffmpeg_reads_them(data):
    found = find(data)
    if found is None or len(pages(data)) < 4:  # FFmpeg reads a single page of sound wrongly
        return
    try:
        samples = samples_of(found)
    except DamagedError:
        return
    expected = np.concatenate([samples for _, samples in decoded(data)], axis=1)
    shorter = min(samples.shape[1], expected.shape[1])
    assert np.abs(samples[:, :shorter] - expected[:, :shorter]).max() < 1e-5
    # The last granule is the length (Vorbis I, A.2). FFmpeg reads on where it leaves out more than the last packet.
    assert samples.shape[1] == found.num_samples <= expected.shape[1]
