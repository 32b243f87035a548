"""A sweep over finetuning: data subsets x rates x weight decays, the best runs averaged (paper §7.5.1, image SFT).

Each combination is a run of `stages.finetune` in a folder of its own, beside `best`, the average, and the tables. The
same command goes on where it was: finished runs are kept, an interrupted one is resumed.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

import mm.training.adapters
import mm.training.config
from foundation.errors import UserError, one_line
from mm.averaging import average_best
from mm.evaluation.evaluate import METRICS, evaluate
from mm.evaluation.metrics import Score
from mm.parallel.process_group import Ranks
from mm.run_files import CONFIG_FILE, replaced_files
from mm.run_folder import load, write_yaml
from mm.training.command import run_stage
from mm.training.data import DataSource
from shards.reader import ShardSet
from stages.finetune import Finetune, finetune

BEST = "best"
SETTINGS_FILE = "finetune.yaml"  # in each run's folder: what `mm train finetune` makes the same run of


@dataclass
class Subset:
    """Data to try, under a name of letters, digits, `_` and `-` that the runs' folders begin with."""

    name: str
    data: list[DataSource]


@dataclass
class Scoring:
    """What runs are ranked by: a metric of `mm evaluate`, the higher the better, on records that no run learns from.

    Attributes:
        path, split: the records. limit: a random subset of this size, the same for all runs; null takes all.
    """

    path: str
    split: str = "validation"
    metric: str = "vqa_accuracy"
    limit: int | None = None


@dataclass
class Sweep:
    """What to try.

    Attributes:
        output: folder for the runs, their average and the tables.
        base: a finetuning configuration: a file, named from this one's folder, or its fields. Its output and data are
            replaced in each run, its rates multiplied, its weight decay replaced.
        learning_rate_factors: what all of the base's rates are multiplied by.
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
    """One run to do; `settings` are the base with the other three in it."""

    subset: str
    learning_rate_factor: float
    weight_decay: float
    settings: Finetune

    @property
    def run(self) -> Path:
        return Path(self.settings.output)


def sweep(config: Sweep) -> None:
    """Finetune every combination that is not done yet, average the best of the runs, and write `sweep.md` and `.json`.

    Raises:
        UserError: as `combinations_of`; no records to score on; several processes; and at the end, when everything
            else is done, if some runs failed.
    """
    if Ranks.current().size > 1:
        raise UserError(
            f"a sweep is one process; under torchrun start its runs one by one, with the {SETTINGS_FILE} in each folder"
        )
    combinations = combinations_of(config)
    if config.scoring.metric not in METRICS:
        raise UserError(f"scoring.metric is {config.scoring.metric!r}; choose from {', '.join(METRICS)}")
    records = ShardSet(config.scoring.path).select(split=config.scoring.split)
    failed: dict[Path, str] = {}
    for number, combination in enumerate(combinations, start=1):
        print(f"run {number} of {len(combinations)}: {combination.run}", file=sys.stderr)
        try:
            finish(combination.settings)
        except Exception as error:  # a run can fail in any way; the others are still worth having
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            failed[combination.run] = kind + one_line(error)
            print(f"failed: {combination.run}: {failed[combination.run]}", file=sys.stderr)
    reasons = "; ".join(f"{run.name}: {reason}" for run, reason in failed.items())
    done = [combination for combination in combinations if combination.run not in failed]
    if not done:
        raise UserError(f"all {len(combinations)} runs failed: {reasons}")
    summary = choose(done, config, records)
    summary["failed"] = [{"run": run.name, "reason": reason} for run, reason in failed.items()]
    with replaced_files(config.output, last="sweep.json") as new:
        (new / "sweep.md").write_text(table(summary), encoding="utf-8")
        (new / "sweep.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(summary))
    if failed:
        raise UserError(f"{len(failed)} of {len(combinations)} runs failed: {reasons}")


def combinations_of(config: Sweep) -> list[Combination]:
    """Every run of a sweep, subset by subset.

    Raises:
        UserError: nothing to try in one of the lists, a base or a subset without data, a name that is no folder's or
            is there twice, numbers out of range.
    """
    for name in ("subsets", "learning_rate_factors", "weight_decays"):
        if not getattr(config, name):
            raise UserError(f"{name} is empty; give it at least one entry")
    if not config.base.data:
        raise UserError("base.data is empty; give a finetuning configuration that would run by itself")
    for subset in config.subsets:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", subset.name):
            raise UserError(f"subset {subset.name!r}: a name has letters, digits, '_' and '-'")
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
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{', '.join(twice)}: there twice; name each subset, rate factor and weight decay once")
    return combinations


def finish(settings: Finetune) -> None:
    """Finetune, from the newest checkpoint if there is one; a run that has ended stays as it is.

    Raises:
        UserError: the folder's run has ended and was made with other settings, or as `finetune`.
    """
    folder = Path(settings.output)
    described = json.loads(json.dumps(asdict(settings)))
    if (folder / CONFIG_FILE).exists():
        file = folder / SETTINGS_FILE
        earlier = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
        old, new = _decisive(earlier), _decisive(described)
        differing = [name for name in new if old.get(name) != new[name]]
        if differing:
            raise UserError(
                f"{folder} holds a run with another {', '.join(differing)}; name another output folder, or remove it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(folder / SETTINGS_FILE, described)
    finetune(settings)


def choose(done: Sequence[Combination], config: Sweep, records: ShardSet) -> dict:
    """Score the runs, write the average of the best into `best`, and tell all scores, the best first."""
    scores: dict[Path, Score] = {}

    def score(run: Path) -> float:
        model, processor = load(run, device=config.base.device)
        report = evaluate(model, processor, records, [config.scoring.metric], limit=config.scoring.limit)
        scores[run] = report.scores[config.scoring.metric]
        return scores[run].value

    by_run = {combination.run: combination for combination in done}
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
        "averages": [{"num_runs": number, **_numbers(value)} for number, value in enumerate(averages, start=1)],
        "num_averaged": choice.num_averaged,
    }


def table(summary: dict) -> str:
    """A sweep's outcome in markdown: each run, each average of the best, what was taken and what failed."""
    scoring = summary["scoring"]

    def shown(row: dict) -> Score:
        return Score(scoring["metric"], row["score"], row["interval"], row["num_samples"])

    lines = ["| run | subset | rate factor | weight decay | score |", "|---|---|---|---|---|"]
    for row in summary["runs"]:
        settings = f"{row['subset']} | {row['learning_rate_factor']:g} | {row['weight_decay']:g}"
        lines.append(f"| {row['run']} | {settings} | {shown(row)} |")
    lines += ["", "| average of the best | score |", "|---|---|"]
    lines += [f"| {row['num_runs']} | {shown(row)} |" for row in summary["averages"]]
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


def _decisive(settings: dict) -> dict:
    """Those of a run's settings that its weights depend on."""
    training = settings.get("training", {})
    chosen = {name: value for name, value in settings.items() if name not in mm.training.adapters.NOT_IN_FINGERPRINT}
    for name, value in training.items():
        if name not in mm.training.config.NOT_IN_FINGERPRINT:
            chosen[f"training.{name}"] = (
                list(value.items()) if name == "learning_rates" else value
            )  # their order decides
    return chosen


def _numbers(score: Score) -> dict:
    return {"score": score.value, "interval": score.interval, "num_samples": score.num_samples}


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(Sweep, sweep, argv, "sweep")


if __name__ == "__main__":
    main()
