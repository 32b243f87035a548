from pathlib import Path

import pytest
from PIL import ImageDraw

from data_prep.pipeline.curation import run
from data_prep.pipeline.ledger import why
from data_prep.steps.overlay_text import OverlayTextConfig, covered_share
from tests.data_prep.clip_files import animation, caption_of, moving_frames


def test_overlapping_boxes_are_counted_once():
    left = (0.0, 0.0, 49.0, 0.0, 49.0, 99.0, 0.0, 99.0)
    middle = (25.0, 0.0, 74.0, 0.0, 74.0, 99.0, 25.0, 99.0)
    assert covered_share([], (100, 100)) == 0
    assert covered_share([left], (100, 100)) == pytest.approx(0.5)
    assert covered_share([left, middle], (100, 100)) == pytest.approx(0.75)
    outside = (-50.0, -50.0, 500.0, -50.0, 500.0, 500.0, -50.0, 500.0)
    assert covered_share([outside], (100, 100)) == 1


def test_a_clip_with_a_title_is_dropped(pool, curate_clips):
    pytest.importorskip("rapidocr")
    frames = moving_frames(60, size=(320, 240))
    titled = [frame.copy() for frame in frames]
    for frame in titled:
        draw = ImageDraw.Draw(frame)
        draw.rectangle((20, 80, 300, 160), fill="black")
        draw.text((30, 90), "THE END", "white", font_size=60)
    pairs = {"plain": ("webp", animation(frames), caption_of(1)), "titled": ("webp", animation(titled), caption_of(2))}
    config = curate_clips(pool("tars", "a", pairs), "tars", "run", motion=None, overlay_text=OverlayTextConfig(0.05, 2))
    assert run(config) == 1
    assert "overlay_text: drop: text covers too much" in why(Path(config.output), "titled")
