"""Frames are shown as they should be: square pixels, white behind what is transparent, fields as they are stored."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from foundation.errors import UserError
from tests.video.numbered_clips import number_of, numbered_image, write_clip
from video.pixels import show, square_width
from video.sampling import sample_frames

VPX = {"auto-alt-ref": "0", "deadline": "realtime", "cpu-used": "8", "g": "4", "b": "2M"}
RED = (200, 30, 30)


class TestSquarePixels:
    def test_the_width_is_that_of_the_display(self):
        assert square_width(720, 16 / 15) == 768 and square_width(1440, 4 / 3) == 1920 and square_width(640, 1.0) == 640
        assert square_width(640, 0.0) == 640 and square_width(640, 1000.0) == 640  # a mistake of the file

    @pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
    @pytest.mark.parametrize("shape, width", [("4/3", 213), ("1/2", 80), ("1/1", 160)])
    def test_frames_have_square_pixels(self, tmp_path: Path, suffix: str, shape: str, width: int):
        options = {"x264-params": f"sar={shape}"}
        path = write_clip(tmp_path / f"clip.{suffix}", list(range(5)), options=options)
        frames = sample_frames(path)
        assert frames.pixels.shape == (5, 64, width, 3)
        assert [number_of(pixels) for pixels in frames.pixels] == list(range(5))
        whole = np.asarray(Image.fromarray(numbered_image(3)).resize((width, 64), Image.Resampling.BICUBIC))
        assert np.abs(frames.pixels[3].astype(int) - whole).mean() < 12
        assert np.array_equal(frames.pixels, sample_frames(path, reader="pyav").pixels)

    def test_they_are_made_square_before_they_are_turned(self, tmp_path: Path):
        options = {"x264-params": "sar=2/1"}
        path = write_clip(tmp_path / "clip.mp4", list(range(3)), options=options, rotation=90)
        assert sample_frames(path).pixels.shape == (3, 320, 64, 3)

    def test_the_limit_of_pixels_is_that_of_the_shown_frame(self, tmp_path: Path):
        path = write_clip(tmp_path / "clip.mp4", [0], options={"x264-params": "sar=4/1"})
        with pytest.raises(UserError, match="640 x 64 pixels per frame, over the limit"):
            sample_frames(path, max_pixels=2 * 160 * 64)

    def test_square_frames_are_not_copied_or_changed(self):
        pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
        assert np.array_equal(show(pixels, 8, (1, 0, 0, 1)), pixels)


class TestInterlaced:
    @pytest.mark.parametrize("field_order", ["tff", "bff"])
    @pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p"])
    def test_both_fields_of_a_frame_are_shown_together(self, tmp_path: Path, field_order: str, pixel_format: str):
        """The lines are those that the encoder was given, and no reader mixes them."""
        options = {"x264-params": f"{field_order}=1", "crf": "1"}
        path = tmp_path / "clip.mp4"
        write_clip(path, list(range(8)), options=options, pixel_format=pixel_format)
        frames = sample_frames(path)
        assert np.array_equal(frames.pixels, sample_frames(path, reader="pyav").pixels)
        with av.open(str(path)) as container:
            decoded = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
            assert [number_of(pixels) for pixels in frames.pixels] == list(range(8))
        for pixels, grey in zip(frames.pixels, decoded, strict=True):
            luma = pixels @ np.array([0.299, 0.587, 0.114])
            assert np.abs(luma - grey).mean() < 4

    def test_decord_does_not_read_them(self, tmp_path: Path):
        """It interpolates their colours over both fields."""
        path = write_clip(tmp_path / "clip.mp4", list(range(8)), options={"x264-params": "tff=1"})
        with pytest.raises(UserError, match="interlaced"):
            sample_frames(path, reader="decord")


def write_transparent(path: Path, codec: str, pixel_format: str, options: dict[str, str]) -> Path:
    """Ten frames, red on the left, invisible on the right."""
    pixels = np.full((64, 64, 4), (*RED, 255), np.uint8)
    pixels[:, 32:, 3] = 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixel_format
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format=pixel_format)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    "suffix, codec, pixel_format, options",
    [
        ("webm", "libvpx-vp9", "yuva420p", VPX),
        ("webm", "libvpx", "yuva420p", VPX),
        ("mov", "prores_ks", "yuva444p10le", {}),
        ("mov", "png", "rgba", {}),
        ("mov", "qtrle", "argb", {}),
        ("mkv", "ffv1", "yuva420p", {}),
        ("avi", "utvideo", "gbrap", {}),
    ],
)
def test_transparent_parts_are_white(tmp_path: Path, suffix: str, codec: str, pixel_format: str, options: dict):
    path = write_transparent(tmp_path / f"clip.{suffix}", codec, pixel_format, options)
    for max_frames in (3, 64):
        frames = sample_frames(path, max_frames)
        assert len(frames.pixels) == min(10, max_frames)
        assert np.abs(frames.pixels[:, 4:-4, 4:28].astype(int) - RED).max() < 8
        assert (frames.pixels[:, 4:-4, 36:-4] > 250).all()


def test_the_fourth_byte_of_uncompressed_avi_has_no_meaning(tmp_path: Path):
    path = write_transparent(tmp_path / "clip.avi", "rawvideo", "bgra", {})
    assert (sample_frames(path).pixels == RED).all()


def test_colours_that_cannot_be_converted_are_an_error(tmp_path: Path):
    options = {"x264-params": "colormatrix=YCgCo"}
    path = write_clip(tmp_path / "clip.mp4", list(range(3)), pixel_format="yuv444p", options=options)
    with pytest.raises(UserError, match="cannot be converted to RGB"):
        sample_frames(path, reader="pyav")
