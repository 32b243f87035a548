"""Motion beside what is shown: how well a patch fits those around its place in the frame before."""

import pytest
import torch

from video.aggregator import NEIGHBOURS, fits_before, place_waves

SIDE, PER_TILE = 4, 17


@pytest.fixture
def frames() -> torch.Tensor:
    """[2 groups, 3 frames, 2 tiles of 17 tokens, 8]."""
    return torch.randn(2, 3, 2 * PER_TILE, 8, generator=torch.Generator().manual_seed(0))


def test_it_is_the_cosine_with_each_place_around(frames):
    found = fits_before(frames, PER_TILE)
    assert found.shape == (2, 3, 2 * PER_TILE, NEIGHBOURS)
    for group, given in zip(found, frames - frames.mean((1, 2), keepdim=True), strict=True):
        assert not group[0].any()  # before it there is none
        for time in (1, 2):
            for tile in range(2):
                start = tile * PER_TILE
                assert not group[time, start].any()  # CLS is at no place
                for row in range(SIDE):
                    for column in range(SIDE):
                        own = start + 1 + row * SIDE + column
                        for number in range(NEIGHBOURS):
                            y, x = row + number // 3 - 1, column + number % 3 - 1
                            expected = torch.zeros(())
                            if 0 <= y < SIDE and 0 <= x < SIDE:
                                there = given[time - 1, start + 1 + y * SIDE + x]
                                expected = torch.cosine_similarity(given[time, own], there, dim=0)
                            torch.testing.assert_close(group[time, own, number], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("moved", "from_where"), [((0, 1), 3), ((0, -1), 5), ((1, 0), 1), ((-1, -1), 8)])
def test_what_moves_fits_best_where_it_came_from(moved, from_where):
    ground = torch.randn(SIDE, SIDE, 8, generator=torch.Generator().manual_seed(1))
    shown = torch.stack([ground, ground.roll(moved, (0, 1))]).flatten(1, 2)
    found = fits_before(torch.cat([torch.zeros(2, 1, 8), shown], 1)[None], PER_TILE)[0, 1, 1:]
    inner = found.unflatten(0, (SIDE, SIDE))[1:-1, 1:-1].flatten(0, 1)
    assert (inner.argmax(-1) == from_where).all()


def test_frames_that_do_not_differ_say_so(frames):
    still = frames[:, :1].expand(-1, 3, -1, -1)
    patches = [place for place in range(2 * PER_TILE) if place % PER_TILE]
    torch.testing.assert_close(fits_before(still, PER_TILE)[:, 1:, patches, 4], torch.ones(2, 2, 32))


def test_places_are_apart_and_mean_the_same_at_any_resolution():
    coarse, fine = place_waves(1 + 3 * 3), place_waves(1 + 5 * 5)
    assert not coarse[0].any()  # CLS
    assert torch.pdist(fine[1:]).min() > 0.3
    torch.testing.assert_close(coarse[1:].unflatten(0, (3, 3)), fine[1:].unflatten(0, (5, 5))[::2, ::2])
    assert place_waves(2).shape == (2, 16)  # a tile of one patch
