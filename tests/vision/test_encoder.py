"""The image encoder: features depend on their own image only, and on all of its pixels and positions."""

from dataclasses import replace

import pytest
import torch

from layers.sources import materialise
from vision.encoder import VisionEncoder, VisionEncoderConfig, new_encoder, resize_positions
from vision.tiling import CANVASES, Tiles

CONFIG = VisionEncoderConfig(
    tile_size=28,
    patch_size=14,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_gated_layers=2,
    num_heads=2,
    tap_points=(0, 2),
)
ROUNDING = 1e-5  # fp32 sums in another order, on features around 5


@pytest.fixture(params=["ragged", "llama32"])
def padding(request) -> str:
    return request.param


def build(seed=0, **changes) -> VisionEncoder:
    """An encoder with random weights; gates and position tables are not zero."""
    generator = torch.Generator().manual_seed(seed)
    encoder = VisionEncoder(replace(CONFIG, **changes))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "gate" in name.rpartition(".")[2]:
                parameter.copy_(0.5 + 0.2 * noise.abs())
            elif "norm" in name:
                parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
            else:
                parameter.copy_(0.2 * noise)
    return encoder.eval()


def images_of(random_tiles) -> list[Tiles]:
    return [random_tiles(number, grid) for number, grid in enumerate(CANVASES)]


@torch.no_grad()
def encode(encoder, images) -> list[torch.Tensor]:
    """Features of each image, [K * P, feature_size]."""
    return list(encoder(images).split([encoder.num_vision_tokens(tiles) for tiles in images]))


def test_features_do_not_depend_on_the_batch(padding, random_tiles):
    encoder = build(padding=padding)
    images = images_of(random_tiles)
    for tiles, features in zip(images, encode(encoder, images), strict=True):
        (alone,) = encode(encoder, [tiles])
        assert features.shape == (tiles.num_tiles * 5, 3 * 32)
        assert (features - alone).abs().max() < ROUNDING


def test_features_do_not_depend_on_the_order_of_images(padding, random_tiles):
    encoder = build(padding=padding)
    images = images_of(random_tiles)
    order = [5, 2, 7, 0, 3, 1, 6, 4]
    features = encode(encoder, images)
    for index, shuffled in zip(order, encode(encoder, [images[i] for i in order]), strict=True):
        assert (shuffled - features[index]).abs().max() < ROUNDING


def test_tiles_attend_within_their_image_only(padding, random_tiles):
    encoder = build(padding=padding)
    one, other = random_tiles(1, (1, 2)), random_tiles(2, (1, 2))
    mixed = Tiles(torch.stack([one.pixels[0], other.pixels[1]]), (1, 2))
    before, other_before = encode(encoder, [one, other])
    after, other_after = encode(encoder, [mixed, other])
    assert (before[:5] - after[:5]).abs().max() > 1e-3  # the first tile depends on the second
    assert (other_before - other_after).abs().max() < ROUNDING


def test_features_depend_on_the_canvas(random_tiles):
    """The same four tiles on three canvases differ by their tile and position embeddings."""
    encoder = build()
    tiles = random_tiles(3, (2, 2))
    features = [encode(encoder, [Tiles(tiles.pixels, grid)])[0] for grid in ((2, 2), (1, 4), (4, 1))]
    assert (features[0] - features[1]).abs().max() > 1e-2
    assert (features[1] - features[2]).abs().max() > 1e-2


def test_features_are_the_output_and_the_interleaved_taps(random_tiles):
    encoder = build()
    tiles = [random_tiles(1, (1, 2))]
    (features,) = encode(encoder, tiles)
    (plain,) = encode(build(tap_points=()), tiles)
    assert torch.equal(features[:, :32], plain)
    for index, point in enumerate((0, 2)):
        (single,) = encode(build(tap_points=(point,)), tiles)
        assert torch.equal(features[:, 32 + index :: 2], single[:, 32:])
    (last,) = encode(build(tap_points=(3,), num_gated_layers=0), tiles)
    normed = encoder.layernorm_post(last[:, 32:])
    tabled = normed.unflatten(0, (2, -1)) + encoder.post_tile_position.embedding[2, :2, None] * (
        encoder.post_tile_position.gate.tanh()
    )
    (final,) = encode(build(num_gated_layers=0), tiles)
    assert (final[:, :32] - tabled.flatten(0, 1)).abs().max() < ROUNDING


def test_gated_layers_with_gates_at_zero_are_the_identity(random_tiles):
    encoder, without = build(), build(num_gated_layers=0)
    with torch.no_grad():
        for layer in encoder.gated_layers:
            layer.gate_attn.zero_(), layer.gate_ffn.zero_()
    tiles = [random_tiles(1, (2, 1))]
    assert torch.equal(encode(encoder, tiles)[0], encode(without, tiles)[0])


def test_a_new_encoder_does_not_use_its_tile_tables(random_tiles):
    """The gates of the tile tables start at 0."""
    encoder = VisionEncoder(CONFIG)
    changed = VisionEncoder(CONFIG)
    changed.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        for table in (changed.patch_position.tile, changed.pre_tile_position.embedding):
            table.normal_()
        changed.post_tile_position.embedding.normal_()
    tiles = [random_tiles(1, (2, 2))]
    assert torch.equal(encode(encoder, tiles)[0], encode(changed, tiles)[0])


