"""The report of a run: one HTML file that opens without a server, with what was removed and what is at the border.

Pictures of quarantined pairs are in none of it: the steps that quarantine come before those whose pairs are shown here,
and the NSFW score shows its histogram alone. Faces are blurred as in the shards, also in pictures that were dropped.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.pipeline.canaries import measure_canaries, thresholds_beside
from data_prep.pipeline.curation import deciding_steps_of, places_of, read_run
from data_prep.pipeline.deciding import walk
from data_prep.pipeline.ledger import stats
from data_prep.pipeline.pool import Places, read_again
from data_prep.report.contact_sheets import FRAMES, contact_sheet
from data_prep.report.duplicates import canaries_html, components, components_html
from data_prep.report.language_confusion import Confusion, confusions
from data_prep.sources.files import Locate
from data_prep.steps.caption_rules import CaptionRules
from data_prep.steps.clips import read_clip
from data_prep.steps.faces import Faces
from data_prep.steps.near_duplicates import NearDuplicates, describe
from data_prep.steps.resampling import Resampling, frequencies
from data_prep.steps.step import Rule, Step
from vision.reading import read_picture

REPORT_NAME = "report.html"
BINS = 40
AT_THE_BORDER = 6  # pairs shown on either side of a threshold
THUMBNAIL = 96  # px
NGRAMS = 20
WORST = 10  # languages
TWINS = 12  # near duplicates shown beside what stays for them

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .15rem .7rem .15rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } .bar { background: #4a7fb5; height: .9rem }
.border { display: flex; flex-wrap: wrap; gap: .6rem } figure { width: 8.5rem; margin: 0; font-size: .8rem }
figure img { max-width: 96px; max-height: 96px; border: 1px solid #ccc; display: block }
figure.clip { width: 25rem } figure.clip img { max-width: 400px; max-height: 120px }
h3 { margin: 1.6rem 0 .3rem } .dropped { color: #a33 } .kept { color: #276 }
@media (prefers-color-scheme: dark) { body { background: #1a1a1a; color: #ddd } }
"""


@dataclass
class _Dial:
    """A rule's threshold, and the pairs nearest to it that it alone decides about: (id, value), nearest first."""

    title: str
    rule: Rule
    dropped: list[tuple[str, float]]
    kept: list[tuple[str, float]]


def write_report(work: Path, locate: Locate = Path) -> None:
    """Writes `work/report.html` about the last decision of a finished run.

    Args:
        locate: maps the path of a source in the configuration to its local path.

    Raises:
        UserError: there is no finished run in the folder.
    """
    _, config = read_run(work)
    steps, sources, svg_size = deciding_steps_of(work, config, locate), places_of(config, locate), config.svg_size
    funnel, dials, ngrams, duplicates, twins, groups, tables = [], [], [], [], [], [], []
    for step, pairs, said in walk(work / "set", steps):
        funnel.append((step.name if step is not None else "kept", pairs.num_rows))
        if step is None:
            break
        rules = step.rules(pairs, work / "set" / step.name)
        dials += [_dial(step, rule, rules, pairs) for rule in rules if rule.option]
        if isinstance(step, NearDuplicates):
            duplicates, twins = describe(said, work / "set" / step.name), _least_alike(pairs, said)
            groups = components(pairs, said)
            tables.append(canaries_html(measure_canaries(work, thresholds_beside(step)), step.threshold))
        if isinstance(step, CaptionRules):
            tables.append(confusions_html(confusions(work / "set", step, [source for source, _ in sources.values()])))
        if isinstance(step, Resampling):
            ngrams = _most_thinned(step, pairs, rules)
    dials = [dial for dial in dials if np.isfinite(dial.rule.values).any()]
    ids = {pair for dial in dials for pair, _ in dial.dropped + dial.kept} | {pair for two in twins for pair in two[:2]}
    ids |= {pair for group in groups for pair in group.ids}
    shown = _Pictures(work / "set", sources, svg_size, ids, [step for step in steps if isinstance(step, Faces)])
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(work.name)}: curation</title>",
        f"<style>{_STYLE}</style><h1>{funnel[0][1]:,} pairs, {funnel[-1][1]:,} kept</h1>",
        _funnel(funnel),
        "<h2>What became of them</h2>",
        _reasons(stats(work)),
        "<h2>Thresholds</h2>",
        *(_section(dial, shown) for dial in dials),
        _twins(duplicates, twins, shown),
        components_html(groups, shown.figure),
        *tables,
        _ngram_table(ngrams),
    ]
    temporary = work / f".{REPORT_NAME}.new"
    temporary.write_text("\n".join(parts), encoding="utf-8")
    temporary.replace(work / REPORT_NAME)


