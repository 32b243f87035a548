"""Targets of document pages hold the text that can be seen in the picture, and no other."""

import io
import shutil

import pypdfium2
import pypdfium2.raw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.synthetic import browser, documents
from data_prep.synthetic.documents import DocumentPages, Documents, render_pdf
from tests.data_prep.synthetic.pdf_files import one_page, words

SHOWN = words(40, 740, b"Seen here")
HIDDEN = {
    "outside of the page": one_page(SHOWN + words(40, 900, b"secret")),
    "outside of the crop box": one_page(SHOWN + words(40, 20, b"secret"), page=b"/CropBox [0 400 600 800]"),
    "beside the crop box": one_page(SHOWN + words(450, 740, b"secret"), page=b"/CropBox [0 0 400 800]"),
    "render mode 3": one_page(SHOWN + words(40, 600, b"secret", b"3 Tr")),
    "render mode 3 over visible text": one_page(SHOWN + words(40, 740, b"secret", b"3 Tr")),
    "render mode 7": one_page(SHOWN + words(40, 600, b"secret", b"7 Tr")),
    "white on white": one_page(SHOWN + words(40, 600, b"secret", b"1 g")),
    "white under visible text": one_page(words(40, 740, b"secret", b"1 g") + SHOWN),
    "nearly white on white": one_page(SHOWN + words(40, 600, b"secret", b"0.97 g")),
    "black on black": one_page(SHOWN + b"30 590 300 30 re f\n" + words(40, 600, b"secret")),
    "nearly transparent": one_page(SHOWN + words(40, 600, b"secret", b"/Faint gs")),
    "covered": one_page(SHOWN + words(40, 600, b"secret") + b"1 g 30 590 300 30 re f\n"),
    "clipped": one_page(SHOWN + words(40, 600, b"secret", b"0 0 9 9 re W n")),
    "too small": one_page(SHOWN + words(40, 600, b"secret", size=1)),
    "white in a form": one_page(SHOWN + b"/X Do\n", form=words(40, 600, b"secret", b"1 g")),
}
VISIBLE = {
    "black": words(40, 600, b"plain"),
    "light grey": words(40, 600, b"plain", b"0.85 g"),
    "white on black": b"30 590 300 30 re f\n" + words(40, 600, b"plain", b"1 g"),
    "stroked": words(40, 600, b"plain", b"1 Tr"),
    "in a form": b"/X Do\n",
    "over white text": words(40, 600, b"SECRET", b"1 g") + words(40, 600, b"plain"),
}


def text_of(data, long_side=1344):
    (page,) = render_pdf(data, None, long_side)
    assert page.problem is None and max(page.picture.size) == long_side
    return page.text


def all_text_of(data):
    """The whole text layer."""
    with pypdfium2.PdfDocument(data) as document:
        return document[0].get_textpage().get_text_range()


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("long_side", [1344, 500])
def test_text_that_cannot_be_seen_is_no_target(name, long_side):
    assert "secret" in all_text_of(HIDDEN[name]) or name == "render mode 3 over visible text"
    assert text_of(HIDDEN[name], long_side) == "Seen here"


@pytest.mark.parametrize("name", VISIBLE)
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_text_that_can_be_seen_stays(name, turn):
    data = one_page(SHOWN + VISIBLE[name], form=words(40, 600, b"plain"), page=b"/Rotate %d" % turn)
    assert sorted(text_of(data, 800).split()) == ["Seen", "here", "plain"]


def test_a_line_over_the_edge_keeps_what_lies_on_the_page():
    data = one_page(SHOWN + words(545, 600, b"begins and ends"))
    assert text_of(data) == "Seen here\nbegins"


def test_thin_marks_and_lines_between_hidden_ones_stay():
    lines = ['a.b, c_d - e-mail: "x"; |y|', "secret", '"', "_", "end."]
    looks = [b"1 g" if line == "secret" else b"" for line in lines]
    rows = enumerate(zip(lines, looks, strict=True))
    content = b"".join(words(40, 700 - 30 * row, line.encode(), look) for row, (line, look) in rows)
    for long_side in (1344, 700, 400):
        assert text_of(one_page(content), long_side) == 'a.b, c_d - e-mail: "x"; |y|\n"\n_\nend.'


