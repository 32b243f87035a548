"""Reading pictures: formats, modes, sources and errors."""

import contextlib
import io
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from foundation.png import SIGNATURE
from tests.vision.pictures import chunk, encode, header, huge_png, noise
from vision.reading import read_picture, read_rgba


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pixels(picture):
    return [tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3).tolist()]


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


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa", "L", "I;16", "I;16B", "I", "F", "CMYK", "HSV", "1"])
def test_images_of_any_mode(mode):
    made = Image.new(mode, (3, 2))
    transparent = mode[-1:] in "Aa"
    assert read_picture(made).size == (3, 2) and read_rgba(made).getpixel((0, 0))[3] == (0 if transparent else 255)
    assert read_picture(made).getpixel((0, 0)) == ((255, 255, 255) if transparent or mode == "CMYK" else (0, 0, 0))


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


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_opened_pictures_are_turned_as_files_are(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture"
    path.write_bytes(encode(noise(), kind, exif=exif))
    expected = np.asarray(read_picture(path))
    assert expected.shape[:2] == ((23, 37) if orientation < 5 else (37, 23))
    loaded = Image.open(path)
    loaded.load()
    with Image.open(path) as opened, path.open("rb") as file:
        for source in (opened, loaded, opened.convert("RGB"), file, io.BytesIO(path.read_bytes())):
            assert np.array_equal(read_picture(source), expected)
    assert np.array_equal(read_picture(read_picture(path)), expected)  # not turned twice


def test_arrays_are_read_as_grey_rgb_or_rgba():
    colours = np.asarray(noise())
    assert np.array_equal(read_picture(colours), colours)
    assert np.array_equal(read_picture(colours[::2, ::-1]), colours[::2, ::-1])
    grey = colours[:, :, 0]
    for array in (grey, grey[:, :, None]):
        assert np.array_equal(read_picture(array), grey[:, :, None].repeat(3, 2))
    rgba = np.zeros((1, 2, 4), np.uint8)
    rgba[0, 1] = (255, 0, 0, 128)
    assert pixels(read_picture(rgba)) == [(255, 255, 255), (255, 127, 127)]
    assert read_rgba(rgba).getpixel((1, 0)) == (255, 0, 0, 128)


def test_other_arrays_and_sources_are_refused_with_what_to_do():
    colours = np.asarray(noise())
    cases = {
        r"float64: .*\(array \* 255\)": colours / 255,
        r"bool: .*array.astype\('uint8'\) \* 255": colours[:, :, 0] > 99,
        r"uint16: .*array / 257": colours.astype(np.uint16),
        r"int64: .*scale them": colours.astype(np.int64),
        r"3 x 23 x 37 values.*moveaxis": np.moveaxis(colours, 2, 0),
        r"1 x 23 x 37 x 3 .*one picture": colours[None],
        r"23 x 37 x 2 values: it must be": colours[:, :, :2],
        r"0 x 5 values holds no": np.zeros((0, 5), np.uint8),
        r"from int: give a path": 3,
        r"from list: give a path": [colours],
        r"'rb'": io.StringIO("text"),
    }
    for reason, source in cases.items():
        with pytest.raises(ValueError, match=f"^picture: .*{reason}"):
            read_picture(source)


def test_16_bit_tiff_in_which_0_is_white():
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    data = encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    for source in (data, Image.open(io.BytesIO(data))):
        assert np.asarray(read_picture(source))[0, :, 0].tolist() == [255, 254, 0]


@pytest.mark.parametrize("depth", [2, 4, 16])
def test_a_transparent_grey_of_any_depth_is_white(depth):
    rows = b"\0" + bytes([0b01_10_01_10]) * 8
    width, value = 64 // depth, int.from_bytes(rows[1:3]) >> (16 - depth)
    parts = (header(width, 1, depth, 0), chunk(b"tRNS", value.to_bytes(2)), chunk(b"IDAT", zlib.compress(rows)))
    data = SIGNATURE + b"".join(parts) + chunk(b"IEND", b"")
    expected = {2: [255, 170] * 16, 4: [255] * 16, 16: [255] * 4}[depth]
    for source in (data, Image.open(io.BytesIO(data))):
        assert np.asarray(read_picture(source))[0, :, 0].tolist() == expected


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


def test_errors_say_what_the_file_is_instead(tmp_path):
    jpeg, webp = encode(noise(), "JPEG"), encode(noise(), "WEBP")
    cases = {
        "HEIC picture: convert": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "PDF document": b"%PDF-1.4",
        "git lfs pull": b"version https://git-lfs.github.com/spec/v1",
        "broken or truncated": jpeg[:15],
        "could not create decoder": webp[:20],
        "broken or truncated GIF": b"GIF89a",
    }
    for reason, data in cases.items():
        with pytest.raises(ValueError, match=reason):
            read_picture(data)
    for url in ("https://example.org/a.png", "file:///a.png"):
        with pytest.raises(ValueError, match=r"is a (https|file) URL.*download"):
            read_picture(url)
    with pytest.raises(ValueError, match=r"data URL.*decode it"):
        read_picture("data:image/png;base64," + "A" * 9000)
    with pytest.raises(ValueError, match="cannot be read"):
        read_picture("a" * 9000)
    with pytest.raises(ValueError, match="no such file"):
        read_picture(tmp_path / "absent.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "PPM"])  # Pillow opens no truncated WebP
def test_opened_pictures_that_are_truncated_stay_errors(kind, tmp_path):
    data = encode(noise(size=(64, 64)), kind)
    (tmp_path / "cut").write_bytes(data[: len(data) * 4 // 5])
    with Image.open(tmp_path / "cut") as opened:
        for _ in range(2):  # Pillow gives half a picture the second time
            with pytest.raises(ValueError, match=r"cut: .+"):
                read_picture(opened)


def test_opened_pictures_that_are_closed_or_too_large_are_refused():
    opened = Image.open(io.BytesIO(encode(noise(), "JPEG")))
    with pytest.raises(ValueError, match="37 x 23 = 851 pixels, over the limit of 850"):
        read_picture(opened, max_pixels=850)
    opened.close()
    with pytest.raises(ValueError, match="closed before its pixels were read"):
        read_picture(opened)
    made = noise()
    made.close()
    with pytest.raises(ValueError, match=r"^picture: "):
        read_picture(made)


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
