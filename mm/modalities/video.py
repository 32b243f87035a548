"""Clips: sampled frames, each cut into tiles like an image; one placeholder token per clip."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from mm.config import ModelConfig
from mm.modalities.image import black_tile
from mm.modalities.modality import MediaLimits, Modality
from shards.format import CLIPS
from video.sampling import Clip, Frames, sample_frames
from vision.tiling import tile_image


def read(source: str | Path | bytes | Frames, config: ModelConfig, limits: MediaLimits) -> Clip:
    """A clip's file, or what `sample_frames` gives -> its frames as tiles."""
    assert config.vision_encoder is not None
    frames = source if isinstance(source, Frames) else sample_frames(source, limits.max_frames)
    side, max_tiles = config.vision_encoder.tile_size, limits.max_frame_tiles
    tiles = [tile_image(Image.fromarray(pixels), side, max_tiles) for pixels in frames.pixels]
    return Clip(tiles, torch.from_numpy(frames.times))


def quantities(clips: Sequence[Clip]) -> dict[str, float]:
    """The number of clips, of their frames and of the frames' tiles."""
    frames = [tiles for clip in clips for tiles in clip.frames]
    return {"clips": len(clips), "frames": len(frames), "tiles": sum(tiles.num_tiles for tiles in frames)}


VIDEO = Modality(
    name="video",
    plural="clips",
    field="videos",
    part="video_adapter",
    runs=("vision_encoder", "video_adapter"),
    index_column="num_frames",
    suffixes=lambda members: [suffix for suffix in members if suffix in CLIPS],
    read=read,
    token_id=lambda config: config.video_token_id,
    num_tokens=lambda clip: 1,
    tokens=lambda clip, config: [config.video_token_id],
    dummy=lambda config: Clip([black_tile(config)], torch.zeros(1, dtype=torch.float64)),
    quantities=quantities,
    contents=lambda clip: (tuple(tiles.grid for tiles in clip.frames), [clip.times, *(t.pixels for t in clip.frames)]),
)
