"""GGUF files in the format of llama.cpp's converter: logits and tokenizers equal those of the original model."""

import json

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize, quantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from layers.rotary import RotaryConfig, inverse_frequencies
from mm.convert import llama
from mm.convert.gguf_file import LAYER_NAMES, OUTER_NAMES

WIDTH, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 4, 2, 2, 80
SETTINGS = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The permutation of q and k in llama.cpp's converter: halves of a head become neighbouring pairs."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(path, model, architecture="llama", quantisation=None, permuted=True, metadata=None, extra=None):
    """Write a transformers model as GGUF with quantised matrices, and give the model the dequantised values."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None)
    if head_dim and head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    for name, value in (metadata or {}).items():
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    inner = {hf: ours for ours, hf in LAYER_NAMES.items()}
    outer = {hf: ours for ours, hf in OUTER_NAMES.items()}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        if stem in outer:
            target = f"{outer[stem]}.{kind}"
        else:
            number, _, part = stem.removeprefix("model.layers.").partition(".")
            target = f"blk.{number}.{inner[part]}.{kind}"
        values = tensor.numpy()
        if permuted and ".attn_q." in target:
            values = permute(values, config.num_attention_heads)
        if permuted and ".attn_k." in target:
            values = permute(values, config.num_key_value_heads)
        if quantisation is None or values.ndim == 1:
            writer.add_tensor(target, np.ascontiguousarray(values))
            continue
        packed = quantize(np.ascontiguousarray(values), quantisation)
        writer.add_tensor(target, packed, raw_dtype=quantisation)
        kept = torch.from_numpy(dequantize(packed, quantisation).reshape(values.shape).copy())
        if permuted and (".attn_q." in target or ".attn_k." in target):
            heads = config.num_attention_heads if ".attn_q." in target else config.num_key_value_heads
            kept = kept.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(kept.shape)
        tensor.copy_(kept)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_model(randomise, kind=transformers.LlamaConfig, **settings):
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**SETTINGS, **settings}), dtype=torch.float32)
    randomise(model).tie_weights()
    return model


def assert_same_logits(path, theirs, largest_difference):
    ours = llama.load(path)
    assert llama.read_shape(path) == ours.config
    tokens = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert largest_difference(ours(tokens), theirs(tokens).logits) < 1e-4  # fp32 rounding of logits around 20
    return ours


@pytest.mark.parametrize("quantisation", [None, "F16", "BF16", "Q8_0", "Q4_1"])
def test_logits_equal_those_of_the_original(tmp_path, randomise, largest_difference, quantisation):
    theirs = random_model(randomise)
    kind = quantisation and gguf.GGMLQuantizationType[quantisation]
    path = write(tmp_path / "model.gguf", theirs, quantisation=kind)
    ours = assert_same_logits(path, theirs, largest_difference)
    assert ours.config.stop_tokens == (2, 5)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert {p.dtype for p in llama.load(path, torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("architecture", "kind", "settings"),
    [
        ("llama", transformers.LlamaConfig, {"tie_word_embeddings": True}),
        ("llama", transformers.LlamaConfig, {"attention_bias": True}),
        ("llama", transformers.LlamaConfig, {"head_dim": 32}),
        ("llama", transformers.MistralConfig, {"sliding_window": None}),
        ("qwen2", transformers.Qwen2Config, {}),
    ],
)
def test_logits_of_variants_equal_the_original(tmp_path, randomise, largest_difference, architecture, kind, settings):
    theirs = random_model(randomise, kind, **settings)
    path = write(tmp_path / "model.gguf", theirs, architecture, permuted=architecture == "llama")
    ours = assert_same_logits(path, theirs, largest_difference)
    assert ours.config.tied_embeddings == settings.get("tie_word_embeddings", False)


def test_llama_31_divisors_become_rotary_settings(tmp_path, randomise, largest_difference):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = random_model(randomise, rope_parameters=rope)
    plain = inverse_frequencies(RotaryConfig(500_000.0), WIDTH // HEADS)
    scaled = inverse_frequencies(RotaryConfig(500_000.0, "llama3", 32.0), WIDTH // HEADS)
    path = write(tmp_path / "model.gguf", theirs, extra={"rope_freqs.weight": (plain / scaled).numpy()})
    ours = assert_same_logits(path, theirs, largest_difference)
    assert (ours.config.rotary.scaling, ours.config.rotary.factor) == ("llama3", 32.0)
    assert "rope_freqs.weight (turned into rotary settings)" in str(ours.report)
    odd = write(tmp_path / "odd.gguf", theirs, extra={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)})
    with pytest.raises(ValueError, match="rope_freqs"):
        llama.load(odd)


def test_linear_scaling_metadata(tmp_path, randomise, largest_difference):
    theirs = random_model(randomise, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0})
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4}
    assert_same_logits(write(tmp_path / "model.gguf", theirs, metadata=metadata), theirs, largest_difference)


@pytest.mark.parametrize(
    ("metadata", "extra", "named"),
    [
        ({"llama.rope.scaling.type": "yarn"}, {}, "yarn"),
        ({"llama.expert_count": 8}, {}, "mixture of experts"),
        ({"llama.rope.dimension_count": 8}, {}, "rope.dimension_count"),
        ({}, {"blk.0.attn_q_norm.weight": np.ones(16, dtype=np.float32)}, r"blk\.0\.attn_q_norm\.weight"),
        ({"split.count": 2}, {}, "split"),
    ],
)
def test_unsupported_settings_are_errors_that_name_them(tmp_path, randomise, metadata, extra, named):
    path = write(tmp_path / "model.gguf", random_model(randomise), metadata=metadata, extra=extra)
    with pytest.raises(ValueError, match=named):
        llama.load(path)


def test_other_architectures_and_files_are_errors(tmp_path, randomise):
    theirs = random_model(randomise)
    with pytest.raises(ValueError, match="gemma"):
        llama.load(write(tmp_path / "gemma.gguf", theirs, "gemma"))
    whole = write(tmp_path / "model.gguf", theirs).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        llama.load(tmp_path / "cut.gguf")
    (tmp_path / "not.gguf").write_bytes(b"PNG")
    with pytest.raises(ValueError, match="not a GGUF file"):
        llama.load(tmp_path / "not.gguf")


def test_an_unsupported_tensor_type_is_an_error(tmp_path, randomise):
    whole_numbers = {"blk.0.ffn_up.weight_scale": np.zeros((4, 4), np.int8)}
    file = write(tmp_path / "int8.gguf", random_model(randomise), extra=whole_numbers)
    with pytest.raises(ValueError, match=r"int8.gguf: blk.0.ffn_up.weight_scale is stored as I8: "):
        llama.load(file)


def test_a_sliding_window_limits_the_context(tmp_path, randomise):
    path = write(tmp_path / "m.gguf", random_model(randomise), metadata={"llama.attention.sliding_window": 16})
    model = llama.load(path)
    assert model.config.context == 16
    assert "limited to 16" in str(model.report)


TEXTS = [
    "Hello world, the year is 2024",
    "a\n\n1. first\n  12 items",
    "<|im_start|>user\nwe'll see<|im_end|>\n",
    " naïve café 你好 \t x",
    "",
]
CORPUS = ["Hello world, the first user of the year will see café items\n\n" * 3, "  \n\n 1 2 3 naïve"] * 5
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_tokenizer(cutting) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cutting
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_tokenizer(path, tokenizer: Tokenizer, model: str, cut: str | None = None, scores=None, **flags):
    state = json.loads(tokenizer.to_str())
    pieces = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    control = {token["content"] for token in state["added_tokens"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if cut:
        writer.add_tokenizer_pre(cut)
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in control else 1 for piece in pieces])
    if scores is None:
        writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    else:
        writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CUTS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.mark.parametrize("cut", CUTS)
def test_byte_level_tokenizers_equal_the_original(tmp_path, cut):
    original = byte_level_tokenizer(CUTS[cut]())
    path = write_tokenizer(tmp_path / "t.gguf", original, "gpt2", cut, add_bos_token=False)
    ours = llama.load_tokenizer(path)
    for text in TEXTS:
        tokens = ours.encode(text)
        assert tokens == original.encode(text).ids
        assert ours.decode(tokens) == text
    assert ours.convert_tokens_to_ids(SPECIALS) == [0, 1, 2]
    assert ours.decode(ours.encode("<|im_start|>see<|im_end|>"), skip_special_tokens=True) == "see"
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
    prompt = ours.apply_chat_template([{"role": "user", "content": "see"}], tokenize=False)
    assert prompt == "<|im_start|>see<|im_end|>"


def test_digits_are_split_before_merging(tmp_path):
    """White space before a digit is not split; with vocabulary and merges only, this rule would be lost."""
    original = byte_level_tokenizer(CUTS["smollm"]())
    path = write_tokenizer(tmp_path / "t.gguf", original, "gpt2", "smollm")
    pieces = llama.load_tokenizer(path).tokenize("a\n\n12")
    assert pieces == ["a", "ĊĊ", "1", "2"]


def test_a_start_token_is_added_if_the_file_says_so(tmp_path):
    original = byte_level_tokenizer(CUTS["llama-bpe"]())
    for flag, expected in ((True, [1]), (False, [])):
        path = write_tokenizer(tmp_path / "t.gguf", original, "gpt2", "llama-bpe", add_bos_token=flag)
        assert llama.load_tokenizer(path).encode("see") == expected + original.encode("see").ids


def test_sentencepiece_tokenizers_equal_the_original(tmp_path):
    """Only scores are stored; the merges follow from the pieces."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    original = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    original.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, max_token_length=8
    )
    original.train_from_iterator(CORPUS, trainer)
    state = json.loads(original.to_str())
    for value in bytes_:
        state["model"]["vocab"][value] = len(state["model"]["vocab"])
    original = Tokenizer.from_str(json.dumps(state))
    ranks = {"".join(merge): -rank for rank, merge in enumerate(state["model"]["merges"])}
    pieces = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    scores = [float(ranks.get(piece, 0)) for piece in pieces]
    path = write_tokenizer(tmp_path / "t.gguf", original, "llama", scores=scores)
    ours = llama.load_tokenizer(path)
    for text in ("Hello world the first", "café 你好 see", "a  b"):
        tokens = ours.encode(text)
        assert tokens == [1, *original.encode(text).ids]  # SentencePiece files start with the start token
        assert ours.decode(tokens, skip_special_tokens=True) == text


def test_unknown_tokenizers_are_errors(tmp_path):
    original = byte_level_tokenizer(CUTS["gpt-2"]())
    with pytest.raises(ValueError, match="tekken"):
        llama.load_tokenizer(write_tokenizer(tmp_path / "t.gguf", original, "gpt2", "tekken"))
    with pytest.raises(ValueError, match="rwkv"):
        llama.load_tokenizer(write_tokenizer(tmp_path / "u.gguf", original, "rwkv"))


def test_folders_use_the_rules_of_their_tokenizer_json(tmp_path):
    """SmolLM2's folder names the class GPT2Tokenizer, whose rules would replace the file's."""
    original = byte_level_tokenizer(CUTS["smollm"]())
    original.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours = llama.load_tokenizer(tmp_path)
    assert [ours.encode(text) for text in TEXTS] == [original.encode(text).ids for text in TEXTS]
    assert ours.eos_token_id == 2
    assert ours.chat_template == "{{ messages }}"
    with pytest.raises(ValueError, match="no tokenizer"):
        llama.load_tokenizer(tmp_path / "..")
