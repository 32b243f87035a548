"""The HTML scaffold: escaping, tables, pictures as data, and that a page loads nothing from outside."""

import base64
import hashlib
import json
from html.parser import HTMLParser

import pytest

from foundation.html import Markup, data_uri, escape, json_data, page, picture, sound, table, write_page


class Elements(HTMLParser):
    """The (tag, attributes) of a document's elements, and its texts."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_has_title_style_and_body_and_no_links():
    document = page("a < b", ["<h1>one</h1>", "<p>two</p>"], style="p { color: red }")
    parsed = Elements(document)
    tags = [tag for tag, _ in parsed.elements]
    assert document.startswith("<!doctype html>") and {"html", "head", "title", "style", "body", "h1", "p"} <= set(tags)
    assert ("meta", {"charset": "utf-8"}) in parsed.elements and "a < b" in parsed.texts
    assert "p { color: red }" in document and "prefers-color-scheme: dark" in document
    assert not {"script", "link", "iframe"} & set(tags) and "http:" not in document and "url(" not in document
    (policy,) = (values["content"] for _, values in parsed.elements if "http-equiv" in values)
    assert policy.startswith("default-src 'none';") and "script-src" not in policy  # so no script runs


def test_the_policy_allows_the_script_of_the_page_alone():
    script = "document.title = 'é' + (1 < 2);"
    document = page("title", "<p>one</p>", script=script)
    (policy,) = (values["content"] for _, values in Elements(document).elements if "http-equiv" in values)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.endswith(f"; script-src 'sha256-{digest}'") and f"<script>{script}</script>\n</body>" in document


def test_data_of_the_script_is_json_that_cannot_end_its_element():
    value = {"text": "</script><b>é", "numbers": [1, 0.5, None]}
    parsed = Elements(json_data("data", value))
    assert parsed.elements == [("script", {"type": "application/json", "id": "data"})]
    assert json.loads("".join(parsed.texts)) == value


def test_texts_are_escaped_once():
    text = "<b> & \"c\" 'd'"
    assert Elements(f"<p title='{escape(text)}'>{escape(text)}</p>").elements == [("p", {"title": text})]
    assert escape(escape(text)) == escape(text) and escape(Markup("<b>")) == "<b>"


def test_cells_of_a_table():
    parsed = Elements(table(("name", "count"), [("<a>", "1,000"), (Markup("<b>bold</b>"), "2")], number_columns=(1,)))
    cells = [(tag, attributes) for tag, attributes in parsed.elements if tag in ("td", "th")]
    assert cells == [("th", {}), ("th", {"class": "number"})] + [("td", {}), ("td", {"class": "number"})] * 2
    assert "<a>" in parsed.texts and "bold" in parsed.texts and ("b", {}) in parsed.elements
    with pytest.raises(ValueError, match="shorter"):
        table(("name", "count"), [("a",)])


@pytest.mark.parametrize(
    ("data", "mime_type"),
    [
        (b"\x89PNG..", "image/png"),
        (b"\xff\xd8\xff.", "image/jpeg"),
        (b"RIFF..", "image/webp"),
        (b"GIF89a", "image/gif"),
    ],
)
def test_a_picture_is_embedded_by_its_format(data, mime_type):
    ((tag, attributes),) = Elements(picture(data, 'a "picture"', 'class="small"')).elements
    expected = f"data:{mime_type};base64,{base64.b64encode(data).decode()}"
    assert (tag, attributes) == ("img", {"src": expected, "alt": 'a "picture"', "class": "small"})


def test_a_sound_is_embedded_in_a_player():
    ((tag, attributes),) = Elements(sound(b"fLaC")).elements
    assert tag == "audio" and "controls" in attributes and attributes["src"] == data_uri(b"fLaC", "audio/flac")


def test_a_page_is_replaced_in_one_step(tmp_path):
    file = tmp_path / "index.html"
    file.write_text("old")
    write_page(file, page("title", "new"))
    assert "new" in file.read_text(encoding="utf-8") and [path.name for path in tmp_path.iterdir()] == ["index.html"]
