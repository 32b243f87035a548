"""Load GGUF files: metadata -> configuration, (quantised) tensors -> Hugging Face's names and row order.

llama.cpp's rotary positions pair neighbouring channels, Hugging Face's pair the halves of a head. So llama.cpp's
converter permutes the rows of q and k for the architecture "llama" (Llama, Mistral, SmolLM2), which is undone here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from foundation.errors import UserError
from layers.rotary import RotaryConfig, inverse_frequencies
from layers.sources import Index, set_source
from mm.convert.gguf_reader import GgufFile, StoredTensor, read_gguf
from mm.convert.gguf_tokenizer import build_tokenizer, special_ids
from mm.convert.llama_config import limit_context
from mm.language_model import LanguageModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen2")
OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
STOP_NAMES = ("eos", "eot", "eom")  # llama.cpp's names of the tokens that end a text, a turn and a message
ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(path: str | Path) -> GgufFile:
    """Open a file: its metadata, and its memory-mapped tensors.

    Raises:
        UserError: it is not a GGUF file, damaged, or one part of a split file.
    """
    file = read_gguf(path)
    if (file.metadata.get("split.count") or 1) > 1:
        raise UserError(f"{path} is one part of a split GGUF file; join the parts with llama.cpp's gguf-split --merge")
    return file


def read(path: str | Path) -> tuple[LanguageModelConfig, dict[str, Tensor], dict[str, str], list[str]]:
    """Read the decoder's configuration, and its tensors under their Hugging Face names.

    Returns:
        configuration, tensors on the meta device with sources (`layers.sources`), names of tensors left out with the
        reason, and notes for the report.

    Raises:
        UserError: an architecture, setting or quantisation is not supported, metadata is missing, or the file is
            damaged; the message names it.
    """
    file = open_gguf(path)
    config, notes = _config(file, path)
    return config, *_tensors(file, path, config), notes


def read_shape(path: str | Path) -> LanguageModelConfig:
    """The decoder's configuration, without reading tensors; raises like `read`."""
    return _config(open_gguf(path), path)[0]


def _config(file: GgufFile, path: str | Path) -> tuple[LanguageModelConfig, list[str]]:
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {architecture!r} is not supported; it can be llama or qwen2")

    def setting(name: str, default: Any = None, needed: bool = False) -> Any:
        value = file.metadata.get(f"{architecture}.{name}")
        if value is None and needed:
            raise UserError(f"{path} lacks {architecture}.{name}")
        return default if value is None else value

    tensors = {tensor.name: tensor for tensor in file.tensors}
    if setting("expert_count", 0) > 1 or any("_exps." in name for name in tensors):
        raise UserError(f"{path} is a mixture of experts, which is not supported")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} lacks the tensor token_embd.weight")
    hidden_size, num_heads = setting("embedding_length", needed=True), setting("attention.head_count", needed=True)
    num_kv_heads, intermediate_size = setting("attention.head_count_kv", num_heads), setting("feed_forward_length")
    varying = [n for n, v in (("heads", num_heads), ("KV heads", num_kv_heads)) if isinstance(v, list)]
    if varying or not isinstance(intermediate_size, int):
        raise UserError(
            f"{path} has {' and '.join(varying) or 'feed-forward sizes'} that differ per layer: not supported"
        )
    head_dim = setting("attention.key_length", hidden_size // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if setting(name, head_dim) != head_dim:
            raise UserError(f"{path}: {architecture}.{name} is {setting(name)}; it must be the head size {head_dim}")
    context, notes = limit_context(setting("context_length", needed=True), setting("attention.sliding_window") or None)
    vocab_size = int(tensors["token_embd.weight"].shape[1])
    ids, more_notes = special_ids(_tokenizer_values(file), vocab_size)
    config = LanguageModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=setting("block_count", needed=True),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=setting("attention.layer_norm_rms_epsilon", needed=True),
        rotary=_rotary(path, setting, tensors.get(ROPE_FACTORS), head_dim),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        tied_embeddings="output.weight" not in tensors,
        context=context,
        stop_tokens=tuple(dict.fromkeys(ids[name] for name in STOP_NAMES if name in ids)),
    )
    notes += [f"stop token {ids[name]}: tokenizer.ggml.{name}_token_id" for name in STOP_NAMES if name in ids]
    return config, notes + more_notes


