"""Screenshots by a stand-in for Chromium, which draws a grey page and reports the boxes of the page's paragraphs."""

import os
import re
import shutil
import sys

import numpy as np
import pytest

from data_prep.synthetic import browser
from data_prep.synthetic.browser import PROGRAM, without_scripts
from data_prep.synthetic.building import build
from data_prep.synthetic.documents import Documents
from data_prep.synthetic.screenshots import Screenshots, tidy

STAND_IN = """#!{python}
import html, json, re, sys
from PIL import Image
options = dict(part.partition("=")[::2] for part in sys.argv[1:])
page = open("page.html", encoding="utf-8").read()
word = re.search(r"script-src 'nonce-(.*?)'", page).group(1)
assert len(word) > 30 and page.count(f'<script nonce="{{word}}">') == ("--screenshot" in options)
if "FAIL" in page:
    print("no display", file=sys.stderr)
    sys.exit(3)
if "--print-to-pdf" in options:
    open("out.pdf", "wb").write(open("{pdf}", "rb").read())
if "--screenshot" in options:
    size = tuple(map(int, options["--window-size"].split(",")))
    Image.new("RGB", size, "#cccccc").save("out.png")
    found = [[[10, 10 + 50 * n, 200, 40 + 50 * n], code] for n, code in enumerate(re.findall(r"<p.*?</p>", page))]
    found += [[[0, 0, size[0], size[1]], "<body>all</body>"], [[5, 5, 50, size[1] + 50], "<p>too low</p>"]]
    print('<pre id="mm-elements">' + html.escape(json.dumps(found), quote=False) + "</pre>")
"""


