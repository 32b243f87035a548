"""Chat templates of many kinds: the form of content that they take, texts that they leave out, which one is used."""

import logging
from dataclasses import replace

import pytest
from PIL import Image
from tokenizers import AddedToken
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import mm
from mm.batch import IGNORED
from tests.mm.vocabularies import CHATML, vocabulary

PICTURE = Image.new("RGB", (28, 28), "red")
# As SmolVLM: content is a list of parts, and a string comes out as nothing.
LOOPS_OVER_PARTS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'picture' %}"
    "{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for line in m['content'] %}{% if line['type'] == 'text' %}"
    "{{ line['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
# As LLaVA: the user's content is a list of parts, the assistant's a string.
PARTS_OF_USERS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content }}{{ eos_token }}"
    "{% else %}{{ m.role.upper() + ': ' }}{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }} {% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
# As Qwen 3: thoughts are taken out of earlier answers, and an empty thought is written before the last one.
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% set text = m.content %}"
    "{% if m.role == 'assistant' %}{% if '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\\n') %}"
    "{% endif %}{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
    "{{ text + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Phi 3: the end of the text is written after the last turn alone, and the start of a turn takes the line break.
ENDS_TEXT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.fixture
def build_processor(tiny_config):
    """build_processor(template, added tokens, tokenizer options, **options) -> a processor."""

    def build(template, added=(), tokenizer_options=None, kind="byte-level", **options) -> mm.Processor:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=vocabulary(kind),
            **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **(tokenizer_options or {})},
        )
        tokenizer.add_tokens(list(added))
        if isinstance(template, dict):
            tokenizer.chat_template = template
        elif template is not None:
            options["chat_template"] = template
        language_model = replace(tiny_config.language_model, vocab_size=len(tokenizer), stop_tokens=(2,))
        config = replace(tiny_config, language_model=language_model, image_token_id=len(tokenizer))
        return mm.Processor(tokenizer, config, **options)

    return build


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def text_of(processor: mm.Processor, tokens: list[int]) -> str:
    """The text of tokens, control tokens kept, "#" for images."""
    text, run = "", []
    for token in tokens:
        if token == processor.image_token_id:
            text, run = f"{text}{processor.tokenizer.decode(run)}#", []
        else:
            run.append(token)
    return text + processor.tokenizer.decode(run)


def target_of(processor: mm.Processor, sample: mm.Sample) -> str:
    return processor.tokenizer.decode([label for label in sample.labels if label != IGNORED])


# The form of content


@pytest.mark.parametrize(
    ("template", "rendered", "target"),
    [
        (LOOPS_OVER_PARTS, "<s>User: see # there<|im_end|>\nAssistant: yes<|im_end|>", " yes<|im_end|>"),
        (PARTS_OF_USERS, "<s>USER: see # there ASSISTANT: yes</s>", " yes</s>"),
    ],
    ids=["all roles", "users"],
)
def test_a_template_that_takes_parts_gets_parts(build_processor, template, rendered, target):
    """With plain strings it would write nothing in the texts' places."""
    processor = build_processor(template)
    parts = [{"type": "text", "text": "see "}, {"type": "image", "image": PICTURE}, {"type": "text", "text": " there"}]
    sample = processor.example([{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}])
    assert text_of(processor, sample.tokens) == rendered
    assert target_of(processor, sample) == target
    assert len(sample.images) == 1
    plain = processor.example(turns("see there", "yes"))
    assert text_of(processor, plain.tokens) == rendered.replace("# ", "")


