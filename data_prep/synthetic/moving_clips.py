"""Clips of moving pictures, with questions that only the order of the frames answers -> shard records.

Clips come in groups. The clips of a group share objects, background, start and speed, and each has another answer; they
follow one another in the shards. Only the order of the frames distinguishes the answers of a group:

- **A single frame has the same distribution under every answer.** Frames wrap around in both directions: what leaves at
  one side enters at the other. The start of a path is uniform over the frame, so the position at each time is uniform
  too, whatever the path.
- **The set of a clip's frames is the same under every answer.** "left" is "right" reversed, "up" is "down" reversed,
  "B moves, then A" is "A moves, then B" reversed. Clips of 0, 1, 2 and 3 bounces visit the same F positions in a row:
  with t bounces in t + 1 sweeps to and fro, each over every (t + 1)-th position. (Frames in any order show the axis of
  a movement. So "left or right?" is asked about horizontal movements and "up or down?" about vertical ones.)

A question about which object *appears* first would not do: the first frame that shows an object would answer it. So
both objects are always visible, and the question is which one moves first. All this holds for a model that sees every
frame, or frames that are symmetric about the middle of the clip.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.pipeline.workers import map_in_order
from data_prep.sources.openmoji import concept_of
from data_prep.sources.splits import split_of
from data_prep.synthetic.backgrounds import NUM_BACKGROUNDS, background
from data_prep.synthetic.cutouts import Cutout
from foundation.errors import UserError
from shards.format import Record, make_id
from shards.writer import write_shards

Sprite = tuple[str, np.ndarray]  # name, RGBA uint8 [h, w, 4]
Point = Sequence[int] | np.ndarray  # x, y in pixels

TASKS = ("direction", "order", "order_by_name", "bounces", "caption")
MIN_SIZE, MIN_FRAMES = 32, 8
VALIDATION_SHARE, TEST_SHARE = 0.05, 0.15  # of the concepts and of the backgrounds
SUFFIX = "clip.webp"

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_BOUNCES = ("never bounces back", "bounces back once", "bounces back twice", "bounces back three times")


@dataclass(frozen=True)
class ClipScene:
    """What the clips of a group share.

    Attributes:
        sprites: two objects, each (name, RGBA uint8 [h, w, 4]).
        background: uint8 [size, size, 3].
    """

    sprites: Sequence[Sprite]
    background: np.ndarray

    @property
    def size(self) -> int:
        """The side of a frame, in pixels."""
        return len(self.background)


@dataclass(frozen=True)
class LabelledClip:
    """One clip of a group with its question and its caption.

    Attributes:
        frames: uint8 [F, size, size, 3].
        answer: to the question, one of `choices`.
        caption: a sentence that states the answer.
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
    """Write shards of moving clips as lossless animated WebP, and return the number of clips.

    A concept or a background is in one split only. A clip depends on the seed, its index in its split, and the list of
    pictures alone.

    Args:
        pictures: objects; names of one concept go to one split (see `openmoji.concept_of`).
        output: folder of shards to write.
        num_train, num_test, num_validation: clips, divided evenly among the tasks and rounded up to whole groups.
        tasks: some of TASKS. All but "caption" are questions.
        seed: of all random choices.
        size: of the frames' sides, in pixels.
        num_frames: of a clip.
        frame_ms: duration of a frame in milliseconds.
        workers: processes that draw.
        overwrite: replace the folder if it exists.
        files: texts to write beside the shards, such as the pictures' licences, by file name.

    Raises:
        UserError: an unknown task; too few pictures for a split; frames too small or too few; the folder exists.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"no task {task!r}; there are: {', '.join(TASKS)}")
    if size < MIN_SIZE or num_frames < MIN_FRAMES:
        raise UserError(f"{num_frames} frames of {size} px: at least {MIN_FRAMES} frames of {MIN_SIZE} px are needed")
    num_clips = {"train": num_train, "validation": num_validation, "test": num_test}
    sprites = _sprites(pictures, size)
    for split, count in num_clips.items():
        if count and len(sprites[split]) < 2:
            raise UserError(
                f"{len(sprites[split])} of {len(pictures)} pictures are in the split {split}; at least 2 are needed: "
                "give more pictures (names of one concept are in one split)"
            )
    jobs = [
        (split, task, group)
        for split, count in num_clips.items()
        for task in tasks
        for group in range(_num_groups(task, -(-count // len(tasks))))
    ]
    draw = partial(_group_records, sprites=sprites, seed=seed, size=size, num_frames=num_frames, frame_ms=frame_ms)
    groups = map_in_order(draw, jobs, workers)
    return write_shards((record for group in groups for record in group), output, overwrite=overwrite, files=files)


@cache
def backgrounds_of(split: str) -> list[int]:
    """The indices of the backgrounds that a split uses."""
    indices = range(NUM_BACKGROUNDS)
    return [index for index in indices if split_of(f"background {index}", VALIDATION_SHARE, TEST_SHARE) == split]


# ------------------------------------------------------------------------------------------------------------- paths


def straight_path(direction: str, start: Point, step: int, num_frames: int) -> np.ndarray:
    """Positions [F, 2] (x, y) in pixels, before wrapping; reversed it is a path in the opposite direction."""
    return np.array(start) + np.arange(num_frames)[:, None] * step * np.array(DIRECTIONS[direction])


def bouncing_path(turns: int, start: Point, step: Point, num_frames: int) -> np.ndarray:
    """Positions [F, 2] (x, y): all start + i * step for i < F, in an order that turns back `turns` times.

    Each sweep visits the i of one remainder modulo turns + 1, ascending and descending in turn.
    """
    sweeps = [range(first, num_frames, turns + 1) for first in range(turns + 1)]
    order = [i for index, sweep in enumerate(sweeps) for i in (sweep if index % 2 == 0 else reversed(sweep))]
    return np.array(start) + np.array(order)[:, None] * np.array(step)


def one_after_the_other(
    starts: Sequence[tuple[int, int]], steps: Sequence[int], turn: int, num_frames: int
) -> np.ndarray:
    """Positions [F, 2 objects, 2 (x, y)]: before frame `turn` the first moves sideways, from there on the second."""
    frames = np.arange(num_frames)
    moved = np.stack((np.minimum(frames, turn), np.maximum(frames - turn, 0)), 1) * np.array(steps)
    return np.array(starts) + np.stack((moved, np.zeros_like(moved)), 2)


def draw_frames(background: np.ndarray, sprites: Sequence[np.ndarray], positions: np.ndarray) -> np.ndarray:
    """Blend pictures over a background, wrapping around its edges.

    Args:
        background: uint8 [size, size, 3].
        sprites: RGBA uint8 [h, w, 4] each, the last one on top.
        positions: [F, sprites, 2] (x, y) of each one's upper left corner, modulo size.

    Returns:
        uint8 [F, size, size, 3].
    """
    size = len(background)
    frames = np.repeat(background[None], len(positions), 0)
    for frame, corners in zip(frames, positions, strict=True):
        for sprite, (x, y) in zip(sprites, corners, strict=True):
            height, width = sprite.shape[:2]
            pixels = np.ix_((y + np.arange(height)) % size, (x + np.arange(width)) % size)
            alpha = sprite[..., 3:].astype(np.uint16)
            frame[pixels] = (frame[pixels] * (255 - alpha) + sprite[..., :3] * alpha + 127) // 255
    return frames


# ------------------------------------------------------------------------------------------------------------ groups


def direction_group(rng: np.random.Generator, scene: ClipScene, num_frames: int) -> list[LabelledClip]:
    """One object moves left, right, up, down; each clip's question is about its own axis."""
    (name, sprite), _ = scene.sprites
    start, step = rng.integers(0, scene.size, 2), _step(rng, scene.size, num_frames, 0.25, 0.45)
    clips = []
    for direction in DIRECTIONS:
        choices = ("left", "right") if direction in ("left", "right") else ("up", "down")
        positions = straight_path(direction, start, step, num_frames)
        clips.append(
            LabelledClip(
                draw_frames(scene.background, [sprite], positions[:, None]),
                f"Which way does it move, {choices[0]} or {choices[1]}?",
                direction,
                choices,
                f"The {name} moves {'to the ' if choices[0] == 'left' else ''}{direction}.",
            )
        )
    left, right, up, down = clips
    return [left, replace(right, frames=left.frames[::-1]), up, replace(down, frames=up.frames[::-1])]


