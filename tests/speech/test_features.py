"""Log-mel features, compared with torchaudio's Kaldi features, and their statistics."""

import pytest
import torch
from torchaudio.compliance import kaldi

from speech.features import FeatureStatistics, log_mel, num_mel_frames


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def their_features(waveform: torch.Tensor) -> torch.Tensor:
    return kaldi.fbank(waveform[None] * 32768, num_mel_bins=80, sample_frequency=16_000, dither=0.0, snip_edges=True)


@pytest.mark.parametrize("samples", [400, 559, 560, 16_000, 16_000 * 3 + 77])
def test_features_equal_torchaudios(samples):
    waveform = noise(samples) + 0.3 * torch.sin(torch.arange(samples) * 0.05) + 0.02
    features = log_mel(waveform)
    assert len(features) == num_mel_frames(samples)
    torch.testing.assert_close(features, their_features(waveform), atol=2e-3, rtol=1e-4)  # logs of fp32 spectra
    assert (features - their_features(waveform)).abs().mean() < 2e-5


def test_silence_and_clipping_have_finite_features():
    silent = log_mel(torch.zeros(4000))
    torch.testing.assert_close(silent, their_features(torch.zeros(4000)))
    clipped = (20 * noise(4000)).clamp(-1, 1)
    torch.testing.assert_close(log_mel(clipped), their_features(clipped), atol=2e-3, rtol=1e-4)


def test_invalid_waveforms_are_errors():
    with pytest.raises(ValueError, match="399 samples at 16 kHz are shorter than one window"):
        log_mel(torch.zeros(399))
    with pytest.raises(ValueError, match=r"torch.float32 \[2, 4000\]; it must be float32 \[samples\]"):
        log_mel(torch.zeros(2, 4000))


def test_statistics_of_parts_add_up():
    utterances = [torch.randn(length, 80) * torch.linspace(0.5, 4, 80) - 9 for length in (30, 7, 120)]
    first, second = FeatureStatistics(), FeatureStatistics()
    first.update(utterances[0])
    for utterance in utterances[1:]:
        second.update(utterance)
    mean, std = (first + second).mean_std()
    whole = torch.cat(utterances)
    torch.testing.assert_close(mean, whole.mean(0))
    torch.testing.assert_close(std, whole.std(0, correction=0))


def test_statistics_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="no utterance"):
        FeatureStatistics().mean_std()


def test_the_std_of_a_constant_bin_is_not_zero():
    statistics = FeatureStatistics()
    statistics.update(torch.full((50, 80), -15.94))
    assert (statistics.mean_std()[1] >= 1e-2).all()
