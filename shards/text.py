"""Text that other people's files hold: bytes in several encodings, Unicode in several spellings."""

import codecs
import unicodedata

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BYTE_ORDER_MARK = "\ufeff"


def decode_text(data: bytes) -> str:
    """Bytes of a text file -> its text in NFC, without byte order marks.

    The encoding is UTF-8, or what a byte order mark says; without a mark, UTF-16 is recognised where at least half of
    the characters are ASCII.

    Raises:
        UnicodeDecodeError: it is none of them.
    """
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", _encoding(data)))
    text = data[len(mark) :].decode(encoding)
    return unicodedata.normalize("NFC", text.replace(_BYTE_ORDER_MARK, ""))


def single_blanks(text: str) -> str:
    """The text without white space at its ends, and with one blank in place of all other white space."""
    return " ".join(text.split())


def _encoding(data: bytes) -> str:
    """UTF-16 where every second byte of at least half of the characters, and no other byte, is zero; else UTF-8."""
    if len(data) % 2 == 0 and b"\0" in data:
        first, second = data[0::2].count(0), data[1::2].count(0)
        if not first and 2 * second >= len(data) // 2:
            return "utf-16-le"
        if not second and 2 * first >= len(data) // 2:
            return "utf-16-be"
    return "utf-8"
