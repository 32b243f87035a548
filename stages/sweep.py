"""Sweeps finetuning over data subsets, learning rates and weight decays, and averages the best runs (paper §7.5.1).

    mm sweep --config configs/sweep.yaml

What trains and what is frozen is that of the `base` configuration. Each combination is a run of `stages.finetune` in a
folder of its own. Their average is in `best`, the scores in `sweep.md` and `sweep.json`. The same command resumes: it
keeps finished runs and continues an interrupted one.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import mm.training.adapters
import mm.training.config
from foundation.errors import UserError, is_user_error, one_line
from mm.averaging import average_best
from mm.evaluation.evaluate import METRICS, evaluate
from mm.evaluation.metrics import Score
from mm.parallel.process_group import Ranks
from mm.run_files import CONFIG_FILE, replaced_files
from mm.run_folder import load
from mm.training.command import run_stage
from mm.training.data import DataSource
from shards.reader import ShardSet
from shards.tars import KeyRule
from stages.finetune import Finetune, finetune

logger = logging.getLogger(__name__)
BEST = "best"
SETTINGS_FILE = "finetune.yaml"  # in each run's folder: the configuration with which `mm train finetune` repeats it


@dataclass
class Subset:
    """Data to train on, and a name of letters, digits, `_` and `-`, with which the runs' folders begin."""

    name: str
    data: list[DataSource]


@dataclass
class Scoring:
    """How runs are ranked: by a metric of `mm evaluate`, of which larger is better, on held-out records.

    Attributes:
        path, split: the records.
        metric: its name.
        key: see `shards.reader.ShardSet`.
        limit: score on a random subset of this size, the same for all runs; null: on all records.
    """

    path: str
    split: str = "validation"
    metric: str = "vqa_accuracy"
    limit: int | None = None
    key: KeyRule = "first_dot"


@dataclass
class Sweep:
    """Configuration of the sweep: every combination of subset, learning-rate factor and weight decay is a run.

    Attributes:
        output: folder for the runs, their average and the tables.
        base: a finetuning configuration: its fields, or a file, whose path is relative to this file's folder. Its
            output, data and weight decay are replaced in each run.
        subsets: the data of the runs.
        learning_rate_factors: each multiplies all learning rates of the base.
        weight_decays: of the runs.
        scoring: how the runs are ranked.
    """

    output: str
    base: Finetune
    subsets: list[Subset]
    learning_rate_factors: list[float]
    weight_decays: list[float]
    scoring: Scoring

    @property
    def device(self) -> str:
        """The device of all runs."""
        return self.base.device


@dataclass(frozen=True)
class Combination:
    """One run of the sweep; `settings` is its finetuning configuration."""

    subset: str
    learning_rate_factor: float
    weight_decay: float
    settings: Finetune

    @property
    def run(self) -> Path:
        return Path(self.settings.output)


