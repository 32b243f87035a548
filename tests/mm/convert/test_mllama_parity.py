"""Llama 3.2 Vision: encoder, logits, gradients and greedy tokens are those of `transformers`.

Two differences are meant, and have their own tests: `transformers` taps the encoder one block later than an index
says (so parity asks for index + 1), and lets text before the first image receive attention output (so parity cases
begin with an image).
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

import mm
from mm.convert import mllama as convert
from mm.vision_context import visibility_intervals
from vision.encoder import CLIP_MEAN, CLIP_STD
from vision.tiling import CANVASES

IMAGE = 61
THEIR_TAPS = (1, 2, 4)  # the folder's indices are 0, 1, 3


@pytest.fixture(scope="module")
def pair(mllama):
    theirs, folder = mllama
    return convert.load(folder, tap_points=THEIR_TAPS).eval(), theirs


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def their_images(rows, dtype=torch.float32) -> dict:
    """Images of each row -> pixel_values [B, N, 4, 3, S, S], aspect_ratio_ids [B, N], aspect_ratio_mask [B, N, 4]."""
    most = max(len(images) for images in rows)
    size = rows[0][0].pixels.shape[-1]
    pixels = torch.zeros(len(rows), most, 4, 3, size, size)
    ids = torch.zeros(len(rows), most, dtype=torch.long)
    mask = torch.zeros(len(rows), most, 4, dtype=torch.long)
    mask[:, :, 0] = 1
    for row, images in enumerate(rows):
        for number, tiles in enumerate(images):
            pixels[row, number, : tiles.num_tiles] = normalised(tiles.pixels)
            ids[row, number] = tiles.canvas_id
            mask[row, number, : tiles.num_tiles] = 1
    return {"pixel_values": pixels.to(dtype), "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def their_batch(samples, dtype=torch.float32) -> dict:
    """Samples as `transformers`' own processor would hand them to its model, right-padded."""
    length = max(len(sample.tokens) for sample in samples)
    tokens = torch.zeros(len(samples), length, dtype=torch.long)
    attention = torch.zeros_like(tokens)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        attention[row, : len(sample.tokens)] = 1
    masks = [get_cross_attention_token_mask(sample.tokens, IMAGE) for sample in samples]
    counts = [[tiles.num_tiles for tiles in sample.images] for sample in samples]
    cross = convert_sparse_cross_attention_mask_to_dense(masks, counts, 4, length)
    return {
        "input_ids": tokens,
        "attention_mask": attention,
        "cross_attention_mask": torch.from_numpy(cross),
        **their_images([sample.images for sample in samples], dtype),
    }