def test_replacement_texts_stay_where_they_are_drawn():
    # pdfium gives the boxes of ActualText at another place
    for look, expected in ((b"", "Seen here\nfish"), (b"1 g", "Seen here")):
        marked = b"q %s BT /F1 16 Tf 1 0 0 1 300 600 Tm /Span << /ActualText (fish) >> BDC (f) Tj EMC ET Q\n" % look
        assert "fish" in all_text_of(one_page(SHOWN + marked))
        assert text_of(one_page(SHOWN + marked)) == expected


def test_characters_of_two_units_stay():
    data = one_page(SHOWN + words(40, 600, b"a f b") + words(40, 500, b"f", b"1 g"), meaning=b"<66> <d835dc65>")
    assert all_text_of(data).count("\U0001d465") == 2
    assert text_of(data) == "Seen here\na \U0001d465 b"


@pytest.mark.parametrize("font_type", [3, 42])
def test_embedded_fonts(font_type):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"pdf.fonttype": font_type, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(6, 8))
        figure.text(0.1, 0.9, "The quick brown fox; over the dog.")
        figure.text(0.1, 0.8, "secret words", color="white")
        figure.text(0.1, 0.7, "Turned text", rotation=30)
        out = io.BytesIO()
        figure.savefig(out, format="pdf")
    assert text_of(out.getvalue(), 800) == "The quick brown fox; over the dog.\nTurned text"


def test_pages_whose_fonts_are_missing_are_left_out(monkeypatch, tmp_path):
    # Chromium draws characters that no font has as empty boxes
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.html").write_text("printed below")
    settings = Documents(output=str(tmp_path / "out"), folder=str(tmp_path / "set"), min_chars=5, long_side=500)
    job = DocumentPages("a.html", tmp_path / "set" / "a.html", "0" * 64, None)
    monkeypatch.setattr(documents, "print_pdf", lambda html: one_page(SHOWN))
    monkeypatch.setattr(documents, "installed_code_points", lambda: frozenset(map(ord, "Seen hr")))
    (record,) = settings.records(job)
    assert record.json["messages"][1]["content"] == [{"type": "text", "text": "Seen here"}]
    monkeypatch.setattr(documents, "installed_code_points", lambda: frozenset(map(ord, "Seen r")))
    (left_out,) = settings.records(job)
    assert left_out.reason == "no font of this machine has 1 of its 9 characters: install fonts of its language"
    monkeypatch.setattr(documents, "installed_code_points", lambda: None)
    assert settings.records(job) == [record]


@pytest.mark.skipif(shutil.which("fc-list") is None, reason="fontconfig is not installed")
def test_code_points_of_installed_fonts():
    found = browser.installed_code_points()
    assert found is not None and set(map(ord, "Aa0 ")) <= found and 0xE0FFF not in found


LOOKS = {  # how a word is shown, and whether it can be seen
    "black": (b"", True),
    "red": (b"1 0 0 rg", True),
    "light": (b"0.8 g", True),
    "stroked": (b"1 Tr", True),
    "white": (b"1 g", False),
    "invisible": (b"3 Tr", False),
    "faint": (b"/Faint gs", False),
    "clipped": (b"0 0 1 1 re W n", False),
}


@pytest.mark.fuzz
@given(
    looks=st.lists(st.sampled_from(sorted(LOOKS)), min_size=1, max_size=8),
    x=st.integers(0, 300),
    in_form=st.booleans(),
    turn=st.sampled_from((0, 90, 180, 270)),
    crop=st.none() | st.tuples(st.integers(0, 250), st.integers(0, 300), st.integers(400, 600), st.integers(350, 800)),
    long_side=st.integers(500, 1400),
)
def test_random_pages(looks, x, in_form, turn, crop, long_side):
    expected, content = [], b""
    left, bottom, right, top = crop or (0, 0, 600, 800)
    for row, look in enumerate(looks):
        before, is_visible = LOOKS[look]
        y, word = 720 - 80 * row, "WORD" + "ABCDEFGH"[row]
        across, up = (x + 100, y + 50) if in_form else (x, y)  # on the page
        if not (left + 1 < across < right - 66 and bottom + 1 < up < top - 14):  # ends at the edge, or outside
            if left - 66 < across < right and bottom - 14 < up < top:
                continue  # in part on the page
            is_visible = False
        content += words(x, y, word.encode(), before)
        expected += [word] if is_visible else []
    page = b"/Rotate %d %s" % (turn, b"/CropBox [%d %d %d %d]" % crop if crop else b"")
    data = one_page(b"/X Do\n" if in_form else content, form=content, page=page)
    assert sorted(text_of(data, long_side).split()) == expected
