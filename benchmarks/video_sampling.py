"""Exactness and speed of sampling 64 frames of a short and of a long clip: ours beside plain decord, PyAV and OpenCV.

    python -m benchmarks.video_sampling --short vtest.avi --long big_buck_bunny.mp4

One thread each, with files in the page cache. Every reader is asked for the frames at our indices. A reader is exact if
each of its frames is the one that decoding the whole file in order gives, apart from the conversion to RGB.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.measure import interleave, machine, seconds_of, spread, write_results
from video.sampling import sample_frames, sample_indices
from video.timeline import MAX_PIXELS, MAX_SECONDS, open_video

SAME = 12.0  # largest mean difference of grey levels between two RGB conversions of one frame


def in_order(path: Path, indices: list[int]) -> np.ndarray:
    """The reference: frames counted in the order in which the decoder returns them."""
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        chosen, frames = set(indices), {}
        for index, frame in enumerate(container.decode(video=0)):
            if index in chosen:
                frames[index] = frame.to_ndarray(format="rgb24")
    return np.stack([frames[index] for index in indices])


def with_decord(path: Path, indices: list[int], _stamps: list[int]) -> np.ndarray:
    import decord

    return decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()


def with_pyav_in_order(path: Path, indices: list[int], _stamps: list[int]) -> np.ndarray:
    import av

    chosen, frames = set(indices), []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for index, frame in enumerate(container.decode(video=0)):
            if index in chosen:
                frames.append(frame.to_ndarray(format="rgb24"))
            if index == indices[-1]:
                break
    return np.stack(frames)


def with_pyav_seeking(path: Path, _indices: list[int], stamps: list[int]) -> np.ndarray:
    import av

    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for stamp in stamps:
            container.seek(stamp, stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None and frame.pts >= stamp:
                    frames.append(frame.to_ndarray(format="rgb24"))
                    break
    return np.stack(frames)


def with_opencv(path: Path, indices: list[int], _stamps: list[int]) -> np.ndarray:
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = []
    for index in indices:
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        frames.append(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def compare(path: Path, max_frames: int, repetitions: int) -> dict:
    with open_video(path, MAX_PIXELS, MAX_SECONDS) as video:
        timeline = video.timeline
    indices = sample_indices(timeline.ticks, timeline.duration, max_frames)
    stamps = (timeline.ticks[indices] + timeline.origin).tolist()
    others = {
        "decord": with_decord,
        "pyav, in order": with_pyav_in_order,
        "pyav, seeking": with_pyav_seeking,
        "opencv": with_opencv,
    }
    work: dict[str, Callable[[], np.ndarray]] = {
        "ours": lambda: sample_frames(path, max_frames).pixels,
        "ours, pyav": lambda: sample_frames(path, max_frames, reader="pyav").pixels,
    }
    for name, function in others.items():
        work[name] = lambda function=function: function(path, indices.tolist(), stamps)
    reference = in_order(path, indices.tolist()).astype(np.int16)
    exact, equal = {}, {}
    for name, run in work.items():
        try:
            difference = np.abs(run().astype(np.int16) - reference).mean(axis=(1, 2, 3))
        except Exception as error:
            print(f"  {name}: {error}")
            continue
        exact[name] = bool((difference < SAME).all()) if name == "opencv" else bool((difference == 0).all())
        equal[name] = float((difference == 0).mean())
    seconds = interleave({name: seconds_of(work[name]) for name in exact}, repetitions)
    results = {
        name: {"exact": exact[name], "equal_frames": equal[name], "seconds": spread(taken)}
        for name, taken in seconds.items()
    }
    best = min(results[name]["seconds"]["median"] for name in others if exact.get(name))
    for name, result in results.items():
        result["of_best_exact"] = result["seconds"]["median"] / best
        median, of_best = result["seconds"]["median"], result["of_best_exact"]
        print(f"  {name:16} exact: {result['exact']!s:5} {median:.3f} s {of_best:.2f}x")
    return {
        "frames": len(timeline.ticks),
        "seconds": timeline.seconds,
        "size": [video.width, video.height],
        "key_frames": len(timeline.keys),
        "sampled": len(indices),
        "readers": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=Path, required=True)
    parser.add_argument("--long", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    results: dict = {"machine": machine(), "repetitions": args.repetitions}
    for name, path in (("short", args.short), ("long", args.long)):
        print(f"{name}: {path.name}")
        results[name] = {"file": path.name, **compare(path, args.frames, args.repetitions)}
    print(f"written: {write_results('video_sampling', results)}")


if __name__ == "__main__":
    main()
