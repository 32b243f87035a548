"""Decoded sound of any sample format into one channel of float32; `reading.py` decodes it and resamples the result."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from foundation.errors import UserError

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame

MAX_EXPECTED = 2**24  # samples; headers may state any number
RATES = range(1_000, 768_001)  # Hz
# FFmpeg's sample formats (with a "p" after them for those whose channels lie apart) -> NumPy's names.
SAMPLE_FORMATS = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}


class Section:
    """A stretch of sound of one kind, mixed to one channel as it comes.

    Args:
        expected: number of samples that come, as far as it is known: memory for them is taken at once.

    Attributes:
        kind: (samples per second, channels, FFmpeg's sample format).
        channel: the channel to take; None averages all.
        power: of each channel, summed over the samples.
        mixed_power: of the average.
    """

    def __init__(self, kind: tuple[int, int, str], channel: int | None, expected: int = 0) -> None:
        if kind[0] not in RATES:
            raise UserError(f"{kind[0]} samples per second are outside {RATES[0]:,} to {RATES[-1]:,} Hz")
        self.kind, self.channel = kind, channel
        self.power, self.mixed_power = np.zeros(kind[1]), 0.0
        self._mixed = np.empty(
            min(expected, MAX_EXPECTED), np.float32
        )  # of which the first _num_mixed samples are filled
        self._num_mixed = 0
        self._is_planar = kind[2].endswith("p")
        self._waiting: list[list[np.ndarray]] = []  # for each frame, its planes
        self._num_waiting = 0

    @property
    def rate(self) -> int:
        return self.kind[0]

    @property
    def cancels(self) -> bool:
        """Whether the average has less than a quarter of the power that unrelated channels leave."""
        self.mix_waiting()
        return self.channel is None and 4 * len(self.power) ** 2 * self.mixed_power < self.power.sum()

    @property
    def loudest(self) -> int:
        """The first channel that has the most power, to within 1%."""
        return int(np.argmax(self.power >= 0.99 * self.power.max()))

    @property
    def num_samples(self) -> int:
        return self._num_mixed + self._num_waiting

    @property
    def seconds(self) -> float:
        return self.num_samples / self.rate

    def add(self, frame: "AudioFrame") -> int:
        """Keep a decoded frame, to be mixed with others by `mix_waiting`; the number of samples that wait."""
        dtype = SAMPLE_FORMATS[self.kind[2].removesuffix("p")]
        # Without a copy: the arrays keep the frame. PyAV gives a ninth plane to eight channels, which is none.
        buffers: Sequence[Any] = frame.planes  # PyAV's type does not say that it is a buffer
        if self._is_planar:
            planes = [np.frombuffer(plane, dtype, frame.samples) for plane in buffers[: self.kind[1]]]
        else:
            planes = [np.frombuffer(buffers[0], dtype, frame.samples * self.kind[1])]
        self._waiting.append(planes)
        self._num_waiting += frame.samples
        return self._num_waiting

    def mix(self, block: np.ndarray) -> None:
        """Add [channels, samples] of any of FFmpeg's formats."""
        end = self._num_mixed + block.shape[1]
        if end > len(self._mixed):
            self._mixed.resize(max(end, len(self._mixed) * 3 // 2), refcheck=False)  # mostly in place
        mixed = self._mixed[self._num_mixed : end]
        self._num_mixed = end
        if len(block) == 1:
            _check_finite(_to_float(block[0], mixed))
            return
        floats = _check_finite(_to_float(block, np.empty(block.shape, np.float32)))
        if self.channel is not None:
            mixed[:] = floats[self.channel]
        else:
            floats.mean(axis=0, out=mixed)
            self.power += np.einsum("ct,ct->c", floats, floats)
            self.mixed_power += float(mixed @ mixed)

    def samples(self) -> np.ndarray:
        """float32 [samples]"""
        self.mix_waiting()
        self._mixed.resize(self._num_mixed, refcheck=False)
        return self._mixed

    def mix_waiting(self) -> None:
        """Take the frames that wait."""
        if not self._waiting:
            return
        planes = [np.concatenate(pieces) for pieces in zip(*self._waiting, strict=True)]
        self._waiting, self._num_waiting = [], 0
        self.mix(np.stack(planes) if len(planes) == self.kind[1] else planar(planes[0], self.kind[1]))


def total_seconds(sections: list[Section]) -> float:
    return sum(section.seconds for section in sections)


def joined(pieces: list[np.ndarray]) -> np.ndarray:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def planar(samples: np.ndarray, channels: int) -> np.ndarray:
    """Samples whose channels take turns -> [channels, samples]."""
    return np.ascontiguousarray(samples.reshape(-1, channels).T)


def _to_float(samples: np.ndarray, floats: np.ndarray) -> np.ndarray:
    """Write samples of any of FFmpeg's formats into `floats`, float32 of the same shape, full scale 1; return it."""
    floats[:] = samples
    if samples.dtype == np.uint8:
        floats -= 128
    if samples.dtype.kind != "f":
        floats *= np.float32(2.0 ** (1 - 8 * samples.dtype.itemsize))  # a power of two: exact
    return floats


def _check_finite(samples: np.ndarray) -> np.ndarray:
    if not np.isfinite(samples.sum()) and not (finite := np.isfinite(samples)).all():
        raise UserError(f"{int((~finite).sum()):,} samples are not finite numbers (NaN or infinite)")
    return samples
