"""Picture embedders: the cosine of two vectors is the similarity by which near duplicates are found.

There are two: SSCD, a trained network whose weights the user provides, and low frequencies, without weights, for first
runs and tests. Similarities of different embedders cannot be compared, so each has a calibrated threshold of its own.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from foundation.errors import UserError
from foundation.hashing import file_sha256

if TYPE_CHECKING:
    from torch import nn


class ImageEmbedder(Protocol):
    """Attributes:
    id: of the embedder and its weights; vectors of one id can be compared.
    dim: length of a vector.
    preprocess_id: of the preprocessing of pictures.
    threshold: the lowest similarity of near duplicates.
    floor: the lowest similarity that is stored, for lower thresholds later.
    """

    @property
    def id(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def preprocess_id(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    @property
    def floor(self) -> float: ...

    def embed(self, picture: Image.Image) -> np.ndarray:
        """The vector of an RGB picture, float32 [dim], of unit length, equal to the bit on one kind of machine."""
        ...


@dataclass(frozen=True)
class LowFrequencies:
    """The lowest frequencies of brightness and colour (a DCT of 64 x 64 pixels); needs no weights.

    The vector holds the signed square roots of the coefficients. Otherwise the two or three largest ones, which all
    pictures on white share, would outweigh the rest. Copies that are recompressed, scaled or brightened are found,
    some of those that are cropped, and none that are flipped or have an overlay. Pictures of one template (an emoji in
    several skin tones) count as near duplicates.

    Calibration of the threshold 0.85 on 296 pictures of OpenMoji and openclipart: it finds all copies of JPEG quality
    30, of half size or 10% brighter, and 77% of those cropped by 3% at each side. Of the 43,660 pairs of different
    pictures, 74 are above it, all of them of one template.
    """

    id = "low-frequencies-1"
    dim = 512
    preprocess_id = "ycbcr-box-64"
    threshold = 0.85
    floor = 0.7

    def embed(self, picture: Image.Image) -> np.ndarray:
        small = picture.convert("YCbCr").resize((_SIDE, _SIDE), Image.Resampling.BOX)
        pixels = np.asarray(small, np.float64) - 128
        # einsum without BLAS adds in a fixed order, whatever the number of cores
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
    """The published `sscd_disc_mixup` (arXiv 2202.10261), from a file that the user provides.

    The threshold is the published one: on DISC, 90% of the pairs above it are copies.

    Attributes:
        weights: `sscd_disc_mixup.torchvision.pt`, or its tensors as safetensors.
        sha256: of the file.
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
        embedder = cls(weights, _sha256(weights))
        embedder._model()
        return embedder

    @property
    def id(self) -> str:
        return f"sscd_disc_mixup-{self.sha256}"

    def embed(self, picture: Image.Image) -> np.ndarray:
        from data_prep.steps.deduplication.sscd import compute_descriptor

        return compute_descriptor(self._model(), picture)

    def _model(self) -> "nn.Module":
        return _load(self.weights, self.sha256)


_SIDE, _WAVES = 64, 32  # px; frequencies in each direction
_LUMINANCE, _CHROMA = 192, 160  # coefficients of brightness, and of each of the two colour differences
_CHROMA_WEIGHT = 2.0  # colour differences are small compared with brightness


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


def _sha256(weights: Path) -> str:
    try:
        return file_sha256(weights)
    except OSError as error:
        raise UserError(f"{weights}: the weights of SSCD cannot be read ({error.strerror})") from None


@cache
def _load(weights: Path, sha256: str) -> "nn.Module":
    from data_prep.steps.deduplication.sscd import load_sscd  # importing torch takes seconds

    if _sha256(weights) != sha256:
        raise UserError(f"{weights}: has changed since the run began; start it again")
    return load_sscd(weights.read_bytes(), str(weights))
