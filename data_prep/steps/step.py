"""What a curation step is: it measures pairs one by one, then decides about them from the stored columns of all pairs.

Order of a run: `pool` lists the pairs -> `measuring` calls every step's `measure` and stores the columns -> `merging`
sorts them by id, and each step's `merge` may compute what needs the whole set (an index, edges, counts) -> `deciding`
asks one step after another which pairs to drop -> `writing`. Pairs are measured once and may be decided about again
with other thresholds.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from foundation.errors import UserError

STORED = 3  # version of what is stored; raised when equal settings store other values, so that all is measured again

DECIMALS = 6  # of every stored score

Columns = dict[str, list]  # a batch: column name -> one value per row
Unit = Literal["pictures", "clips", "captions", "pairs"]

REMOVING = ("drop", "quarantine")  # decisions that take a pair out
KEEPING = ("change", "note")  # the pair stays: it is written changed, or there is something to know about it
DECISIONS = (*REMOVING, *KEEPING)

VERDICTS = pa.schema(
    [
        ("row", pa.int64()),  # in the table that was passed to `decide`
        ("decision", pa.string()),  # one of DECISIONS
        ("reason", pa.string()),  # `category: details`; reasons are counted by their category
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("survivor_id", pa.string()),
        ("similarity", pa.float64()),
        ("component_id", pa.string()),
    ]
)


@dataclasses.dataclass
class Draft:
    """A kept pair before it is written into a shard.

    Attributes:
        picture: RGB, as read; a step may replace it.
        caption: as it will be written.
        columns: further columns of the index, name -> number, text, or list of equally long lists of numbers.
    """

    picture: Image.Image
    caption: str
    columns: dict[str, Any]


class Step:
    """The base class of all steps. A step is a frozen dataclass whose fields are its settings; it has no other state.

    Attributes:
        name: in the ledger and in the configuration.
        measures: the unit of the rows that `measure` gets, each unit once: "pictures" (columns image_id, picture
            (RGB), width, height), "clips" (the same and clip), "captions" (caption), or "pairs" (id, image_id,
            caption, picture, clip). None: the step measures nothing. A clip is a `clips.DecodedClip`; its picture is
            its middle frame.
        measured_columns: what `measure` returns, name -> type; names are unique among all steps.
        decision_columns: the stored columns that `decide` reads, of pictures or of pairs, beside `id`.
        finish_columns: the stored columns that `finish` reads; None: the step does not change written pairs.
        hides_pictures: whether `passes` hides pictures from all later steps.
    """

    name: ClassVar[str]
    measures: ClassVar[Unit | None] = None
    measured_columns: ClassVar[Mapping[str, pa.DataType]] = {}
    finish_columns: ClassVar[tuple[str, ...] | None] = None
    hides_pictures: ClassVar[bool] = False

    @property
    def decision_columns(self) -> tuple[str, ...]:
        return ()

    def settings(self) -> dict[str, Any]:
        """All settings that the decisions depend on, as values that JSON can hold."""
        assert dataclasses.is_dataclass(self)
        return dataclasses.asdict(self)

    def measure_settings(self) -> dict[str, Any]:
        """The settings that `measure` and `merge` depend on; where they change, both are done again."""
        return {}

    def merge_settings(self) -> dict[str, Any]:
        """The further settings that `merge` depends on; where they change, only `merge` is done again."""
        return {}

    def measure(self, batch: Columns) -> Columns:
        """The `measured_columns` of each row: a pure function of that row, whatever else is in the batch."""
        return {}

    def passes(self, measured: Columns) -> list[bool] | None:
        """Which pictures later steps may see; None: all. For pictures that must not be shown to anyone."""
        return None

    def merge(self, stored: Path, state: Path) -> None:
        """Computes from the whole set what `decide` needs, and writes it into the folder `state`.

        Args:
            stored: folder of pairs.parquet and sources.parquet, sorted by id, and pictures.parquet, by image_id.
        """

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        """VERDICTS about the pairs that earlier steps left: columns `id` and `decision_columns`, sorted by id."""
        return first_failing(self.rules(pairs, state))

    def rules(self, pairs: pa.Table, state: Path) -> list["Rule"]:
        """The rules that `decide` applies, in their order; forecasts and the report show their thresholds."""
        return []

    def finish(self, row: dict[str, Any], draft: Draft) -> None:
        """Changes how one kept pair is written: a pure function of that pair.

        Args:
            row: the `finish_columns` of the pair.
        """

    def check_compatible(self, measured: "Step") -> None:
        """Checks that these settings can be decided with from what a run with the settings of `measured` has stored.

        Raises:
            UserError: they need something that was not stored; names the settings.
        """
        old = {**measured.measure_settings(), **measured.merge_settings()}
        new = {**self.measure_settings(), **self.merge_settings()}
        names = [name for name, value in new.items() if old.get(name) != value]
        if names:
            raise UserError(
                f"{self.name}: {', '.join(names)} cannot be changed without `mm data run`, which measures by it"
            )


def settings_hash(settings: dict[str, Any]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of settings."""
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
    """One reason to drop pairs.

    Attributes:
        reason: in the ledger.
        fails: bool [rows], the rows that the rule drops.
    """

    reason: str
    fails: np.ndarray


