"""`mm serve`: a model behind OpenAI's API."""

import ipaddress
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from app.commands.answer import DEFAULT_MODEL, MODEL_HELP, add_loading_options, load_model
from foundation.errors import UserError
from foundation.extras import import_extra
from foundation.options import new_parser, read_options
from mm.inference import Engine

KEYS_VARIABLE = "MM_API_KEYS"
MIN_KEY = 16  # characters
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
LIMIT_HELP = {
    "body_bytes": "of a request",
    "body_seconds": "in which a request must have arrived",
    "json_depth": "of nested arrays and objects",
    "media": "pictures, clips and sounds of a request",
    "pixels": "of a picture; the sampled frames of a clip have at most four times as many",
    "seconds": "of a clip or sound",
    "media_bytes": "of a file",
    "media_memory": "bytes that decoding a file may take",
    "media_seconds": "that decoding or fetching a file may take",
    "schema_bytes": "of a JSON schema",
    "answers": "n of a request",
    "answer_tokens": "n times the most tokens of an answer",
    "queue": "answers that wait for a row",
}
logger = logging.getLogger(__name__)


def serve(argv: Sequence[str]) -> int:
    """Serve a model until SIGTERM or Ctrl-C, after which the answers that have begun are given.

    Raises:
        UserError: an option out of range, another address than this machine's own without a key, a port in use.
    """
    parser = new_parser("mm serve", "Serve a model by OpenAI's API.")
    add_serve_options(parser)
    return run(read_options(parser, argv))


def add_serve_options(parser: ArgumentParser) -> None:
    """Add the options that `run` reads."""
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=MODEL_HELP)
    parser.add_argument("--name", help="of the model, as clients name it; by default the folder's")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need keys")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--keys-file", help=f"a key in each line; the variable {KEYS_VARIABLE} holds keys, too")
    parser.add_argument("--allowed-host", nargs="*", default=[], help="names by which clients may call this machine")
    parser.add_argument("--media-host", nargs="*", default=[], help="hosts from which media are fetched")
    parser.add_argument("--media-folder", help="folder whose files file:// addresses may name")
    parser.add_argument("--media-workers", type=int, default=1, help="processes that decode media")
    parser.add_argument("--share-caches", action="store_true", help="what one key has computed serves the others")
    parser.add_argument("--log-contents", action="store_true", help="log answers; by default numbers alone")
    parser.add_argument("--max-rows", type=int, default=8, help="answers that decode together")
    parser.add_argument("--memory", type=int, help="bytes for keys and values; by default they grow with the requests")
    parser.add_argument("--drain-seconds", type=int, default=30, help="for answers that have begun when it is to end")
    from serving.limits import Limits

    for field in fields(Limits):
        name, default = field.name.replace("_", "-"), field.default
        assert isinstance(default, int | float)
        parser.add_argument(
            f"--max-{name}", dest=f"limit_{field.name}", type=type(default), default=default,
            help=LIMIT_HELP[field.name],
        )  # fmt: skip
    add_loading_options(parser)


def run(options: Namespace) -> int:
    """Serve what the options of `add_serve_options` name. Raises: UserError: as `serve`."""
    uvicorn = import_extra("uvicorn", "serve", "the server")
    from serving.limits import Limits
    from serving.remote import Sources
    from serving.server import Server, Settings, build_app

    limits = Limits(**{field.name: options[f"limit_{field.name}"] for field in fields(Limits)})
    keys = read_keys(options.keys_file)
    check_binding(options.host, keys)
    folder = None if options.media_folder is None else Path(options.media_folder)
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one for --media-folder")
    if options.media_workers < 1:
        raise UserError(f"media-workers is {options.media_workers}; it must be at least 1")
    hosts = [host.lower() for host in options.media_host]
    settings = Settings(
        name=options.name or Path(options.model).resolve().name,
        hosts=(*LOOPBACK, _bracketed(options.host), *(name.lower() for name in options.allowed_host)),
        keys=keys,
        limits=limits,
        sources=Sources(hosts, folder, limits.media_bytes, limits.media_seconds),
        share_caches=options.share_caches,
        log_contents=options.log_contents,
        media_workers=options.media_workers,
    )
    listener = listen(options.host, options.port)
    with listener:
        model, processor = load_model(options)
        engine = Engine(model, options.max_rows, memory=options.memory)
        config = uvicorn.Config(
            build_app(Server(engine, processor, settings)),
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=options.drain_seconds,
            limit_concurrency=4 * (options.max_rows + limits.queue) + 16,
        )
        logger.info("%s: http://%s:%d", settings.name, _bracketed(options.host), listener.getsockname()[1])
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def read_keys(file: str | None) -> tuple[str, ...]:
    """The keys of a file and of the environment, each in a line or between spaces.

    Raises:
        UserError: a key that is short, or a file without any.
        OSError: the file cannot be read.
    """
    found = os.environ.get(KEYS_VARIABLE, "").split()
    if file is not None:
        path = Path(file)
        if path.stat().st_mode & 0o007:
            raise UserError(f"{file} can be read by everyone on this machine: chmod o= {file}")
        own = path.read_text(encoding="utf-8").split()
        if not own:
            raise UserError(f"{file} holds no key: write one in a line")
        found += own
    if any(len(key) < MIN_KEY for key in found):
        raise UserError(f"a key has fewer than {MIN_KEY} characters: `openssl rand -hex 24` makes a good one")
    return tuple(found)


def check_binding(host: str, keys: Sequence[str]) -> None:
    """Refuse to be reached from other machines without a key.

    Raises:
        UserError: no key, and an address that is not loopback.
    """
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback and not keys:
        raise UserError(
            f"on {host} other machines could use the model without a key: give --keys-file or {KEYS_VARIABLE}"
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises: UserError: the address cannot be used."""
    if not 0 <= port <= 65_535:  # the name resolution would take the remainder
        raise UserError(f"port is {port}; it must lie in 0..65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be used ({error}): give another --host or --port") from None


def _bracketed(host: str) -> str:
    """A host as addresses show it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host.lower()
