"""Which pairs DPO trains on, and their log-probabilities under the starting model: one pass before training.

Only pairs of the latest rounds, and those that are not too far from what the policy itself would say, are kept (paper
§7.5.4). The run folder's `pairs.parquet` has a row for each pair, with the reason why it is left out.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from foundation.errors import UserError
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.processor import Processor
from mm.training.comparisons import Comparison, collate_comparisons, comparison
from mm.training.data import DataSource
from mm.training.precision import attention_kernels
from mm.training.preferences import answer_log_probs
from shards.format import Record
from shards.preferences import read_preference
from shards.reader import ShardSet

TABLE = "pairs.parquet"
SETTINGS = b"settings"  # metadata of the table: what its rows depend on
BATCH = 8  # pairs per pass; not an option, because log-probabilities may depend on it in rounding


@dataclass
class SelectedSource(DataSource):
    """A source of which only some records are read. Args: kept: bool of each record of its split and task."""

    kept: tuple[bool, ...] = ()

    def open(self) -> ShardSet:
        """See DataSource."""
        return super().open().keep(np.array(self.kept))


@dataclass(frozen=True)
class Selection:
    """The pairs to train on. Attributes: references: log-probabilities of both answers, by record id."""

    sources: list[DataSource]
    references: dict[str, list[float]]
    num_kept: int
    num_pairs: int


def select_pairs(
    sources: Sequence[DataSource],
    folder: Path,
    settings: dict[str, Any],
    processor: Processor,
    load_model: Callable[[], MultimodalModel] | None,
    recent_rounds: int | None,
    min_log_prob: float | None,
    max_tokens: int | None,
    precision: str = "fp32",
) -> Selection:
    """Choose pairs, and write the table of all of them into the run folder; a resumed run reads it there.

    All ranks call this alike. Each computes a share of the log-probabilities, with the whole model.

    Args:
        settings: JSON-able; the table of an earlier run with others is refused.
        load_model: the starting policy, on the device to compute with; None: log-probabilities are not needed.
        recent_rounds: keep pairs of so many of the latest rounds; None keeps all.
        min_log_prob: of the chosen answer, per token; None keeps all.
        max_tokens: see `mm.training.comparisons.comparison`.

    Raises:
        UserError: no pair is left, `recent_rounds` and a pair without a round, a record id that stands for two pairs,
            or an earlier run's table.
    """
    file = folder / TABLE
    settings = json.loads(json.dumps({**settings, "recent_rounds": recent_rounds, "min_log_prob": min_log_prob}))
    if file.is_file():
        table = pq.read_table(file)
        if json.loads((table.schema.metadata or {}).get(SETTINGS, b"null")) != settings:
            raise UserError(
                f"{file} is of a run with other data, start or selection: name another output folder or remove {folder}"
            )
    else:
        table = _measured(sources, processor, load_model, recent_rounds, min_log_prob, max_tokens, precision)
        if Ranks.current().is_main:
            _write(file, table.replace_schema_metadata({SETTINGS: json.dumps(settings)}))
    return _selection(sources, table)


def with_reference(
    record: Record, processor: Processor, references: dict[str, list[float]] | None, max_tokens: int | None
) -> Comparison:
    """A record's pair for training, with its reference log-probabilities if there are any."""
    pair = comparison(record, processor, best=2, max_tokens=max_tokens)
    return pair if references is None else replace(pair, reference=references[record.id])


