"""Random pictures: read as other decoders do (Pillow with its own `exif_transpose`, and resvg's PNG decoder)."""

import base64
import io
import zlib

import numpy as np
import pytest
import resvg_py
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from foundation.errors import UserError
from foundation.png import mend_png, plain_size
from shards.format import Record, index_row
from tests.vision.pictures import chunk, insert, random_png
from vision.reading import read_picture

pytestmark = pytest.mark.fuzz

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA", "L"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "TGA": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
}
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
SIZES = st.tuples(st.integers(1, 20), st.integers(1, 20))
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def pillow_files(draw):
    """(format, file): noise in a mode of the format, with an orientation and transparency where it holds them."""
    form = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[form]))
    width, height = draw(SIZES)
    rng = np.random.default_rng(draw(SEEDS))
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    elif mode == "1":
        picture = Image.fromarray(rng.integers(0, 2, (height, width), dtype=np.uint8) * 255).convert("1")
    else:
        channels = len(Image.new(mode, (1, 1)).getbands())
        values = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        picture = Image.frombytes(mode, (width, height), values.tobytes())
    options = {}
    if mode == "P":
        num_colours = draw(st.sampled_from((1, 2, 3, 16, 200, 256)))
        picture = picture.point([value % num_colours for value in range(256)])
        picture.putpalette(rng.bytes(3 * num_colours))
    if form == "JPEG":
        options |= {"progressive": draw(st.booleans()), "subsampling": draw(st.integers(0, 2))}
    if form == "TIFF":
        options["compression"] = draw(st.sampled_from((None, "tiff_deflate", "tiff_lzw", "packbits")))
    if form in ("PNG", "GIF") and mode in ("P", "L", "RGB") and draw(st.booleans()):
        colours = {"P": int(rng.integers(256)), "L": int(rng.integers(256)), "RGB": tuple(rng.bytes(3))}
        options["transparency"] = colours[mode] if form == "PNG" else colours["P"]
        if mode == "P" and form == "PNG" and draw(st.booleans()):
            options["transparency"] = rng.integers(0, 256, 256, dtype=np.uint8).tobytes()
    if form in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF"):
        orientation, in_xmp = draw(st.sampled_from((None, *range(10)))), form != "TIFF" and draw(st.booleans())
        if orientation is not None and in_xmp:
            text = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
            options["xmp"] = text.encode()
            if form == "PNG":
                options["pnginfo"] = PngImagePlugin.PngInfo()
                options["pnginfo"].add_itxt("XML:com.adobe.xmp", text, zip=draw(st.booleans()))
        elif orientation is not None:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = orientation
            if orientation not in range(1, 9):
                options.pop("compression", None)  # libtiff writes no such orientation
    out = io.BytesIO()
    picture.save(out, form, **options)
    return form, out.getvalue()


def on_white(picture):
    """Pillow's own way: turned by its orientation, pasted on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "I;16":
        return np.round(np.asarray(picture) / 257.0)[:, :, None].repeat(3, 2)
    rgba = picture.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(white).astype(float)


def close(one, other):
    one, other = np.asarray(one).astype(float), np.asarray(other).astype(float)
    return one.shape == other.shape and np.abs(one - other).max() <= 1  # rounding of alpha and of 16 bits


@given(pillow_files())
def test_pictures_equal_pillows(case):
    form, data = case
    expected = on_white(Image.open(io.BytesIO(data)))
    opened = Image.open(io.BytesIO(data))
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    for source in (data, io.BytesIO(data), opened, loaded):
        got = read_picture(source)
        assert got.mode == "RGB" and close(got, expected)
    assert np.array_equal(read_picture(np.asarray(got)), got) and np.array_equal(read_picture(got), got)
    if form in SUFFIXES:
        row = index_row(Record("a", {}, {SUFFIXES[form]: data}), None, None, 0)
        assert (row["width"], row["height"]) == got.size


ANCILLARY = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"bKGD", b"sBIT", b"fcTL")


@st.composite
def png_files(draw):
    """(file, the same with odd metadata): every depth and colour type, with a transparent colour or palette alphas."""
    colour_type = draw(st.sampled_from(sorted(DEPTHS)))
    depth = draw(st.sampled_from(DEPTHS[colour_type]))
    transparent = colour_type in (0, 2, 3) and draw(st.booleans())
    plain = random_png(np.random.default_rng(draw(SEEDS)), draw(SIZES), depth, colour_type, transparent)
    odd = plain
    for _ in range(draw(st.integers(0, 3))):
        body = draw(st.binary(max_size=40) | st.sampled_from((b"key\0", b"key\0\0", b"k\0\1\0\0\0")).map(bytes))
        extra = chunk(draw(st.sampled_from(ANCILLARY)), body, wrong_checksum=draw(st.booleans()))
        odd = insert(odd, extra, after_pixels=draw(st.booleans()))
    return plain, odd


def by_resvg(data, size):
    picture = f'href="data:image/png;base64,{base64.b64encode(data).decode()}" width="{size[0]}" height="{size[1]}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}"><image {picture}/></svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff")))).convert("RGB")


@given(png_files())
def test_png_files_equal_those_of_resvg(case):
    plain, odd = case
    got = read_picture(odd)
    assert close(got, by_resvg(plain, got.size))
    if odd == plain:
        assert np.array_equal(read_picture(Image.open(io.BytesIO(plain))), got)


@given(png_files(), st.data())
def test_a_size_without_decoding_is_pillows(case, data):
    file = bytearray(data.draw(st.sampled_from(case)))
    if data.draw(st.booleans()):  # in the header, with a right checksum
        file[data.draw(st.integers(16, 28))] = data.draw(st.integers(0, 255))
        file[29:33] = zlib.crc32(file[12:29]).to_bytes(4)
    elif data.draw(st.booleans()):
        file[data.draw(st.integers(0, len(file) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        size = Image.open(io.BytesIO(mend_png(bytes(file)))).size
    except Exception:
        size = None
    assert plain_size(bytes(file)) in (None, size)


@given(png_files(), st.data())
def test_a_damaged_png_is_refused_or_reads_as_before(case, data):
    file = case[0]
    place = data.draw(st.integers(0, len(file) - 1))
    damaged = file[:place] + bytes([file[place] ^ data.draw(st.integers(1, 255))]) + file[place + 1 :]
    if data.draw(st.booleans()):
        damaged = file[:place]
    name = file.find(b"tRNS")
    if name <= place < name + 4 or (name > 0 and name - 4 <= place < name):
        return  # a damaged name makes it metadata that nobody knows
    try:
        got = read_picture(damaged)
    except UserError:
        return
    assert np.array_equal(got, read_picture(file))


@given(st.sampled_from(("uint8", "bool", "float32", "uint16", "int64")), st.lists(st.integers(0, 6), max_size=4), SEEDS)
def test_arrays_are_read_as_pillow_does_or_refused(dtype, shape, seed):
    array = np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)
    is_picture = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if dtype != "uint8" or not is_picture or not array.size:
        with pytest.raises(ValueError, match=r"^picture: an array of"):
            read_picture(array)
        return
    squeezed = array[:, :, 0] if len(shape) == 3 and shape[2] == 1 else array
    assert close(read_picture(array), on_white(Image.fromarray(squeezed)))
