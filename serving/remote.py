"""Media named by address: files of other hosts by an allow-list, and files of this machine under one folder.

A host's name is resolved once, the address is checked, and the connection goes to that very address, so that a second
answer of the name server cannot lead elsewhere. Redirects are followed within the list alone, and checked again.
"""

import http.client
import ipaddress
import os
import socket
import ssl
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from serving.errors import ApiError

MAX_REDIRECTS = 3
BLOCK = 2**16

Resolve = Callable[[str, int], list[str]]


def resolve(host: str, port: int) -> list[str]:
    """The IP addresses of a host."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True)
class Sources:
    """Where media may come from besides the request itself.

    Attributes:
        hosts: names, exactly, whose https and http addresses are fetched; none by default.
        folder: whose files `file://` addresses name; None: no files.
        max_bytes, max_seconds: of each file.
        private: addresses of this machine and of private networks are allowed too; for tests alone.
    """

    hosts: Sequence[str] = ()
    folder: Path | None = None
    max_bytes: int = 2**26
    max_seconds: float = 30.0
    private: bool = False
    resolve: Resolve = resolve

    def read(self, url: str, param: str) -> bytes:
        """The file of an address; blocks.

        Raises:
            ApiError: 400, the address is not allowed, or there is no file of the allowed size.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "file":
            return self._read_file(url, param)
        if scheme not in ("http", "https"):
            raise ApiError(400, "media are data: URLs; this one has another scheme", param, code="invalid_url")
        deadline = time.monotonic() + self.max_seconds
        for _ in range(MAX_REDIRECTS + 1):
            found = self._fetch(url, param, deadline)
            if isinstance(found, bytes):
                return found
            url = found
        raise ApiError(400, f"more than {MAX_REDIRECTS} redirects", param, code="invalid_url")

    def _read_file(self, url: str, param: str) -> bytes:
        parts = urlsplit(url)
        refusal = ApiError(400, "this file is not served: see --media-folder", param, code="invalid_url")
        if self.folder is None or parts.netloc not in ("", "localhost"):
            raise refusal
        folder = self.folder.resolve()
        try:
            path = Path(unquote(parts.path)).resolve(strict=True)
            if not path.is_relative_to(folder):
                raise refusal
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                kind = os.fstat(file.fileno())
                # Read through what was opened: the path may be another file's by now.
                opened = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
                if not stat.S_ISREG(kind.st_mode) or not opened.is_relative_to(folder):
                    raise refusal
                if kind.st_size > self.max_bytes:
                    raise ApiError(400, f"the file has more than {self.max_bytes:,} bytes", param, code="too_large")
                return file.read(self.max_bytes)
        except (OSError, ValueError):
            raise refusal from None

    def _fetch(self, url: str, param: str, deadline: float) -> bytes | str:
        """The file, or the address that it has moved to."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            raise ApiError(400, "the URL cannot be read", param, code="invalid_url") from None
        if host not in self.hosts or parts.username is not None or parts.scheme not in ("http", "https"):
            raise ApiError(400, f"media of {host[:100]!r} are not fetched: send a data: URL", param, code="invalid_url")
        connection = _Pinned(host, port, self._address(host, port, param), parts.scheme == "https", deadline)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept-Encoding": "identity", "User-Agent": "mm-adapters"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                return urljoin(url, response.getheader("Location") or "")
            if response.status != 200:
                raise ApiError(400, f"{host} answers {response.status}", param, code="not_fetched")
            return self._body(response, connection, param, deadline)
        except (OSError, http.client.HTTPException, ValueError, UnicodeError) as error:
            raise ApiError(400, f"{host} gives no file ({type(error).__name__})", param, code="not_fetched") from None
        finally:
            connection.close()

    def _body(
        self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection, param: str, deadline: float
    ) -> bytes:
        body = bytearray()
        while block := response.read1(BLOCK):
            body += block
            if len(body) > self.max_bytes:
                raise ApiError(400, f"the file has more than {self.max_bytes:,} bytes", param, code="too_large")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if connection.sock is not None:
                connection.sock.settimeout(left)
        return bytes(body)

    def _address(self, host: str, port: int, param: str) -> str:
        """The address to connect to: every address of the host must be a public one."""
        try:
            addresses = [ipaddress.ip_address(one.partition("%")[0]) for one in self.resolve(host, port)]
        except (OSError, ValueError, UnicodeError):
            addresses = []
        if not addresses:
            raise ApiError(400, f"{host} is not found", param, code="not_fetched")
        for address in addresses:
            real = getattr(address, "ipv4_mapped", None) or address
            if not self.private and (not real.is_global or real.is_multicast):
                raise ApiError(400, f"{host} is no public address", param, code="invalid_url")
        return str(addresses[0])


class _Pinned(http.client.HTTPConnection):
    """A connection to a given address, under the host's own name and certificate."""

    def __init__(self, host: str, port: int, address: str, secure: bool, deadline: float) -> None:
        super().__init__(host, port, timeout=max(0.1, deadline - time.monotonic()))
        self._address, self._secure = address, secure

    def connect(self) -> None:
        """See http.client."""
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
