"""Stop tokens from configuration, tokenizer and chat template, and tokenizers larger than the embedding table."""

import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

import mm
from layers.sources import materialise
from mm.assembly import from_language_model
from mm.convert import llama
from mm.tokenizer_fit import use_stop_tokens


def turns(end: str) -> str:
    return "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}" + end + "{% endfor %}"


# What stands after an answer: at the end, and between turns.
TEMPLATES = {
    "chatml": (turns("<|im_end|>\n"), "<|im_end|>"),
    "eos": ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "<|end|>"),
    "text, then a token": (turns(" ###\n<|im_end|>"), "<|im_end|>"),
    "the next turn's start": (turns("\n"), "<|start|>"),
    "only before the next turn": (
        "{% for m in messages %}{{ m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}",
        "<|im_end|>",
    ),
    "content parts": (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>{% endfor %}",
        "<|im_end|>",
    ),
    "none": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    "one that refuses": ("{{ raise_exception('no') }}", None),
}
CONVERSATION = [
    {"role": "user", "content": "is there a circle?"},
    {"role": "assistant", "content": "yes."},
    {"role": "user", "content": "what shape?"},
    {"role": "assistant", "content": "a blue square"},
]


@pytest.fixture
def with_end(tokenizer, tiny_config):
    """A copy of the tokenizer with one more control token, and a configuration that has a row for it."""
    copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    copy.add_tokens([AddedToken("<|im_end|>", special=True)])
    lm = replace(tiny_config.language_model, vocab_size=len(copy), stop_tokens=(7,))
    return copy, replace(tiny_config, language_model=lm, image_token_id=len(copy))


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_ends_at_the_templates_token_the_eos_and_the_configured_ones(with_end, name):
    tokenizer, config = with_end
    template, end = TEMPLATES[name]
    processor = mm.Processor(tokenizer, config, chat_template=template)
    ends = [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    assert processor.stop_tokens == tuple(dict.fromkeys([7, tokenizer.eos_token_id, *ends]))
    assert processor.stop_reasons[7] == "the language model's configuration"
    assert processor.stop_reasons[tokenizer.eos_token_id].startswith("the tokenizer's eos_token")
    assert all(processor.stop_reasons[token].endswith("ends an answer with it") for token in ends)


@pytest.mark.parametrize("name", ["chatml", "eos", "text, then a token", "content parts"])
def test_training_targets_end_with_a_stop_token_of_generation(build_model, with_end, name):
    tokenizer, config = with_end
    model, processor = build_model(config), mm.Processor(tokenizer, config, chat_template=TEMPLATES[name][0])
    use_stop_tokens(model, processor)
    labels = processor.example(CONVERSATION).labels
    ends = [here for here, after in zip(labels, [*labels[1:], -100], strict=True) if here >= 0 > after]
    assert len(ends) == 2 and set(ends) <= set(model.config.language_model.stop_tokens)


pieces = st.sampled_from(["", " ", "\n", "###", "<|end|>", "<|im_end|>", "<|start|>", "<|begin|>", "{{ eos_token }}"])


@pytest.mark.fuzz
@given(start=st.lists(pieces, max_size=2), end=st.lists(pieces, max_size=3), between=pieces)
def test_answers_end_as_transformers_tokenises_them(with_end, start, end, between):
    """The first control token after the answer in what transformers makes of the template."""
    tokenizer, config = with_end
    rest = "".join(end) + "{% if not loop.last %}" + between + "{% endif %}"
    template = "{% for m in messages %}" + "".join(start) + "{{ m.content }}" + rest + "{% endfor %}"
    processor = mm.Processor(tokenizer, config, chat_template=template)
    ends = [token for token, reason in processor.stop_reasons.items() if "ends an answer" in reason]
    for messages in (CONVERSATION[:2], CONVERSATION):
        ids = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
        answered = next(n for n in range(len(ids) + 1) if "yes." in tokenizer.decode(ids[:n]))
        after = [token for token in ids[answered:] if token in tokenizer.added_tokens_decoder]
        if after:
            assert ends == after[:1]
            return
    assert ends == []


def test_a_base_models_folder_with_an_instruct_template_stops_where_turns_end(
    tmp_path, language_model_folder, run_folder, tokenizer, constant_logits
):
    """The configurations name another eos than the template: answers would run on into invented turns."""
    base = tmp_path / "base"
    shutil.copytree(language_model_folder, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": 9}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11]}))
    assert llama.load(base).config.stop_tokens == (9, 11)
    model, processor = mm.load(run_folder, language_model=base)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in model.config.language_model.stop_tokens == processor.stop_tokens
    run = tmp_path / "run"
    old = mm.load(run_folder)[0]
    old.config = replace(old.config, language_model=replace(old.config.language_model, stop_tokens=(9,)))
    mm.run_folder.save(run, old, processor, language_model=base)
    model, processor = mm.load(run)  # a run that was written with the configured token alone
    assert model.config.language_model.stop_tokens == processor.stop_tokens == (9, end)
    constant_logits([float(token == end) for token in range(len(tokenizer))])
    assert mm.generate(model, processor, CONVERSATION[:1], 5) == ""


def test_the_report_says_which_tokens_stop_and_why(
    tmp_path, build_model, tiny_config, language_model_folder, tokenizer
):
    base = tmp_path / "base"
    shutil.copytree(language_model_folder, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, tokenizer.eos_token_id]}))
    language_model = llama.load(base)
    model = materialise(from_language_model(language_model))
    processor = mm.Processor(llama.load_tokenizer(base), model.config)
    use_stop_tokens(model, processor)
    end = tokenizer.eos_token_id
    notes = [note for note in model.language_model.report.notes if note.startswith("stop token")]
    assert notes == [
        "stop token 9: eos_token_id of generation_config.json",
        f"stop token {end}: eos_token_id of generation_config.json and config.json; the tokenizer's eos_token; "
        "the chat template ends an answer with it",
    ]


def test_a_template_without_an_end_is_warned_of(with_end, caplog):
    tokenizer, config = with_end
    mm.Processor(tokenizer, config, chat_template=TEMPLATES["one that refuses"][0])
    mm.Processor(tokenizer, config, chat_template=TEMPLATES["chatml"][0])
    assert not caplog.text
    mm.Processor(tokenizer, config, chat_template=TEMPLATES["none"][0])
    assert "ends an answer with no control token" in caplog.text


def test_a_tokenizer_larger_than_the_table_is_refused(with_end):
    tokenizer, config = with_end
    size = len(tokenizer)
    tokenizer.add_tokens(["[PAD]", "<extra>"])
    with pytest.raises(
        ValueError, match=rf"ids up to {size + 1}, .* has {size} rows, .*\[PAD\] \({size}\), <extra> \("
    ):
        mm.Processor(tokenizer, config)
    larger = replace(
        config, language_model=replace(config.language_model, vocab_size=size + 2), image_token_id=size + 2
    )
    mm.Processor(tokenizer, larger)
    rounded = replace(config, language_model=replace(config.language_model, vocab_size=size + 64), image_token_id=None)
    assert mm.Processor(tokenizer, rounded).image_token_id == size + 64


def test_the_image_token_of_llama_32_vision_has_a_row_of_its_own(with_end):
    tokenizer, config = with_end
    size = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<|image|>", special=True)])
    assert mm.Processor(tokenizer, config).image_token_id == size == tokenizer.convert_tokens_to_ids("<|image|>")
    tokenizer.add_tokens(["[PAD]"])
    with pytest.raises(ValueError, match=rf"without one for \[PAD\] \({size + 1}\)"):
        mm.Processor(tokenizer, config)
