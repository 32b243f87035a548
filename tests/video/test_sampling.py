"""Sampled frames and times of clips whose frames show their own index."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.video.numbered_clips import animation, number_of, numbered_image, write_clip
from video.sampling import Frames, _mostly_seeks, sample_frames, sample_indices
from video.timeline import Timeline, plan_seeks


def expected(stamps: list[int], last: int, time_base: Fraction, max_frames: int) -> tuple[list[int], list[float]]:
    """Indices and times of the frames at the midpoints, by a search through all frames."""
    stamps = [stamp - stamps[0] for stamp in stamps]
    duration = stamps[-1] + last
    n = min(len(stamps), max_frames)
    numbers = []
    for k in range(n):
        middle = Fraction(2 * k + 1, 2 * n) * duration
        numbers.append(max(i for i, stamp in enumerate(stamps) if stamp <= middle))
    return numbers, [float(stamps[i] * time_base) for i in numbers]


def check(frames: Frames, numbers: list[int], times: list[float]) -> None:
    assert [number_of(pixels) for pixels in frames.pixels] == numbers
    np.testing.assert_allclose(frames.times, times, atol=1e-9)


def both(path: Path, max_frames: int = 64) -> Frames:
    """The frames that decord reads, after a check that PyAV gives the same."""
    ours, theirs = (sample_frames(path, max_frames, reader=reader) for reader in ("decord", "pyav"))
    assert np.array_equal(ours.times, theirs.times) and ours.duration == theirs.duration
    assert np.array_equal(ours.pixels, theirs.pixels)
    return ours


class TestIndices:
    def test_a_short_clip_gives_every_frame_once(self):
        for count in (1, 2, 7, 63, 64):
            assert sample_indices(np.arange(count) * 40, count * 40, 64).tolist() == list(range(count))

    def test_frames_are_at_the_midpoints_of_equal_parts(self):
        assert sample_indices(np.arange(100), 100, 4).tolist() == [12, 37, 62, 87]

    def test_at_a_boundary_the_new_frame_is_chosen(self):
        assert sample_indices(np.arange(128), 128, 64).tolist() == list(range(1, 128, 2))

    def test_long_frames_repeat_and_short_ones_are_skipped(self):
        assert sample_indices(np.array([0, 70, 71, 72, 90]), 100, 5).tolist() == [0, 0, 0, 1, 4]

    def test_one_frame_without_duration(self):
        assert sample_indices(np.array([0]), 0, 64).tolist() == [0]


class TestPlanSeeks:
    def test_a_seek_must_skip_enough_frames(self):
        keys = tuple(range(0, 1000, 100))
        assert plan_seeks(np.array([50, 350, 360, 495]), keys) == [None, 300, None, 400]
        assert plan_seeks(np.arange(0, 200, 5), tuple(range(0, 200, 5))) == [None] * 40


@pytest.mark.parametrize(
    "suffix, options",
    [
        (".mp4", {"g": "12", "bf": "0"}),
        (".mp4", {"g": "30", "bf": "3"}),
        (".mp4", {"g": "1000", "bf": "2"}),
        (".mp4", {"g": "1"}),
        (".mkv", {"g": "20", "bf": "2"}),
    ],
)
@pytest.mark.parametrize("max_frames", [7, 64])
def test_constant_rate(tmp_path: Path, suffix: str, options: dict, max_frames: int):
    path = write_clip(tmp_path / f"clip{suffix}", list(range(150)), options={"sc_threshold": "0", **options})
    frames = both(path, max_frames)
    numbers, times = expected(list(range(150)), 1, Fraction(1, 25), max_frames)
    check(frames, numbers, times)
    assert frames.duration == pytest.approx(6.0, abs=1e-9)
    assert frames.pixels.shape == (max_frames, 64, 160, 3) and frames.times.dtype == np.float64


@pytest.mark.parametrize("options", [{"g": "12", "bf": "0"}, {"g": "250", "bf": "3"}])
def test_variable_rate(tmp_path: Path, options: dict):
    steps = np.random.default_rng(0).choice([10, 20, 40, 400], 120)
    stamps = np.concatenate([[0], np.cumsum(steps)]).tolist()
    path = write_clip(tmp_path / "clip.mp4", stamps, Fraction(1, 1000), options=options)
    frames = both(path)
    last = round(frames.duration * 1000) - stamps[-1]  # the last frame's duration, from the container
    assert last > 0
    numbers, times = expected(stamps, last, Fraction(1, 1000), 64)
    assert len(set(numbers)) < 64  # some repeat, some are skipped
    check(frames, numbers, times)


def test_open_groups_are_read_exactly(tmp_path: Path):
    options = {"g": "30", "bf": "3", "x264-params": "open-gop=1:scenecut=0:keyint=30:min-keyint=30"}
    path = write_clip(tmp_path / "clip.mkv", list(range(200)), Fraction(1, 25), options=options)
    numbers, _ = expected(list(range(200)), 1, Fraction(1, 25), 5)
    assert [number_of(pixels) for pixels in sample_frames(path, 5).pixels] == numbers


def test_transport_streams_are_read_exactly(tmp_path: Path):
    path = write_clip(tmp_path / "clip.ts", list(range(150)), options={"g": "25", "bf": "2"})
    for max_frames in (7, 64):
        check(sample_frames(path, max_frames), *expected(list(range(150)), 1, Fraction(1, 25), max_frames))
    with pytest.raises(ValueError, match="container mpegts"):
        sample_frames(path, reader="decord")


def test_a_stream_may_start_at_any_time(tmp_path: Path):
    stamps = list(range(1000, 1050))
    frames = both(write_clip(tmp_path / "clip.mkv", stamps, options={"bf": "2"}), 10)
    check(frames, *expected(stamps, 1, Fraction(1, 25), 10))


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuvj420p"])
@pytest.mark.parametrize("size", [(160, 64), (98, 54), (200, 90)])
def test_both_readers_give_equal_pixels(tmp_path: Path, pixel_format: str, size: tuple[int, int]):
    path = write_clip(tmp_path / "clip.mp4", list(range(20)), size=size, pixel_format=pixel_format)
    frames = both(path)
    difference = np.abs(frames.pixels[7].astype(int) - numbered_image(7, *size))
    assert difference.mean() < 12  # the whole image, not only its number


@pytest.mark.parametrize("codec, suffix", [("libvpx", ".webm"), ("libvpx-vp9", ".webm"), ("mpeg4", ".avi")])
def test_other_codecs(tmp_path: Path, codec: str, suffix: str):
    fast = {"deadline": "realtime", "cpu-used": "8"} if "vpx" in codec else {}
    path = write_clip(tmp_path / f"clip{suffix}", list(range(60)), codec=codec, options={"b": "2M", "g": "20", **fast})
    for frames in (sample_frames(path, 20), sample_frames(path, 20, reader="pyav")):
        check(frames, expected(list(range(60)), 1, Fraction(1, 25), 20)[0], frames.times.tolist())


def test_decord_does_not_read_codecs_without_exact_output(tmp_path: Path):
    path = write_clip(tmp_path / "clip.avi", list(range(5)), codec="mpeg4")
    with pytest.raises(ValueError, match="codec mpeg4"):
        sample_frames(path, reader="decord")


def test_odd_sizes(tmp_path: Path):
    options = {"b": "2M", "deadline": "realtime", "cpu-used": "8"}
    path = write_clip(tmp_path / "clip.webm", list(range(30)), codec="libvpx-vp9", size=(161, 63), options=options)
    frames = sample_frames(path, 10)
    assert frames.pixels.shape == (10, 63, 161, 3)
    assert [number_of(pixels) for pixels in frames.pixels] == list(range(1, 30, 3))


def test_ten_bit_video(tmp_path: Path):
    path = write_clip(tmp_path / "clip.mp4", list(range(30)), pixel_format="yuv420p10le")
    frames = sample_frames(path, 10)
    assert [number_of(pixels) for pixels in frames.pixels] == list(range(1, 30, 3))
    with pytest.raises(ValueError, match="pixel format yuv420p10le"):
        sample_frames(path, reader="decord")


@pytest.mark.parametrize("rotation, turns", [(90, 1), (180, 2), (270, 3)])
def test_rotated_video(tmp_path: Path, rotation: int, turns: int):
    """The display matrix turns anticlockwise by `rotation` degrees, like numpy's rot90."""
    plain = write_clip(tmp_path / "plain.mp4", list(range(5)))
    turned = write_clip(tmp_path / "turned.mp4", list(range(5)), rotation=rotation)
    upright = np.rot90(sample_frames(plain).pixels, turns, axes=(1, 2))
    assert np.array_equal(sample_frames(turned).pixels, upright)


