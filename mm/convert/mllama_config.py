"""Translate a Llama 3.2 Vision config.json to our configuration and back; fields without a counterpart are errors."""

import copy
import dataclasses
from itertools import pairwise
from typing import Any

import torch

from foundation.errors import UserError
from mm.config import NUM_EXTRA_TOKENS, ModelConfig
from mm.convert.llama_config import check_positive_integers, language_model_config, stop_tokens
from mm.cross_attention import ImageAdapterConfig
from vision.encoder import VisionEncoderConfig
from vision.tiling import CANVASES, MAX_TILES

VISION_DEFAULTS = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "norm_eps": 1e-5,
    "max_num_tiles": MAX_TILES,
    "num_channels": 3,
    "hidden_act": "gelu",
    "intermediate_layers_indices": (3, 7, 15, 23, 30),
    "supported_aspect_ratios": CANVASES,
}
CROSS_ATTENTION_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)
LAYERNORM_EPS = 1e-5  # of the layer norms around the encoder's layers; mllama has no field for it
ACTIVATIONS = ("gelu", "quick_gelu")


def model_config(
    values: dict[str, Any], generation: dict[str, Any], tap_points: tuple[int, ...] | None, has_head: bool = True
) -> tuple[ModelConfig, list[str]]:
    """Our configuration of the model that a config.json describes, and notes for the report.

    Args:
        generation: generation_config.json, for the stop tokens.
        tap_points: override the folder's, see `mm.convert.mllama.load`.
        has_head: whether the folder holds a separate output table.

    Raises:
        UserError: it is another kind of model, or a setting is not supported; the message names it.
    """
    if values.get("model_type") != "mllama":
        raise UserError(f"model_type is {values.get('model_type')!r}; Llama 3.2 Vision folders have mllama")
    text, vision = values.get("text_config"), values.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise UserError("config.json lacks text_config or vision_config")
    if values.get("quantization_config") is not None:
        raise UserError("quantization_config is not supported; use a folder with weights that are not quantised")
    text = {"model_type": "mllama_text_model", "num_hidden_layers": 40, **text}
    if text.get("cross_attention_layers") is None:
        text["cross_attention_layers"] = CROSS_ATTENTION_LAYERS
    cross_layers = sorted(_integer_list(text, "cross_attention_layers"))
    check_positive_integers(text, ("num_hidden_layers",))
    if any(not 0 <= layer < text["num_hidden_layers"] for layer in cross_layers):
        raise UserError(f"cross_attention_layers {cross_layers} are outside 0..{text['num_hidden_layers'] - 1}")
    if any(after - before < 2 for before, after in pairwise(cross_layers)):
        raise UserError(f"cross_attention_layers {cross_layers} without a language layer in between are not supported")
    decoder, notes = language_model_config(
        text, stop_tokens(values, generation), text["num_hidden_layers"] - len(cross_layers)
    )
    if decoder.head_dim * decoder.num_heads != decoder.hidden_size:
        raise UserError(f"head_dim is {decoder.head_dim}; in mllama it must be hidden_size / num_attention_heads")
    if has_head and decoder.tied_embeddings:
        decoder = dataclasses.replace(decoder, tied_embeddings=False)
        notes.append("tie_word_embeddings is set, but the folder has a separate output table, which is used")
    encoder = _vision_config(vision, tap_points)
    positions = tuple(layer - num_before for num_before, layer in enumerate(cross_layers))
    image_token = values.get("image_token_index", values.get("image_token_id", decoder.vocab_size))
    if type(image_token) is not int:
        raise UserError(f"image_token_index is {image_token!r}; it must be a token id")
    return ModelConfig(decoder, encoder, ImageAdapterConfig(positions), image_token), notes


