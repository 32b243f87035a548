"""Tokenizers of Hugging Face folders: chat templates wherever they stand, and the same tokens as in transformers."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mm.convert import llama

PIECES = ["a", "b", "<s>", "</s>", "<|end|>"]


def write_folder(folder: Path, files: dict[str, object]) -> Path:
    """A folder with a tokenizer of five tokens, and other files: texts, or values written as JSON."""
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(PIECES)}, merges=[]))
    tokenizer.add_special_tokens(PIECES[2:])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


CONFIG, PROCESSOR = "tokenizer_config.json", "chat_template.json"
ADDITIONAL = "additional_chat_templates/tool_use.jinja"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({CONFIG: {"chat_template": "C"}}, "C"),
        ({CONFIG: {"chat_template": named(tool_use="T", default="D")}}, "D"),
        ({CONFIG: {"chat_template": named(only="O")}}, "O"),
        ({CONFIG: {"chat_template": named(rag="R", tool_use="T")}}, {"rag": "R", "tool_use": "T"}),
        ({PROCESSOR: {"chat_template": "P"}}, "P"),
        ({PROCESSOR: {"chat_template": named(default="P", tool_use="T")}}, "P"),
        ({"processor_config.json": {"chat_template": "P"}}, "P"),
        ({"processor_config.json": {"image_seq_len": 5}}, None),
        ({"chat_template.jinja": "J", CONFIG: {"chat_template": "C"}, PROCESSOR: {"chat_template": "P"}}, "J"),
        ({"chat_template.jinja": "\ufeffJ"}, "J"),
        ({CONFIG: {"chat_template": "C"}, PROCESSOR: {"chat_template": "P"}}, "C"),
        ({ADDITIONAL: "T"}, "T"),
        ({ADDITIONAL: "T", "chat_template.jinja": "J"}, "J"),
        ({ADDITIONAL: "T", CONFIG: {"chat_template": "C"}}, "C"),
        ({ADDITIONAL: "T", PROCESSOR: {"chat_template": "P"}}, "P"),
        ({ADDITIONAL: "T", "additional_chat_templates/default.jinja": "D", CONFIG: {"chat_template": "C"}}, "D"),
    ],
)
def test_chat_templates_are_found_where_they_stand(tmp_path, files, expected):
    assert llama.load_tokenizer(write_folder(tmp_path, files)).chat_template == expected


@pytest.mark.parametrize("template", [5, [{"nom": "default", "template": "T"}], {"default": 3}, ["T"]])
def test_other_chat_templates_are_refused(tmp_path, template):
    with pytest.raises(ValueError, match=r"chat_template\.json: chat_template must be a text, or a list"):
        llama.load_tokenizer(write_folder(tmp_path, {PROCESSOR: {"chat_template": template}}))


texts = st.sampled_from(["{{ messages }}", "{% for m in messages %}{{ m.content }}</s>{% endfor %}", "{{ eos_token }}"])
names = st.sampled_from(["default", "tool_use", "rag"])
templates = texts | st.dictionaries(names, texts, min_size=1).map(lambda found: named(**found))
tokens = st.sampled_from([*PIECES, "<new>"])
settings = st.fixed_dictionaries(
    {},
    optional={
        "chat_template": templates,
        "bos_token": tokens,
        "eos_token": tokens | tokens.map(lambda text: {"__type": "AddedToken", "content": text, "special": True}),
        "pad_token": tokens,
        "added_tokens_decoder": st.just({"5": {"content": "<new>", "special": True}}),
        "tokenizer_class": st.sampled_from(["PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer"]),
    },
)
folders = st.fixed_dictionaries(
    {},
    optional={
        CONFIG: settings,
        "special_tokens_map.json": st.fixed_dictionaries({}, optional={"eos_token": tokens}),
        "chat_template.jinja": texts,
        ADDITIONAL: texts,
        "additional_chat_templates/rag.jinja": texts,
    },
)


@pytest.mark.fuzz
@given(files=folders)
def test_folders_give_the_special_tokens_and_the_template_of_transformers(tmp_path, files):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(folder, files)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = llama.load_tokenizer(folder)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert (ours.bos_token_id, ours.eos_token_id, ours.get_vocab()) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.get_vocab(),
    )
    configured = files.get(CONFIG, {}).get("chat_template")
    if theirs.chat_template is None:
        assert ours.chat_template is None
    elif isinstance(theirs.chat_template, str) or "default" in theirs.chat_template:
        assert ours.get_chat_template() == theirs.get_chat_template()
    elif isinstance(configured, str) or any(one["name"] == "default" for one in configured or ()):
        # transformers drops the default of tokenizer_config.json where there is a folder of additional templates
        default = (
            configured if isinstance(configured, str) else {c["name"]: c["template"] for c in configured}["default"]
        )
        assert ours.chat_template == default
    elif len(theirs.chat_template) == 1 and not configured:
        assert [ours.chat_template] == list(theirs.chat_template.values())
    elif isinstance(ours.chat_template, dict):
        assert theirs.chat_template.items() <= ours.chat_template.items()


eos = st.integers(-1, 12) | st.lists(st.integers(0, 12), max_size=3)
eos_settings = st.fixed_dictionaries({}, optional={"eos_token_id": st.none() | eos})


@pytest.mark.fuzz
@given(config=eos_settings, generation=st.none() | eos_settings)
def test_the_stop_tokens_of_transformers_are_among_ours(tmp_path, config, generation):
    model = transformers.LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_attention_heads=2).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**model, "eos_token_id": None, **config}))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    theirs: set[int] = set()
    for found in (
        transformers.AutoConfig.from_pretrained(tmp_path).eos_token_id,
        None if generation is None else transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id,
    ):
        theirs |= set(found if isinstance(found, list) else [] if found is None else [found])
    assert set(llama.read_shape(tmp_path).stop_tokens) == {token for token in theirs if 0 <= token < 10}
