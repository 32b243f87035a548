"""Raster pictures: the bytes of a file, an opened picture or an array -> a decoded image, turned as it is shown."""

import io
import threading
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, TiffImagePlugin

from foundation.errors import UserError
from foundation.png import ORIENTATION_KEYS, mend_png

# Formats that Pillow decodes by itself. EPS is excluded, because Ghostscript would run the program in the file.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
# First bytes of files that are often taken for pictures, and what they are.
OTHER_FILES = (
    (b"%PDF", "a PDF document"),
    (b"%!PS", "PostScript"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"8BPS", "a Photoshop picture: export it as PNG"),
    (b"\xff\x0a", "a JPEG XL picture: convert it to PNG or JPEG"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture: convert it to PNG or JPEG"),
    (b"\x1aE\xdf\xa3", "a film (Matroska or WebM)"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file with `git lfs pull`"),
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# What to do with an array of another type, by the kind of its dtype.
ARRAY_ADVICE = {
    "f": "where white is 1.0, give (array * 255).round().astype('uint8')",
    "b": "give array.astype('uint8') * 255",
    "u": "where white is 65535, give (array / 257).round().astype('uint8')",
}
_warnings_lock = threading.Lock()


def open_header(data: bytes, max_pixels: int, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Parse the header only.

    Raises:
        UserError: the image has over `max_pixels` pixels, or none of the formats, or a broken header.
    """
    Image.init()
    formats = [name for name in formats if name in Image.OPEN]
    # Pillow warns about large images and odd metadata; our limit and errors replace that. The list of warning filters
    # is global to the process, hence the lock.
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(mend_png(data)), formats=formats)
        except Image.UnidentifiedImageError:
            raise UserError(_why_unidentified(data, formats)) from None
        except Image.DecompressionBombError:
            raise UserError(f"over the limit of {max_pixels:,} pixels") from None
    _check_size(picture, max_pixels)
    return picture


def _check_size(picture: Image.Image, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise UserError(
            f"{width} x {height} = {width * height:,} pixels, over the limit of {max_pixels:,}; "
            "shrink the picture, or raise max_pixels if its source is trusted"
        )


def _why_unidentified(data: bytes, formats: Sequence[str]) -> str:
    """Why Pillow opens a file in none of the formats: it hides the errors of the one to which the file belongs."""
    for name in formats:
        factory, accepts = Image.OPEN[name]
        try:
            if accepts is None or accepts(data[:16]) is not True:  # TGA has no mark; a text says what is not installed
                continue
            factory(io.BytesIO(data), "")
        except Exception as error:
            return f"broken or truncated {name} picture ({type(error).__name__}: {error})"
    kind = next((kind for start, kind in OTHER_FILES if data.startswith(start)), None)
    if data[4:8] == b"ftyp":
        is_heif = data[8:12] in HEIF_BRANDS
        kind = "a HEIC picture: convert it to JPEG or PNG" if is_heif else "a film (MP4) or an AVIF of an odd brand"
    return f"not a picture in a known format ({', '.join(formats)}, SVG)" + (f"; it looks like {kind}" if kind else "")


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """A raster file's first frame, of any mode, turned as it is shown.

    Raises:
        UserError: as `open_header`, and of a PNG as `mend_png`. A broken file raises what Pillow raises.
    """
    return as_shown(open_header(data, max_pixels))


def decode_opened(picture: Image.Image, max_pixels: int) -> Image.Image:
    """A picture that the caller has opened or made with Pillow, of any mode, turned as it is shown; it stays unchanged.

    Raises:
        UserError: it was closed before its pixels were read, or they are not read yet and over `max_pixels`. A broken
            file raises what Pillow raises, and is closed: Pillow would give half a picture the next time.
    """
    if not getattr(picture, "tile", None):  # its pixels are there
        return as_shown(picture)
    file = getattr(picture, "fp", None)
    if file is None:
        raise UserError("it was closed before its pixels were read: call its load() while it is open")
    _check_size(picture, max_pixels)
    if isinstance(picture, PngImagePlugin.PngImageFile) and picture.tell() == 0:  # is mended on the file's bytes
        position = file.tell()
        file.seek(0)
        data = file.read()
        file.seek(position)
        return decode(data, max_pixels)
    try:
        return as_shown(picture)
    except Exception:
        picture.close()
        raise


def orientation_of(picture: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none, or it cannot be read."""
    if not any(key in picture.info for key in ORIENTATION_KEYS):  # Pillow would decode a PNG to look for more
        return 1
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def as_shown(picture: Image.Image) -> Image.Image:
    """A decoded copy, turned by its EXIF orientation; unreadable metadata leaves it as it is stored."""
    picture.load()
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shown = ImageOps.exif_transpose(picture)
        except Exception:
            shown = picture.copy()
    return Image.fromarray(65535 - np.asarray(shown)) if _is_16_bit_negative(picture) else shown


def _is_16_bit_negative(picture: Image.Image) -> bool:
    """Whether it is a TIFF of 16 bits in which 0 is white: Pillow inverts those of 8 bits only."""
    if not picture.mode.startswith("I;16") or not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return False
    return picture.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def from_array(array: np.ndarray) -> Image.Image:
    """Pixels [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA) of type uint8 -> an image.

    Raises:
        UserError: another shape or type; the message says how to convert it.
    """
    shape = " x ".join(map(str, array.shape))
    if array.dtype != np.uint8:
        advice = ARRAY_ADVICE.get(array.dtype.kind, "scale them to 0 to 255, and convert with .astype('uint8')")
        raise UserError(f"an array of type {array.dtype}: pixels are uint8, from 0 to 255; {advice}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        advice = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            advice = "; channels come last: give np.moveaxis(array, 0, -1)"
        elif array.ndim == 4:
            advice = "; give one picture at a time, array[0]"
        raise UserError(f"an array of {shape or 'no'} values: it must be height x width, with 3 or 4 channels{advice}")
    if not array.size:
        raise UserError(f"an array of {shape} values holds no pixels")
    return Image.fromarray(np.ascontiguousarray(array))


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: transparent parts on white, 16-bit and float values scaled to 8 bits."""
    picture = _to_8_bit(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def to_rgba(picture: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGBA, as `to_rgb` but with its transparency."""
    picture = _to_8_bit(picture)
    return picture.convert("RGBA") if picture.has_transparency_data else to_rgb(picture).convert("RGBA")


def _to_8_bit(picture: Image.Image) -> Image.Image:
    """An image of 8 bits that Pillow can convert; one of more bits as L, or LA where a grey value is transparent.

    Integers within 0..65535 count as 16-bit and floats within 0..1 as full range. Other values are scaled from their
    minimum and maximum, because the file does not define white.
    """
    if not picture.mode.startswith("I;16") and picture.mode not in ("I", "F"):
        return picture.convert("LA") if picture.mode == "La" else picture  # Pillow converts La to nothing else
    pixels = np.asarray(picture)
    white = 1.0 if pixels.dtype.kind == "f" else 65535.0
    values = np.nan_to_num(pixels.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > white:
        values, white = values - low, max(high - low, 1e-30)
    grey = Image.fromarray(np.round(values * (255.0 / white)).astype(np.uint8))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return grey
