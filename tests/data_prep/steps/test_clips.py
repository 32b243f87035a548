"""Clips in place of pictures: each step of theirs alone, then the whole walk, however the pool lies."""

import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import data_prep.pipeline.curation
from app.commands.data import main
from data_prep.pipeline.curation import rethreshold, run, write_kept
from data_prep.pipeline.ledger import stats, why
from data_prep.pipeline.pool import RawSource
from data_prep.report.contact_sheets import contact_sheet
from data_prep.steps.clip_score import ClipScoreConfig
from data_prep.steps.clips import MAX_FRAMES, ShownClip, container_of, read_clip
from data_prep.steps.motion import Motion, motion_of
from data_prep.steps.near_duplicates import NearDuplicatesConfig
from data_prep.steps.ocr import OcrConfig
from data_prep.steps.overlay_text import OverlayTextConfig, covered_share
from data_prep.steps.video_score import MeanOverFrames, VideoScoreConfig
from shards.reader import ShardSet
from tests.data_prep.pipeline.test_curation import ROOT, decisions, id_of, outcome, save
from tests.data_prep.reports import report_of
from tests.data_prep.scripted import RednessClassifier, ScriptedScorer
from video.motion_vectors import codec_speed

PROGRAM = Path(__file__).parents[1] / "pipeline/killed_run.py"
NEAR = NearDuplicatesConfig(threshold=0.95)
VIDEO = VideoScoreConfig("any", "any", threshold=0.0)


def frames_of(seed: int, count: int = 6, step: int = 2, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """A blot of noise that moves `step` px to the right with each frame, over a still ground of noise."""
    draw = np.random.default_rng(seed)
    ground, blot = (
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).resize(to, Image.Resampling.BICUBIC)
        for shape, to in (((5, 6, 3), size), ((4, 4, 3), (20, 20)))
    )
    frames = [ground.copy() for _ in range(count)]
    for number, frame in enumerate(frames):
        frame.paste(blot, (8 + step * number, 14))
    return frames


def animation(frames: list[Image.Image], form: str = "WEBP", milliseconds: int = 100) -> bytes:
    out = io.BytesIO()
    settings = {"lossless": True, "minimize_size": False} if form == "WEBP" else {}
    frames[0].save(out, form, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **settings)
    return out.getvalue()


def film(frames: list[Image.Image], form: str = "mp4", rate: int = 10) -> bytes:
    av = pytest.importorskip("av", reason="films are made with PyAV")
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream({"mp4": "mpeg4", "webm": "libvpx", "avi": "mpeg4"}[form], rate=rate)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return out.getvalue()


def sound() -> bytes:
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def said_of(number: int) -> bytes:
    return f"A blot of colours moves over the old wall number {number}".encode()


@pytest.fixture(scope="module")
def clips() -> dict:
    """key -> (suffix, clip, caption): eight that move, in every container, of which the last does not."""
    made = {}
    for number in range(8):
        frames = frames_of(number, step=0 if number == 7 else 2)
        suffix = ("mp4", "webp", "gif", "webm")[number % 4]
        data = film(frames, suffix) if suffix in ("mp4", "webm") else animation(frames, suffix.upper())
        made[f"clip{number}"] = (suffix, data, said_of(number))
    return made


@pytest.fixture(scope="module")
def broken(clips) -> dict:
    avi = film(frames_of(50), "avi")
    return {
        "zero": ("mp4", b"", said_of(90)),
        "cut": ("mp4", clips["clip0"][1][:200], said_of(91)),
        "sound": ("mp4", sound(), said_of(92)),
        "avi": ("avi", avi, said_of(93)),
        "mute": ("webp", animation(frames_of(51)), b" "),
        "no-film": ("webm", b"\x1a\x45\xdf\xa3" + b"x" * 500, said_of(94)),
    }


