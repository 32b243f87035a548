"""The report of a run: one HTML file without scripts and links, with what was dropped and what is near a threshold.

It shows no quarantined pictures: the steps that quarantine come before those whose pairs are shown here, and the NSFW
score shows its histogram alone. Faces are blurred as in the shards, also in pictures that were dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.pipeline.canaries import measure_canaries, reported_thresholds
from data_prep.pipeline.curation import deciding_steps_of, located_sources, read_run
from data_prep.pipeline.deciding import Decided, walk
from data_prep.pipeline.ledger import stats
from data_prep.report.duplicates import (
    Component,
    Duplicate,
    canaries_html,
    components,
    components_html,
    duplicates_html,
    least_similar,
)
from data_prep.report.language_confusion import confusions, confusions_html
from data_prep.report.thumbnails import Thumbnails
from data_prep.sources.files import Locate
from data_prep.steps.caption_rules import CaptionRules
from data_prep.steps.faces import Faces
from data_prep.steps.near_duplicates import NearDuplicates, summarize
from data_prep.steps.resampling import Resampling, frequencies
from data_prep.steps.step import Rule, Step, ThresholdRule
from foundation import html

REPORT_NAME = "report.html"
BINS = 40  # of a histogram
NEAREST = 6  # pairs shown on either side of a threshold
NGRAMS = 20

_STYLE = """
.bar { background: var(--accent); height: .9rem } h3 { margin: 1.6rem 0 .3rem } figure img { display: block }
.row { display: flex; flex-wrap: wrap; gap: .6rem } figure { width: 8.5rem; font-size: .8rem }
figure img { max-width: 96px; max-height: 96px; border: 1px solid var(--line) }
figure.clip { width: 25rem } figure.clip img { max-width: 400px; max-height: 120px }
svg rect { fill: var(--accent) } svg text { fill: currentColor; font-size: 12px } svg line { stroke: #c33 }
svg text.threshold { fill: #c33 }
"""


@dataclass
class _Threshold:
    """A rule's threshold, and the nearest pairs that it alone decides about: (id, value), nearest first."""

    title: str
    rule: ThresholdRule
    dropped: list[tuple[str, float]]
    kept: list[tuple[str, float]]


@dataclass
class _Contents:
    """What the report shows, before it becomes HTML.

    Attributes:
        funnel: (label, number of pairs) before each step and at the end.
        ngrams: (n-gram, captions with it before, after the resampling).
        duplicates_summary: of `near_duplicates.summarize`; empty without that step.
        tables: HTML.
    """

    funnel: list[tuple[str, int]] = field(default_factory=list)
    thresholds: list[_Threshold] = field(default_factory=list)
    ngrams: list[tuple[str, int, int]] = field(default_factory=list)
    duplicates_summary: list[str] = field(default_factory=list)
    least_similar: list[Duplicate] = field(default_factory=list)
    components: list[Component] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    @property
    def ids(self) -> set[str]:
        """Of all pairs that are shown."""
        of_thresholds = {pair for one in self.thresholds for pair, _ in one.dropped + one.kept}
        of_duplicates = {pair for one in self.least_similar for pair in (one.dropped, one.survivor)}
        return of_thresholds.union(of_duplicates, *(component.ids for component in self.components))


def write_report(work: Path, locate: Locate = Path) -> None:
    """Writes `work/report.html` about the last decision of a finished run.

    Args:
        locate: maps the path of a source in the configuration to its local path.

    Raises:
        UserError: the folder holds no finished run.
    """
    _, config = read_run(work)
    steps, sources = deciding_steps_of(work, config, locate), located_sources(config, locate)
    contents = _Contents()
    for decided in walk(work / "set", steps):
        contents.funnel.append((f"before {decided.step.name}", decided.pairs.num_rows))
        _add_step(contents, work, decided)
        if isinstance(decided.step, CaptionRules):
            found = confusions(work / "set", decided.step, [source for source, _ in sources.values()])
            contents.tables.append(confusions_html(found))
    contents.funnel.append(("kept", len(decided.ids_left)))
    faces_steps = [step for step in steps if isinstance(step, Faces)]
    thumbnails = Thumbnails(work / "set", sources, config.svg_size, contents.ids, faces_steps)
    body = [
        f"<h1>{contents.funnel[0][1]:,} pairs, {contents.funnel[-1][1]:,} kept</h1>",
        _funnel_html(contents.funnel),
        "<h2>Decisions</h2>",
        _decisions_html(stats(work)),
        "<h2>Thresholds</h2>",
        *(_threshold_html(threshold, thumbnails) for threshold in contents.thresholds),
        duplicates_html(contents.duplicates_summary, contents.least_similar, thumbnails.figure),
        components_html(contents.components, thumbnails.figure),
        *contents.tables,
        _ngrams_html(contents.ngrams),
    ]
    html.write_page(work / REPORT_NAME, html.page(f"{work.name}: curation", body, _STYLE))


def _add_step(contents: _Contents, work: Path, decided: Decided) -> None:
    step, pairs, verdicts = decided
    state = work / "set" / step.name
    rules = step.rules(pairs, state)
    for rule in rules:
        if isinstance(rule, ThresholdRule) and np.isfinite(rule.values).any():
            contents.thresholds.append(_threshold(step, rule, rules, pairs))
    if isinstance(step, NearDuplicates):
        contents.duplicates_summary = summarize(verdicts, state)
        contents.least_similar = least_similar(pairs, verdicts)
        contents.components = components(pairs, verdicts)
        contents.tables.append(canaries_html(measure_canaries(work, reported_thresholds(step)), step.threshold))
    if isinstance(step, Resampling):
        contents.ngrams = _most_reduced(step, pairs, rules)


def _threshold(step: Step, rule: ThresholdRule, rules: Sequence[Rule], pairs: pa.Table) -> _Threshold:
    """Chooses pairs that no other rule of the step drops, so that this threshold alone decides about them."""
    others = [other.fails for other in rules if other is not rule]
    is_decisive = np.isfinite(rule.values) & ~np.logical_or.reduce([np.zeros(pairs.num_rows, bool), *others])
    rows = np.flatnonzero(is_decisive) if rule.shows_pictures else np.zeros(0, np.int64)
    rows = rows[np.argsort(np.abs(rule.values[rows] - rule.threshold), kind="stable")]

    def nearest(chosen: np.ndarray) -> list[tuple[str, float]]:
        return [(pairs["id"][int(row)].as_py(), float(rule.values[row])) for row in chosen[:NEAREST]]

    dropped, kept = nearest(rows[rule.fails[rows]]), nearest(rows[~rule.fails[rows]])
    return _Threshold(f"{step.name}.{rule.option}: {rule.reason}", rule, dropped, kept)


def _most_reduced(step: Resampling, pairs: pa.Table, rules: Sequence[Rule]) -> list[tuple[str, int, int]]:
    """(n-gram, captions with it before, after) of the n-grams that lose most captions."""
    lists, size = pairs["ngrams"].combine_chunks(), len(step.vocabulary.ngrams)
    is_kept = ~np.logical_or.reduce([rule.fails for rule in rules])
    before, after = frequencies(lists, size), frequencies(lists.filter(pa.array(is_kept)), size)
    order = np.argsort(after - before, kind="stable")[:NGRAMS]
    return [(step.vocabulary.ngrams[i], int(before[i]), int(after[i])) for i in order if before[i] > after[i]]


def _funnel_html(funnel: Sequence[tuple[str, int]]) -> str:
    total = max(funnel[0][1], 1)
    rows = [
        (
            label,
            f"{count:,}",
            f"{count / total:.1%}",
            html.Markup(
                f'<div style="width: 30rem"><div class="bar" style="width: {100 * count / total:.2f}%"></div></div>'
            ),
        )
        for label, count in funnel
    ]
    return html.table(("", "pairs", "share", ""), rows, number_columns=(1, 2))


def _decisions_html(rows: Sequence[tuple[str, str, str, int]]) -> str:
    cells = [(f"{count:,}", step, decision, reason) for step, decision, reason, count in rows]
    return html.table(("pairs", "step", "decision", "reason"), cells, number_columns=(0,))


def _threshold_html(threshold: _Threshold, thumbnails: Thumbnails) -> str:
    sides = [
        f'<p class="{style}">{label}, nearest to the threshold</p><div class="row">'
        f"{''.join(thumbnails.figure(*pair) for pair in pairs)}</div>"
        for style, label, pairs in (("bad", "dropped", threshold.dropped), ("good", "kept", threshold.kept))
        if pairs
    ]
    return f"<h3>{html.escape(threshold.title)}</h3>{_histogram(threshold.rule)}{''.join(sides)}"


def _histogram(rule: ThresholdRule) -> str:
    """An SVG; counts are on a logarithmic scale, since most pairs are far from any threshold; the red line marks it."""
    values = rule.values[np.isfinite(rule.values)]
    low, high = min(values.min(), rule.threshold), max(values.max(), rule.threshold)
    high = high if high > low else low + 1
    counts, _ = np.histogram(values, BINS, (low, high))
    width, height = 640, 120
    highest = np.log1p(counts.max())
    bars = []
    for index, count in enumerate(counts):
        if count:
            x, bar_height, bar_width = width * index / BINS, height * np.log1p(count) / highest, width / BINS - 1
            box = f'x="{x:.1f}" y="{height - bar_height:.1f}" width="{bar_width:.1f}" height="{bar_height:.1f}"'
            bars.append(f"<rect {box}><title>{count:,}</title></rect>")
    x = width * (rule.threshold - low) / (high - low)
    label_y = height + (30 if min(x, width - x) < 60 else 16)  # near an end, below that end's number
    anchor = "start" if x < 60 else "end" if width - x < 60 else "middle"
    return (
        f'<svg viewBox="-4 -4 {width + 8} {height + 38}" width="{width}" role="img">{"".join(bars)}'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="-4" y2="{height}" stroke-width="2"/>'
        f'<text y="{height + 16}">{low:.4g}</text>'
        f'<text x="{width}" y="{height + 16}" text-anchor="end">{high:.4g}</text>'
        f'<text class="threshold" x="{x:.1f}" y="{label_y}" text-anchor="{anchor}">{rule.threshold:.4g}</text></svg>'
    )


def _ngrams_html(ngrams: Sequence[tuple[str, int, int]]) -> str:
    if not ngrams:
        return ""
    rows = [(ngram, f"{before:,}", f"{after:,}") for ngram, before, after in ngrams]
    table = html.table(("n-gram", "captions before", "after"), rows, number_columns=(1, 2))
    return f"<h2>N-grams that lost most captions</h2>{table}"
