"""BEST-RQ: masks, the quantiser, which frames count as masked, and padding."""

import pytest
import torch
from torch.nn import functional as F

from speech.best_rq import BestRq, BestRqConfig, CodeStatistics, RandomQuantizer, draw_masks
from speech.features import FeatureStatistics

TINY = BestRqConfig(code_dim=4, codebook_size=32, num_codebooks=3)


@pytest.fixture(scope="module")
def best_rq(randomise) -> BestRq:
    return randomise(BestRq(TINY, encoder_width=32, num_mels=80))


def test_masks_cover_the_expected_share_everywhere():
    masks = draw_masks([400] * 600, range(600), BestRqConfig())
    expected = 1 - 0.975**32
    assert float(masks.float().mean()) == pytest.approx(expected, abs=0.02)  # 240,000 frames in spans of 32 and more
    assert float(masks[:, 0].float().mean()) == pytest.approx(expected, abs=0.08)  # the first frames as often
    assert float(masks[:, -1].float().mean()) == pytest.approx(expected, abs=0.08)


def test_masks_consist_of_spans():
    masks = draw_masks([5000], [3], BestRqConfig(mask_probability=0.004))[0].int()
    edges = F.pad(masks, (1, 1)).diff()
    runs = (edges == -1).nonzero() - (edges == 1).nonzero()
    assert (runs[1:-1] >= 32).all() and len(runs) > 5


def test_a_mask_depends_on_its_utterance_only():
    config = BestRqConfig()
    lengths, seeds = [100, 37, 240], [5, 6, 7]
    masks = draw_masks(torch.tensor(lengths), seeds, config)
    assert masks.shape == (3, 240)
    for row, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        assert torch.equal(masks[row, :length], draw_masks([length], [seed], config)[0])
        assert not masks[row, length:].any()
    assert not torch.equal(masks, draw_masks(lengths, [8, 9, 10], config))
    with pytest.raises(ValueError):
        draw_masks(lengths, [1], config)


@pytest.mark.parametrize("codebook_size", [200, 512])
def test_codes_are_the_nearest_by_cosine(codebook_size):
    quantizer = RandomQuantizer(320, BestRqConfig(codebook_size=codebook_size, num_codebooks=5))
    stacked = torch.randn(140, 320)  # more than FRAMES_AT_ONCE
    vectors = F.normalize(stacked @ quantizer.projection, dim=-1)
    codebooks = F.normalize(quantizer.codebooks, dim=-1)  # [Q, C, 16]
    distances = (vectors[:, None, None] - codebooks).square().sum(-1)  # [M, Q, C]
    assert torch.equal(quantizer(stacked), distances.argmin(-1))
    assert torch.equal(quantizer(3.7 * stacked), quantizer(stacked))
    torch.testing.assert_close(quantizer.codebooks.norm(dim=2), torch.ones(5, codebook_size))


def test_the_quantiser_is_saved_and_not_trained_and_stays_fp32(best_rq):
    quantizer = RandomQuantizer(320, TINY)
    assert not list(quantizer.parameters())
    assert quantizer.state_dict().keys() == {"projection", "codebooks"}
    stacked = torch.randn(40, 320)
    codes, codebooks = quantizer(stacked), quantizer.codebooks.clone()
    quantizer.to(torch.bfloat16)
    assert quantizer.projection.dtype is quantizer.codebooks.dtype is torch.float32
    assert torch.equal(quantizer.codebooks, codebooks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(stacked), codes)
    assert torch.equal(RandomQuantizer(320, TINY).codebooks, codebooks)  # it depends on the seed only
    assert not torch.equal(RandomQuantizer(320, BestRqConfig(4, seed=1)).codebooks, codebooks)
    with torch.device("meta"):
        empty = RandomQuantizer(320, TINY)
    assert empty.to_empty(device="cpu").codebooks.shape == codebooks.shape


def test_padding_does_not_change_the_loss(tiny_encoder, best_rq, utterances, padded):
    rows = utterances([90, 41, 160, 3])
    seeds = [11, 12, 13, 14]
    with torch.no_grad():
        mel, lengths = padded(rows, extra=5)
        masks = F.pad(draw_masks(lengths, seeds, TINY), (0, 5))
        together = best_rq(tiny_encoder, mel, lengths, masks)
        apart = [
            best_rq(tiny_encoder, row[None], torch.tensor([len(row)]), draw_masks([len(row)], [seed], TINY))
            for row, seed in zip(rows, seeds, strict=True)
        ]
    assert together.num_targets == sum(one.num_targets for one in apart) > 60
    assert torch.equal(together.targets, torch.cat([one.targets for one in apart]))
    torch.testing.assert_close(together.loss_sum, sum(one.loss_sum for one in apart), rtol=1e-5, atol=1e-4)
    assert together.num_frames == 294 and together.num_masked == int(masks.sum())


