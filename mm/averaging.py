"""Model averaging: the mean of several runs' weights, and of the K best runs by a score (paper §7.5.1)."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foundation.errors import UserError
from mm.run_files import (
    CONFIG_FILE,
    ENCODERS,
    Description,
    read_description,
    read_part,
    replaced_files,
    write_description,
    write_parts,
)


@dataclass(frozen=True)
class TopKChoice:
    """The outcome of `average_best`.

    Attributes:
        ranked: (run, score), the best first.
        averages: scores of the averages of the best 1, 2, ... runs; averages[0] is the best run's own.
        num_averaged: K, the number of runs in the average that was written.
    """

    ranked: list[tuple[Path, float]]
    averages: list[float]
    num_averaged: int

    def __str__(self) -> str:
        lines = [f"{score:8.4f}  {run}" for run, score in self.ranked]
        lines += [f"{score:8.4f}  average of the best {count}" for count, score in enumerate(self.averages, start=1)]
        return "\n".join([*lines, f"taken: the best {self.num_averaged}"])


def average(runs: Sequence[str | Path], output: str | Path) -> None:
    """Write a run folder with the mean of the runs' weights, computed in FP32; parts equal in all runs are copied.

    Raises:
        UserError: no runs, runs that differ in anything but their weights, or a damaged one.
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise UserError("name at least one run to average")
    descriptions = [read_description(folder) for folder in folders]
    first = descriptions[0]
    for folder, description in zip(folders, descriptions, strict=True):
        if description["kind"] in ENCODERS:
            raise UserError(f"{folder} holds only the {ENCODERS[description['kind']]} of a model; runs are averaged")
        differing = [name for name in ("model", "processor", "language_model") if description[name] != first[name]]
        if differing or description["parts"].keys() != first["parts"].keys():
            named = " and ".join(name.replace("_", " ") for name in differing) or "parts"
            raise UserError(f"{folder} has another {named} than {folders[0]}: average runs of one model")
    with replaced_files(output, last=CONFIG_FILE) as new:
        hashes: dict[str, str] = {}
        for part in first["parts"]:
            if len({description["parts"][part] for description in descriptions}) == 1:
                read_part(folders[0], part, first)  # checks its hash
                shutil.copyfile(folders[0] / f"{part}.safetensors", new / f"{part}.safetensors")
                hashes[part] = first["parts"][part]
            else:
                hashes |= write_parts(new, {part: _mean(part, folders, descriptions)})
        shutil.copytree(folders[0] / "tokenizer", new / "tokenizer")
        values = {name: value for name, value in first.items() if name not in ("format", "kind", "parts")}
        write_description(new, first["kind"], **values, parts=hashes)


def average_best(runs: Sequence[str | Path], output: str | Path, score: Callable[[Path], float]) -> TopKChoice:
    """Average the best K runs; K is chosen by scoring the averages, and of equal scores the smallest K wins.

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
    for count in range(2, len(ranked) + 1):
        with tempfile.TemporaryDirectory(prefix=".average-", dir=Path(output).parent) as folder:
            average([run for run, _ in ranked[:count]], folder)
            averages.append(score(Path(folder)))
    best_count = averages.index(max(averages)) + 1
    average([run for run, _ in ranked[:best_count]], output)
    return TopKChoice(ranked, averages, best_count)


def _mean(part: str, folders: list[Path], descriptions: list[Description]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for folder, description in zip(folders, descriptions, strict=True):
        for name, tensor in read_part(folder, part, description).items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float32)) + tensor.float()
    like = read_part(folders[0], part, descriptions[0])
    return {name: (tensor / len(folders)).to(like[name].dtype) for name, tensor in total.items()}
