"""OpenAI's client against a server: answers equal those of the library, in every form that the client knows."""

import base64
import io
import json
import math
import re
import threading

import httpx
import openai
import pytest
from PIL import Image

import mm
from serving import api
from serving.errors import ApiError
from serving.loop import Answering
from tests.media import film, sound
from tests.serving.running import NAME, data_url, picture, png, running, user


@pytest.fixture(scope="module")
def server(served_model, served_processor):
    with running(served_model, served_processor) as started:
        yield started


@pytest.fixture(scope="module")
def client(server):
    return server.openai()


def chat(client, *parts, **options):
    options = {"max_tokens": 8, "temperature": 0, **options}
    return client.chat.completions.create(model=NAME, messages=[user(*parts)], **options)


def messages(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(value):
    return {"type": "text", "text": value}


def image(data):
    return {"type": "image", "image": data}


def test_answers_are_those_of_the_library(client, served_model, served_processor):
    """Text; pictures anywhere in a conversation; a sound; a clip."""
    given = chat(client, "is there a circle?")
    expected = mm.generate(served_model, served_processor, messages(text("is there a circle?")), 8)
    assert given.choices[0].message.content == expected
    assert given.choices[0].finish_reason == "length" and given.object == "chat.completion" and given.model == NAME

    first, second = png(1), png(2, 70, 20)
    turns = [
        {"role": "system", "content": "describe the picture"},
        user(picture(1), "what shape?"),
        {"role": "assistant", "content": "a red circle"},
        user("and", picture(2, width=70, height=20), "?"),
    ]
    given = client.chat.completions.create(model=NAME, messages=turns, max_tokens=8, temperature=0)
    turns[1] = {"role": "user", "content": [image(first), text("what shape?")]}
    turns[3] = {"role": "user", "content": [text("and"), image(second), text("?")]}
    assert given.choices[0].message.content == mm.generate(served_model, served_processor, turns, 8)

    waveform, clip = sound(0.5), film(1)
    parts = [
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(waveform).decode(), "format": "wav"}},
        {"type": "video_url", "video_url": {"url": data_url(clip, "video/mp4")}},
        {"type": "audio_url", "audio_url": {"url": data_url(waveform, "audio/wav")}},
    ]
    given = chat(client, *parts, "what?")
    library = [{"type": "audio", "audio": waveform}, {"type": "video", "video": clip}]
    library += [{"type": "audio", "audio": waveform}, text("what?")]
    assert given.choices[0].message.content == mm.generate(served_model, served_processor, messages(*library), 8)


def test_usage_counts_media(client, served_processor):
    parts = [picture(3), {"type": "audio_url", "audio_url": {"url": data_url(sound(0.5), "audio/wav")}}]
    usage = chat(client, *parts, "what?").usage
    sample = served_processor.prompt(messages(image(png(3)), {"type": "audio", "audio": sound(0.5)}, text("what?")))
    assert usage.prompt_tokens == len(sample.tokens) and usage.completion_tokens == 8
    assert usage.total_tokens == usage.prompt_tokens + 8
    assert usage.prompt_tokens_details.audio_tokens == sample.tokens.count(served_processor.config.audio_token_id)
    tiles = sum(tiles.num_tiles for tiles in sample.images)
    assert usage.prompt_tokens_details.image_tokens == tiles * served_processor.config.vision_encoder.tokens_per_tile


