"""Messages and captions become tokens, targets and tiles; an example begins with its prompt; bad input is refused."""

import io
from dataclasses import replace

import pytest
from PIL import Image

import mm
from mm.chat_template import PLAIN_TEMPLATE
from mm.modalities import IMAGE
from mm.records import record_answer
from shards.format import Record

WITHOUT_GENERATION_PROMPT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>\n{% endfor %}"
COUNTS_MESSAGES = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}"
)


@pytest.fixture
def conversation(random_picture):
    """Two turns: the first question has two pictures, the second one."""

    def image(seed: int) -> dict:
        return {"type": "image", "image": random_picture(20 + 40 * seed, 28, seed)}

    def text(words: str) -> dict:
        return {"type": "text", "text": words}

    return [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [image(0), image(1), text("are they the same?")]},
        {"role": "assistant", "content": "no, they differ"},
        {"role": "user", "content": [text("and this one "), image(2), text(" here?")]},
        {"role": "assistant", "content": [{"type": "text", "text": "naïve 😀"}]},
    ]


def targets(processor: mm.Processor, sample: mm.Sample) -> list[str]:
    """The text of each run of targets, special tokens kept."""
    runs, previous = [], -100
    for label in sample.labels:
        if label != -100:
            if previous == -100:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [processor.tokenizer.decode(run) for run in runs]


def text_of(processor: mm.Processor, sample: mm.Sample) -> str:
    """The sample as text, "#" for images."""
    pieces, run = [], []
    for token in sample.tokens:
        if token == processor.image_token_id:
            pieces += [processor.tokenizer.decode(run), "#"]
            run = []
        else:
            run.append(token)
    return "".join([*pieces, processor.tokenizer.decode(run)])


def test_prompt_is_the_template_with_images_in_place(tiny_processor, conversation):
    sample = tiny_processor.prompt(conversation[:-1])
    assert text_of(tiny_processor, sample) == (
        "<|begin|><|start|>system\nbe brief<|end|>\n<|start|>user\n##are they the same?<|end|>\n"
        "<|start|>assistant\nno, they differ<|end|>\n<|start|>user\nand this one # here?<|end|>\n<|start|>assistant\n"
    )
    assert sample.labels is None
    assert [tiles.grid for tiles in sample.images] == [(1, 1), (1, 3), (1, 4)]


def test_targets_are_the_assistants_turns_with_their_stop_token(tiny_processor, conversation):
    sample = tiny_processor.example(conversation)
    assert targets(tiny_processor, sample) == ["no, they differ<|end|>", "naïve 😀<|end|>"]
    assert all(label in (token, -100) for token, label in zip(sample.tokens, sample.labels, strict=True))
    assert (
        text_of(tiny_processor, sample)
        == text_of(tiny_processor, tiny_processor.prompt(conversation[:-1])) + "naïve 😀<|end|>"
    )


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE, WITHOUT_GENERATION_PROMPT])
@pytest.mark.parametrize("last", [2, 4])
def test_prompt_is_the_beginning_of_its_example(tokenizer, tiny_config, conversation, template, last):
    """At inference the model gets the tokens that it was trained on, and the first new token was a target."""
    processor = mm.Processor(tokenizer, tiny_config, chat_template=template)
    prompt, example = processor.prompt(conversation[:last]), processor.example(conversation[: last + 1])
    length = len(prompt.tokens)
    assert example.tokens[:length] == prompt.tokens
    assert example.labels[length] == example.tokens[length]
    assert example.labels[length - 1] == -100
    assert len(prompt.images) == len(example.images)
    assert example.tokens.count(processor.image_token_id) == len(example.images)


def test_without_a_generation_prompt_targets_end_at_the_stop_token(tokenizer, tiny_config, conversation):
    processor = mm.Processor(tokenizer, tiny_config, chat_template=WITHOUT_GENERATION_PROMPT)
    for run, answer in zip(targets(processor, processor.example(conversation)), ("differ", "😀"), strict=True):
        assert run.endswith(f"{answer}<|end|>")
        assert "user" not in run


def test_tokenizer_without_template_has_the_plain_one(tokenizer, tiny_config, conversation):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    assert tokenizer.chat_template is None
    processor = mm.Processor(tokenizer, tiny_config)
    assert targets(processor, processor.example(conversation)) == ["no, they differ<|end|>", "naïve 😀<|end|>"]
    assert text_of(processor, processor.prompt(conversation[:2])) == "<|begin|>be brief\n##are they the same?\n"


