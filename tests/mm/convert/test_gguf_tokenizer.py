"""Special tokens and chat templates of GGUF files with odd metadata, as in llama.cpp and transformers."""

import gguf
import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from layers.sources import materialise
from mm.assembly import from_language_model
from mm.convert import llama
from mm.processor import Processor
from mm.tokenizer_fit import use_stop_tokens

ABSENT = 2**32 - 1
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
LETTERS = list("abcdefghijklmnopqrstuvwxyz<>|/_ĠĊ")
BYTE_LEVEL = [*LETTERS, "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(path, model="gpt2", pieces=BYTE_LEVEL, types=None, rows=None, ids=None, template=CHATML, scores=None):
    """A file with a tokenizer, and with a model of one layer if it gets `rows` of embeddings."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if model == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["a b"] if "ab" in pieces else [])
    writer.add_token_list(pieces)
    if scores is not None:
        writer.add_token_scores(scores)
    writer.add_token_types(types or [NORMAL if len(piece) < 3 else CONTROL for piece in pieces])
    for name, token_id in (ids or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    if template is not None:
        writer.add_chat_template(template)
    if rows is not None:
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(8)
        writer.add_feed_forward_length(8)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        generator = np.random.default_rng(0)
        shapes = {"token_embd": (rows, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
        shapes |= {f"blk.0.{part}": (8, 8) for part in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.0.{part}": (8, 8) for part in ("ffn_gate", "ffn_up", "ffn_down")}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("outside", [ABSENT, len(BYTE_LEVEL), 10**6])
def test_special_ids_outside_the_vocabulary_are_absent(tmp_path, outside):
    names = ("bos", "eos", "eot", "eom", "unknown", "padding")
    path = write(tmp_path / "m.gguf", rows=len(BYTE_LEVEL), ids=dict.fromkeys(names, outside))
    tokenizer = llama.load_tokenizer(path)
    assert tokenizer.special_tokens_map == {}
    model = llama.load(path)
    assert model.config.stop_tokens == ()
    assert f"tokenizer.ggml.eos_token_id is {outside}, outside the vocabulary of {len(BYTE_LEVEL)}" in str(model.report)


def test_one_special_id_outside_leaves_the_others(tmp_path):
    end, turn = BYTE_LEVEL.index("</s>"), BYTE_LEVEL.index("<|im_end|>")
    path = write(tmp_path / "m.gguf", rows=len(BYTE_LEVEL), ids={"bos": ABSENT, "eos": end, "eot": turn, "eom": ABSENT})
    model = llama.load(path)
    assert model.config.stop_tokens == (end, turn)
    assert f"stop token {turn}: tokenizer.ggml.eot_token_id" in str(model.report)
    assert llama.load_tokenizer(path).special_tokens_map == {"eos_token": "</s>"}


def test_sentencepiece_files_have_llamas_special_ids_where_they_give_none(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b"]
    types = [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL]
    path = write(tmp_path / "m.gguf", "llama", pieces, types, rows=6, ids={"eos": ABSENT}, scores=[0.0] * 6)
    tokenizer = llama.load_tokenizer(path)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("ab").input_ids == [1, 3, 4, 5]
    assert llama.load(path).config.stop_tokens == (2,)


def test_control_tokens_spelled_in_a_text_never_merge(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", "<", "s", ">", "<s", "/", "s>", "</"]
    types = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * 7
    path = write(tmp_path / "m.gguf", "llama", pieces, types, scores=[-float(n) for n in range(10)])
    tokenizer = llama.load_tokenizer(path)
    for text in ("<s>", "</s>", "<s></s>"):
        plain = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert not {1, 2} & set(plain), text
    assert tokenizer.encode("<s>", add_special_tokens=False) == [1]


def test_a_token_that_only_the_template_can_write_is_a_control_token(tmp_path):
    """Some files call <|im_end|> normal: then no merge makes it, and turns would end with its characters."""
    pieces = [*BYTE_LEVEL, "<b>"]
    types = [NORMAL] * len(pieces)
    tokenizer = llama.load_tokenizer(write(tmp_path / "m.gguf", pieces=pieces, types=types))
    for text in ("<|im_start|>", "<|im_end|>"):
        assert tokenizer.encode(text) == [pieces.index(text)]
        assert (
            pieces.index(text) in tokenizer.all_special_ids
            or tokenizer.added_tokens_decoder[pieces.index(text)].special
        )
    assert len(tokenizer.encode("<b>")) == len(tokenizer.encode("<s>")) == 3  # the template does not write these


def test_a_file_whose_eos_ends_no_turn_stops_where_its_template_ends_one(tmp_path):
    eos, end = BYTE_LEVEL.index("</s>"), BYTE_LEVEL.index("<|im_end|>")
    path = write(tmp_path / "m.gguf", rows=len(BYTE_LEVEL), ids={"bos": BYTE_LEVEL.index("<s>"), "eos": eos})
    model = materialise(from_language_model(llama.load(path)))
    processor = Processor(llama.load_tokenizer(path), model.config)
    use_stop_tokens(model, processor)
    assert model.config.language_model.stop_tokens == (eos, end)
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]
    labels = processor.example(messages).labels
    assert labels[-4:] == [*(BYTE_LEVEL.index(letter) for letter in "def"), end]
    report = str(model.language_model.report)
    assert f"stop token {eos}: tokenizer.ggml.eos_token_id; the tokenizer's eos_token\n" in report
    assert f"stop token {end}: the chat template ends an answer with it" in report


def test_a_file_with_more_tokens_than_embeddings_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", rows=len(BYTE_LEVEL) - 1)
    config = from_language_model(llama.load(path)).config
    with pytest.raises(ValueError, match=rf"table has {len(BYTE_LEVEL) - 1} rows, without one for <pad>"):
        Processor(llama.load_tokenizer(path), config)


def test_named_templates(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert llama.load_tokenizer(write(tmp_path / "d.gguf", template=named)).chat_template == "D"
    assert llama.load_tokenizer(write(tmp_path / "t.gguf", template=named[:1])).chat_template == "T"
    several = [*named[:1], {"name": "rag", "template": "R"}]
    assert llama.load_tokenizer(write(tmp_path / "s.gguf", template=several)).chat_template == {
        "tool_use": "T",
        "rag": "R",
    }
    assert llama.load_tokenizer(write(tmp_path / "n.gguf", template=None)).chat_template is None


special_id = st.integers(0, len(BYTE_LEVEL) - 1) | st.none()


@pytest.mark.fuzz
@given(
    ids=st.fixed_dictionaries({name: special_id for name in ("bos", "eos", "unknown", "padding")}),
    template=st.none() | st.sampled_from([CHATML, "{{ messages }}"]),
    text=st.text(st.sampled_from("abc <>|/_\n"), max_size=20),
)
def test_files_give_the_special_tokens_and_the_template_of_transformers(tmp_path, ids, template, text):
    given_ids = {name: token_id for name, token_id in ids.items() if token_id is not None}
    path = write(tmp_path / "m.gguf", ids=given_ids, template=template)
    ours = llama.load_tokenizer(path)
    tokens = {name: ours.special_tokens_map.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    expected = {name: BYTE_LEVEL[ids[key]] if ids[key] is not None else None for name, key in names.items()}
    assert tokens == expected
    assert ours.chat_template == template
    assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


@pytest.mark.fuzz
@given(ids=st.fixed_dictionaries({}, optional={name: st.integers(0, len(BYTE_LEVEL) - 1) for name in ("bos", "eos")}))
def test_files_load_as_in_transformers(tmp_path, ids):
    write(tmp_path / "m.gguf", ids=ids, rows=len(BYTE_LEVEL), scores=[0.0] * len(BYTE_LEVEL))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = llama.load_tokenizer(tmp_path / "m.gguf")
    if "eos" in ids:
        assert ours.eos_token == theirs.eos_token
    if "bos" in ids:
        assert ours.bos_token == theirs.bos_token
    assert ours.chat_template == theirs.chat_template
