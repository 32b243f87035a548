"""The edits that make canaries: COPIES of a picture, and IMPOSTORS, which resemble a picture and are no copy of it."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from data_prep.sources.files import png

TILES = 4  # of a shuffled picture, in each direction


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _scale(picture: Image.Image, scale: float) -> Image.Image:
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _crop(picture: Image.Image, share: float) -> Image.Image:
    """Removes a share of the width and height at each edge."""
    width, height = picture.size
    x, y = round(width * share), round(height * share)
    return picture.crop((x, y, width - x, height - y))


def _add_text(picture: Image.Image) -> Image.Image:
    """Adds a line of white text with a black outline, at the bottom over nearly the whole width."""
    picture, text = picture.copy(), "SAMPLE 2024"
    size = max(6, picture.width // 8)
    font = ImageFont.load_default(size)
    draw, center = ImageDraw.Draw(picture), (picture.width / 2, picture.height - size)
    draw.text(center, text, "white", font, anchor="mm", stroke_width=max(1, size // 12), stroke_fill="black")
    return picture


def _blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 100))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg quality 50": lambda picture: _jpeg(picture, 50),
    "jpeg quality 20": lambda picture: _jpeg(picture, 20),
    "half size": lambda picture: png(_scale(picture, 1 / 2)),
    "quarter size": lambda picture: png(_scale(picture, 1 / 4)),
    "cropped by 3%": lambda picture: png(_crop(picture, 0.03)),
    "cropped by 10%": lambda picture: png(_crop(picture, 0.1)),
    "flipped": lambda picture: png(ImageOps.mirror(picture)),
    "text over it": lambda picture: png(_add_text(picture)),
    "blurred": lambda picture: png(_blur(picture)),
    "brighter by 15%": lambda picture: png(ImageEnhance.Brightness(picture).enhance(1.15)),
    "half the colour": lambda picture: png(ImageEnhance.Color(picture).enhance(0.5)),
}


def shuffle_tiles(picture: Image.Image, other: Image.Image) -> Image.Image:
    """The tiles in another order, none at its old position: the same colours and textures, but no content."""
    width, height = picture.width // TILES, picture.height // TILES
    if not width or not height:
        return picture.resize((TILES, TILES)).rotate(180)
    order = np.random.default_rng(0).permutation(TILES**2)
    moved = Image.new("RGB", picture.size, "white")
    for target, tile in zip(order, np.roll(order, 1), strict=True):
        (y, x), (v, u) = divmod(int(target), TILES), divmod(int(tile), TILES)
        moved.paste(picture.crop((u * width, v * height, (u + 1) * width, (v + 1) * height)), (x * width, y * height))
    return moved


def transfer_colours(picture: Image.Image, other: Image.Image) -> Image.Image:
    """The other picture in this one's size, its colours shifted and scaled to this one's mean and deviation."""
    reference = np.asarray(picture, np.float64).reshape(-1, 3)
    pixels = np.asarray(other.resize(picture.size, Image.Resampling.BICUBIC), np.float64)
    flat = pixels.reshape(-1, 3)
    moved = (pixels - flat.mean(0)) / np.maximum(flat.std(0), 1) * reference.std(0) + reference.mean(0)
    return Image.fromarray(moved.clip(0, 255).round().astype(np.uint8))


# (picture, another picture of the pool) -> an imitation of the first
IMPOSTORS: dict[str, Callable[[Image.Image, Image.Image], Image.Image]] = {
    "its tiles shuffled": shuffle_tiles,
    "another with its colours": transfer_colours,
}
