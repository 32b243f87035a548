"""A Llama 3.2 Vision folder is served as it is."""

import pytest
from transformers import MllamaForConditionalGeneration

import mm
from tests.serving.running import NAME, picture, png, running, user
from tests.test_readme import write_mllama


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mllama") / "Llama-3.2-11B-Vision"
    write_mllama(folder, len(tokenizer))
    tokenizer.save_pretrained(folder)
    assert MllamaForConditionalGeneration.from_pretrained(folder) is not None
    return folder


def test_a_llama_vision_folder_answers_about_pictures(folder):
    model, processor = mm.load(folder)
    with running(model, processor) as server:
        given = server.openai().chat.completions.create(
            model=NAME, messages=[user(picture(1), "what?")], max_tokens=8, temperature=0
        )
    content = [{"type": "image", "image": png(1)}, {"type": "text", "text": "what?"}]
    assert given.choices[0].message.content == mm.generate(model, processor, [{"role": "user", "content": content}], 8)
    assert given.usage.prompt_tokens_details.image_tokens > 0
