"""Debian's Chromium, without a window: HTML -> a PDF, or a screenshot with the places of its elements.

Pages are taken for untrusted: their scripts are not run, and nothing is loaded from outside the file.
"""

import html
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from foundation.errors import UserError
from vision.reading import read_picture

PROGRAM = "chromium"
TIMEOUT = 300  # seconds for one page
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:; script-src 'nonce-{nonce}'"
FOUND = "mm-elements"  # id of the element, in the page's unseen head, that the script leaves its findings in
# What is drawn of each element within the window: its place and its own code.
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

Element = tuple[tuple[float, float, float, float], str]  # xmin, ymin, xmax, ymax in pixels; its code


def require() -> None:
    """UserError where the program is missing."""
    if shutil.which(PROGRAM) is None:
        raise UserError(f"HTML is drawn by the program {PROGRAM}, which is missing: apt-get install chromium")


def print_pdf(page: str) -> bytes:
    """A page as a PDF.

    Raises:
        UserError: the program is missing or fails.
        TimeoutError: it takes over 5 minutes: the machine's fault, for which no page may be left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder), _guarded(page), "--no-pdf-header-footer", "--print-to-pdf=out.pdf")
        return _read(Path(folder) / "out.pdf")


def screenshot(page: str, width: int, height: int) -> tuple[Image.Image, list[Element]]:
    """The upper left of a page as an RGB picture, and the elements that are seen in it whole, in document order.

    Raises:
        UserError: as `print_pdf`.
    """
    size = f"--window-size={width},{height}"
    with tempfile.TemporaryDirectory() as folder:
        options = (size, "--hide-scrollbars", "--dump-dom", "--screenshot=out.png")
        dom = _run(Path(folder), _guarded(page, SCRIPT), *options)
        picture = read_picture(_read(Path(folder) / "out.png"))
    found = re.search(rf'<pre id="{FOUND}">(.*?)</pre>', dom, re.DOTALL)
    if found is None:
        raise UserError(f"{PROGRAM} did not say where the page's elements are")
    elements = json.loads(html.unescape(found.group(1)))
    inside = [(tuple(box), code) for box, code in elements if box[2] <= picture.width and box[3] <= picture.height]
    return picture, inside


def without_scripts(page: str) -> str:
    """A page less its scripts, comments, and handlers of events, as far as they are written plainly.

    What a page hides from it is in its code still, yet is not run: the policy of `_guarded` sees to that.
    """
    page = re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL)
    page = re.sub(r"<(script|noscript|iframe|object)\b.*?</\1\s*>", "", page, flags=re.DOTALL | re.IGNORECASE)
    page = re.sub(r"<(script|iframe|object|embed|base)\b[^>]*>", "", page, flags=re.IGNORECASE)
    return re.sub(r"\son\w+\s*=\s*(\"[^\"]*\"|'[^']*'|[^\s>]+)", "", page, flags=re.IGNORECASE)


def _guarded(page: str, script: str = "") -> str:
    """The page under a policy that forbids scripts other than ours and everything from outside.

    Ours is run when the page is there; a word that no page can know lets it pass.
    """
    nonce = secrets.token_hex()
    policy = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY.format(nonce=nonce)}">'
    if script:
        policy += f'<script nonce="{nonce}">addEventListener("load", () => {{{script}}});</script>'
    page = without_scripts(page)
    doctype = re.match(r"\s*<!doctype[^>]*>", page, re.IGNORECASE)
    at = doctype.end() if doctype else 0
    return page[:at] + policy + page[at:]


def _run(folder: Path, page: str, *options: str) -> str:
    require()
    (folder / "page.html").write_text(page, encoding="utf-8", errors="replace")
    command = [
        PROGRAM, "--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-dev-shm-usage",
        "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--force-device-scale-factor=1",
        "--font-render-hinting=none", "--disable-lcd-text", "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    if os.geteuid() == 0:  # as root it refuses to start with its sandbox
        command += ["--no-sandbox", "--no-zygote"]
    try:
        done = subprocess.run(
            [*command, *options, (folder / "page.html").as_uri()], cwd=folder, capture_output=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{PROGRAM} took over {TIMEOUT} seconds for a page; try again with fewer workers") from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no word of why"]
        raise UserError(f"{PROGRAM} failed with {done.returncode}: {words[0][:200]}")
    return done.stdout.decode(errors="replace")


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{PROGRAM} wrote nothing")
    return path.read_bytes()
