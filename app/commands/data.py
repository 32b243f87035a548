"""`mm data`: raw image-text pairs to training shards, and what became of every pair.

The rooms below know no models and no assets: here `asset:NAME` becomes a place on this machine.
"""

import errno
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from app.clip_scorer import OpenClip
from app.commands.data_build import build_set
from data_prep.pipeline.canaries import ABOUT, FOLDER, measure_canaries, rows_of, thresholds_beside
from data_prep.pipeline.curation import (
    DECIDED,
    deciding_steps_of,
    near_duplicates_of,
    read_config,
    read_run,
    rethreshold,
    run,
    write_kept,
)
from data_prep.pipeline.forecast import SHARES, forecast, solve_threshold
from data_prep.pipeline.ledger import stats, why
from data_prep.report.language_confusion import confusions
from data_prep.report.report import write_report
from data_prep.steps.clip_score import ClipScoreConfig
from data_prep.steps.video_score import VideoScoreConfig
from demos.assets import fetch
from foundation.errors import UserError, one_line

DEFAULT_WORK = "runs/data/sample"
AGAIN = "goes on where it was"
SHORT_FORMS = {
    "--clip-score": "--clip_score.threshold",
    "--duplicates": "--near_duplicates.threshold",
    "--motion": "--motion.threshold",
    "--overlay-text": "--overlay_text.max_share",
    "--video-score": "--video_score.threshold",
}


def main(argv: Sequence[str]) -> int:
    """Runs one of the COMMANDS and gives the exit code."""
    if argv in (["-h"], ["--help"]):
        print(
            "usage: mm data COMMAND [...]", *(f"  {name}: {does.__doc__}" for name, does in COMMANDS.items()), sep="\n"
        )
        return 0
    try:
        if argv[:1] not in [[name] for name in COMMANDS]:
            raise UserError(f"name a command: {', '.join(COMMANDS)}")
        COMMANDS[argv[0]](list(argv[1:]))
        return 0
    except (ValueError, OSError, ArgumentError) as error:
        print(f"mm data: {_said(error)}{_after(error, argv[:1])}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "starts over; nothing was written" if argv[0] == "build" else AGAIN
        print(f"mm data: interrupted; the same command {again}", file=sys.stderr)
        return 130


def run_config(argv: list[str]) -> None:
    """Take a raw pool to shards: --config FILE [--OPTION VALUE ...]"""
    if argv[:1] != ["--config"] or len(argv) < 2:
        raise UserError("usage: mm data run --config FILE [--OPTION VALUE ...]")
    config = read_config(Path(argv[1]), argv[2:])
    count = run(config, locate, load_scorer)
    write_report(Path(config.output), locate)
    _print_stats(Path(config.output))
    print(f"{count} pairs in {Path(config.output) / 'shards'}")


def explain(argv: list[str]) -> None:
    """Say what became of a pair and why: ID [--work FOLDER]"""
    parser = _parser()
    parser.add_argument("pair", help="an id, the beginning of one, or a source's own key or path")
    arguments = parser.parse_args(argv)
    print(why(_work(arguments), arguments.pair))


def show_stats(argv: list[str]) -> None:
    """Count what became of the pairs, by step and reason, and the canaries that were found: [--work FOLDER]"""
    work = _work(_parser().parse_args(argv))
    _print_stats(work)
    _print_canaries(work, in_force_only=True)


def decide_anew(argv: list[str]) -> None:
    """Decide with other thresholds from what is stored: [--work FOLDER] --STEP.OPTION VALUE ...

    `--clip-score X` is short for --clip_score.threshold, `--duplicates X` for --near_duplicates.threshold, `--motion X`
    and `--video-score X` for thresholds of theirs, `--overlay-text X` for --overlay_text.max_share.
    """
    work, changes = DEFAULT_WORK, [_in_full(word) for word in argv]
    if changes[:1] == ["--work"] and len(changes) > 1:
        work, changes = changes[1], changes[2:]
    _refuse_unmeasured(Path(work), changes)
    rethreshold(Path(work), read_config(Path(work) / DECIDED, changes), locate)
    write_report(Path(work), locate)
    _print_stats(Path(work))
    print(f"`mm data write --work {work}` writes the shards")


def write_shards(argv: list[str]) -> None:
    """Write the shards of what was decided last: [--work FOLDER]"""
    work = _work(_parser().parse_args(argv))
    count = write_kept(work, locate)
    write_report(work, locate)
    print(f"{count} pairs in {work / 'shards'}")


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
    steps = deciding_steps_of(work, read_run(work)[1], locate)
    if arguments.pairs is not None:
        threshold = solve_threshold(work / "set", steps, arguments.pairs, arguments.times)
        print(f"resampling.threshold: {float(threshold)} keeps {arguments.pairs:,} pairs")
        return
    print(f"{'threshold':44}{'in force':>10}{'pairs':>10}{'kept':>10}  keeping{''.join(f'{s:>9.0%}' for s in SHARES)}")
    for one in forecast(work / "set", steps):
        at = "".join(f"{value:9.3g}" for _, value in one.keeping)
        print(f"{one.option:44}{one.threshold:10.4g}{one.pairs:10,}{one.kept:10,}         {at}")
    _print_canaries(work)


def show_languages(argv: list[str]) -> None:
    """Say how often the language of captions is taken rightly, on labelled lines that were held out: [--work FOLDER]"""
    work = _work(_parser().parse_args(argv))
    _, config = read_run(work)
    rules = config.caption_rules
    found = confusions(work / "set", rules, config.sources) if rules is not None else []
    if not found:
        raise UserError(f"{work}: has no captions whose language is known; those of asset:tuxpaint-stamps are")
    for one in found:
        print(f"{one.length}, score at least {one.threshold:.4g}{'kept':>12}{'dropped':>10}")
        print(f"{'in ' + ', '.join(rules.languages):42}{one.wanted_kept:10,}{one.wanted_dropped:10,}")
        print(f"{'in other languages':42}{one.others_kept:10,}{one.others_dropped:10,}")
        worst = ", ".join(f"{name} {kept} of {lines}" for name, lines, kept in one.languages[:10] if kept)
        print(f"most kept of: {worst or 'none'}")
        at = ", ".join(f"{score:.3g} keeps {share:.0%}" for share, score in one.choices)
        print(f"of the wanted ones in the other half: {at}\n")


def build_one(argv: list[str]) -> None:
    """Build a set of annealing, or mix one of several: NAME --config FILE [--OPTION VALUE ...]"""
    build_set(argv, locate)


def locate(name: str) -> Path:
    """The local place of what a configuration names: a path, or asset:NAME, which is fetched where it is missing."""
    kind, _, asset = name.partition(":")
    return fetch(asset) if kind == "asset" else Path(name)


def load_scorer(config: ClipScoreConfig | VideoScoreConfig) -> OpenClip:
    """The model that judges how well captions fit their pictures."""
    return OpenClip.of_file(config.model, locate(config.pretrained))


# What the parser of options says of a setting that may be null around what is wrong with it.
NOISE = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - "
    r"|Problem with given class_path '[^']*': | - Expected a <class 'NoneType'>| Given value type: <class '[^']*'>"
    r"| Given value: (?:NestedArg|Namespace|\{).*$"
)


