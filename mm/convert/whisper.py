"""Whisper's encoder from OpenAI's files, such as `tiny.en.pt`: `mm convert whisper`.

The decoder is left out: the language model replaces it.
"""

from pathlib import Path

import torch
from torch import Tensor

from foundation.errors import UserError
from mm.convert.report import load_tensors
from speech.whisper import WINDOW_FRAMES, WhisperEncoder, WhisperEncoderConfig

PARTS = {  # OpenAI's names in a block -> ours
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}
BLOCKS, POSITIONS = "encoder.blocks.", "encoder.positional_embedding"


def load(path: str | Path, max_seconds: float = 30.0) -> WhisperEncoder:
    """Load the encoder of one of OpenAI's files, in FP32; its attribute `report` is a `LoadingReport`.

    Args:
        max_seconds: length of its window; a shorter one than Whisper's 30 s has the first positions only.

    Raises:
        UserError: `max_seconds` is out of range, the file is missing, holds anything but tensors and sizes, or is not a
            Whisper model.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # other bytes than a pickle's raise any error
        # torch's message is long, and suggests to run any code in the file.
        raise UserError(f"{path}: not a file of plain tensors, or broken ({type(error).__name__})") from error
    if not isinstance(stored, dict) or not {"dims", "model_state_dict"} <= stored.keys():
        raise UserError(f"{path}: not one of OpenAI's Whisper files, which hold dims and model_state_dict")
    dims, state = stored["dims"], stored["model_state_dict"]
    needed = ("n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer")
    missing = [name for name in needed if name not in dims]
    if missing:
        raise UserError(f"{path}: its dims lack {', '.join(missing)}")
    if 2 * dims["n_audio_ctx"] != WINDOW_FRAMES:
        raise UserError(f"{path}: its window has {2 * dims['n_audio_ctx']} mel frames; Whisper's has {WINDOW_FRAMES}")
    config = WhisperEncoderConfig(
        num_layers=dims["n_audio_layer"],
        width=dims["n_audio_state"],
        ffn_width=4 * dims["n_audio_state"],
        num_heads=dims["n_audio_head"],
        num_mels=dims["n_mels"],
        max_seconds=max_seconds,
    )
    with torch.device("meta"):
        encoder = WhisperEncoder(config)
    if (positions := state.get(POSITIONS)) is not None:
        state = {**state, POSITIONS: positions[: config.max_mel_frames // 2]}
    tensors = {_encoder_name(name): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    encoder.report = load_tensors(
        encoder,
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
        source=path,
        stored_name=_stored_name,
        ignored=_left_out(state),
    )
    return encoder.eval()


def _left_out(state: dict[str, Tensor]) -> dict[str, str]:
    """Groups of tensors outside the encoder, with the reason."""
    groups: dict[str, int] = {}
    for name in state:
        if not name.startswith("encoder."):
            group = name.partition(".")[0] + ".*"
            groups[group] = groups.get(group, 0) + 1
    return {group: f"{count} tensors; the language model replaces it" for group, count in groups.items()}


def _encoder_name(name: str) -> str:
    """OpenAI's name of a tensor -> the encoder's; an unknown name is unchanged."""
    if name.startswith(BLOCKS):
        block, _, rest = name.removeprefix(BLOCKS).partition(".")
        part, _, leaf = rest.rpartition(".")
        return f"encoder.layers.{block}.{PARTS[part]}.{leaf}" if part in PARTS else name
    if name == POSITIONS:
        return "encoder.embed_positions.weight"
    return name.replace("encoder.ln_post.", "encoder.layer_norm.")


def _stored_name(name: str) -> str:
    """The encoder's name of a tensor -> OpenAI's."""
    if name == "encoder.embed_positions.weight":
        return POSITIONS
    name = name.replace("encoder.layers.", BLOCKS).replace("encoder.layer_norm.", "encoder.ln_post.")
    if name.startswith(BLOCKS):
        for theirs, ours in PARTS.items():
            head, found, leaf = name.rpartition(f".{ours}.")
            if found:
                return f"{head}.{theirs}.{leaf}"
    return name
