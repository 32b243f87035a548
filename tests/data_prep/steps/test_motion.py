import numpy as np
import pytest
from PIL import Image

from data_prep.steps.clips import read_clip
from data_prep.steps.motion import Motion, flow_speed
from tests.data_prep.clip_files import animation, decoded, moving_frames, video
from video.motion_vectors import codec_speed


def test_motion_is_measured_in_short_sides_per_second():
    def moving(step: int, seconds: float, scale: int = 1) -> float:
        background = np.random.default_rng(5).integers(0, 256, (24, 60, 3), dtype=np.uint8)
        wide = Image.fromarray(background).resize((600 * scale, 240 * scale), Image.Resampling.BICUBIC)
        boxes = [(step * n * scale, 0, (320 + step * n) * scale, 240 * scale) for n in range(8)]
        return flow_speed(decoded([wide.crop(box) for box in boxes], seconds))

    assert moving(0, 2.0) == 0
    for step, seconds in ((6, 2.0), (6, 1.0), (12, 2.0)):  # px per frame, of 240 px, over 8 frames
        assert moving(step, seconds) == pytest.approx(step * 8 / seconds / 240, rel=0.15)
    assert moving(6, 2.0, scale=2) == pytest.approx(moving(6, 2.0), rel=0.05)


def test_one_frame_or_no_duration_is_no_motion():
    assert flow_speed(decoded(moving_frames(0, count=1), 3.0)) == 0
    assert flow_speed(decoded(moving_frames(0), 0.0)) == 0


def test_motion_vectors_of_the_codec_are_used_where_the_file_has_them():
    frames = moving_frames(0, count=12, step=1)
    with_vectors, without = read_clip(video(frames)), read_clip(animation(frames))
    measure = Motion(vectors=True).measure
    assert measure({"clip": [with_vectors]})["motion"] == [codec_speed(with_vectors.data)] != [flow_speed(with_vectors)]
    assert measure({"clip": [without]})["motion"] == [flow_speed(without)]
    assert Motion().measure({"clip": [with_vectors]})["motion"] == [flow_speed(with_vectors)]
    assert Motion(vectors=True).measure_settings() != Motion().measure_settings()
