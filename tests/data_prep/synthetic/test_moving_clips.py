import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.sources.openmoji import concept_of
from data_prep.synthetic.backgrounds import background
from data_prep.synthetic.moving_clips import (
    DIRECTIONS,
    TASKS,
    bouncing_path,
    one_after_the_other,
    straight_path,
    write_moving_clips,
)
from shards.reader import ShardSet

FRAMES = 16
PLACE = (7, 11)


def pictures(count=60):
    """Coloured shapes without symmetry."""
    rng = np.random.default_rng(0)
    shapes = []
    for number in range(count):
        picture = Image.new("RGBA", (40, 40))
        ImageDraw.Draw(picture).polygon(
            [tuple(map(float, corner)) for corner in rng.uniform(0, 40, (5, 2))],
            (*map(int, rng.integers(0, 100, 3)), 255),
        )
        shapes.append((f"thing{number}", picture.crop(picture.getchannel("A").getbbox())))
    return shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("moving") / "set"
    write_moving_clips(pictures(), output, num_train=800, num_test=60, num_validation=20, files={"LICENSE": "free"})
    return output


def frames_of(record):
    """uint8 [F, H, W, 3] and the seconds for which each is shown."""
    with Image.open(io.BytesIO(record.media["clip.webp"])) as clip:
        frames, durations = [], []
        for number in range(clip.n_frames):
            clip.seek(number)
            frames.append(np.asarray(clip.convert("RGB")))
            durations.append(clip.info["duration"])
    return np.stack(frames), durations


def groups_of(shards, task):
    """Groups of records that have the same frames in any order."""
    groups = {}
    for record in shards.select(split="train", task=task):
        frames, _ = frames_of(record)
        key = tuple(sorted(frame.tobytes() for frame in frames))
        groups.setdefault(key, []).append((record, frames))
    return list(groups.values())


def answer_of(record):
    return record.json["messages"][1]["content"][0]["text"]


def turns_of(path):
    """How often a path changes its direction along its axis."""
    steps = np.sign(np.diff(path[:, np.ptp(path, 0).argmax()]))
    return int((steps[1:] != steps[:-1]).sum())


# A single frame has the same distribution under every answer: exactly, over all start positions


@pytest.mark.parametrize("ring", [12, 17])
def test_positions_are_uniform_at_every_time_under_every_answer(ring):
    starts = [(x, y) for x in range(ring) for y in range(ring)]
    paths = [lambda start, d=d: straight_path(d, start, 3, FRAMES) for d in DIRECTIONS]
    paths += [lambda start, t=t: bouncing_path(t, start, (0, 2), FRAMES) for t in range(4)]
    for path in paths:
        places = np.stack([path(start) % ring for start in starts])  # [starts, F, 2]
        for frame in range(FRAMES):
            assert {tuple(place) for place in places[:, frame].tolist()} == set(starts)


def test_positions_of_both_objects_are_uniform_whichever_moves_first():
    ring = 11
    starts = [((x, 1), (y, 6)) for x in range(ring) for y in range(ring)]
    forward = np.stack([one_after_the_other(start, (2, -3), 6, FRAMES) % ring for start in starts])
    for places in (forward, forward[:, ::-1]):
        for frame in range(FRAMES):
            assert len({tuple(place) for place in places[:, frame].reshape(-1, 4).tolist()}) == ring**2


def test_paths_move_as_their_names_say():
    for turns in range(4):
        for frames in (8, 15, 16, 33):
            path = bouncing_path(turns, PLACE, (2, 0), frames)
            assert turns_of(path) == turns
            assert sorted(path[:, 0]) == [7 + 2 * i for i in range(frames)] and set(path[:, 1]) == {11}
    for one, other in (("left", "right"), ("up", "down")):
        path = straight_path(one, PLACE, 3, FRAMES)
        assert (path[::-1] == straight_path(other, path[-1], 3, FRAMES)).all()
    assert (np.diff(straight_path("left", PLACE, 3, FRAMES)[:, 0]) == -3).all()
    assert (np.diff(straight_path("down", PLACE, 3, FRAMES)[:, 1]) == 3).all()
    moved = np.diff(one_after_the_other((PLACE, PLACE), (2, -3), 6, FRAMES), axis=0)[..., 0]
    assert moved[:6].tolist() == [[2, 0]] * 6 and moved[6:].tolist() == [[0, -3]] * 9


# The same on the clips themselves


@pytest.mark.parametrize("task", ["direction", "order", "order_by_name", "bounces"])
def test_clips_of_a_group_differ_in_the_order_of_frames_only(folder, task):
    groups = groups_of(ShardSet(folder), task)
    assert len(groups) >= 40
    for group in groups:
        answers = [answer_of(record) for record, _ in group]
        assert sorted(answers) == sorted(group[0][0].json["choices"])  # each answer once
        assert len({record.json["messages"][0]["content"][1]["text"] for record, _ in group}) == 1
        if task != "bounces":
            (_, one), (_, other) = group
            assert (one == other[::-1]).all() and not (one == other).all()