def order_group(rng: np.random.Generator, scene: ClipScene, num_frames: int, by_name: bool) -> list[LabelledClip]:
    """Of an upper and a lower object one moves sideways, then the other; and the same reversed."""
    (upper, upper_sprite), (lower, lower_sprite) = scene.sprites
    sprites = (upper_sprite, lower_sprite)
    lanes = [int(scene.size * lane) - len(sprite) // 2 for lane, sprite in zip((0.25, 0.75), sprites, strict=True)]
    starts = [(int(rng.integers(scene.size)), lane) for lane in lanes]
    steps = [int(rng.choice((-1, 1))) * _step(rng, scene.size, num_frames, 0.75, 1.25) for _ in lanes]
    turn = int(rng.integers(num_frames // 3, num_frames - num_frames // 3))
    frames = draw_frames(scene.background, sprites, one_after_the_other(starts, steps, turn, num_frames))
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
        LabelledClip(frames, question, choices[0], choices, captions[0]),
        LabelledClip(frames[::-1], question, choices[1], choices, captions[1]),
    ]


def bounces_group(rng: np.random.Generator, scene: ClipScene, num_frames: int) -> list[LabelledClip]:
    """One object bounces back 0, 1, 2, 3 times while it visits the same positions."""
    (name, sprite), _ = scene.sprites
    start, distance = rng.integers(0, scene.size, 2), _step(rng, scene.size, num_frames, 0.5, 0.75)
    step = distance * np.array(DIRECTIONS[str(rng.choice(list(DIRECTIONS)))])
    clips = []
    for turns, caption in enumerate(_BOUNCES):
        frames = draw_frames(scene.background, [sprite], bouncing_path(turns, start, step, num_frames)[:, None])
        question, choices = "How often does it bounce back?", ("0", "1", "2", "3")
        clips.append(LabelledClip(frames, question, str(turns), choices, f"The {name} {caption}."))
    return clips


_GROUPS: dict[str, Callable[[np.random.Generator, ClipScene, int], list[LabelledClip]]] = {
    "direction": direction_group,
    "order": partial(order_group, by_name=False),
    "order_by_name": partial(order_group, by_name=True),
    "bounces": bounces_group,
}
_CAPTION_KINDS = ("direction", "order", "bounces")  # take turns, by the index of the group


def _step(rng: np.random.Generator, size: int, num_frames: int, low: float, high: float) -> int:
    """Pixels per frame, such that a clip crosses `low` to `high` times the frame's width."""
    return int(rng.integers(round(low * size / num_frames), round(high * size / num_frames) + 1))


def _num_groups(task: str, num_clips: int) -> int:
    """The smallest number of groups that holds at least `num_clips` clips."""
    groups, clips = 0, 0
    while clips < num_clips:
        clips += _group_size(task, groups)
        groups += 1
    return groups


def _group_size(task: str, group: int) -> int:
    return 4 if _kind(task, group) in ("direction", "bounces") else 2


def _kind(task: str, group: int) -> str:
    return _CAPTION_KINDS[group % len(_CAPTION_KINDS)] if task == "caption" else task


def _group_records(
    job: tuple[str, str, int],
    sprites: dict[str, list[Sprite]],
    seed: int,
    size: int,
    num_frames: int,
    frame_ms: int,
) -> list[Record]:
    """The records of a group; `job` is its split, task and index."""
    split, task, group = job
    source = f"moving-clips/{seed}/{split}/{task}/{group}"
    rng = np.random.default_rng(int(make_id(source), 16))
    available = sprites[split]
    first = int(rng.integers(len(available)))
    second = (first + 1 + int(rng.integers(len(available) - 1))) % len(available)
    chosen = [
        (available[i][0], _resized(available[i][1], round(size * rng.uniform(0.3, 0.45)))) for i in (first, second)
    ]
    scene = ClipScene(chosen, background(int(rng.choice(backgrounds_of(split))), size))
    kind = _kind(task, group)
    return [
        _record(
            f"{make_id(source)}-{index}", split, task, clip, frame_ms
        )  # the ids keep a group together in the shards
        for index, clip in enumerate(_GROUPS[kind](rng, scene, num_frames))
    ]


def _record(record_id: str, split: str, task: str, clip: LabelledClip, frame_ms: int) -> Record:
    content: dict = {"id": record_id, "split": split, "task": task, "language": "en"}
    content |= {"num_frames": len(clip.frames), "duration": len(clip.frames) * frame_ms / 1000}
    if task == "caption":
        content["caption"] = clip.caption
    else:
        question = [{"type": "video", "video": SUFFIX}, {"type": "text", "text": clip.question}]
        answer = [{"type": "text", "text": clip.answer}]
        content["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        content["choices"] = list(clip.choices)
    return Record(record_id, content, {SUFFIX: webp_clip(clip.frames, frame_ms)})


def webp_clip(frames: np.ndarray, frame_ms: int) -> bytes:
    """uint8 [F, H, W, 3] -> lossless animated WebP. Successive frames must differ: WebP would join equal ones."""
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
        quality=20,  # the effort of lossless compression
        method=0,
    )
    return out.getvalue()


def _sprites(pictures: Sequence[Cutout], size: int) -> dict[str, list[Sprite]]:
    """The objects of each split, sorted by name, one picture per name; the long side is half a frame."""
    by_split: dict[str, list[Sprite]] = {"train": [], "validation": [], "test": []}
    picture_of = dict(pictures)
    for name in sorted(picture_of):
        split = split_of(concept_of(name), VALIDATION_SHARE, TEST_SHARE)
        by_split[split].append((name, _resized(np.asarray(picture_of[name].convert("RGBA")), size // 2)))
    return by_split


def _resized(picture: np.ndarray, long_side: int) -> np.ndarray:
    scale = long_side / max(picture.shape[:2])
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
