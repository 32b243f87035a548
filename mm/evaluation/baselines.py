"""What a model is given in place of what it should see or hear, to tell how much of an answer rests on that."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from foundation.errors import UserError
from mm.batch import Sample
from mm.records import record_answer
from shards.format import AUDIO, Record
from shards.reader import ShardSet
from video.sampling import Clip
from vision.tiling import Tiles

MID_GREY = 128


def blank(sample: Sample) -> Sample:
    """The sample with mid-grey in place of every pixel, of clips too, tiles as they were."""

    def grey(tiles: Tiles) -> Tiles:
        return Tiles(torch.full_like(tiles.pixels, MID_GREY), tiles.grid)

    clips = [Clip([grey(tiles) for tiles in clip.frames], clip.times) for clip in sample.videos]
    return replace(sample, images=[grey(tiles) for tiles in sample.images], videos=clips)


def one_frame(sample: Sample) -> Sample:
    """The sample with the middle frame alone of every clip: the control that sees no time."""
    clips = []
    for clip in sample.videos:
        middle = len(clip.frames) // 2
        clips.append(Clip([clip.frames[middle]], clip.times[middle : middle + 1]))
    return replace(sample, videos=clips)


def shuffled_frames(sample: Sample) -> Sample:
    """The sample with the frames of every clip in another order under the true times: the control that sees all that is
    shown, and not when. The order follows from what is shown."""
    clips = []
    for clip in sample.videos:
        seed = int(sum(int(tiles.pixels.long().sum()) for tiles in clip.frames))
        order = torch.randperm(len(clip.frames), generator=torch.Generator().manual_seed(seed)).tolist()
        clips.append(Clip([clip.frames[place] for place in order], clip.times))
    return replace(sample, videos=clips)


FRAMES: dict[str, Callable[[Sample], Sample]] = {
    "all": lambda sample: sample,
    "one": one_frame,
    "shuffled": shuffled_frames,
}


def with_other_sound(records: ShardSet | Sequence[Record], numbers: Sequence[int], number: int) -> Record:
    """A record with the sound of the next among `numbers` that has another and wants another answer, itself as it is.

    Raises:
        UserError: the record or the other one has no sound, or all want the same answer.
    """
    record, place = records[number], numbers.index(number)
    wanted = record_answer(record).casefold()
    for other_number in [*numbers[place + 1 :], *numbers[:place]]:
        other = records[other_number]
        if record_answer(other).casefold() != wanted and other.media != record.media:
            break
    else:
        raise UserError(f"no record wants another answer than {record.id}: there is no sound to replace its own with")
    own, others = ([name for name in one.media if name.rpartition(".")[2] in AUDIO] for one in (record, other))
    if not own or not others:
        raise UserError(f"record {(record if not own else other).id} holds no sound")
    sounds = {name: other.media[others[position % len(others)]] for position, name in enumerate(own)}
    return replace(record, media={**record.media, **sounds})