def test_the_display_matrix_of_phones(tmp_path: Path):
    """a b c d = 0 1 -1 0: x' = -y, y' = x, so the frame's top left corner is shown at the top right."""
    path = write_clip(tmp_path / "clip.mp4", list(range(3)))
    plain, data = sample_frames(path).pixels, bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    for offset, value in zip((0, 4, 12, 16), (0, 1 << 16, -1 << 16, 0), strict=True):
        data[start + offset : start + offset + 4] = value.to_bytes(4, "big", signed=True)
    turned = sample_frames(bytes(data)).pixels
    assert np.array_equal(turned[:, 0, -1], plain[:, 0, 0]) and np.array_equal(turned[:, 0, 0], plain[:, -1, 0])


def test_one_frame(tmp_path: Path):
    frames = both(write_clip(tmp_path / "clip.mp4", [0]))
    assert number_of(frames.pixels[0]) == 0 and frames.times.tolist() == [0.0]


def test_bytes_give_the_frames_of_the_file(tmp_path: Path):
    path = write_clip(tmp_path / "clip.mp4", list(range(40)), sound=True)
    for reader in ("decord", "pyav"):
        ours, theirs = (sample_frames(source, 8, reader=reader) for source in (path, path.read_bytes()))
        assert np.array_equal(ours.pixels, theirs.pixels) and np.array_equal(ours.times, theirs.times)


