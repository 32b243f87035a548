"""Decoded sound of any sample format into one channel of float32; `reading.py` decodes it and resamples the result."""

from typing import TYPE_CHECKING

import numpy as np

from foundation.errors import UserError

if TYPE_CHECKING:
    from av.audio.fifo import AudioFifo

RATES = range(1_000, 768_001)  # Hz
# FFmpeg's sample formats (with a "p" after them for those whose channels lie apart) -> NumPy's names.
SAMPLE_FORMATS = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}


class Section:
    """A stretch of sound of one kind, mixed to one channel as it comes.

    Attributes:
        kind: (samples per second, channels, FFmpeg's sample format).
        channel: the channel to take; None averages all.
        power: of each channel, summed over the samples.
        mixed_power: of the average.
    """

    def __init__(self, kind: tuple[int, int, str], channel: int | None) -> None:
        if kind[0] not in RATES:
            raise UserError(f"{kind[0]} samples per second are outside {RATES[0]:,} to {RATES[-1]:,} Hz")
        self.kind, self.channel = kind, channel
        self.power, self.mixed_power = np.zeros(kind[1]), 0.0
        self._mixed = np.empty(0, np.float32)  # of which the first _num_mixed samples are filled
        self._num_mixed = 0
        self._waiting: AudioFifo | None = None

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
        return self._num_mixed + (self._waiting.samples if self._waiting else 0)

    @property
    def seconds(self) -> float:
        return self.num_samples / self.rate

    def queue(self) -> "AudioFifo":
        """For decoded frames, which are mixed many at once by `mix_waiting`."""
        from av.audio.fifo import AudioFifo

        self._waiting = AudioFifo()
        return self._waiting

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
        """Take what is in the queue."""
        frame = self._waiting.read() if self._waiting is not None else None
        if frame is None:
            return
        if self.kind[1] == 1:  # without a copy
            sample_format = SAMPLE_FORMATS[self.kind[2].removesuffix("p")]
            plane = np.frombuffer(frame.planes[0], sample_format, frame.samples)  # type: ignore[call-overload]  # a buffer
            self.mix(plane[None])
            return
        block = frame.to_ndarray()
        self.mix(block if len(block) == self.kind[1] else planar(block, self.kind[1]))


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