def test_a_template_that_takes_both_forms_gets_strings(build_processor):
    both = (
        "{% for m in messages %}{% if m.content is string %}S {{ m.content }}{% else %}{% for part in m.content %}"
        "P {{ part.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    )
    processor = build_processor(both)
    assert text_of(processor, processor.prompt(turns("hi")).tokens) == "S hi<|im_end|>"


def test_a_conversation_of_which_a_text_is_left_out_is_refused(build_processor, caplog):
    no_system = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    messages = [{"role": "system", "content": "be brief"}, *turns("hi", "yes")]
    with pytest.raises(ValueError, match="leaves out the text 'be brief': give another chat_template"):
        build_processor(no_system).example(messages)
    processor = build_processor(no_system, allow_omitted_text=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert target_of(processor, processor.example(messages)) == "yes<|im_end|>"
    assert [record.getMessage() for record in caplog.records if "be brief" in record.getMessage()] == [
        "the chat template leaves out texts of messages, as allowed; the first is 'be brief'"
    ]


def test_a_text_must_stand_as_often_as_it_was_said(build_processor):
    first_only = "{% for m in messages %}{% if loop.index0 < 2 %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out the text 'hi'"):
        build_processor(first_only).example(turns("hi", "yes", "hi", "yes"))


def test_white_space_around_a_text_may_be_left_out(build_processor):
    trims = "{% for m in messages %}{{ m.content | trim }}<|im_end|>{% endfor %}"
    processor = build_processor(trims)
    assert text_of(processor, processor.prompt(turns(" hi\n")).tokens) == "hi<|im_end|>"


# Templates that treat turns differently


def test_earlier_thoughts_are_left_out_where_that_is_allowed(build_processor):
    added = [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
    thoughtful = "<think>\nred?\n</think>\n\na circle"
    with pytest.raises(ValueError, match="message 1 spells a control token"):
        build_processor(THINKS, added, allow_omitted_text=True).example(turns("hi", thoughtful, "sure?", "yes"))
    processor = build_processor(THINKS, added, allow_control_tokens=True, allow_omitted_text=True)
    sample = processor.example(turns("hi", thoughtful, "sure?", "yes"))
    assert text_of(processor, sample.tokens) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na circle<|im_end|>\n"
        "<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nyes<|im_end|>"
    )
    assert target_of(processor, sample) == "a circle<|im_end|><think>\n\n</think>\n\nyes<|im_end|>"
    # An added token that is not special, and that the template writes, is text in a message as well.
    thinks = processor.tokenizer.convert_tokens_to_ids("<think>")
    assert thinks not in build_processor(THINKS, added).prompt(turns("what is <think>?")).tokens


def test_targets_end_at_the_turns_stop_token_and_not_at_the_texts_end(build_processor):
    added = [AddedToken(f"<|{name}|>", special=True, rstrip=True) for name in ("user", "assistant", "end")]
    processor = build_processor(ENDS_TEXT, added)
    sample = processor.example(turns("hi", "yes", "sure?", "no"))
    assert target_of(processor, sample) == "yes<|end|>no<|end|>"
    prompt = processor.prompt(turns("hi", "yes", "sure?"))
    assert sample.tokens[: len(prompt.tokens)] == prompt.tokens


def test_a_conversation_may_begin_with_the_assistant(build_processor):
    processor = build_processor(CHATML)
    greeting = [{"role": "assistant", "content": "hello"}, *turns("hi", "yes")]
    assert target_of(processor, processor.example(greeting)) == "hello<|im_end|>yes<|im_end|>"


# Control tokens with rules of their own


@pytest.mark.parametrize(
    "flags",
    [{"lstrip": True, "rstrip": True}, {"single_word": True}, {"normalized": True}],
    ids=lambda flags: str(flags),
)
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece legacy", "unigram"])
def test_control_tokens_keep_their_rules(build_processor, kind, flags):
    """A tokenizer may take white space into a control token, or not recognise one inside a word."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}[E] \n{{ m.content }}[E]x {% endfor %}"
    processor = build_processor(template, [AddedToken("[E]", special=True, **flags)], kind=kind)
    for texts in (("hi",), ("a ", "red circle\n"), (" x ", "é")):
        whole = processor.tokenizer.apply_chat_template(turns(*texts), chat_template=template, return_dict=True)
        tokens = processor.prompt(turns(*texts)).tokens
        assert tokens == whole["input_ids"][: len(tokens)]
        assert len(whole["input_ids"]) - len(tokens) <= 1  # a space at the end may be the answer's


# Which template


def test_several_named_templates(build_processor):
    named = {"default": CHATML, "tool_use": "{% for m in messages %}TOOL {{ m.content }}{% endfor %}"}
    processor = build_processor(named)
    assert processor.chat_template == CHATML
    tools = build_processor(named, chat_template="tool_use")
    assert text_of(tools, tools.prompt(turns("hi")).tokens) == "TOOL hi"
    assert build_processor({"rag": CHATML}).chat_template == CHATML
    with pytest.raises(ValueError, match="chat templates a, b, and none is called default; give chat_template one"):
        build_processor({"a": CHATML, "b": CHATML})


def test_templates_that_fail_are_named(build_processor):
    fails = "{% for m in messages %}{{ m.content }}{{ 1 / (messages | length - 1) }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template fails on these messages: ZeroDivisionError"):
        build_processor(fails).prompt(turns("hi"))


def test_a_slow_tokenizer_is_refused(tiny_config):
    class Slow(PreTrainedTokenizer):
        vocab_size = 0

        def get_vocab(self):
            return {}

        def _convert_id_to_token(self, index):
            return None

    with pytest.raises(ValueError, match=r"the tokenizer is a Slow, .* tokenizer\.json"):
        mm.Processor(Slow(chat_template=CHATML), tiny_config)


# Texts that are no text


@pytest.mark.parametrize("text", ["a\ud800b", "\udce9"])
def test_half_a_surrogate_pair_is_refused(build_processor, text):
    processor = build_processor(CHATML)
    for refuse in (
        lambda: processor.prompt(turns(text)),
        lambda: processor.example(turns("hi", text)),
        lambda: processor.caption_example(PICTURE, text),
        lambda: build_processor(CHATML, caption_prompt=None).caption_example(PICTURE, text),
    ):
        with pytest.raises(ValueError, match=r"holds half of a surrogate pair, '\\u[0-9a-f]{4}', at character"):
            refuse()
