"""Augmentation of a record's pictures, anew each time it comes in training."""

import io
from dataclasses import replace

import torch

from mm.modalities import IMAGE
from mm.training.sampler import seed_of
from shards.format import Record, image_id
from vision.augmentation import PictureAugmentConfig, augment_picture
from vision.reading import read_picture


def augmented_record(record: Record, visit: int, config: PictureAugmentConfig, seed: int) -> Record:
    """A copy of a record with augmented pictures, as PNG files under the same names; all else stays.

    The augmentation of each picture is a function of its file, visit and seed: records of one picture share it, so that
    a micro-batch still encodes the picture once.

    Args:
        visit: how often the record came before, over all epochs.

    Raises:
        UserError: a picture cannot be read.
    """
    media = dict(record.media)
    for suffix in IMAGE.suffixes(record.media):
        picture, out = record.media[suffix], io.BytesIO()
        generator = torch.Generator().manual_seed(seed_of(f"{seed}/{visit}/{image_id(picture)}"))
        augment_picture(read_picture(picture), config, generator).save(out, "PNG", compress_level=0)
        media[suffix] = out.getvalue()
    return replace(record, media=media)
