"""Tiling: an image becomes up to four tiles on one of eight canvases (paper §7.2, Llama 3.2 reference).

PIL image -> choose a canvas -> resize, keeping the aspect ratio -> pad with black -> split into square tiles.
Pixels stay uint8; the encoder scales and normalises them on its device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from foundation.errors import UserError
from vision.raster import orientation_of
from vision.reading import read_picture

# (rows, cols) of tiles. A canvas's id is its index in this tuple plus 1; id 0 means "no image".
CANVASES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
MAX_TILES = 4


@dataclass(frozen=True)
class Tiles:
    """One image as tiles.

    Attributes:
        pixels: uint8 [K, 3, S, S], row by row over the grid.
        grid: (rows, cols), with rows * cols = K.
    """

    pixels: Tensor
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        rows, cols = self.grid
        if self.grid not in CANVASES:
            raise UserError(f"grid {self.grid} is not one of the canvases {CANVASES}")
        shape = tuple(self.pixels.shape)
        if len(shape) != 4 or shape[:2] != (rows * cols, 3) or shape[2] != shape[3] or self.pixels.dtype != torch.uint8:
            raise UserError(
                f"pixels are {self.pixels.dtype} {list(shape)}; a grid of {rows} x {cols} needs torch.uint8 "
                f"[{rows * cols}, 3, S, S]"
            )

    @property
    def num_tiles(self) -> int:
        return self.pixels.shape[0]

    @property
    def canvas_id(self) -> int:
        return CANVASES.index(self.grid) + 1

    def to(self, device: torch.device | str) -> "Tiles":
        return Tiles(self.pixels.to(device, non_blocking=True), self.grid)


def choose_canvas(width: int, height: int, tile_size: int, max_tiles: int = MAX_TILES) -> tuple[int, int]:
    """The canvas (rows, cols) on which an image loses the least resolution.

    It is the one with the smallest scale >= 1 at which the image fills it, else the one with the largest scale below
    1; of several, the smallest canvas.

    Example: at 336 px a 600 x 400 image fits (2, 2) at scale 1.12 and would shrink on every other canvas.
    """
    canvases = [(rows, cols) for rows, cols in CANVASES if rows * cols <= max_tiles]
    scales = {(r, c): min(c * tile_size / width, r * tile_size / height) for r, c in canvases}
    enlarging = [scale for scale in scales.values() if scale >= 1]
    best = min(enlarging) if enlarging else max(scales.values())
    return min((canvas for canvas in canvases if scales[canvas] == best), key=lambda canvas: canvas[0] * canvas[1])


def fit_size(width: int, height: int, grid: tuple[int, int], tile_size: int) -> tuple[int, int]:
    """The (width, height) to which an image is resized on a canvas; no side grows beyond max(side, tile_size).

    The aspect ratio is kept: one side sets the scale, and the other is rounded down to at least 1.
    """
    target_width = min(max(width, tile_size), grid[1] * tile_size)
    target_height = min(max(height, tile_size), grid[0] * tile_size)
    scale_w, scale_h = target_width / width, target_height / height
    if scale_w < scale_h:
        return target_width, max(1, min(int(height * scale_w), target_height))
    return max(1, min(int(width * scale_h), target_width)), target_height


def tile_image(image: Image.Image, tile_size: int, max_tiles: int = MAX_TILES) -> Tiles:
    """Cut an image into tiles.

    Args:
        image: a PIL image in mode RGB, such as `vision.reading.read_picture` returns. An opened one is turned by its
            EXIF orientation.
        tile_size: side of a tile in pixels.
        max_tiles: 1 to 4; canvases with more tiles are not considered.

    Raises:
        UserError: another mode than RGB, a number out of range, or an opened image that is truncated.
    """
    if image.mode != "RGB":
        raise UserError(f"the image has mode {image.mode}; convert it to RGB (vision.reading.read_picture does)")
    if not 1 <= max_tiles <= MAX_TILES:
        raise UserError(f"max_tiles is {max_tiles}; it can be 1 to {MAX_TILES}")
    if tile_size < 1:
        raise UserError(f"tile_size is {tile_size}; it must be at least 1")
    if getattr(image, "tile", None) or orientation_of(image) != 1:  # its pixels are not read yet, or not turned
        image = read_picture(image)
    grid = choose_canvas(image.width, image.height, tile_size, max_tiles)
    width, height = fit_size(image.width, image.height, grid, tile_size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if (width, height) != image.size:
        pixels = resize(pixels, height, width)
    canvas = torch.zeros(3, grid[0] * tile_size, grid[1] * tile_size, dtype=torch.uint8)
    canvas[:, :height, :width] = pixels
    return Tiles(split_tiles(canvas, grid), grid)


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3, H, W] -> [3, height, width], bilinear with antialiasing.

    Equal to `torchvision.transforms.v2.functional.resize` to the bit, without its import, which takes over a second.
    """
    native = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # then PyTorch resizes uint8 itself
    image = pixels[None] if native else pixels[None].float()
    resized = F.interpolate(image, size=(height, width), mode="bilinear", align_corners=False, antialias=True)[0]
    return resized if native else resized.round_().to(torch.uint8)


def split_tiles(canvas: Tensor, grid: tuple[int, int]) -> Tensor:
    """[3, rows * S, cols * S] -> [rows * cols, 3, S, S], row by row."""
    rows, cols = grid
    tiles = canvas.unflatten(1, (rows, -1)).unflatten(3, (cols, -1))  # [3, rows, S, cols, S]
    return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1).contiguous()