class TestAnimations:
    @pytest.mark.parametrize("kind", ["GIF", "WEBP"])
    def test_durations_give_the_times(self, tmp_path: Path, kind: str):
        durations = np.random.default_rng(1).choice([20, 50, 100, 700], 40).tolist()
        data = animation(durations, kind)
        path = tmp_path / "clip"
        path.write_bytes(data)
        stamps = np.concatenate([[0], np.cumsum(durations)[:-1]]).tolist()
        for frames in (sample_frames(data, 16), sample_frames(path, 16)):
            check(frames, *expected(stamps, durations[-1], Fraction(1, 1000), 16))
            assert frames.duration == pytest.approx(sum(durations) / 1000)

    @pytest.mark.parametrize("kind", ["GIF", "WEBP"])
    def test_transparent_parts_are_white(self, kind: str):
        frames = sample_frames(animation([100] * 6, kind))
        assert (frames.pixels[:, -4:, -4:] == 255).all() and not (frames.pixels[:, -20:, :60] == 255).all()

    def test_lossless_animations_are_exact(self):
        frames = sample_frames(animation([100] * 6, "WEBP"))
        for number, pixels in enumerate(frames.pixels):
            assert np.array_equal(pixels[:, :150], numbered_image(number)[:, :150])

    def test_without_durations(self):
        frames = sample_frames(animation([0] * 4, "GIF"))
        np.testing.assert_allclose(frames.times, [0, 0.1, 0.2, 0.3])

    def test_a_still_image_is_one_frame(self):
        frames = sample_frames(animation([100], "WEBP"))
        assert len(frames.pixels) == 1 and frames.times.tolist() == [0.0]


class TestChoiceOfReader:
    def test_pyav_reads_where_most_frames_need_a_seek(self):
        keys = tuple(range(0, 6400, 50))
        timeline = Timeline(np.arange(6400), 6400, Fraction(1, 25), keys=keys)
        assert _mostly_seeks(np.arange(50, 6400, 100), timeline)
        assert not _mostly_seeks(np.arange(0, 64), timeline)
