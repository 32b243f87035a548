"""Clips whose question only time answers -> shard records: a picture moves over a background; how it does is asked.

Every clip comes in a group: one drawing of pictures, background, place and speed, once for each answer, which stand one
after the other in the shards: the first two, and so on, are each other's reverse or reorder the same frames. Nothing
but the order of the frames tells the answers of a group apart, and that exactly, because of two things:

- **One frame, at any time, has the same distribution under every answer.** The frame is a ring in both directions: what
  leaves at one side comes in at the other. A path starts at a place drawn evenly from the whole ring and is moved by
  it as a whole, so where the picture is at time k is even over the ring as well, whatever path it takes.
- **The frames of a clip without their order are the same under every answer.** "left" is "right" backwards, "up" is
  "down" backwards; that B moves and then A is A and then B backwards; and the clips of 0, 1, 2 and 3 turns visit
  the very same places: F places in a row are visited in t + 1 sweeps to and fro, each taking every (t + 1)-th of
  them. (A row of places is no column: frames in a wrong order tell the axis of a movement. So "left or right?" is asked
  of a row and "up or down?" of a column.)

Which of two things *appears* first could not be asked so: the earliest frame that shows anything shows the answer. So
both are there all the time, and it is asked which moves first. All of it holds for clips whose every frame is seen, or
frames that lie evenly about the clip's middle.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.pipeline.workers import in_order
from data_prep.sources.openmoji import concept_of
from data_prep.sources.splits import split_of
from data_prep.synthetic.backgrounds import NUM_BACKGROUNDS, background
from data_prep.synthetic.cutouts import Cutout
from foundation.errors import UserError
from shards.format import Record, make_id
from shards.writer import write_shards

TASKS = ("direction", "order", "order_by_name", "bounces", "caption")
MIN_SIZE, MIN_FRAMES = 32, 8
VALIDATION_SHARE, TEST_SHARE = 0.05, 0.15  # of the concepts and of the backgrounds
SUFFIX = "clip.webp"

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_TIMES = ("never bounces back", "bounces back once", "bounces back twice", "bounces back three times")


@dataclass(frozen=True)
class ClipScene:
    """What the clips of a group share: two things (name, RGBA uint8 [h, w, 4]) and a background [size, size, 3]."""

    things: Sequence[tuple[str, np.ndarray]]
    ground: np.ndarray

    @property
    def size(self) -> int:
        return len(self.ground)


@dataclass(frozen=True)
class Told:
    """One clip of a group, with what is said of it.

    Attributes:
        frames: uint8 [F, size, size, 3].
        answer: to the question, one of `choices`.
        caption: a sentence that says the same.
    """

    frames: np.ndarray
    question: str
    answer: str
    choices: tuple[str, ...]
    caption: str


def write_moving_clips(
    pictures: Sequence[Cutout],
    output: str | Path,
    num_train: int,
    num_test: int,
    num_validation: int = 0,
    tasks: Sequence[str] = TASKS,
    seed: int = 0,
    size: int = 64,
    num_frames: int = 16,
    frame_ms: int = 100,
    workers: int = 1,
    overwrite: bool = False,
    files: dict[str, str] | None = None,
) -> int:
    """Writes a set of moving clips as lossless animated WebP, and returns how many there are.

    Concepts and backgrounds of one split are in no other. A clip follows from the seed, its number in its split and
    the list of pictures alone.

    Args:
        pictures: (name, RGBA picture) of each thing; names of one concept go to one split (see `openmoji.concept_of`).
        num_train: clips, shared evenly among the tasks; each task is filled up to whole groups, and so with
            num_test and num_validation.
        tasks: some of TASKS. All but "caption" are questions.
        size: of the frames' sides, in pixels.
        frame_ms: milliseconds for which each frame is shown.
        workers: processes that draw.
        files: goes beside the shards, e.g. the pictures' licences.

    Raises:
        UserError: an unknown task; too few pictures for a split; frames too small or too few; the folder exists.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"no task {task!r}; there are: {', '.join(TASKS)}")
    if size < MIN_SIZE or num_frames < MIN_FRAMES:
        raise UserError(f"{num_frames} frames of {size} px: at least {MIN_FRAMES} frames of {MIN_SIZE} px are needed")
    numbers = {"train": num_train, "validation": num_validation, "test": num_test}
    sprites = _sprites(pictures, size)
    for split, number in numbers.items():
        if number and len(sprites[split]) < 2:
            raise UserError(
                f"{len(sprites[split])} of {len(pictures)} pictures fall to the split {split}; at least 2 are needed: "
                "give more pictures (names of one concept fall to one split)"
            )
    jobs = [
        (split, task, group)
        for split, number in numbers.items()
        for task in tasks
        for group in range(_num_groups(task, -(-number // len(tasks))))
    ]
    draw = partial(_group_records, sprites=sprites, seed=seed, size=size, num_frames=num_frames, frame_ms=frame_ms)
    groups = in_order(draw, jobs, workers)
    return write_shards((record for group in groups for record in group), output, overwrite=overwrite, files=files)


@cache
def backgrounds_of(split: str) -> list[int]:
    """The numbers of the backgrounds that a split may use."""
    return [n for n in range(NUM_BACKGROUNDS) if split_of(f"background {n}", VALIDATION_SHARE, TEST_SHARE) == split]


# ------------------------------------------------------------------------------------------------------------- paths


def straight_path(direction: str, start: tuple[int, int], step: int, num_frames: int) -> np.ndarray:
    """Places [F, 2] (x, y) in pixels, not yet on the ring. Backwards it is the opposite direction's, from the end."""
    return np.array(start) + np.arange(num_frames)[:, None] * step * np.array(DIRECTIONS[direction])


def bouncing_path(turns: int, start: tuple[int, int], step: tuple[int, int], num_frames: int) -> np.ndarray:
    """Places [F, 2] (x, y): all of start + i * step for i < F, in an order that turns back so many times.

    Every sweep takes the places i of one remainder modulo turns + 1, upwards and downwards in turn.
    """
    sweeps = [range(first, num_frames, turns + 1) for first in range(turns + 1)]
    order = [i for number, sweep in enumerate(sweeps) for i in (sweep if number % 2 == 0 else reversed(sweep))]
    return np.array(start) + np.array(order)[:, None] * np.array(step)


def one_after_the_other(
    starts: tuple[tuple[int, int], tuple[int, int]], steps: tuple[int, int], turn: int, num_frames: int
) -> np.ndarray:
    """Places [F, 2 things, 2 (x, y)]: until frame `turn` the first thing moves sideways, from there on the second."""
    frames = np.arange(num_frames)
    moved = np.stack((np.minimum(frames, turn), np.maximum(frames - turn, 0)), 1) * np.array(steps)
    return np.array(starts) + np.stack((moved, np.zeros_like(moved)), 2)


def draw_frames(ground: np.ndarray, sprites: Sequence[np.ndarray], places: np.ndarray) -> np.ndarray:
    """Lays pictures over a background, round the edges.

    Args:
        ground: uint8 [size, size, 3].
        sprites: RGBA uint8 [h, w, 4] each, the last one on top.
        places: [F, sprites, 2] (x, y) of each one's left upper corner, modulo size.

    Returns:
        uint8 [F, size, size, 3].
    """
    size = len(ground)
    frames = np.repeat(ground[None], len(places), 0)
    for frame, corners in zip(frames, places, strict=True):
        for sprite, (x, y) in zip(sprites, corners, strict=True):
            height, width = sprite.shape[:2]
            at = np.ix_((y + np.arange(height)) % size, (x + np.arange(width)) % size)
            alpha = sprite[..., 3:].astype(np.uint16)
            frame[at] = (frame[at] * (255 - alpha) + sprite[..., :3] * alpha + 127) // 255
    return frames


# ------------------------------------------------------------------------------------------------------------ groups


def direction_group(rng: np.random.Generator, scene: ClipScene, num_frames: int) -> list[Told]:
    """One thing moves left, right, up, down; each clip is asked about its own axis."""
    (name, sprite), _ = scene.things
    start, step = rng.integers(0, scene.size, 2), _step(rng, scene.size, num_frames, 0.25, 0.45)
    told = []
    for direction in DIRECTIONS:
        choices = ("left", "right") if direction in ("left", "right") else ("up", "down")
        places = straight_path(direction, start, step, num_frames)
        told.append(
            Told(
                draw_frames(scene.ground, [sprite], places[:, None]),
                f"Which way does it move, {choices[0]} or {choices[1]}?",
                direction,
                choices,
                f"The {name} moves {'to the ' if choices[0] == 'left' else ''}{direction}.",
            )
        )
    return [told[0], _reversed_of(told[0], told[1]), told[2], _reversed_of(told[2], told[3])]


def order_group(rng: np.random.Generator, scene: ClipScene, num_frames: int, by_name: bool) -> list[Told]:
    """Of an upper and a lower thing one moves sideways, then the other; and the same backwards."""
    (upper, upper_sprite), (lower, lower_sprite) = scene.things
    sprites = (upper_sprite, lower_sprite)
    lanes = [int(scene.size * lane) - len(sprite) // 2 for lane, sprite in zip((0.25, 0.75), sprites, strict=True)]
    starts = [(int(rng.integers(scene.size)), lane) for lane in lanes]
    steps = [int(rng.choice((-1, 1))) * _step(rng, scene.size, num_frames, 0.75, 1.25) for _ in lanes]
    turn = int(rng.integers(num_frames // 3, num_frames - num_frames // 3))
    frames = draw_frames(scene.ground, sprites, one_after_the_other(starts, steps, turn, num_frames))
    choices, question = ("upper", "lower"), "Which one moves first, the upper or the lower one?"
    if by_name:
        choices = (upper, lower)
        first, second = choices if rng.random() < 0.5 else choices[::-1]
        question = f"Which one moves first, the {first} or the {second}?"
    captions = (
        f"First the {upper} above moves, then the {lower} below.",
        f"First the {lower} below moves, then the {upper} above.",
    )
    return [
        Told(frames, question, choices[0], choices, captions[0]),
        Told(frames[::-1], question, choices[1], choices, captions[1]),
    ]


def bounces_group(rng: np.random.Generator, scene: ClipScene, num_frames: int) -> list[Told]:
    """One thing turns back 0, 1, 2, 3 times on its way over the same places."""
    (name, sprite), _ = scene.things
    start, step = rng.integers(0, scene.size, 2), _step(rng, scene.size, num_frames, 0.5, 0.75)
    step = step * np.array(DIRECTIONS[str(rng.choice(list(DIRECTIONS)))])
    told = []
    for turns, caption in enumerate(_TIMES):
        frames = draw_frames(scene.ground, [sprite], bouncing_path(turns, start, step, num_frames)[:, None])
        question, choices = "How often does it bounce back?", ("0", "1", "2", "3")
        told.append(Told(frames, question, str(turns), choices, f"The {name} {caption}."))
    return told


_GROUPS = {
    "direction": direction_group,
    "order": partial(order_group, by_name=False),
    "order_by_name": partial(order_group, by_name=True),
    "bounces": bounces_group,
}
_CAPTIONED = ("direction", "order", "bounces")  # in turn


def _step(rng: np.random.Generator, size: int, num_frames: int, low: float, high: float) -> int:
    """Pixels from frame to frame: so many of the ring's rounds in a whole clip."""
    return int(rng.integers(round(low * size / num_frames), round(high * size / num_frames) + 1))


def _reversed_of(told: Told, other: Told) -> Told:
    """The other's words about the frames of the first, backwards."""
    return replace(other, frames=told.frames[::-1])


def _num_groups(task: str, num_clips: int) -> int:
    """So many that they hold at least that many clips."""
    groups, clips = 0, 0
    while clips < num_clips:
        clips += _group_size(task, groups)
        groups += 1
    return groups


def _group_size(task: str, group: int) -> int:
    return 4 if _kind(task, group) in ("direction", "bounces") else 2


def _kind(task: str, group: int) -> str:
    return _CAPTIONED[group % len(_CAPTIONED)] if task == "caption" else task


def _group_records(
    job: tuple[str, str, int],
    sprites: dict[str, list[tuple[str, np.ndarray]]],
    seed: int,
    size: int,
    num_frames: int,
    frame_ms: int,
) -> list[Record]:
    """The records of group number `group` of a split and task."""
    split, task, group = job
    source = f"moving-clips/{seed}/{split}/{task}/{group}"
    rng = np.random.default_rng(int(make_id(source), 16))
    things = sprites[split]
    first = int(rng.integers(len(things)))
    second = (first + 1 + int(rng.integers(len(things) - 1))) % len(things)
    chosen = [(things[i][0], _resized(things[i][1], round(size * rng.uniform(0.3, 0.45)))) for i in (first, second)]
    scene = ClipScene(chosen, background(int(rng.choice(backgrounds_of(split))), size))
    kind = _kind(task, group)
    return [
        _record(f"{make_id(source)}-{number}", split, task, told, frame_ms)  # a group's stand together in the shards
        for number, told in enumerate(_GROUPS[kind](rng, scene, num_frames))
    ]


def _record(record_id: str, split: str, task: str, told: Told, frame_ms: int) -> Record:
    content = {"id": record_id, "split": split, "task": task, "language": "en"}
    content |= {"num_frames": len(told.frames), "duration": len(told.frames) * frame_ms / 1000}
    if task == "caption":
        content["caption"] = told.caption
    else:
        question = [{"type": "video", "video": SUFFIX}, {"type": "text", "text": told.question}]
        answer = [{"type": "text", "text": told.answer}]
        content["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        content["choices"] = list(told.choices)
    return Record(record_id, content, {SUFFIX: webp_clip(told.frames, frame_ms)})


def webp_clip(frames: np.ndarray, frame_ms: int) -> bytes:
    """uint8 [F, H, W, 3] -> lossless animated WebP. Frames that follow one another must differ, else it joins them."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    out = io.BytesIO()
    first.save(
        out,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=frame_ms,
        loop=0,
        lossless=True,
        quality=20,  # effort, where lossless
        method=0,
    )
    return out.getvalue()


def _sprites(pictures: Sequence[Cutout], size: int) -> dict[str, list[tuple[str, np.ndarray]]]:
    """(name, RGBA uint8 [h, w, 4], its long side half a frame) of each split, by name; one picture for a name."""
    found: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "validation": [], "test": []}
    named = dict(pictures)
    for name in sorted(named):
        split = split_of(concept_of(name), VALIDATION_SHARE, TEST_SHARE)
        found[split].append((name, _resized(np.asarray(named[name].convert("RGBA")), size // 2)))
    return found


def _resized(picture: np.ndarray, long_side: int) -> np.ndarray:
    scale = long_side / max(picture.shape[:2])
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
