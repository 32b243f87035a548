"""Processor time of reading other people's files, beside implementations of others that do the bare decoding.

    OMP_NUM_THREADS=1 python -m benchmarks.reading            # all kinds; 3 minutes
    OMP_NUM_THREADS=1 python -m benchmarks.reading --quick    # tiny inputs, to test it; its numbers mean nothing

Pictures, sounds, films, tars of pairs, and conversations are made by seed. Every repetition runs all contestants of a
case in turn. Ours checks what it reads and mends it (orientation, length, joints, times, control tokens); the others
decode. Times are of the processor, those of our process for decord included, so other programs do not count.
"""

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import webdataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import mm
from benchmarks import measure
from benchmarks.pictures import jpeg, scene
from benchmarks.video_sampling import with_pyav_in_order
from mm.language_model import LanguageModelConfig
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards
from speech.reading import read_sound
from video.sampling import sample_frames, sample_indices
from video.timeline import MAX_PIXELS, MAX_SECONDS, open_video
from vision.reading import read_picture

RATE = 16_000  # Hz
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """How much is read.

    Attributes:
        picture: height in pixels. seconds: of the sounds. film: seconds of 25 frames. sampled: frames of a film.
        pairs: of a folder of tars. turns: questions with an answer in a conversation.
    """

    picture: int = 480
    seconds: tuple[int, ...] = (3, 60)
    film: int = 10
    sampled: int = 16
    pairs: int = 1000
    turns: tuple[int, ...] = (1, 10)


TINY = Sizes(picture=24, seconds=(1,), film=1, sampled=2, pairs=5, turns=(1, 2))


@dataclass(frozen=True)
class Case:
    """One input, and who reads it.

    Attributes:
        num_bytes: of the input.
        unit: what the contestants count.
        contestants: name -> a call that reads the whole input and returns how much it has read, in `unit`. Ours is the
            first.
    """

    name: str
    num_bytes: int
    unit: str
    contestants: dict[str, Callable[[], int]]


# ----------------------------------------------------------------------------------------------------------- pictures


def picture_cases(sizes: Sizes) -> Iterator[Case]:
    picture = scene(0, sizes.picture)
    transparent = picture.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(picture.size))
    for name, image, form in (
        ("JPEG", picture, "JPEG"),
        ("PNG", picture, "PNG"),
        ("PNG, RGBA", transparent, "PNG"),
        ("WebP", picture, "WEBP"),
        ("GIF", picture, "GIF"),
    ):
        out = io.BytesIO()
        image.save(out, form)
        data = out.getvalue()
        yield Case(
            name,
            len(data),
            "pixels",
            {
                "ours": lambda data=data: _num_pixels(read_picture(data)),
                "Pillow": lambda data=data: _num_pixels(Image.open(io.BytesIO(data)).convert("RGB")),
            },
        )


def _num_pixels(picture: Image.Image) -> int:
    picture.load()
    return picture.width * picture.height


# --------------------------------------------------------------------------------------------------------------- sound


def sound_cases(sizes: Sizes) -> Iterator[Case]:
    for seconds in sizes.seconds:
        random = np.random.default_rng(seconds)
        times = np.arange(seconds * RATE) / RATE
        samples = 0.3 * np.sin(2 * np.pi * 440 * times) + 0.05 * random.standard_normal(len(times))
        for name, form, subtype in (
            ("WAV", "WAV", "PCM_16"),
            ("FLAC", "FLAC", "PCM_16"),
            ("MP3", "MP3", None),
            ("Ogg Vorbis", "OGG", "VORBIS"),
        ):
            out = io.BytesIO()
            soundfile.write(out, samples, RATE, format=form, subtype=subtype)
            data = out.getvalue()
            yield Case(
                f"{name}, {seconds} s",
                len(data),
                "samples",
                {
                    "ours": lambda data=data: len(read_sound(data)),
                    "libsndfile": lambda data=data: len(soundfile.read(io.BytesIO(data), dtype="float32")[0]),
                    "PyAV": lambda data=data: _decoded_samples(data),
                },
            )


