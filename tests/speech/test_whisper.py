"""Whisper's encoder behind our interface: features and frames compared with `transformers`, padding, limits."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from speech.adapter import num_tokens
from speech.whisper import WhisperEncoder, WhisperEncoderConfig, num_mel_frames, whisper_log_mel

TINY = WhisperEncoderConfig(num_layers=2, width=16, ffn_width=32, num_heads=2)


@pytest.fixture(scope="module")
def encoder(randomise) -> WhisperEncoder:
    return randomise(WhisperEncoder(TINY))


def tone(samples: int, loudness: float = 0.2) -> torch.Tensor:
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    return loudness * (0.1 * noise + torch.sin(torch.arange(samples) * 0.08))


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("samples", [1, 160, 5_003, 479_950, 480_000])
def test_features_equal_the_feature_extractors(samples, num_mels):
    extractor = WhisperFeatureExtractor(feature_size=num_mels)
    waveform = tone(samples)
    expected = extractor(waveform.numpy(), sampling_rate=16_000, return_tensors="np")["input_features"][0].T
    features = whisper_log_mel(waveform, num_mels)
    assert features.shape == (num_mel_frames(samples), num_mels)
    np.testing.assert_allclose(features, expected[: len(features)], atol=2e-4)  # logs of fp32 spectra
    silent = expected[len(features) :]
    assert np.ptp(silent) == 0 if len(silent) else True  # every frame with sound is there


def test_frames_equal_those_of_transformers(encoder):
    """From the waveform: features, silence, encoder, and stacking of two frames."""
    model = WhisperModel(
        WhisperConfig(
            num_mel_bins=80, d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=16, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ).eval()  # fmt: skip
    model.encoder.load_state_dict(encoder.encoder.state_dict())
    for waveform in (tone(20_000), tone(33_333, 1e-4), torch.zeros(8_000)):
        inputs = WhisperFeatureExtractor()(waveform.numpy(), sampling_rate=16_000, return_tensors="pt")
        mel = whisper_log_mel(waveform)
        with torch.no_grad():
            expected = model.encoder(inputs["input_features"]).last_hidden_state[0]  # [1500, 16]
            frames, lengths = encoder(mel[None], torch.tensor([len(mel)]))
        assert frames.shape == (1, int(lengths), 32)
        torch.testing.assert_close(frames[0], expected.reshape(750, 32)[: int(lengths)], atol=5e-4, rtol=1e-3)


def test_padding_does_not_change_frames(encoder, padded):
    rows = [whisper_log_mel(tone(samples, loud)) for samples, loud in ((9_000, 0.5), (16_000, 0.01), (100, 0.2))]
    with torch.no_grad():
        frames, lengths = encoder(*padded(rows, extra=3))
        for row, mel in enumerate(rows):
            alone, alone_lengths = encoder(mel[None], torch.tensor([len(mel)]))
            length = int(alone_lengths)
            assert length == int(lengths[row])
            torch.testing.assert_close(frames[row, :length], alone[0], atol=1e-5, rtol=1e-4)
            assert not frames[row, length:].any()


def test_tokens_per_second_equal_the_conformers():
    config = WhisperEncoderConfig()
    assert config.output_width == 768
    assert num_tokens(config.max_mel_frames) == 375  # 30 s at 12.5 tokens per second


def test_sounds_that_do_not_fit_the_window_are_errors(encoder):
    with pytest.raises(ValueError, match=r"480,001 samples .*1 to 480,000"):
        whisper_log_mel(torch.zeros(480_001))
    with pytest.raises(ValueError, match="0 samples"):
        whisper_log_mel(torch.zeros(0))
    with pytest.raises(AssertionError, match=r"3001 mel frames .* 3000"):
        encoder(torch.zeros(1, 3001, 80), torch.tensor([3001]))


def test_a_longer_sound_is_cut_into_windows():
    sound = torch.randn(480_000 + 4_000, generator=torch.Generator().manual_seed(0)) / 10
    mel = WhisperEncoderConfig().features(sound)
    assert torch.equal(mel[:3000], whisper_log_mel(sound[:480_000]))
    assert torch.equal(mel[3000:], whisper_log_mel(sound[480_000:]))


def test_invalid_configs_are_errors():
    with pytest.raises(ValueError, match="width 10 is not a multiple of num_heads 4"):
        WhisperEncoderConfig(width=10, num_heads=4)
    for seconds in (0.0, 31.0):
        with pytest.raises(ValueError, match=f"max_seconds is {seconds}.* 30"):
            WhisperEncoderConfig(max_seconds=seconds)


@pytest.fixture
def short_encoder(encoder) -> WhisperEncoder:
    """The encoder with a window of 2 s, and the first of its positions."""
    short = WhisperEncoder(WhisperEncoderConfig(**{**asdict(encoder.config), "max_seconds": 2.0})).eval()
    state = encoder.state_dict()
    state["encoder.embed_positions.weight"] = state["encoder.embed_positions.weight"][:100]
    short.load_state_dict(state)
    return short


def test_frames_of_a_shorter_window_equal_the_layers_applied_by_hand(encoder, short_encoder):
    short, sound = short_encoder, tone(20_000)
    mel = short.config.features(sound)
    assert torch.equal(mel, whisper_log_mel(sound))
    with torch.no_grad():
        frames, lengths = short(mel[None], torch.tensor([len(mel)]))
        window = torch.cat([mel, (mel.max() - 2).clamp(min=-1.5).expand(200 - len(mel), 80)])
        x = torch.nn.functional.gelu(short.encoder.conv1(window.T[None]))
        x = torch.nn.functional.gelu(short.encoder.conv2(x)).transpose(1, 2)
        x = x + encoder.encoder.embed_positions.weight[:100]
        for layer in encoder.encoder.layers:
            x = layer(x, None)
            x = x[0] if isinstance(x, tuple) else x
        expected = encoder.encoder.layer_norm(x).reshape(50, -1)
    torch.testing.assert_close(frames[0], expected[: int(lengths)], atol=1e-5, rtol=1e-4)


def test_a_shorter_window_cuts_sounds_and_limits_frames(short_encoder):
    config = short_encoder.config
    assert config.max_mel_frames == 200 and num_tokens(200) == 25
    longer, first = config.features(tone(32_800)), config.features(tone(32_800)[:32_000])
    assert len(longer) == 200 + num_mel_frames(800) and torch.equal(longer[:200], first)
    with pytest.raises(AssertionError, match=r"201 mel frames .* 200"):
        short_encoder(torch.zeros(1, 201, 80), torch.tensor([201]))
