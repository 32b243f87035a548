"""Which records hold a modality: a stage whose data hold none of its own has nothing to train on."""

from collections.abc import Callable, Iterator

import torch

from foundation.errors import UserError
from mm.modalities import Modality
from mm.records import record_kinds
from mm.training.data import RecordDataset
from shards.format import Record
from shards.reader import ShardSet


def check_media(dataset: RecordDataset, modality: Modality, shown: Callable[[Record], bool] | None = None) -> None:
    """Check that at least one record shows an item of a modality.

    Records are read until one does, those first of which the shards' indices say that they do.

    Args:
        shown: whether training shows an item of a record's; None: its messages name one, or its caption describes one.

    Raises:
        UserError: none does; names the folders.
    """
    unnamed = ""
    num_records = 0
    sets = list({id(shards): shards for shards in dataset.sets}.values())
    for shards, row in _rows(sets, modality):
        num_records += 1
        try:
            record = shards[row]
            if shown(record) if shown is not None else modality.name in record_kinds(record):
                return
        except ValueError:  # reported when it is its turn in training
            continue
        suffixes = modality.suffixes(record.media)
        if suffixes and not unnamed:
            part = f'{{"type": "{modality.name}", "{modality.name}": "{suffixes[0]}"}}'
            unnamed = f"; record {record.id} has the member {suffixes[0]}, and its messages need a part {part}"
    folders = ", ".join(dict.fromkeys(str(shards.folder) for shards in sets))
    raise UserError(
        f"{folders}: none of the {num_records:,} records to train on shows {modality.plural}, which this stage trains "
        f"on: name a folder with {modality.plural} under `data`{unnamed}"
    )


def likely_indices(dataset: RecordDataset, modality: Modality) -> list[int]:
    """The indices of samples that hold a modality as far as the shards' indices say; of all, where they do not say."""
    likely = torch.cat([_has_value(shards, modality) for shards in dataset.sets])
    return (likely.nonzero().flatten() if likely.any() else torch.arange(len(likely))).tolist()


def _rows(sets: list[ShardSet], modality: Modality) -> Iterator[tuple[ShardSet, int]]:
    """Every record of the sets, those first that their index has a value for."""
    for first in (True, False):
        for shards in sets:
            for row in (_has_value(shards, modality) == first).nonzero().flatten().tolist():
                yield shards, row


def _has_value(shards: ShardSet, modality: Modality) -> torch.Tensor:
    """Whether the index has a value in the modality's column, bool [records]."""
    return torch.from_numpy(shards.index[modality.index_column].is_valid().to_numpy().copy())
