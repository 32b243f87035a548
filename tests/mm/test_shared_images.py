"""Rows that look at the same images: one encoding, and the same results as with a copy for each row."""

import copy
from dataclasses import replace

import pytest
import torch

import mm
from benchmarks.shared_pictures import with_copies
from mm.batch import IGNORED
from mm.training.objectives import next_token_loss
from video.sampling import Clip
from vision.tiling import Tiles

CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # sums over rows run in another order: fp32 rounding


def copy_of(tiles: Tiles) -> Tiles:
    """Another object with equal pixels, as the next record of the same picture gives."""
    return Tiles(tiles.pixels.clone(), tiles.grid)


def gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model)
    loss = next_token_loss(model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def labelled(tiny_config):
    """labelled("..i.", *images) -> a sample whose `i` are the images, in turn; every other token is a target."""

    def sample(pattern: str, *images: Tiles) -> mm.Sample:
        tokens = [tiny_config.image_token_id if mark == "i" else 5 + 3 * n for n, mark in enumerate(pattern)]
        labels = [IGNORED if mark == "i" else token for mark, token in zip(pattern, tokens, strict=True)]
        return mm.Sample(tokens, labels, list(images))

    return sample


@pytest.fixture
def rows(labelled, random_tiles) -> dict[str, list[mm.Sample]]:
    one, two, wide, large = (
        random_tiles(number, grid) for number, grid in enumerate(((1, 1), (1, 1), (1, 2), (2, 2)), start=1)
    )
    return {
        "questions about one picture": [labelled("i...", one), labelled("i.....", copy_of(one)), labelled("i..", one)],
        "with text between": [labelled(".i..", wide), labelled("..."), labelled("i....", copy_of(wide))],
        "two pictures": [labelled("i..", one), labelled("i...", two), labelled("i..", copy_of(one))],
        "some of several": [
            labelled("ii..i.", one, large, wide),
            labelled("i....", copy_of(large)),
            labelled(".i.i..", copy_of(wide), copy_of(one)),
            labelled("...."),
            labelled("i..", two),
        ],
        "one picture twice in a row": [labelled("i..i..", wide, copy_of(wide)), labelled("i..", one)],
    }


NUM_DIFFERENT = {
    "questions about one picture": 1,
    "with text between": 1,
    "two pictures": 2,
    "some of several": 4,
    "one picture twice in a row": 2,
}


@pytest.mark.parametrize("name", NUM_DIFFERENT)
def test_losses_and_gradients_equal_those_of_copies(tiny_model, rows, name):
    batch = mm.collate(rows[name])
    copies = with_copies(batch)
    assert len(batch.images) == NUM_DIFFERENT[name] < len(copies.images)
    loss, found = gradients(tiny_model, batch)
    expected_loss, expected = gradients(tiny_model, copies)
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, **CLOSE, msg=lambda m, key=key: f"{key}: {m}")
    assert expected["vision_encoder.patch_embedding.weight"].abs().max() > 1e-4  # there is something to compare


def test_encoder_projection_keys_and_values_run_once_per_picture(tiny_model, rows):
    model, batch = copy.deepcopy(tiny_model), mm.collate(rows["some of several"])
    sizes: dict[str, list[int]] = {}

    def count(name):
        return lambda module, inputs: sizes.setdefault(name, []).append(len(inputs[0]))

    model.vision_encoder.register_forward_pre_hook(count("encoder"))
    model.image_adapter.projection.register_forward_pre_hook(count("projection"))
    for block in model.image_adapter.blocks:
        block.cross_attn.k_proj.register_forward_pre_hook(count("keys"))
        block.cross_attn.v_proj.register_forward_pre_hook(count("values"))
    with torch.no_grad():
        model(batch)
    num_blocks = len(model.image_adapter.blocks)
    tokens = sum(model.vision_encoder.num_vision_tokens(tiles) for tiles in batch.images)
    assert sizes == {
        "encoder": [4],
        "projection": [tokens],
        "keys": [tokens] * num_blocks,
        "values": [tokens] * num_blocks,
    }


def test_many_answers_to_one_prompt_encode_its_picture_once(tiny_model, make_sample):
    model, prompt = copy.deepcopy(tiny_model), make_sample(".i...", seed=3)
    seen = []
    model.vision_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    options = {"temperature": 1.0, "stop_tokens": []}
    (alone,) = mm.generate_tokens(model, [prompt], 6, **options)
    other = replace(prompt, tokens=prompt.tokens[:-1], images=[copy_of(prompt.images[0])])
    assert mm.generate_tokens(model, [prompt, prompt, other], 6, **options)[:2] == [alone, alone]
    assert seen == [1, 1]


def test_clips_of_equal_frames_and_times_are_one(everything_run, random_tiles):
    model = mm.load(everything_run)[0]
    token = model.config.video_token_id

    def sample(seed: int, seconds: float, text: int) -> mm.Sample:
        clip = Clip([random_tiles(seed + n) for n in range(5)], seconds * torch.arange(5, dtype=torch.float64))
        return mm.Sample([token, text, 7], [IGNORED, text, 7], videos=[clip])

    batch = mm.collate([sample(1, 0.2, 9), sample(1, 0.2, 11), sample(1, 0.4, 9), sample(2, 0.2, 9)])
    assert batch.row_videos == [[0], [0], [1], [2]]
    loss, found = gradients(model, batch)
    expected_loss, expected = gradients(model, with_copies(batch))
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_pictures_that_differ_in_one_pixel_are_two(random_tiles):
    """Most pixels are no part of the fingerprint, so each is changed in turn of a picture with far more of them."""
    picture = random_tiles(0, (2, 2), size=112)
    for place in range(0, picture.pixels.numel(), 7919):
        changed = copy_of(picture)
        changed.pixels.view(-1)[place] += 1
        batch = mm.collate([mm.Sample([1], images=[tiles]) for tiles in (picture, changed, copy_of(picture))])
        assert batch.row_images == [[0], [1], [0]] and batch.images[0] is picture and batch.images[1] is changed


def test_equal_pixels_on_another_canvas_are_another_picture(random_tiles):
    square = random_tiles(0, (2, 2))
    others = [Tiles(square.pixels, grid) for grid in ((1, 4), (4, 1))]
    assert mm.collate([mm.Sample([1], images=[square, *others])]).row_images == [[0, 1, 2]]


def test_pictures_without_pixels_in_memory_are_one_only_as_one_object():
    without = [Tiles(torch.empty(1, 3, 28, 28, dtype=torch.uint8, device="meta"), (1, 1)) for _ in range(2)]
    assert mm.collate([mm.Sample([1], images=[*without, without[0]])]).row_images == [[0, 1, 0]]
