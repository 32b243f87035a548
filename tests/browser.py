"""Headless Chromium under the DevTools protocol, over a pipe: what a page logs and requests, clicks, keys, pictures."""

import base64
import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium")
TIMEOUT = 120  # seconds for one answer, on a machine that does much else
OPTIONS = (
    *("--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    *("--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND"),
)


class Tab:
    """One tab of a browser.

    Attributes:
        problems: errors and warnings of its console, uncaught exceptions, breaches of its content security policy.
        requests: every address that it asked for.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to_browser, self._from_browser = to_browser, from_browser
        self._buffer, self._number, self._session = b"", 0, None
        self._selector = selectors.DefaultSelector()
        self._selector.register(from_browser, selectors.EVENT_READ)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def open(self, file: Path, width: int = 1280, height: int = 900, scheme: str = "light", fragment: str = "") -> None:
        """Open a file in a window of that size (below 600 px wide, a phone) and a colour scheme; it is read then."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.problems.clear()
        self.requests.clear()
        self._events.clear()
        self.call("Page.navigate", url=file.as_uri() + fragment)
        while "Page.loadEventFired" not in self._events:
            self._receive()

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of an element, after scrolling to it."""
        script = f"(() => {{ const element = document.querySelector({json.dumps(selector)});"
        script += "element.scrollIntoView({block: 'center', behavior: 'instant'});"
        script += "const box = element.getBoundingClientRect();"
        x, y = self.evaluate(f"{script} return [box.x + box.width / 2, box.y + box.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key such as "Enter", "Tab", "Escape" or " "."""
        code = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32}[key]
        text = {"Enter": "\r", " ": " "}.get(key)
        values = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **values, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **values)

    def picture(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _receive(self) -> dict[str, Any]:
        """The next message; events are recorded."""
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"Chromium said nothing for {TIMEOUT} seconds")
            part = os.read(self._from_browser, 1 << 20)
            assert part, "Chromium has ended"
            self._buffer += part
        first, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(first)
        method, values = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(values["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(values["args"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.problems.append(values["entry"]["text"])
        return message


@contextmanager
def open_browser() -> Iterator[Tab]:
    """A browser of its own with one tab; it ends with the block."""
    assert PROGRAM is not None
    in_browser, to_browser = os.pipe()
    from_browser, out_browser = os.pipe()

    def place_pipes() -> None:
        """Chromium reads commands from file descriptor 3 and answers on 4."""
        source, target = os.dup(in_browser), os.dup(out_browser)
        os.dup2(source, 3)
        os.dup2(target, 4)

    command = [PROGRAM, *OPTIONS]
    if os.geteuid() == 0:  # Chromium does not start as root with its sandbox
        command += ["--no-sandbox", "--no-zygote"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command.append(f"--user-data-dir={profile}")
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, close_fds=False, preexec_fn=place_pipes
        )
        try:
            os.close(in_browser)
            os.close(out_browser)
            yield Tab(to_browser, from_browser)
        finally:
            process.terminate()
            process.wait(TIMEOUT)
            os.close(to_browser)
            os.close(from_browser)
