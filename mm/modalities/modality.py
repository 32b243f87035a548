"""What the code must know of one kind of input besides text."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mm.config import ModelConfig
from vision.reading import PictureSource

MediaSource = PictureSource  # a picture; of other media, the path or the bytes of a file


@dataclass(frozen=True)
class MediaLimits:
    """How much of a medium a processor takes.

    Attributes:
        max_tiles: tiles per picture at most.
        max_frames: frames per clip at most.
        max_frame_tiles: tiles per frame at most.
    """

    max_tiles: int
    max_frames: int
    max_frame_tiles: int


@dataclass(frozen=True)
class Modality:
    """One kind of input, e.g. images. An item is one input of that kind, e.g. `Tiles`, `Clip` or mel features.

    Attributes:
        name: the "type" of its parts in messages, and the key of the file there.
        plural: for error messages.
        field: the list of items in `Sample` and `Batch`; `Batch` names the items of each row in `row_{field}`.
        part: the field of `ModelConfig` without which a model does not take this modality.
        runs: the parts of `MultimodalModel` that its items run through. Without items these have no gradient.
        index_column: the column of a shard set's index that has a value where a record is known to hold this modality.
        suffixes: of a record's member suffixes, those of this modality, in order.
        read: a file -> an item. Raises UserError for a file that cannot be read.
        token_id: the placeholder token.
        num_tokens: how many placeholder tokens an item takes.
        tokens: an item -> all its tokens in the text: placeholders, and marks around them if there are any.
        dummy: the smallest item, which teaches nothing.
        quantities: items -> what throughput is counted in, e.g. {"images": 2, "tiles": 5}.
        contents: an item -> its structure and its tensors: items are the same input where both are equal, and a batch
            encodes them once. None: equal items of a batch are encoded several times.
    """

    name: str
    plural: str
    field: str
    part: str
    runs: tuple[str, ...]
    index_column: str
    suffixes: Callable[[Iterable[str]], list[str]]
    read: Callable[[Any, ModelConfig, MediaLimits], Any]
    token_id: Callable[[ModelConfig], int]
    num_tokens: Callable[[Any], int]
    tokens: Callable[[Any, ModelConfig], list[int]]
    dummy: Callable[[ModelConfig], Any]
    quantities: Callable[[Sequence[Any]], dict[str, float]]
    contents: Callable[[Any], tuple[Hashable, Sequence[Tensor]]] | None = None

    @property
    def mark(self) -> str:
        """Stands in rendered text where an item goes, until the text is tokenised."""
        return f"<|mm-{self.name}|>"