def test_streams_give_the_same_text_in_pieces(client):
    whole = chat(client, picture(4), "what?", max_tokens=30)
    chunks = list(chat(client, picture(4), "what?", max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == whole.choices[0].message.content and sum(map(bool, parts)) > 5
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "length"


def test_several_answers_follow_from_the_seed(client):
    given = [choice.message.content for choice in chat(client, "a", n=4, temperature=1.2, seed=7).choices]
    assert len(set(given)) == 4
    assert [choice.message.content for choice in chat(client, "a", n=4, temperature=1.2, seed=7).choices] == given
    assert chat(client, "a", n=2, temperature=1.2, seed=-7).choices[0].message.content != given[0]
    assert {choice.index for choice in chat(client, "a", n=2).choices} == {0, 1}
    streamed = ["", "", "", ""]
    for chunk in chat(client, "a", n=4, temperature=1.2, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == given


def test_stop_strings_and_both_names_of_the_limit(client):
    whole = chat(client, "a green", max_tokens=40).choices[0].message.content
    stop = whole[9:11]
    given = chat(client, "a green", max_tokens=40, stop=[stop, "\0never"])
    assert given.choices[0].message.content == whole[: whole.index(stop)] and given.choices[0].finish_reason == "stop"
    options = {"model": NAME, "temperature": 0, "messages": [user("a green")]}
    limited = client.chat.completions.create(**options, max_completion_tokens=3)
    assert limited.usage.completion_tokens == 3


def test_logprobs(client, server):
    content = chat(client, "a", logprobs=True, top_logprobs=20).choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert len(token.top_logprobs) == 20
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)  # greedy
        values = [one.logprob for one in token.top_logprobs]
        assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) < 1
    data = b"".join(bytes(token.bytes) for token in content)
    assert data.decode("utf-8", "replace").strip() == chat(client, "a").choices[0].message.content
    streamed = [
        token
        for chunk in chat(client, "a", logprobs=True, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in content])
    assert chat(client, "a").choices[0].logprobs is None


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "inner": {"$ref": "#/$defs/inner"}},
    "required": ["colour", "inner"],
    "additionalProperties": False,
    "$defs": {"inner": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
}


def test_answers_keep_to_a_schema(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "shape", "schema": SCHEMA, "strict": True}}
    given = chat(client, picture(1), n=4, temperature=1.5, seed=3, max_tokens=200, response_format=wanted)
    values = [json.loads(choice.message.content) for choice in given.choices]
    assert {choice.finish_reason for choice in given.choices} == {"stop"}
    for value in values:
        assert value["colour"] in ("red", "blue") and set(value) == {"colour", "inner"}
        assert all(isinstance(one, bool) for one in value["inner"])
    assert len({json.dumps(value) for value in values}) > 1
    begun = chat(client, "a", max_tokens=20, response_format={"type": "json_object"}).choices[0].message.content
    assert begun.startswith("{")
    free = chat(client, "a", response_format={"type": "text"}).choices[0].message.content
    assert free == chat(client, "a").choices[0].message.content


def test_completions_continue_texts(client, served_model, served_processor):
    prompts = ["is there a", "what shape"]
    given = client.completions.create(model=NAME, prompt=prompts, max_tokens=6, temperature=0, logprobs=2, n=1)
    for choice, prompt in zip(given.choices, prompts, strict=True):
        sample = served_processor.text_prompt(prompt)
        (tokens,) = mm.generate_tokens(served_model, [sample], 6, served_processor.stop_tokens)
        assert choice.text == served_processor.decode(tokens, strip=False)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(tokens)
        assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs)
    chunks = client.completions.create(model=NAME, prompt=prompts[0], max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == given.choices[0].text


def test_transcriptions(client, served_model, served_processor):
    given = client.audio.transcriptions.create(model=NAME, file=("a.wav", sound(0.5)), language="en")
    content = [text("Repeat after me in English:"), {"type": "audio", "audio": sound(0.5)}]
    sample = served_processor.prompt(messages(*content))
    (tokens,) = mm.transcription.transcribe_tokens(served_model, [sample], 256)
    assert given.text == served_processor.decode(tokens)
    plain = client.audio.transcriptions.create(model=NAME, file=("a.wav", sound(0.5)), response_format="text")
    assert plain.strip() == given.text.strip()
    with pytest.raises(openai.BadRequestError, match="language is 'xx'"):
        client.audio.transcriptions.create(model=NAME, file=("a.wav", sound(0.5)), language="xx")


def test_models(client):
    (card,) = client.models.list().data
    assert card.id == NAME and client.models.retrieve(NAME).id == NAME
    assert card.model_extra["modalities"] == ["text", "image", "video", "audio"]
    with pytest.raises(openai.NotFoundError, match="the model is 'tiny'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[user("a")])


LACKING = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "logit_bias": {"5": 1},
    "presence_penalty": 0.5,
    "modalities": ["audio"],
    "reasoning_effort": "low",
}


@pytest.mark.parametrize("name", LACKING)
def test_what_openai_has_and_the_server_lacks_is_refused_by_name(client, name):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, "a", **{name: LACKING[name]})
    assert refused.value.param == name and refused.value.code == "unsupported_parameter"