@pytest.fixture(scope="module")
def samples(random_tiles):
    """Image first, then: every canvas; two images in a row and apart; rows of different lengths."""

    def text(length, seed):
        return torch.randint(4, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()

    one_each = [
        mm.Sample([IMAGE, *text(5 + number, number)], images=[random_tiles(number, grid)])
        for number, grid in enumerate(CANVASES)
    ]
    together = mm.Sample([IMAGE, IMAGE, *text(9, 20)], images=[random_tiles(30, (2, 2)), random_tiles(31, (1, 3))])
    apart = mm.Sample(
        [IMAGE, *text(4, 21), IMAGE, *text(3, 22)], images=[random_tiles(32, (1, 2)), random_tiles(33, (4, 1))]
    )
    last = mm.Sample([IMAGE, *text(2, 23), IMAGE, IMAGE], images=[random_tiles(n, (1, 1)) for n in (34, 35, 36)])
    return [*one_each, together, apart, last]


def test_encoder_output(pair, random_tiles, largest_difference):
    """In float64, where rounding leaves about 1e-15 of the values, so that any real difference shows."""
    ours, theirs = (part.double() for part in (pair[0].vision_encoder, pair[1].model.vision_model))
    images = [random_tiles(number, grid) for number, grid in enumerate(CANVASES)]
    given = their_images([[tiles] for tiles in images], torch.float64)
    with torch.no_grad():
        features = ours(images)
        expected = theirs(**given).last_hidden_state  # [N, 1, 4, P, feature_size]
    pair[0].vision_encoder.float(), pair[1].model.vision_model.float()
    expected = torch.cat([expected[n, 0, : tiles.num_tiles].flatten(0, 1) for n, tiles in enumerate(images)])
    assert largest_difference(features, expected) < 1e-11


def test_unused_tiles_matter_in_released_models(pair, random_tiles):
    """The quirk that padding="llama32" is for: a lone tile is seen differently when nothing pads it."""
    encoder = pair[0].vision_encoder
    tiles = [random_tiles(1)]
    with torch.no_grad():
        padded = encoder(tiles)
        encoder.config = replace(encoder.config, padding="ragged")
        ragged = encoder(tiles)
        encoder.config = replace(encoder.config, padding="llama32")
    assert (padded - ragged).abs().max() > 1e-3


def test_logits(pair, samples, largest_difference):
    ours, theirs = pair
    batch = mm.collate(samples)
    with torch.no_grad():
        logits = ours(batch)
        expected = theirs(**their_batch(samples)).logits
    for row, length in enumerate(batch.lengths.tolist()):
        # fp32 sums in another order, through 8 layers, on logits around 10
        assert largest_difference(logits[row, :length], expected[row, :length]) < 1e-4


def test_logits_without_images(pair, largest_difference):
    ours, theirs = pair
    samples = [mm.Sample([5, 6, 7, 8]), mm.Sample([9, 10])]
    batch = mm.collate(samples)
    with torch.no_grad():
        expected = theirs(input_ids=batch.tokens).logits
        assert largest_difference(ours(batch)[0], expected[0]) < 1e-4
        assert largest_difference(ours(batch)[1, :2], expected[1, :2]) < 1e-4


def test_gradients_of_all_that_is_trained(pair, samples, largest_difference):
    """Encoder and adapter get the gradients that `transformers` computes; the language model gets none."""
    ours, theirs = pair
    ours.requires_grad_(False)
    ours.vision_encoder.requires_grad_(True)
    ours.image_adapter.requires_grad_(True)
    batch = mm.collate([mm.Sample(s.tokens, [-100, *s.tokens[1:]], s.images) for s in samples])
    given = their_batch(samples)
    labels = batch.labels.masked_fill(batch.labels == IMAGE, -100)

    def loss(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    loss(ours(batch)).backward()
    loss(theirs(**given).logits).backward()
    expected = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        gradient = expected[convert.stored_name(name, ours.config, renamed=True)].grad
        scale = gradient.abs().max()
        assert scale > 0, f"{name} has no gradient to compare"
        assert largest_difference(parameter.grad / scale, gradient.reshape(parameter.shape) / scale) < 1e-4, name
        compared += 1
    assert compared == len(list(ours.vision_encoder.parameters())) + len(list(ours.image_adapter.parameters()))
    ours.zero_grad(), theirs.zero_grad()


def test_greedy_generation(pair, samples):
    """All rows at once here, each row alone there."""
    ours, theirs = pair
    new = mm.generate_tokens(ours, samples, max_new_tokens=10, stop_tokens=[])
    for sample, tokens in zip(samples, new, strict=True):
        with torch.no_grad():
            out = theirs.generate(
                **their_batch([sample]), max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=None
            )
        assert tokens == out[0, len(sample.tokens) :].tolist()
    assert len({tuple(tokens) for tokens in new}) > 5  # what is generated depends on what is seen


def test_transformers_taps_one_block_later_than_the_reference(mllama, random_tiles, largest_difference):
    """The folder's indices 0, 1, 3: the reference keeps the state that enters these blocks, we do the same."""
    theirs, folder = mllama
    ours = convert.load(folder)
    assert ours.config.vision_encoder.tap_points == (0, 1, 3)
    tiles = random_tiles(3, (2, 2))
    entering, leaving = [], []

    def keep(_module, _inputs, kwargs, output):
        entering.append(kwargs["hidden_states"])
        leaving.append(output)

    blocks = theirs.model.vision_model.transformer.layers
    hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        expected = theirs.model.vision_model(**their_images([[tiles]])).last_hidden_state[0, 0].flatten(0, 1)
        features = ours.vision_encoder([tiles])
    for hook in hooks:
        hook.remove()
    taps, their_taps = (f[:, 32:].unflatten(1, (32, 3)) for f in (features, expected))
    for place, index in enumerate((0, 1, 3)):
        real = [state[0].unflatten(0, (4, -1))[:, :5].flatten(0, 1) for state in (entering[index], leaving[index])]
        assert largest_difference(taps[..., place], real[0]) < 1e-5
        assert largest_difference(their_taps[..., place], real[1]) < 1e-5
        assert (taps[..., place] - their_taps[..., place]).abs().max() > 0.01
    assert largest_difference(features[:, :32], expected[:, :32]) < 1e-5  # the final output is the same


def test_text_before_the_first_image(pair, random_tiles):
    """There, its logits move with the picture's pixels; here, they are those of the language model alone."""
    ours, theirs = pair
    tokens = [5, 6, 7, IMAGE, 8, 9]
    first, second = (mm.Sample(tokens, images=[random_tiles(seed, (1, 2))]) for seed in (1, 2))
    with torch.no_grad():
        moved = theirs(**their_batch([first])).logits - theirs(**their_batch([second])).logits
        assert moved[0, :3].abs().max() > 1e-4
        one, other = ours(mm.collate([first])), ours(mm.collate([second]))
        assert torch.equal(one[0, :3], other[0, :3])
        alone = ours.language_model(torch.tensor([tokens[:3]]))
    assert (one[0, :3] - alone[0]).abs().max() < 1e-4
    assert (one[0, 3:] - other[0, 3:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "row",
    [
        [IMAGE, 5, 6],
        [5, IMAGE, 6],
        [IMAGE, IMAGE, 5],
        [IMAGE, 5, IMAGE, 6],
        [5, IMAGE, IMAGE, 6, IMAGE, 7],
        [IMAGE, 5, IMAGE, IMAGE],
        [5, IMAGE],
        [IMAGE, IMAGE, IMAGE],
    ],
)
def test_who_sees_which_image_is_their_mask(row):
    number = row.count(IMAGE)
    tiles = [1 + image % 4 for image in range(number)]
    dense = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(row, IMAGE)], [tiles], 4, len(row)
    )
    (intervals,) = visibility_intervals(torch.tensor([row]) == IMAGE, [number], tiles)  # one vision token per tile
    for position in range(len(row)):
        theirs = [bool(dense[0, position, i, t]) for i in range(number) for t in range(tiles[i])]
        start, end = intervals[position].tolist()
        assert theirs == [start <= token < end for token in range(sum(tiles))]
