"""What is done to features in training: within its limits, a function of its generator, and what it says it is."""

import math

import pytest
import torch

from speech.augmentation import SpecAugmentConfig, spec_augment, warped
from speech.features import log_mel

NO_STRIPES = {"num_time_masks": 0, "num_mel_masks": 0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chord(*hertz: float) -> torch.Tensor:
    """The features of tones together, over a little hiss."""
    times = torch.arange(16_000, dtype=torch.float64) / 16_000
    tones = sum(torch.sin(2 * math.pi * one * times) for one in hertz) / len(hertz)
    return log_mel((0.3 * tones).float() + 1e-4 * torch.randn(16_000, generator=generator()))


def test_spec_augment_hides_stripes_within_its_limits():
    mel = torch.randn(90, 80)
    config = SpecAugmentConfig(num_time_masks=1, max_time=100, max_time_share=0.2, num_mel_masks=1, max_mels=10)
    hidden_frames, hidden_bins = [], []
    for seed in range(40):
        augmented = spec_augment(mel, config, torch.Generator().manual_seed(seed))
        changed = augmented != mel
        hidden_frames.append(int(changed.all(1).sum()))
        hidden_bins.append(int(changed.all(0).sum()))
        torch.testing.assert_close(augmented[changed], mel.mean(0).expand_as(mel)[changed])
    assert 0 < max(hidden_frames) <= 18 and 0 < max(hidden_bins) <= 10
    assert len(set(hidden_frames)) > 5


def test_spec_augment_is_a_function_of_its_generator():
    mel = torch.randn(50, 80)
    one, again, other = (
        spec_augment(mel, SpecAugmentConfig(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    nothing = SpecAugmentConfig(num_time_masks=0, num_mel_masks=0)
    assert torch.equal(spec_augment(mel, nothing, torch.Generator()), mel)


def test_spec_augment_refuses_impossible_stripes():
    with pytest.raises(ValueError, match="max_mels is 81, over the 80 bins"):
        SpecAugmentConfig(max_mels=81)
    with pytest.raises(ValueError, match="max_time_share"):
        SpecAugmentConfig(max_time_share=1.5)
    for wrong in ({"max_warp": 0.5}, {"max_noise": -1.0}, {"max_gain": math.inf}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SpecAugmentConfig(**wrong)


@pytest.mark.parametrize("factor", [0.85, 0.95, 1.1, 1.2])
def test_warped_features_are_those_of_the_tone_at_another_pitch(factor):
    for hertz in (400.0, 1100.0, 2900.0):
        pitched, wanted = (mel.exp().mean(0) for mel in (warped(chord(hertz), factor), chord(factor * hertz)))
        bins = torch.arange(80.0)
        assert float((pitched * bins).sum() / pitched.sum()) == pytest.approx(
            float((wanted * bins).sum() / wanted.sum()), abs=0.5
        )
    mel = chord(700.0, 1900.0)
    torch.testing.assert_close(warped(mel, 1.0), mel, atol=1e-5, rtol=0)


def test_a_warp_stands_still_beyond_the_last_bins():
    slope = torch.arange(80.0).expand(3, -1)
    higher, lower = warped(slope, 1.3), warped(slope, 0.7)
    assert torch.equal(higher[:, 0], slope[:, 0]) and torch.equal(lower[:, -5:], slope[:, -1:].expand(-1, 5))
    assert min(higher.min(), lower.min()) >= 0 and max(higher.max(), lower.max()) <= 79
    assert (higher[:, 20:] < slope[:, 20:]).all() and (lower[:, 5:-1] > slope[:, 5:-1]).all()


def test_gain_moves_all_alike_and_noise_fills_what_is_still():
    mel = torch.cat([torch.full((40, 80), -15.9), torch.full((40, 80), 20.0)])
    changes = [
        spec_augment(mel, SpecAugmentConfig(max_gain=1.5, **NO_STRIPES), generator(seed)) - mel for seed in range(30)
    ]
    assert all(float(one.max() - one.min()) < 1e-5 for one in changes)
    gains = {float(one.mean()) for one in changes}
    assert len(gains) == 30 and -1.5 <= min(gains) < -1 and 1 < max(gains) <= 1.5
    noisy = [spec_augment(mel, SpecAugmentConfig(max_noise=10.0, **NO_STRIPES), generator(seed)) for seed in range(30)]
    still, loud = (torch.stack([one[part] for one in noisy]) for part in (slice(40), slice(40, None)))
    levels = still.mean((1, 2))
    assert 0 <= levels.min() < 2 and 8 < levels.max() <= 10.1
    assert still.std(1).mean() == pytest.approx(0.5, abs=0.02)
    tilts = (still[:, :, -8:] - still[:, :, :8]).mean((1, 2))
    assert -4 < tilts.min() < -2 and 2 < tilts.max() < 4
    assert (loud - 20.0).abs().max() < 0.02
    assert torch.equal(noisy[3], spec_augment(mel, SpecAugmentConfig(max_noise=10.0, **NO_STRIPES), generator(3)))
