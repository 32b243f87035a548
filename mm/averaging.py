"""The mean of several runs' weights, and how many of the best to take (paper §7.5.1: top-K model averaging)."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foundation.errors import UserError
from mm.run_folder import CONFIG_FILE, read_description, read_part, replaced_files, write_parts, write_yaml


@dataclass(frozen=True)
class Choice:
    """How `average_best` chose.

    Attributes:
        ranked: (run, score), the best first.
        averages: score of the average of the best 1, 2, ...; averages[0] is the best run's own.
        num_averaged: how many were taken.
    """

    ranked: list[tuple[Path, float]]
    averages: list[float]
    num_averaged: int

    def __str__(self) -> str:
        lines = [f"{score:8.4f}  {run}" for run, score in self.ranked]
        lines += [f"{score:8.4f}  average of the best {number}" for number, score in enumerate(self.averages, start=1)]
        return "\n".join([*lines, f"taken: the best {self.num_averaged}"])


def average(runs: Sequence[str | Path], output: str | Path) -> None:
    """Write a run folder with the mean of the runs' weights, taken in FP32; what is equal in all is copied.

    Raises:
        UserError: no runs, runs that differ in anything but their weights, or a broken one.
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise UserError("name at least one run to average")
    descriptions = [read_description(folder) for folder in folders]
    first = descriptions[0]
    if "model" not in first:
        raise UserError(f"{folders[0]} holds an image encoder alone; runs are averaged")
    for folder, description in zip(folders, descriptions, strict=True):
        differing = [name for name in ("model", "processor", "language_model") if description.get(name) != first[name]]
        if differing or description["parts"].keys() != first["parts"].keys():
            named = " and ".join(name.replace("_", " ") for name in differing) or "parts"
            raise UserError(f"{folder} has another {named} than {folders[0]}: average runs of one model")
    with replaced_files(output, last=CONFIG_FILE) as new:
        hashes = {}
        for part in first["parts"]:
            if len({description["parts"][part] for description in descriptions}) == 1:
                read_part(folders[0], part, first)  # whole
                shutil.copyfile(folders[0] / f"{part}.safetensors", new / f"{part}.safetensors")
                hashes[part] = first["parts"][part]
            else:
                hashes |= write_parts(new, {part: _mean(part, folders, descriptions)})
        shutil.copytree(folders[0] / "tokenizer", new / "tokenizer")
        write_yaml(new / CONFIG_FILE, {**first, "parts": hashes})


def average_best(runs: Sequence[str | Path], output: str | Path, score: Callable[[Path], float]) -> Choice:
    """Average the best K runs, K chosen by scoring the averages; of equal scores the smaller K wins.

    Args:
        score: of a run folder, the higher the better.

    Raises:
        UserError: as `average`.
    """
    ranked = sorted(((Path(run), score(Path(run))) for run in runs), key=lambda pair: -pair[1])
    if not ranked:
        raise UserError("name at least one run to average")
    averages = [ranked[0][1]]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    for number in range(2, len(ranked) + 1):
        with tempfile.TemporaryDirectory(prefix=".average-", dir=Path(output).parent) as folder:
            average([run for run, _ in ranked[:number]], folder)
            averages.append(score(Path(folder)))
    chosen = averages.index(max(averages)) + 1
    average([run for run, _ in ranked[:chosen]], output)
    return Choice(ranked, averages, chosen)


def _mean(part: str, folders: list[Path], descriptions: list[dict]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for folder, description in zip(folders, descriptions, strict=True):
        for name, tensor in read_part(folder, part, description).items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float32)) + tensor.float()
    like = read_part(folders[0], part, descriptions[0])
    return {name: (tensor / len(folders)).to(like[name].dtype) for name, tensor in total.items()}
