"""Baselines: inputs without images, time, frame order or the right media, to measure how much answers use them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from foundation.errors import UserError
from mm.batch import Sample
from mm.modalities import Modality
from mm.records import record_answer
from shards.format import Record
from shards.reader import ShardSet
from video.sampling import Clip


def keep_middle_frame(sample: Sample) -> Sample:
    """The sample with only the middle frame of every clip: a baseline without time."""
    clips = []
    for clip in sample.videos:
        middle = len(clip.frames) // 2
        clips.append(Clip([clip.frames[middle]], clip.times[middle : middle + 1]))
    return replace(sample, videos=clips)


def shuffle_frames(sample: Sample) -> Sample:
    """The sample with the frames of every clip in a random order, at the original times: a baseline without order.

    The order depends on the pixels only.
    """
    clips = []
    for clip in sample.videos:
        seed = int(sum(int(tiles.pixels.long().sum()) for tiles in clip.frames))
        order = torch.randperm(len(clip.frames), generator=torch.Generator().manual_seed(seed)).tolist()
        clips.append(Clip([clip.frames[index] for index in order], clip.times))
    return replace(sample, videos=clips)


FRAMES: dict[str, Callable[[Sample], Sample]] = {
    "all": lambda sample: sample,
    "one": keep_middle_frame,
    "shuffled": shuffle_frames,
}


def replace_media(
    records: ShardSet | Sequence[Record], indices: Sequence[int], index: int, modality: Modality
) -> Record:
    """Record `index` with another record's sounds or images.

    They come from the next record among `indices`, after which the first one follows, that has another answer and other
    media.

    Args:
        modality: AUDIO or IMAGE.

    Raises:
        UserError: no record has another answer, or one of the two records has no items of the modality.
    """
    record, position = records[index], indices.index(index)
    answer = record_answer(record).casefold()
    for other_index in [*indices[position + 1 :], *indices[:position]]:
        other = records[other_index]
        if record_answer(other).casefold() != answer and other.media != record.media:
            break
    else:
        raise UserError(
            f"record {record.id}: its {modality.plural} cannot be replaced, since no record has another answer"
        )
    names, other_names = (modality.suffixes(media) for media in (record.media, other.media))
    if not names or not other_names:
        raise UserError(f"record {(record if not names else other).id} has no {modality.plural}")
    items = {name: other.media[other_names[place % len(other_names)]] for place, name in enumerate(names)}
    return replace(record, media={**record.media, **items})
