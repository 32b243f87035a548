"""The n-grams of a reference text, and which of them a caption contains: words, and pairs of neighbouring words."""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.steps.words import words_of
from foundation.errors import UserError
from foundation.extras import import_extra

if TYPE_CHECKING:
    from ahocorasick_rs import AhoCorasick

# NFKC takes the vowel sign "am" of Thai and Lao apart, in which form ICU's dictionaries do not have it.
_SIGNS_AM = {"\u0e4d\u0e32": "\u0e33", "\u0ecd\u0eb2": "\u0eb3"}


def normalised_words(text: str) -> list[str]:
    """The words of a text after NFKC normalisation and case folding."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        for apart, sign in _SIGNS_AM.items():
            text = text.replace(apart, sign)
    return words_of(text.casefold())


def read_texts(path: Path) -> Iterator[str]:
    """The lines of a text file, or the glosses of a folder of WordNet's `data.*` files.

    Raises:
        UserError: there is neither.
    """
    is_plain, files = path.is_file(), _files(path)
    if not files:
        raise UserError(f"{path}: neither a text file nor a folder of WordNet's data.* files")
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not a text file in UTF-8 ({error})") from error
        for line in lines:
            if is_plain:
                yield line
            elif " | " in line and not line.startswith("  "):  # the indented lines at the top are the licence
                yield line.partition(" | ")[2]


def read_vocabulary(path: Path) -> "Vocabulary":
    """The n-grams of the texts of `read_texts`; the last one is kept in memory while its files do not change."""
    stats = [file.stat() for file in _files(path)]
    return _read_vocabulary(path.absolute(), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


@lru_cache(maxsize=1)
def _read_vocabulary(path: Path, state: tuple[tuple[int, int], ...]) -> "Vocabulary":
    return Vocabulary.of_texts(read_texts(path))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("data.*"))


class Vocabulary:
    """N-grams, each with an index, in alphabetical order.

    Attributes:
        ngrams: one word, or two words with a blank between them.
        digest: the first 16 hexadecimal digits of the SHA-256 of all n-grams.
    """

    def __init__(self, ngrams: set[str]):
        self.ngrams = sorted(ngrams)
        self.digest = hashlib.sha256("\n".join(self.ngrams).encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[type["Vocabulary"], tuple[set[str]]]:
        return Vocabulary, (set(self.ngrams),)  # the automaton cannot be pickled

    @classmethod
    def of_texts(cls, texts: Iterator[str]) -> "Vocabulary":
        """Every word and every pair of neighbouring words; no pair crosses a full stop, a semicolon or a bracket."""
        found: set[str] = set()
        for text in texts:
            for clause in re.split(r"[.;:()\"!?]+", text):
                words = normalised_words(clause)
                found.update(words)
                found.update(map(" ".join, pairwise(words)))
        return cls(found)

    @cached_property
    def _automaton(self) -> "AhoCorasick":
        """Finds all n-grams in one pass over a caption; blanks around each n-gram make it match whole words only."""
        ahocorasick_rs = import_extra("ahocorasick_rs", "data", "resampling")
        return ahocorasick_rs.AhoCorasick([f" {ngram} " for ngram in self.ngrams], store_patterns=False)

    def ngram_indices(self, caption: str) -> list[int]:
        """The indices of the n-grams that a caption contains, each once, ascending."""
        text = f" {' '.join(normalised_words(caption))} "
        return sorted({index for index, *_ in self._automaton.find_matches_as_indexes(text, overlapping=True)})