def _said(error: Exception) -> str:
    """What went wrong, in one line."""
    text = one_line(error)
    if isinstance(error, FileNotFoundError) and error.errno is None:  # pyarrow names the file alone
        return f"{text}: no such file"
    text = re.sub(r'Parser key "([^"]*)": ', r"\1: ", NOISE.sub("", text))
    return re.sub(r"Expected a (?:<class '(\w+)'>|typing\.(\w+\[[^]]*\]))\.?", r"wanted: \1\2.", text)


def _after(error: Exception, command: Sequence[str]) -> str:
    """What is to be done where nothing more can be written."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        again = "starts over" if list(command) == ["build"] else AGAIN
        return f"; what stood there before still does: make room, and the same command {again}"
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


def _in_full(word: str) -> str:
    """An option of `rethreshold` that has a short form, in its long one."""
    name, sign, value = word.partition("=")
    return SHORT_FORMS.get(name, name) + sign + value


def _refuse_unmeasured(work: Path, changes: Sequence[str]) -> None:
    """A setting of a step that the run was without would else be missing the step's other settings."""
    measured, _ = read_run(work)
    for name in (word[2:].partition("=")[0].partition(".")[0] for word in changes if _is_setting(word)):
        if getattr(measured, name, "unknown") is None:
            raise UserError(f"{name} was not part of the run; `mm data run` measures what it needs")


def _is_setting(word: str) -> bool:
    return word.startswith("--") and "." in word.partition("=")[0]


def _print_canaries(work: Path, in_force_only: bool = False) -> None:
    """What the threshold of near duplicates, or each of several, does to the canaries of a run, if it has any."""
    _, config = read_run(work)
    if config.near_duplicates is None or not (work / FOLDER).is_dir():
        return
    step = near_duplicates_of(config, locate)
    measured = measure_canaries(work, [step.threshold] if in_force_only else thresholds_beside(step))
    if measured:
        print(f"\n{ABOUT}\n{'canaries joined at a threshold of':44}" + _row(f"{m.threshold:.4g}" for m in measured))
    for name, shares in rows_of(measured):
        print(f"{name:44}" + _row(f"{share:.1%}" for share in shares))


def _row(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>8}" for cell in cells)


COMMANDS = {
    "run": run_config,
    "why": explain,
    "stats": show_stats,
    "rethreshold": decide_anew,
    "write": write_shards,
    "forecast": forecast_run,
    "languages": show_languages,
    "build": build_one,
}
