"""A picture gives the same tiles whatever it is given as."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vision.pictures import encode, noise


def test_each_source_of_a_picture_gives_the_same_tiles(tiny_processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "picture.png"
    path.write_bytes(encode(noise(size=(60, 30)), exif=exif))
    (expected,) = tiny_processor.caption_prompt_for(path).images
    shown = np.asarray(noise(size=(60, 30)).transpose(Image.Transpose.ROTATE_270))
    with Image.open(path) as opened, path.open("rb") as file:
        sources = (str(path), path.read_bytes(), opened, opened.convert("RGB"), file, io.BytesIO(path.read_bytes()))
        for source in (*sources, shown, Image.fromarray(shown)):
            part = {"type": "image", "image": source}
            (tiles,) = tiny_processor.prompt([{"role": "user", "content": [part]}]).images
            assert tiles.grid == expected.grid and torch.equal(tiles.pixels, expected.pixels)


def test_an_array_of_shares_is_refused(tiny_processor):
    with pytest.raises(ValueError, match=r"float64: pixels are uint8"):
        tiny_processor.caption_prompt_for(np.zeros((4, 4, 3)))
