import pytest
from PIL import Image

from data_prep.steps.video_score import MeanOverFrames
from tests.data_prep.scripted import RednessClassifier


def test_a_picture_scorer_gives_the_mean_over_frames():
    class Red:
        id = "red"

        def score(self, picture, captions):
            return [RednessClassifier().score(picture)] * len(captions)

    frames = [Image.new("RGB", (4, 4), (red, 0, 0)) for red in (0, 51, 102)]
    assert MeanOverFrames(Red()).score(frames, ["a", "b"]) == pytest.approx([0.2, 0.2])
    assert MeanOverFrames(Red()).id == "mean of red"