def _dial(step: Step, rule: Rule, rules: Sequence[Rule], pairs: pa.Table) -> _Dial:
    """Shows pairs that no other rule of the step drops: this threshold alone decides about them."""
    others = [other.fails for other in rules if other is not rule]
    decides = np.isfinite(rule.values) & ~np.logical_or.reduce([np.zeros(pairs.num_rows, bool), *others])
    rows = np.flatnonzero(decides)
    rows = rows[np.argsort(np.abs(rule.values[rows] - rule.threshold), kind="stable")]

    def nearest(chosen: np.ndarray) -> list[tuple[str, float]]:
        return [(pairs["id"][int(row)].as_py(), float(rule.values[row])) for row in chosen[:AT_THE_BORDER]]

    rows = rows[: len(rows) * rule.shown]
    dropped, kept = nearest(rows[rule.fails[rows]]), nearest(rows[~rule.fails[rows]])
    return _Dial(f"{step.name}.{rule.option}: {rule.reason}", rule, dropped, kept)


def _most_thinned(step: Resampling, pairs: pa.Table, rules: list[Rule]) -> list[tuple[str, int, int]]:
    """(n-gram, captions with it before, after) of those that lose most captions."""
    lists, size = pairs["ngrams"].combine_chunks(), len(step.vocabulary.ngrams)
    stays = ~np.logical_or.reduce([rule.fails for rule in rules])
    before, after = frequencies(lists, size), frequencies(lists.filter(pa.array(stays)), size)
    most = np.argsort(after - before, kind="stable")[:NGRAMS]
    return [(step.vocabulary.ngrams[n], int(before[n]), int(after[n])) for n in most if before[n] > after[n]]


class _Pictures:
    """Thumbnails and captions of some pairs; faces are blurred where they are in what is written."""

    def __init__(
        self,
        folder: Path,
        sources: Places,
        svg_size: int,
        ids: set[str],
        finishing: Sequence[Faces],
    ):
        wanted = pc.field("id").isin(pa.array(sorted(ids), pa.string()))
        self._captions = {
            row["id"]: row["caption"]
            for row in pq.read_table(folder / "pairs.parquet", columns=["id", "caption"], filters=wanted).to_pylist()
        }
        self._places = {
            row["id"]: row for row in pq.read_table(folder / "sources.parquet", filters=wanted).to_pylist()[::-1]
        }
        self._sources, self._svg_size, self._finishing = sources, svg_size, finishing
        self._of_clips = any(source.media == "clips" for source, _ in sources.values())
        self._faces: dict[str, list] = {}
        if finishing:
            images = pa.array({row["image_id"] for row in self._places.values()}, pa.string())
            found = pq.read_table(
                folder / "pictures.parquet", columns=["image_id", "faces"], filters=pc.field("image_id").isin(images)
            )
            self._faces = {row["image_id"]: row["faces"] for row in found.to_pylist()}

    def figure(self, pair: str, value: float) -> str:
        caption = html.escape((self._captions.get(pair) or "")[:120])
        kind = " class=clip" if self._of_clips else ""
        return f"<figure{kind}>{self._image(pair)}<b>{value:.4g}</b> {caption}<br><small>{pair[:12]}</small></figure>"

    def _image(self, pair: str) -> str:
        row = self._places[pair]
        try:
            data = read_again(row, self._sources)
            if self._of_clips:
                picture = contact_sheet(read_clip(data, FRAMES), THUMBNAIL)
            else:
                picture = read_picture(data, svg_size=min(self._svg_size, THUMBNAIL), svg_fonts=False)
        except ValueError:  # the pool has changed since
            return ""
        if not self._of_clips:
            for step in self._finishing:
                picture = step.shown(picture, self._faces.get(row["image_id"]))
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        picture.save(out, "WEBP", quality=70)
        return f"<img alt='' src='data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}'>"


def _funnel(funnel: list[tuple[str, int]]) -> str:
    whole = max(funnel[0][1], 1)
    rows = [
        f"<tr><td>{'before ' * (name != 'kept')}{html.escape(name)}<td class=n>{count:,}<td class=n>{count / whole:.1%}"
        f"<td style='width:30rem'><div class=bar style='width:{100 * count / whole:.2f}%'></div>"
        for name, count in funnel
    ]
    return f"<table>{''.join(rows)}</table>"


def _reasons(rows: list[tuple[str, str, str, int]]) -> str:
    lines = [
        f"<tr><td class=n>{count:,}<td>{html.escape(step)}<td>{decision}<td>{html.escape(reason)}"
        for step, decision, reason, count in rows
    ]
    return f"<table><tr><th>pairs<th>step<th>decision<th>reason</tr>{''.join(lines)}</table>"


