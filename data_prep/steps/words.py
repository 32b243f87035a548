"""The words of a text in any script, for counts and n-grams."""

import re
from functools import cache
from typing import TYPE_CHECKING

import regex

from foundation.extras import import_extra

if TYPE_CHECKING:
    from icu4py.breakers import WordBreaker
    from icu4py.locale import Locale

_ASCII_RUN = re.compile(r"\w+")
# Letters and digits with the marks that belong to them, such as the vowel signs of Indic scripts, and joiners between.
_RUN = regex.compile(r"[\p{L}\p{N}_][\p{L}\p{N}\p{M}_\u200c\u200d]*")
# Scripts without spaces between words: Chinese and Japanese, and the South-East Asian ones (Thai, Lao, Khmer, Burmese).
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Line_Break=SA}]")
_LETTER = regex.compile(r"[\p{L}\p{N}_]")


def runs_of(text: str) -> list[str]:
    r"""The runs of letters, digits and underscores of a text, with their marks; of ASCII text what `\w+` finds."""
    return _ASCII_RUN.findall(text) if text.isascii() else _RUN.findall(text)


def words_of(text: str) -> list[str]:
    """The words of a text: its runs, and those in scripts without spaces divided by ICU's dictionaries.

    Other runs are words as they are: ICU would keep `don't`, `l'eau` and `3.5` in one piece, which the counts and the
    n-grams of languages with spaces never did.

    Args:
        text: valid Unicode, best in NFC.
    """
    if text.isascii():
        return _ASCII_RUN.findall(text)
    words: list[str] = []
    for run in _RUN.findall(text):
        words += _segments(run) if _UNSPACED.search(run) else [run]
    return words


def _segments(run: str) -> list[str]:
    breaker, locale = _icu()
    return [segment for segment in breaker(run, locale) if _LETTER.search(segment)]


@cache
def _icu() -> "tuple[type[WordBreaker], Locale]":
    """ICU's word breaker, and a locale: the dictionaries go by script, whatever the locale."""
    breakers = import_extra("icu4py.breakers", "data", "words of Chinese, Japanese, Thai, Lao, Khmer and Burmese text")
    locales = import_extra("icu4py.locale", "data", "words of Chinese, Japanese, Thai, Lao, Khmer and Burmese text")
    return breakers.WordBreaker, locales.Locale("en")
