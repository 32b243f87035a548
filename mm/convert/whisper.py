"""Whisper's encoder from OpenAI's own files (`tiny.en.pt` and its like): `mm convert whisper`.

The decoder stays behind: the language model takes its place.
"""

from pathlib import Path

import torch
from torch import Tensor

from foundation.errors import UserError
from mm.convert.report import load_tensors
from speech.whisper import WINDOW_FRAMES, WhisperEncoder, WhisperEncoderConfig

PARTS = {  # of a block, by OpenAI's names
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
    """An encoder with the FP32 weights of a file of OpenAI's; the report is its attribute `report`.

    Args:
        max_seconds: of its window; a shorter one than Whisper's 30 s has the first of its positions.

    Raises:
        UserError: max_seconds that cannot be, a missing file, one that holds anything but tensors and sizes, or one
            that is no Whisper model.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle fail in any way
        # What torch says is long, and advises to run whatever code the file brings.
        raise UserError(f"{path}: not a file of plain tensors, or broken ({type(error).__name__})") from error
    if not isinstance(stored, dict) or not {"dims", "model_state_dict"} <= stored.keys():
        raise UserError(f"{path}: not one of OpenAI's Whisper files, which hold dims and model_state_dict")
    dims, state = stored["dims"], stored["model_state_dict"]
    wanted = ("n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer")
    lacking = [name for name in wanted if name not in dims]
    if lacking:
        raise UserError(f"{path}: its dims lack {', '.join(lacking)}")
    if 2 * dims["n_audio_ctx"] != WINDOW_FRAMES:
        raise UserError(f"{path}: a window of {2 * dims['n_audio_ctx']} mel frames; Whisper's has {WINDOW_FRAMES}")
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
    tensors = {_our_name(name): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    encoder.report = load_tensors(
        encoder,
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
        source=path,
        stored_name=_stored_name,
        ignored=_left_out(state),
    )
    return encoder.eval()


def _left_out(state: dict[str, Tensor]) -> dict[str, str]:
    groups: dict[str, int] = {}
    for name in state:
        if not name.startswith("encoder."):
            group = name.partition(".")[0] + ".*"
            groups[group] = groups.get(group, 0) + 1
    return {group: f"{count} tensors; the language model takes its place" for group, count in groups.items()}


def _our_name(name: str) -> str:
    """OpenAI's name of one of the encoder's tensors -> the module's; a name that it does not have stays as it is."""
    if name.startswith(BLOCKS):
        number, _, rest = name.removeprefix(BLOCKS).partition(".")
        part, _, leaf = rest.rpartition(".")
        return f"encoder.layers.{number}.{PARTS[part]}.{leaf}" if part in PARTS else name
    if name == POSITIONS:
        return "encoder.embed_positions.weight"
    return name.replace("encoder.ln_post.", "encoder.layer_norm.")


def _stored_name(name: str) -> str:
    """The other way round."""
    if name == "encoder.embed_positions.weight":
        return POSITIONS
    name = name.replace("encoder.layers.", BLOCKS).replace("encoder.layer_norm.", "encoder.ln_post.")
    if name.startswith(BLOCKS):
        for theirs, ours in PARTS.items():
            head, found, leaf = name.rpartition(f".{ours}.")
            if found:
                return f"{head}.{theirs}.{leaf}"
    return name
