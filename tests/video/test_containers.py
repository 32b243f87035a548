"""Every container with every codec that it holds: the frames that are asked for, whichever reader is used."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from foundation.errors import UserError
from tests.video.numbered_clips import animation, number_of, write_clip
from tests.video.test_sampling import expected
from video.sampling import sample_frames

NUM_FRAMES = 80
VPX = {"deadline": "realtime", "cpu-used": "8", "b": "2M"}
OPTIONS = {
    "libx264": {"preset": "ultrafast", "sc_threshold": "0"},
    "libvpx": VPX,
    "libvpx-vp9": VPX,
    "libsvtav1": {"preset": "12", "crf": "5"},
}
PIXEL_FORMATS = {
    "mjpeg": "yuvj420p",
    "prores_ks": "yuv422p10le",
    "qtrle": "rgb24",
    "png": "rgb24",
    "huffyuv": "yuv422p",
}
ALL_KEYS = ("mjpeg", "ffv1", "huffyuv", "prores_ks", "qtrle", "png", "utvideo", "rawvideo")  # each frame is a key frame
WITH_B_FRAMES = ("libx264", "libx265", "mpeg4", "mpeg1video", "mpeg2video")
CODECS = {
    "mp4": ["libx264", "libx265", "mpeg4", "libvpx-vp9", "mjpeg", "libsvtav1", "mpeg2video"],
    "mov": ["libx264", "mpeg4", "mjpeg", "prores_ks", "qtrle", "png"],
    "mkv": ["libx264", "libx265", "mpeg4", "libvpx", "libvpx-vp9", "mjpeg", "ffv1", "mpeg2video", "libsvtav1"],
    "webm": ["libvpx", "libvpx-vp9"],
    "ts": ["libx264", "libx265", "mpeg4", "mpeg2video", "mpeg1video"],
    "avi": ["libx264", "mpeg4", "mjpeg", "msmpeg4v2", "huffyuv", "ffv1", "libvpx", "utvideo", "rawvideo", "mpeg2video"],
    "flv": ["libx264", "flv"],
    "asf": ["wmv1", "wmv2", "msmpeg4", "libx264"],
    "mpg": ["mpeg1video", "mpeg2video", "libx264"],
    "nut": ["libx264", "mpeg4"],
    "ogg": ["libvpx"],
    "mxf": ["mpeg2video"],
    "ivf": ["libvpx", "libvpx-vp9"],
    "3gp": ["mpeg4"],
}


def key_intervals(suffix: str, codec: str) -> list[tuple[int, int]]:
    """Pairs of key-frame interval and number of B-frames to try."""
    if codec in ALL_KEYS:
        return [(1, 0)]
    if codec == "libsvtav1":  # the encoder writes invalid packets at an interval of 1, and blurs long ones
        return [(12, 0)]
    if (suffix, codec) == ("mpg", "libx264"):  # FFmpeg gives small packets of this container their neighbour's stamp
        return [(12, 2), (100, 2)]
    if suffix == "mxf":  # the muxer refuses longer intervals
        return [(12, 0), (12, 2)]
    return [(1, 0), (12, 0), (100, 0)] + ([(12, 2), (30, 3), (100, 2)] if codec in WITH_B_FRAMES else [])


def encoder_options(codec: str, interval: int, num_b_frames: int) -> dict[str, str]:
    """Options of an encoder for this interval between key frames."""
    if codec == "libx265":
        keys = f"keyint={interval}:min-keyint={interval}:scenecut=0:bframes={num_b_frames}"
        return {"preset": "ultrafast", "x265-params": f"log-level=none:{keys}"}
    options = {"g": str(interval), **OPTIONS.get(codec, {"b": "2M"})}
    return {**options, "bf": str(num_b_frames)} if codec in WITH_B_FRAMES else options


def decoded_numbers(path: Path) -> list[int]:
    """The numbers that PyAV alone shows, from the first frame to the last; an encoder may have blurred one."""
    with av.open(str(path)) as container:
        numbers = [number_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert len(numbers) == NUM_FRAMES and sum(a == b for a, b in enumerate(numbers)) >= 0.95 * NUM_FRAMES
    return numbers


def readings(path: Path, max_frames: int):
    """What each reader gives that reads this film: PyAV always, decord where its frames are exact."""
    yield sample_frames(path, max_frames, reader="pyav")
    yield sample_frames(path, max_frames)
    try:
        yield sample_frames(path, max_frames, reader="decord")
    except UserError as error:
        assert "decord cannot read this file" in str(error) and "failed" not in str(error)


@pytest.mark.parametrize("suffix, codec", [(suffix, codec) for suffix, codecs in CODECS.items() for codec in codecs])
def test_the_frames_and_times_are_those_asked_for(tmp_path: Path, suffix: str, codec: str):
    for interval, num_b_frames in key_intervals(suffix, codec):
        path = tmp_path / f"{interval}-{num_b_frames}.{suffix}"
        options = encoder_options(codec, interval, num_b_frames)
        pixel_format = PIXEL_FORMATS.get(codec, "yuv420p")
        write_clip(path, list(range(NUM_FRAMES)), codec=codec, options=options, pixel_format=pixel_format)
        shown = decoded_numbers(path)
        for max_frames in (5, NUM_FRAMES):
            indices, times = expected(list(range(NUM_FRAMES)), 1, Fraction(1, 25), max_frames)
            numbers = [shown[index] for index in indices]
            for frames in readings(path, max_frames):
                assert [number_of(pixels) for pixels in frames.pixels] == numbers, (interval, num_b_frames)
                np.testing.assert_allclose(frames.times, times, atol=0.002)  # some containers count milliseconds


def test_encoding_leaves_the_priority_of_the_tests_as_it_was(tmp_path: Path):
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    write_clip(tmp_path / "clip.mkv", list(range(5)), codec="libsvtav1", options=OPTIONS["libsvtav1"])
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before


def test_a_seek_between_key_frames_gives_no_noise(tmp_path: Path):
    """MPEG-4's decoder begins with any packet, and a seek in a transport stream leads to any."""
    options = {"b": "2M", "g": "12", "bf": "2"}
    path = write_clip(tmp_path / "clip.ts", list(range(150)), codec="mpeg4", options=options)
    numbers, _ = expected(list(range(150)), 1, Fraction(1, 25), 7)
    assert [number_of(pixels) for pixels in sample_frames(path, 7).pixels] == numbers


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animations(kind: str):
    frames = sample_frames(animation([40] * NUM_FRAMES, kind), 5)
    numbers, times = expected(list(range(NUM_FRAMES)), 1, Fraction(1, 25), 5)
    assert [number_of(pixels) for pixels in frames.pixels] == numbers
    np.testing.assert_allclose(frames.times, times)


