"""Translate a Hugging Face config.json of the Llama family to our configuration, or say what is not supported.

Language model folders, Llama 3.2 Vision folders and (for the sliding window) GGUF files use it.
"""

from collections.abc import Iterable
from typing import Any

from foundation.errors import UserError
from layers.rotary import RotaryConfig
from mm.language_model import LanguageModelConfig

# Defaults of fields that a config.json may omit, by model type: those of the configuration classes of transformers.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"context": 2048, "theta": 10_000.0, "num_kv_heads": None, "window": None, "norm_eps": 1e-6},
    "mistral": {"context": 4096 * 32, "theta": 10_000.0, "num_kv_heads": 8, "window": 4096, "norm_eps": 1e-6},
    "qwen2": {"context": 32_768, "theta": 10_000.0, "num_kv_heads": 32, "window": 4096, "norm_eps": 1e-6},
    "mllama_text_model": {"context": 131_072, "theta": 500_000.0, "num_kv_heads": 8, "window": None, "norm_eps": 1e-5},
}
# Settings that change what the layers compute, with the values that do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "partial_rotary_factor": (None, 1),
    "no_rope_layers": (None, []),
    "qk_layernorm": (None, False),
    "use_qk_norm": (None, False),
}


def stop_tokens(values: dict[str, Any], generation: dict[str, Any]) -> dict[int, str]:
    """Token ids that end an answer, each with the files that name it: every eos_token_id, a number or a list.

    Args:
        values: config.json, with or without a text_config. generation: generation_config.json.

    Raises:
        UserError: an eos_token_id is neither a token id nor a list of them.
    """
    tokens: dict[int, str] = {}
    sources = {"generation_config.json": generation, "config.json": values}
    for name, settings in {**sources, "config.json's text_config": values.get("text_config") or {}}.items():
        eos = settings.get("eos_token_id")
        for token in eos if isinstance(eos, list) else [] if eos is None else [eos]:
            if type(token) is not int:
                raise UserError(f"{name} has eos_token_id {eos!r}; it must be a token id or a list of them")
            tokens[token] = f"{tokens[token]} and {name}" if token in tokens else f"eos_token_id of {name}"
    return tokens


def language_model_config(
    values: dict[str, Any], stop: dict[int, str] | None = None, num_layers: int | None = None
) -> tuple[LanguageModelConfig, list[str]]:
    """The configuration of the decoder that a config.json describes, and notes for the report.

    Args:
        values: config.json, or the text_config of a Llama 3.2 Vision folder.
        stop: stop tokens, each with the reason. Ids outside the vocabulary, such as -1, stand for none.
        num_layers: overrides num_hidden_layers.

    Raises:
        UserError: a model type or setting is not supported, or a field is missing; the message names it.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise UserError(
            f"model_type {kind!r} is not supported; it can be llama (Llama 1-3.x, SmolLM2), mistral or qwen2"
        )
    for name, harmless in REFUSED.items():
        if values.get(name) not in harmless:
            raise UserError(f"{name} = {values[name]!r} is not supported")
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {values['hidden_act']!r} is not supported; it can be silu")
    check_positive_integers(
        values,
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
    )
    defaults = DEFAULTS[kind]
    num_heads = values["num_attention_heads"]
    head_dim: Any = values.get("head_dim")  # None means hidden_size / num_heads
    bias = bool(values.get("attention_bias", False)) if kind == "llama" else False
    context, notes = limit_context(
        values.get("max_position_embeddings", defaults["context"]), _window(values, kind, defaults["window"])
    )
    vocab_size = values["vocab_size"]
    within = {token: reason for token, reason in (stop or {}).items() if 0 <= token < vocab_size}
    notes += [f"stop token {token}: {reason}" for token, reason in within.items()]
    outside = [f"{reason} is {token}" for token, reason in (stop or {}).items() if token not in within]
    notes += [f"{what}, outside the vocabulary of {vocab_size} tokens: left out" for what in outside]
    config = LanguageModelConfig(
        vocab_size=vocab_size,
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"] if num_layers is None else num_layers,
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads", defaults["num_kv_heads"]) or num_heads,
        head_dim=head_dim,
        norm_eps=_number(values, "rms_norm_eps", defaults["norm_eps"]),
        rotary=rotary_config(values, defaults["theta"]),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=bool(values.get("mlp_bias", False)) if kind == "llama" else False,
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        context=context,
        stop_tokens=tuple(within),
    )
    return config, notes


def check_positive_integers(values: dict[str, Any], needed: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Check that counts and sizes of a configuration are positive integers.

    Raises:
        UserError: a needed one is missing, or one is something else; the message names it.
    """
    needed = tuple(needed)
    missing = [name for name in needed if values.get(name) is None]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    for name in (*needed, *optional):
        value = values.get(name)
        if value is not None and (type(value) is not int or not 1 <= value < 2**31):
            raise UserError(f"config.json has {name} = {value!r}; it must be a positive integer")


