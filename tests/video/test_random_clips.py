"""Random odd clips, read by us and decoded from the first frame to the last by PyAV alone."""

import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.video.numbered_clips import number_of, write_clip
from tests.video.test_sampling import expected
from video.sampling import sample_frames

VPX = {"deadline": "realtime", "cpu-used": "8", "b": "3M"}
CODECS = {
    "mp4": ["libx264", "mpeg4", "libvpx-vp9", "mjpeg"],
    "mov": ["libx264", "mjpeg", "png"],
    "mkv": ["libx264", "mpeg4", "libvpx", "libvpx-vp9", "ffv1"],
    "webm": ["libvpx", "libvpx-vp9"],
    "ts": ["libx264", "mpeg4", "mpeg2video"],
    "avi": ["libx264", "mpeg4", "mjpeg", "msmpeg4v2", "libvpx", "ffv1", "mpeg2video"],
    "flv": ["libx264", "flv"],
    "asf": ["libx264", "wmv2", "msmpeg4"],
    "nut": ["libx264", "mpeg4"],
    "ogg": ["libvpx"],
}
PIXEL_FORMATS = {"mjpeg": "yuvj420p", "png": "rgb24"}
ONE_RATE = ("mpeg2video", "flv", "mpeg1video")  # codecs that only know constant rates, here 25
ORDER_OF_DECODING = ("avi", "asf")  # containers without the times at which frames are shown


@dataclass
class Case:
    """One clip and how it is sampled; two numbers of frames are two clips, one joined to the other."""

    suffix: str
    codec: str
    lengths: list[int]
    starts: list[int]
    steps: list[int]
    time_base: Fraction
    size: tuple[int, int]
    options: dict[str, str]
    max_frames: int

    @property
    def num_frames(self) -> int:
        return sum(self.lengths)

    def write(self, folder: Path) -> Path:
        paths, number = [], 0
        for length, start in zip(self.lengths, self.starts, strict=True):
            stamps = (start + np.concatenate([[0], np.cumsum(self.steps[number : number + length - 1])])).tolist()
            path = folder / f"{number}.{self.suffix}"
            write_clip(
                path,
                [int(stamp) for stamp in stamps],
                self.time_base,
                self.codec,
                self.size,
                PIXEL_FORMATS.get(self.codec, "yuv420p"),
                self.options,
                first_number=number,
            )
            paths.append(path)
            number += length
        joined = folder / f"clip.{self.suffix}"
        joined.write_bytes(b"".join(path.read_bytes() for path in paths))
        return joined


@st.composite
def cases(draw: st.DrawFn) -> Case:
    suffix = draw(st.sampled_from(list(CODECS)))
    codec = draw(st.sampled_from(CODECS[suffix]))
    parts = 2 if suffix == "ts" and draw(st.booleans()) else 1
    lengths = draw(st.lists(st.integers(4 if parts > 1 else 1, 60), min_size=parts, max_size=parts))
    constant = parts > 1 or suffix in ORDER_OF_DECODING or codec in ONE_RATE or draw(st.booleans())
    time_base, steps = Fraction(1, 25), [1] * sum(lengths)
    if not constant:
        time_base = draw(st.sampled_from([Fraction(1, 25), Fraction(1001, 30000), Fraction(1, 1000)]))
        shortest = 2 if time_base == Fraction(1, 1000) else 1  # containers that count milliseconds round
        steps = draw(st.lists(st.integers(shortest, 90), min_size=sum(lengths), max_size=sum(lengths)))
    starts = draw(st.lists(st.sampled_from([0, 0, 7, 5000]), min_size=parts, max_size=parts)) if suffix == "ts" else [0]
    if starts == [0, 7] and lengths[0] < 9:
        starts = [0, 0]  # stamps that do not go back look like a film in which packets are missing
    options = {"g": str(draw(st.integers(1, 70)))}
    if codec == "libx264":
        shape = draw(st.sampled_from(["1/1", "4/3", "16/15", "1/2"]))
        extra = draw(st.sampled_from(["", ":tff=1", ":open-gop=1", ":bframes=0:intra-refresh=1"]))
        options |= {"preset": "ultrafast", "bf": str(draw(st.integers(0, 4))), "x264-params": f"sar={shape}{extra}"}
    elif codec in ("mpeg4", "mpeg2video"):
        # FFmpeg's encoder drops frames between which others are reordered at a variable rate.
        options |= {"b": "3M", "bf": str(draw(st.integers(0, 3)) if constant else 0)}
    else:
        options |= VPX if codec.startswith("libvpx") else {"b": "3M"}
    return Case(
        suffix,
        codec,
        lengths,
        starts,
        steps,
        time_base,
        (2 * draw(st.integers(40, 100)), 4 * draw(st.integers(6, 20))),  # x264 needs that of interlaced frames
        options,
        draw(st.integers(1, 130)),
    )


def decode_all(path: Path) -> tuple[list[int | None], list[int], Fraction]:
    """What PyAV alone gives: of each frame the stamp and the number, and the time base."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(frame.pts, number_of(frame.to_ndarray(format="rgb24"))) for frame in container.decode(stream)]
        return [pts for pts, _ in frames], [number for _, number in frames], stream.time_base


@pytest.mark.fuzz
@given(cases())
def test_clips_are_read_as_pyav_decodes_them(case: Case):
    with tempfile.TemporaryDirectory() as folder:
        path = case.write(Path(folder))
        stamps, numbers, time_base = decode_all(path)
        assert len(numbers) == case.num_frames
        if len(case.lengths) > 1 or case.suffix in ORDER_OF_DECODING:
            stamps, time_base = list(range(case.num_frames)), case.time_base
        for reader in (None, "pyav"):
            frames = sample_frames(path, case.max_frames, reader=reader)
            last = round(frames.duration / time_base) - (stamps[-1] - stamps[0])
            assert last > 0 or case.num_frames == 1  # ASF states no duration of its only frame
            indices, times = expected(stamps, last, time_base, case.max_frames)
            np.testing.assert_allclose(frames.times, times, atol=0.002)
            assert [number_of(pixels) for pixels in frames.pixels] == [numbers[index] for index in indices]
