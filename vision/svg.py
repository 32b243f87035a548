"""SVG drawings: checked, so that they load no other file and end, and rendered with resvg."""

import base64
import gzip
import io
import re
import urllib.parse
import xml.parsers.expat
from bisect import bisect_left

from PIL import Image

from foundation.errors import UserError
from foundation.extras import import_extra
from vision.raster import decode, open_header

MAX_SVG_BYTES = 2**24
MAX_SVG_DEPTH = 100  # deeply nested files overflow the renderer's stack
MAX_SVG_ELEMENTS = 500_000  # with all references expanded: ten nested levels of ten <use> each are 10**10 elements
EMBEDDED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # formats that the SVG renderer decodes


def looks_like_svg(data: bytes) -> bool:
    """Whether a file is text that begins like XML, or compressed; `render_svg` says what is wrong with it."""
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


def render_svg(data: bytes, max_pixels: int, svg_size: int, svg_fonts: bool, background: str | None) -> Image.Image:
    """An SVG file as an image, fitted into a square of `svg_size` pixels.

    Args:
        svg_fonts: whether its text is drawn, with the fonts of this machine.
        background: "#rrggbb"; None leaves it transparent.

    Raises:
        UserError: the file is broken, too large, or would load another file.
        MissingExtraError: the renderer is not installed.
    """
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
    return decode(bytes(png), max_pixels)


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
    width, height = open_header(data, max_pixels, EMBEDDED_FORMATS).size
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
