"""A server in a thread of the tests' process, so that they see its engine, and its clients."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import openai
import uvicorn
from PIL import Image

from mm.inference import Engine
from serving.server import Server, Settings, build_app

NAME = "tiny"
LOOPBACK = ("127.0.0.1", "localhost")


@dataclass
class Running:
    """A server that listens on a port of this machine."""

    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def wait_until_idle(self) -> None:
        """Until no row is taken and no place is."""
        deadline = time.monotonic() + 20
        while self.server.engine.load != (0, 0) or self.server.seats.taken:
            assert time.monotonic() < deadline, (self.server.engine.load, self.server.seats.taken)
            time.sleep(0.01)


@contextmanager
def running(model, processor, max_rows: int = 4, memory: int | None = None, **settings: Any) -> Iterator[Running]:
    """Start a server; it ends with the block."""
    hosts = settings.pop("hosts", LOOPBACK)
    server = Server(Engine(model, max_rows, memory=memory), processor, Settings(NAME, hosts, **settings))
    config = uvicorn.Config(build_app(server), port=0, http="h11", ws="none", lifespan="on", log_config=None)
    listener = uvicorn.Server(config)
    thread = threading.Thread(target=listener.run)
    thread.start()
    while not listener.started:
        assert thread.is_alive(), "the server has not started"
        time.sleep(0.01)
    try:
        yield Running(server, listener.servers[0].sockets[0].getsockname()[1])
    finally:
        listener.should_exit = True
        thread.join(30)


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(seed: int = 0, width: int = 40, height: int = 30) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def picture(seed: int = 0, **size: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(png(seed, **size))}}


def user(*parts: Any) -> dict[str, Any]:
    """A message of texts and parts."""
    content = [{"type": "text", "text": one} if isinstance(one, str) else one for one in parts]
    return {"role": "user", "content": content}
