"""The aggregator's correlation with the previous frame, and its position embedding."""

import pytest
import torch

from video.aggregator import NEIGHBOURS, local_correlation, position_embedding

SIDE, PER_TILE = 4, 17


@pytest.fixture
def frames() -> torch.Tensor:
    """[2 groups, 3 frames, 2 tiles of 17 tokens, 8]."""
    return torch.randn(2, 3, 2 * PER_TILE, 8, generator=torch.Generator().manual_seed(0))


def test_local_correlation_is_the_cosine_with_each_neighbour(frames):
    found = local_correlation(frames, PER_TILE)
    assert found.shape == (2, 3, 2 * PER_TILE, NEIGHBOURS)
    for group, centred in zip(found, frames - frames.mean((1, 2), keepdim=True), strict=True):
        assert not group[0].any()  # no previous frame
        for time in (1, 2):
            for tile in range(2):
                start = tile * PER_TILE
                assert not group[time, start].any()  # the CLS token has no position
                for row in range(SIDE):
                    for column in range(SIDE):
                        position = start + 1 + row * SIDE + column
                        for neighbour in range(NEIGHBOURS):
                            y, x = row + neighbour // 3 - 1, column + neighbour % 3 - 1
                            expected = torch.zeros(())
                            if 0 <= y < SIDE and 0 <= x < SIDE:
                                before = centred[time - 1, start + 1 + y * SIDE + x]
                                expected = torch.cosine_similarity(centred[time, position], before, dim=0)
                            cosine = group[time, position, neighbour]
                            torch.testing.assert_close(cosine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shift", "neighbour"), [((0, 1), 3), ((0, -1), 5), ((1, 0), 1), ((-1, -1), 8)])
def test_correlation_is_highest_where_content_came_from(shift, neighbour):
    content = torch.randn(SIDE, SIDE, 8, generator=torch.Generator().manual_seed(1))
    shown = torch.stack([content, content.roll(shift, (0, 1))]).flatten(1, 2)
    found = local_correlation(torch.cat([torch.zeros(2, 1, 8), shown], 1)[None], PER_TILE)[0, 1, 1:]
    inner = found.unflatten(0, (SIDE, SIDE))[1:-1, 1:-1].flatten(0, 1)
    assert (inner.argmax(-1) == neighbour).all()


def test_correlation_of_a_still_clip_is_one_at_the_centre(frames):
    still = frames[:, :1].expand(-1, 3, -1, -1)
    patches = [token for token in range(2 * PER_TILE) if token % PER_TILE]
    torch.testing.assert_close(local_correlation(still, PER_TILE)[:, 1:, patches, 4], torch.ones(2, 2, 32))


def test_position_embeddings_are_distinct_and_independent_of_the_resolution():
    coarse, fine = position_embedding(1 + 3 * 3), position_embedding(1 + 5 * 5)
    assert not coarse[0].any()  # CLS
    assert torch.pdist(fine[1:]).min() > 0.3
    torch.testing.assert_close(coarse[1:].unflatten(0, (3, 3)), fine[1:].unflatten(0, (5, 5))[::2, ::2])
    assert position_embedding(2).shape == (2, 16)  # a tile of one patch
