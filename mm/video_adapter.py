"""The video adapter: the temporal aggregator, and gated cross-attention blocks of its own (paper §7.3).

The blocks have the form of the image adapter's and stand before some of them; with gates at 0 they are the identity.
A row's images are attended to by the image blocks alone, and its clips by the video blocks alone.
Shapes: S vision tokens of a frame, E effective frames of a clip, C channels of features, D width of the LM.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foundation.errors import UserError
from mm.cross_attention import CrossAttentionBlock
from mm.language_model import LanguageModelConfig
from video.aggregator import AggregatorConfig, TemporalAggregator, split_into_passes
from video.sampling import Clip
from vision.tiling import Tiles


@dataclass(frozen=True)
class VideoAdapterConfig:
    """Shape of the aggregator, positions and initialisation of the blocks.

    Attributes:
        interval: one video block per `interval` image blocks, before the last of them. 4 in the paper (two blocks in
            the 8B model, five in the 70B one); a small language model has few image blocks and needs a smaller one.
        intermediate_size: width of the blocks' feed-forward; None is the LM's own.
        gate_init, fit_inputs: initialisation of the blocks, as in `mm.cross_attention.ImageAdapterConfig`.
        frames_per_pass: how many frames are encoded at a time where no gradient is kept.
    """

    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    interval: int = 4
    intermediate_size: int | None = None
    gate_init: float = 0.0
    fit_inputs: bool = False
    frames_per_pass: int = 32

    def __post_init__(self) -> None:
        for name in ("interval", "frames_per_pass"):
            if getattr(self, name) < 1:
                raise UserError(f"video_adapter.{name} is {getattr(self, name)}; it must be at least 1")

    def block_positions(self, image_positions: Sequence[int]) -> tuple[int, ...]:
        """The number of LM layers completed before each block.

        Raises:
            UserError: fewer image blocks than `interval`, which leave no position for a video block.
        """
        positions = tuple(image_positions[self.interval - 1 :: self.interval])
        if not positions:
            raise UserError(
                f"video_adapter.interval is {self.interval} and the image adapter has {len(image_positions)} blocks: "
                f"there is no place for a video block; take an interval of at most {len(image_positions)}"
            )
        return positions


class VideoAdapter(nn.Module):
    """The aggregator and the blocks in the order in which they run."""

    def __init__(
        self,
        config: VideoAdapterConfig,
        language_model: LanguageModelConfig,
        image_positions: Sequence[int],
        feature_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.positions = config.block_positions(image_positions)
        self.aggregator = TemporalAggregator(config.aggregator, feature_size, language_model.hidden_size)
        width = config.intermediate_size or language_model.intermediate_size
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(language_model, width, config.gate_init) for _ in self.positions
        )

    def by_position(self) -> dict[int, CrossAttentionBlock]:
        """The blocks by the number of LM layers before them."""
        pairs = zip(self.positions, self.blocks, strict=True)
        return {position: block for position, block in pairs if isinstance(block, CrossAttentionBlock)}

    def forward(self, clips: Sequence[Clip], encode: Callable[[list[Tiles]], Tensor]) -> Tensor:
        """Clips as vision tokens of the LM's width.

        Args:
            encode: the image encoder: frames -> features of all their tokens, [sum of S, C]. Without gradients it gets
                `frames_per_pass` frames at a time, and their features are merged before it gets the next ones.

        Returns:
            [sum of E * S, D], clip by clip, effective frame by effective frame.
        """
        factor = self.config.aggregator.factor
        groups = [
            (clip.frames[start : start + factor], clip.times[start : start + factor])
            for clip in clips
            for start in range(0, len(clip.frames), factor)
        ]
        sizes = [len(frames) for frames, _ in groups]
        chunk_size = sum(sizes) if torch.is_grad_enabled() else self.config.frames_per_pass
        merged: list[Tensor] = []
        for group_indices in split_into_passes(sizes, chunk_size):
            frames = [frame for index in group_indices for frame in groups[index][0]]
            embedded: list[Tensor] = []
            for start in range(0, len(frames), chunk_size):
                chunk = slice(start, start + chunk_size)
                features = encode(frames[chunk])
                per_tile = len(features) // sum(tiles.num_tiles for tiles in frames[chunk])
                counts = [tiles.num_tiles * per_tile for tiles in frames[chunk]]
                embedded += self.aggregator.embed(features, counts)
            ends = torch.tensor([sizes[index] for index in group_indices]).cumsum(0).tolist()
            merged += self.aggregator(
                [
                    torch.stack(embedded[end - sizes[index] : end])
                    for index, end in zip(group_indices, ends, strict=True)
                ],
                [groups[index][1] for index in group_indices],
                per_tile,
            )
        return torch.cat(merged)
