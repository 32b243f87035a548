"""Read any image file safely as RGB; the first step of everything that starts from an image.

The caller gets a decoded `PIL.Image` in mode RGB, or a `UserError` that names the file and the reason. Sizes are
checked before anything is decoded, and an SVG cannot load anything from outside its file.
"""

import base64
import gzip
import io
import re
import threading
import urllib.parse
import warnings
import xml.parsers.expat
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from foundation.errors import UserError
from foundation.extras import MissingExtraError, import_extra

MAX_PIXELS = 2**26  # 67 million, e.g. 8192 x 8192: about 200 MB once decoded
MAX_SVG_BYTES = 2**24
MAX_SVG_DEPTH = 100  # deeply nested files overflow the renderer's stack
MAX_SVG_ELEMENTS = 500_000  # with all references expanded: ten nested levels of ten <use> each are 10**10 elements

# Formats that Pillow decodes by itself. EPS is excluded, because Ghostscript would run the program in the file.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
_EMBEDDED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # formats that the SVG renderer decodes
_warnings_lock = threading.Lock()


def read_picture(
    source: str | Path | bytes, max_pixels: int = MAX_PIXELS, svg_size: int = 672, svg_fonts: bool = True
) -> Image.Image:
    """Read any image file as RGB.

    Transparent parts are composited on white. EXIF orientation is applied. An animation gives its first frame. 16-bit
    grey is scaled to 8 bits, not clipped. SVG is rendered on white, with its aspect ratio.

    Args:
        source: a path, or the file's bytes.
        max_pixels: refuse images with more pixels; the header is checked before decoding.
        svg_size: long side of a rendered SVG in pixels; 672 is the resolution of four tiles of 336.
        svg_fonts: draw an SVG's text with the fonts of this machine. Without it, text is left out, and the result is
            the same on every machine.

    Returns:
        a decoded image in mode RGB, independent of the file.

    Raises:
        UserError: the file is missing, empty, truncated, too large or unreadable; the message names it and the reason.
        MissingExtraError: the file is an SVG, and its renderer is not installed.
    """
    return _read(source, max_pixels, svg_size, svg_fonts, cutout=False)


def read_rgba(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, svg_size: int = 672) -> Image.Image:
    """Read an image file as RGBA, with its transparency and without an SVG's text; otherwise like `read_picture`."""
    return _read(source, max_pixels, svg_size, svg_fonts=False, cutout=True)


