"""Text of other people's files: encodings and spellings."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.text import decode_text, single_blanks

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=12)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_byte_order_mark_is_read(encoding):
    assert decode_text("Grüße, 猫".encode(encoding)) == "Grüße, 猫"


def test_utf16_without_a_mark_is_recognised_by_its_ascii():
    for encoding in ("utf-16-le", "utf-16-be"):
        assert decode_text("a café".encode(encoding)) == "a café"
    assert decode_text(b"A dog\0in front of a wall.") == "A dog\0in front of a wall."
    for broken in (b"caf\xe9", b"\xff\xfe\x00\xd8"):
        with pytest.raises(UnicodeDecodeError):
            decode_text(broken)


@pytest.mark.fuzz
@given(TEXT, st.sampled_from(["NFC", "NFD"]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_any_spelling_of_a_text_is_read_as_its_nfc(text, form, encoding):
    spelling = unicodedata.normalize(form, text)
    mended = decode_text(spelling.encode(encoding))
    assert mended == unicodedata.normalize("NFC", text)
    assert decode_text(mended.encode()) == mended


@pytest.mark.fuzz
@given(TEXT, st.sampled_from([" ", "\n", "\r\n", "\t ", "\u3000", "\u00a0", "\u2028"]))
def test_blanks_are_single_and_mending_again_changes_nothing(text, blank):
    mended = single_blanks(unicodedata.normalize("NFC", f"{blank}{text}{blank}{text}{blank}"))
    assert mended == single_blanks(mended) == unicodedata.normalize("NFC", mended)
    assert mended.split(" ") == (mended.split() or [""])
    assert "".join(mended.split()) == "".join(unicodedata.normalize("NFC", f"{text} {text}").split())