def test_every_pixel_reaches_the_right_patch(random_tiles):
    """Before the first layer, a pixel changes one token only."""
    encoder = build(tap_points=(0,))
    tiles = random_tiles(1)
    (before,) = encode(encoder, [tiles])
    for row, column, token in ((0, 0, 1), (13, 14, 2), (14, 13, 3), (27, 27, 4)):
        pixels = tiles.pixels.clone()
        pixels[0, 1, row, column] ^= 128
        (after,) = encode(encoder, [Tiles(pixels, (1, 1))])
        moved = (before - after)[:, 32:].abs().amax(1) > 1e-4
        assert moved.nonzero().flatten().tolist() == [token]


def test_gradients_reach_every_parameter(padding, random_tiles):
    encoder = build(padding=padding)
    encoder(images_of(random_tiles)).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_bf16_is_close_to_fp32(random_tiles):
    encoder = build()
    tiles = [random_tiles(1, (1, 3))]
    (full,) = encode(encoder, tiles)
    (half,) = encode(encoder.to(torch.bfloat16), tiles)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().mean() < 0.05 * full.abs().mean()  # 8 bits of mantissa, 5 layers


def test_invalid_images_are_errors(random_tiles):
    with pytest.raises(ValueError, match=r"image 1 .*14 px.*28 px"):
        build()([random_tiles(), random_tiles(size=14)])
    with pytest.raises(ValueError, match=r"image 0 has 4 tiles.*at most 2"):
        build(max_num_tiles=2)([random_tiles(grid=(2, 2))])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tile_size": 30}, "tile_size 30"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"tap_points": (4,)}, "outside 0..3"),
        ({"padding": "square"}, "square"),
        ({"max_num_tiles": 5}, "max_num_tiles is 5"),
        ({"activation": "relu"}, "relu"),
    ],
)
def test_invalid_configs_are_errors(change, named):
    with pytest.raises(ValueError, match=named):
        VisionEncoder(replace(CONFIG, **change))


def tables(side: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "patch_position.local": torch.randn(side**2 + 1, 6, generator=generator),
        "patch_position.tile": torch.randn(9, 4, side**2 + 1, 6, generator=generator),
        "class_embedding": torch.randn(6, generator=generator),
    }


def test_positions_of_the_same_size_are_unchanged():
    state = tables(3)
    for name, tensor in resize_positions(state, 3, 3).items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("new_side", [2, 4, 5, 8])
def test_resized_positions_are_interpolated(new_side):
    state = tables(4)
    resized = resize_positions(state, 4, new_side)
    for name in ("patch_position.local", "patch_position.tile"):
        assert resized[name].shape[-2] == new_side**2 + 1
        assert torch.equal(resized[name][..., 0, :], state[name][..., 0, :])  # CLS
        low, high = state[name][..., 1:, :].amin(-2), state[name][..., 1:, :].amax(-2)
        grid = resized[name][..., 1:, :]
        assert (grid >= low[..., None, :] - 1e-6).all() and (grid <= high[..., None, :] + 1e-6).all()  # interpolated
    assert resized["class_embedding"] is state["class_embedding"]
    assert state["patch_position.local"].shape[0] == 17  # the argument is not changed


def test_constant_and_linear_tables_stay_constant_and_linear():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    grid = torch.stack([rows, columns, torch.full((4, 4), 7.0)], dim=-1).flatten(0, 1)
    state = {"patch_position.local": torch.cat([torch.zeros(1, 3), grid])}
    wide = resize_positions(state, 4, 8)["patch_position.local"][1:].unflatten(0, (8, 8))
    assert (wide[..., 2] == 7).all()
    assert torch.allclose(wide[..., 0], wide[:, :1, 0].expand(8, 8))  # rows change down, not across
    assert torch.allclose(wide[..., 1], wide[:1, :, 1].expand(8, 8))
    assert (wide[:, 0, 0].diff() >= 0).all() and (wide[0, :, 1].diff() >= 0).all()


def test_a_resized_encoder_encodes_larger_tiles(random_tiles):
    encoder = build()
    larger = VisionEncoder(replace(CONFIG, tile_size=56))
    larger.load_state_dict(resize_positions(encoder.state_dict(), 2, 4))
    (features,) = encode(larger, [random_tiles(1, (1, 2), size=56)])
    assert features.shape == (2 * 17, 96)
    assert features.isfinite().all()


def test_initial_weights_depend_on_the_seed_alone():
    def initialised(global_seed: int, seed: int) -> VisionEncoder:
        torch.manual_seed(global_seed)
        return materialise(new_encoder(CONFIG, seed))

    first, same, other = initialised(1, 5), initialised(2, 5), initialised(1, 6)
    name = "layers.1.mlp.fc1.weight"
    assert torch.equal(first.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert all(p.isfinite().all() for p in first.parameters())
    # The output projections of five layers are scaled by 1 / sqrt(2 * 5), and fc1 is not.
    scales = {part: float(first.get_parameter(f"layers.1.mlp.{part}.weight").detach().std()) for part in ("fc1", "fc2")}
    assert scales["fc1"] == pytest.approx(32**-0.5, rel=0.1)
    assert scales["fc2"] == pytest.approx(48**-0.5 * 10**-0.5, rel=0.1)
