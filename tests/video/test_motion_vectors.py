"""Motion speed from the codec's vectors, of an image that moves by a known distance per frame."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from video.motion_vectors import codec_speed


def film(step: int, codec: str = "libx264", **options: str) -> bytes:
    """30 frames at 10 Hz, 240 px high, that move by `step` px each."""
    ground = np.random.default_rng(5).integers(0, 256, (24, 60, 3), dtype=np.uint8)
    wide = Image.fromarray(ground).resize((600, 240), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.options = 320, 240, "yuv420p", options
        for number in range(30):
            box = (step * number, 0, 320 + step * number, 240)
            container.mux(stream.encode(av.VideoFrame.from_image(wide.crop(box))))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize("options", [{}, {"bf": "0"}, {"bf": "3"}])
def test_the_speed_is_in_short_sides_per_second(options):
    assert codec_speed(film(0, **options)) == 0
    assert codec_speed(film(6, **options)) == pytest.approx(6 * 10 / 240, rel=0.1)


def test_another_codec_gives_the_same_speed():
    assert codec_speed(film(6, "mpeg4")) == pytest.approx(6 * 10 / 240, rel=0.1)


def test_without_vectors_the_speed_is_none():
    assert codec_speed(film(6, g="1")) is None  # only I frames
    with pytest.raises(ValueError, match="0 bytes"):
        codec_speed(b"")
