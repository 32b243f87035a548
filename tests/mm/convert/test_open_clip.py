"""open_clip towers: tapped states equal the outputs of the tower's blocks, and unsupported options are errors."""

import open_clip
import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower

from mm.convert import open_clip as convert
from vision.encoder import CLIP_MEAN, CLIP_STD
from vision.tiling import Tiles

LAYERS, WIDTH, SIZE, PATCH = 6, 48, 28, 7
SETTINGS = {"layers": LAYERS, "width": WIDTH, "head_width": 16, "patch_size": PATCH, "image_size": SIZE}
TAPS = tuple(range(LAYERS + 1))


@pytest.fixture
def tower(randomise):
    def build(quick_gelu=False, **settings):
        return randomise(_build_vision_tower(24, CLIPVisionCfg(**{**SETTINGS, **settings}), quick_gelu=quick_gelu))

    return build


def random_tiles(size=SIZE, seed=0):
    pixels = torch.randint(0, 256, (1, 3, size, size), generator=torch.Generator().manual_seed(seed))
    return Tiles(pixels.to(torch.uint8), (1, 1))


def own_states(tower, tiles) -> list[torch.Tensor]:
    """The states of a tower: before the first block, after each block, and ln_post of the last."""
    states = []
    hooks = [tower.ln_pre.register_forward_hook(lambda _m, _i, out: states.append(out))]
    hooks += [b.register_forward_hook(lambda _m, _i, out: states.append(out)) for b in tower.transformer.resblocks]
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        tower((tiles.pixels / 255 - mean) / std)
        states.append(tower.ln_post(states[-1]))
    for hook in hooks:
        hook.remove()
    return [state[0] for state in states]


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("settings", [{}, {"pos_embed_type": "sin_cos_2d"}, {"mlp_ratio": 3.0, "head_width": 12}])
def test_features_equal_the_block_outputs(tower, largest_difference, quick_gelu, settings):
    theirs = tower(quick_gelu, **settings)
    encoder = convert.from_model(theirs, tap_points=TAPS, num_gated_layers=2)
    tiles = random_tiles()
    with torch.no_grad():
        features = encoder([tiles])  # [P, (1 + taps) * C], taps channel-interleaved
    states = own_states(theirs, tiles)
    assert encoder.config.activation == ("quick_gelu" if quick_gelu else "gelu")
    taps = features[:, WIDTH:].unflatten(1, (WIDTH, len(TAPS)))
    for point in TAPS:
        assert largest_difference(taps[..., point], states[point]) < 2e-5  # fp32 sums in another order
    assert largest_difference(features[:, :WIDTH], states[-1]) < 2e-5  # gates are 0: new layers change nothing


def test_a_model_and_its_tower_give_equal_encoders(randomise):
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    model = randomise(open_clip.CLIP(embed_dim=24, vision_cfg=SETTINGS, text_cfg=text))
    one, other = convert.from_model(model), convert.from_model(model.visual)
    tiles = random_tiles()
    assert torch.equal(one([tiles]), other([tiles]))
    assert "proj (it projects" in str(one.report)
    assert "conv1.weight: [48, 3, 7, 7] -> [48, 147]" in str(one.report)


def test_the_encoder_is_a_copy(tower):
    theirs = tower()
    encoder = convert.from_model(theirs)
    before = theirs.transformer.resblocks[0].attn.in_proj_weight.clone()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    assert torch.equal(theirs.transformer.resblocks[0].attn.in_proj_weight, before)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_another_tile_size_resizes_the_positions(tower):
    theirs = tower()
    encoder = convert.from_model(theirs, tile_size=56)
    assert encoder.config.tile_size == 56
    table = encoder.patch_position.local
    assert table.shape == (8 * 8 + 1, WIDTH)
    assert torch.equal(table[0], theirs.positional_embedding[0])
    assert torch.allclose(table[1:].mean(0), theirs.positional_embedding[1:].mean(0), atol=0.1)
    assert encoder([random_tiles(56)]).shape == (65, encoder.config.feature_size)
    assert "resized from 28 to 56 px" in str(encoder.report)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(32, (4, 8, 16, 24, 31)), (24, (3, 6, 12, 18, 23)), (12, (1, 3, 6, 9, 11)), (4, (1, 2, 3)), (1, (1,))],
)
def test_default_tap_points_are_at_the_papers_fractions(num_layers, expected):
    assert convert.default_tap_points(num_layers) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ls_init_value": 0.1}, "layer scale"),
        ({"no_ln_pre": True}, "no_ln_pre"),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "attentional_pool"),
        ({"final_ln_after_pool": True, "pool_type": "avg"}, "final_ln_after_pool"),
        ({"qk_norm": True}, "qk_norm"),
        ({"act_kwargs": {"approximate": "tanh"}}, "GELU"),
        ({"image_size": (28, 56)}, "not square"),
        ({"layers": (1, 1, 1, 1)}, "ModifiedResNet"),
    ],
)
def test_other_towers_are_errors_that_name_the_option(settings, named):
    with pytest.raises(ValueError, match=named):
        convert.from_model(_build_vision_tower(24, CLIPVisionCfg(**{**SETTINGS, **settings})))


def test_another_normalisation_is_an_error(tower):
    theirs = tower()
    open_clip.model.set_model_preprocess_cfg(theirs, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    with pytest.raises(ValueError, match="normalisation"):
        convert.from_model(theirs)
    open_clip.model.set_model_preprocess_cfg(theirs, {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)})
    convert.from_model(theirs)


def test_options_outside_the_blocks_are_reported(tower):
    report = str(convert.from_model(tower(patch_dropout=0.5, pool_type="avg")).report)
    assert "patch_dropout" in report
    assert "pool_type avg" in report


def test_a_local_checkpoint_by_name(tmp_path, tower, randomise, monkeypatch):
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    model = randomise(open_clip.CLIP(embed_dim=24, vision_cfg=SETTINGS, text_cfg=text))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    description = {"embed_dim": 24, "vision_cfg": SETTINGS, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-test", description)
    encoder = convert.load("tiny-test", tmp_path / "weights.pt", num_gated_layers=1)
    tiles = random_tiles()
    assert torch.equal(encoder([tiles]), convert.from_model(model, num_gated_layers=1)([tiles]))
    with pytest.raises(ValueError, match="no model no-such-model"):
        convert.load("no-such-model", tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="cannot load tiny-test"):
        convert.load("tiny-test", tmp_path / "absent.pt")