@pytest.fixture
def curate_clips(curate):
    def config(source: Path, kind: str, output: str, **changes):
        sources = (RawSource(str(source), kind, media="clips"),)
        settings = {"image_rules": None, "resampling": None, "motion": Motion(0.02)}
        return curate(source, kind, output, **{"sources": sources, **settings, **changes})

    return config


def scripted(config) -> ScriptedScorer:
    return ScriptedScorer(config.pretrained)


def shown(frames: list[Image.Image], duration: float) -> ShownClip:
    times = np.arange(len(frames)) * duration / len(frames)
    return ShownClip(frames, times, duration, len(frames), frames[len(frames) // 2], b"")


def test_a_clip_is_frames_its_length_and_the_frame_in_its_middle():
    frames = frames_of(0, count=40, step=1)
    clip = read_clip(animation(frames))
    assert (clip.num_frames, len(clip.frames), clip.duration) == (40, MAX_FRAMES, pytest.approx(4.0))
    assert np.array_equal(np.asarray(clip.middle), np.asarray(frames[20]))
    assert np.all(np.diff(clip.times) > 0) and clip.times[-1] < 4.0
    one = read_clip(film(frames[:1]))
    assert (one.num_frames, len(one.frames)) == (1, 1)
    assert read_clip(film(frames)).num_frames == 40
    large = read_clip(animation(frames_of(0, size=(800, 100))))
    assert large.middle.size == (800, 100) and large.frames[0].size == (640, 80)


def test_what_contains_a_clip_is_seen_in_its_bytes(clips, broken):
    for suffix, data, _ in clips.values():
        assert container_of(data) == suffix
    for data in (broken["avi"][1], b"", b"any text"):
        with pytest.raises(ValueError, match="its container is none that shards hold"):
            container_of(data)


def test_motion_is_speed_in_short_sides_a_second():
    def moving(step: int, seconds: float, scale: int = 1) -> float:
        ground = np.random.default_rng(5).integers(0, 256, (24, 60, 3), dtype=np.uint8)
        wide = Image.fromarray(ground).resize((600 * scale, 240 * scale), Image.Resampling.BICUBIC)
        boxes = [(step * n * scale, 0, (320 + step * n) * scale, 240 * scale) for n in range(8)]
        return motion_of(shown([wide.crop(box) for box in boxes], seconds))

    assert moving(0, 2.0) == 0
    for step, seconds in ((6, 2.0), (6, 1.0), (12, 2.0)):  # px of 240 with each of 8 frames
        assert moving(step, seconds) == pytest.approx(step * 8 / seconds / 240, rel=0.15)
    assert moving(6, 2.0, scale=2) == pytest.approx(moving(6, 2.0), rel=0.05)
    assert motion_of(shown(frames_of(0, count=1), 3.0)) == 0 and motion_of(shown(frames_of(0), 0.0)) == 0


def test_the_codec_s_own_vectors_are_asked_where_there_are_any():
    frames = frames_of(0, count=12, step=1)
    with_vectors, without = read_clip(film(frames)), read_clip(animation(frames))
    ask = Motion(vectors=True).measure
    assert ask({"clip": [with_vectors]})["motion"] == [codec_speed(with_vectors.data)] != [motion_of(with_vectors)]
    assert ask({"clip": [without]})["motion"] == [motion_of(without)]
    assert Motion().measure({"clip": [with_vectors]})["motion"] == [motion_of(with_vectors)]
    assert Motion(vectors=True).measured_by() != Motion().measured_by()


def test_text_that_covers_a_place_twice_counts_once():
    left = (0.0, 0.0, 49.0, 0.0, 49.0, 99.0, 0.0, 99.0)
    middle = (25.0, 0.0, 74.0, 0.0, 74.0, 99.0, 25.0, 99.0)
    assert covered_share([], (100, 100)) == 0
    assert covered_share([left], (100, 100)) == pytest.approx(0.5)
    assert covered_share([left, middle], (100, 100)) == pytest.approx(0.75)
    outside = (-50.0, -50.0, 500.0, -50.0, 500.0, 500.0, -50.0, 500.0)
    assert covered_share([outside], (100, 100)) == 1


def test_overlay_text_goes_by_the_share_that_real_ocr_finds(pool, curate_clips, clips):
    pytest.importorskip("rapidocr")
    frames = frames_of(60, size=(320, 240))
    titled = [frame.copy() for frame in frames]
    for frame in titled:
        draw = ImageDraw.Draw(frame)
        draw.rectangle((20, 80, 300, 160), fill="black")
        draw.text((30, 90), "THE END", "white", font_size=60)
    pairs = {"plain": ("webp", animation(frames), said_of(1)), "titled": ("webp", animation(titled), said_of(2))}
    config = curate_clips(pool("tars", "a", pairs), "tars", "run", motion=None, overlay_text=OverlayTextConfig(0.05, 2))
    assert run(config) == 1
    assert "overlay_text: drop: text covers too much" in why(Path(config.output), "titled")


def test_a_scorer_of_pictures_scores_clips_by_the_mean_over_frames():
    class Red:
        id = "red"

        def score(self, picture, captions):
            return [RednessClassifier().score(picture)] * len(captions)

    frames = [Image.new("RGB", (4, 4), (red, 0, 0)) for red in (0, 51, 102)]
    assert MeanOverFrames(Red()).score(frames, ["a", "b"]) == pytest.approx([0.2, 0.2])
    assert MeanOverFrames(Red()).id == "mean of red"


@pytest.mark.parametrize("kind", ["tars", "folder", "parquet"])
def test_clips_are_written_as_they_are_and_what_cannot_be_read_is_named(pool, curate_clips, clips, broken, kind):
    pairs = {**clips, **broken}
    if kind == "tars":  # as our own shards name them
        pairs = {key: (f"clip.{suffix}", *rest) for key, (suffix, *rest) in pairs.items()}
    config = curate_clips(pool(kind, "a", pairs), kind, "run")
    assert run(config) == 7
    shards = ShardSet(Path(config.output) / "shards")
    by_id = {id_of(pair): pair for pair in pairs.values()}
    for record in shards:
        suffix, data, caption = by_id[record.id]
        assert record.media == {f"clip.{suffix.removeprefix('clip.')}": data}
        assert record.json["caption"] == caption.decode() and record.json["num_frames"] == 6
    index = shards.index
    assert index["num_frames"].to_pylist() == [6] * 7 and index["duration"].to_pylist() == pytest.approx([0.6] * 7)
    assert min(index["motion"].to_pylist()) >= 0.02
    rows = decisions(config.output)
    assert [row["step"] for row in rows[id_of(clips["clip7"])]] == ["motion"]
    words = {
        "zero": "unreadable clip: the file is empty", "cut": "unreadable clip: ", "sound": "unreadable clip: .*sound",
        "avi": "unreadable clip: its container", "mute": "the caption is empty", "no-film": "unreadable clip: ",
    }  # fmt: skip
    for key, word in words.items():
        (row,) = rows[id_of(broken[key])]
        assert (row["step"], row["decision"]) == ("ingest", "drop") and re.search(word, row["reason"]), row["reason"]


@pytest.mark.parametrize("change", ["three files", "reversed", "two workers", "twice"])
def test_the_same_clips_give_the_same_bytes(pool, curate_clips, clips, broken, change):
    pairs, settings = {**clips, **broken}, {"near_duplicates": NEAR, "video_score": VIDEO}
    one = curate_clips(pool("tars", "one", pairs), "tars", "one", **settings)
    run(one, Path, scripted)
    expected, other = outcome(one.output), one
    if change != "twice":
        turned = dict(reversed(pairs.items())) if change == "reversed" else pairs
        folder = pool("tars", "other", turned, files=1 if change == "reversed" else 3)
        other = curate_clips(folder, "tars", "other", workers=2 if "workers" in change else 1, **settings)
    run(other, Path, scripted)
    assert len(expected) > 4 and outcome(other.output) == expected


@pytest.mark.slow
def test_a_run_over_clips_that_is_killed_goes_on(pool, curate_clips, clips, tmp_path):
    folder = pool("tars", "a", clips, files=3)
    whole, cut = (curate_clips(folder, "tars", name) for name in ("whole", "cut"))
    run(whole)
    file = save(cut, tmp_path / "cut.yaml")
    for moment, ends in ((2, -signal.SIGKILL), (4, -signal.SIGKILL), (100, 0)):
        command = [sys.executable, str(PROGRAM), str(file), str(moment)]
        assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == ends
    assert outcome(cut.output) == outcome(whole.output)


def test_near_duplicates_are_found_by_the_frame_in_the_middle(pool, curate_clips, clips):
    again = animation(frames_of(0), milliseconds=120)  # clip0 in another container, at another rate
    pairs = {**clips, "again": ("webp", again, said_of(100))}
    config = curate_clips(pool("tars", "a", pairs), "tars", "run", near_duplicates=NEAR)
    assert run(config) == 7
    assert ("near_duplicates", "drop", "near duplicate of a pair that stays", 1) in stats(Path(config.output))


def test_deciding_anew_needs_neither_clips_nor_models(pool, curate_clips, clips, capsys):
    scores = {"clip_score": ClipScoreConfig("any", "any", threshold=0.0), "video_score": replace(VIDEO, threshold=0.02)}
    config = curate_clips(pool("tars", "a", clips), "tars", "run", **scores)
    assert run(config, Path, scripted) == 5  # those of 2 to 6
    work = Path(config.output)
    assert ("video_score", "drop", "video-text score too low", 2) in stats(work)
    rethreshold(work, replace(config, video_score=VIDEO))
    assert write_kept(work) == 7
    assert main(["rethreshold", "--work", str(work), "--motion", "0", "--video-score", "0.05"]) == 0
    assert write_kept(work) == 3
    page = report_of(work)
    assert "motion.threshold" in page and "<figure class=clip>" in page
    with pytest.raises(ValueError, match="video_score: frames cannot be changed without `mm data run`"):
        rethreshold(work, replace(config, video_score=replace(VIDEO, frames=3)))
    with pytest.raises(ValueError, match="overlay_text was not part of the run"):
        rethreshold(work, replace(config, overlay_text=OverlayTextConfig()))
    with pytest.raises(ValueError, match="video_score needs a model"):
        run(replace(config, clip_score=None))


def test_a_contact_sheet_shows_frames_in_order_with_their_times():
    frames = [Image.new("RGB", (200, 100), (value, 0, 0)) for value in (0, 60, 120, 180, 240)]
    sheet = contact_sheet(shown(frames, 5.0), 96)
    assert sheet.size == (4 * 96 + 3 * 2, 48 + 12)
    assert [sheet.getpixel((98 * number + 48, 24))[0] for number in range(4)] == [0, 60, 180, 240]
    stamps = [np.asarray(sheet.crop((98 * n, 48, 98 * n + 96, 60))) for n in range(4)]
    assert all(stamp.min() < 128 for stamp in stamps) and not np.array_equal(stamps[0], stamps[1])


def test_settings_that_contradict_each_other_are_refused(tmp_path, curate, curate_clips):
    with pytest.raises(ValueError, match="motion is for clips"):
        curate(tmp_path, "tars", "run", motion=Motion())
    with pytest.raises(ValueError, match="ocr is for pictures"):
        curate_clips(tmp_path, "tars", "run", ocr=OcrConfig())
    with pytest.raises(ValueError, match=r"write\.max_side is for pictures"):
        curate_clips(tmp_path, "tars", "run", write=data_prep.pipeline.curation.WriteConfig(max_side=64))
    with pytest.raises(ValueError, match="pictures and of clips"):
        curate(tmp_path, "tars", "run", sources=(RawSource("a", "tars"), RawSource("b", "tars", media="clips")))