def _measured(
    sources: Sequence[DataSource],
    processor: Processor,
    load_model: Callable[[], MultimodalModel] | None,
    recent_rounds: int | None,
    min_log_prob: float | None,
    max_tokens: int | None,
    precision: str,
) -> pa.Table:
    """A row for each record of each source."""
    ranks, shard_sets = Ranks.current(), [source.open() for source in sources]
    rows = [(number, row) for number, shards in enumerate(shard_sets) for row in range(len(shards))]
    model = None if load_model is None else load_model()
    rounds, reasons = [math.nan] * len(rows), [""] * len(rows)
    values = torch.zeros(len(rows), 3, dtype=torch.float64)  # chosen, rejected, chosen per token
    for start in range(0, len(rows), BATCH):
        pairs: dict[int, Comparison] = {}
        for index in range(start, min(start + BATCH, len(rows))):
            number, row = rows[index]
            try:
                record = shard_sets[number][row]
                found = read_preference(record).round
                rounds[index] = math.nan if found is None else found
                if model is not None and start // BATCH % ranks.size == ranks.rank:
                    pairs[index] = comparison(record, processor, best=2, max_tokens=max_tokens)
            except ValueError:  # training reports it, when it is its turn
                values[index] = math.nan
        if model is not None and pairs:
            values[list(pairs)] = _log_probs(model, list(pairs.values()), precision)
    del model
    unread = values.isnan().any(1)
    summed = ranks.all_reduce_sum(*values.nan_to_num().flatten().tolist(), *unread.double().tolist())
    values = torch.tensor(summed[: values.numel()], dtype=torch.float64).view_as(values)
    unread = torch.tensor(summed[values.numel() :]) > 0
    if recent_rounds is not None:
        _leave_out_old_rounds(rounds, unread, recent_rounds, reasons)
    if min_log_prob is not None and load_model is not None:
        for index, mean in enumerate(values[:, 2].tolist()):
            if not unread[index] and not reasons[index] and mean < min_log_prob:
                reasons[index] = f"log-probability per token {mean:.2f}"
    return pa.table(
        {
            "source": [sources[number].path for number, _ in rows],
            "id": [shard_sets[number].index["id"][row].as_py() for number, row in rows],
            "round": pa.array(rounds, from_pandas=True),
            "chosen_log_prob": values[:, 0].tolist(),
            "rejected_log_prob": values[:, 1].tolist(),
            "mean_log_prob": values[:, 2].tolist(),
            "left_out": pa.array([reason or None for reason in reasons], pa.string()),
        }
    )


def _leave_out_old_rounds(rounds: list[float], unread: torch.Tensor, recent_rounds: int, reasons: list[str]) -> None:
    known = sorted({number for number in rounds if not math.isnan(number)})
    if any(math.isnan(number) and not bad for number, bad in zip(rounds, unread.tolist(), strict=True)):
        raise UserError("recent_rounds is set, and some pairs have no round: set it to null, or write their rounds")
    recent = set(known[-recent_rounds:])
    for index, number in enumerate(rounds):
        if number not in recent and not unread[index]:
            reasons[index] = f"round {number:g}"


@torch.no_grad()
def _log_probs(model: MultimodalModel, pairs: list[Comparison], precision: str) -> torch.Tensor:
    device = model.extra_embeddings.device
    batch = collate_comparisons(pairs).to(device)
    with (
        attention_kernels(precision, device.type),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        found = answer_log_probs(model, batch.rows)
    scored, counts = found.scored.double().cpu().view(-1, 2), found.num_scored[::2]
    return torch.cat([scored, scored[:, :1] / torch.tensor(counts).clamp(min=1)[:, None]], 1)


def _selection(sources: Sequence[DataSource], table: pa.Table) -> Selection:
    kept = [reason is None for reason in table["left_out"].to_pylist()]
    if not any(kept):
        reasons = sorted(set(table["left_out"].to_pylist()))
        raise UserError(
            f"none of the {len(kept)} pairs is left to train on; the first reason: {reasons[0]}: raise recent_rounds, "
            "lower min_log_prob, or set it to null"
        )
    references: dict[str, list[float]] = {}
    columns = (table[name].to_pylist() for name in ("id", "chosen_log_prob", "rejected_log_prob"))
    for record, *values in zip(*columns, strict=True):
        if references.setdefault(record, values) != values:
            raise UserError(f"record id {record} stands in two sources for different pairs: give them ids of their own")
    selected: list[DataSource] = []
    start = 0
    for source in sources:
        length = len(source.open())
        flags = tuple(kept[start : start + length])
        start += length
        if any(flags):
            selected.append(SelectedSource(**vars(source), kept=flags))
    return Selection(selected, references, sum(kept), len(kept))


def _write(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}")
    pq.write_table(table, new)
    os.replace(new, file)
