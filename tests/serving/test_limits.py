"""Clients that leave, limits of requests and of the queue, and the end of the server."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from serving.errors import ApiError
from serving.limits import Limits, parse_json
from tests.media import film, sound
from tests.serving.running import NAME, data_url, picture, png, running, user

LIMITS = Limits(
    body_bytes=200_000, body_seconds=1.0, json_depth=12, media=3, pixels=10_000, seconds=0.7, answers=4,
    answer_tokens=1000, queue=2, media_bytes=60_000, schema_bytes=500,
)  # fmt: skip


@pytest.fixture(scope="module")
def server(served_model, served_processor):
    with running(served_model, served_processor, max_rows=2, limits=LIMITS) as started:
        yield started


def body(**options) -> dict:
    return {"model": NAME, "messages": [user("a")], "max_tokens": 4, "temperature": 0, **options}


@pytest.fixture
def post(server):
    with server.http() as http:
        yield lambda **options: http.post("/v1/chat/completions", json=body(**options))


@pytest.fixture
def slow_steps(server, monkeypatch):
    """Steps that last 5 ms, and a list that has an element for each."""
    steps, step = [], server.server.engine.step
    monkeypatch.setattr(server.server.engine, "step", lambda: steps.append(1) or time.sleep(0.005) or step())
    return steps


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row_within_two_steps(server, monkeypatch, slow_steps, stream):
    noticed, freed = [], []
    cancel, end = server.server.loop.cancel, server.server.engine.cancel
    monkeypatch.setattr(server.server.loop, "cancel", lambda *given: noticed.append(len(slow_steps)) or cancel(*given))
    monkeypatch.setattr(server.server.engine, "cancel", lambda number: end(number) or freed.append(len(slow_steps)))
    text = json.dumps(body(max_tokens=900, stream=stream, stop="\0never", seed=1, temperature=1))
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(text)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{text}".encode())
        deadline = time.monotonic() + 20
        while server.server.engine.load[0] != 1 or len(slow_steps) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    server.wait_until_idle()
    assert noticed and freed and freed[0] - noticed[0] <= 2 and len(slow_steps) < 800


def test_a_client_that_leaves_while_it_waits_is_forgotten_at_once(server, slow_steps):
    holding = [threading.Thread(target=ask, args=(server, 60)) for _ in range(2)]
    for thread in holding:
        thread.start()
    wait_for(lambda: server.server.engine.load[0] == 2)
    text = json.dumps(body(max_tokens=500))
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(text)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{text}".encode())
        wait_for(lambda: server.server.engine.load[1] == 1)
    wait_for(lambda: server.server.engine.load[1] == 0)
    assert server.server.engine.load[0] == 2  # the others still decode
    for thread in holding:
        thread.join()
    server.wait_until_idle()


def ask(server, tokens: int) -> None:
    with server.http() as http:
        http.post("/v1/chat/completions", json=body(max_tokens=tokens, seed=1, temperature=1.5))


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_full_queue_answers_429_and_when_to_try_again(server, post, slow_steps):
    holding = [threading.Thread(target=ask, args=(server, 80)) for _ in range(4)]
    for thread in holding:
        thread.start()
    wait_for(lambda: server.server.seats.taken == 4)
    refused = post()
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "queue_full" and refused.json()["error"]["type"] == "rate_limit_error"
    for thread in holding:
        thread.join()
    server.wait_until_idle()
    assert post().status_code == 200
    assert post(n=4).status_code == 200


def test_a_body_is_measured_before_it_is_read(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 99999999\r\n\r\n".encode())
        assert b" 413 " in connection.recv(9000).split(b"\r\n")[0]
    with server.http() as http:
        chunks = (b" " * 50_000 for _ in range(8))  # without a length
        headers = {"content-type": "application/json"}
        assert http.post("/v1/chat/completions", content=chunks, headers=headers).status_code == 413


def test_a_body_that_does_not_arrive_is_given_up(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in connection.recv(9000).split(b"\r\n")[0]
    server.wait_until_idle()


OVER = {
    "json_depth": ({"metadata": json.loads("[" * 14 + "]" * 14)}, "nested more than 12 deep"),
    "media": ({"messages": [user(*[picture()] * 4)]}, "4 media in one request, over the limit of 3"),
    "pixels": ({"messages": [user(picture(width=120, height=100))]}, "over the limit of 10,000"),
    "media_bytes": ({"messages": [user(picture(width=160, height=140))]}, "more than 60,000 bytes"),
    "seconds of sound": (
        {"messages": [user({"type": "audio_url", "audio_url": {"url": data_url(sound(0.75), "audio/wav")}})]},
        "over the limit of 1 s",
    ),
    "seconds of a clip": (
        {"messages": [user({"type": "video_url", "video_url": {"url": data_url(film(1), "video/mp4")}})]},
        "over the limit",
    ),
    "answers": ({"n": 5}, "5 answers in one request, over the limit of 4"),
    "answer_tokens": ({"n": 4, "max_tokens": 300}, "4 answers of 300 tokens are over the limit of 1000"),
    "prompt": ({"messages": [user("a" * 3000)]}, "leaves no room for an answer in the context of 1024"),
    "schema_bytes": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["a" * 600]}}}},
        "over 500 bytes",
    ),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
}


@pytest.mark.parametrize("name", OVER)
def test_what_is_over_a_limit_gets_400_and_says_which(post, name):
    options, message = OVER[name]
    refused = post(**options)
    assert refused.status_code == 400 and message in refused.json()["error"]["message"], refused.text[:300]


def test_deep_and_endless_json_is_refused_in_linear_time():
    limits = Limits()
    texts = [
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b'"' + b'\\"' * 10**6,
        b'["\\\\", "]["]' * 10**5,
        b'{"a":"' + b"\\" * 10**6,
    ]
    for text in texts:
        began = time.monotonic()
        with pytest.raises(ApiError) as refused:
            parse_json(text, limits)
        assert refused.value.status == 400 and time.monotonic() - began < 2
    assert parse_json(b'{"a": "[[[[\\"{{{", "b": [[]]}', Limits(json_depth=3)) == {"a": '[[[["{{{', "b": [[]]}


@pytest.mark.parametrize("text", [b"[]", b"1", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff{}", b'{"a": 1}x', b""])
def test_bodies_that_are_no_json_objects(text):
    with pytest.raises(ApiError) as refused:
        parse_json(text, Limits())
    assert refused.value.status == 400


def test_limits_are_checked():
    with pytest.raises(ValueError, match="answers is 0; it must be above 0"):
        Limits(answers=0)


def test_sigterm_lets_answers_end_and_takes_no_more(everything_run, tmp_path):
    """The command itself, in a process of its own; a key in the environment does not reach the media process."""
    command = [sys.executable, "-m", "app.cli", "serve", str(everything_run), "--port", "0", "--name", NAME]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "MM_API_KEYS": "k" * 20})
    try:
        port = next(int(line.rsplit(":", 1)[1]) for line in process.stderr if "http://" in line)
        wait_for_port(port)
        import httpx

        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60)
        headers = {"authorization": f"Bearer {'k' * 20}"}
        assert http.post("/v1/chat/completions", json=body()).status_code == 401
        options = body(stream=True, n=8, max_tokens=120, temperature=1.5, seed=2, messages=[user("a", picture())])
        with http.stream("POST", "/v1/chat/completions", json=options, headers=headers) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            next(lines)
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            assert all(b"MM_API_KEYS" not in Path(f"/proc/{child}/environ").read_bytes() for child in children)
            assert children
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(30) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            http.get("/health")
    finally:
        process.kill()
        process.wait()


def wait_for_port(port: int) -> None:
    def is_there() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            return False
        return True

    wait_for(is_there)


def test_pictures_that_are_allowed_are_answered(post):
    assert post(messages=[user(picture(), "a")]).status_code == 200
    assert len(png()) < LIMITS.media_bytes
