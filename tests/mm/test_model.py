"""Images in the model, with open gates: which tokens they act on, and which logits stay the language model's own.

Logits are equal to the bit where the same operations run on the same tensors. Elsewhere they are of size 1 to 10 and
equal within 2e-4, since FP32 sums in another order differ by about 1e-6 each.
"""

from dataclasses import replace

import pytest
import torch

import mm
from vision.tiling import Tiles

PATTERNS = [".i...", "...", ".ii..i...", "i", "....i", "iii", "i.i.i", "..i.", "......"]
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def samples(make_sample):
    return [make_sample(pattern, seed) for seed, pattern in enumerate(PATTERNS)]


def with_other_pixels(sample: mm.Sample, *numbers: int) -> mm.Sample:
    """The sample with the images of these numbers inverted."""
    images = [
        Tiles(255 - tiles.pixels, tiles.grid) if index in numbers else tiles
        for index, tiles in enumerate(sample.images)
    ]
    return mm.Sample(sample.tokens, sample.labels, images)


def logits(model: mm.MultimodalModel, *samples: mm.Sample) -> torch.Tensor:
    return model(mm.collate(samples))


def block_outputs(model: mm.MultimodalModel, sample: mm.Sample) -> torch.Tensor:
    """What the first block adds to each token, [T, D]; no image acts on its input."""
    recorded = {}

    def keep(_, inputs, output):
        recorded["added"] = (output - inputs[0])[0]

    handle = model.image_adapter.blocks[0].register_forward_hook(keep)
    try:
        logits(model, sample)
    finally:
        handle.remove()
    return recorded["added"]


@pytest.mark.parametrize("pattern", ["..i...", "...i", "i....", "..ii...i..", ".i.i.i."])
def test_pixels_change_no_logit_before_their_image(tiny_model, make_sample, pattern):
    sample = make_sample(pattern)
    before = logits(tiny_model, sample)[0]
    places = [place for place, mark in enumerate(pattern) if mark == "i"]
    for index, place in enumerate(places):
        after = logits(tiny_model, with_other_pixels(sample, index))[0]
        torch.testing.assert_close(after[:place], before[:place], rtol=0, atol=0)
        changed = (after[place:] - before[place:]).abs().amax(-1)
        assert (changed > 1e-3).all(), "an image acts on every token from its placeholder on"


def test_block_depends_on_the_latest_run_of_images_only(tiny_model, make_sample):
    pattern = ".ii..i..ii.."
    sample = make_sample(pattern)
    before = block_outputs(tiny_model, sample)
    # image -> tokens whose latest run, up to them, holds it
    attended_by = {0: range(1, 5), 1: range(2, 5), 2: range(5, 8), 3: range(8, 12), 4: range(9, 12)}
    for index, tokens in attended_by.items():
        change = (block_outputs(tiny_model, with_other_pixels(sample, index)) - before).abs().amax(-1)
        attending = torch.tensor([place in tokens for place in range(len(pattern))])
        assert (change[attending] > 1e-3).all(), f"image {index} does not act on all of {list(tokens)}"
        assert (change[~attending] == 0).all(), f"image {index} acts outside {list(tokens)}"
    assert (before[0] == 0).all()
    assert (before[1:] != 0).any(-1).all()


def test_a_run_of_images_adds_what_it_adds_alone(tiny_model, make_sample):
    """With text in place of the run before it, the block adds the same to every later token."""
    sample = make_sample("..i..ii..")
    text = [7 if place == 2 else token for place, token in enumerate(sample.tokens)]
    alone = mm.Sample(text, images=sample.images[1:])
    block = tiny_model.image_adapter.blocks[0]
    entering = {}
    handle = block.register_forward_pre_hook(lambda _, inputs: entering.update(visible=inputs[1], vision=inputs[2]))
    added = []
    x = torch.randn(1, len(text), 64, generator=torch.Generator().manual_seed(0))
    for case in (sample, alone):
        logits(tiny_model, case)
        added.append((block.forward(x, entering["visible"], entering["vision"]) - x)[0])
    handle.remove()
    torch.testing.assert_close(added[0][5:], added[1][5:], rtol=1e-5, atol=1e-5)
    assert (added[0][2:5] - added[1][2:5]).abs().max() > 1e-3


def test_rows_without_images_are_the_bare_language_model_to_the_bit(tiny_model, samples):
    batch = mm.collate(samples)
    found = tiny_model(batch)
    extra = batch.tokens >= tiny_model.config.language_model.vocab_size
    bare = tiny_model.language_model(batch.tokens.masked_fill(extra, 0))
    for row, sample in enumerate(samples):
        assert torch.equal(found[row], bare[row]) == (not sample.images)


