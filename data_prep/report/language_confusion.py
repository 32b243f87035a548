"""Measures the language rule of captions on lines of known language: those of Tux Paint's stamps.

The lines are divided into two halves by a hash of the line. The default thresholds were chosen on the half "choosing";
the counts are of the other half.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.pipeline.pool import RawSource
from data_prep.sources.splits import split_of
from data_prep.steps.caption_rules import SHORT, CaptionRules
from data_prep.steps.step import as_numpy
from foundation import html

COLUMNS = ("id", "caption", "language_score", "words")
SHARES = (0.8, 0.85, 0.9, 0.95, 0.98)  # for which thresholds are given
LANGUAGES = 10  # shown in the report


@dataclass(frozen=True)
class Confusion:
    """Counts of held-out lines of one length.

    Attributes:
        length: in words.
        threshold: of the language score, in force.
        wanted_kept, wanted_dropped: lines in one of the rule's languages.
        others_kept, others_dropped: lines in all other languages.
        languages: (language, lines, kept lines) of the others, the highest kept share first.
        choices: (share of wanted lines, threshold that keeps that share of the half "choosing").
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
    """The confusion of captions shorter than caption_rules.SHORT words, and of all others.

    A line that is spelt like a line in one of the rule's languages counts as that; equal lines of one language count
    once. Empty where the pool has no lines of known language.
    """
    labelled = [source.path for source in sources if source.captions == "tuxpaint"]
    lines = _lines(set_folder, labelled, rules.languages) if labelled else []
    if not lines:
        return []
    languages = np.array([line.language for line in lines])
    scores = np.array([line.score for line in lines])
    short = np.array([line.words for line in lines]) < SHORT
    choosing = np.array([split_of(f"line/{line.caption}", 0, 0.5) == "train" for line in lines])
    groups = (
        (f"under {SHORT} words", short, rules.min_short_language_score),
        (f"{SHORT} words or more", ~short, rules.min_language_score),
    )
    return [
        _count(length, threshold, languages, scores, among & ~choosing, among & choosing)
        for length, among, threshold in groups
    ]


def _count(
    length: str, threshold: float, languages: np.ndarray, scores: np.ndarray, held_out: np.ndarray, choosing: np.ndarray
) -> Confusion:
    """Args:
    languages: str [lines], "" for a wanted language.
    scores: float64 [lines].
    held_out, choosing: bool [lines], the two halves.
    """
    wanted, kept = languages == "", scores >= threshold
    by_language = []
    for language in np.unique(languages[held_out & ~wanted]):
        of_language = held_out & (languages == language)
        by_language.append((str(language), int(of_language.sum()), int((of_language & kept).sum())))
    by_language.sort(key=lambda row: (-row[2] / row[1], row[0]))
    choosing_scores = np.sort(scores[choosing & wanted])[::-1]
    count = len(choosing_scores)
    choices = tuple(
        (share, float(choosing_scores[max(1, int(np.ceil(share * count))) - 1])) for share in SHARES if count
    )
    return Confusion(
        length,
        threshold,
        wanted_kept=int((held_out & wanted & kept).sum()),
        wanted_dropped=int((held_out & wanted & ~kept).sum()),
        others_kept=int((held_out & ~wanted & kept).sum()),
        others_dropped=int((held_out & ~wanted & ~kept).sum()),
        languages=tuple(by_language),
        choices=choices,
    )


class _Line(NamedTuple):
    """A labelled line; `language` is "" for one of the rule's languages."""

    caption: str
    language: str
    score: float
    words: int


def _lines(set_folder: Path, sources: list[str], wanted: Sequence[str]) -> list[_Line]:
    """The distinct lines, sorted by caption.

    Args:
        sources: paths of the sources whose keys end with `#LANGUAGE`.
        wanted: the rule's languages.
    """
    keys = pq.read_table(
        set_folder / "sources.parquet", columns=["id", "key"], filters=pc.field("source").isin(sources)
    )
    pairs = pq.read_table(
        set_folder / "pairs.parquet", columns=list(COLUMNS), filters=pc.field("language_score").is_valid()
    )
    rows = pc.index_in(keys["id"], value_set=pairs["id"].combine_chunks())
    known = rows.is_valid()
    labels = [
        key.rpartition("#")[2].partition("_")[0].partition("@")[0] for key in keys["key"].filter(known).to_pylist()
    ]
    pairs = pairs.take(rows.filter(known))
    captions = pairs["caption"].to_pylist()
    spelt_as_wanted = {caption for caption, label in zip(captions, labels, strict=True) if label in wanted}
    scores, words = as_numpy(pairs["language_score"]), as_numpy(pairs["words"])
    lines = {
        (caption, "" if caption in spelt_as_wanted else label): (float(score), int(count))
        for label, caption, score, count in zip(labels, captions, scores, words, strict=True)
        if label not in ("?", "")
    }
    return [_Line(*line, *measured) for line, measured in sorted(lines.items(), key=lambda item: item[0])]


def confusions_html(found: Sequence[Confusion]) -> str:
    """A table for each length of caption."""
    parts = ["<h2>Language of captions, on held-out lines of known language</h2>"] if found else []
    for confusion in found:
        rows = (
            ("wanted languages", f"{confusion.wanted_kept:,}", f"{confusion.wanted_dropped:,}"),
            ("all others", f"{confusion.others_kept:,}", f"{confusion.others_dropped:,}"),
        )
        worst = ", ".join(
            f"{language} {kept:,} of {lines:,}" for language, lines, kept in confusion.languages[:LANGUAGES] if kept
        )
        parts += [
            f"<h3>{html.escape(confusion.length)}, threshold {confusion.threshold:.4g}</h3>",
            html.table(("", "kept", "dropped"), rows, number_columns=(1, 2)),
            f"<p>other languages with the highest kept share: {html.escape(worst or 'none')}</p>",
        ]
    return "".join(parts)
