"""Headless Chromium: HTML -> a PDF, or a screenshot with the bounding boxes of its elements.

Pages are untrusted: their scripts do not run, and nothing is loaded from outside the file.
"""

import html
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from PIL import Image

from foundation.errors import UserError
from vision.reading import read_picture

logger = logging.getLogger(__name__)

PROGRAM = "chromium"
TIMEOUT = 300  # seconds for one page
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:; script-src 'nonce-{nonce}'"
FOUND = "mm-elements"  # id of the element in the page's head that the script writes its result to
# Finds each visible element that lies whole within the window: its box and its HTML.
SCRIPT = """
const found = [];
for (const element of document.body.querySelectorAll('*')) {
  const place = element.getBoundingClientRect(), style = getComputedStyle(element);
  if (element.tagName == 'SCRIPT' || style.visibility != 'visible' || place.width < 8 || place.height < 8) continue;
  if (place.left < 0 || place.top < 0 || place.right > innerWidth || place.bottom > innerHeight) continue;
  found.push([[place.left, place.top, place.right, place.bottom], element.outerHTML]);
}
const kept = document.createElement('pre');
kept.id = 'mm-elements';
kept.textContent = JSON.stringify(found);
document.head.append(kept);
"""

Element = tuple[tuple[float, float, float, float], str]  # xmin, ymin, xmax, ymax in pixels; HTML


def require() -> None:
    """Raises UserError where Chromium is missing."""
    if shutil.which(PROGRAM) is None:
        raise UserError(f"rendering HTML needs the program {PROGRAM}, which is missing: apt-get install chromium")


def print_pdf(page: str) -> bytes:
    """A page as a PDF.

    Raises:
        UserError: the program is missing or fails.
        TimeoutError: it takes over 5 minutes. That is an overloaded machine and not a fault of the page, so the page is
            not left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder), _with_policy(page), "--no-pdf-header-footer", "--print-to-pdf=out.pdf")
        return _read(Path(folder) / "out.pdf")


def screenshot(page: str, width: int, height: int) -> tuple[Image.Image, list[Element]]:
    """The upper left part of a page as an RGB picture, and the elements that lie whole in it, in document order.

    Args:
        width, height: of the window, in pixels.

    Raises:
        UserError, TimeoutError: as `print_pdf`.
    """
    size = f"--window-size={width},{height}"
    with tempfile.TemporaryDirectory() as folder:
        options = (size, "--hide-scrollbars", "--dump-dom", "--screenshot=out.png")
        dom = _run(Path(folder), _with_policy(page, SCRIPT), *options)
        picture = read_picture(_read(Path(folder) / "out.png"))
    found = re.search(rf'<pre id="{FOUND}">(.*?)</pre>', dom, re.DOTALL)
    if found is None:
        raise UserError(f"{PROGRAM} did not report the page's elements")
    elements = json.loads(html.unescape(found.group(1)))
    return picture, [
        ((left, top, right, bottom), code)
        for (left, top, right, bottom), code in elements
        if right <= picture.width and bottom <= picture.height
    ]


@lru_cache(maxsize=1)
def installed_code_points() -> frozenset[int] | None:
    """The code points of all fonts of this machine; Chromium draws others as empty boxes. None: not known."""
    if shutil.which("fc-list") is None:
        logger.warning("fc-list is missing (apt-get install fontconfig): pages whose fonts are missing are not found")
        return None
    listed = subprocess.run(["fc-list", "--format", "%{charset} "], capture_output=True, text=True, timeout=TIMEOUT)
    ranges = [part.partition("-") for part in set(listed.stdout.split())]  # such as 20-7e
    return frozenset(code for first, _, last in ranges for code in range(int(first, 16), int(last or first, 16) + 1))


def without_scripts(page: str) -> str:
    """A page without its scripts, comments and event handlers, as far as regular expressions find them.

    What they miss stays in the page's HTML but does not run, because of the policy in `_with_policy`.
    """
    page = re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL)
    page = re.sub(r"<(script|noscript|iframe|object)\b.*?</\1\s*>", "", page, flags=re.DOTALL | re.IGNORECASE)
    page = re.sub(r"<(script|iframe|object|embed|base)\b[^>]*>", "", page, flags=re.IGNORECASE)
    return re.sub(r"\son\w+\s*=\s*(\"[^\"]*\"|'[^']*'|[^\s>]+)", "", page, flags=re.IGNORECASE)


def _with_policy(page: str, script: str = "") -> str:
    """The page under a content security policy that forbids all loading, and all scripts but `script`.

    `script` runs when the page is loaded; a random nonce, which the page cannot know, allows it.
    """
    nonce = secrets.token_hex()
    policy = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY.format(nonce=nonce)}">'
    if script:
        policy += f'<script nonce="{nonce}">addEventListener("load", () => {{{script}}});</script>'
    page = without_scripts(page)
    doctype = re.match(r"\s*<!doctype[^>]*>", page, re.IGNORECASE)
    position = doctype.end() if doctype else 0
    return page[:position] + policy + page[position:]


def _run(folder: Path, page: str, *options: str) -> str:
    require()
    (folder / "page.html").write_text(page, encoding="utf-8", errors="replace")
    command = [
        PROGRAM, "--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-dev-shm-usage",
        "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--force-device-scale-factor=1",
        "--font-render-hinting=none", "--disable-lcd-text", "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    if os.geteuid() == 0:  # Chromium does not start as root with its sandbox
        command += ["--no-sandbox", "--no-zygote"]
    try:
        done = subprocess.run(
            [*command, *options, (folder / "page.html").as_uri()], cwd=folder, capture_output=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{PROGRAM} took over {TIMEOUT} seconds for a page; try again with fewer workers") from None
    if done.returncode != 0:
        output = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"{PROGRAM} failed with exit status {done.returncode}: {output[0][:200]}")
    return done.stdout.decode(errors="replace")


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{PROGRAM} wrote no file")
    return path.read_bytes()
