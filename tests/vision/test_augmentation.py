import numpy as np
import pytest
import torch
from PIL import Image

from vision.augmentation import PictureAugmentConfig, augment_picture

WIDTH, HEIGHT = 20, 10


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def draws(config, count=200):
    generator = torch.Generator().manual_seed(0)
    return [np.asarray(augment_picture(picture(), config, generator)) for _ in range(count)]


def shift_of(pixels):
    """(right, down) by which a draw is the picture moved, its edge repeated; None: it is none, or far."""
    padded = np.pad(np.asarray(picture()), ((4, 4), (6, 6), (0, 0)), mode="edge")
    for right in range(-6, 7):
        for down in range(-4, 5):
            if (padded[4 - down : 4 - down + HEIGHT, 6 - right : 6 - right + WIDTH] == pixels).all():
                return right, down
    return None


def test_the_defaults_change_nothing():
    assert all((pixels == np.asarray(picture())).all() for pixels in draws(PictureAugmentConfig(), 5))


def test_shifts_reach_the_limit_in_each_direction_and_no_further():
    shifts = [shift_of(pixels) for pixels in draws(PictureAugmentConfig(max_shift=0.2))]
    assert None not in shifts
    assert {right for right, _ in shifts} == set(range(-4, 5)) and {down for _, down in shifts} == set(range(-2, 3))


def test_about_half_of_the_pictures_are_mirrored():
    original = np.asarray(picture())
    kinds = [
        "same" if (pixels == original).all() else "mirrored" if (pixels == original[:, ::-1]).all() else "other"
        for pixels in draws(PictureAugmentConfig(mirror=True))
    ]
    assert "other" not in kinds and 70 < kinds.count("mirrored") < 130


def test_equal_generators_draw_the_same():
    config = PictureAugmentConfig(max_shift=0.3, mirror=True)
    assert all((one == other).all() for one, other in zip(draws(config, 20), draws(config, 20), strict=True))


@pytest.mark.parametrize("max_shift", [-0.1, 1.0, float("nan")])
def test_a_shift_out_of_range_is_refused(max_shift):
    with pytest.raises(ValueError, match="max_shift"):
        PictureAugmentConfig(max_shift=max_shift)
