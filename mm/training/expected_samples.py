"""What the planner expects a step's samples to hold, from the sources' indices or by assumption."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foundation.errors import UserError
from mm.modalities import AUDIO, IMAGE
from mm.training.data import DataSource, RecordDataset
from mm.training.flops import Flops, Row
from mm.training.media_flops import Clip
from mm.training.stage_shapes import PlannedStage, StageShape
from shards.format import INDEX_NAME
from speech.adapter import num_tokens
from speech.features import FRAMES_PER_SECOND

DEFAULT_TILES = 4  # of a picture, where there is no index: the largest canvas
NUM_DURATIONS = 16  # that an index's durations are summed up in
DEFAULT_SECONDS = 20.0  # of an utterance, where there is no index


@dataclass(frozen=True)
class SampleSizes:
    """Sizes that the user states; None: as the index says, or by assumption.

    Attributes:
        text_tokens: of a sample, placeholders of pictures and clips included. tiles: of a picture, or of a frame.
        frames: of a clip. seconds: of an utterance.
    """

    text_tokens: int = 64
    tiles: int | None = None
    frames: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Samples:
    """What samples are expected to hold.

    Attributes:
        tokens: of text, placeholders of pictures and clips included; all but the first are targets.
        tiles: tiles of a sample's picture, 0 for no picture -> share of the samples.
        assumed: the sizes of media are an assumption, not counted in an index.
        sharing: how many samples of a step look at the same picture on average, which is encoded once for them.
        clip: of each sample: the number of frames, and the tiles of each.
        mel_frames: of a sample's utterance -> share of the samples.
    """

    tokens: int
    tiles: Mapping[int, float]
    assumed: bool
    sharing: float = 1.0
    clip: Clip | None = None
    mel_frames: Mapping[int, float] = field(default_factory=dict)

    @property
    def images(self) -> float:
        """The average number of pictures that are encoded for a sample."""
        return sum(share for tiles, share in self.tiles.items() if tiles) / self.sharing

    @property
    def rows(self) -> dict[Row, float]:
        """Each kind of sample -> its share."""
        if self.mel_frames:
            rows: dict[Row, float] = {}
            for frames, share in self.mel_frames.items():
                tokens = self.tokens + num_tokens(frames) + 2  # between its marks
                rows[Row(tokens, self.tokens - 1, mel_frames=(frames,))] = share
            return rows
        if self.clip is not None:
            return {Row(self.tokens, self.tokens - 1, clips=(self.clip,)): 1.0}
        return {self.row(tiles): share for tiles, share in self.tiles.items()}

    @property
    def largest(self) -> Row:
        """The largest sample, for which there must be enough memory."""
        return max(self.rows, key=lambda row: (sum(row.mel_frames), sum(row.tiles)))

    def row(self, tiles: int) -> Row:
        """A sample whose picture has so many tiles."""
        return Row(self.tokens, self.tokens - 1, (tiles,) if tiles else ())

    def flops(self, stage: StageShape, trained: Collection[str], activation_checkpointing: bool = False) -> Flops:
        """The average FLOPs of a sample, forward and backward: what depends on the picture alone is divided by
        `sharing`.

        Args:
            trained: names of the parameters that train.
        """
        total = Flops()
        for row, share in self.rows.items():
            one = stage.flops([row], trained, activation_checkpointing)
            if self.sharing > 1:
                both = stage.flops([row, row], trained, activation_checkpointing, encoded=row.tiles)
                of_picture = one * 2 + both * -1
                one = one + of_picture * (1 / self.sharing - 1)
            total += one * share
        return total

    def __str__(self) -> str:
        parts = [f"{self.tokens} text tokens"]
        if self.mel_frames:
            seconds = [frames / FRAMES_PER_SECOND for frames in (min(self.mel_frames), max(self.mel_frames))]
            parts.append(f"{' to '.join(dict.fromkeys(f'{number:.3g}' for number in seconds))} s of sound")
        elif self.clip is not None:
            parts.append(f"{self.clip[0]} frames of {self.clip[1]} tiles")
        else:
            parts.append(f"{' or '.join(map(str, self.tiles))} tiles")
        return f"{' and '.join(parts)} ({'assumed' if self.assumed else 'counted in the index'})"


def expected_samples(stage: PlannedStage, sources: Sequence[DataSource], sizes: SampleSizes) -> Samples:
    """Samples of the sizes that the user states, and otherwise as in the sources' indices; if a source has no index, or
    is not there yet, of assumed sizes.

    Questions about one picture share it where the sources have indices and are grouped by image.

    Raises:
        UserError: numbers that no sample can have, or a source that cannot be read.
    """
    tokens = sizes.text_tokens
    if stage.shape.text and not 2 <= tokens <= stage.context:
        raise UserError(f"text_tokens is {tokens}; it can be 2 to {stage.context}, the context")
    indexed = bool(sources) and all((Path(source.path) / INDEX_NAME).is_file() for source in sources)
    if stage.modality is AUDIO:
        return _with_sound(stage, tokens, sources if indexed else (), sizes.seconds)
    limit = _tile_limit(stage, sizes)
    if stage.modality is not IMAGE:
        frames = sizes.frames or stage.max_frames
        if not 1 <= frames <= stage.max_frames:
            raise UserError(f"frames is {frames}; it can be 1 to max_frames, {stage.max_frames}")
        return Samples(tokens, {}, assumed=True, clip=(frames, sizes.tiles or min(DEFAULT_TILES, limit)))
    if not indexed:
        return Samples(tokens, {sizes.tiles or min(DEFAULT_TILES, limit): 1.0}, assumed=True)
    dataset = RecordDataset(sources, prepare=lambda record: record)
    tiles = dataset.num_tiles(stage.tile_size, limit)
    with_picture = dataset.sharing[tiles > 0]
    sharing = float(1 / (1 / with_picture).mean()) if len(with_picture) else 1.0
    if sizes.tiles is not None:
        return Samples(tokens, {sizes.tiles: 1.0}, assumed=True, sharing=sharing)
    return Samples(tokens, _shares(tiles.tolist()), assumed=False, sharing=sharing)


def _tile_limit(stage: PlannedStage, sizes: SampleSizes) -> int:
    """The most tiles of a picture or frame."""
    limit = stage.encoder_tiles if stage.max_tiles is None else stage.max_tiles
    if not 1 <= limit <= stage.encoder_tiles:
        raise UserError(f"max_tiles is {stage.max_tiles}; this model's image encoder takes 1 to {stage.encoder_tiles}")
    if sizes.tiles is not None and not 1 <= sizes.tiles <= limit:
        raise UserError(f"tiles is {sizes.tiles}; it can be 1 to {limit}")
    return limit


def _with_sound(stage: PlannedStage, tokens: int, sources: Sequence[DataSource], seconds: float | None) -> Samples:
    """Samples of one utterance. An index's durations are summed up in groups of equally many; the longest of each
    group stands for it. In a speech encoder's own stage longer ones are cut."""
    if seconds is not None and not seconds > 0:
        raise UserError(f"seconds is {seconds:g}; it must be above 0")
    durations: list[float] = [] if seconds is not None else _durations(sources)
    found = durations or [DEFAULT_SECONDS if seconds is None else seconds]
    if not stage.shape.text:
        found = [min(duration, stage.max_seconds) for duration in found]
    frames = _shares([max(1, round(duration * FRAMES_PER_SECOND)) for duration in found])
    return Samples(tokens, {}, assumed=not durations, mel_frames=frames)


def _durations(sources: Sequence[DataSource]) -> list[float]:
    if not sources:
        return []
    durations = sorted(filter(None, RecordDataset(sources, prepare=lambda record: record).durations().tolist()))
    count = min(NUM_DURATIONS, len(durations))
    return [durations[(group + 1) * len(durations) // count - 1] for group in range(count)]


def _shares(numbers: Sequence[int]) -> dict[int, float]:
    counts = Counter(numbers)
    return {number: counts[number] / counts.total() for number in sorted(counts)}
