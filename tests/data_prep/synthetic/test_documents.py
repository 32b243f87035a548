import shutil
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from data_prep.synthetic.building import build
from data_prep.synthetic.documents import QUESTION, Documents, draw_text_pages, page_text
from tests.data_prep.synthetic.pdf_files import FONT, stream, write_pdf

WORDS = "The quick brown fox jumps over the lazy dog near the bank of the river"


def pdf(pages):
    """A PDF file whose pages show lines of Helvetica."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", FONT]
    kids = []
    for lines in pages:
        shown = "\n".join(f"({line}) Tj 0 -24 Td" for line in lines)
        objects.append(stream(f"BT /F1 16 Tf 40 740 Td\n{shown}\nET".encode()))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    return write_pdf(objects)


@pytest.fixture
def documents(tmp_path):
    """documents(**changes) -> settings for a folder with a PDF of three pages, one empty, and a text file."""
    folder = tmp_path / "files"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "a.pdf").write_bytes(pdf([[WORDS, "Page one"], [], [WORDS, "Page three", "x" * 20]]))
    (folder / "b.txt").write_text("".join(f"Line {number}: {WORDS}\n" for number in range(70)))
    (folder / "LICENSE").write_text("free for all")
    return lambda **changes: Documents(
        **{"output": str(tmp_path / "set"), "folder": str(folder), "long_side": 400, "min_chars": 20, **changes}
    )


def test_each_page_has_its_text(documents, records_of, turns_of, picture_of, tmp_path):
    found = {}
    for record in records_of(documents()):
        ((question, text),) = turns_of(record)
        assert question == QUESTION and record.json["task"] == "document" and record.json["language"] == "und"
        found[text] = picture_of(record)
    texts = sorted(found)
    assert texts[0].startswith("Line 0: The quick") and texts[1].startswith("Line 58: The") and len(texts) == 4
    assert texts[2:] == [f"{WORDS}\nPage one", f"{WORDS}\nPage three\n{'x' * 20}"]
    for text, picture in found.items():
        assert max(picture.size) == 400
        dark = np.asarray(picture.convert("L")) < 128
        rows = np.flatnonzero(dark.any(1))
        assert len(rows) > text.count("\n") and rows[0] > 5
    assert found[texts[2]].size == (300, 400)
    left_out = (tmp_path / "set" / "left_out.tsv").read_text()
    assert left_out == "below/a.pdf, page 2\thas 0 characters of visible text, not 20 to 6000\n"
    assert "free for all" in (tmp_path / "set" / "LICENSE").read_text()


def test_the_same_bytes_with_two_workers_and_each_document_in_one_split(documents, bytes_of, tmp_path, records_of):
    for number in range(12):
        (tmp_path / "files" / f"{number}.pdf").write_bytes(pdf([[WORDS, f"Number {number}"]] * 2))
    records = records_of(documents(validation=0.3, test=0.3))
    build(documents(validation=0.3, test=0.3, output=str(tmp_path / "two"), workers=2))
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "two")
    sides = {}
    for record in records:
        text = record.json["messages"][1]["content"][0]["text"]
        if "Number" in text:
            sides.setdefault(text, []).append(record.json["split"])
    assert len(sides) == 12 and all(len(found) == 2 and len(set(found)) == 1 for found in sides.values())
    assert len({found[0] for found in sides.values()}) > 1


def test_broken_files_copies_and_pages_without_text_are_listed(documents, tmp_path):
    files = tmp_path / "files"
    (files / "broken.pdf").write_bytes(pdf([[WORDS]])[:60])
    (files / "empty.pdf").write_bytes(b"")
    (files / "latin.txt").write_bytes(b"caf\xe9" * 100)
    shutil.copy(files / "below" / "a.pdf", files / "copy.pdf")
    Image.new("RGB", (100, 140)).save(files / "scan.pdf")
    built = build(documents())
    reasons = {item.name: item.reason for item in built.left_out}
    assert built.num_records == 4 and "cannot be opened as PDF" in reasons["broken.pdf"] and "empty.pdf" in reasons
    assert "not UTF-8" in reasons["latin.txt"] and reasons["copy.pdf"] == "the same file as below/a.pdf"
    assert "0 characters" in reasons["scan.pdf, page 1"]


def test_page_text_has_plain_spaces_and_joined_words():
    assert page_text("a  won\ufffe\r\nder\u00a0ful\x00 day\r\n\r\n\r\n\r\nend ") == "a wonder ful day\n\nend"


def test_lines_of_text_files_fit_on_the_page():
    for font_number in range(3):
        pages = draw_text_pages(("W" * 200 + "\n" + "word " * 60).encode(), f"{font_number:08x}", 600)
        for page in pages:
            edge = (page.picture.width - 8, 0, page.picture.width, page.picture.height)
            assert min(page.picture.crop(edge).getextrema()) == 255


def test_text_that_the_font_cannot_draw_is_left_out(documents, tmp_path):
    texts = {"chinese": "\u4e2d\u6587\u5b57", "arabic": "\u0645\u0631\u062d\u0628\u0627 ", "marks": "q\u0303x\u0323"}
    for name, text in texts.items():
        (tmp_path / "files" / f"{name}.txt").write_text(text * 30)
    cafe = (WORDS + " caf\u00e9 \u0394\u0416 ") * 4
    for name, text in (
        ("decomposed", unicodedata.normalize("NFD", cafe)),
        ("soft", cafe.replace("qu", "q\u00adu") * 2),
    ):
        (tmp_path / "files" / f"{name}.txt").write_text(text)
    built = build(documents())
    reasons = {item.name: item.reason for item in built.left_out if "txt" in item.name}
    assert set(reasons) == {f"{name}.txt, page 1" for name in texts} and built.num_records == 4 + 2
    assert "90 of 91 characters cannot be drawn with DejaVu" in reasons["chinese.txt, page 1"]


def test_decomposed_letters_and_invisible_characters_do_not_change_the_picture():
    def drawn(text):
        return [page.picture.tobytes() for page in draw_text_pages(text.encode(), "0" * 8, 400)]

    assert drawn("cafe\u0301 a\u00adb " + WORDS) == drawn("caf\u00e9 ab " + WORDS)


def test_a_damaged_or_odd_page_does_not_affect_the_others(documents, tmp_path):
    data = pdf([[WORDS, f"Page {number}"] for number in range(1, 5)])
    pages = data.split(b"/Type /Page /")
    pages[2] = b"Gone " + pages[2]  # not a page object
    pages[3] = pages[3].replace(b"[0 0 600 800]", b"[0 0 600 008]")
    damaged = pages[0] + b"/Type /Page /" + pages[1] + b"/Type /" + pages[2]
    (tmp_path / "files" / "damaged.pdf").write_bytes(damaged + b"".join(b"/Type /Page /" + rest for rest in pages[3:]))
    built = build(documents())
    reasons = {item.name: item.reason for item in built.left_out if item.name.startswith("damaged")}
    assert set(reasons) == {"damaged.pdf, page 2", "damaged.pdf, page 3"} and built.num_records == 4 + 2, reasons
    assert "cannot be read" in reasons["damaged.pdf, page 2"] and "600 x 8 points" in reasons["damaged.pdf, page 3"]


def test_a_missing_pdf_package_is_named(documents, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(ValueError, match=r"^PDF needs the package pypdfium2"):
        build(documents())
    assert build(documents(kinds=("txt",))).num_records == 2


def test_wrong_settings_and_folders_are_refused(documents, tmp_path):
    for changes, message in (
        ({"kinds": ("doc",)}, "kinds are doc"),
        ({"kinds": ()}, "kinds are empty"),
        ({"long_side": 3}, "long_side is 3"),
        ({"min_chars": 9, "max_chars": 3}, "min <= max"),
    ):
        with pytest.raises(ValueError, match=message):
            documents(**changes)
    with pytest.raises(ValueError, match="no files with a suffix of html"):
        build(documents(kinds=("html",)))
    (tmp_path / "files" / "b.txt").unlink()
    (tmp_path / "files" / "below" / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"no record.*a.pdf"):
        build(documents())
    assert not (tmp_path / "set").exists()
