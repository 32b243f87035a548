"""The part of a run's report that is about near duplicates: components side by side, and what canaries say of them."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.pipeline.canaries import ABOUT, Measured, rows_of

COMPONENTS = 8  # shown, the largest
STAY, GO = 3, 5  # pairs shown of a component that stay, and that go for each of them
SIZES = (2, 3, 6, 21, 101)  # component sizes are counted from each of these to the next

Figure = Callable[[str, float], str]


@dataclass(frozen=True)
class Component:
    """Pairs that are near duplicates of one another, by way of others too.

    Attributes:
        size: how many, those that stay among them.
        smallest: similarity between a pair that goes and the one that stays for it.
        shown: (pair that stays, pairs that go for it with their similarity, least alike first, each picture once).
    """

    size: int
    smallest: float
    shown: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]

    @property
    def ids(self) -> set[str]:
        return {pair for stays, gone in self.shown for pair in (stays, *(one for one, _ in gone))}


def components(pairs: pa.Table, said: pa.Table) -> list[Component]:
    """The components of a decision, largest first; those after COMPONENTS show no pairs.

    Args:
        pairs: that the step decided about.
        said: its VERDICTS.
    """
    gone = said.filter(pc.field("decision") == "drop").sort_by([("similarity", "ascending"), ("row", "ascending")])
    ids = pairs["id"].take(gone["row"]).to_pylist()
    picture_of = dict(zip(ids, pairs["image_id"].take(gone["row"]).to_pylist(), strict=True))
    groups: dict[str, dict[str, list[tuple[str, float]]]] = {}
    columns = (gone[name].to_pylist() for name in ("component_id", "survivor_id", "similarity"))
    for pair, component, stays, similarity in zip(ids, *columns, strict=True):
        groups.setdefault(component, {}).setdefault(stays, []).append((pair, similarity))
    found = []
    for of in sorted(groups.values(), key=lambda group: -sum(1 + len(some) for some in group.values())):
        largest = sorted(of.items(), key=lambda one: -len(one[1]))[: STAY if len(found) < COMPONENTS else 0]
        shown = tuple((stays, _of_each_picture(some, picture_of)[:GO]) for stays, some in largest)
        size = sum(1 + len(some) for some in of.values())
        found.append(Component(size, min(some[0][1] for some in of.values()), shown))
    return found


def _of_each_picture(pairs: list[tuple[str, float]], picture_of: dict[str, str]) -> tuple[tuple[str, float], ...]:
    """The first pair of each picture."""
    first: dict[str, tuple[str, float]] = {}
    for pair in pairs:
        first.setdefault(picture_of[pair[0]], pair)
    return tuple(first.values())


def components_html(found: Sequence[Component], figure: Figure) -> str:
    if not found:
        return ""
    sizes = np.array([one.size for one in found])
    rows = []
    for low, high in zip(SIZES, (*SIZES[1:], None), strict=True):
        count = int(((sizes >= low) & (sizes < (high or sizes.max() + 1))).sum())
        name = f"{low}" if high == low + 1 else f"{low} to {high - 1}" if high else f"{low} or more"
        rows.append(f"<tr><td>{name}<td class=n>{count:,}")
    parts = [f"<h3>Components</h3><table><tr><th>pairs<th>components</tr>{''.join(rows)}</table>"]
    for one in found[:COMPONENTS]:
        parts.append(f"<p>{one.size:,} pairs; smallest similarity to the pair that stays: {one.smallest:.4f}")
        for stays, gone in one.shown:
            parts.append(
                f"<div class=border><div class=kept>stays{figure(stays, 1.0)}</div>"
                f"{''.join(figure(*pair) for pair in gone)}</div>"
            )
    return "".join(parts)


def canaries_html(measured: Sequence[Measured], threshold: float) -> str:
    """A column for each threshold, that in force in bold."""
    if not measured:
        return ""
    names = "".join(f"<th>{_bold(f'{one.threshold:.4g}', one.threshold == threshold)}" for one in measured)
    rows = [
        f"<tr><td>{html.escape(name)}"
        + "".join(
            f"<td class=n>{_bold(f'{value:.1%}', one.threshold == threshold)}"
            for value, one in zip(values, measured, strict=True)
        )
        for name, values in rows_of(measured)
    ]
    return f"<h2>Canaries</h2><p>{html.escape(ABOUT)}<table><tr><th>threshold{names}</tr>{''.join(rows)}</table>"


def _bold(text: str, is_bold: bool) -> str:
    return f"<b>{text}</b>" if is_bold else text