def _section(dial: _Dial, shown: _Pictures) -> str:
    sides = [
        f"<p class={name}>{name}, nearest to the threshold</p><div class=border>"
        f"{''.join(shown.figure(*pair) for pair in pairs)}</div>"
        for name, pairs in (("dropped", dial.dropped), ("kept", dial.kept))
        if pairs
    ]
    return f"<h3>{html.escape(dial.title)}</h3>{_histogram(dial.rule)}{''.join(sides)}"


def _histogram(rule: Rule) -> str:
    """Counts on a logarithmic scale, since most pairs lie far from any threshold; the threshold is the red line."""
    values = rule.values[np.isfinite(rule.values)]
    low, high = min(values.min(), rule.threshold), max(values.max(), rule.threshold)
    high = high if high > low else low + 1
    counts, _ = np.histogram(values, BINS, (low, high))
    width, height = 640, 120
    tallest = np.log1p(counts.max())
    bars = []
    for number, count in enumerate(counts):
        x, tall, wide = width * number / BINS, height * np.log1p(count) / tallest, width / BINS - 1
        if count:
            place = f"x={x:.1f} y={height - tall:.1f} width={wide:.1f} height={tall:.1f}"
            bars.append(f"<rect {place}><title>{count:,}</title></rect>")
    x = width * (rule.threshold - low) / (high - low)
    line = 30 if min(x, width - x) < 60 else 16  # below the numbers of the ends, where it would lie over one
    anchor = "start" if x < 60 else "end" if width - x < 60 else "middle"
    return (
        f"<svg viewBox='-4 -4 {width + 8} {height + 38}' width={width} role=img><g fill=#4a7fb5>{''.join(bars)}</g>"
        f"<line x1={x:.1f} x2={x:.1f} y1=-4 y2={height} stroke=#c33 stroke-width=2 />"
        f"<g fill=currentColor font-size=12><text y={height + 16}>{low:.4g}</text>"
        f"<text x={width} y={height + 16} text-anchor=end>{high:.4g}</text>"
        f"<text x={x:.1f} y={height + line} text-anchor={anchor} fill=#c33>{rule.threshold:.4g}</text></g></svg>"
    )


def _least_alike(pairs: pa.Table, said: pa.Table) -> list[tuple[str, str, float]]:
    """(pair that goes, pair that stays for it, their similarity), those least alike first; two pictures once."""
    gone = said.filter(pc.field("decision") == "drop").sort_by([("similarity", "ascending"), ("row", "ascending")])
    ids = pairs["id"].take(gone["row"])
    pictures = pairs["image_id"].take(gone["row"]).to_pylist()
    shown: dict[tuple[str, str], tuple[str, str, float]] = {}
    for number, stays in enumerate(gone["survivor_id"].to_pylist()):
        if len(shown) == TWINS:
            break
        shown.setdefault((pictures[number], stays), (ids[number].as_py(), stays, gone["similarity"][number].as_py()))
    return list(shown.values())


def _twins(lines: list[str], twins: list[tuple[str, str, float]], shown: _Pictures) -> str:
    if not lines:
        return ""
    both = [
        f"<div class=border>{shown.figure(gone, similarity)}{shown.figure(stays, 1.0)}</div>"
        for gone, stays, similarity in twins
    ]
    head = "<h2>Near duplicates</h2><p>" + "<br>".join(map(html.escape, lines))
    return f"{head}<p>Least alike: what goes, and what stays for it.</p><div class=border>{''.join(both)}</div>"


def _ngram_table(ngrams: list[tuple[str, int, int]]) -> str:
    if not ngrams:
        return ""
    rows = [f"<tr><td>{html.escape(name)}<td class=n>{before:,}<td class=n>{after:,}" for name, before, after in ngrams]
    head = "<tr><th>n-gram<th>captions before<th>after</tr>"
    return f"<h2>N-grams that lost most captions</h2><table>{head}{''.join(rows)}</table>"


def confusions_html(found: Sequence[Confusion]) -> str:
    """A table for each length of caption."""
    parts = ["<h2>Language of captions, on labelled lines that were held out</h2>"] if found else []
    for one in found:
        worst = ", ".join(f"{name} {kept:,} of {lines:,}" for name, lines, kept in one.languages[:WORST] if kept)
        parts.append(
            f"<h3>{html.escape(one.length)}, threshold {one.threshold:.4g}</h3>"
            "<table><tr><th><th>kept<th>dropped</tr>"
            f"<tr><td>wanted languages<td class=n>{one.wanted_kept:,}<td class=n>{one.wanted_dropped:,}"
            f"<tr><td>all others<td class=n>{one.others_kept:,}<td class=n>{one.others_dropped:,}</table>"
            f"<p>most kept of: {html.escape(worst) or 'none'}"
        )
    return "".join(parts)
