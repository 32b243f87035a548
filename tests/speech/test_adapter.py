"""The speech adapter: number of tokens, padding, and the scale of its output."""

import pytest
import torch
from torch.nn import functional as F

from speech.adapter import SpeechAdapter, SpeechAdapterConfig, num_tokens, token_rms
from speech.conformer import SpeechEncoder, SpeechEncoderConfig

TINY = SpeechAdapterConfig(hidden_size=48, intermediate_size=64, num_heads=2)


@pytest.fixture(scope="module")
def adapter(randomise) -> SpeechAdapter:
    return randomise(SpeechAdapter(TINY, encoder_width=32, lm_width=24))


def test_num_tokens_equals_the_length_of_the_output():
    with torch.device("meta"):
        encoder = SpeechEncoder(SpeechEncoderConfig(num_layers=1, width=8, ffn_width=8, num_heads=1))
        adapter = SpeechAdapter(SpeechAdapterConfig(8, 8, 1), encoder_width=8, lm_width=4)
    for length in range(1, 201):
        frames, lengths = encoder(torch.empty(1, length, 80, device="meta"), torch.tensor([length]))
        tokens, lengths = adapter(frames, lengths)
        assert tokens.shape == (1, num_tokens(length), 4)
        assert lengths.tolist() == [num_tokens(length)]
    assert num_tokens(6000) == 750  # 60 s at 12.5 tokens per second


def test_num_tokens_of_no_frames_is_an_error():
    with pytest.raises(ValueError, match=r"0 mel frames.*at least one"):
        num_tokens(0)


@pytest.mark.parametrize("extra", [0, 1, 6])
def test_padding_does_not_change_tokens(adapter, padded, extra):
    rows = [torch.randn(length, 32) for length in (9, 16, 1, 2)]
    with torch.no_grad():
        tokens, lengths = adapter(*padded(rows, extra))
        assert lengths.tolist() == [5, 8, 1, 1]
        for row, (frames, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
            alone, _ = adapter(frames[None], torch.tensor([len(frames)]))
            assert alone.shape[1] == length
            torch.testing.assert_close(tokens[row, :length], alone[0], atol=2e-5, rtol=1e-5)
            assert not tokens[row, length:].any()


def test_conv_equals_a_convolution_of_kernel_3_and_stride_2(adapter):
    frames = torch.randn(2, 11, 32)
    weight = adapter.conv.weight.unflatten(1, (3, 32)).transpose(1, 2)  # [hidden, encoder_width, 3]
    expected = F.conv1d(frames.transpose(1, 2), weight, adapter.conv.bias, stride=2, padding=1).transpose(1, 2)
    seen = []
    handle = adapter.conv.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        adapter(frames, torch.tensor([11, 11]))
    handle.remove()
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rms", [0.015, 1.7])
def test_the_output_starts_at_the_rms_of_the_embeddings(rms):
    torch.manual_seed(0)
    adapter = SpeechAdapter(TINY, encoder_width=32, lm_width=1024)
    adapter.initialise_output_scale(rms)
    frames, lengths = 5 * torch.randn(3, 40, 32), torch.tensor([40, 12, 25])
    with torch.no_grad():
        tokens, token_lengths = adapter(frames, lengths)
    assert float(token_rms(tokens, token_lengths)) == pytest.approx(rms, rel=0.1)
    rms_of_boundaries = adapter.boundaries.detach().square().mean(-1).sqrt()  # of 1024 random numbers: within 3 * 2.2%
    torch.testing.assert_close(rms_of_boundaries, torch.full((2,), rms), atol=0, rtol=0.066)
    with pytest.raises(AssertionError, match=r"is 0\.0"):
        adapter.initialise_output_scale(0.0)


def test_every_weight_gets_a_gradient(adapter):
    tokens, _ = adapter(torch.randn(2, 7, 32), torch.tensor([7, 4]))
    (tokens.square().sum() + adapter.boundaries.square().sum()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    adapter.zero_grad(set_to_none=True)


def test_the_default_config_has_a_hundred_million_parameters():
    with torch.device("meta"):
        adapter = SpeechAdapter(SpeechAdapterConfig(), SpeechEncoderConfig().output_width, lm_width=4096)
    assert 95e6 < sum(parameter.numel() for parameter in adapter.parameters()) < 105e6


def test_invalid_configs_are_errors():
    with pytest.raises(ValueError, match=r"hidden_size 30 .*num_heads 6"):
        SpeechAdapterConfig(hidden_size=30, num_heads=6)
    with pytest.raises(ValueError, match="num_heads is 0"):
        SpeechAdapterConfig(num_heads=0)