def check_num_layers(num_layers: int, num_tensors: int) -> None:
    """Refuse an absurd number of layers before a model of that size is built.

    Raises:
        UserError: there are more layers than tensors, and more than 1000.
    """
    if num_layers > max(1000, num_tensors):
        raise UserError(f"the configuration describes {num_layers} layers, the weights hold {num_tensors} tensors")


def limit_context(context: int, window: int | None) -> tuple[int, list[str]]:
    """The longest context in which sliding-window and full attention are equal, and a note if it is shorter."""
    if window is None or window >= context:
        return context, []
    note = f"context limited to {window} of {context} tokens, the sliding window, where full attention is equal"
    return window, [note]


def _window(values: dict[str, Any], kind: str, default: int | None) -> int | None:
    """The sliding window in tokens, if any layer has one."""
    kinds = values.get("layer_types")
    unknown = set(kinds or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"layer_types {sorted(unknown)} are not supported; give full_attention or sliding_attention")
    if kind == "qwen2":
        if not values.get("use_sliding_window", False):
            return None
        if kinds is None and values.get("max_window_layers", 28) >= values["num_hidden_layers"]:
            return None
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return values.get("sliding_window", default)


def rotary_config(values: dict[str, Any], default_theta: float) -> RotaryConfig:
    """Rotary settings from `rope_theta` and `rope_scaling`, or from `rope_parameters` (transformers 5).

    Raises:
        UserError: another type than default, linear or llama3, or a number is missing; the message names it.
    """
    settings: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = values.get(name) or {}
        if not isinstance(part, dict):
            raise UserError(f"config.json has {name} = {part!r}; it must be an object")
        settings |= part
    nested = [name for name, value in settings.items() if isinstance(value, dict)]
    if nested:
        raise UserError(f"separate rope_parameters for {', '.join(nested)} are not supported")
    kind = settings.get("rope_type", settings.get("type", "default"))
    theta = _number(settings, "rope_theta", _number(values, "rope_theta", default_theta))
    if settings.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"partial_rotary_factor {settings['partial_rotary_factor']} is not supported; it can be 1")
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"rope type {kind!r} is not supported; it can be default, linear or llama3")
    if kind == "default":
        return RotaryConfig(theta=theta)
    context = settings.get("original_max_position_embeddings", values.get("original_max_position_embeddings"))
    needed = {"factor": settings.get("factor")}
    if kind == "llama3":
        needed |= {name: settings.get(name) for name in ("low_freq_factor", "high_freq_factor")}
        needed["original_max_position_embeddings"] = context
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise UserError(f"the {kind} rope settings lack {', '.join(missing)}")
    if kind == "linear":
        return RotaryConfig(theta, "linear", _number(settings, "factor"))
    return RotaryConfig(
        theta,
        "llama3",
        _number(settings, "factor"),
        _number(settings, "low_freq_factor"),
        _number(settings, "high_freq_factor"),
        int(_number({"original_max_position_embeddings": context}, "original_max_position_embeddings")),
    )


def _number(values: dict[str, Any], name: str, default: float | None = None) -> float:
    value = values.get(name, default)
    if type(value) not in (int, float):
        raise UserError(f"config.json has {name} = {value!r}; it must be a number")
    assert value is not None
    return float(value)
