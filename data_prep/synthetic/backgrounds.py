"""Still backgrounds for drawn clips: plain colours, gradients and simple textures, each known by a number."""

import numpy as np
from PIL import Image

NUM_BACKGROUNDS = 3000


def background(number: int, size: int) -> np.ndarray:
    """The picture of that number, uint8 [size, size, 3]: the same on every machine, no two numbers' alike.

    Kinds follow one another (plain, gradient, stripes, checks, dots, clouds); colours and scales are drawn.
    """
    rng = np.random.default_rng((20_24, number))
    one = rng.uniform(110, 250, 3)
    other = np.clip(one + rng.uniform(-50, 50, 3), 60, 255)
    y, x = np.mgrid[0:size, 0:size] / size  # [0, 1)
    angle, scale, shift = rng.uniform(0, 2 * np.pi), rng.integers(3, 8), rng.uniform(0, 1)
    along = x * np.cos(angle) + y * np.sin(angle)
    match number % 6:
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
    return np.round(one * (1 - share) + other * share).astype(np.uint8)
