import numpy as np
import pytest

from data_prep.steps.clips import MAX_FRAMES, container_of, read_clip
from foundation.errors import UserError
from tests.data_prep.clip_files import animation, moving_frames, video


def test_frames_are_spread_over_the_clip():
    frames = moving_frames(0, count=40, step=1)
    clip = read_clip(animation(frames))
    assert (clip.num_frames, len(clip.frames), clip.duration) == (40, MAX_FRAMES, pytest.approx(4.0))
    assert np.array_equal(np.asarray(clip.middle), np.asarray(frames[20]))
    assert np.all(np.diff(clip.times) > 0) and clip.times[-1] < 4.0
    assert read_clip(video(frames)).num_frames == 40


def test_a_clip_of_one_frame_is_read():
    clip = read_clip(video(moving_frames(0, count=1)))
    assert (clip.num_frames, len(clip.frames)) == (1, 1)


def test_frames_are_shrunk_but_the_middle_one():
    clip = read_clip(animation(moving_frames(0, size=(800, 100))))
    assert clip.middle.size == (800, 100) and clip.frames[0].size == (640, 80)


def test_the_container_is_recognised_by_its_bytes():
    frames = moving_frames(0)
    for suffix in ("mp4", "webm"):
        assert container_of(video(frames, suffix)) == suffix
    for suffix in ("webp", "gif"):
        assert container_of(animation(frames, suffix.upper())) == suffix


def test_other_containers_are_refused():
    for data in (video(moving_frames(50), "avi"), b"", b"any text"):
        with pytest.raises(UserError, match=r"mp4, webm, webp, gif"):
            container_of(data)
