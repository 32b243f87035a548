"""Clips that are broken, mislabelled or over a limit: an error with the reason, or the frames that are there."""

import os
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from foundation.extras import MissingExtraError
from tests.video.numbered_clips import animation, number_of, write_clip, write_sound
from video import decord_reader
from video.sampling import sample_frames
from video.timeline import timeline_by_decoding


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A clip of 100 frames, with its index at the end of the file."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    return write_clip(path, list(range(100)), options={"g": "20", "bf": "2"})


def indexed_first(clip: Path, folder: Path) -> Path:
    """A copy of a clip with its index at the start."""
    path = folder / "indexed.mp4"
    with av.open(str(clip)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return path


def reason(source: Path | bytes, **limits) -> str:
    """The error of reading a clip, which names its file."""
    with pytest.raises(ValueError) as error:
        sample_frames(source, **limits)
    name = "clip" if isinstance(source, bytes) else str(source)
    assert str(error.value).startswith(f"{name}: ")
    return str(error.value)


def test_missing_and_empty_files(tmp_path: Path):
    assert "no such file" in reason(tmp_path / "none.mp4")
    assert "not a regular file" in reason(tmp_path)
    (tmp_path / "empty.mp4").touch()
    assert "0 bytes" in reason(tmp_path / "empty.mp4")
    assert "0 bytes" in reason(b"")


def test_files_that_are_not_video(tmp_path: Path):
    for name, data in (
        ("text.mp4", b"these are words and not a video. " * 100),
        ("noise.mp4", np.random.default_rng(0).bytes(5000)),
        ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n/etc/passwd\n#EXT-X-ENDLIST\n"),
        ("list.txt", b"ffconcat version 1.0\nfile /etc/passwd\n"),
    ):
        (tmp_path / name).write_bytes(data)
        assert "not a video" in reason(tmp_path / name)


def test_sound_only(tmp_path: Path):
    assert "sound only" in reason(write_sound(tmp_path / "clip.m4a"))


def test_no_frame(tmp_path: Path):
    assert "no frame" in reason(write_clip(tmp_path / "clip.mkv", [], sound=True))


def test_truncated_clips(tmp_path: Path, clip: Path):
    data = clip.read_bytes()
    assert "truncated" in reason(data[: len(data) // 2])  # without its index, which was at the end
    path = indexed_first(clip, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 4])
    assert "truncated: it holds" in reason(path)


@pytest.mark.parametrize("reader", [None, "pyav"])
def test_a_slightly_truncated_clip_gives_the_frames_that_it_has(tmp_path: Path, clip: Path, reader: str | None):
    path = indexed_first(clip, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 100
    frames = sample_frames(path, 256, reader=reader)
    numbers = [number_of(pixels) for pixels in frames.pixels]
    assert 60 < len(numbers) < 100 and numbers == list(range(len(numbers)))
    np.testing.assert_allclose(frames.times, np.arange(len(numbers)) / 25)


def test_broken_packets_do_not_shift_other_frames(tmp_path: Path, clip: Path):
    """Frames without data are not sampled; the others keep their times."""
    path = tmp_path / "broken.mp4"
    with av.open(str(clip)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(clip.read_bytes())
    for position, size in packets[45:48]:
        data[position + 4 : position + size] = bytes(size - 4)
    path.write_bytes(data)
    frames = sample_frames(path)
    other = sample_frames(path, reader="pyav")
    assert np.array_equal(frames.times, other.times) and np.array_equal(frames.pixels, other.pixels)
    shown = np.round(frames.times * 25).astype(int)
    intact = [k for k, number in enumerate(shown) if number < 40 or number >= 60]
    assert len(intact) > 40 and all(number_of(frames.pixels[k]) == shown[k] for k in intact)


def test_no_times(tmp_path: Path):
    """A stream without a container has no times."""
    path = tmp_path / "clip.h264"
    write_clip(path, list(range(30)), options={"bf": "2"})
    assert "0 frames per second" in reason(path)


def test_unsupported_codec(clip: Path):
    data = clip.read_bytes().replace(b"avc1", b"zzz9")
    assert "codec" in reason(data) or "does not decode" in reason(data)


def test_limits(tmp_path: Path, clip: Path):
    assert "over the limit of 10,000" in reason(clip, max_pixels=10_000)
    assert "4 seconds long, over the limit of 3" in reason(clip, max_seconds=3)
    path = write_clip(tmp_path / "long.mp4", [0, 1, 4000], Fraction(1, 1))
    assert "over the limit of 3,600" in reason(path)
    assert "over the limit of 10,000" in reason(animation([100] * 3, "WEBP"), max_pixels=10_000)
    assert "time limit" in reason(clip, reader="pyav", time_limit=0)
    with pytest.raises(ValueError, match="at least 1"):
        sample_frames(clip, 0)


def test_truncated_animations():
    for kind in ("GIF", "WEBP"):
        data = animation([100] * 8, kind)
        assert "truncated" in reason(data[:30])


def test_decoding_gives_the_timeline_of_the_packets(clip: Path):
    from video.timeline import open_video

    with open_video(clip, 2**20, 60) as video:
        timeline = timeline_by_decoding(video)
        assert np.array_equal(timeline.ticks, video.timeline.ticks) and timeline.origin == video.timeline.origin
        assert timeline.duration == video.timeline.duration


class TestWorker:
    def test_one_process_serves_all_calls(self, clip: Path):
        sample_frames(clip, 8, reader="decord")
        process = decord_reader._worker.process
        sample_frames(clip, 8, reader="decord")
        assert decord_reader._worker.process is process and process.poll() is None

    def test_is_killed_at_the_time_limit(self, clip: Path):
        sample_frames(clip, 8, reader="decord")
        process = decord_reader._worker.process
        os.kill(process.pid, 19)  # SIGSTOP: it hangs, as in decord's endless loop
        start = time.monotonic()
        frames = sample_frames(clip, 8, time_limit=1.0)
        assert time.monotonic() - start < 30 and process.poll() is not None
        expected = sample_frames(clip, 8, reader="pyav")
        assert np.array_equal(frames.pixels, expected.pixels)
        assert np.array_equal(sample_frames(clip, 8, reader="decord").pixels, expected.pixels)  # a new process

    def test_its_memory_does_not_grow(self, clip: Path):
        def resident() -> int:
            return int(Path(f"/proc/{decord_reader._worker.process.pid}/statm").read_text().split()[1]) * 4096

        for _ in range(10):
            sample_frames(clip, 4, reader="decord")
        before = resident()
        for _ in range(25):
            sample_frames(clip, 4, reader="decord")
        assert resident() - before < 25 * 160 * 64 * 3 * 10  # less than ten of the 100 frames per call

    def test_threads_take_turns(self, clip: Path):
        results: list = [None] * 4

        def sample(index: int) -> None:
            results[index] = sample_frames(clip, index + 3, reader="decord")

        threads = [threading.Thread(target=sample, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [len(result.pixels) for result in results] == [3, 4, 5, 6]

    def test_a_forked_process_starts_its_own(self, clip: Path):
        sample_frames(clip, 2, reader="decord")
        child = os.fork()
        if child == 0:
            alone = decord_reader._worker is None
            frames = sample_frames(clip, 2, reader="decord")
            decord_reader._stop_worker()
            os._exit(0 if alone and len(frames.pixels) == 2 else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert len(sample_frames(clip, 2, reader="decord").pixels) == 2

    def test_ends_with_its_parent(self):
        code = (
            "import os; from video.decord_reader import _Worker\n"
            "worker = _Worker(); print(worker.process.pid, flush=True); os._exit(0)"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(100):
            if not _runs(int(out)):
                return
            time.sleep(0.1)
        raise AssertionError("the worker outlived its parent")


def _runs(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_missing_package_names_its_extra(clip: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"mm-adapters\[video\]"):
        sample_frames(clip)


def test_pyav_reads_if_decord_is_not_installed(clip: Path, monkeypatch):
    expected = sample_frames(clip, 5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert np.array_equal(sample_frames(clip, 5).pixels, expected.pixels)
    with pytest.raises(ValueError, match="not installed"):
        sample_frames(clip, reader="decord")
