import io

import pytest
from PIL import Image

from data_prep.pipeline.writing import encode_picture
from vision.reading import count_frames, read_picture


@pytest.mark.parametrize("form, suffix", [("WEBP", "png"), ("PNG", "png"), ("MPO", "jpg")])
@pytest.mark.parametrize("default_image", [False, True])
def test_only_the_first_frame_of_a_file_is_written(noise, form, suffix, default_image):
    out = io.BytesIO()
    more = {"default_image": True} if default_image and form == "PNG" else {}
    noise(1).save(out, form, save_all=True, append_images=[noise(2)], **more)
    data = out.getvalue()
    named, written = encode_picture(data, read_picture(data), None)
    assert count_frames(data) == 2 and count_frames(written) == 1
    assert named == suffix and len(written) and written != data
    with Image.open(io.BytesIO(written)) as opened:
        assert getattr(opened, "n_frames", 1) == 1 and opened.size == noise(1).size
    if suffix == "png":
        assert read_picture(written).tobytes() == read_picture(data).tobytes()


@pytest.mark.parametrize("form, suffix", [("WEBP", "webp"), ("PNG", "png"), ("JPEG", "jpg")])
def test_a_file_of_one_frame_keeps_its_bytes(noise, encode, form, suffix):
    data = encode(noise(1), form)
    assert encode_picture(data, read_picture(data), None) == (suffix, data)
    assert encode_picture(data, read_picture(data), 20)[1] != data
