"""What a curation step is: a pure map over columns, and a decision over the stored columns of the whole set.

The walk: `ingest` reads the pool -> `measuring` runs every step's `measure` and stores what it says -> `merging` puts
the parts in the order of ids, and each step's `merge` may build what needs the whole set (an index, edges, counts) ->
`deciding` asks one step after another which pairs go -> `writing`. Measuring is done once; deciding, as often as liked.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from foundation.errors import UserError

STORED = 2  # raised when the same settings come to store something else: what was stored before is made anew

DECIMALS = 6  # of every stored score

Columns = dict[str, list]  # a batch: column name -> one value per row

STAYS = ("change", "note")  # it is written otherwise than it was read; there is something to know about it
DECISIONS = ("drop", "quarantine", *STAYS)

VERDICTS = pa.schema(
    [
        ("row", pa.int64()),  # of the table that was judged
        ("decision", pa.string()),  # one of DECISIONS
        ("reason", pa.string()),  # a colon parts what reasons are counted by from what differs between pairs
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("survivor_id", pa.string()),
        ("similarity", pa.float64()),
        ("component_id", pa.string()),
    ]
)


@dataclasses.dataclass
class Draft:
    """A kept pair on its way into a shard.

    Attributes:
        picture: RGB, as read; where a step puts another in its place, that one is written.
        caption: as it is written.
        columns: further ones of the index, name -> number, text, or list of equally long lists of numbers.
    """

    picture: Image.Image
    caption: str
    columns: dict


class Step:
    """The base of all steps; a step's own fields are its settings, and it keeps no other state.

    Attributes:
        name: as in the ledger and the configuration.
        over: what `measure` sees the rows of, each of them once: "pictures" (columns image_id, picture (RGB), width,
            height), "clips" (the same and clip), "captions" (caption), or "pairs" (id, image_id, caption, picture,
            clip); None: nothing is measured. A clip is a clips.ShownClip, and its picture the frame in its middle.
        adds: the columns that `measure` gives, with their types. Names are unique among all steps.
        reads: the stored columns that `decide` wants, of pictures and of pairs; `id` comes with them always.
        finishes: the stored columns that `finish` wants; None: the step has no say in how kept pairs are written.
        hides: `passes` keeps pictures from all later steps.
    """

    name: str
    over: str | None = None
    adds: dict[str, pa.DataType] = {}  # noqa: RUF012 (a class's own, never changed)
    reads: tuple[str, ...] = ()
    finishes: tuple[str, ...] | None = None
    hides: bool = False

    def settings(self) -> dict:
        """All that the step's decisions depend on besides the data, as JSON can say it."""
        return dataclasses.asdict(self)

    def measured_by(self) -> dict:
        """The part of the settings that `measure` and `merge` depend on: where it differs, they are done anew."""
        return {}

    def merged_by(self) -> dict:
        """What `merge` depends on besides: where it differs, that alone is done anew."""
        return {}

    def measure(self, batch: Columns) -> Columns:
        """`adds` for each row of the batch: a pure function of each row alone, whatever the batch."""
        return {}

    def passes(self, measured: Columns) -> list[bool] | None:
        """Which pictures may be looked at further; None: all. For pictures that nobody is to see."""
        return None

    def merge(self, stored: Path, state: Path) -> None:
        """Makes of the whole set what `decide` finds in the folder `state`.

        Args:
            stored: folder of pairs.parquet and sources.parquet, by id, and pictures.parquet, by image_id.
        """

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        """VERDICTS over the pairs that no earlier step took out: the columns `reads` and `id`, in the order of ids."""
        return first_failing(self.rules(pairs, state))

    def rules(self, pairs: pa.Table, state: Path) -> list["Rule"]:
        """The rules that `decide` goes by, in their order; forecasts and the report show what their thresholds do."""
        return []

    def finish(self, row: dict, draft: Draft) -> None:
        """Changes how one kept pair is written: a pure function of the pair alone.

        Args:
            row: the columns `finishes` of the pair.
        """

    def refuse(self, measured: "Step") -> None:
        """Raises UserError where these settings ask for what a run with those of `measured` has not stored."""
        old = {**measured.measured_by(), **measured.merged_by()}
        names = [name for name, value in {**self.measured_by(), **self.merged_by()}.items() if old.get(name) != value]
        if names:
            raise UserError(
                f"{self.name}: {', '.join(names)} cannot be changed without `mm data run`, which measures by it"
            )


def settings_hash(settings: dict) -> str:
    """16 hexadecimal digits of the SHA-256 of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A numeric column; nulls are NaN, or 0 among integers."""
    if pa.types.is_floating(column.type):
        return column.to_numpy()
    return column.fill_null(0).to_numpy()


def no_verdicts() -> pa.Table:
    return VERDICTS.empty_table()


@dataclasses.dataclass
class Rule:
    """One reason to drop.

    Attributes:
        reason: as in the ledger.
        fails: of which rows it is true.
        option: the setting that holds the threshold, where there is one.
        values: what is held against the threshold, float64; NaN where the rule does not look.
        threshold: the setting.
        at_least: values below the threshold fail, otherwise those above it.
        strict: a value equal to the threshold fails as well.
        highest: that the setting may be.
        shown: the report may show pictures near the threshold.
    """

    reason: str
    fails: np.ndarray
    option: str | None = None
    values: np.ndarray | None = None
    threshold: float | None = None
    at_least: bool = True
    strict: bool = False
    highest: float = np.inf
    shown: bool = True


def at_least(option: str, threshold: float, values: np.ndarray, reason: str, among: np.ndarray | None = None) -> Rule:
    """The rule that values be at least the threshold, for some of the rows or for all of them."""
    values = values.astype(np.float64) if among is None else np.where(among, values, np.nan)
    return Rule(reason, values < threshold, option, values, threshold)


def at_most(option: str, threshold: float, values: np.ndarray, reason: str, among: np.ndarray | None = None) -> Rule:
    """The rule that values be at most the threshold."""
    values = values.astype(np.float64) if among is None else np.where(among, values, np.nan)
    return Rule(reason, values > threshold, option, values, threshold, at_least=False)


def first_failing(rules: Sequence[Rule]) -> pa.Table:
    """VERDICTS: each row that fails is dropped by the first rule it fails."""
    tables, seen = [no_verdicts()], np.zeros(len(rules[0].fails) if rules else 0, bool)
    for rule in rules:
        rows = np.flatnonzero(rule.fails & ~seen)
        seen[rows] = True
        values = None if rule.values is None else rule.values[rows]
        tables.append(verdicts(rows, rule.reason, values=values, threshold=rule.threshold))
    return pa.concat_tables(tables)


def verdicts(
    rows: np.ndarray,
    reason: str | Sequence[str],
    decision: str = "drop",
    values: np.ndarray | None = None,
    threshold: float | None = None,
) -> pa.Table:
    """VERDICTS of one kind over some rows; a reason for all of them, or one for each."""
    count = len(rows)
    columns = {
        "row": pa.array(rows, pa.int64()),
        "decision": pa.array([decision] * count, pa.string()),
        "reason": pa.array([reason] * count if isinstance(reason, str) else list(reason), pa.string()),
        "value": pa.nulls(count, pa.float64()) if values is None else pa.array(values, pa.float64(), from_pandas=True),
        "threshold": pa.array([threshold] * count, pa.float64()),
    }
    return pa.table([columns.get(field.name, pa.nulls(count, field.type)) for field in VERDICTS], schema=VERDICTS)
