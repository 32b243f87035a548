"""Read any picture safely as RGB; the first step of everything that starts from an image.

The caller gets a decoded `PIL.Image` in mode RGB, or a `UserError` that names the file and the reason. Sizes are
checked before anything is decoded (`raster.py`), and an SVG cannot load anything from outside its file (`svg.py`).
"""

import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from foundation.errors import UserError
from foundation.extras import MissingExtraError
from vision.raster import decode, decode_opened, from_array, open_header, to_rgb, to_rgba
from vision.svg import looks_like_svg, render_svg

MAX_PIXELS = 2**26  # 67 million, e.g. 8192 x 8192: about 200 MB once decoded

PictureSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray


def read_picture(
    source: PictureSource, max_pixels: int = MAX_PIXELS, svg_size: int = 672, svg_fonts: bool = True
) -> Image.Image:
    """Read any picture as RGB.

    Transparent parts are composited on white. EXIF orientation is applied. An animation gives its first frame. 16-bit
    grey is scaled to 8 bits, not clipped. SVG is rendered on white, with its aspect ratio. Colour profiles are not
    applied. A PNG's damaged or large metadata does not matter, as long as what decides the pixels is intact.

    Args:
        source: a path, the file's bytes, a file opened in binary mode, which is read from its start, an image of
            Pillow, which stays unchanged and of whose frames the current one is read, or uint8 pixels as an array
            [H, W] (grey), [H, W, 3] (RGB) or [H, W, 4] (RGBA).
        max_pixels: refuse files with more pixels; the header is checked before decoding.
        svg_size: long side of a rendered SVG in pixels; 672 is the resolution of four tiles of 336.
        svg_fonts: draw an SVG's text with the fonts of this machine. Without it, text is left out, and the result is
            the same on every machine.

    Returns:
        a decoded image in mode RGB, independent of the source.

    Raises:
        UserError: the file is missing, empty, truncated, too large or unreadable, or the array has another type or
            shape; the message names the file and the reason.
        MissingExtraError: the file is an SVG, and its renderer is not installed.
    """
    return _read(source, max_pixels, svg_size, svg_fonts, cutout=False)


def read_rgba(source: PictureSource, max_pixels: int = MAX_PIXELS, svg_size: int = 672) -> Image.Image:
    """Read a picture as RGBA, with its transparency and without an SVG's text; otherwise like `read_picture`."""
    return _read(source, max_pixels, svg_size, svg_fonts=False, cutout=True)


def count_frames(data: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """Number of frames in an image file, from its header; `read_picture` reads the first."""
    return getattr(open_header(data, max_pixels), "n_frames", 1)


def _read(source: Any, max_pixels: int, svg_size: int, svg_fonts: bool, cutout: bool) -> Image.Image:
    name = _name(source)
    try:
        if isinstance(source, np.ndarray):
            picture = from_array(source)
        elif isinstance(source, Image.Image):
            picture = decode_opened(source, max_pixels)
        else:
            data = _bytes_of(source)
            if not data:
                raise UserError("the file is empty (0 bytes)")
            if looks_like_svg(data):
                picture = render_svg(data, max_pixels, svg_size, svg_fonts, background=None if cutout else "#ffffff")
            else:
                picture = decode(data, max_pixels)
        return to_rgba(picture) if cutout else to_rgb(picture)
    except MissingExtraError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{name}: not enough memory to decode this picture; lower max_pixels to refuse it") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on broken files
        raise UserError(f"{name}: broken or truncated picture ({type(error).__name__}: {error})") from error


def _name(source: Any) -> str:
    """What errors call a source: its path, where it has one."""
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "")
    elif hasattr(source, "read"):
        source = getattr(source, "name", "")
    if not isinstance(source, str | os.PathLike) or not (text := str(source)):
        return "picture"
    return text if len(text) <= 300 else f"{text[:297]}..."


def _bytes_of(source: Any) -> bytes:
    """The bytes of a file given by its path, as bytes, or opened."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        return _read_path(source)
    if not hasattr(source, "read"):
        raise UserError(
            f"cannot be read from {type(source).__name__}: give a path, the file's bytes, a file opened in binary "
            "mode, an image of Pillow, or a uint8 array of height x width x 3"
        )
    try:
        if getattr(source, "seekable", bool)():
            source.seek(0)
        data = source.read()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"the open file cannot be read ({error})") from error
    if not isinstance(data, bytes):
        raise UserError(f"the open file gives {type(data).__name__}: open it in binary mode, 'rb'")
    return data


def _read_path(source: str | os.PathLike[str]) -> bytes:
    path = Path(source)
    try:
        if path.is_dir():
            raise UserError("is a folder; give the path of a picture file")
        if path.exists() and not path.is_file():
            raise UserError("is not a regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", str(source))
        if scheme and scheme[1].lower() in ("http", "https", "ftp", "file", "s3", "gs", "data"):
            raise UserError(
                f"is a {scheme[1]} URL, and pictures are read from files: "
                + ("decode it, and give the bytes" if scheme[1] == "data" else "download it, and give the file's path")
            ) from None
        if isinstance(error, FileNotFoundError):
            raise UserError("no such file") from None
        raise UserError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
