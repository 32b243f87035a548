"""What the planner expects a step's samples to hold, from the sources' indices or by assumption."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from foundation.errors import UserError
from mm.config import ModelConfig
from mm.training.data import DataSource, RecordDataset
from mm.training.flops import Flops, Row, TrainedParts, training_flops
from shards.format import INDEX_NAME

DEFAULT_TILES = 4  # of a picture, where there is no index: the largest canvas


@dataclass(frozen=True)
class Samples:
    """What samples are expected to hold.

    Attributes:
        tokens: of text, the picture's placeholder included; all but the first are targets.
        tiles: tiles of a sample's picture, 0 for no picture -> share of the samples.
        assumed: the tiles are an assumption, not counted in an index.
        sharing: how many samples of a step look at the same picture on average, which is encoded once for them.
    """

    tokens: int
    tiles: Mapping[int, float]
    assumed: bool
    sharing: float = 1.0

    @property
    def images(self) -> float:
        """The average number of pictures that are encoded for a sample."""
        return sum(share for tiles, share in self.tiles.items() if tiles) / self.sharing

    @property
    def largest(self) -> Row:
        """The sample with most tiles, for which there must be enough memory."""
        return self.row(max(self.tiles))

    def row(self, tiles: int) -> Row:
        """A sample whose picture has so many tiles."""
        return Row(self.tokens, self.tokens - 1, (tiles,) if tiles else ())

    def flops(self, config: ModelConfig, trained: TrainedParts, activation_checkpointing: bool = False) -> Flops:
        """The average `training_flops` of a sample: what depends on the picture alone is divided by `sharing`."""
        sums = dict.fromkeys(vars(Flops()), 0.0)
        for tiles, share in self.tiles.items():
            row = self.row(tiles)
            one = vars(training_flops(config, [row], trained, activation_checkpointing))
            both = vars(training_flops(config, [row, row], trained, activation_checkpointing, encoded=row.tiles))
            for part in sums:
                of_picture = 2 * one[part] - both[part]
                sums[part] += share * (one[part] - of_picture * (1 - 1 / self.sharing))
        return Flops(*map(round, sums.values()))


def expected_samples(
    config: ModelConfig, sources: Sequence[DataSource], max_tiles: int | None, tokens: int, tiles: int | None
) -> Samples:
    """Samples with so many text tokens and tiles.

    Args:
        max_tiles: of a picture; None: as many as the encoder takes.
        tiles: None: those in the sources' indices; if a source has no index, or is not there yet, 4 or `max_tiles`.

    Questions about one picture share it where the sources have indices and are grouped by image.

    Raises:
        UserError: numbers that no sample can have, or a source that cannot be read.
    """
    encoder = config.vision_encoder
    if encoder is None:
        raise UserError("the model has no image encoder, so there is no picture to plan with")
    limit = encoder.max_num_tiles if max_tiles is None else max_tiles
    if not 1 <= limit <= encoder.max_num_tiles:
        raise UserError(f"max_tiles is {max_tiles}; this model's image encoder takes 1 to {encoder.max_num_tiles}")
    if not 2 <= tokens <= config.language_model.context:
        raise UserError(f"text_tokens is {tokens}; it can be 2 to {config.language_model.context}, the context")
    if tiles is not None and not 1 <= tiles <= limit:
        raise UserError(f"tiles is {tiles}; it can be 1 to {limit}")
    if not sources or not all((Path(source.path) / INDEX_NAME).is_file() for source in sources):
        return Samples(tokens, {tiles or min(DEFAULT_TILES, limit): 1.0}, assumed=True)
    dataset = RecordDataset(sources, prepare=lambda record: record)
    indexed = dataset.num_tiles(encoder.tile_size, limit)
    with_picture = dataset.sharing[indexed > 0]
    sharing = float(1 / (1 / with_picture).mean()) if len(with_picture) else 1.0
    if tiles is not None:
        return Samples(tokens, {tiles: 1.0}, assumed=True, sharing=sharing)
    counts = Counter(indexed.tolist())
    shares = {number: counts[number] / counts.total() for number in sorted(counts)}
    return Samples(tokens, shares, assumed=False, sharing=sharing)
