"""Random sound files, whole, joined and cut, compared with a loop over FFmpeg's packets and with libsndfile."""

import io
from itertools import groupby

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from foundation.errors import UserError
from speech.containers import SLACK
from speech.reading import read_sound, resample
from tests.speech.sound_files import KINDS, LAYOUTS, Kind, decoded, encoded

pytestmark = pytest.mark.fuzz
RANDOM = sorted(KINDS.keys() - {"tta"})  # FFmpeg's encoder of TTA ends the process at a single sample


@st.composite
def sounds(draw: st.DrawFn, kind: Kind) -> bytes:
    """A file of up to a second: noise, a tone, or silence, in unrelated, equal or opposite channels."""
    rate = draw(st.sampled_from(kind.rates))
    channels = draw(st.sampled_from([count for count in LAYOUTS if count <= kind.channels]))
    length = draw(st.integers(1, rate) | st.sampled_from([1, 576, 1024, 1152, 4096, 4608]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loudness = draw(st.sampled_from([0.0, 0.01, 0.7]))
    if draw(st.booleans()):
        samples = random.uniform(-1, 1, (channels, length))
    else:
        samples = np.tile(np.sin(np.arange(length) * draw(st.floats(0.001, 1.0))), (channels, 1))
        samples *= np.array([1, draw(st.sampled_from([-1, 1, 0.3]))] * 3)[:channels, None]
    return encoded(loudness * samples, rate, kind)


def by_ffmpeg(data: bytes) -> list[tuple[int, np.ndarray]]:
    """(rate, [channels, samples]) for each stretch with one rate and number of channels.

    Empty where FFmpeg does not find out what the file is, such as raw streams of one or two frames.
    """
    stretches: list[tuple[int, list[np.ndarray]]] = []
    try:
        frames = decoded(data)
    except (av.error.FFmpegError, IndexError):
        return []
    for rate, samples in frames:
        if not stretches or (stretches[-1][0], len(stretches[-1][1][0])) != (rate, len(samples)):
            stretches.append((rate, []))
        stretches[-1][1].append(samples)
    return [(rate, np.concatenate(pieces, axis=1)) for rate, pieces in stretches]


def by_libsndfile(data: bytes) -> list[tuple[int, np.ndarray]]:
    samples, rate = soundfile.read(io.BytesIO(data), always_2d=True)
    return [(rate, samples.T)]


def mixed(stretches: list[tuple[int, np.ndarray]]) -> torch.Tensor:
    """The downmix and the resampling that read_sound documents; float32 [samples] at 16 kHz."""
    mono: list[tuple[int, np.ndarray]] = []
    for rate, channels in stretches:
        mean = channels.mean(axis=0)
        power = np.square(channels).sum(axis=1)
        cancels = np.square(mean).sum() < power.sum() / (4 * len(channels) ** 2)
        mono.append((rate, channels[np.argmax(power >= 0.99 * power.max())] if cancels else mean))
    pieces = [
        resample(torch.from_numpy(np.concatenate([samples for _, samples in group]).astype(np.float32)), rate)
        for rate, group in groupby(mono, key=lambda stretch: stretch[0])
    ]
    return torch.cat(pieces) if pieces else torch.zeros(0)


def assert_same(samples: torch.Tensor, expected: torch.Tensor) -> None:
    assert samples.shape == expected.shape
    assert float((samples - expected).abs().max()) < 1e-5


def assert_read_as(expected: torch.Tensor, file: bytes) -> None:
    if len(expected):
        assert_same(read_sound(file), expected)
    else:
        with pytest.raises(UserError):
            read_sound(file)


@given(st.data())
def test_whole_files_are_read_as_the_other_decoders_read_them(data: st.DataObject):
    name = data.draw(st.sampled_from(RANDOM))
    file = data.draw(sounds(KINDS[name]))
    stretches = by_libsndfile(file) if name == "ogg vorbis" else by_ffmpeg(file)
    note(f"{name}: {len(file)} bytes, {[(rate, samples.shape) for rate, samples in stretches]}")
    assert_read_as(mixed(stretches), file)


@given(st.data())
def test_joined_files_are_read_one_after_the_other(data: st.DataObject):
    name = data.draw(st.sampled_from(RANDOM))
    kind = KINDS[name]
    files = data.draw(st.lists(sounds(kind), min_size=2, max_size=3))
    if kind.stream:
        stretches = by_ffmpeg(b"".join(files))
    else:
        stretches = [
            stretch for file in files for stretch in (by_libsndfile if name == "ogg vorbis" else by_ffmpeg)(file)
        ]
    note(f"{name}: {[len(file) for file in files]} bytes, {[(rate, samples.shape) for rate, samples in stretches]}")
    assert_read_as(mixed(stretches), b"".join(files))


@given(st.data())
def test_cut_files_are_refused_or_read_as_far_as_ffmpeg_reads_them(data: st.DataObject):
    name = data.draw(st.sampled_from(RANDOM))
    file = data.draw(sounds(KINDS[name]))
    cut = file[: data.draw(st.integers(1, len(file)))]
    stretches = by_ffmpeg(cut)
    note(f"{name}: {len(cut)} of {len(file)} bytes, {[(rate, samples.shape) for rate, samples in stretches]}")
    expected = mixed(stretches)
    for allowed in (True, False):
        try:
            samples = read_sound(cut, allow_truncated=allowed)
        except UserError:
            assert not allowed or not len(expected)
        else:
            if not allowed and KINDS[name].sized:
                assert len(samples) < len(mixed(by_ffmpeg(file))) or len(cut) + SLACK >= len(file)
            if name != "ogg vorbis":
                assert_same(samples, expected)