@dataclass(frozen=True)
class GgufTensor:
    """The values of a tensor of a file, in FP32: a source of `layers.sources`.

    Attributes:
        permuted_heads: the number of heads whose rows llama.cpp's converter has permuted; 0 where it has not.
    """

    stored: StoredTensor
    permuted_heads: int
    collective: ClassVar[bool] = False

    def read(self, index: Index | None = None) -> Tensor:
        """A slice of the values; of a permuted tensor all are unpacked first, of others the slice's rows."""
        shape, rows = tuple(reversed(self.stored.shape)), slice(None)
        if index is not None and len(shape) > 1 and not self.permuted_heads:
            rows, index = index[0], (slice(None), *index[1:])
        data = self.stored.data[rows]
        values = dequantize(data, self.stored.tensor_type) if data.size else np.empty(0, np.float32)
        values = values.reshape(len(data) if len(shape) > 1 else shape[0], *shape[1:])
        if self.permuted_heads:
            values = unpermute(values, self.permuted_heads)
        values = np.ascontiguousarray(values if index is None else values[index], dtype=np.float32)
        return torch.from_numpy(values if values.flags.writeable else values.copy())  # the file stays read-only


def _tensors(file: GgufFile, path: str | Path, config: LanguageModelConfig) -> tuple[dict[str, Tensor], dict[str, str]]:
    permuted = {}
    if file.metadata.get("general.architecture") == "llama":
        permuted = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    weights = [stored for stored in file.tensors if stored.name != ROPE_FACTORS]
    ignored = {ROPE_FACTORS: "turned into rotary settings"} if len(weights) < len(file.tensors) else {}
    tensors = {}
    for stored in weights:
        part = stored.name.split(".")[-2] if "." in stored.name else stored.name
        heads = permuted.get(part, 0) if stored.name.startswith("blk.") else 0
        try:
            dequantize(np.atleast_2d(stored.data)[:1], stored.tensor_type)
        except NotImplementedError as error:  # the gguf package does not unpack this type
            raise UserError(f"{path}: {stored.name} is stored as {stored.tensor_type.name}: {error}") from error
        tensor = torch.empty(tuple(reversed(stored.shape)), device="meta")
        set_source(tensor, GgufTensor(stored, heads))
        tensors[hugging_face_name(stored.name)] = tensor
    return tensors, ignored


def read_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """Read a file's tokenizer as one of `transformers`, with its chat template.

    Raises:
        UserError: the kind of tokenizer is not supported; the message names it.
    """
    return build_tokenizer(_tokenizer_values(open_gguf(path)), source=path)


def _tokenizer_values(file: GgufFile) -> dict[str, Any]:
    """The metadata that `gguf_tokenizer` reads."""
    prefix = "tokenizer."
    return {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}


def hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; an unknown name is unchanged."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{kind}"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if block == "blk" and layer.isdecimal() and part in LAYER_NAMES:
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
    return name


def unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of q or k [heads * head_dim, ...] from neighbouring pairs to halves of a head."""
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _rotary(path: str | Path, setting: Callable[..., Any], factors: StoredTensor | None, head_dim: int) -> RotaryConfig:
    """Rotary settings from the metadata and the optional tensor of one divisor per frequency."""
    theta = float(setting("rope.freq_base", 10_000.0))
    kind = setting("rope.scaling.type", "none")
    linear = float(setting("rope.scaling.factor", setting("rope.scale_linear", 1.0)) or 1.0)
    if kind not in ("none", "linear"):
        raise UserError(f"{path}: rope scaling {kind!r} is not supported; it can be none, linear or Llama 3.1's")
    scaled = kind == "linear" or setting("rope.scale_linear") is not None
    if factors is None:
        return RotaryConfig(theta, "linear", linear) if scaled and linear != 1 else RotaryConfig(theta)
    if scaled and linear != 1:
        raise UserError(f"{path} has both linear rope scaling and {ROPE_FACTORS}, which is not supported")
    divisors = torch.from_numpy(np.array(dequantize(factors.data, factors.tensor_type), dtype=np.float32))
    candidates = [RotaryConfig(theta), RotaryConfig(theta, "linear", float(divisors[0]))]
    # Llama 3.1 and 3.2 differ in the factor only, which is the divisor of every low frequency.
    candidates.append(RotaryConfig(theta, "llama3", float(divisors.max()), 1.0, 4.0, 8192))
    unscaled = inverse_frequencies(candidates[0], head_dim)
    for candidate in candidates:
        if divisors.shape == unscaled.shape and torch.allclose(
            inverse_frequencies(candidate, head_dim), unscaled / divisors, rtol=1e-4, atol=0
        ):
            return candidate
    raise UserError(f"{path}: the divisors in {ROPE_FACTORS} are not those of Llama 3.1's rope scaling")
