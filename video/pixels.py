"""From decoded frames to RGB pixels as they should be shown: over white, with square pixels, upright.

Interlaced frames stay as they are: the lines of both fields together, one frame for two fields. Models see frames that
are made smaller, which mixes the two fields' lines.
"""

from typing import Any

import numpy as np
from PIL import Image

from foundation.errors import UserError
from foundation.extras import import_extra
from vision.reading import to_rgb

STRANGEST_SHAPE = 8.0  # of a pixel, width over height or the reverse; beyond, the file's value is taken for a mistake


class ToRGB:
    """Converts decoded frames to RGB of one size; transparent parts are drawn over white.

    Args:
        width, height: of the result; frames of another size, in a film whose size changes, are resized.
        has_alpha: whether the frames' alpha channel counts.
    """

    def __init__(self, width: int, height: int, has_alpha: bool) -> None:
        av = import_extra("av", "video", "video")
        self.error = av.error.FFmpegError
        self.bilinear = av.video.reformatter.Interpolation.BILINEAR  # how decord upsamples chroma
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.size = width, height
        self.has_alpha = has_alpha

    def __call__(self, frame: Any) -> np.ndarray:
        """A frame of PyAV -> uint8 [H, W, 3]."""
        form = "rgba" if self.has_alpha else "rgb24"
        try:
            converted = self.reformatter.reformat(frame, *self.size, form, interpolation=self.bilinear, threads=1)
        except self.error as error:
            raise UserError(
                f"its colours ({frame.format.name}) cannot be converted to RGB ({error.strerror})"
            ) from None
        pixels = converted.to_ndarray()
        return np.asarray(to_rgb(Image.fromarray(pixels))) if self.has_alpha else pixels


def square_width(width: int, pixel_shape: float) -> int:
    """The width in square pixels of a frame whose pixels are `pixel_shape` times as wide as high.

    >>> square_width(720, 16 / 15)
    768
    """
    if not 1 / STRANGEST_SHAPE <= pixel_shape <= STRANGEST_SHAPE:
        return width
    return max(1, round(width * pixel_shape))


def show(pixels: np.ndarray, width: int, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Frames as they should be shown.

    Args:
        pixels: uint8 [F, H, W, 3], as decoded.
        width: of the frames in square pixels; the height stays.
        matrix: (a, b, c, d) of the display matrix, which rotates and mirrors: x' = a x + c y, y' = b x + d y.
    """
    if width != pixels.shape[2]:
        wide = np.empty((*pixels.shape[:2], width, 3), np.uint8)
        for target, frame in zip(wide, pixels, strict=True):
            target[:] = Image.fromarray(frame).resize((width, frame.shape[0]), Image.Resampling.BICUBIC)
        pixels = wide
    a, b, c, d = matrix
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(1, 2), c, b
    pixels = pixels[:, :, ::-1] if a < 0 else pixels
    pixels = pixels[:, ::-1] if d < 0 else pixels
    return np.ascontiguousarray(pixels)
