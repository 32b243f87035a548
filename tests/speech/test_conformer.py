"""The conformer: padding, equality with torchaudio's layer, the default size, invalid configs."""

import pytest
import torch
from torch import nn
from torchaudio.models.conformer import ConformerLayer as TheirLayer

from speech.conformer import ConformerLayer, SpeechEncoder, SpeechEncoderConfig, num_frames

ROUNDING = {"atol": 2e-5, "rtol": 1e-5}  # sums in another order, values near 1


@pytest.mark.parametrize("extra", [0, 1, 13])
def test_padding_does_not_change_frames(tiny_encoder, utterances, padded, extra):
    rows = utterances([37, 80, 5, 64, 1])
    with torch.no_grad():
        frames, lengths = tiny_encoder(*padded(rows, extra))
        assert lengths.tolist() == [10, 20, 2, 16, 1]
        for row, (mel, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
            alone, alone_lengths = tiny_encoder(mel[None], torch.tensor([len(mel)]))
            assert alone.shape[1] == int(alone_lengths) == length == num_frames(len(mel))
            torch.testing.assert_close(frames[row, :length], alone[0], **ROUNDING)
            assert not frames[row, length:].any()


def test_padding_does_not_change_gradients(tiny_encoder, utterances, padded):
    rows = utterances([21, 44])

    def gradients(batches):
        tiny_encoder.zero_grad()
        for batch in batches:
            tiny_encoder(*padded(batch, extra=3 * len(batch)))[0].square().sum().backward()
        found = {name: parameter.grad.clone() for name, parameter in tiny_encoder.named_parameters()}
        tiny_encoder.zero_grad(set_to_none=True)
        return found

    together, apart = gradients([rows]), gradients([[row] for row in rows])
    for name, gradient in together.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, apart[name], atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)


def test_frames_depend_on_the_whole_utterance_and_on_positions(tiny_encoder, utterances):
    mel = utterances([200])[0][None]
    changed = mel.clone()
    changed[0, 0] += 3.0  # out of the convolutions' reach: only attention carries it
    moved = mel.roll(40, dims=1)
    length = torch.tensor([200])
    with torch.no_grad():
        frames, changed_frames, shifted = (tiny_encoder(x, length)[0] for x in (mel, changed, moved))
    assert (frames[0, -1] - changed_frames[0, -1]).abs().max() > 1e-4
    assert (frames[0, 20] - shifted[0, 30]).abs().max() > 1e-3  # positions matter


def test_lengths_on_another_device_are_not_read(tiny_encoder):
    """Lengths off the CPU always give a mask; the values of the meta device cannot be read at all."""
    with torch.device("meta"):
        encoder = SpeechEncoder(tiny_encoder.config)
    frames, lengths = encoder(torch.empty(2, 30, 80, device="meta"), torch.empty(2, dtype=torch.long, device="meta"))
    assert frames.shape == (2, 8, 32) and lengths.shape == (2,)


def their_state(layer: TheirLayer) -> dict[str, torch.Tensor]:
    """The state of a torchaudio layer under our names."""
    conv = layer.conv_module
    names = {"attention_norm": layer.self_attn_layer_norm, "output_norm": layer.final_layer_norm}
    for ours, theirs in (("ffn1", layer.ffn1), ("ffn2", layer.ffn2)):
        names |= {f"{ours}.norm": theirs.sequential[0], f"{ours}.up_proj": theirs.sequential[1]}
        names |= {f"{ours}.down_proj": theirs.sequential[4]}
    names |= {"convolution.input_norm": conv.layer_norm, "convolution.gate_proj": conv.sequential[0]}
    names |= {"convolution.depthwise": conv.sequential[2], "convolution.norm": conv.sequential[3].norm}
    names |= {"convolution.output_proj": conv.sequential[5], "self_attn.o_proj": layer.self_attn.out_proj}
    state = {f"{ours}.{leaf}": getattr(module, leaf) for ours, module in names.items() for leaf in ("weight", "bias")}
    for leaf in ("weight", "bias"):
        parts = getattr(layer.self_attn, f"in_proj_{leaf}").chunk(3)
        state |= {f"self_attn.{part}_proj.{leaf}": value for part, value in zip("qkv", parts, strict=True)}
    pointwise = ("convolution.gate_proj.weight", "convolution.output_proj.weight")
    return {name: value.squeeze(-1) if name in pointwise else value for name, value in state.items()}


class FrameNorm(nn.Module):
    """Replaces torchaudio's normalisation over the batch; x [B, C, S]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def test_a_layer_without_positions_equals_torchaudios(randomise):
    """torchaudio's layer gets our normalisation and has no positions; angles of 0 switch ours off."""
    theirs = TheirLayer(32, 48, 2, depthwise_conv_kernel_size=7)
    theirs.conv_module.sequential[3] = FrameNorm(32)
    randomise(theirs)
    ours = ConformerLayer(SpeechEncoderConfig(width=32, ffn_width=48, num_heads=2))
    ours.load_state_dict(their_state(theirs))
    x = torch.randn(2, 25, 32)
    no_rotation = torch.ones(25, 16), torch.zeros(25, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x, no_rotation, None), theirs(x.transpose(0, 1), None).transpose(0, 1), atol=2e-5, rtol=1e-5
        )


def test_the_default_config_has_a_billion_parameters():
    with torch.device("meta"):
        encoder = SpeechEncoder(SpeechEncoderConfig())
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert 0.995e9 < count < 1.01e9
    layer = sum(parameter.numel() for parameter in encoder.layers[0].parameters())
    assert 41.6e6 < layer < 41.8e6


def test_statistics_are_saved_and_applied(tiny_encoder, utterances):
    assert {"feature_mean", "feature_std"} <= tiny_encoder.state_dict().keys()
    mel = utterances([4])[0]
    stacked, _ = tiny_encoder.stack(mel[None], torch.tensor([4]))
    expected = (mel - tiny_encoder.feature_mean) / tiny_encoder.feature_std
    torch.testing.assert_close(stacked[0, 0], expected.flatten())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 48, "num_heads": 16}, "width 48 .*num_heads 16"),
        ({"kernel_size": 8}, "kernel_size 8 is even"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_mels": 128}, "num_mels 128 is not supported"),
        ({"max_seconds": 0}, "max_seconds is 0"),
    ],
)
def test_invalid_configs_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        SpeechEncoderConfig(**wrong)


@pytest.mark.parametrize("lengths", [[0, 8], [9, 8]])
def test_lengths_outside_the_batch_are_errors(tiny_encoder, lengths):
    with pytest.raises(AssertionError, match=rf"{min(lengths)} to {max(lengths)}, outside 1\.\.8"):
        tiny_encoder(torch.zeros(2, 8, 80), torch.tensor(lengths))


def test_the_convolution_for_cpus_equals_the_one_for_gpus(tiny_encoder):
    """Both branches have the same values and gradients."""
    module = tiny_encoder.layers[0].convolution
    x = torch.randn(2, 11, tiny_encoder.config.width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours, plain = module._convolve(x), module.depthwise(x.transpose(1, 2).contiguous()).transpose(1, 2)
    torch.testing.assert_close(ours, plain)
    weights = (x, module.depthwise.weight, module.depthwise.bias)
    for one, other in zip(*(torch.autograd.grad(y.sin().sum(), weights) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(one, other)
