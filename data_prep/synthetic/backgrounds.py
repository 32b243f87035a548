"""Backgrounds of drawn clips: plain colours, gradients and simple textures, each with an index."""

import numpy as np
from PIL import Image

NUM_BACKGROUNDS = 3000


def background(index: int, size: int) -> np.ndarray:
    """The background of an index, uint8 [size, size, 3]: the same on every machine, different for each index.

    Kinds take turns (plain, gradient, stripes, checks, dots, clouds); colours and scales are random.
    """
    rng = np.random.default_rng((20_24, index))
    first = rng.uniform(110, 250, 3)
    second = np.clip(first + rng.uniform(-50, 50, 3), 60, 255)
    y, x = np.mgrid[0:size, 0:size] / size  # [0, 1)
    angle, scale, shift = rng.uniform(0, 2 * np.pi), rng.integers(3, 8), rng.uniform(0, 1)
    along = x * np.cos(angle) + y * np.sin(angle)
    match index % 6:
        case 0:
            share = np.zeros_like(x)
        case 1:
            share = (along - along.min()) / np.ptp(along)
        case 2:
            share = (along * scale + shift) % 1 < 0.5
        case 3:
            share = ((x * scale + shift).astype(int) + (y * scale + shift).astype(int)) % 2
        case 4:
            share = ((x * scale + shift) % 1 - 0.5) ** 2 + ((y * scale + shift) % 1 - 0.5) ** 2 < 0.07
        case _:
            coarse = Image.fromarray(rng.integers(0, 256, (int(scale), int(scale)), dtype=np.uint8))
            share = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    share = np.asarray(share, np.float64)[..., None]
    return np.round(first * (1 - share) + second * share).astype(np.uint8)
