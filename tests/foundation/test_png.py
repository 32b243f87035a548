"""Mended PNG files: metadata does not stop a picture, damage that decides the pixels does."""

import zlib

import numpy as np
import pytest
from PIL import Image

from foundation.png import mend_png, plain_size
from shards.format import Record, index_row
from tests.vision.pictures import chunk, encode, header, insert, noise
from vision.reading import count_frames, read_picture

PICTURE = encode(noise(size=(9, 5)))
NOISE = np.random.default_rng(0).integers(1, 256, 3_000_000, dtype=np.uint8).tobytes()
METADATA = {
    "3 MB of text": chunk(b"tEXt", b"Comment\0" + NOISE),
    "3 MB of compressed text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))),
    "3 MB of compressed international text": chunk(b"iTXt", b"C\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
    "a colour profile of 3 MB": chunk(b"iCCP", b"name\0\0" + zlib.compress(NOISE)),
    "a colour profile compressed in another way": chunk(b"iCCP", b"name\0\5abc"),
    "a wrong checksum of text": chunk(b"tEXt", b"Title\0odd", wrong_checksum=True),
    "a wrong checksum of the time": chunk(b"tIME", bytes(7), wrong_checksum=True),
    "a wrong checksum of a private chunk": chunk(b"prVt", b"1234", wrong_checksum=True),
    "a cut gamma": chunk(b"gAMA", b"1"),
    "a frame outside of the picture": chunk(b"fcTL", bytes(4) + b"\0\0\1\0" * 2 + bytes(14)),
    "the size of an animation, cut": chunk(b"acTL", b"\0"),
}


def size_in_index(data):
    row = index_row(Record("a", {}, {"png": data}), None, None, 0)
    return row["width"], row["height"]


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("after_pixels", [False, True])
def test_metadata_does_not_stop_a_picture(name, after_pixels):
    data = insert(PICTURE, METADATA[name], after_pixels=after_pixels)
    assert np.array_equal(read_picture(data), noise(size=(9, 5)))
    assert size_in_index(data) == (9, 5) and count_frames(data) == 1


def with_wrong_checksum(data, kind):
    place = data.index(kind)
    end = place + 4 + int.from_bytes(data[place - 4 : place])
    return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]


@pytest.mark.parametrize("kind", ["IHDR", "PLTE", "tRNS", "IDAT", "IEND"])
def test_a_wrong_checksum_of_what_decides_the_pixels_is_refused(kind):
    picture = Image.new("P", (2, 1))
    picture.putpalette([9, 9, 9, 10, 20, 30])
    data = encode(picture, transparency=0)
    assert read_picture(data).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match=f"^picture: its PNG chunk {kind} has a wrong checksum"):
        read_picture(with_wrong_checksum(data, kind.encode()))


def test_a_file_cut_anywhere_is_refused_or_gives_all_pixels():
    picture = noise(size=(40, 30))
    data = encode(picture)
    end = data.rindex(b"IEND") - 4
    for length in range(len(data)):
        if length < end:
            with pytest.raises(ValueError, match=r"picture: "):
                read_picture(data[:length])
        else:
            assert np.array_equal(read_picture(data[:length]), picture)


def test_odd_files_are_refused_by_name():
    cases = {
        "begins with b'CgBI'": PICTURE[:8] + chunk(b"CgBI", b"1234") + PICTURE[8:],
        "chunk QQQQ is none of the PNG standard": insert(PICTURE, chunk(b"QQQQ", b"1")),
        "a chunk has no valid name": insert(PICTURE, chunk(b"t:Xt", b"1")),
        "holds no pixels": PICTURE[:33] + chunk(b"IEND", b""),
        "its palette": PICTURE[:8] + header(9, 5, 8, 3) + PICTURE[33:],
        "transparent colour": insert(PICTURE, chunk(b"tRNS", b"1")),
    }
    for reason, data in cases.items():
        with pytest.raises(ValueError, match=reason):
            read_picture(data)


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()[6:]


def xmp(orientation, padding=0):
    text = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation
    return text + b" " * padding


ORIENTATIONS = {
    "EXIF": chunk(b"eXIf", exif_of(6)),
    "EXIF with a wrong checksum": chunk(b"eXIf", exif_of(6), wrong_checksum=True),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)),
    "XMP of 3 MB": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6, 3_000_000)),
    "XMP of 3 MB, compressed": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0\0" + zlib.compress(xmp(6, 3_000_000))),
    "EXIF as text": chunk(
        b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n%s\n" % (24, exif_of(6).hex().encode()))
    ),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
@pytest.mark.parametrize("after_pixels", [False, True])
def test_an_orientation_is_kept(name, after_pixels):
    data = insert(PICTURE, ORIENTATIONS[name], after_pixels=after_pixels)
    assert np.array_equal(read_picture(data), noise(size=(9, 5)).transpose(Image.Transpose.ROTATE_270))
    assert size_in_index(data) == (5, 9)


def test_what_needs_no_mending_stays():
    profile = encode(noise(), icc_profile=b"a profile")
    assert mend_png(PICTURE) == PICTURE and mend_png(profile) == profile and mend_png(b"GIF89a") == b"GIF89a"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert count_frames(encode(frames[0], save_all=True, append_images=frames[1:])) == 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_the_size_of_a_plain_file_needs_no_decoder(mode):
    file = encode(Image.new(mode, (37, 23)))
    assert plain_size(file) == (37, 23) and mend_png(file) is file
    assert plain_size(insert(file, chunk(b"pHYs", b"broken"))) == (37, 23)
    for extra in (b"eXIf", b"iTXt", b"tRNS", b"acTL", b"IHDR", b"ABCD"):
        assert plain_size(insert(file, chunk(extra, b""))) is None
    assert plain_size(file[:-20]) is None and plain_size(with_wrong_checksum(file, b"IDAT")) is None