def count_frames(data: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """Number of frames in an image file, from its header; `read_picture` reads the first."""
    return getattr(_open(data, max_pixels), "n_frames", 1)


def _read(source: str | Path | bytes, max_pixels: int, svg_size: int, svg_fonts: bool, cutout: bool) -> Image.Image:
    name = "picture" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read_file(Path(source))
    if not data:
        raise UserError(f"{name}: the file is empty (0 bytes)")
    try:
        if _looks_like_svg(data):
            picture = _render_svg(data, max_pixels, svg_size, svg_fonts, background=None if cutout else "#ffffff")
        else:
            picture = _decode(data, max_pixels)
        if cutout and picture.has_transparency_data:
            return picture.convert("RGBA")
        return to_rgb(picture).convert("RGBA") if cutout else to_rgb(picture)
    except MissingExtraError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{name}: not enough memory to decode this picture; lower max_pixels to refuse it") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on broken files
        raise UserError(f"{name}: broken or truncated picture ({type(error).__name__}: {error})") from error


def _read_file(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the path of a picture file")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


# ------------------------------------------------------------------------------------------------------ raster images


def _open(data: bytes, max_pixels: int, formats: Sequence[str] = _FORMATS) -> Image.Image:
    """Parse the header only, and refuse images over the limit."""
    Image.init()
    formats = [name for name in formats if name in Image.OPEN]
    # Pillow warns about large images and odd metadata; our limit and errors replace that. The list of warning filters
    # is global to the process, hence the lock.
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(data), formats=formats)
        except Image.UnidentifiedImageError:
            raise UserError(f"not a picture in a known format ({', '.join(formats)}, SVG)") from None
        except Image.DecompressionBombError:
            raise UserError(f"over the limit of {max_pixels:,} pixels") from None
    width, height = picture.size
    if width * height > max_pixels:
        raise UserError(
            f"{width} x {height} = {width * height:,} pixels, over the limit of {max_pixels:,}; "
            "shrink the picture, or raise max_pixels if its source is trusted"
        )
    return picture


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    picture = _open(data, max_pixels)
    picture.load()
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ImageOps.exif_transpose(picture)
        except Exception:  # unreadable metadata: the orientation is left as stored
            return picture.copy()


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: transparent parts on white, 16-bit and float values scaled to 8 bits."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        return Image.fromarray(_to_8_bit(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data or picture.mode in ("La", "RGBa"):
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Grey values of any depth [H, W] -> uint8 [H, W].

    Integers within 0..65535 count as 16-bit and floats within 0..1 as full range. Other values are scaled from their
    minimum and maximum, because the file does not define white.
    """
    white = 1.0 if pixels.dtype.kind == "f" else 65535.0
    values = np.nan_to_num(pixels.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > white:
        values, white = values - low, max(high - low, 1e-30)
    return np.round(values * (255.0 / white)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------- SVG


def _looks_like_svg(data: bytes) -> bool:
    if data[:2] == b"\x1f\x8b":  # .svgz; no raster format starts with gzip's magic number
        return True
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        data = data.decode("utf-16", errors="ignore").encode()
    return data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<"


def _svg_text(data: bytes) -> str:
    """The file's bytes as text: unzipped, and decoded from the encoding that it declares (UTF-8 by default)."""
    if data[:2] == b"\x1f\x8b":
        with gzip.open(io.BytesIO(data)) as file:
            data = file.read(MAX_SVG_BYTES + 1)
    if len(data) > MAX_SVG_BYTES:
        raise UserError(f"SVG over the limit of {MAX_SVG_BYTES:,} bytes")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    declared = re.match(rb"<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)", data)
    try:
        return data.decode(declared.group(1).decode() if declared else "utf-8-sig")
    except (LookupError, UnicodeDecodeError) as error:
        raise UserError(f"SVG is not in the text encoding it declares ({error})") from None


def _render_svg(data: bytes, max_pixels: int, svg_size: int, svg_fonts: bool, background: str | None) -> Image.Image:
    if not 1 <= svg_size**2 <= max_pixels:
        raise UserError(f"svg_size {svg_size} is not within 1 and {int(max_pixels**0.5)}, the side of max_pixels")
    text = _svg_text(data)
    has_text = _check_svg(text, max_pixels)
    resvg_py = import_extra("resvg_py", "demo", "SVG")
    # The image is fitted into width x height. Fonts are only searched, which is slow, if there is text.
    png = resvg_py.svg_to_bytes(
        svg_string=text,
        background=background,
        width=svg_size,
        height=svg_size,
        dpi=96.0,
        skip_system_fonts=not (svg_fonts and has_text),
    )
    return _decode(bytes(png), max_pixels)


def _check_svg(text: str, max_pixels: int) -> bool:
    """Refuse what would make the renderer load other files, overflow its stack, or run without end.

    Returns:
        whether the file holds text, which needs fonts.
    """
    names: list[str] = []  # local names of the elements, in document order
    ends: list[int] = []  # element i contains the elements [i, ends[i])
    depths: list[int] = []
    references: list[tuple[int, str]] = []  # (element, id of the element that it draws)
    ids: dict[str, int] = {}
    open_elements: list[int] = []
    embedded = 0  # pixels of embedded images

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal embedded
        index, local = len(names), name.rpartition(":")[2]
        if not names and local != "svg":
            raise UserError(f"not a picture: its first element is <{local}>, not <svg>")
        names.append(local)
        ends.append(index + 1)
        depths.append(len(open_elements) + 1)
        open_elements.append(index)
        if len(open_elements) > MAX_SVG_DEPTH:
            raise UserError(f"SVG nests its elements over {MAX_SVG_DEPTH} deep")
        if len(attributes.get("numOctaves", "").strip()) > 2:  # the cost grows per octave; 8 bits show about 8
            raise UserError(f"SVG asks for {attributes['numOctaves'][:20]} octaves of turbulence; the limit is 99")
        ids.setdefault(attributes.get("id", ""), index)
        for key, value in attributes.items():
            if key.rpartition(":")[2] == "href" and local != "a":
                embedded += _check_link(value.strip(), local, max_pixels)
                if embedded > max_pixels:
                    raise UserError(f"SVG holds pictures of {embedded:,} pixels, over the limit of {max_pixels:,}")
                references.extend((index, value.strip()[1:]) for _ in range(local == "use"))
            references.extend((index, target) for target in re.findall(r"url\(\s*[\"']?#([^\"')\s]+)", value))

    def end(_: str) -> None:
        ends[open_elements.pop()] = len(names)

    parser = xml.parsers.expat.ParserCreate("utf-8")  # whatever the file declares: it is decoded already
    parser.StartElementHandler, parser.EndElementHandler = start, end
    try:
        parser.Parse(text.encode(), True)
    except xml.parsers.expat.ExpatError as error:
        raise UserError(f"broken or truncated SVG ({error})") from None
    _check_expansion(ends, depths, references, ids)
    return "text" in names


def _check_link(link: str, element: str, max_pixels: int) -> int:
    """Check a link: it may name an element of the same file or contain a raster image as data, nothing else.

    Some programs write embedded images without a type ("data:;base64,..."). The renderer then looks at the first bytes,
    and renders unknown data as another SVG, so only formats that it knows are allowed.

    Returns:
        pixels of the embedded image; 0 if there is none.
    """
    if link.startswith("#") or not link:
        return 0
    embedded = re.match(r"data:(?:image/(?:png|jpe?g|gif|webp))?\s*(;[^,]*)?,", link)
    if not embedded:
        raise UserError(f"SVG would load {link[:60]!r} in <{element}>; only raster images inside the file are allowed")
    data = urllib.parse.unquote_to_bytes(link[embedded.end() :])
    if (embedded.group(1) or "").rstrip().lower().endswith(";base64"):
        try:
            data = base64.b64decode(b"".join(data.split()), validate=True)
        except ValueError:
            raise UserError(f"SVG has broken base64 data in <{element}>") from None
    width, height = _open(data, max_pixels, _EMBEDDED_FORMATS).size
    return width * height


def _check_expansion(
    ends: list[int], depths: list[int], references: list[tuple[int, str]], ids: dict[str, int]
) -> None:
    """Check the number of elements and their depth with every reference replaced by the element that it draws."""
    sizes: dict[int, tuple[int, int]] = {}  # element -> (elements, depth), with references expanded
    starts = [element for element, _ in references]  # ascending: references are in document order

    def expand(element: int, chain: int) -> tuple[int, int]:
        if element in sizes:
            return sizes[element]
        if chain > MAX_SVG_DEPTH:
            raise UserError(f"SVG chains its references over {MAX_SVG_DEPTH} deep")
        sizes[element] = (0, 0)  # the renderer draws nothing for a cycle
        size = ends[element] - element
        depth = max(depths[element : ends[element]]) - depths[element] + 1
        for index in range(bisect_left(starts, element), bisect_left(starts, ends[element])):
            source, target = references[index]
            if target in ids:
                inner_size, inner_depth = expand(ids[target], chain + 1)
                size += inner_size
                depth = max(depth, depths[source] - depths[element] + 1 + inner_depth)
        if size > MAX_SVG_ELEMENTS:
            raise UserError(f"SVG draws over {MAX_SVG_ELEMENTS:,} elements with its references expanded")
        if depth > MAX_SVG_DEPTH:
            raise UserError(f"SVG nests its elements over {MAX_SVG_DEPTH} deep with its references expanded")
        sizes[element] = (size, depth)
        return size, depth

    if ends:
        expand(0, 0)
