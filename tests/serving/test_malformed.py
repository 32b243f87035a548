"""About two hundred malformed requests: all get 4xx, none 5xx, and the server still answers."""

import base64
import copy
import json

import numpy as np
import pytest

from tests.media import film, sound
from tests.serving.running import NAME, data_url, picture, png, running, user

CHAT = "/v1/chat/completions"
GOOD = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
WRONG = [None, True, -1, 0, 1.5, 10**30, "x", "", [], {}, [None], {"a": 1}]
FIELDS = {  # with the values of WRONG that are right there
    "messages": [],
    "model": [],
    "n": [None],
    "seed": [None, -1, 0],
    "temperature": [None, 0, 1.5],
    "top_p": [None],
    "stop": [None, "x", []],
    "max_tokens": [None],
    "stream": [None],
    "logprobs": [None],
    "top_logprobs": [None, 0],
    "response_format": [None],
    "stream_options": [None],
}


def fields():
    for name, right in FIELDS.items():
        for value in WRONG:
            allowed = any(value == one and type(value) is type(one) for one in right)
            if name in ("stream", "logprobs") and value is True:
                allowed = True
            if not allowed:
                yield {**GOOD, name: value}


def contents():
    """Messages of the wrong form, and media that are none."""
    yield from ({}, {"role": "user"}, {"role": "x", "content": "a"}, {"role": "tool", "content": "a"}, "a", None)
    for content in (
        None,
        1,
        [],
        [1],
        ["a"],
        [{}],
        [{"type": "x"}],
        [{"type": "text"}],
        [{"type": "text", "text": 1}],
        "",
    ):
        yield {"role": "user", "content": content}
    yield {"role": "user", "content": "\ud800"}
    yield {"role": "user", "content": "<|mm-image|>"}
    yield {"role": "user", "content": "a" * 5000}
    rng = np.random.default_rng(0)
    for kind, mime, file in (
        ("image", "image/png", png(1)),
        ("audio", "audio/wav", sound(0.3)),
        ("video", "video/mp4", film(1)),
    ):
        for url in ("", "x", "data:", "data:;base64,", "data:image/png,abc", "data:image/png;base64,@@", "http://a/b"):
            yield user({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
        for size in (1, 20, len(file) // 3):
            yield user({"type": f"{kind}_url", f"{kind}_url": {"url": data_url(file[:size], mime)}})
        for _ in range(4):
            noise = file[:16] + rng.bytes(300)
            yield user({"type": f"{kind}_url", f"{kind}_url": {"url": data_url(noise, mime)}})
        yield user({"type": f"{kind}_url", f"{kind}_url": "x"})
        yield user({"type": f"{kind}_url"})
    yield user({"type": "input_audio", "input_audio": {"data": "a", "format": "wav"}})
    yield user({"type": "input_audio", "input_audio": {"data": base64.b64encode(b"x" * 99).decode(), "format": "wav"}})
    yield user({"type": "input_audio", "input_audio": {"data": 5}})


def bodies():
    """Bytes that are no requests."""
    good = json.dumps(GOOD).encode()
    yield from (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\x00",
        b"\xff\xfe",
        good[:-1],
        good + b"x",
        good.replace(b"2", b"NaN"),
        b"[" * 999,
    )
    yield from (good[:size] for size in range(5, len(good), 9))


@pytest.fixture(scope="module")
def server(served_model, served_processor):
    with running(served_model, served_processor) as started:
        yield started


def test_malformed_requests_get_4xx_and_the_server_still_answers(server):
    requests = [(CHAT, json.dumps(body).encode()) for body in fields()]
    requests += [(CHAT, json.dumps({**copy.deepcopy(GOOD), "messages": [one]}).encode()) for one in contents()]
    requests += [(CHAT, body) for body in bodies()]
    requests += [
        ("/v1/completions", json.dumps({**GOOD, "prompt": prompt}).encode()) for prompt in (None, 1, [], [1], {})
    ]
    requests += [("/v1/nothing", b"{}"), ("/health", b"{}"), ("/v1/models", b"{}"), ("/v1/audio/transcriptions", b"{}")]
    assert len(requests) >= 200
    headers, wrong = {"content-type": "application/json"}, []
    with server.http(headers=headers) as http:
        for path, body in requests:
            answer = http.post(path, content=body)
            error = answer.json().get("error", {})
            if not 400 <= answer.status_code < 500 or not error.get("message") or error.get("type") == "server_error":
                wrong.append((answer.status_code, body[:200], answer.text[:200]))
        form = {"content-type": "multipart/form-data; boundary=x"}
        for body in (
            b"",
            b"--x",
            b"--x\r\n\r\n--x--",
            b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\na\r\n--x--",
        ):
            assert 400 <= http.post("/v1/audio/transcriptions", content=body, headers=form).status_code < 500
        assert not wrong, wrong[:5]
        assert http.post(CHAT, json={**GOOD, "messages": [user(picture(1), "a")]}).status_code == 200
    server.wait_until_idle()
