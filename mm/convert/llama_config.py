"""What a Hugging Face config.json says of a decoder of the Llama family, or why it cannot be one of ours.

Shared by language-model folders, Llama 3.2 Vision folders and (the sliding window) GGUF files.
"""

from collections.abc import Iterable

from foundation.errors import UserError
from layers.rotary import RotaryConfig
from mm.language_model import LanguageModelConfig

# What a config.json may leave out, by model type: the defaults of the model's own configuration class.
DEFAULTS = {
    "llama": {"context": 2048, "theta": 10_000.0, "num_kv_heads": None, "window": None, "norm_eps": 1e-6},
    "mistral": {"context": 4096 * 32, "theta": 10_000.0, "num_kv_heads": 8, "window": 4096, "norm_eps": 1e-6},
    "qwen2": {"context": 32_768, "theta": 10_000.0, "num_kv_heads": 32, "window": 4096, "norm_eps": 1e-6},
    "mllama_text_model": {"context": 131_072, "theta": 500_000.0, "num_kv_heads": 8, "window": None, "norm_eps": 1e-5},
}
# Settings that would change what the layers compute, with the values that leave them as they are.
REFUSED = {
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


def stop_tokens(values: dict, generation: dict) -> tuple[int, ...]:
    """Ids that end an answer: eos_token_id of generation_config.json, else of config.json; one or a list."""
    for settings in (generation, values, values.get("text_config") or {}):
        eos = settings.get("eos_token_id")
        if eos is not None:
            tokens = tuple(eos) if isinstance(eos, list) else (eos,)
            if any(type(token) is not int or token < 0 for token in tokens):
                raise UserError(f"eos_token_id is {eos!r}; a token id or a list of them is needed")
            return tokens
    return ()


def language_model_config(
    values: dict, stop: tuple[int, ...] = (), num_layers: int | None = None
) -> tuple[LanguageModelConfig, list[str]]:
    """The decoder that a config.json describes, and notes for the report.

    Args:
        values: of config.json, or the text_config of a Llama 3.2 Vision folder.
        num_layers: in place of num_hidden_layers.

    Raises:
        UserError: a model type or setting that the decoder does not compute, or a missing field, by name.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise UserError(
            f"model_type {kind!r} is not supported; this decoder computes llama (Llama 1-3.x, SmolLM2), mistral, qwen2"
        )
    for name, harmless in REFUSED.items():
        if values.get(name) not in harmless:
            raise UserError(f"{name} = {values[name]!r} is not supported by this decoder")
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {values['hidden_act']!r} is not supported; this decoder computes silu")
    check_whole_numbers(
        values,
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
    )
    defaults = DEFAULTS[kind]
    num_heads = values["num_attention_heads"]
    bias = bool(values.get("attention_bias", False)) if kind == "llama" else False
    context, notes = limit_context(
        values.get("max_position_embeddings", defaults["context"]), _window(values, kind, defaults["window"])
    )
    config = LanguageModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"] if num_layers is None else num_layers,
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads", defaults["num_kv_heads"]) or num_heads,
        head_dim=values.get("head_dim"),
        norm_eps=_number(values, "rms_norm_eps", defaults["norm_eps"]),
        rotary=rotary_config(values, defaults["theta"]),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=bool(values.get("mlp_bias", False)) if kind == "llama" else False,
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        context=context,
        stop_tokens=stop,
    )
    return config, notes


def check_whole_numbers(values: dict, needed: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Make sure that a configuration's counts and sizes are whole numbers from 1.

    Raises:
        UserError: those that are missing, or one that is no such number, by name.
    """
    needed = tuple(needed)
    absent = [name for name in needed if values.get(name) is None]
    if absent:
        raise UserError(f"config.json lacks {', '.join(absent)}")
    for name in (*needed, *optional):
        value = values.get(name)
        if value is not None and (type(value) is not int or not 1 <= value < 2**31):
            raise UserError(f"config.json has {name} = {value!r}; a whole number from 1 is needed")


def check_num_layers(num_layers: int, num_tensors: int) -> None:
    """Refuse an absurd number of layers before a model of that size is laid out."""
    if num_layers > max(1000, num_tensors):
        raise UserError(f"the configuration describes {num_layers} layers, the weights hold {num_tensors} tensors")


def limit_context(context: int, window: int | None) -> tuple[int, list[str]]:
    """The context with which a sliding window and full attention are the same thing, and a note when it shrank."""
    if window is None or window >= context:
        return context, []
    note = f"context limited to {window} of {context} tokens: inside its sliding window the model is the same"
    return window, [note]


def _window(values: dict, kind: str, default: int | None) -> int | None:
    """The sliding window of any layer, in tokens, or None."""
    kinds = values.get("layer_types")
    unknown = set(kinds or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"layer_types {sorted(unknown)} are not supported; layers can be full or sliding attention")
    if kind == "qwen2":
        if not values.get("use_sliding_window", False):
            return None
        if kinds is None and values.get("max_window_layers", 28) >= values["num_hidden_layers"]:
            return None
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return values.get("sliding_window", default)


def rotary_config(values: dict, default_theta: float) -> RotaryConfig:
    """Rotary settings in either spelling: `rope_theta` and `rope_scaling`, or `rope_parameters` (transformers 5).

    Raises:
        UserError: another kind than default, linear or llama3, or a missing number, by name.
    """
    settings = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = values.get(name) or {}
        if not isinstance(part, dict):
            raise UserError(f"config.json has {name} = {part!r}; an object is needed")
        settings |= part
    nested = [name for name, value in settings.items() if isinstance(value, dict)]
    if nested:
        raise UserError(f"rope_parameters of their own for {', '.join(nested)} layers are not supported")
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
    absent = [name for name, value in needed.items() if value is None]
    if absent:
        raise UserError(f"the {kind} rope settings lack {', '.join(absent)}")
    if kind == "linear":
        return RotaryConfig(theta, "linear", _number(settings, "factor"))
    bands = (_number(settings, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    return RotaryConfig(theta, "llama3", *bands, int(_number({"original context": context}, "original context")))


def _number(values: dict, name: str, default: float | None = None) -> float:
    value = values.get(name, default)
    if type(value) not in (int, float):
        raise UserError(f"config.json has {name} = {value!r}; a number is needed")
    return float(value)
