"""Language models from Hugging Face folders: logits equal those of `transformers`; unsupported settings are errors."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mm.convert import llama

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS = {
    "llama 1": (transformers.LlamaConfig, {}),
    "grouped queries": (transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "one KV head, tied": (transformers.LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama 3.1 rotary": (transformers.LlamaConfig, {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "linear rotary": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "all biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "wide heads": (transformers.LlamaConfig, {"head_dim": 16, "num_key_value_heads": 2}),
    "mistral": (
        transformers.MistralConfig,
        {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 12, "max_position_embeddings": 96},
    ),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}


@pytest.fixture
def folder(tmp_path, randomise):
    """Write a random model of a configuration, and return it with its folder."""

    def write(kind=transformers.LlamaConfig, **settings):
        config = kind(**{**SIZES, **settings})
        model = randomise(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        model.tie_weights()
        model.save_pretrained(tmp_path / "model")
        return model, tmp_path / "model"

    return write


def edit(folder, **values):
    """Change config.json; None removes a field."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(folder, variant, largest_difference):
    kind, settings = VARIANTS[variant]
    theirs, path = folder(kind, **settings)
    ours = llama.load(path)
    tokens = torch.randint(0, 67, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # fp32 sums in another order: a few units in the last place of logits around 10
        assert largest_difference(ours(tokens), theirs(tokens).logits) < 5e-5
    assert ours.config.tied_embeddings == settings.get("tie_word_embeddings", False)
    assert ours.config.stop_tokens == (2,)
    assert "tensors loaded" in str(ours.report)


def test_both_formats_of_rotary_settings_are_equal(folder):
    _, path = folder(rope_parameters=LLAMA3)
    new = llama.load(path).config
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    edit(path, rope_parameters=None, rope_scaling=scaling, rope_theta=LLAMA3["rope_theta"])
    assert llama.load(path).config == new
    assert new.rotary.scaling == "llama3"
    old_kind = {"type": "linear", "factor": 2.0}
    edit(path, rope_scaling=old_kind)
    assert llama.load(path).config.rotary.scaling == "linear"


def test_shards_with_an_index_give_the_same_model(folder):
    theirs, path = folder(num_key_value_heads=2)
    whole = llama.load(path).state_dict()
    (path / "model.safetensors").unlink()
    theirs.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    for name, tensor in llama.load(path).state_dict().items():
        assert torch.equal(tensor, whole[name])
    next(iter(sorted(path.glob("model-*.safetensors")))).unlink()
    with pytest.raises(ValueError, match="lacks model-00001"):
        llama.load(path)


def test_dtype_is_kept_or_converted(folder):
    theirs, path = folder()
    theirs.to(torch.bfloat16).save_pretrained(path)
    assert llama.load(path).lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in llama.load(path, torch.float32).parameters()} == {torch.float32}


def test_stop_tokens_come_from_both_configurations(folder):
    _, path = folder()
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    edit(path, eos_token_id=[2, 6])
    model = llama.load(path)
    assert model.config.stop_tokens == (5, 6, 2)
    report = str(model.report)
    for line in (
        "stop token 5: eos_token_id of generation_config.json\n",
        "stop token 6: eos_token_id of generation_config.json and config.json\n",
        "stop token 2: eos_token_id of config.json",
    ):
        assert line in report
    (path / "generation_config.json").unlink()
    edit(path, eos_token_id=7)
    assert llama.load(path).config.stop_tokens == (7,)


def test_stop_tokens_outside_the_vocabulary_are_left_out(folder):
    _, path = folder()
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, -1, 67]}))
    edit(path, eos_token_id=4294967295)
    model = llama.load(path)
    assert model.config.stop_tokens == (5,)
    assert "eos_token_id of config.json is 4294967295, outside the vocabulary of 67 tokens" in str(model.report)


def test_missing_unexpected_and_misshapen_tensors_are_named(folder):
    _, path = folder()
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        llama.load(path)
    for name in ("layers.0.mlp.up_proj.weight", "model.norm.weight", "layers.0.self_attn.q_norm.weight"):
        assert name in str(error.value)
    assert "lm_head.weight: [5, 32] in the file, the model has [67, 32]" in str(error.value)


def test_a_long_list_of_names_is_shortened(folder):
    _, path = folder()
    save_file({"something.else": torch.ones(1)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \(30\)(.|\n)*and 10 more(.|\n)*something\.else"):
        llama.load(path)


def test_rotary_buffers_are_left_out(folder):
    _, path = folder()
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path / "model.safetensors")
    assert "inv_freq (rotary frequencies are computed)" in str(llama.load(path).report)


def test_a_stored_head_overrides_tying(folder):
    _, path = folder()
    edit(path, tie_word_embeddings=True)
    model = llama.load(path)
    assert not model.config.tied_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert "not tied" in str(model.report)


def test_tied_weights_are_one_parameter(folder):
    _, path = folder(tie_word_embeddings=True)
    model = llama.load(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_weights_may_be_stored_under_the_name_of_the_head(folder, largest_difference):
    theirs, path = folder(tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    tokens = torch.randint(0, 67, (1, 16), generator=torch.Generator().manual_seed(2))
    for names, loaded in (
        (("lm_head.weight",), True),
        (("model.embed_tokens.weight", "lm_head.weight"), True),
        ((), False),
    ):
        save_file({**tensors, **{name: table.clone() for name in names}}, path / "model.safetensors")
        if not loaded:
            with pytest.raises(ValueError, match=r"missing \(1\):\s+model\.embed_tokens\.weight"):
                llama.load(path)
            continue
        model = llama.load(path)
        assert model.config.tied_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
        assert "tied" in str(model.report)
        with torch.no_grad():
            assert largest_difference(model(tokens), theirs(tokens).logits) < 5e-5


def test_an_untied_head_may_not_be_missing(folder):
    _, path = folder()
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \(1\):\s+lm_head\.weight"):
        llama.load(path)


def test_a_sliding_window_limits_the_context(folder, largest_difference):
    theirs, path = folder(transformers.MistralConfig, sliding_window=16)
    model = llama.load(path)
    assert model.config.context == 16
    assert "context limited to 16 of 128 tokens" in str(model.report)
    tokens = torch.randint(0, 67, (1, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert largest_difference(model(tokens), theirs(tokens).logits) < 5e-5


def test_qwen2_windows_only_count_if_they_are_used(folder):
    _, path = folder(transformers.Qwen2Config)
    assert llama.load(path).config.context == 128
    edit(path, use_sliding_window=True, sliding_window=16, max_window_layers=3, layer_types=None)
    assert llama.load(path).config.context == 128  # no layer lies beyond max_window_layers
    edit(path, max_window_layers=2)
    assert llama.load(path).config.context == 16


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"num_attention_heads": "four"}, "num_attention_heads = 'four'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
        ({"rope_parameters": ["llama3"]}, "rope_parameters"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_unsupported_settings_are_errors_that_name_them(folder, values, named):
    _, path = folder()
    edit(path, **values)
    (path / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=named):
        llama.load(path)


def test_pickles_are_errors_that_say_how_to_convert_them(folder):
    _, path = folder()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle.*save_pretrained"):
        llama.load(path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "absent"])
def test_damaged_weights_are_errors(folder, damage):
    _, path = folder()
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage != "absent":
        weights.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        llama.load(path)


def test_paths_without_a_model_are_errors(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        llama.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no config\.json"):
        llama.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        llama.load(tmp_path)