def test_a_linear_classifier_needs_two_frames_to_tell_the_direction(folder):
    """Ridge regression on half of the groups, tested on the others: 40 clips, so guessing is 0.5 +- 0.16."""
    pairs = [pair for pair in groups_of(ShardSet(folder), "direction") if "left" in pair[0][0].json["choices"]]
    half = len(pairs) // 2

    def accuracy(features_of):
        rows = [
            [(features_of(frames), 1.0 if answer_of(r) == "left" else -1.0) for r, frames in pair] for pair in pairs
        ]
        train, test = (
            list(zip(*(row for pair in part for row in pair), strict=True)) for part in (rows[:half], rows[half:])
        )
        x, y = np.stack(train[0]).astype(np.float64), np.array(train[1])
        kernel = x @ x.T
        weights = x.T @ np.linalg.solve(kernel + 0.1 * np.trace(kernel) / len(y) * np.eye(len(y)), y)
        return float(np.mean(np.sign(np.stack(test[0]) @ weights) == np.array(test[1])))

    for frame in (0, FRAMES // 2, FRAMES - 1):
        assert abs(accuracy(lambda frames, k=frame: frames[k, ::2, ::2].ravel() / 255) - 0.5) < 0.2

    def shift(frames):
        """Correlation of the second frame with the first one, shifted by -6 to 6 pixels."""
        one, two = (np.abs(np.diff(frame.astype(float).sum(2), axis=1)) for frame in frames[:2])
        return np.array([(np.roll(one, by, 1) * two).mean() for by in range(-6, 7)]) / (one * two).mean()

    assert accuracy(shift) > 0.85


def test_clips_show_the_movement_of_their_answer(folder):
    """The moving part is found from the pixels alone."""
    for group in groups_of(ShardSet(folder), "order")[:12]:
        for record, frames in group:
            changed = (frames[1].astype(int) != frames[0]).any((1, 2))
            assert answer_of(record) == ("upper" if np.flatnonzero(changed).mean() < 32 else "lower")
    for group in groups_of(ShardSet(folder), "direction")[:12]:
        for record, frames in group:
            assert record.json["choices"] in (["left", "right"], ["up", "down"])
            axis = 1 if answer_of(record) in ("left", "right") else 0
            still = (frames == frames[:1]).all((0, 3))  # movement along an axis leaves the other lines unchanged
            assert still.all(axis).any() and not still.all()


def test_number_and_content_of_the_records(folder):
    shards = ShardSet(folder)
    counts = Counter((row["split"], row["task"]) for row in shards.index.to_pylist())
    assert {split for split, _ in counts} == {"train", "validation", "test"}
    assert all(160 <= counts["train", task] < 164 for task in TASKS)
    assert all(12 <= counts["test", task] < 16 for task in TASKS)
    assert (folder / "LICENSE").read_text() == "free"
    for record in shards.select(split="test"):
        frames, durations = frames_of(record)
        assert frames.shape == (FRAMES, 64, 64, 3) and durations == [100] * FRAMES
        assert record.json["num_frames"] == FRAMES and record.json["duration"] == 1.6
    rows = shards.index.to_pylist()
    assert {(row["num_frames"], row["duration"]) for row in rows} == {(FRAMES, 1.6)}
    captions = [row["caption"] for row in rows if row["task"] == "caption"]
    for words in ("moves to the left.", "moves up.", "bounces back twice.", "never bounces back.", "below."):
        assert any(caption.endswith(words) for caption in captions)


def test_each_concept_and_each_background_is_in_one_split(folder):
    concepts, backgrounds = {}, {}
    for record in ShardSet(folder):
        split = record.json["split"]
        text = record.json.get("caption") or " ".join(
            [record.json["messages"][0]["content"][1]["text"], answer_of(record)]
        )
        concepts.setdefault(split, set()).update(word for word in text.strip(".?").split() if word.startswith("thing"))
        median = np.median(frames_of(record)[0], 0).astype(np.uint8)  # objects move, so the median is the background
        backgrounds.setdefault(split, set()).add(median[::8, ::8].tobytes())
    for kind in (concepts, backgrounds):
        assert all(len(values) > 1 for values in kind.values())
        for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
            assert not kind[one] & kind[other]
    assert len({background(number, 32).tobytes() for number in range(300)}) == 300


def test_variants_of_a_concept_are_in_one_split(tmp_path):
    names = [f"{person} number {n}" for n in range(40) for person in ("man", "woman")]
    shapes = [picture for _, picture in pictures(80)]
    write_moving_clips(list(zip(names, shapes, strict=True)), tmp_path / "set", 60, 60, tasks=["order_by_name"])
    sides = {}
    for record in ShardSet(tmp_path / "set"):
        for name in record.json["choices"]:
            sides.setdefault(concept_of(name), set()).add(record.json["split"])
    assert all(len(splits) == 1 for splits in sides.values()) and len(sides) > 15


def test_the_same_clips_for_any_order_of_pictures_and_number_of_workers(tmp_path):
    cutouts = pictures()
    for name, ordered, workers in (("a", cutouts, 1), ("b", cutouts[::-1], 2)):
        write_moving_clips(ordered, tmp_path / name, 30, 10, workers=workers, size=40, num_frames=8)
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert one == other
    write_moving_clips(cutouts, tmp_path / "c", 30, 10, seed=1, size=40, num_frames=8)
    assert (tmp_path / "c" / "000000.tar").read_bytes() != one["000000.tar"]
    more = write_moving_clips(cutouts, tmp_path / "d", 60, 10, size=40, num_frames=8)
    few, many = ({record.id: record for record in ShardSet(tmp_path / name)} for name in "ad")
    assert more == len(many) > len(few) and all(many[name] == record for name, record in few.items())


def test_wrong_settings_are_refused(tmp_path):
    for change, message in (
        ({"tasks": ["speed"]}, "no task 'speed'; there are: direction"),
        ({"size": 8}, "at least 8 frames of 32 px"),
        ({"num_frames": 4}, "4 frames of 64 px"),
        ({"pictures": pictures(3)}, "of 3 pictures are in the split"),
    ):
        options = {"pictures": pictures(), "output": tmp_path / "set", "num_train": 8, "num_test": 8, **change}
        with pytest.raises(ValueError, match=message):
            write_moving_clips(**options)
    assert not list(tmp_path.iterdir())