def test_batch_without_images_is_the_bare_language_model_to_the_bit(tiny_model, make_sample):
    batch = mm.collate([make_sample("....", 1), make_sample(".......", 2)])
    assert torch.equal(tiny_model(batch), tiny_model.language_model(batch.tokens))


def test_cached_rows_without_images_are_the_bare_language_model_to_the_bit(
    tiny_model, bare_model, samples, decoding_logits
):
    text_only = [mm.Sample(sample.tokens) for sample in samples]  # to the bare model a placeholder is a token
    new = [[5, 6]] * len(samples)
    found, bare = decoding_logits(tiny_model, samples, new), decoding_logits(bare_model, text_only, new)
    for step in range(3):
        for row, sample in enumerate(samples):
            assert torch.equal(found[step][row], bare[step][row]) == (not sample.images)


@pytest.mark.parametrize("positions", [(2, 4, 6), (0, 3, 6), None])
def test_closed_gates_give_the_language_models_logits(build_model, bare_model, tiny_config, samples, positions):
    adapter = replace(tiny_config.image_adapter, positions=positions)
    model = build_model(replace(tiny_config, image_adapter=adapter))
    model.language_model, model.extra_embeddings = bare_model.language_model, bare_model.extra_embeddings
    bare = logits(bare_model, *(mm.Sample(sample.tokens) for sample in samples))
    assert not torch.equal(logits(model, *samples), bare)
    for block in model.image_adapter.blocks:
        block.gate_attn.zero_()
        block.gate_ffn.zero_()
    assert torch.equal(logits(model, *samples), bare)


def test_new_model_starts_with_closed_gates(tiny_config, samples):
    model = mm.MultimodalModel(tiny_config).eval()
    one, two = (logits(model, with_other_pixels(samples[0], *changed)) for changed in ((), (0,)))
    assert torch.equal(one, two)


@pytest.mark.parametrize("position", [0, 2, 6])
def test_images_act_at_each_block_position(build_model, tiny_config, make_sample, position):
    model = build_model(replace(tiny_config, image_adapter=replace(tiny_config.image_adapter, positions=(position,))))
    sample = make_sample("..i..")
    changed = (logits(model, sample) - logits(model, with_other_pixels(sample, 0)))[0].abs().amax(-1)
    assert (changed[:2] == 0).all()
    assert (changed[2:] > 1e-3).all()


def test_batch_equals_single_in_any_order(tiny_model, samples):
    alone = [logits(tiny_model, sample)[0] for sample in samples]
    for order in (range(len(samples)), reversed(range(len(samples))), (3, 7, 1, 5)):
        order = list(order)
        together = logits(tiny_model, *(samples[row] for row in order))
        for found, row in zip(together, order, strict=True):
            torch.testing.assert_close(found[: len(alone[row])], alone[row], **CLOSE)


def test_images_of_a_batch_do_not_mix(tiny_model, samples):
    """A row's logits stay equal when all images of all other rows change."""
    before = logits(tiny_model, *samples)
    for row, sample in enumerate(samples):
        others = [s if s is sample else with_other_pixels(s, *range(len(s.images))) for s in samples]
        length = len(sample.tokens)
        torch.testing.assert_close(logits(tiny_model, *others)[row, :length], before[row, :length], **CLOSE)


