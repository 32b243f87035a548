"""How often the language rule of captions is right, on lines whose language is known: those of Tux Paint's stamps.

The lines are in two halves, by a hash of the line. Defaults of the rule were chosen on the half "choosing"; what is
told here is counted on the other half alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.pipeline.pool import RawSource
from data_prep.sources.splits import split_of
from data_prep.steps.caption_rules import SHORT, CaptionRules
from data_prep.steps.step import as_numpy

COLUMNS = ("id", "caption", "language_score", "words")


@dataclass(frozen=True)
class Confusion:
    """Lines of one length that were held out.

    Attributes:
        length: in words.
        threshold: of the language score, in force.
        wanted_kept, wanted_dropped, others_kept, others_dropped: lines in a wanted language, and all others.
        languages: (language, lines, kept) of the others, those first of which most is kept.
        choices: (share of wanted lines that stay, threshold that leaves it in the half for choosing).
    """

    length: str
    threshold: float
    wanted_kept: int
    wanted_dropped: int
    others_kept: int
    others_dropped: int
    languages: tuple[tuple[str, int, int], ...]
    choices: tuple[tuple[float, float], ...]


def confusions(set_folder: Path, rules: CaptionRules, sources: Sequence[RawSource]) -> list[Confusion]:
    """Of captions shorter than caption_rules.SHORT words and of all others; empty where the pool has no labelled lines.

    A line that is spelt as one in a wanted language is counted as wanted, whatever else it may be; equal lines of one
    language count once.
    """
    labelled = [source.path for source in sources if source.captions == "tuxpaint"]
    lines = _lines(set_folder, labelled, rules.languages) if labelled else []
    if not lines:
        return []
    languages = np.array([language for language, _, _, _ in lines])
    scores = np.array([score for _, _, score, _ in lines])
    short = np.array([words for *_, words in lines]) < SHORT
    choosing = np.array([split_of(f"line/{caption}", 0, 0.5) == "train" for _, caption, _, _ in lines])
    found = []
    for length, among, threshold in (
        (f"under {SHORT} words", short, rules.min_short_language_score),
        (f"{SHORT} words or more", ~short, rules.min_language_score),
    ):
        found.append(_count(length, threshold, languages, scores, among & ~choosing, among & choosing))
    return found


def _count(
    length: str, threshold: float, languages: np.ndarray, scores: np.ndarray, held: np.ndarray, choosing: np.ndarray
) -> Confusion:
    wanted, kept = languages == "", scores >= threshold
    by_language = []
    for language in np.unique(languages[held & ~wanted]):
        here = held & (languages == language)
        by_language.append((str(language), int(here.sum()), int((here & kept).sum())))
    by_language.sort(key=lambda row: (-row[2] / row[1], row[0]))
    counts = [int((held & one & other).sum()) for one in (wanted, ~wanted) for other in (kept, ~kept)]
    own = np.sort(scores[choosing & wanted])[::-1]
    shares = (0.8, 0.85, 0.9, 0.95, 0.98) if len(own) else ()
    choices = tuple((share, float(own[max(1, int(np.ceil(share * len(own)))) - 1])) for share in shares)
    return Confusion(length, threshold, *counts, tuple(by_language), choices)


def _lines(set_folder: Path, sources: list[str], wanted: Sequence[str]) -> list[tuple[str, str, float, int]]:
    """(language, caption, score, words) of distinct lines in the order of captions; the language is "" for wanted."""
    keys = pq.read_table(
        set_folder / "sources.parquet", columns=["id", "key"], filters=pc.field("source").isin(sources)
    )
    pairs = pq.read_table(
        set_folder / "pairs.parquet", columns=list(COLUMNS), filters=pc.field("language_score").is_valid()
    )
    places = pc.index_in(keys["id"], value_set=pairs["id"].combine_chunks())
    known = places.is_valid()
    labels = [
        key.rpartition("#")[2].partition("_")[0].partition("@")[0] for key in keys["key"].filter(known).to_pylist()
    ]
    pairs = pairs.take(places.filter(known))
    captions = pairs["caption"].to_pylist()
    as_wanted = {caption for caption, label in zip(captions, labels, strict=True) if label in wanted}
    rows = zip(labels, captions, as_numpy(pairs["language_score"]), as_numpy(pairs["words"]), strict=True)
    lines = {
        ("" if caption in as_wanted else label, caption): (float(score), int(words))
        for label, caption, score, words in rows
        if label not in ("?", "")
    }
    return [(*line, *about) for line, about in sorted(lines.items(), key=lambda one: one[0][::-1])]
