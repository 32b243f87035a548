"""Runs over clips: what is written, what is dropped, and that neither depends on how the pool is stored."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from app.commands import data as data_commands
from data_prep.pipeline.curation import rethreshold, run, write_kept
from data_prep.pipeline.ledger import stats
from data_prep.pipeline.pool import RawSource
from data_prep.pipeline.writing import WriteConfig
from data_prep.steps.clip_score import ClipScoreConfig
from data_prep.steps.motion import Motion
from data_prep.steps.near_duplicates import NearDuplicatesConfig
from data_prep.steps.ocr import OcrConfig
from data_prep.steps.overlay_text import OverlayTextConfig
from data_prep.steps.video_score import VideoScoreConfig
from foundation.errors import UserError
from shards.reader import ShardSet
from tests.data_prep.clip_files import animation, caption_of, moving_frames, sound_file, video
from tests.data_prep.reports import report_of
from tests.data_prep.runs import ROOT, decisions, id_of, outcome, save
from tests.data_prep.scripted import ScriptedScorer

PROGRAM = Path(__file__).with_name("killed_run.py")
NEAR = NearDuplicatesConfig(threshold=0.95)
VIDEO = VideoScoreConfig("any", "any", threshold=0.0)
CLIP = ClipScoreConfig("any", "any", threshold=0.0)


@pytest.fixture(scope="module")
def clips() -> dict:
    """key -> (suffix, clip, caption): seven moving clips and a still one, clip7, in every container."""
    made = {}
    for number in range(8):
        frames = moving_frames(number, step=0 if number == 7 else 2)
        suffix = ("mp4", "webp", "gif", "webm")[number % 4]
        data = video(frames, suffix) if suffix in ("mp4", "webm") else animation(frames, suffix.upper())
        made[f"clip{number}"] = (suffix, data, caption_of(number))
    return made


@pytest.fixture(scope="module")
def broken(clips) -> dict:
    avi = video(moving_frames(50), "avi")
    return {
        "zero": ("mp4", b"", caption_of(90)),
        "cut": ("mp4", clips["clip0"][1][:200], caption_of(91)),
        "sound": ("mp4", sound_file(), caption_of(92)),
        "avi": ("avi", avi, caption_of(93)),
        "mute": ("webp", animation(moving_frames(51)), b" "),
        "no-video": ("webm", b"\x1a\x45\xdf\xa3" + b"x" * 500, caption_of(94)),
    }


def load_scripted(config) -> ScriptedScorer:
    return ScriptedScorer(config.pretrained)


@pytest.fixture(params=["tars", "folder", "parquet"])
def run_with_broken(request, pool, curate_clips, clips, broken):
    """(pairs, finished run over moving, still and broken clips), for each kind of source."""
    pairs = {**clips, **broken}
    if request.param == "tars":  # named as in our shards
        pairs = {key: (f"clip.{suffix}", *rest) for key, (suffix, *rest) in pairs.items()}
    config = curate_clips(pool(request.param, "a", pairs), request.param, "run")
    assert run(config) == 7
    return pairs, Path(config.output)


def test_clips_are_written_unchanged(run_with_broken):
    pairs, work = run_with_broken
    by_id = {id_of(pair): pair for pair in pairs.values()}
    for record in ShardSet(work / "shards"):
        suffix, data, caption = by_id[record.id]
        assert record.media == {f"clip.{suffix.removeprefix('clip.')}": data}
        assert record.json["caption"] == caption.decode() and record.json["num_frames"] == 6


def test_the_index_has_the_length_and_motion_of_clips(run_with_broken):
    _, work = run_with_broken
    index = ShardSet(work / "shards").index
    assert index["num_frames"].to_pylist() == [6] * 7 and index["duration"].to_pylist() == pytest.approx([0.6] * 7)
    assert min(index["motion"].to_pylist()) >= 0.02


def test_a_still_clip_is_dropped(run_with_broken, clips):
    _, work = run_with_broken
    assert [row["step"] for row in decisions(work)[id_of(clips["clip7"])]] == ["motion"]


def test_the_reason_says_why_a_clip_cannot_be_read(run_with_broken, broken):
    _, work = run_with_broken
    rows = decisions(work)
    words = {
        "zero": "unreadable clip: the file is empty", "cut": "unreadable clip: ", "sound": "unreadable clip: .*sound",
        "avi": "unreadable clip: its container", "mute": "the caption is empty", "no-video": "unreadable clip: ",
    }  # fmt: skip
    for key, word in words.items():
        (row,) = rows[id_of(broken[key])]
        assert (row["step"], row["decision"]) == ("ingest", "drop") and re.search(word, row["reason"]), row["reason"]


@pytest.mark.parametrize("change", ["three files", "reversed", "two workers", "twice"])
def test_the_same_clips_give_the_same_bytes(pool, curate_clips, clips, broken, change):
    pairs, settings = {**clips, **broken}, {"near_duplicates": NEAR, "video_score": VIDEO}
    one = curate_clips(pool("tars", "one", pairs), "tars", "one", **settings)
    run(one, Path, load_scripted)
    expected, other = outcome(one.output), one
    if change != "twice":
        ordered = dict(reversed(pairs.items())) if change == "reversed" else pairs
        folder = pool("tars", "other", ordered, files=1 if change == "reversed" else 3)
        other = curate_clips(folder, "tars", "other", workers=2 if "workers" in change else 1, **settings)
    run(other, Path, load_scripted)
    assert len(expected) > 4 and outcome(other.output) == expected


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_run_over_clips_continues(pool, curate_clips, clips, tmp_path):
    folder = pool("tars", "a", clips, files=3)
    complete, killed = (curate_clips(folder, "tars", name) for name in ("complete", "killed"))
    run(complete)
    file = save(killed, tmp_path / "killed.yaml")
    for moment, exit_code in ((2, -signal.SIGKILL), (4, -signal.SIGKILL), (100, 0)):
        command = [sys.executable, str(PROGRAM), str(file), str(moment)]
        assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == exit_code
    assert outcome(killed.output) == outcome(complete.output)


def test_near_duplicates_are_found_by_the_middle_frame(pool, curate_clips, clips):
    again = animation(moving_frames(0), milliseconds=120)  # clip0 in another container, at another rate
    pairs = {**clips, "again": ("webp", again, caption_of(100))}
    config = curate_clips(pool("tars", "a", pairs), "tars", "run", near_duplicates=NEAR)
    assert run(config) == 7
    assert ("near_duplicates", "drop", "near duplicate of a pair that stays", 1) in stats(Path(config.output))


@pytest.fixture
def scored_run(pool, curate_clips, clips):
    """(configuration, folder) of a run with scores, of which the video score drops two."""
    config = curate_clips(
        pool("tars", "a", clips), "tars", "run", clip_score=CLIP, video_score=replace(VIDEO, threshold=0.02)
    )
    assert run(config, Path, load_scripted) == 5  # those of 2 to 6
    assert ("video_score", "drop", "video-text score too low", 2) in stats(Path(config.output))
    return config, Path(config.output)


def test_rethresholding_needs_no_model(scored_run):
    config, work = scored_run
    rethreshold(work, replace(config, video_score=VIDEO))
    assert write_kept(work) == 7
    data_commands.rethreshold(["--work", str(work), "--motion", "0", "--video-score", "0.05"])
    assert write_kept(work) == 3


def test_the_report_shows_contact_sheets_of_clips(scored_run):
    page = report_of(scored_run[1])
    assert "motion.threshold" in page and '<figure class="clip"><img' in page


def test_settings_that_were_not_measured_are_refused(scored_run):
    config, work = scored_run
    with pytest.raises(UserError, match=r"video_score: frames .*`mm data run`"):
        rethreshold(work, replace(config, video_score=replace(VIDEO, frames=3)))
    with pytest.raises(UserError, match=r"overlay_text .*`mm data run`"):
        rethreshold(work, replace(config, overlay_text=OverlayTextConfig()))


def test_a_score_without_a_model_is_refused(tmp_path, curate_clips):
    with pytest.raises(UserError, match=r"video_score .*load_video_scorer"):
        run(curate_clips(tmp_path, "tars", "run", video_score=VIDEO))


def test_settings_for_the_other_kind_of_media_are_refused(tmp_path, curate, curate_clips):
    with pytest.raises(UserError, match=r"motion .*clips"):
        curate(tmp_path, "tars", "run", motion=Motion())
    with pytest.raises(UserError, match=r"ocr .*pictures"):
        curate_clips(tmp_path, "tars", "run", ocr=OcrConfig())
    with pytest.raises(UserError, match=r"write\.max_side .*pictures"):
        curate_clips(tmp_path, "tars", "run", write=WriteConfig(max_side=64))
    with pytest.raises(UserError, match=r"pictures .*clips"):
        curate(tmp_path, "tars", "run", sources=(RawSource("a", "tars"), RawSource("b", "tars", media="clips")))
