"""The n-grams of a good text, and which of them a caption contains: words and pairs of neighbouring words."""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

from foundation.errors import UserError
from foundation.extras import import_extra

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """NFKC, casefolded, whole words."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a source of vocabulary: each line of a file, or the glosses of a folder of WordNet's `data.*` files.

    Raises:
        UserError: there is neither.
    """
    is_plain, files = path.is_file(), _files(path)
    if not files:
        raise UserError(f"{path}: neither a text file nor a folder of WordNet's data.* files")
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if is_plain:
                yield line
            elif " | " in line and not line.startswith("  "):  # the licence stands at the top, indented
                yield line.partition(" | ")[2]


def vocabulary_of(path: Path) -> "Vocabulary":
    """The n-grams of the texts of `read_texts`; what was read last is not read again while its files are the same."""
    stats = [file.stat() for file in _files(path)]
    return _read_vocabulary(path.absolute(), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


@lru_cache(maxsize=1)
def _read_vocabulary(path: Path, state: tuple[tuple[int, int], ...]) -> "Vocabulary":
    return Vocabulary.of_texts(read_texts(path))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("data.*"))


class Vocabulary:
    """N-grams with a number each, in alphabetical order.

    Attributes:
        ngrams: one or two words each, a blank between them.
        digest: of all of them.
    """

    def __init__(self, ngrams: set[str]):
        self.ngrams = sorted(ngrams)
        self.digest = hashlib.sha256("\n".join(self.ngrams).encode()).hexdigest()[:16]

    def __reduce__(self):
        return Vocabulary, (set(self.ngrams),)

    @classmethod
    def of_texts(cls, texts: Iterator[str]) -> "Vocabulary":
        """Every word and every pair of neighbours; no pair reaches over a full stop, a semicolon or a bracket."""
        found: set[str] = set()
        for text in texts:
            for clause in re.split(r"[.;:()\"!?]+", text):
                words = words_of(clause)
                found.update(words)
                found.update(map(" ".join, pairwise(words)))
        return cls(found)

    @cached_property
    def _automaton(self):
        """Finds all n-grams in one pass over a caption; each stands between blanks, so that words are whole."""
        ahocorasick_rs = import_extra("ahocorasick_rs", "data", "resampling")
        return ahocorasick_rs.AhoCorasick([f" {ngram} " for ngram in self.ngrams], store_patterns=False)

    def numbers_in(self, caption: str) -> list[int]:
        """The numbers of the n-grams that a caption contains, each once, in order."""
        text = f" {' '.join(words_of(caption))} "
        return sorted({number for number, *_ in self._automaton.find_matches_as_indexes(text, overlapping=True)})
