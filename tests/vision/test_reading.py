"""Reading image files: formats, modes, errors, and safe SVG."""

import base64
import contextlib
import gzip
import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from vision.reading import MAX_SVG_DEPTH, read_picture, read_rgba

SVG = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def encode(picture, kind="PNG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(mode="RGB", size=(37, 23)):
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values[:, :, 0] if channels == 1 else values, mode)


def pixels(picture):
    return [tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3).tolist()]


def svg(body, attributes='width="10" height="10"'):
    return f"<svg {SVG} {attributes}>{body}</svg>".encode()


def huge_png(width, height):
    """A PNG with a header of width x height and no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", b"")):
        out += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return out


# Files that can be read


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "TGA"])
def test_lossless_formats_give_the_exact_pixels(kind, tmp_path):
    picture = noise()
    path = tmp_path / "picture"
    path.write_bytes(encode(picture, kind, **({"lossless": True} if kind == "WEBP" else {})))
    for source in (path, str(path), path.read_bytes()):
        got = read_picture(source)
        assert got.mode == "RGB" and np.array_equal(got, picture)


def test_transparent_parts_are_composited_on_white():
    picture = Image.new("RGBA", (2, 1))
    picture.putdata([(0, 0, 0, 0), (255, 0, 0, 128)])
    assert pixels(read_picture(encode(picture))) == [(255, 255, 255), (255, 127, 127)]
    grey = Image.new("LA", (1, 1), (0, 51))
    assert read_picture(encode(grey)).getpixel((0, 0)) == (204, 204, 204)


def test_a_transparent_palette_entry_becomes_white_and_others_stay():
    picture = Image.new("P", (2, 1))
    picture.putpalette([9, 9, 9, 10, 20, 30])
    picture.putdata([0, 1])
    assert pixels(read_picture(encode(picture, transparency=0))) == [(255, 255, 255), (10, 20, 30)]
    assert pixels(read_picture(encode(picture))) == [(9, 9, 9), (10, 20, 30)]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "I;16", "I", "F", "LA", "PA"])
def test_every_mode_becomes_rgb_of_the_same_size(mode):
    picture = Image.new("L", (5, 3), 255).convert(mode if mode != "I;16" else "I;16")
    for kind in ("PNG", "TIFF", "JPEG"):
        try:
            data = encode(picture, kind)
        except (OSError, KeyError):
            continue  # this format cannot hold this mode
        got = read_picture(data)
        assert got.mode == "RGB" and got.size == (5, 3)


def test_cmyk_is_converted():
    got = np.asarray(read_picture(encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")))
    assert (got == [255, 0, 0]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    got = np.asarray(read_picture(encode(Image.fromarray(values), kind)))[0, :, 0]
    assert got.tolist() == [0, 1, 128, 255]


def test_float_and_32_bit_values_keep_their_order():
    for values in (np.array([[-3.0, 0.0, 900.0]], np.float32), np.array([[-5, 0, 10**9]], np.int32)):
        got = np.asarray(read_picture(encode(Image.fromarray(values), "TIFF")))[0, :, 0].tolist()
        assert got == sorted(got) and got[0] == 0 and got[-1] == 255
    unit = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert np.asarray(read_picture(encode(Image.fromarray(unit), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


def test_exif_orientation_is_applied():
    picture = Image.new("RGB", (4, 2), "white")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    got = read_picture(encode(picture, exif=exif))
    assert got.size == (2, 4) and got.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    red, _, blue = read_picture(data).getpixel((4, 4))
    assert red > 200 and blue < 50


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1)])
def test_images_one_pixel_wide_or_high(size):
    assert read_picture(encode(noise(size=size))).size == size


# what bad files get


def test_errors_name_the_file_and_the_reason(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "page.html").write_text("<html><body/></html>")
    cases = {"empty.png": "empty", "text.png": "not a picture", "page.html": "<html>", "absent.png": "no such file"}
    for name, reason in cases.items():
        with pytest.raises(ValueError, match=reason) as error:
            read_picture(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(ValueError, match="folder"):
        read_picture(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_truncated_files_are_errors(kind, tmp_path):
    data = encode(noise(size=(64, 64)), kind)
    for share in (0.1, 0.5, 0.8):
        path = tmp_path / "cut"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match="cut"):
            read_picture(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "JPEG2000", "AVIF"])
def test_damaged_files_raise_value_errors_only(kind):
    data = np.frombuffer(encode(noise(size=(32, 32)), kind), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = data.copy()
        damaged[rng.integers(0, min(len(data), 200), 3)] = rng.integers(0, 256, 3)
        with contextlib.suppress(ValueError):
            assert read_picture(damaged.tobytes(), max_pixels=10**6).mode == "RGB"


def test_decompression_bombs_are_refused_by_their_header():
    # Behind these headers is no data: had anything been decoded, the reason would be another.
    for width, height in ((8193, 8192), (20_000, 20_000), (10**6, 10**6)):
        with pytest.raises(ValueError, match="over the limit of 67,108,864"):
            read_picture(huge_png(width, height))
    with pytest.raises(ValueError, match="37 x 23 = 851 pixels, over the limit of 850"):
        read_picture(encode(noise()), max_pixels=850)
    assert read_picture(encode(noise()), max_pixels=851).size == (37, 23)


def test_postscript_is_not_run():
    with pytest.raises(ValueError, match="not a picture"):  # Pillow would start Ghostscript
        read_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


# SVG


def test_svg_is_rendered_on_white_with_its_aspect_ratio():
    data = svg('<rect width="10" height="10" fill="#f00"/>', 'viewBox="0 0 40 20"')
    got = read_picture(data, svg_size=80)
    assert got.size == (80, 40) and got.mode == "RGB"
    assert got.getpixel((5, 5)) == (255, 0, 0) and got.getpixel((60, 30)) == (255, 255, 255)
    assert read_picture(svg("", 'viewBox="0 0 20 40"'), svg_size=80).size == (40, 80)
    assert read_picture(svg("", 'width="1" height="100000"'), svg_size=80).size == (1, 80)
    assert read_picture(svg("", 'width="30pt" height="15pt"'), svg_size=80).size == (80, 40)


def test_compressed_and_utf16_svg(tmp_path):
    data = svg('<rect width="10" height="10" fill="#00f"/>')
    text = '<?xml version="1.0" encoding="{}"?><!-- é -->' + data.decode()
    wrappings = [gzip.compress(data), b"\xef\xbb\xbf" + data, b"\n " + data, text.format("ISO-8859-1").encode("latin1")]
    for wrapped in [*wrappings, text.format("UTF-16").encode("utf-16")]:
        (tmp_path / "drawing").write_bytes(wrapped)
        assert read_picture(tmp_path / "drawing", svg_size=4).getpixel((2, 2)) == (0, 0, 255)


@pytest.mark.parametrize("attribute", ["href", "xlink:href"])
@pytest.mark.parametrize("scheme", ["", "file://", "https://example.org", "data:image/svg+xml,"])
def test_svg_cannot_load_other_files(attribute, scheme, tmp_path):
    encoded = encode(Image.new("RGB", (4, 4), "red"))
    (tmp_path / "secret.png").write_bytes(encoded)
    for element in ("image", "use", "feImage"):
        body = f'<{element} {attribute}="{scheme}{tmp_path}/secret.png" width="10" height="10"/>'
        with pytest.raises(ValueError, match="would load"):
            read_picture(svg(body), svg_size=10)
    inside = f'<image {attribute}="data:image/png;base64,{base64.b64encode(encoded).decode()}" width="10" height="10"/>'
    assert read_picture(svg(inside), svg_size=10).getpixel((5, 5)) == (255, 0, 0)
    link = f'<a {attribute}="https://example.org"><rect width="10" height="10" fill="lime"/></a>'
    assert read_picture(svg(link), svg_size=10).getpixel((5, 5)) == (0, 255, 0)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP"])
def test_svg_draws_embedded_images_with_and_without_a_type(form):
    embedded = base64.encodebytes(encode(Image.new("RGB", (4, 4), (0, 0, 254)), form)).decode()  # in lines
    for kind in (f"image/{form.lower()}", ""):
        got = read_picture(svg(f'<image href="data:{kind};base64,{embedded}" width="10" height="10"/>'), svg_size=10)
        assert max(abs(a - b) for a, b in zip(got.getpixel((5, 5)), (0, 0, 254), strict=True)) < 8


def test_svg_may_embed_only_small_raster_images():
    red = Image.new("RGB", (40, 40), "red")

    def image(data, kind=""):
        return f'<image href="data:{kind};base64,{base64.b64encode(data).decode()}" width="10" height="10"/>'

    inner = svg('<image href="file:///etc/hostname" width="10" height="10"/>')
    # what the renderer does not know as a picture it would read as another SVG, which nobody has checked
    for data in (inner, gzip.compress(inner), encode(red, "TGA"), encode(red, "BMP"), b""):
        with pytest.raises(ValueError, match="not a picture in a known format"):
            read_picture(svg(image(data)), svg_size=10)
    one = image(encode(red))
    assert read_picture(svg(one * 2), max_pixels=3200, svg_size=10).getpixel((5, 5)) == (255, 0, 0)
    with pytest.raises(ValueError, match="holds pictures of 4,800 pixels, over the limit of 3,200"):
        read_picture(svg(one * 3), max_pixels=3200, svg_size=10)
    for broken in (one.replace("base64,", "base64,!"), one.replace(";base64", ";base64;x")):
        with pytest.raises(ValueError, match=r"broken base64|known format"):
            read_picture(svg(broken), svg_size=10)


def test_svg_bombs_are_refused():
    def chain(link):
        return "".join(link(i) for i in range(9))

    uses = chain(lambda i: f'<g id="a{i}">{f"""<use href="#a{i + 1}"/>""" * 10}</g>') + '<rect id="a9"/>'
    patterns = chain(lambda i: f'<pattern id="p{i}">{f"""<rect fill="url(#p{i + 1})"/>""" * 10}</pattern>')
    embedded = base64.b64encode(huge_png(20_000, 20_000)).decode()
    cases = {
        "nests": "<g>" * 100_000 + "</g>" * 100_000,  # overflows the renderer's stack
        "references expanded": uses,
        "draws over": patterns + '<rect fill="url(#p0)"/>',
        "over the limit": f'<image href="data:image/png;base64,{embedded}"/>',
        "octaves": '<filter><feTurbulence numOctaves="2000000000"/></filter>',
    }
    for reason, body in cases.items():
        with pytest.raises(ValueError, match=reason):
            read_picture(svg(body), svg_size=10)
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i + 1};" * 10}">' for i in range(9)) + f'<!ENTITY e9 "{"x" * 100}">'
    with pytest.raises(ValueError):
        read_picture(f"<!DOCTYPE svg [{entities}]>".encode() + svg("<text>&e0;</text>"), svg_size=10)
    with pytest.raises(ValueError, match="bytes"):
        read_picture(gzip.compress(b"<svg>" + bytes(2**25)), svg_size=10)
    with pytest.raises(ValueError, match="max_pixels"):
        read_picture(svg(""), svg_size=10**6)


def test_the_renderer_handles_what_the_check_allows():
    depth = MAX_SVG_DEPTH - 2
    nested = '<g opacity="0.9">' * depth + '<rect width="1" height="1"/>' + "</g>" * depth
    assert read_picture(svg(nested), svg_size=10).size == (10, 10)
    assert read_picture(svg('<g id="a"><use href="#a"/></g>'), svg_size=10).size == (10, 10)


def test_broken_svg_is_an_error():
    for data in (b"<svg", svg("<rect>"), svg("")[:-3], b"\x1f\x8b123", svg("", 'width="0" height="0"')):
        with pytest.raises(ValueError):
            read_picture(data)


def test_a_missing_renderer_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ValueError, match=r"mm-adapters\[demo\]"):
        read_picture(svg(""))


def test_read_rgba_keeps_transparency():
    circle = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="4" height="8" fill="#f00"/></svg>'
    out = io.BytesIO()
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 4, 8))
    half.save(out, "PNG")
    for data in (circle, out.getvalue()):
        picture = read_rgba(data, svg_size=8)
        assert picture.mode == "RGBA" and picture.getpixel((1, 4)) == (255, 0, 0, 255)
        assert picture.getpixel((6, 4))[3] == 0 and read_picture(data, svg_size=8).getpixel((6, 4)) == (255, 255, 255)
    Image.new("RGB", (3, 3), "blue").save(out := io.BytesIO(), "PNG")
    assert read_rgba(out.getvalue()).getpixel((1, 1)) == (0, 0, 255, 255)
    with pytest.raises(ValueError, match="empty"):
        read_rgba(b"")
