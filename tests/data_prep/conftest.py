"""Fixtures: a small pool of good and bad pairs, written as folders, tars or parquet files, and runs over it."""

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_prep.pipeline.curation
from data_prep.pipeline.curation import CurationConfig, run
from data_prep.pipeline.pool import RawSource
from data_prep.pipeline.writing import WriteConfig
from data_prep.steps.caption_rules import CaptionRules
from data_prep.steps.image_rules import ImageRules
from data_prep.steps.motion import Motion
from data_prep.steps.resampling import ResamplingConfig
from tests.data_prep.scripted import MiddleFace, RednessClassifier, ScriptedScorer, SizeReader

NOUNS = ("dog", "cat", "boat", "tree", "house", "bird", "fish", "flower", "car", "mountain")


def make_noise(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture.save(out, form)
    return out.getvalue()


def make_good_pairs(count: int = 40) -> dict[str, tuple[str, bytes, bytes]]:
    """key -> (suffix, picture, caption): JPEG, PNG, GIF and SVG in turn, a dog in every second caption."""
    pairs = {}
    for index in range(count):
        noun = "dog" if index % 2 else NOUNS[index % len(NOUNS)]
        caption = f"A picture of a {noun} in front of the old wall number {index}".encode()
        suffix = ("jpg", "png", "gif", "svg")[index % 4]
        if suffix == "svg":
            body = f'<rect width="9" height="9" fill="#abc"/><circle cx="4" cy="4" r="{1 + index / 20}"/>'
            picture = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{body}</svg>'.encode()
        else:
            picture = encoded(make_noise(index), {"jpg": "JPEG"}.get(suffix, suffix.upper()))
        pairs[f"good{index:03d}"] = (suffix, picture, caption)
    return pairs


def bomb() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    data = bytearray(encoded(make_noise(1)))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "cut": ("jpg", encoded(make_noise(900), "JPEG")[:300], b"A dog in front of a very old wall"),
    "zero": ("png", b"", b"A zero byte dog in front of a very old wall"),
    "bomb": ("png", bomb(), b"A bomb of a dog in front of a very old wall"),
    "silent": ("png", encoded(make_noise(901)), b"  \n"),
    "long": ("png", encoded(make_noise(902)), b"dog " * 20_000),
    "nul": ("png", encoded(make_noise(903)), b"A dog\0in front of a very old wall"),
    "latin": ("png", encoded(make_noise(904)), b"A dog in front of a caf\xe9 in the old town"),
}


def write_folder(folder: Path, pairs: dict, name: str) -> None:
    for key, (suffix, picture, caption) in pairs.items():
        (folder / f"{key}.{suffix}").write_bytes(picture)
        (folder / f"{key}.txt").write_bytes(caption)


def write_tar(folder: Path, pairs: dict, name: str) -> None:
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for key, (suffix, picture, caption) in pairs.items():
            add(tar, f"{key}.{suffix}", picture)
            add(tar, f"{key}.txt", caption)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_parquet(folder: Path, pairs: dict, name: str) -> None:
    pictures = pa.array([{"bytes": picture, "path": key} for key, (_, picture, _) in pairs.items()])
    captions = pa.array([caption for _, _, caption in pairs.values()], pa.binary())
    pq.write_table(pa.table({"image": pictures, "caption": captions}), folder / f"{name}.parquet", row_group_size=7)


@pytest.fixture(scope="session")
def good_pairs() -> Callable[[int], dict]:
    """good_pairs(count) -> pairs that only the resampling drops."""
    return make_good_pairs


@pytest.fixture(scope="session")
def bad_pairs() -> dict:
    """Pairs that cannot be read, by their fault."""
    return BAD


@pytest.fixture(scope="session")
def noise() -> Callable:
    """noise(seed, size) -> a picture of smooth coloured noise."""
    return make_noise


@pytest.fixture(scope="session")
def encode() -> Callable:
    """encode(picture, form) -> the bytes of a file."""
    return encoded


@pytest.fixture
def pool(tmp_path) -> Callable[..., Path]:
    """pool(kind, name, pairs, files=1) -> a folder that holds the pairs, in `files` tars or parquet files."""

    def write(kind: str, name: str, pairs: dict, files: int = 1) -> Path:
        folder = tmp_path / "pools" / name
        folder.mkdir(parents=True)
        for index in range(files):
            of_file = dict(list(pairs.items())[index::files])
            {"folder": write_folder, "tars": write_tar, "parquet": write_parquet}[kind](folder, of_file, f"{index:02d}")
        return folder

    return write


@pytest.fixture
def text(tmp_path) -> Path:
    """A text that the n-grams are taken from."""
    path = tmp_path / "text.txt"
    path.write_text("a picture of an old wall\n" + "\n".join(f"a {noun} in the garden" for noun in NOUNS))
    return path


@pytest.fixture
def curate(tmp_path, text) -> Callable[..., CurationConfig]:
    """curate(source folder, kind, output, **changes) -> a run's configuration, with all rules that need no model."""

    def config(source: Path, kind: str, output: str, **changes) -> CurationConfig:
        settings = {
            "output": str(tmp_path / output),
            "sources": (RawSource(str(source), kind),),
            "caption_rules": CaptionRules(),
            "image_rules": ImageRules(),
            "resampling": ResamplingConfig(str(text), threshold=0.3),
            "write": WriteConfig(samples_per_shard=10),
            "svg_size": 64,
        }
        return CurationConfig(**{**settings, **changes})

    return config


@pytest.fixture
def curate_clips(curate) -> Callable[..., CurationConfig]:
    """curate_clips(source folder, kind, output, **changes) -> the same for a source of clips, with the motion score."""

    def config(source: Path, kind: str, output: str, **changes) -> CurationConfig:
        sources = (RawSource(str(source), kind, media="clips"),)
        settings = {"image_rules": None, "resampling": None, "motion": Motion(0.02)}
        return curate(source, kind, output, **{"sources": sources, **settings, **changes})

    return config


@pytest.fixture
def scripted(monkeypatch) -> Callable:
    """Replaces all models by stand-ins; the value is the `load_scorer` of a run."""
    monkeypatch.setattr(data_prep.pipeline.curation.OpenNsfw, "of_package", RednessClassifier)
    monkeypatch.setattr(data_prep.pipeline.curation.CenterFace, "of_file", lambda *_: MiddleFace())
    monkeypatch.setattr(data_prep.pipeline.curation.RapidOcr, "of_package", SizeReader)
    return lambda config: ScriptedScorer(config.pretrained)


@pytest.fixture
def work(pool, curate, good_pairs, bad_pairs) -> Path:
    """The output folder of a run over forty good pairs and all bad ones."""
    config = curate(pool("tars", "a", {**good_pairs(40), **bad_pairs}), "tars", "run")
    run(config)
    return Path(config.output)
