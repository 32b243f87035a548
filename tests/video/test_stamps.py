"""Time stamps that begin again, are equal, are missing or have another order: by rule, and in files."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from foundation.errors import UserError
from tests.video.numbered_clips import number_of, write_clip
from tests.video.test_sampling import check, expected
from video.sampling import sample_frames
from video.stamps import JoinedStamps, display_stamps

CODECS = {
    "libx264": {"g": "20", "bf": "2", "sc_threshold": "0"},
    "libx265": {"x265-params": "log-level=none", "preset": "ultrafast"},
    "mpeg2video": {"g": "12", "bf": "2", "b": "3M"},
    "mpeg4": {"g": "12", "bf": "2", "b": "3M"},
}


class TestJoinedStamps:
    def offsets(self, stamps: list[tuple[int, int, bool]], jumps: bool = False) -> list[int]:
        joined = JoinedStamps(Fraction(1, 25), jumps)
        return [joined.advance(pts, dts, 1, key) for pts, dts, key in stamps]

    def test_a_part_goes_on_where_the_one_before_ended(self):
        assert self.offsets([(5, 4, True), (7, 5, False), (6, 6, False), (5, 4, True), (6, 5, False)]) == [
            0,
            0,
            0,
            3,
            3,
        ]

    def test_frames_in_another_order_begin_no_part(self):
        assert self.offsets([(0, -2, True), (3, -1, False), (1, 0, False), (2, 1, False), (4, 2, True)]) == [0] * 5

    def test_a_step_back_of_a_frame_that_is_no_key_frame_is_an_inaccuracy(self):
        assert self.offsets([(10, 10, True), (11, 11, False), (10, 10, False), (12, 12, False)]) == [0] * 4

    def test_only_in_transport_streams_a_long_jump_begins_a_part(self):
        stamps = [(0, 0, True), (1, 1, False), (1000, 1000, True), (1001, 1001, False)]
        assert self.offsets(stamps) == [0] * 4
        assert self.offsets(stamps, jumps=True) == [0, 0, -998, -998]

    def test_without_stamps_nothing_is_added(self):
        joined = JoinedStamps(Fraction(1, 25), True)
        assert [joined.advance(None, None, 0, True) for _ in range(3)] == [0] * 3


class TestDisplayStamps:
    def test_a_missing_stamp_is_the_end_of_the_frame_before(self):
        assert display_stamps([None, 40, None, 120], [40] * 4, 40) == [0, 40, 80, 120]
        assert display_stamps([0, None, None], [0] * 3, 10) == [0, 10, 20]

    def test_stamps_of_the_order_of_decoding_are_sorted(self):
        assert display_stamps([1, 3, 4, 2, 6, 7, 5], [1] * 7, 1) == [1, 2, 3, 4, 5, 6, 7]

    def test_equal_stamps_stay(self):
        assert display_stamps([0, 1, 1, 2], [1] * 4, 1) == [0, 1, 1, 2]

    def test_no_times(self):
        for stamps in ([None, None], [7, 7, 7]):
            with pytest.raises(UserError, match="no times"):
                display_stamps(stamps, [0] * len(stamps), 0)
        assert display_stamps([7], [0], 0) == [7]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("first, second", [(0, 0), (0, 7), (3000, 0), (0, 100_000)])
def test_joined_transport_streams_are_one_film(tmp_path: Path, codec: str, first: int, second: int):
    """Their stamps begin again, with an odd shift, earlier, or much later: the frames follow each other."""
    parts = [
        write_clip(tmp_path / "a.ts", [first + n for n in range(60)], codec=codec, options=CODECS[codec]),
        write_clip(
            tmp_path / "b.ts", [second + n for n in range(40)], codec=codec, options=CODECS[codec], first_number=60
        ),
    ]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for max_frames in (7, 100):
        for reader in ("pyav", None):
            frames = sample_frames(path, max_frames, reader=reader)
            check(frames, *expected(list(range(100)), 1, Fraction(1, 25), max_frames))
            assert frames.duration == pytest.approx(4.0, abs=1e-3)


@pytest.mark.parametrize("suffix, codec", [("mkv", "ffv1"), ("mkv", "libx264"), ("flv", "libx264")])
def test_of_frames_with_one_stamp_the_last_is_shown(tmp_path: Path, suffix: str, codec: str):
    stamps = [0, 40, 80, 80, 120, 160, 200, 200, 200, 240, 280, 320]
    options = {"bf": "0"} if codec == "libx264" else {}
    path = write_clip(tmp_path / f"clip.{suffix}", stamps, Fraction(1, 1000), codec=codec, options=options)
    for max_frames in (4, 64):
        frames = sample_frames(path, max_frames)
        last = round(1000 * frames.duration) - stamps[-1]
        assert last > 0
        check(frames, *expected(stamps, last, Fraction(1, 1000), max_frames))


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "mpeg4"])
def test_a_transport_stream_may_begin_and_end_anywhere(tmp_path: Path, codec: str):
    """The frames before the first key frame have no picture; those after it keep their times."""
    whole = write_clip(tmp_path / "whole.ts", list(range(100)), codec=codec, options=CODECS[codec])
    packets = whole.read_bytes()
    count = len(packets) // 188
    path = tmp_path / "cut.ts"
    head = 3 * 188  # the tables that say what the stream holds
    path.write_bytes(packets[:head] + packets[count // 7 * 188 : count * 9 // 10 * 188])
    frames = sample_frames(path, 100)
    numbers = [number_of(pixels) for pixels in frames.pixels]
    first = numbers[0]
    assert first % int(CODECS[codec]["g"]) in (0, int(CODECS[codec]["g"]) - 1, 10) and len(numbers) > 50
    steps = np.round(frames.times * 25).astype(int).tolist()
    intact = [number for number in range(first, 85) if number - first in steps]
    assert len(intact) > 50
    assert all(numbers[steps.index(number - first)] == number for number in intact)
