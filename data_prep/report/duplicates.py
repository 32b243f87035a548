"""The part of the report about near duplicates: the least similar pairs, components, and canaries."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.pipeline.canaries import EXPLANATION, CanaryResult, result_rows
from foundation import html

LEAST_SIMILAR = 12  # dropped pairs shown with their survivors
COMPONENTS = 8  # shown, the largest
SURVIVORS, DROPPED = 3, 5  # shown of a component, and of the pairs that were dropped for each survivor
SIZES = (2, 3, 6, 21, 101)  # lower ends of the bins in which component sizes are counted

Figure = Callable[[str, float], str]  # (id, value) -> HTML


@dataclass(frozen=True)
class Duplicate:
    """A dropped pair, the pair that survived for it, and their similarity."""

    dropped: str
    survivor: str
    similarity: float


@dataclass(frozen=True)
class Component:
    """A connected component of near duplicates.

    Attributes:
        size: number of pairs, survivors included.
        lowest: the lowest similarity of a dropped pair to its survivor.
        shown: (survivor, the pairs dropped for it with their similarity, least similar first, each picture once).
    """

    size: int
    lowest: float
    shown: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]

    @property
    def ids(self) -> set[str]:
        return {pair for survivor, dropped in self.shown for pair in (survivor, *(pair for pair, _ in dropped))}


def least_similar(pairs: pa.Table, verdicts: pa.Table) -> list[Duplicate]:
    """The dropped pairs that are least similar to their survivor; a picture once for each survivor.

    Args:
        pairs: that the step decided about.
        verdicts: of the step.
    """
    shown: dict[tuple[str, str], Duplicate] = {}
    for duplicate, image_id, _ in _dropped(pairs, verdicts):
        if len(shown) == LEAST_SIMILAR:
            break
        shown.setdefault((image_id, duplicate.survivor), duplicate)
    return list(shown.values())


def components(pairs: pa.Table, verdicts: pa.Table) -> list[Component]:
    """The components of a decision, largest first; those after COMPONENTS show no pairs.

    Args:
        pairs: that the step decided about.
        verdicts: of the step.
    """
    image_of: dict[str, str] = {}
    groups: dict[str, dict[str, list[tuple[str, float]]]] = {}  # component -> survivor -> (dropped, similarity)
    for duplicate, image_id, component in _dropped(pairs, verdicts):
        image_of[duplicate.dropped] = image_id
        by_survivor = groups.setdefault(component, {})
        by_survivor.setdefault(duplicate.survivor, []).append((duplicate.dropped, duplicate.similarity))
    found: list[Component] = []
    for by_survivor in sorted(groups.values(), key=lambda group: -_size(group)):
        largest = sorted(by_survivor.items(), key=lambda item: -len(item[1]))
        largest = largest[: SURVIVORS if len(found) < COMPONENTS else 0]
        shown = tuple((survivor, _of_each_picture(dropped, image_of)[:DROPPED]) for survivor, dropped in largest)
        lowest = min(dropped[0][1] for dropped in by_survivor.values())
        found.append(Component(_size(by_survivor), lowest, shown))
    return found


def _dropped(pairs: pa.Table, verdicts: pa.Table) -> Iterator[tuple[Duplicate, str, str]]:
    """Yields (duplicate, image_id of the dropped pair, component), least similar first."""
    dropped = verdicts.filter(pc.field("decision") == "drop")
    dropped = dropped.sort_by([("similarity", "ascending"), ("row", "ascending")])
    ids = pairs["id"].take(dropped["row"]).to_pylist()
    image_ids = pairs["image_id"].take(dropped["row"]).to_pylist()
    columns = (dropped[name].to_pylist() for name in ("survivor_id", "similarity", "component_id"))
    for pair, image_id, survivor, similarity, component in zip(ids, image_ids, *columns, strict=True):
        yield Duplicate(pair, survivor, similarity), image_id, component


def _size(by_survivor: dict[str, list[tuple[str, float]]]) -> int:
    return sum(1 + len(dropped) for dropped in by_survivor.values())


def _of_each_picture(pairs: list[tuple[str, float]], image_of: dict[str, str]) -> tuple[tuple[str, float], ...]:
    """The first pair of each picture."""
    first: dict[str, tuple[str, float]] = {}
    for pair in pairs:
        first.setdefault(image_of[pair[0]], pair)
    return tuple(first.values())


def duplicates_html(summary: Sequence[str], duplicates: Sequence[Duplicate], figure: Figure) -> str:
    """The least similar pairs; empty where the run has no step of near duplicates."""
    if not summary:
        return ""
    figures = [
        f'<div class="row">{figure(one.dropped, one.similarity)}{figure(one.survivor, 1.0)}</div>' for one in duplicates
    ]
    lines = "<br>".join(html.escape(line) for line in summary)
    title = "Least similar pairs: the dropped pair, and the pair that survives for it."
    return f'<h2>Near duplicates</h2><p>{lines}</p><p>{title}</p><div class="row">{"".join(figures)}</div>'


def components_html(found: Sequence[Component], figure: Figure) -> str:
    """How many components there are of each size, and pairs of the largest ones."""
    if not found:
        return ""
    sizes = np.array([component.size for component in found])
    rows = []
    for low, high in zip(SIZES, (*SIZES[1:], None), strict=True):
        count = int(((sizes >= low) & (sizes < (high or sizes.max() + 1))).sum())
        name = f"{low}" if high == low + 1 else f"{low} to {high - 1}" if high else f"{low} or more"
        rows.append((name, f"{count:,}"))
    parts = ["<h3>Components</h3>", html.table(("pairs", "components"), rows, number_columns=(1,))]
    for component in found[:COMPONENTS]:
        lowest = f"lowest similarity of a dropped pair to its survivor: {component.lowest:.4f}"
        parts.append(f"<p>{component.size:,} pairs; {lowest}</p>")
        for survivor, dropped in component.shown:
            parts.append(
                f'<div class="row"><div class="good">kept{figure(survivor, 1.0)}</div>'
                f"{''.join(figure(*pair) for pair in dropped)}</div>"
            )
    return "".join(parts)


def canaries_html(results: Sequence[CanaryResult], threshold: float) -> str:
    """A table with a column for each threshold; the one in force is bold."""
    if not results:
        return ""

    def cell(text: str, result: CanaryResult) -> str:
        return html.Markup(f"<b>{text}</b>") if result.threshold == threshold else text

    header = ["threshold", *(cell(f"{result.threshold:.4g}", result) for result in results)]
    rows = [
        [label, *(cell(f"{value:.1%}", result) for value, result in zip(values, results, strict=True))]
        for label, values in result_rows(results)
    ]
    table = html.table(header, rows, number_columns=range(1, len(header)))
    return f"<h2>Canaries</h2><p>{html.escape(EXPLANATION)}</p>{table}"
