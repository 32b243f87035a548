"""SVG files: rendered, and refused where they would load other files or run without end."""

import base64
import gzip
import sys

import pytest
from PIL import Image

from tests.vision.pictures import encode, huge_png
from vision.reading import read_picture
from vision.svg import MAX_SVG_DEPTH

SVG = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def svg(body, attributes='width="10" height="10"'):
    return f"<svg {SVG} {attributes}>{body}</svg>".encode()


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
