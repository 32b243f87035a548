"""OpenAI's Whisper files: the converted encoder computes OpenAI's formula, and nothing is dropped silently."""

import pytest
import torch
from torch.nn import functional as F

from mm.convert import whisper
from speech.whisper import whisper_log_mel

DIMS = {
    "n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 16, "n_audio_head": 2, "n_audio_layer": 2,
    "n_vocab": 20, "n_text_ctx": 8, "n_text_state": 16, "n_text_head": 2, "n_text_layer": 1,
}  # fmt: skip


def random_state(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """An encoder's tensors by OpenAI's names, and two of a decoder."""
    generator, width = torch.Generator().manual_seed(0), DIMS["n_audio_state"]
    shapes = {"conv1.weight": (width, 80, 3), "conv1.bias": (width,), "positional_embedding": (1500, width)}
    shapes |= {"conv2.weight": (width, width, 3), "conv2.bias": (width,)}
    shapes |= {"ln_post.weight": (width,), "ln_post.bias": (width,)}
    for number in range(DIMS["n_audio_layer"]):
        block = f"blocks.{number}"
        for part in ("query", "key", "value", "out"):
            shapes[f"{block}.attn.{part}.weight"] = (width, width)
            if part != "key":
                shapes[f"{block}.attn.{part}.bias"] = (width,)
        shapes |= {f"{block}.mlp.0.weight": (4 * width, width), f"{block}.mlp.0.bias": (4 * width,)}
        shapes |= {f"{block}.mlp.2.weight": (width, 4 * width), f"{block}.mlp.2.bias": (width,)}
        shapes |= {f"{block}.{norm}.{leaf}": (width,) for norm in ("attn_ln", "mlp_ln") for leaf in ("weight", "bias")}
    state = {f"encoder.{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state |= {"decoder.token_embedding.weight": torch.randn(20, width), "decoder.ln.weight": torch.randn(width)}
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def openai_encoder(state: dict[str, torch.Tensor], mel: torch.Tensor, heads: int, layers: int) -> torch.Tensor:
    """OpenAI's formula, from their names: mel [1, num_mels, 3000] -> [1, 1500, width]."""
    state = {name.removeprefix("encoder."): tensor.float() for name, tensor in state.items()}

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.gelu(F.conv1d(mel, state["conv1.weight"], state["conv1.bias"], padding=1))
    x = F.gelu(F.conv1d(x, state["conv2.weight"], state["conv2.bias"], stride=2, padding=1)).transpose(1, 2)
    x = x + state["positional_embedding"]
    for number in range(layers):
        block, inner = f"blocks.{number}", norm(x, f"blocks.{number}.attn_ln")
        q, k, v = (linear(inner, f"{block}.attn.{p}").unflatten(-1, (heads, -1)) for p in ("query", "key", "value"))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        x = x + linear(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2), f"{block}.attn.out")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.mlp_ln"), f"{block}.mlp.0")), f"{block}.mlp.2")
    return norm(x, "ln_post")


def save(tmp_path, state=None, dims=DIMS, name="tiny.pt"):
    torch.save({"dims": dims, "model_state_dict": random_state() if state is None else state}, tmp_path / name)
    return tmp_path / name


def test_frames_equal_those_of_openais_encoder(tmp_path):
    state = random_state()
    encoder = whisper.load(save(tmp_path, state))
    assert all(p.dtype is torch.float32 for p in encoder.parameters())
    waveform = 0.1 * torch.randn(480_000, generator=torch.Generator().manual_seed(1))  # a full window
    mel = whisper_log_mel(waveform)
    with torch.no_grad():
        frames, lengths = encoder(mel[None], torch.tensor([len(mel)]))
        expected = openai_encoder(state, mel.T[None], heads=2, layers=2)
    assert lengths.tolist() == [750]
    torch.testing.assert_close(frames[0], expected.reshape(750, 32), atol=2e-5, rtol=1e-4)


def test_a_shorter_window_takes_the_first_positions(tmp_path):
    state = random_state()
    encoder = whisper.load(save(tmp_path, state), max_seconds=10.0)
    positions = encoder.encoder.embed_positions.weight
    assert torch.equal(positions, state["encoder.positional_embedding"][:500])


def test_the_report_names_what_is_left_out(tmp_path):
    report = whisper.load(save(tmp_path)).report
    assert report.num_loaded == len(random_state()) - 2
    assert report.ignored == {"decoder.*": "2 tensors; the language model replaces it"}
    assert "decoder.*" in str(report)


def test_missing_and_unexpected_tensors_are_named_as_in_the_file(tmp_path):
    state = random_state()
    del state["encoder.blocks.1.mlp.0.bias"], state["encoder.positional_embedding"], state["encoder.ln_post.bias"]
    state["encoder.blocks.1.attn.rotary"] = torch.ones(3)
    with pytest.raises(ValueError) as error:
        whisper.load(save(tmp_path, state))
    for name in ("blocks.1.mlp.0.bias", "positional_embedding", "ln_post.bias", "blocks.1.attn.rotary"):
        assert f"encoder.{name}" in str(error.value)


@pytest.mark.parametrize("text", [b"hello", b"a dog in front of an old wall"])
def test_text_is_an_error(tmp_path, text):
    (tmp_path / "text.pt").write_bytes(text)
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        whisper.load(tmp_path / "text.pt")


def test_a_file_with_code_is_an_error(tmp_path):
    torch.save({"code": pytest.approx}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        whisper.load(tmp_path / "code.pt")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        whisper.load(tmp_path / "absent.pt")


def test_other_tensor_files_are_errors(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not one of OpenAI's Whisper files"):
        whisper.load(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="its dims lack n_audio_head"):
        whisper.load(save(tmp_path, dims={k: v for k, v in DIMS.items() if k != "n_audio_head"}))
    with pytest.raises(ValueError, match=r"200 mel frames.* 3000"):
        whisper.load(save(tmp_path, dims={**DIMS, "n_audio_ctx": 100}))
