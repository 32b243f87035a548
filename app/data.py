"""`mm data`: raw image-text pairs to training shards, and what became of every pair.

The rooms below know no models and no assets: here `asset:NAME` becomes a place on this machine.
"""

import errno
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from data_prep.curation import DECIDED, read_config, read_run, rethreshold, run, steps_of, write_kept
from data_prep.forecast import SHARES, forecast, solve_threshold
from data_prep.ledger import stats, why
from mm.assets import fetch
from mm.training.command import one_line

DEFAULT_WORK = "runs/data/sample"


def main(argv: Sequence[str]) -> int:
    """Runs one of the COMMANDS and gives the exit code."""
    if argv in (["-h"], ["--help"]):
        print(
            "usage: mm data COMMAND [...]", *(f"  {name}: {does.__doc__}" for name, does in COMMANDS.items()), sep="\n"
        )
        return 0
    try:
        if argv[:1] not in [[name] for name in COMMANDS]:
            raise ValueError(f"name a command: {', '.join(COMMANDS)}")
        COMMANDS[argv[0]](list(argv[1:]))
        return 0
    except (ValueError, OSError, ArgumentError) as error:
        print(f"mm data: {one_line(error)}{_after(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mm data: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


def run_config(argv: list[str]) -> None:
    """Take a raw pool to shards: --config FILE [--OPTION VALUE ...]"""
    if argv[:1] != ["--config"] or len(argv) < 2:
        raise ValueError("usage: mm data run --config FILE [--OPTION VALUE ...]")
    config = read_config(Path(argv[1]), argv[2:])
    count = run(config, locate)
    _print_stats(Path(config.output))
    print(f"{count} pairs in {Path(config.output) / 'shards'}")


def explain(argv: list[str]) -> None:
    """Say what became of a pair and why: ID [--work FOLDER]"""
    parser = _parser()
    parser.add_argument("pair", help="an id, the beginning of one, or a source's own key or path")
    arguments = parser.parse_args(argv)
    print(why(_work(arguments), arguments.pair))


def show_stats(argv: list[str]) -> None:
    """Count what became of the pairs, by step and reason: [--work FOLDER]"""
    _print_stats(_work(_parser().parse_args(argv)))


def decide_anew(argv: list[str]) -> None:
    """Decide with other thresholds from what is stored: [--work FOLDER] --STEP.OPTION VALUE ..."""
    work, changes = DEFAULT_WORK, list(argv)
    if changes[:1] == ["--work"] and len(changes) > 1:
        work, changes = changes[1], changes[2:]
    read_run(Path(work))
    rethreshold(Path(work), read_config(Path(work) / DECIDED, changes), locate)
    _print_stats(Path(work))
    print(f"`mm data write --work {work}` writes the shards")


def write_shards(argv: list[str]) -> None:
    """Write the shards of what was decided last: [--work FOLDER]"""
    work = _work(_parser().parse_args(argv))
    print(f"{write_kept(work, locate)} pairs in {work / 'shards'}")


def forecast_run(argv: list[str]) -> None:
    """Say what other thresholds would keep: [--work FOLDER] [--pairs N] [--times X]"""
    parser = _parser()
    parser.add_argument(
        "--pairs", type=int, help="solve the resampling's threshold for so many pairs of the whole pool"
    )
    parser.add_argument(
        "--times", type=float, default=1.0, help="how many times larger the whole pool is than this one"
    )
    arguments = parser.parse_args(argv)
    work = _work(arguments)
    steps = steps_of(read_run(work)[1], locate)
    if arguments.pairs is not None:
        threshold = solve_threshold(work / "set", steps, arguments.pairs, arguments.times)
        print(f"resampling.threshold: {threshold:.6g} keeps {arguments.pairs:,} pairs")
        return
    print(f"{'threshold':44}{'in force':>10}{'pairs':>10}{'kept':>10}  keeping{''.join(f'{s:>9.0%}' for s in SHARES)}")
    for one in forecast(work / "set", steps):
        at = "".join(f"{value:9.3g}" for _, value in one.keeping)
        print(f"{one.option:44}{one.threshold:10.4g}{one.pairs:10,}{one.kept:10,}         {at}")


def locate(name: str) -> Path:
    """The local place of what a configuration names: a path, or asset:NAME, which is fetched where it is missing."""
    kind, _, asset = name.partition(":")
    return fetch(asset) if kind == "asset" else Path(name)


def _after(error: Exception) -> str:
    """What is to be done where nothing more can be written."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; what stood there before still does: make room, and the same command goes on where it was"
    return ""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="mm data", exit_on_error=False)
    parser.add_argument("--work", default=DEFAULT_WORK, help="the folder of a run, `output` in its configuration")
    return parser


def _work(arguments: Namespace) -> Path:
    read_run(Path(arguments.work))
    return Path(arguments.work)


def _print_stats(work: Path) -> None:
    for step, decision, reason, count in stats(work):
        print(f"{count:9,}  {step:16} {decision:10} {reason}")


COMMANDS = {
    "run": run_config,
    "why": explain,
    "stats": show_stats,
    "rethreshold": decide_anew,
    "write": write_shards,
    "forecast": forecast_run,
}
