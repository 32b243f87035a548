"""The HTML scaffold of demo pages and reports: one file that opens without a server and refers to nothing outside it.

`page` puts a body into a document with the shared style, in a light and a dark colour scheme. The other functions
return pieces of a body; they escape the texts that they are given.
"""

import base64
import hashlib
import html
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

STYLE = """
:root {
  color-scheme: light dark;
  --line: #8884; --good: #1a7f37; --bad: #a04a00; --accent: #4a7fb5; --muted: #5c5f66;
}
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --bad: #e09b5a; --muted: #a8abb3; } }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; }
figcaption { font-size: .85rem; } svg { max-width: 100%; height: auto; }
.good { color: var(--good); } .bad { color: var(--bad); } .muted { color: var(--muted); }
"""
_MIME_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


class Markup(str):
    """HTML that is used unchanged; every other string is text and is escaped."""

    __slots__ = ()


def page(title: str, body: str | Iterable[str], style: str = "", script: str = "") -> str:
    """A complete HTML document. Its policy forbids to load anything from outside, and every script but its own.

    Args:
        title: text of the browser's tab.
        body: HTML, whole or in pieces.
        style: CSS of this page alone, after the shared `STYLE`.
        script: JavaScript that runs once the page is read.
    """
    content = body if isinstance(body, str) else "\n".join(body)
    assert "</script" not in script.lower() and "</style" not in style.lower()
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        content += f"\n<script>{script}</script>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{content}\n</body>\n</html>\n"
    )


def json_data(name: str, value: object) -> Markup:
    """A value as JSON for the page's script, which finds it by the element id `name`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def write_page(file: Path, document: str) -> None:
    """Write a document in one step: a reader finds the old file or the new one, never a part of it."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(document, encoding="utf-8")
    os.replace(new, file)


def escape(text: str) -> Markup:
    """Text as HTML, also inside quoted attributes; `Markup` is returned unchanged."""
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], number_columns: Collection[int] = ()) -> Markup:
    """A table of texts.

    Args:
        header: the columns' titles.
        rows: one cell for each column.
        number_columns: indices of the columns that are aligned to the right.
    """

    attributes = [' class="number"' if index in number_columns else "" for index in range(len(header))]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(attributes, cells, strict=True)
        return "".join(f"<{tag}{attribute}>{escape(cell)}</{tag}>" for attribute, cell in pairs)

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return Markup(f"<table>\n<tr>{line('th', header)}</tr>\n{body}\n</table>")


def data_uri(data: bytes, mime_type: str) -> str:
    """The bytes of a picture or a sound as the value of a `src` attribute."""
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"


def picture(data: bytes, alt: str, attributes: str = "") -> Markup:
    """An `img` element that holds a PNG, JPEG, WebP or GIF file.

    Args:
        data: the file.
        alt: the text that stands for the picture.
        attributes: further attributes, as HTML.
    """
    mime_type = next((kind for magic, kind in _MIME_TYPES.items() if data.startswith(magic)), None)
    assert mime_type is not None, f"not a picture file that browsers show: {data[:4]!r}"
    more = f" {attributes}" if attributes else ""
    return Markup(f'<img src="{data_uri(data, mime_type)}" alt="{escape(alt)}"{more}>')


def sound(data: bytes, mime_type: str = "audio/flac") -> Markup:
    """A player of a sound file; the sound is decoded when it is played."""
    return Markup(f'<audio controls preload="none" src="{data_uri(data, mime_type)}"></audio>')