@dataclasses.dataclass
class ThresholdRule(Rule):
    """A rule that compares values with a threshold.

    Attributes:
        option: the setting of the step that holds the threshold.
        values: float64 [rows], what is compared; NaN where the rule does not apply.
        threshold: in force.
        at_least: values below the threshold fail; otherwise values above it fail.
        strict: a value equal to the threshold fails as well.
        highest: the largest value that the setting may have.
        shows_pictures: whether the report may show pictures near the threshold.
    """

    option: str
    values: np.ndarray
    threshold: float
    at_least: bool = True
    strict: bool = False
    highest: float = np.inf
    shows_pictures: bool = True


def at_least(
    option: str, threshold: float, values: np.ndarray, reason: str, among: np.ndarray | None = None
) -> ThresholdRule:
    """The rule that values must be at least the threshold, for the rows `among`, or for all of them."""
    values = values.astype(np.float64) if among is None else np.where(among, values, np.nan)
    return ThresholdRule(reason, values < threshold, option, values, threshold)


def at_most(
    option: str, threshold: float, values: np.ndarray, reason: str, among: np.ndarray | None = None
) -> ThresholdRule:
    """The rule that values must be at most the threshold, for the rows `among`, or for all of them."""
    values = values.astype(np.float64) if among is None else np.where(among, values, np.nan)
    return ThresholdRule(reason, values > threshold, option, values, threshold, at_least=False)


def first_failing(rules: Sequence[Rule]) -> pa.Table:
    """VERDICTS: each row that fails is dropped for the first rule that it fails."""
    tables, dropped = [no_verdicts()], np.zeros(len(rules[0].fails) if rules else 0, bool)
    for rule in rules:
        rows = np.flatnonzero(rule.fails & ~dropped)
        dropped[rows] = True
        if isinstance(rule, ThresholdRule):
            tables.append(verdicts(rows, rule.reason, values=rule.values[rows], threshold=rule.threshold))
        else:
            tables.append(verdicts(rows, rule.reason))
    return pa.concat_tables(tables)


def verdicts(
    rows: np.ndarray,
    reason: str | Sequence[str],
    decision: str = "drop",
    values: np.ndarray | None = None,
    threshold: float | None = None,
) -> pa.Table:
    """VERDICTS with one decision about some rows.

    Args:
        rows: int [verdicts].
        reason: of all of them, or one for each.
        values: float64 [verdicts], what was compared with the threshold; NaN becomes null.
    """
    count = len(rows)
    columns = {
        "row": pa.array(rows, pa.int64()),
        "decision": pa.array([decision] * count, pa.string()),
        "reason": pa.array([reason] * count if isinstance(reason, str) else list(reason), pa.string()),
        "value": pa.nulls(count, pa.float64()) if values is None else pa.array(values, pa.float64(), from_pandas=True),
        "threshold": pa.array([threshold] * count, pa.float64()),
    }
    return pa.table([columns.get(field.name, pa.nulls(count, field.type)) for field in VERDICTS], schema=VERDICTS)