def config_values(config: ModelConfig) -> dict[str, Any]:
    """The config.json of one of our models.

    Raises:
        UserError: mllama cannot express some fields; the message names all of them.
    """
    lm, encoder, adapter = config.language_model, config.vision_encoder, config.image_adapter
    if encoder is None or adapter is None:
        raise UserError("mllama cannot express a model without vision_encoder and image_adapter")
    _refuse_other_parts(config)
    positions = adapter.block_positions(lm.num_layers)
    wrong = {
        f"language_model.head_dim {lm.head_dim} (it must be hidden_size / num_heads)": lm.head_dim * lm.num_heads
        != lm.hidden_size,
        "language_model.qkv_bias": lm.qkv_bias,
        "language_model.output_bias": lm.output_bias,
        "language_model.mlp_bias": lm.mlp_bias,
        "image_adapter.intermediate_size other than the language model's": adapter.intermediate_size
        not in (None, lm.intermediate_size),
        "vision_encoder.attention_bias": encoder.attention_bias,
        f"vision_encoder.norm_eps {encoder.norm_eps} (it must be {LAYERNORM_EPS})": encoder.norm_eps != LAYERNORM_EPS,
        f"vision_encoder.max_num_tiles {encoder.max_num_tiles}": encoder.max_num_tiles != MAX_TILES,
        f"vision_encoder.tap_points {encoder.tap_points} (each must be below num_layers, and there must be some)": any(
            point >= encoder.num_layers for point in encoder.tap_points
        )
        or not encoder.tap_points,
        "vision_encoder.padding 'ragged' (it must be 'llama32', since mllama pads)": encoder.padding != "llama32",
    }
    found = [name for name, present in wrong.items() if present]
    if found:
        raise UserError(f"mllama cannot express {'; '.join(found)}")
    rope = {"rope_type": "default" if lm.rotary.scaling == "none" else lm.rotary.scaling, "rope_theta": lm.rotary.theta}
    if lm.rotary.scaling != "none":
        rope["factor"] = lm.rotary.factor
    if lm.rotary.scaling == "llama3":
        rope |= {
            "low_freq_factor": lm.rotary.low_freq_factor,
            "high_freq_factor": lm.rotary.high_freq_factor,
            "original_max_position_embeddings": lm.rotary.original_context,
        }
    stop = list(lm.stop_tokens) or None
    text = {
        "model_type": "mllama_text_model",
        "vocab_size": lm.vocab_size,
        "hidden_size": lm.hidden_size,
        "intermediate_size": lm.intermediate_size,
        "num_hidden_layers": lm.num_layers + len(positions),
        "num_attention_heads": lm.num_heads,
        "num_key_value_heads": lm.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": lm.norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": lm.context,
        "cross_attention_layers": [position + num_before for num_before, position in enumerate(positions)],
        "tie_word_embeddings": False,
        "eos_token_id": stop,
        "pad_token_id": None,
    }
    vision = {
        "model_type": "mllama_vision_model",
        "hidden_size": encoder.hidden_size,
        "intermediate_size": encoder.intermediate_size,
        "num_hidden_layers": encoder.num_layers,
        "num_global_layers": encoder.num_gated_layers,
        "attention_heads": encoder.num_heads,
        "image_size": encoder.tile_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "hidden_act": encoder.activation,
        "norm_eps": encoder.norm_eps,
        "max_num_tiles": encoder.max_num_tiles,
        "supported_aspect_ratios": [list(canvas) for canvas in CANVASES],
        "intermediate_layers_indices": list(encoder.tap_points),
        "vision_output_dim": encoder.feature_size,
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": config.image_token_id,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }


def check_unchanged(values: dict[str, Any], config: ModelConfig) -> None:
    """Check that a folder's config.json still describes the model that was read from it.

    Stop tokens and tap points may differ: stop tokens are in generation_config.json, and the folder's indices are
    written back.

    Raises:
        UserError: fields have changed, or the model has parts that mllama does not have.
    """
    _refuse_other_parts(config)
    assert config.vision_encoder is not None
    tied = config.language_model.tied_embeddings
    described, _ = model_config(values, {}, config.vision_encoder.tap_points, has_head=not tied)
    changed = []
    for part in ("language_model", "vision_encoder", "image_adapter"):
        old, new = dataclasses.asdict(getattr(described, part)), dataclasses.asdict(getattr(config, part))
        changed += [
            f"{part}.{name}: {old[name]} -> {new[name]}"
            for name in old
            if old[name] != new[name] and name not in ("stop_tokens", "tied_embeddings", "gate_init")
        ]
    if described.image_token_id != config.image_token_id:
        changed.append(f"image_token_id: {described.image_token_id} -> {config.image_token_id}")
    if changed:
        raise UserError(
            f"the model differs from its folder's config.json ({'; '.join(changed)}); set model.mllama_source = None "
            "to write it with a new config.json"
        )


def with_dtype(values: dict[str, Any], dtypes: set[torch.dtype]) -> dict[str, Any]:
    """A config.json with the dtype of the tensors, or the widest of several."""
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    name = str(dtypes.pop() if len(dtypes) == 1 else widest).removeprefix("torch.")
    values = copy.deepcopy(values)
    has_field = False
    for part in (values, values.get("text_config") or {}, values.get("vision_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None:
                part[key] = name
                has_field = has_field or part is values
    return values if has_field else {**values, "dtype": name}


def _refuse_other_parts(config: ModelConfig) -> None:
    others = [part for part in ("video_adapter", "speech_encoder", "speech_adapter") if getattr(config, part)]
    if others:
        raise UserError(
            f"mllama cannot express {', '.join(others)}; convert an earlier run without them, with the same language "
            "model, encoder and image adapter"
        )


def _integer_list(values: dict[str, Any], name: str) -> tuple[int, ...]:
    items = values[name]
    if not isinstance(items, list | tuple) or any(type(item) is not int for item in items):
        raise UserError(f"{name} is {items!r}; it must be a list of integers")
    return tuple(items)


def _vision_config(values: dict[str, Any], tap_points: tuple[int, ...] | None) -> VisionEncoderConfig:
    values = {**VISION_DEFAULTS, **{name: value for name, value in values.items() if value is not None}}
    heads = values.get("num_attention_heads", values["attention_heads"])
    sides = {}
    for name in ("image_size", "patch_size"):
        side = values[name]
        sides[name] = side[0] if isinstance(side, list) and len(set(side)) == 1 else side
    counts = ("hidden_size", "intermediate_size", "num_hidden_layers", "max_num_tiles")
    check_positive_integers({**values, **sides, "attention_heads": heads}, (*counts, *sides, "attention_heads"))
    if type(values["num_global_layers"]) is not int or values["num_global_layers"] < 0:
        raise UserError(f"num_global_layers is {values['num_global_layers']!r}; it must be an integer of 0 or more")
    taps = _integer_list(values, "intermediate_layers_indices")
    feature_size = values["hidden_size"] * (1 + len(taps))
    wrong = {
        "num_channels": values["num_channels"] != 3,
        "hidden_act": values["hidden_act"] not in ACTIVATIONS,
        "norm_eps": values["norm_eps"] != LAYERNORM_EPS,
        "max_num_tiles": values["max_num_tiles"] != MAX_TILES,
        "supported_aspect_ratios": values["supported_aspect_ratios"] not in (CANVASES, [list(c) for c in CANVASES]),
        "vision_output_dim": values.get("vision_output_dim", feature_size) != feature_size,
    }
    found = [f"{name} {values[name]!r}" for name, present in wrong.items() if present]
    if found:
        raise UserError(f"vision_config with {'; '.join(found)} is not supported")
    if tap_points is not None and len(tap_points) != len(taps):
        raise UserError(
            f"{len(tap_points)} tap_points are given, {tuple(tap_points)}; the projection takes {len(taps)}"
        )
    return VisionEncoderConfig(
        tile_size=sides["image_size"],
        patch_size=sides["patch_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_gated_layers=values["num_global_layers"],
        num_heads=heads,
        tap_points=taps if tap_points is None else tuple(tap_points),
        activation=values["hidden_act"],
        norm_eps=values["norm_eps"],
        padding="llama32",
    )


assert NUM_EXTRA_TOKENS == 8  # mllama's embedding table has 8 more rows than its output table
