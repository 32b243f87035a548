"""Decoding by libsndfile, for files that `flac.py` or `vorbis.py` found whole.

libsndfile decodes a short file in the time that FFmpeg needs to find out what it is, but takes rate, channels and
length from the headers and stops there. So only files that were walked to their end come here.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from foundation.extras import import_extra


class DamagedError(Exception):
    """The file cannot be decoded as a whole."""


@dataclass(frozen=True)
class WholeFile:
    """A file that holds what its headers state.

    Attributes:
        rate: samples per second.
        num_samples: of each channel.
    """

    content: bytes
    rate: int
    channels: int
    num_samples: int
    sample_format = "flt"

    def blocks(self, length: int) -> Iterator[np.ndarray]:
        """float32 [channels, samples], up to `length` samples at a time.

        Raises:
            DamagedError: the decoder finds damage, or fewer samples than stated.
        """
        soundfile = import_extra("soundfile", "speech", "sound")
        try:
            with soundfile.SoundFile(io.BytesIO(self.content)) as sound:
                if sound.frames != self.num_samples:
                    raise DamagedError
                left = self.num_samples
                while left:
                    block = sound.read(min(length, left), dtype="float32", always_2d=True)
                    if not len(block):
                        raise DamagedError
                    left -= len(block)
                    yield block.T
        except soundfile.LibsndfileError as error:
            raise DamagedError from error
