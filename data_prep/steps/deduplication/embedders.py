"""A picture -> a vector whose cosine with another's says how alike the two are: what near duplicates are found by.

Two of them: SSCD, a trained network whose weights the user has, and one without weights for first runs and tests.
A similarity means nothing without its embedder, so each comes with the threshold that it was calibrated at.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from foundation.errors import UserError


class ImageEmbedder(Protocol):
    """Attributes:
    id: of the embedder and its weights; vectors of one id can be compared.
    dim: length of a vector.
    preprocess_id: of what is done to a picture before.
    threshold: the similarity from which on two pictures are near duplicates.
    floor: the lowest similarity worth remembering, for looser thresholds later.
    """

    id: str
    dim: int
    preprocess_id: str
    threshold: float
    floor: float

    def embed(self, picture: Image.Image) -> np.ndarray:
        """The vector of an RGB picture, float32 [dim], of unit length: on one kind of machine always the same bits."""


@dataclass(frozen=True)
class LowFrequencies:
    """The lowest frequencies of brightness and colour (a DCT of 64 x 64 pixels): needs no weights.

    Their square roots are taken, signs kept: the two or three largest, which any two pictures on white share, would
    else outweigh all others. It sees through JPEG, scaling and brightness, a little through cropping, and not through
    flipping or overlays; and it takes pictures of one template (an emoji in several skin tones) for near duplicates.

    The threshold: of 296 pictures of OpenMoji and openclipart all copies in JPEG quality 30, half size or 10% brighter
    are above 0.85, and 77% of those cropped by 3% at each side. Of the 43,660 pairs among them 74 are, each of one
    template.
    """

    id = "low-frequencies-1"
    dim = 512
    preprocess_id = "ycbcr-box-64"
    threshold = 0.85
    floor = 0.7

    def embed(self, picture: Image.Image) -> np.ndarray:
        small = picture.convert("YCbCr").resize((_SIDE, _SIDE), Image.Resampling.BOX)
        pixels = np.asarray(small, np.float64) - 128
        # einsum without BLAS: its sums come in one order, whatever the machine's number of cores
        rows = np.einsum("ui,ijc->ujc", _waves(), pixels)
        spectrum = np.einsum("vj,ujc->cuv", _waves(), rows)
        luminance, chroma = _lowest(_LUMINANCE + 1)[1:], _lowest(_CHROMA)  # without mean brightness, with mean colour
        parts = [spectrum[0][luminance[:, 0], luminance[:, 1]]]
        parts += [_CHROMA_WEIGHT * spectrum[channel][chroma[:, 0], chroma[:, 1]] for channel in (1, 2)]
        values = np.concatenate(parts)
        values = np.sign(values) * np.sqrt(np.abs(values))
        length = np.sqrt((values**2).sum())
        return (values / max(length, 1e-12)).astype(np.float32)


@dataclass(frozen=True)
class SSCD:
    """The published `sscd_disc_mixup` (arXiv 2202.10261), from a file that the user has.

    Attributes:
        weights: `sscd_disc_mixup.torchvision.pt`, or its tensors as safetensors.
        sha256: of the file.

    The threshold is the published one: on DISC, 90% of the pairs above it are copies.
    """

    weights: Path
    sha256: str

    dim = 512
    preprocess_id = "short-side-288"
    threshold = 0.75
    floor = 0.6

    @classmethod
    def of_file(cls, weights: Path) -> "SSCD":
        """The embedder of a file of weights.

        Raises:
            UserError: there is no such file, or it does not hold these weights.
        """
        embedder = cls(weights, hashlib.sha256(_bytes_of(weights)).hexdigest())
        embedder._model()
        return embedder

    @property
    def id(self) -> str:
        return f"sscd_disc_mixup-{self.sha256}"

    def embed(self, picture: Image.Image) -> np.ndarray:
        from data_prep.steps.deduplication.sscd import describe

        return describe(self._model(), picture)

    def _model(self):
        return _load(self.weights, self.sha256)


_SIDE, _WAVES = 64, 32  # px, frequencies in each direction
_LUMINANCE, _CHROMA = 192, 160  # frequencies that are kept of brightness, and of each of two colour differences
_CHROMA_WEIGHT = 2.0  # colour differences are small beside brightness


@cache
def _waves() -> np.ndarray:
    """The cosines of a DCT-II, [frequency, pixel]."""
    frequencies, pixels = np.arange(_WAVES)[:, None], np.arange(_SIDE)[None]
    return np.cos(np.pi * (2 * pixels + 1) * frequencies / (2 * _SIDE)) * np.sqrt(2 / _SIDE)


@cache
def _lowest(count: int) -> np.ndarray:
    """The lowest frequencies (vertical, horizontal), by their sum: int [count, 2]."""
    grid = [(u, v) for u in range(_WAVES) for v in range(_WAVES)]
    return np.array(sorted(grid, key=lambda wave: (sum(wave), wave))[:count])


def _bytes_of(weights: Path) -> bytes:
    try:
        return weights.read_bytes()
    except OSError as error:
        raise UserError(f"{weights}: the weights of SSCD cannot be read ({error.strerror})") from None


@cache
def _load(weights: Path, sha256: str):
    from data_prep.steps.deduplication.sscd import load_sscd  # torch takes seconds to import: only where it is used

    data = _bytes_of(weights)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{weights}: has changed since the run began; start it again")
    return load_sscd(data, str(weights))