@pytest.fixture
def chromium(tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    program = programs / PROGRAM
    program.write_text(STAND_IN.format(python=sys.executable, pdf=tmp_path / "printed.pdf"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def pages(tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "a.html").write_text('<!doctype html><p id="x">One &amp; <b>two</b></p>\n<script>let a;</script>')
    (folder / "b.html").write_text("<p>First</p><p>Second one</p><p>Third one of all</p><p>---</p><p>4</p>")
    (folder / "fails.html").write_text("<p>FAIL</p>")
    (folder / "LICENSE").write_text("free for all")
    return folder


def settings(folder, tmp_path, **changes):
    return Screenshots(**{"output": str(tmp_path / "set"), "pages": str(folder), "boxes": 2, **changes})


def test_the_box_is_around_the_element_of_the_answer(chromium, pages, tmp_path, records_of, turns_of, picture_of):
    codes = {"<p>One &amp; <b>two</b></p>": 0, "<p>First</p>": 0, "<p>Second one</p>": 1, "<p>Third one of all</p>": 2}
    codes["<p>4</p>"] = 4
    found = []
    for record in records_of(settings(pages, tmp_path)):
        ((question, code),) = turns_of(record)
        found.append(code)
        red = np.abs(np.asarray(picture_of(record), int) - (0xE6, 0x19, 0x4B)).max(-1) < 3
        rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        top = 10 + 50 * codes[code]
        assert (rows[0], rows[-1], columns[0], columns[-1]) == (top - 3, top + 32, 7, 202) and "HTML" in question
        assert not red[top + 2 : top + 28, 12:198].any()  # nothing is drawn over the element
    assert len(found) == 3 == len(set(found)) and "<p>One &amp; <b>two</b></p>" in found
    left_out = (tmp_path / "set" / "left_out.tsv").read_text()
    assert "fails.html" in left_out and "exit status 3: no display" in left_out
    assert "free for all" in (tmp_path / "set" / "LICENSE").read_text()


def test_the_same_bytes_with_two_workers_and_random_pages(chromium, pages, tmp_path, bytes_of, records_of):
    for name, workers in (("one", 1), ("two", 2)):
        build(settings(pages, tmp_path, output=str(tmp_path / name), workers=workers))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    few = records_of(settings(pages, tmp_path, pages=None, count=4, test=0.5))
    many = records_of(settings(pages, tmp_path, pages=None, count=8, test=0.5, overwrite=True))
    assert few and {record.id for record in few} < {record.id for record in many}
    assert {record.json["split"] for record in many} == {"train", "test"}


def test_missing_chromium_is_named(monkeypatch, pages, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt-get install chromium"):
        build(settings(pages, tmp_path))
    with pytest.raises(ValueError, match="apt-get install chromium"):
        build(Documents(output=str(tmp_path / "set"), folder=str(pages)))
    assert not (tmp_path / "set").exists()


def test_a_timeout_stops_the_build(chromium, pages, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.synthetic.browser.TIMEOUT", 0.001)
    with pytest.raises(TimeoutError, match="fewer workers"):
        build(settings(pages, tmp_path))
    assert not (tmp_path / "set").exists()


def test_html_is_printed_for_documents(chromium, pages, tmp_path):
    (tmp_path / "printed.pdf").write_bytes(b"no PDF")
    with pytest.raises(ValueError, match=r"no record.*a\.html: .*cannot be opened as PDF"):
        build(Documents(output=str(tmp_path / "set"), folder=str(pages)))


def test_each_page_gets_a_new_nonce(chromium, tmp_path, monkeypatch):
    seen, run = [], browser._run
    monkeypatch.setattr(
        browser, "_run", lambda folder, page, *options: seen.append(page) or run(folder, page, *options)
    )
    for _ in range(2):
        browser.screenshot("<p>A</p><scr<embed>ipt nonce=mm>let hidden;</scr<embed>ipt>", 500, 500)
    nonces = [re.search(r"script-src 'nonce-(.*?)'", page).group(1) for page in seen]
    assert len(set(nonces)) == 2 and all(
        len(nonce) > 30 and "hidden" in page for nonce, page in zip(nonces, seen, strict=True)
    )


def test_scripts_and_invisible_attributes_are_removed():
    page = '<a onclick="x()" href="y">b</a><script src="z">1</script><!-- c --><iframe></iframe><embed src="q"><p>d</p>'
    assert without_scripts(page) == '<a href="y">b</a><p>d</p>'
    assert tidy('<p id="a" class="b" data-x="1">c\n  d</p>') == '<p class="b">c d</p>'


def test_wrong_settings_are_refused(chromium, pages, tmp_path):
    for name, value in (("count", 0), ("width", 300), ("boxes", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            settings(pages, tmp_path, **{name: value})
    with pytest.raises(ValueError, match=r"no \.html files"):
        build(settings(tmp_path / "programs", tmp_path))
    with pytest.raises(ValueError, match=r"no record"):
        build(settings(pages, tmp_path, max_chars=3))


without_chromium = pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="the program chromium is not installed")


@without_chromium
def test_real_chromium_runs_no_script_of_a_page():
    page = "<body>{}<p>A white page</p><scr<embed>ipt nonce=mm>document.body.style.background = '#00f'</scr<embed>ipt>"
    for handler in ("", "<img/onerror=\"document.body.style.background='#00f'\" src=data:,>"):
        picture, elements = browser.screenshot(page.format(handler), 500, 500)
        assert picture.getpixel((300, 300)) == (255, 255, 255) and any("A white page" in code for _, code in elements)


@without_chromium
def test_real_chromium_finds_the_box_of_an_element(pages, tmp_path, records_of, turns_of, picture_of):
    (pages / "fails.html").unlink()
    (pages / "b.html").write_text('<body style="margin:0"><p style="margin:90px 50px;background:#00f">Blue one</p>')
    records = records_of(settings(pages, tmp_path))
    (record,) = [record for record in records if "Blue" in turns_of(record)[0][1]]
    pixels = np.asarray(picture_of(record))
    assert (pixels[88:90, 100] == (0xE6, 0x19, 0x4B)).all() and tuple(pixels[92, 400]) == (0, 0, 255)
