"""Tiling: canvases, sizes and pixels equal those of `transformers`, and tiles put together give the image."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional
from transformers import MllamaImageProcessor
from transformers.models.mllama.image_processing_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from tests.vision.pictures import encode, noise
from vision.reading import read_picture
from vision.tiling import CANVASES, Tiles, choose_canvas, fit_size, resize, split_tiles, tile_image

SIZES = [
    (1, 1),
    (1, 300),
    (300, 1),
    (1, 28),
    (7, 5),
    (28, 28),
    (29, 28),
    (28, 29),
    (56, 28),
    (57, 113),
    (112, 28),
    (28, 112),
    (85, 85),
    (100, 37),
    (37, 100),
    (500, 20),
    (20, 500),
    (333, 251),
]


def join_tiles(tiles: Tiles) -> torch.Tensor:
    """The inverse of `split_tiles`: the padded canvas, uint8 [3, rows * S, cols * S]."""
    return tiles.pixels.unflatten(0, tiles.grid).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("max_tiles", [1, 2, 3, 4])
def test_pixels_equal_those_of_transformers(random_picture, size, max_tiles):
    picture = random_picture(*size)
    tiles = tile_image(picture, 28, max_tiles)
    processor = MllamaImageProcessor(
        size={"height": 28, "width": 28}, max_image_tiles=max_tiles, do_rescale=False, do_normalize=False
    )
    theirs = processor(picture, return_tensors="pt")
    assert theirs["num_tiles"] == [[tiles.num_tiles]]
    assert torch.equal(tiles.pixels, theirs["pixel_values"][0, 0, : tiles.num_tiles].to(torch.uint8))
    if max_tiles == 4:  # with fewer tiles their ids count a shorter list
        assert theirs["aspect_ratio_ids"].item() == tiles.canvas_id


@pytest.mark.parametrize("tile_size", [28, 336, 560])
def test_canvases_and_sizes_equal_those_of_transformers(tile_size):
    sides = [1, 2, 13, 27, 28, 29, 200, 335, 336, 337, 448, 672, 673, 1000, 1344, 2240, 5000]
    for width, height in itertools.product(sides, sides):
        grid = choose_canvas(width, height, tile_size)
        canvas = get_optimal_tiled_canvas(height, width, 4, tile_size)
        assert (grid[0] * tile_size, grid[1] * tile_size) == tuple(int(side) for side in canvas)
        theirs = get_image_size_fit_to_canvas(height, width, *canvas, tile_size)
        assert fit_size(width, height, grid, tile_size) == (int(theirs[1]), int(theirs[0]))


@pytest.mark.parametrize("grid", CANVASES)
def test_an_image_that_fills_its_canvas_is_unchanged(random_picture, grid):
    picture = random_picture(grid[1] * 28, grid[0] * 28)
    tiles = tile_image(picture, 28)
    assert tiles.grid == grid
    assert np.array_equal(join_tiles(tiles).permute(1, 2, 0).numpy(), np.array(picture))
    assert torch.equal(split_tiles(join_tiles(tiles), grid), tiles.pixels)


def test_tiles_are_in_row_major_order():
    picture = Image.new("RGB", (56, 56))
    for number, corner in enumerate(((0, 0), (28, 0), (0, 28), (28, 28))):
        picture.paste((number + 1,) * 3, (*corner, corner[0] + 28, corner[1] + 28))
    assert [int(tile.unique()) for tile in tile_image(picture, 28).pixels] == [1, 2, 3, 4]


@pytest.mark.parametrize("size", SIZES)
def test_the_canvas_outside_the_image_is_black(size):
    """A white image covers one rectangle from the top left corner."""
    tiles = tile_image(Image.new("RGB", size, "white"), 28)
    canvas = join_tiles(tiles)
    width, height = fit_size(*size, tiles.grid, 28)
    assert (canvas[:, :height, :width] == 255).all()
    assert canvas.sum() == 255 * 3 * height * width


def test_no_side_grows_beyond_its_own_length_or_a_tile():
    for width, height in SIZES:
        grid = choose_canvas(width, height, 28)
        new_width, new_height = fit_size(width, height, grid, 28)
        assert 1 <= new_width <= min(max(width, 28), grid[1] * 28)
        assert 1 <= new_height <= min(max(height, 28), grid[0] * 28)


def test_max_tiles_limits_the_canvas(random_picture):
    for size, max_tiles in itertools.product(SIZES, (1, 2, 3, 4)):
        assert tile_image(random_picture(*size), 28, max_tiles).num_tiles <= max_tiles


def test_the_examples_of_the_paper():
    assert choose_canvas(672, 672, 336) == (2, 2)
    assert choose_canvas(672, 336, 336) == (1, 2)
    assert choose_canvas(336, 1344, 336) == (4, 1)
    assert choose_canvas(600, 400, 336) == (2, 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image": Image.new("L", (4, 4))}, "mode L"),
        ({"image": Image.new("RGBA", (4, 4))}, "mode RGBA"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"max_tiles": 5}, "max_tiles is 5"),
        ({"tile_size": 0}, "tile_size is 0"),
    ],
)
def test_invalid_arguments_are_errors(change, named):
    arguments = {"image": Image.new("RGB", (4, 4)), "tile_size": 28, "max_tiles": 4, **change}
    with pytest.raises(ValueError, match=named):
        tile_image(**arguments)


@pytest.mark.parametrize(
    ("pixels", "grid"),
    [
        (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), (1, 1)),
        (torch.zeros(6, 3, 28, 28, dtype=torch.uint8), (2, 3)),
        (torch.zeros(1, 3, 28, 28), (1, 1)),
        (torch.zeros(1, 3, 28, 14, dtype=torch.uint8), (1, 1)),
        (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), (1, 1)),
        (torch.zeros(3, 28, 28, dtype=torch.uint8), (1, 1)),
    ],
)
def test_tiles_that_do_not_fit_their_grid_are_errors(pixels, grid):
    with pytest.raises(ValueError, match="grid"):
        Tiles(pixels, grid)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (97, 61), (224, 224)])
@pytest.mark.parametrize("new_size", [(1, 3), (28, 28), (140, 33), (9, 250)])  # torchvision fails at 1 x 1
def test_resizing_equals_torchvisions_to_the_bit(size, new_size):
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).permute(2, 0, 1)
    for layout in (pixels, pixels.contiguous()):
        expected = functional.resize(layout, list(new_size), functional.InterpolationMode.BILINEAR, antialias=True)
        assert torch.equal(resize(layout, *new_size), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_opened_images_are_turned_as_their_files_are(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(noise(size=(60, 30)), kind, exif=exif)
    expected = tile_image(read_picture(data), 28)
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    for image in (Image.open(io.BytesIO(data)), loaded, loaded.convert("RGB")):
        tiles = tile_image(image, 28)
        assert tiles.grid == expected.grid and torch.equal(tiles.pixels, expected.pixels)


def test_opened_images_that_are_truncated_are_refused():
    with pytest.raises(ValueError, match=r"^picture: "):
        tile_image(Image.open(io.BytesIO(encode(noise(size=(64, 64)), "JPEG")[:800])), 28)
