"""Augmentation of a picture before it is cut into tiles, drawn anew each time it is read in training.

The usual pair for small photographs (as in He et al. 2015, section 4.2, who pad with black): a random crop of the
padded picture, and a random mirror image. A picture keeps its size.
"""

from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pad

from foundation.errors import UserError


@dataclass(frozen=True)
class PictureAugmentConfig:
    """Strength of each augmentation; the defaults do nothing.

    Attributes:
        max_shift: the picture moves left or right and up or down by up to this share of its side; below 1. What comes
            into view repeats the edge, so that a shift adds no border.
        mirror: whether half of the pictures are mirrored left to right. Not for data that name a side, or show text.
    """

    max_shift: float = 0.0
    mirror: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.max_shift < 1:
            raise UserError(f"max_shift is {self.max_shift}; it must be 0 or more and below 1")


def augment_picture(picture: Image.Image, config: PictureAugmentConfig, generator: torch.Generator) -> Image.Image:
    """A shifted and perhaps mirrored copy of an RGB picture, of the same size."""
    width, height = picture.size
    right, down = (_shift(side, config.max_shift, generator) for side in picture.size)
    padded = pad(picture, [max(right, 0), max(down, 0), max(-right, 0), max(-down, 0)], padding_mode="edge")
    x, y = max(-right, 0), max(-down, 0)
    augmented = padded.crop((x, y, x + width, y + height))
    if config.mirror and torch.rand((), generator=generator) < 0.5:
        augmented = ImageOps.mirror(augmented)
    return augmented


def _shift(side: int, max_shift: float, generator: torch.Generator) -> int:
    """A random number of pixels from -limit to limit, where the limit is a share of the side, rounded."""
    limit = round(max_shift * side)
    return int(torch.randint(-limit, limit + 1, (), generator=generator))