def test_a_stacked_frame_is_a_target_if_its_four_frames_are_masked(tiny_encoder, best_rq, utterances):
    mel, length = utterances([14])[0][None], torch.tensor([14])
    masks = torch.zeros(1, 14, dtype=torch.bool)
    masks[0, 2:8] = True  # stacked frames 0 and 2 keep some mel frames, frame 1 keeps none
    output = best_rq(tiny_encoder, mel, length, masks)
    stacked, _ = tiny_encoder.stack(mel, length)
    assert torch.equal(output.targets, best_rq.quantizer(stacked[0, 1:2]))
    masks[0, 12:] = True  # the last stacked frame has two mel frames only, so it is no target
    assert output.num_targets == best_rq(tiny_encoder, mel, length, masks).num_targets == 3


def test_the_encoder_does_not_see_masked_frames(tiny_encoder, best_rq, utterances):
    mel, length = utterances([40])[0][None], torch.tensor([40])
    masks = torch.zeros(1, 40, dtype=torch.bool)
    masks[0, 6:22] = True
    changed = mel.clone()
    changed[masks] += 5.0
    seen = []
    handle = best_rq.heads.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    with torch.no_grad():
        first, second = (best_rq(tiny_encoder, x, length, masks) for x in (mel, changed))
        mel[0, 5] += 5.0
        best_rq(tiny_encoder, mel, length, masks)
    handle.remove()
    assert torch.equal(seen[0], seen[1]) and not torch.equal(first.targets, second.targets)
    assert not torch.equal(seen[0], seen[2])


def test_encoder_and_heads_get_gradients(tiny_encoder, best_rq, utterances, padded):
    mel, lengths = padded(utterances([80, 64]))
    output = best_rq(tiny_encoder, mel, lengths, draw_masks(lengths, [1, 2], TINY))
    output.loss.backward()
    for module in (tiny_encoder, best_rq):
        assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())
        module.zero_grad(set_to_none=True)
    assert 0 <= int(output.num_correct) <= output.num_targets


def test_the_loss_is_zero_if_nothing_is_masked(tiny_encoder, best_rq, utterances):
    output = best_rq(tiny_encoder, utterances([9])[0][None], torch.tensor([9]), torch.zeros(1, 9, dtype=torch.bool))
    assert output.num_targets == 0 and output.loss.item() == 0.0
    output.loss.backward()
    tiny_encoder.zero_grad(set_to_none=True)
    best_rq.zero_grad(set_to_none=True)


def test_code_statistics():
    statistics = CodeStatistics(BestRqConfig(codebook_size=8, num_codebooks=2))
    assert statistics.warning() is None
    statistics.update(torch.tensor([[0, 5], [1, 5], [2, 5], [3, 5]]), num_masked=16, num_frames=64)
    torch.testing.assert_close(statistics.coverage(), torch.tensor([0.5, 0.125]))
    torch.testing.assert_close(statistics.perplexity(), torch.tensor([4.0, 1.0]))
    assert statistics.masked_share() == 0.25


def test_collapsed_codes_give_a_warning():
    """Log-mel vectors with a common slope have similar directions, so few codes are used until they are normalised."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.linspace(0, -6, 80)
    mel = -6 + slope + torch.randn(20_000, 1, generator=generator) + 0.7 * torch.randn(20_000, 80, generator=generator)
    counted = FeatureStatistics()
    counted.update(mel)
    mean, std = counted.mean_std()
    config = BestRqConfig(num_codebooks=2)
    quantizer, reached = RandomQuantizer(320, config), []
    for features in (mel, (mel - mean) / std):
        statistics = CodeStatistics(config)
        statistics.update(quantizer(features.reshape(-1, 320)))
        reached.append((float(statistics.coverage().mean()), statistics.warning()))
    (raw, raw_warning), (normalised, normalised_warning) = reached
    assert normalised > 10 * raw
    assert "codes have collapsed" in raw_warning and "feature_mean" in raw_warning
    assert normalised_warning is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"mask_span": 0}, "mask_span is 0"), ({"mask_probability": 0.0}, "mask_probability is 0.0")],
)
def test_invalid_configs_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        BestRqConfig(**wrong)
