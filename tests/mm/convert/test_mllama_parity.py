"""Llama 3.2 Vision: encoder, logits, gradients and greedy tokens equal those of `transformers`.

There are two intended differences, with tests of their own. `transformers` taps the output of the block of an index,
and the reference its input, so parity needs tap points of index + 1. In `transformers`, text before the first image
attends to all images, so parity needs rows that start with an image.
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
from mm.evaluation.attention_maps import token_attention
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
    max_images = max(len(images) for images in rows)
    size = rows[0][0].pixels.shape[-1]
    pixels = torch.zeros(len(rows), max_images, 4, 3, size, size)
    ids = torch.zeros(len(rows), max_images, dtype=torch.long)
    mask = torch.zeros(len(rows), max_images, 4, dtype=torch.long)
    mask[:, :, 0] = 1
    for row, images in enumerate(rows):
        for index, tiles in enumerate(images):
            pixels[row, index, : tiles.num_tiles] = normalised(tiles.pixels)
            ids[row, index] = tiles.canvas_id
            mask[row, index, : tiles.num_tiles] = 1
    return {"pixel_values": pixels.to(dtype), "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def their_batch(samples, dtype=torch.float32) -> dict:
    """Samples as the processor of `transformers` gives them to its model, right-padded."""
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
    """Samples that start with an image: every canvas, several images together and apart, different lengths."""

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


def test_encoder_features_equal_those_of_transformers(pair, random_tiles, largest_difference):
    """In float64, in which rounding errors are about 1e-15, so that any other difference is visible."""
    ours, theirs = (part.double() for part in (pair[0].vision_encoder, pair[1].model.vision_model))
    images = [random_tiles(number, grid) for number, grid in enumerate(CANVASES)]
    given = their_images([[tiles] for tiles in images], torch.float64)
    with torch.no_grad():
        features = ours(images)
        expected = theirs(**given).last_hidden_state  # [N, 1, 4, P, feature_size]
    pair[0].vision_encoder.float(), pair[1].model.vision_model.float()
    expected = torch.cat([expected[n, 0, : tiles.num_tiles].flatten(0, 1) for n, tiles in enumerate(images)])
    assert largest_difference(features, expected) < 1e-11


def test_unused_tiles_change_the_features_of_released_models(pair, random_tiles):
    """With padding="llama32", real tokens attend to padding, so features differ from those without it."""
    encoder = pair[0].vision_encoder
    tiles = [random_tiles(1)]
    with torch.no_grad():
        padded = encoder(tiles)
        encoder.config = replace(encoder.config, padding="ragged")
        ragged = encoder(tiles)
        encoder.config = replace(encoder.config, padding="llama32")
    assert (padded - ragged).abs().max() > 1e-3


def test_logits_equal_those_of_transformers(pair, samples, largest_difference):
    ours, theirs = pair
    batch = mm.collate(samples)
    with torch.no_grad():
        logits = ours(batch)
        expected = theirs(**their_batch(samples)).logits
    for row, length in enumerate(batch.lengths.tolist()):
        # fp32 sums in another order, through 8 layers, on logits around 10
        assert largest_difference(logits[row, :length], expected[row, :length]) < 1e-4


def test_attention_of_the_blocks_equals_that_of_transformers(pair, samples, monkeypatch):
    """Mean over heads; where they have padding tiles, of which none is seen, ours have nothing."""
    ours, theirs = pair
    monkeypatch.setattr(theirs.model.language_model.config, "_attn_implementation", "eager")
    caught = {}
    hooks = [
        layer.cross_attn.register_forward_hook(lambda _, __, out, depth=depth: caught.update({depth: out[1]}))
        for depth, layer in enumerate(theirs.model.language_model.layers)
        if hasattr(layer, "cross_attn")
    ]
    for sample in samples:
        with torch.no_grad():
            theirs(**their_batch([sample]))
        found = token_attention(ours, sample, range(len(sample.tokens)))
        num_tokens = ours.config.vision_encoder.tokens_per_tile
        real = torch.cat([torch.arange(4 * num_tokens) < tiles.num_tiles * num_tokens for tiles in sample.images])
        assert len(found) == len(caught) == 3
        for block, depth in zip(found, sorted(caught), strict=True):
            expected = caught[depth][0].mean(0)
            assert expected[:, ~real].sum() == 0
            torch.testing.assert_close(found[block], expected[:, real], rtol=0, atol=1e-5)
    for hook in hooks:
        hook.remove()


def test_logits_without_images_equal_those_of_transformers(pair, largest_difference):
    ours, theirs = pair
    samples = [mm.Sample([5, 6, 7, 8]), mm.Sample([9, 10])]
    batch = mm.collate(samples)
    with torch.no_grad():
        expected = theirs(input_ids=batch.tokens).logits
        assert largest_difference(ours(batch)[0], expected[0]) < 1e-4
        assert largest_difference(ours(batch)[1, :2], expected[1, :2]) < 1e-4


def test_gradients_equal_those_of_transformers(pair, samples, largest_difference):
    """Gradients of encoder and adapter; the language model is frozen."""
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


def test_greedy_tokens_equal_those_of_transformers(pair, samples):
    """Our rows are in one batch, theirs are alone."""
    ours, theirs = pair
    new = mm.generate_tokens(ours, samples, max_new_tokens=10, stop_tokens=[])
    for sample, tokens in zip(samples, new, strict=True):
        with torch.no_grad():
            out = theirs.generate(
                **their_batch([sample]), max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=None
            )
        assert tokens == out[0, len(sample.tokens) :].tolist()
    assert len({tuple(tokens) for tokens in new}) > 5  # the tokens depend on the images


def test_transformers_taps_one_block_later_than_the_reference(mllama, random_tiles, largest_difference):
    """For the indices 0, 1, 3, the reference and we tap the input of these blocks, `transformers` the output."""
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
    assert largest_difference(features[:, :32], expected[:, :32]) < 1e-5  # the final output is equal


def test_text_before_the_first_image_does_not_depend_on_it(pair, random_tiles):
    """In `transformers` its logits change with the pixels; here they are those of the language model alone."""
    ours, theirs = pair
    tokens = [5, 6, 7, IMAGE, 8, 9]
    first, second = (mm.Sample(tokens, images=[random_tiles(seed, (1, 2))]) for seed in (1, 2))
    with torch.no_grad():
        change = theirs(**their_batch([first])).logits - theirs(**their_batch([second])).logits
        assert change[0, :3].abs().max() > 1e-4
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
def test_visibility_equals_their_mask(row):
    num_images = row.count(IMAGE)
    tiles = [1 + image % 4 for image in range(num_images)]
    dense = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(row, IMAGE)], [tiles], 4, len(row)
    )
    (intervals,) = visibility_intervals(torch.tensor([row]) == IMAGE, [tiles])  # one vision token per tile
    for position in range(len(row)):
        theirs = [bool(dense[0, position, i, t]) for i in range(num_images) for t in range(tiles[i])]
        start, end = intervals[position].tolist()
        assert theirs == [start <= token < end for token in range(sum(tiles))]
