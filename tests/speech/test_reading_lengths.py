"""Sound files of many kinds have the length that FFmpeg decodes: whole, joined and cut.

The reference is a loop over FFmpeg's packets (PyAV), and libsndfile for Vorbis, whose end FFmpeg misses in short files.
"""

import io

import numpy as np
import pytest
import soundfile

from foundation.errors import UserError
from speech.reading import read_sound
from tests.speech.sound_files import KINDS, decoded, encoded, seconds_of

SPLIT = [name for name, kind in KINDS.items() if not kind.stream]


@pytest.fixture(scope="module")
def sounds() -> dict[str, tuple[bytes, bytes]]:
    """Two sounds in each kind of file, of different rates and channels; each gets louder."""
    random = np.random.default_rng(0)
    made = {}
    for name, kind in KINDS.items():
        first = np.linspace(0, 0.5, 20_000) * random.uniform(-1, 1, 20_000)
        second = np.linspace(0, 0.5, 17_001) * random.uniform(-1, 1, (2, 17_001))
        made[name] = (encoded(first, kind.rates[-1], kind), encoded(second[: kind.channels], kind.rates[1], kind))
    return made


def reference(name: str, data: bytes) -> float:
    """Seconds of a whole file."""
    if name == "ogg vorbis":
        samples, rate = soundfile.read(io.BytesIO(data))
        return len(samples) / rate
    return seconds_of(decoded(data))


def close(samples: object, seconds: float) -> bool:
    return abs(len(samples) - 16_000 * seconds) < 3


@pytest.mark.parametrize("name", KINDS)
def test_whole_files(sounds, name):
    for data in sounds[name]:
        assert close(read_sound(data), reference(name, data))


@pytest.mark.parametrize("name", KINDS)
def test_joined_files(sounds, name):
    first, second = sounds[name]
    for joined in ([first, first], [first, second], [second, first, second]):
        data = b"".join(joined)
        if KINDS[name].stream:
            expected = seconds_of(decoded(data))
            # A joint may lose a frame, and adds what encoders put before and after a sound.
            assert expected == pytest.approx(sum(reference(name, part) for part in joined), abs=0.12 * len(joined))
        else:
            expected = sum(reference(name, part) for part in joined)
        assert close(read_sound(data), expected)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("share", [0.35, 0.8])
def test_cut_files(sounds, name, share):
    """As far as FFmpeg reads them where this is allowed; else refused, or all that FFmpeg reads."""
    data = sounds[name][0]
    cut = data[: int(share * len(data))]
    try:
        expected = seconds_of(decoded(cut))
    except (ValueError, EOFError):  # no index, or no page of sound
        expected = 0
    if not expected:
        with pytest.raises(UserError, match="truncated"):
            read_sound(cut, allow_truncated=True)
        return
    assert expected < reference(name, data)
    assert close(read_sound(cut, allow_truncated=True), expected)
    if KINDS[name].sized:
        with pytest.raises(UserError, match="truncated"):
            read_sound(cut)
    else:
        try:
            samples = read_sound(cut)
        except UserError as error:  # the last packet is not whole
            assert "truncated" in str(error)
        else:
            assert close(samples, expected)