X264 = {
    "intra refresh": "intra-refresh=1:keyint=20:scenecut=0",
    "open GOP": "open-gop=1:keyint=20:min-keyint=20:scenecut=0",
}


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize("kind", X264)
def test_key_frames_at_which_decoding_cannot_start(tmp_path: Path, suffix: str, kind: str):
    """Intra refresh, which repairs the picture over many frames, and frames that refer back over a key frame."""
    options = {"x264-params": X264[kind], "bf": "0" if kind == "intra refresh" else "3"}
    path = write_clip(tmp_path / f"clip.{suffix}", list(range(NUM_FRAMES)), options=options)
    for max_frames in (3, 17):
        numbers, _ = expected(list(range(NUM_FRAMES)), 1, Fraction(1, 25), max_frames)
        for frames in readings(path, max_frames):
            assert [number_of(pixels) for pixels in frames.pixels] == numbers


@pytest.mark.parametrize(
    "suffix, container_options",
    [
        ("mkv", {"live": "1"}),
        ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("mp4", {"movflags": "negative_cts_offsets"}),
    ],
)
def test_files_without_an_index(tmp_path: Path, suffix: str, container_options: dict[str, str]):
    options = {"g": "12", "bf": "2", "sc_threshold": "0"}
    path = tmp_path / f"clip.{suffix}"
    write_clip(path, list(range(NUM_FRAMES)), options=options, container_options=container_options)
    for max_frames in (5, NUM_FRAMES):
        numbers, _ = expected(list(range(NUM_FRAMES)), 1, Fraction(1, 25), max_frames)
        for frames in (sample_frames(path, max_frames), sample_frames(path, max_frames, reader="pyav")):
            assert [number_of(pixels) for pixels in frames.pixels] == numbers


def test_avi_keeps_the_times_of_frames_left_out(tmp_path: Path):
    """An AVI writer puts empty packets where the rate pauses."""
    stamps = [0, 1, 2, 5, 6, 7, 8, 12, 13, 14, 15, 16, 20, 21]
    for codec in ("mpeg4", "mjpeg", "libx264"):
        options = encoder_options(codec, 4, 0) | {"strict": "unofficial"}
        path = write_clip(tmp_path / f"{codec}.avi", stamps, codec=codec, options=options)
        frames = sample_frames(path)
        assert [number_of(pixels) for pixels in frames.pixels] == expected(stamps, 1, Fraction(1, 25), 64)[0]


def test_matroska_with_the_stamps_of_avi(tmp_path: Path):
    """An AVI file that is copied into Matroska packet by packet: the stamps are those of the order of decoding."""
    source = write_clip(tmp_path / "clip.avi", list(range(60)), options={"g": "30", "bf": "2", "sc_threshold": "0"})
    path = tmp_path / "clip.mkv"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    for reader in ("pyav", None):
        for max_frames in (5, 60):
            frames = sample_frames(path, max_frames, reader=reader)
            numbers = [number_of(pixels) for pixels in frames.pixels]
            assert numbers == expected(list(range(60)), 1, Fraction(1, 25), max_frames)[0]
