"""The wheel alone, without the checkout: what it holds, and that the command and a training stage run from it."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import mm

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PACKAGES = SETUP["options"]["packages"].split()
TOP_LEVEL = sorted({package.partition(".")[0] for package in PACKAGES})


def run(*command: str | Path, **options) -> str:
    """What a process prints; it must end with 0."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=600, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def test_setup_lists_every_package():
    files = [file for name in TOP_LEVEL for file in (ROOT / name).rglob("*") if file.suffix in (".py", ".yaml")]
    assert set(PACKAGES) == {".".join(file.parent.relative_to(ROOT).parts) for file in files}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that the wheel is installed in; it is built from a copy, as building in place keeps deleted files."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in TOP_LEVEL:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", wheels, source)
    (wheel,) = wheels.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


@pytest.fixture(scope="module")
def python(installed, tmp_path_factory) -> Callable[[Sequence[str | Path]], str]:
    """python([argument, ...]) -> the output of a Python that imports from the wheel and the dependencies only.

    `-S` skips the .pth files of site-packages, so that an editable install of the checkout is not found.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    paths = os.pathsep.join(
        [str(installed), *dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))]
    )
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def start(arguments: Sequence[str | Path]) -> str:
        return run(sys.executable, "-S", *arguments, cwd=folder, env=environment)

    return start


@pytest.mark.slow
def test_the_packages_and_the_configurations_come_from_the_wheel(installed, python):
    code = "import app, configs, demos, mm, stages; print(app.__file__, configs.path('demo/adapter.yaml'), mm.__file__)"
    files = [Path(file) for file in python(["-c", code]).split()]
    assert len(files) == 3 and all(file.is_relative_to(installed) and file.is_file() for file in files)
    shipped = {file.relative_to(installed) for file in (installed / "configs").rglob("*.yaml")}
    assert shipped == {file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*.yaml")}
    assert {file.name for file in (installed / "demos").iterdir()} >= {"page.css", "attention.js"}
    assert not (installed / "tests").exists() and not (installed / "examples").exists()


@pytest.mark.slow
def test_the_command_answers(installed, python):
    version = python([installed / "bin" / "mm", "--version"])
    assert version == f"mm-adapters {SETUP['metadata']['version']}\n"
    assert "transcribe" in python([installed / "bin" / "mm", "--help"])


@pytest.mark.slow
def test_two_training_steps(installed, python, squares, language_model_folder, encoder_folder, tmp_path):
    options = {
        "language_model": language_model_folder,
        "vision_encoder": encoder_folder,
        "data": json.dumps([{"path": str(squares)}]),
        "output": tmp_path / "run",
        "device": "cpu",
        "training.steps": 2,
        "training.batch_size": 4,
        "training.micro_batch_size": 2,
        "training.warmup_steps": 1,
        "training.workers": 0,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    config = installed / "configs" / "image_adapter.yaml"
    python([installed / "bin" / "mm", "train", "train_image_adapter", "--config", config, *words])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert mm.load(tmp_path / "run")[0].image_adapter is not None