def test_trailing_user_turn_is_no_target(tiny_processor, conversation):
    assert targets(tiny_processor, tiny_processor.example(conversation[:4])) == ["no, they differ<|end|>"]


@pytest.mark.parametrize("prompt", ["Describe the picture.", "Say what you see:", None])
def test_caption_follows_its_prompt(tokenizer, tiny_config, random_picture, prompt):
    processor = mm.Processor(tokenizer, tiny_config, caption_prompt=prompt)
    asked = processor.caption_prompt_for(random_picture())
    example = processor.caption_example(random_picture(), "a red circle")
    assert targets(processor, example) == ["a red circle<|end|>"]
    assert example.tokens[: len(asked.tokens)] == asked.tokens
    assert set(example.labels[: len(asked.tokens)]) == {-100}
    assert (prompt or "#") in text_of(processor, asked)
    assert len(asked.images) == len(example.images) == 1


def test_without_a_prompt_the_caption_follows_the_image(tokenizer, tiny_config, random_picture):
    processor = mm.Processor(tokenizer, tiny_config, caption_prompt=None)
    assert text_of(processor, processor.caption_prompt_for(random_picture())) == "#"


def png(picture) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="png")
    return out.getvalue()


def test_records_become_prompts_and_examples(tiny_processor, random_picture):
    first, second = png(random_picture(seed=1)), png(random_picture(60, 28, seed=2))
    parts = [
        {"type": "image", "image": "1.png"},
        {"type": "text", "text": "what?"},
        {"type": "image", "image": "0.png"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a square"}]
    record = Record("r", {"id": "r", "messages": messages}, {"0.png": first, "1.png": second})
    prompt, reference = tiny_processor.record_prompt(record)
    assert reference == record_answer(record) == "a square"
    assert [tiles.num_tiles for tiles in prompt.images] == [3, 1]
    assert targets(tiny_processor, tiny_processor.record_example(record)) == ["a square<|end|>"]
    captioned = Record("c", {"id": "c", "caption": "noise"}, {"png": first})
    prompt, reference = tiny_processor.record_prompt(captioned)
    assert reference == "noise"
    assert prompt.tokens == tiny_processor.caption_prompt_for(first).tokens
    assert targets(tiny_processor, tiny_processor.record_example(captioned)) == ["noise<|end|>"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": [{"role": "user", "content": "hello"}]}, "assistant"),
        ({"messages": []}, "assistant"),
        ({"caption": "no picture"}, "neither picture nor clip"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "7.png"}]},
                    {"role": "assistant", "content": "x"},
                ]
            },
            "'7.png'",
        ),
    ],
)
def test_bad_records_are_named(tiny_processor, values, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor.record_prompt(Record("r", {"id": "r", **values}, {}))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        (["hello"], "message 0 must be"),
        ([{"role": "user"}], "message 0 must be"),
        ([{"role": "user", "content": ""}], "message 0 .* is empty"),
        ([{"role": "user", "content": "  \n"}], "is empty"),
        ([{"role": "user", "content": []}], "is empty"),
        (
            [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}],
            r"message 1 \(assistant\) is empty",
        ),
        ([{"role": "user", "content": None}], "message 0"),
        ([{"role": "user", "content": 7}], "message 0"),
        ([{"role": "user", "content": [{"type": "smell", "smell": "x"}]}], "message 0 holds"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "no video_adapter"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "no speech_encoder"),
        ([{"role": "user", "content": ["hello"]}], "message 0 holds"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "message 0 holds"),
        ([{"role": "user", "content": f"see {IMAGE.mark}"}], "stands for media"),
        ([{"role": "user", "content": [{"type": "image", "image": "/nowhere/at/all.png"}]}], "/nowhere/at/all.png"),
        ([{"role": "user", "content": [{"type": "image", "image": b"abc"}]}], "picture"),
    ],
)
def test_bad_messages_are_named(tiny_processor, messages, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor.prompt(messages)


@pytest.mark.parametrize("prompt", ["Describe it.", None])
def test_bad_captions_are_named(tokenizer, tiny_config, random_picture, prompt):
    processor = mm.Processor(tokenizer, tiny_config, caption_prompt=prompt)
    with pytest.raises(ValueError, match="stands for media"):
        processor.caption_example(random_picture(), f"a {IMAGE.mark}")
    with pytest.raises(ValueError, match="empty"):
        processor.caption_example(random_picture(), "  ")


def test_a_conversation_without_an_answer_is_refused(tiny_processor, conversation):
    with pytest.raises(ValueError, match="no assistant turn"):
        tiny_processor.example(conversation[:2])


def test_unusable_templates_are_refused(tokenizer, tiny_config, conversation):
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        mm.Processor(tokenizer, tiny_config, chat_template=COUNTS_MESSAGES).example(conversation)
    with pytest.raises(ValueError, match="no system messages"):
        mm.Processor(tokenizer, tiny_config, chat_template=REFUSES_SYSTEM).prompt(conversation)


def test_images_need_an_image_encoder(tokenizer, bare_model, random_picture):
    processor = mm.Processor(tokenizer, bare_model.config)
    with pytest.raises(ValueError, match="no vision_encoder"):
        processor.prompt([{"role": "user", "content": [{"type": "image", "image": random_picture()}]}])
    assert processor.prompt([{"role": "user", "content": "hello"}]).images == []


def test_tiles_follow_the_config_and_the_limit(tokenizer, tiny_config, random_picture):
    wide = random_picture(112, 28)
    assert mm.Processor(tokenizer, tiny_config).caption_prompt_for(wide).images[0].grid == (1, 4)
    assert mm.Processor(tokenizer, tiny_config, max_tiles=2).caption_prompt_for(wide).images[0].grid == (1, 2)
    larger = replace(tiny_config, vision_encoder=replace(tiny_config.vision_encoder, tile_size=56, max_num_tiles=1))
    tiles = mm.Processor(tokenizer, larger).caption_prompt_for(wide).images[0]
    assert tiles.pixels.shape == (1, 3, 56, 56)


def test_decode_leaves_special_tokens_out(tiny_processor, tokenizer):
    tokens = tokenizer(" a red circle <|end|>", add_special_tokens=False).input_ids
    assert tiny_processor.decode(tokens) == "a red circle"


def test_images_in_an_answer_are_no_targets(tiny_processor, random_picture):
    parts = [{"type": "text", "text": "this"}, {"type": "image", "image": random_picture()}]
    messages = [{"role": "user", "content": "show one"}, {"role": "assistant", "content": parts}]
    sample = tiny_processor.example(messages)
    assert sample.tokens.count(tiny_processor.image_token_id) == len(sample.images) == 1
    assert tiny_processor.image_token_id not in sample.labels
    assert targets(tiny_processor, sample) == ["this", "<|end|>"]


def test_a_template_that_places_images_itself_gets_image_parts(tokenizer, tiny_config, conversation):
    """Like Llama 3.2 Vision's template, which writes a system turn only where it finds no image parts."""
    template = (
        "{% set seen = namespace(images=false) %}{% for m in messages %}{% if m.content is not string %}"
        "{% for part in m.content %}{% if part.type == 'image' %}{% set seen.images = true %}{% endif %}{% endfor %}"
        "{% endif %}{% endfor %}{% if not seen.images %}SYSTEM {% endif %}{% for m in messages %}"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}"
        "<|begin|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    )
    config = replace(tiny_config, image_token_id=tokenizer.convert_tokens_to_ids("<|begin|>"))
    processor = mm.Processor(tokenizer, config, chat_template=template)
    sample = processor.prompt(conversation[1:4])
    assert text_of(processor, sample) == (
        "##are they the same?<|end|>no, they differ<|end|>and this one # here?<|end|>"
    )
    assert len(sample.images) == 3
    assert text_of(processor, processor.prompt([{"role": "user", "content": "hi"}])) == "SYSTEM hi<|end|>"
    spelled = processor.prompt([{"role": "user", "content": "a <|begin|> of mine"}])
    assert text_of(processor, spelled) == "SYSTEM a <|begin|> of mine<|end|>"
    assert config.image_token_id not in spelled.tokens


def test_transparent_pictures_get_a_white_background(tiny_processor):
    clear = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    sample = tiny_processor.prompt([{"role": "user", "content": [{"type": "image", "image": clear}]}])
    assert sample.images[0].pixels.min() == 255


def test_a_template_that_places_images_works_without_an_image_token_in_the_tokenizer(
    tokenizer, tiny_config, random_picture
):
    template = (
        "{# 'image' parts #}{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}"
    )
    processor = mm.Processor(tokenizer, tiny_config, chat_template=template)
    content = [{"type": "image", "image": random_picture(28, 28)}, {"type": "text", "text": "a circle?"}]
    sample = processor.prompt([{"role": "user", "content": content}])
    assert text_of(processor, sample) == "#a circle?" and len(sample.images) == 1