def _decoded_samples(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(frame.samples for frame in container.decode(audio=0))


# ---------------------------------------------------------------------------------------------------------------- film


def film_cases(sizes: Sizes, folder: Path) -> Iterator[Case]:
    for name, suffix, codec, exact_in_decord in (
        ("MP4, H.264", "mp4", "libx264", True),
        ("Matroska, H.264", "mkv", "libx264", True),
        ("WebM, VP9", "webm", "libvpx-vp9", True),
        ("AVI, MPEG-4", "avi", "mpeg4", False),
    ):
        path = folder / f"film.{suffix}"
        _write_film(path, codec, sizes)
        with open_video(path, MAX_PIXELS, MAX_SECONDS) as video:
            indices = sample_indices(video.timeline.ticks, video.timeline.duration, sizes.sampled).tolist()
        contestants = {
            "ours": lambda path=path: len(sample_frames(path, sizes.sampled).pixels),
            "PyAV": lambda path=path, indices=indices: len(with_pyav_in_order(path, indices, [])),
        }
        if exact_in_decord:
            contestants["decord"] = lambda path=path, indices=indices: _with_decord(path, indices)
        yield Case(f"{name}, {sizes.film} s", path.stat().st_size, "frames", contestants)


def _write_film(path: Path, codec: str, sizes: Sizes) -> None:
    picture = np.asarray(scene(1, sizes.picture // 2 * 2))
    height, width = (side // 2 * 2 for side in picture.shape[:2])
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 50
        for index in range(25 * sizes.film):
            moved = np.roll(picture[:height, :width], 3 * index, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(moved), "rgb24")))
        container.mux(stream.encode(None))


def _with_decord(path: Path, indices: list[int]) -> int:
    import decord

    return len(decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy())


# ---------------------------------------------------------------------------------------------------------------- tars


def tar_cases(sizes: Sizes, folder: Path) -> Iterator[Case]:
    records = [
        Record(
            f"{index:06d}",
            {
                "id": f"{index:06d}",
                "split": "train",
                "task": "caption",
                "language": "en",
                "caption": f"Number {index}.",
            },
            {"jpg": jpeg(scene(index, 60))},
        )
        for index in range(sizes.pairs)
    ]
    indexed, bare = folder / "indexed", folder / "bare"
    write_shards(records, indexed)
    bare.mkdir()
    for tar in indexed.glob("*.tar"):
        (bare / tar.name).write_bytes(tar.read_bytes())
    num_bytes = sum(tar.stat().st_size for tar in bare.glob("*.tar"))
    others = {"tarfile": lambda: _with_tarfile(bare), "webdataset": lambda: _with_webdataset(bare)}
    for name, ours in (
        ("tars without an index, opened", lambda: len(ShardSet(bare))),
        ("tars with an index, opened", lambda: len(ShardSet(indexed))),
        ("tars with an index, every record", lambda: sum(1 for _ in ShardSet(indexed))),
    ):
        yield Case(f"{name}, {sizes.pairs} pairs", num_bytes, "pairs", {"ours": ours, **others})


def _with_tarfile(folder: Path) -> int:
    """Every member's bytes."""
    num_pairs = 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                num_pairs += member.name.endswith(".jpg") and content is not None and len(content.read()) > 0
    return num_pairs


def _with_webdataset(folder: Path) -> int:
    num_pairs = 0
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            members = webdataset.tariterators.tar_file_iterator(file)
            named = ({**member, "__url__": path.name} for member in members)
            num_pairs += sum(1 for _ in webdataset.tariterators.group_by_keys(named))
    return num_pairs


# ------------------------------------------------------------------------------------------------------- conversations


def conversation_cases(sizes: Sizes) -> Iterator[Case]:
    random = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in random.integers(0, 26, random.integers(2, 9))) for _ in range(2000)]

    def text(num_words: int) -> str:
        return " ".join(words[index] for index in random.zipf(1.3, num_words) % len(words)) + "."

    tokenizer = _tokenizer([text(50) for _ in range(400)])
    shape = LanguageModelConfig(len(tokenizer), 64, 96, 4, 4, 2, context=16_384)
    processor = mm.Processor(tokenizer, mm.ModelConfig(shape))
    for turns in sizes.turns:
        messages = [
            {"role": role, "content": text(num_words)}
            for _ in range(turns)
            for role, num_words in (("user", 20), ("assistant", 60))
        ]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        yield Case(
            f"conversation, {turns} turn{'s' * (turns > 1)}",
            len(rendered.encode()),
            "tokens",
            {
                "ours": lambda messages=messages: len(processor.example(messages).tokens),
                "transformers, with the mask of answers": lambda messages=messages: len(
                    tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)[
                        "input_ids"
                    ]
                ),
                "transformers": lambda messages=messages: len(
                    tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
                ),
            },
        )


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|begin|>", "<|start|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


# ------------------------------------------------------------------------------------------------------------ measuring


def cpu_seconds() -> float:
    """Processor seconds of this process, and of those that it has started and that still run."""
    tasks = Path("/proc/self/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    threads = [thread for child in children for thread in Path(f"/proc/{child}/task").glob("*/schedstat")]
    return time.process_time() + sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A call that runs `work` and returns its processor seconds."""

    def run() -> float:
        start = cpu_seconds()
        work()
        return cpu_seconds() - start

    return run


def measured(case: Case, repetitions: int) -> dict[str, Any]:
    counts = {name: work() for name, work in case.contestants.items()}
    seconds = measure.interleave({name: timed(work) for name, work in case.contestants.items()}, repetitions)
    spreads = {name: measure.spread(taken) for name, taken in seconds.items()}
    ours, *others = spreads
    return {
        "case": case.name,
        "bytes": case.num_bytes,
        "unit": case.unit,
        "counts": counts,
        "seconds": spreads,
        "ratio": spreads[ours]["median"] / min(spreads[name]["median"] for name in others),
    }


def line(row: dict[str, Any]) -> str:
    def shown(name: str) -> str:
        spread = row["seconds"][name]
        low, median, high = (1e3 * spread[part] for part in ("lower_quartile", "median", "upper_quartile"))
        return f"{median:.3g} ({low:.3g}-{high:.3g})"

    ours, *others = row["seconds"]
    rate = row["bytes"] / row["seconds"][ours]["median"] / 1e6
    named = "; ".join(f"{name} {shown(name)}" for name in others)
    return f"| {row['case']} | {shown(ours)} | {rate:.3g} | {named} | {row['ratio']:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny inputs, to test the script")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--output", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    sizes = TINY if args.quick else Sizes()
    rows = []
    print("| input | ours, ms | MB/s | others, ms | ours over the fastest |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for cases in (
            picture_cases(sizes),
            sound_cases(sizes),
            film_cases(sizes, folder),
            tar_cases(sizes, folder),
            conversation_cases(sizes),
        ):
            for case in cases:
                rows.append(measured(case, args.repetitions))
                print(line(rows[-1]), flush=True)
    values = {"machine": measure.machine(), "repetitions": args.repetitions, "rows": rows}
    print(f"written: {measure.write_results('reading', values, args.output)}")


if __name__ == "__main__":
    main()