def test_ragged_encoding_equals_each_image_alone(tiny_model, random_tiles):
    grids = [(1, 1), (1, 2), (2, 2), (2, 1), (1, 1), (3, 1)]
    images = [random_tiles(seed, grid) for seed, grid in enumerate(grids)]
    together = tiny_model.vision_encoder(images)
    alone = torch.cat([tiny_model.vision_encoder([tiles]) for tiles in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", [".i...", ".ii..i...", "i", "....i", "...", "..i.i"])
def test_cached_decoding_equals_the_full_forward(tiny_model, make_sample, decoding_logits, pattern):
    sample, new = make_sample(pattern), [9, 4, 77, 31]
    expected = logits(tiny_model, mm.Sample(sample.tokens + new, images=sample.images))[0]
    found = decoding_logits(tiny_model, [sample], [new])
    torch.testing.assert_close(torch.cat(found), expected[len(pattern) - 1 :], **CLOSE)


def test_cached_decoding_of_a_ragged_batch_equals_the_full_forward(tiny_model, samples, decoding_logits):
    new = [[(11 * row + 7 * step) % 300 + 3 for step in range(4)] for row in range(len(samples))]
    found = decoding_logits(tiny_model, samples, new)[-1]
    for row, sample in enumerate(samples):
        expected = logits(tiny_model, mm.Sample(sample.tokens + new[row], images=sample.images))[0]
        torch.testing.assert_close(found[row], expected[-1], **CLOSE)


def test_padding_is_not_an_image_even_where_ids_coincide(build_model, tiny_config, make_sample):
    """Rows are padded with token 0, which a released model might use for its images."""
    model = build_model(replace(tiny_config, image_token_id=0))
    sample = mm.Sample([5, 0, 7], images=make_sample("i").images)
    alone = logits(model, sample)[0]
    torch.testing.assert_close(logits(model, sample, mm.Sample([8] * 9))[0, :3], alone, **CLOSE)


def test_extra_rows_are_inputs_and_never_outputs(tiny_model, make_sample):
    vocab = tiny_model.config.language_model.vocab_size
    for token in range(vocab, vocab + 8):
        if token != tiny_model.config.image_token_id:
            assert logits(tiny_model, mm.Sample([3, token])).shape == (1, 2, vocab)
    expected = tiny_model.extra_embeddings[2]
    assert torch.equal(tiny_model.embed(torch.tensor([[vocab + 2]]))[0, 0], expected)
    assert not tiny_model.extra_embeddings.requires_grad


def test_gradients_stop_at_the_frozen_parts(build_model, tiny_config, samples):
    with torch.inference_mode(False), torch.enable_grad():
        model = build_model(tiny_config)
        model.language_model.requires_grad_(False)
        model(mm.collate(samples)).logsumexp(-1).sum().backward()
        for name, parameter in model.named_parameters():
            if name.startswith("language_model.") or name == "extra_embeddings":
                assert parameter.grad is None, name
            elif not name.endswith("embedding") and not name.endswith("tile"):  # tables: rows of absent canvases are 0
                assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("tokens", "num_images", "message"),
    [
        ([3, "image", 4], 0, "1 image tokens .* and 0 images"),
        ([3, 4], 1, "0 image tokens .* and 1 images"),
        (["image", "image"], 1, "2 image tokens"),
        ([3, 328], 0, "328 lies outside"),
        ([3, -1], 0, "-1 lies outside"),
        ([3] * 161, 0, "161 tokens.*context is 160"),
    ],
)
def test_bad_input_is_named(tiny_model, random_tiles, tokens, num_images, message):
    tokens = [tiny_model.config.image_token_id if token == "image" else token for token in tokens]
    good = mm.Sample([3, 4, 5])
    with pytest.raises(ValueError, match=message):
        logits(tiny_model, good, mm.Sample(tokens, images=[random_tiles()] * num_images))


def test_bad_images_are_named(tiny_model, bare_model, tiny_config, build_model, random_tiles):
    token = tiny_model.config.image_token_id
    with pytest.raises(ValueError, match="42 px"):
        logits(tiny_model, mm.Sample([token], images=[random_tiles(size=42)]))
    with pytest.raises(ValueError, match="no vision_encoder"):
        logits(bare_model, mm.Sample([token], images=[random_tiles()]))
    small = build_model(replace(tiny_config, vision_encoder=replace(tiny_config.vision_encoder, max_num_tiles=2)))
    with pytest.raises(ValueError, match="4 tiles"):
        logits(small, mm.Sample([token], images=[random_tiles(grid=(2, 2))]))


def test_vision_tokens_sum_their_gradient_in_fp32_under_autocast(tiny_model, make_sample):
    """Every block adds to it; in bf16 the small contributions would be rounded away."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vision = tiny_model.vision_contexts(mm.collate([make_sample("i..")]), None)["image"].tokens
    assert vision.dtype == torch.float32


@pytest.mark.parametrize("gate_init", [0.0, 0.5])
def test_an_adapter_is_the_identity_until_a_branch_of_a_block_opens(tiny_config, gate_init):
    """A branch is open if neither its gate nor its last matrix is 0."""
    with torch.inference_mode(False), torch.no_grad():
        adapter = replace(tiny_config.image_adapter, gate_init=gate_init)
        model = mm.MultimodalModel(replace(tiny_config, image_adapter=adapter))
        block = model.image_adapter.blocks[1]
        for gate, matrix in (
            (block.gate_attn, block.cross_attn.o_proj.weight),
            (block.gate_ffn, block.mlp.down_proj.weight),
        ):
            assert model.image_adapter.is_identity()
            closed = matrix if gate_init else gate
            closed.fill_(0.1)
            assert not model.image_adapter.is_identity()
            closed.zero_()