def sweep(config: Sweep) -> None:
    """Finetune every combination, average the best runs and tabulate all scores.

    Raises:
        UserError: as `combinations_of`; unknown metric; no records to score on; several processes; and at the end, when
            the other runs are scored and averaged, if some runs failed.
    """
    if Ranks.current().size > 1:
        raise UserError(
            f"a sweep is one process; under torchrun start its runs one by one, with the {SETTINGS_FILE} in each folder"
        )
    combinations = combinations_of(config)
    if config.scoring.metric not in METRICS:
        raise UserError(f"scoring.metric is {config.scoring.metric!r}; choose from {', '.join(METRICS)}")
    records = ShardSet(config.scoring.path, config.scoring.key).select(split=config.scoring.split)
    failed = finetune_all(combinations)
    reasons = "; ".join(f"{run.name}: {reason}" for run, reason in failed.items())
    finished = [combination for combination in combinations if combination.run not in failed]
    if not finished:
        raise UserError(f"all {len(combinations)} runs failed: {reasons}")
    summary = score_and_average(finished, config, records)
    summary["failed"] = [{"run": run.name, "reason": reason} for run, reason in failed.items()]
    with replaced_files(config.output, last="sweep.json") as new:
        (new / "sweep.md").write_text(table(summary), encoding="utf-8")
        (new / "sweep.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(summary))
    if failed:
        raise UserError(f"{len(failed)} of {len(combinations)} runs failed: {reasons}")


def finetune_all(combinations: Sequence[Combination]) -> dict[Path, str]:
    """Finetune the combinations one by one; a failing run does not stop the others.

    Returns:
        The folders of the runs that failed, each with the reason. Tracebacks of faults of the program are logged.
    """
    failed: dict[Path, str] = {}
    for index, combination in enumerate(combinations, start=1):
        logger.info("run %d of %d: %s", index, len(combinations), combination.run)
        try:
            finetune_or_keep(combination.settings)
        except Exception as error:
            is_mistake = is_user_error(error)
            failed[combination.run] = one_line(error) if is_mistake else f"{type(error).__name__}: {one_line(error)}"
            logger.warning("failed: %s: %s", combination.run, failed[combination.run], exc_info=not is_mistake)
    return failed


def combinations_of(config: Sweep) -> list[Combination]:
    """All runs of a sweep, subset by subset.

    Raises:
        UserError: an empty list, a base or subset without data, a subset's name with other characters, the same run
            twice, or a factor or weight decay out of range.
    """
    for name in ("subsets", "learning_rate_factors", "weight_decays"):
        if not getattr(config, name):
            raise UserError(f"{name} is empty; give it at least one entry")
    if not config.base.data:
        raise UserError("base.data is empty; give a finetuning configuration that could run by itself")
    for subset in config.subsets:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", subset.name):
            raise UserError(f"subset {subset.name!r}: a name may have letters, digits, '_' and '-' only")
        if not subset.data:
            raise UserError(f"subset {subset.name} has no data; name at least one source")
    for factor in config.learning_rate_factors:
        if not 0 < factor < math.inf:
            raise UserError(f"learning_rate_factors has {factor}; a factor must be above 0")
    combinations = [
        Combination(subset.name, factor, decay, _settings(config, subset, factor, decay))
        for subset in config.subsets
        for factor in config.learning_rate_factors
        for decay in config.weight_decays
    ]
    names = [combination.run.name for combination in combinations]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise UserError(f"{', '.join(duplicates)}: there twice; name each subset, rate factor and weight decay once")
    return combinations


def finetune_or_keep(settings: Finetune) -> None:
    """Finetune, from the newest checkpoint if there is one; a finished run with the same settings is kept.

    Raises:
        UserError: the folder has a finished run with other settings, or as `stages.finetune.finetune`.
    """
    folder = Path(settings.output)
    described = json.loads(json.dumps(asdict(settings)))  # tuples as lists, as in YAML
    if (folder / CONFIG_FILE).exists():
        file = folder / SETTINGS_FILE
        earlier = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
        old, new = _result_settings(earlier), _result_settings(described)
        differing = [name for name in new if old.get(name) != new[name]]
        if differing:
            raise UserError(
                f"{folder} holds a run with another {', '.join(differing)}; name another output folder, or remove it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
    finetune(settings)


def score_and_average(finished: Sequence[Combination], config: Sweep, records: ShardSet) -> dict[str, Any]:
    """Score the runs, write the average of the best ones into `best`, and summarise the scores, best first."""
    scores: dict[Path, Score] = {}

    def score(run: Path) -> float:
        model, processor = load(run, device=config.base.device)
        report = evaluate(model, processor, records, [config.scoring.metric], limit=config.scoring.limit)
        scores[run] = report.scores[config.scoring.metric]
        return scores[run].value

    by_run = {combination.run: combination for combination in finished}
    choice = average_best(list(by_run), Path(config.output) / BEST, score)
    ranked = [by_run[run] for run, _ in choice.ranked]
    averages = [scores[ranked[0].run], *(value for run, value in scores.items() if run not in by_run)]
    return {
        "scoring": asdict(config.scoring),
        "runs": [
            {
                "run": combination.run.name,
                "subset": combination.subset,
                "learning_rate_factor": combination.learning_rate_factor,
                "weight_decay": combination.weight_decay,
                **_numbers(scores[combination.run]),
            }
            for combination in ranked
        ],
        "averages": [{"num_runs": count, **_numbers(value)} for count, value in enumerate(averages, start=1)],
        "num_averaged": choice.num_averaged,
    }


def table(summary: dict[str, Any]) -> str:
    """A sweep's summary in markdown: the runs, the averages of the best ones, the chosen average, and the failures."""
    scoring = summary["scoring"]

    def score_of(row: dict[str, Any]) -> Score:
        return Score(scoring["metric"], row["score"], row["interval"], row["num_samples"])

    lines = ["| run | subset | rate factor | weight decay | score |", "|---|---|---|---|---|"]
    for row in summary["runs"]:
        settings = f"{row['subset']} | {row['learning_rate_factor']:g} | {row['weight_decay']:g}"
        lines.append(f"| {row['run']} | {settings} | {score_of(row)} |")
    lines += ["", "| average of the best | score |", "|---|---|"]
    lines += [f"| {row['num_runs']} | {score_of(row)} |" for row in summary["averages"]]
    chosen_on = f"split {scoring['split']} of {scoring['path']}"
    lines += ["", f"`{BEST}` is the average of the best {summary['num_averaged']}, chosen on {chosen_on}."]
    lines += [f"\nFailed: {row['run']}: {row['reason']}" for row in summary["failed"]]
    return "\n".join(lines) + "\n"


def _settings(config: Sweep, subset: Subset, factor: float, decay: float) -> Finetune:
    base = config.base
    rates = {pattern: None if rate is None else rate * factor for pattern, rate in base.training.learning_rates.items()}
    training = replace(base.training, learning_rates=rates, weight_decay=decay)
    output = Path(config.output) / f"{subset.name}-rate{factor:g}-decay{decay:g}"
    return replace(base, output=str(output), data=subset.data, training=training)


def _result_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a run's settings on which its weights depend."""
    training = settings.get("training", {})
    chosen = {name: value for name, value in settings.items() if name not in mm.training.adapters.NOT_IN_FINGERPRINT}
    for name, value in training.items():
        if name not in mm.training.config.NOT_IN_FINGERPRINT:
            chosen[f"training.{name}"] = (
                list(value.items()) if name == "learning_rates" else value
            )  # their order decides
    return chosen


def _numbers(score: Score) -> dict[str, Any]:
    return {"score": score.value, "interval": score.interval, "num_samples": score.num_samples}


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(Sweep, sweep, argv, "sweep")


if __name__ == "__main__":
    main()
