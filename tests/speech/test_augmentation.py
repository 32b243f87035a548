"""Augmentation of features: limits, reproducibility, and the effect of each kind."""

import math

import pytest
import torch

from speech.augmentation import SpecAugmentConfig, spec_augment, warp_frequencies
from speech.features import log_mel

NO_MASKS = {"num_time_masks": 0, "num_mel_masks": 0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chord(*hertz: float) -> torch.Tensor:
    """The features of several tones together with faint noise."""
    times = torch.arange(16_000, dtype=torch.float64) / 16_000
    tones = sum(torch.sin(2 * math.pi * one * times) for one in hertz) / len(hertz)
    return log_mel((0.3 * tones).float() + 1e-4 * torch.randn(16_000, generator=generator()))


def mean_bin(energies: torch.Tensor) -> float:
    """The energies' [80] mean position in bins."""
    return float((energies * torch.arange(80.0)).sum() / energies.sum())


def test_masks_stay_within_their_limits():
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


def test_augmentation_depends_on_the_generator_only():
    mel = torch.randn(50, 80)
    one, again, other = (
        spec_augment(mel, SpecAugmentConfig(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    nothing = SpecAugmentConfig(num_time_masks=0, num_mel_masks=0)
    assert torch.equal(spec_augment(mel, nothing, torch.Generator()), mel)


def test_invalid_configs_are_errors():
    with pytest.raises(ValueError, match=r"max_mels is 81.*80"):
        SpecAugmentConfig(max_mels=81)
    with pytest.raises(ValueError, match="max_time_share"):
        SpecAugmentConfig(max_time_share=1.5)
    for wrong in ({"max_warp": 0.5}, {"max_noise": -1.0}, {"max_gain": math.inf}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SpecAugmentConfig(**wrong)


@pytest.mark.parametrize("factor", [0.85, 0.95, 1.1, 1.2])
def test_warped_features_equal_those_of_the_tone_at_another_pitch(factor):
    for hertz in (400.0, 1100.0, 2900.0):
        features = warp_frequencies(chord(hertz), factor), chord(factor * hertz)
        warped_bin, expected_bin = (mean_bin(mel.exp().mean(0)) for mel in features)
        assert warped_bin == pytest.approx(expected_bin, abs=0.5)
    mel = chord(700.0, 1900.0)
    torch.testing.assert_close(warp_frequencies(mel, 1.0), mel, atol=1e-5, rtol=0)


def test_a_warp_repeats_the_outermost_bins():
    slope = torch.arange(80.0).expand(3, -1)
    higher, lower = warp_frequencies(slope, 1.3), warp_frequencies(slope, 0.7)
    assert torch.equal(higher[:, 0], slope[:, 0]) and torch.equal(lower[:, -5:], slope[:, -1:].expand(-1, 5))
    assert min(higher.min(), lower.min()) >= 0 and max(higher.max(), lower.max()) <= 79
    assert (higher[:, 20:] < slope[:, 20:]).all() and (lower[:, 5:-1] > slope[:, 5:-1]).all()


@pytest.fixture
def silent_then_loud() -> torch.Tensor:
    """40 frames of silence and 40 loud ones."""
    return torch.cat([torch.full((40, 80), -15.9), torch.full((40, 80), 20.0)])


def test_gain_moves_all_values_by_the_same_amount(silent_then_loud):
    config = SpecAugmentConfig(max_gain=1.5, **NO_MASKS)
    changes = [spec_augment(silent_then_loud, config, generator(seed)) - silent_then_loud for seed in range(30)]
    assert all(float(change.max() - change.min()) < 1e-5 for change in changes)
    gains = {float(change.mean()) for change in changes}
    assert len(gains) == 30 and -1.5 <= min(gains) < -1 and 1 < max(gains) <= 1.5


def test_noise_fills_silence_and_does_not_change_loud_frames(silent_then_loud):
    config = SpecAugmentConfig(max_noise=10.0, **NO_MASKS)
    noisy = torch.stack([spec_augment(silent_then_loud, config, generator(seed)) for seed in range(30)])
    silent, loud = noisy[:, :40], noisy[:, 40:]
    levels = silent.mean((1, 2))
    assert 0 <= levels.min() < 2 and 8 < levels.max() <= 10.1
    assert silent.std(1).mean() == pytest.approx(0.5, abs=0.02)
    tilts = (silent[:, :, -8:] - silent[:, :, :8]).mean((1, 2))
    assert -4 < tilts.min() < -2 and 2 < tilts.max() < 4
    assert (loud - 20.0).abs().max() < 0.02
    assert torch.equal(noisy[3], spec_augment(silent_then_loud, config, generator(3)))
