"""Images: pictures cut into tiles, one placeholder token each."""

from collections.abc import Sequence

import torch

from mm.config import ModelConfig
from mm.modalities.modality import MediaLimits, Modality
from shards.format import picture_suffixes
from vision.reading import PictureSource, read_picture
from vision.tiling import Tiles, tile_image


def read(source: PictureSource, config: ModelConfig, limits: MediaLimits) -> Tiles:
    """A picture, or its file; as `read_picture` takes them -> tiles."""
    assert config.vision_encoder is not None
    return tile_image(read_picture(source), config.vision_encoder.tile_size, limits.max_tiles)


def black_tile(config: ModelConfig) -> Tiles:
    """One black tile of the model's tile size."""
    assert config.vision_encoder is not None
    side = config.vision_encoder.tile_size
    return Tiles(torch.zeros(1, 3, side, side, dtype=torch.uint8), (1, 1))


def quantities(images: Sequence[Tiles]) -> dict[str, float]:
    """The number of images and of their tiles."""
    return {"images": len(images), "tiles": sum(tiles.num_tiles for tiles in images)}


IMAGE = Modality(
    name="image",
    plural="images",
    field="images",
    part="vision_encoder",
    runs=("vision_encoder", "image_adapter"),
    index_column="width",
    suffixes=picture_suffixes,
    read=read,
    token_id=lambda config: config.image_token_id,
    num_tokens=lambda tiles: 1,
    tokens=lambda tiles, config: [config.image_token_id],
    dummy=black_tile,
    quantities=quantities,
    contents=lambda tiles: (tiles.grid, [tiles.pixels]),
)