def test_values_that_change_nothing_are_taken_and_unknown_names_come_back_in_a_header(client):
    extra = {"presence_penalty": 0, "tools": [], "no_such": 1, "odd\nname": 2}
    raw = client.chat.completions.with_raw_response.create(
        model=NAME, messages=[user("a")], max_tokens=2, extra_body=extra
    )
    assert raw.headers[api.IGNORED_HEADER] == "no_such, odd?name"
    raw = client.chat.completions.with_raw_response.create(model=NAME, messages=[user("a")], max_tokens=2)
    assert api.IGNORED_HEADER not in raw.headers


def test_errors_have_openais_form_also_in_mid_stream(client, server, monkeypatch):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, "a", temperature=3)
    assert refused.value.param == "temperature" and refused.value.type == "invalid_request_error"
    next_event, count = Answering.next, []

    async def failing(self):
        count.append(1)
        if len(count) > 4:
            raise ApiError(500, "the engine has failed while it answered", code="engine_failed")
        return await next_event(self)

    monkeypatch.setattr(Answering, "next", failing)
    got = []
    with pytest.raises(openai.APIError, match="the engine has failed while it answered"):
        for chunk in chat(client, "a", max_tokens=50, stream=True):
            got.append(chunk)
    assert len(got) > 1
    monkeypatch.undo()
    server.wait_until_idle()


def test_request_ids(server):
    with server.http() as http:
        assert http.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        made = [http.get("/v1/models", headers={"x-request-id": "<odd>"}).headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch(r"req-[0-9a-f]{32}", one) for one in made) and made[0] != made[1]


def test_health_probes_the_engines_loop(server, monkeypatch):
    with server.http() as http:
        assert http.get("/health").status_code == 200
        monkeypatch.setattr("serving.loop.HEALTH_SECONDS", 0.2)
        release = threading.Event()
        server.server.loop._commands.put(release.wait)  # a step that does not end
        stuck = http.get("/health")
        release.set()
        assert stuck.status_code == 503 and stuck.json()["error"]["code"] == "engine_stuck"
        assert http.get("/health").status_code == 200


def test_metrics_have_vllms_names_and_count(server, client):
    def value(name: str) -> float:
        with server.http() as http:
            page = http.get("/metrics").text
        found = re.search(rf'^vllm:{name}{{model_name="{NAME}".*?}} (\S+)$', page, re.MULTILINE)
        assert found, name
        return float(found[1])

    before = value("generation_tokens_total"), value("mm_cache_hits_total"), value("prompt_tokens_total")
    for _ in range(2):
        chat(client, picture(9), "again")
    assert value("generation_tokens_total") == before[0] + 16 and value("mm_cache_hits_total") > before[1]
    assert value("prompt_tokens_total") > before[2]
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert value(name) == 0
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert value(f"{name}_count") > 0


def test_low_detail_takes_one_tile(client):
    out = io.BytesIO()
    Image.new("RGB", (112, 112), "red").save(out, format="PNG")
    high, low = (
        chat(client, {"type": "image_url", "image_url": {"url": data_url(out.getvalue()), "detail": detail}}, "?")
        for detail in ("high", "low")
    )
    assert high.usage.prompt_tokens_details.image_tokens == 4 * low.usage.prompt_tokens_details.image_tokens


def test_blind_answers_see_grey(client, served_model, served_processor):
    blind = chat(client, picture(5), "what?", extra_body={"blind": True}).choices[0].message.content
    grey = Image.new("RGB", (40, 30), (128, 128, 128))
    assert blind == mm.generate(served_model, served_processor, messages(image(grey), text("what?")), 8)


def test_the_same_text_is_a_text_part(server):
    body = {"model": NAME, "max_tokens": 4, "temperature": 0}
    with server.http() as http:
        answers = [
            http.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": content}]})
            for content in ("hello", [{"type": "text", "text": "hello"}])
        ]
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert isinstance(answers[0], httpx.Response)
