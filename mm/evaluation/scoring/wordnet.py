"""WordNet from its own database files: lemmas, first senses, and the similarity of Wu and Palmer (ACL 1994).

The files are those of WordNet 3.0 (`man 5 wndb`), such as Debian's package wordnet-base installs in /usr/share/wordnet.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from foundation.errors import UserError

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}  # in the order in which senses are looked up
ROOT = ("root", 0)  # above all verbs, adjectives and adverbs, which have no common root of their own
# Endings and what takes their place (`man 7 morphy`).
ENDINGS = {
    "noun": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}

Synset = tuple[str, int]  # the part of speech, and the position in its data file


@dataclass(frozen=True)
class WordNet:
    """The part of WordNet that the similarity needs, in memory.

    Attributes:
        senses: part of speech -> lemma -> synsets, the most frequent first.
        exceptions: part of speech -> inflected form -> lemmas.
        hypernyms: synset -> the synsets above it, instances' included.
        names: synset -> its first word.
    """

    senses: dict[str, dict[str, list[Synset]]]
    exceptions: dict[str, dict[str, list[str]]]
    hypernyms: dict[Synset, list[Synset]]
    names: dict[Synset, str]

    @staticmethod
    def read(folder: Path) -> "WordNet":
        """Read index, data and exception files.

        Raises:
            UserError: a file is missing.
        """
        senses: dict[str, dict[str, list[Synset]]] = {}
        exceptions: dict[str, dict[str, list[str]]] = {}
        hypernyms: dict[Synset, list[Synset]] = {}
        names: dict[Synset, str] = {}
        for part in PARTS:
            senses[part] = dict(_index_entry(line, part) for line in _lines(folder / f"index.{part}"))
            forms = (line.split() for line in _lines(folder / f"{part}.exc"))
            exceptions[part] = {form: lemmas for form, *lemmas in forms}
            for line in _lines(folder / f"data.{part}"):
                synset, names[synset], hypernyms[synset] = _data_entry(line, part)
        return WordNet(senses, exceptions, hypernyms, names)

    def lemmas(self, word: str, part: str) -> list[str]:
        """The lemmas of which a lower-case word is a form, as WordNet's `morphy` finds them."""
        known = self.senses[part]
        if word in self.exceptions[part]:
            return _known([word, *self.exceptions[part][word]], known)
        return _known([word, *_without_ending(word, part)], known)

    def lemma(self, word: str) -> str:
        """The first lemma of a word as a noun, else as a verb, an adjective or an adverb; the word if there is none."""
        return next((lemmas[0] for part in PARTS if (lemmas := self.lemmas(word, part))), word)

    def first_sense(self, word: str) -> Synset | None:
        """The most frequent synset of a word as a noun, else as a verb, an adjective or an adverb."""
        return next((self.senses[part][lemma][0] for part in PARTS for lemma in self.lemmas(word, part)), None)

    def similarity(self, one: Synset, other: Synset) -> float:
        """Wu and Palmer's similarity, 0 to 1: 2 d / (d1 + d2) with the depths by way of the deepest common synset.

        A root stands above both synsets unless both are nouns. Of several deepest ones, the first by name counts.
        """
        rooted = one[0] != "noun" or other[0] != "noun"
        distances, other_distances = self._distances(one, rooted), self._distances(other, rooted)
        common = sorted(distances.keys() & other_distances.keys(), key=lambda synset: self.names.get(synset, ""))
        if not common:
            return 0.0
        shared = one if one in common else max(common, key=lambda synset: self._depth(synset, min))
        depth = self._depth(shared, max) + 1
        lengths = [self._path_length(shared, side, rooted) + depth for side in (distances, other_distances)]
        return 2.0 * depth / sum(lengths)

    def _path_length(self, synset: Synset, distances: dict[Synset, int], rooted: bool) -> int:
        """The shortest path to a synset, upwards from a word's synset and then down."""
        down = self._distances(synset, rooted) if synset != ROOT else {ROOT: 0}
        return min(up + down[meeting] for meeting, up in distances.items() if meeting in down)

    def _distances(self, synset: Synset, rooted: bool) -> dict[Synset, int]:
        """The steps up to each synset above, itself at 0."""
        distances: dict[Synset, int] = {}
        reached, steps = [synset], 0
        while reached:
            new = [above for above in dict.fromkeys(reached) if above not in distances]
            distances |= dict.fromkeys(new, steps)
            reached = [above for below in new for above in self.hypernyms[below]]
            steps += 1
        return distances | ({ROOT: max(distances.values()) + 1} if rooted else {})

    def _depth(self, synset: Synset, choose: Callable[[Iterable[int]], int]) -> int:
        """Steps from the top, by the shortest (`min`) or the longest (`max`) path."""
        above = self.hypernyms.get(synset, [])
        return 1 + choose(self._depth(parent, choose) for parent in above) if above else 0


@lru_cache(maxsize=1)
def wordnet(folder: Path) -> WordNet:
    """`WordNet.read`, kept."""
    return WordNet.read(folder)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(
            f"{path} is missing: name a folder with WordNet's database files, such as /usr/share/wordnet of Debian's "
            "package wordnet-base"
        )
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith(" ")]


def _index_entry(line: str, part: str) -> tuple[str, list[Synset]]:
    lemma, _, num_synsets, *rest = line.split()
    return lemma, [(part, int(offset)) for offset in rest[-int(num_synsets) :]]


def _data_entry(line: str, part: str) -> tuple[Synset, str, list[Synset]]:
    fields = line.split(" | ", 1)[0].split()
    start = 4 + 2 * int(fields[3], 16)  # after the words
    pointers = fields[start + 1 : start + 1 + 4 * int(fields[start])]
    above = [
        (part, int(offset)) for kind, offset in zip(pointers[::4], pointers[1::4], strict=True) if kind in ("@", "@i")
    ]
    return (part, int(fields[0])), fields[4].lower(), above


def _without_ending(word: str, part: str) -> list[str]:
    return [word[: -len(old)] + new for old, new in ENDINGS[part] if word.endswith(old)]


def _known(words: list[str], senses: dict[str, list[Synset]]) -> list[str]:
    return [word for word in dict.fromkeys(words) if word in senses]
