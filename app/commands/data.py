"""`mm data`, all but `build`: raw image-text pairs to training shards, and questions about what was decided.

`data_prep` downloads nothing and knows no CLIP model: this module passes it `app.assets.locate` and `load_scorer`.
"""

import argparse
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from app.assets import locate
from app.clip_scorer import OpenClip
from data_prep.pipeline import curation, ledger
from data_prep.pipeline.canaries import EXPLANATION, FOLDER, measure_canaries, reported_thresholds, result_rows
from data_prep.pipeline.forecast import SHARES, solve_threshold
from data_prep.pipeline.forecast import forecast as forecasts_of
from data_prep.report.language_confusion import confusions
from data_prep.report.report import write_report
from data_prep.steps.clip_score import ClipScoreConfig
from data_prep.steps.video_score import VideoScoreConfig
from foundation.errors import UserError
from foundation.logs import OPTIONS_HELP
from foundation.options import new_parser, read_options

DEFAULT_WORK = "runs/data/sample"
WORK_HELP = "work folder of a finished run: `output` in its configuration"
SHORT_FORMS = {
    "--clip-score": "clip_score.threshold",
    "--duplicates": "near_duplicates.threshold",
    "--motion": "motion.threshold",
    "--overlay-text": "overlay_text.max_share",
    "--video-score": "video_score.threshold",
}
logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> None:
    """`mm data run`: curate a raw pool of image-text pairs into shards."""
    if not argv:
        raise UserError("usage: mm data run --config FILE [--KEY VALUE ...]")
    config = curation.parse_config(argv, "mm data run")
    logger.info("device: cpu")  # all steps measure on the CPU, so that scores do not depend on the machine
    count = curation.run(config, locate, load_scorer)
    write_report(Path(config.output), locate)
    _print_stats(Path(config.output))
    print(f"{count} pairs in {Path(config.output) / 'shards'}")


def why(argv: Sequence[str]) -> None:
    """`mm data why`: show what was decided about one pair, and why."""
    parser = _work_parser("mm data why", "Show what was decided about one pair, and why.")
    parser.add_argument("pair", help="an id, the beginning of one, or a source's own key or path")
    options = read_options(parser, argv)
    print(ledger.why(_finished_work(options), options.pair))


def stats(argv: Sequence[str]) -> None:
    """`mm data stats`: count the decisions by step and reason, and the canaries that were found."""
    parser = _work_parser("mm data stats", "Count the decisions by step and reason, and the canaries that were found.")
    work = _finished_work(read_options(parser, argv))
    _print_stats(work)
    _print_canaries(work, in_force_only=True)


def rethreshold(argv: Sequence[str]) -> None:
    """`mm data rethreshold`: decide with other thresholds, from the measurements that are stored."""
    parser = argparse.ArgumentParser(
        prog="mm data rethreshold",
        usage="mm data rethreshold [--work FOLDER] [--STEP.KEY VALUE ...]",
        description="Decide with other thresholds, from the measurements that are stored.",
        epilog=OPTIONS_HELP,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--work", default=DEFAULT_WORK, metavar="FOLDER", help=WORK_HELP)
    for option, key in SHORT_FORMS.items():
        parser.add_argument(option, dest=key, metavar="VALUE", help=f"short for --{key}")
    options, changes = parser.parse_known_args(argv)
    for key in SHORT_FORMS.values():
        if getattr(options, key) is not None:
            changes += [f"--{key}", getattr(options, key)]
    work = Path(options.work)
    _refuse_unmeasured(work, changes)
    curation.rethreshold(work, curation.read_config(work / curation.DECIDED, changes), locate)
    write_report(work, locate)
    _print_stats(work)
    print(f"`mm data write --work {work}` writes the shards")


def write(argv: Sequence[str]) -> None:
    """`mm data write`: write the shards of the latest decisions."""
    work = _finished_work(
        read_options(_work_parser("mm data write", "Write the shards of the latest decisions."), argv)
    )
    count = curation.write_kept(work, locate)
    write_report(work, locate)
    print(f"{count} pairs in {work / 'shards'}")


def forecast(argv: Sequence[str]) -> None:
    """`mm data forecast`: count the pairs that other thresholds would keep."""
    parser = _work_parser("mm data forecast", "Count the pairs that other thresholds would keep.")
    parser.add_argument(
        "--pairs", type=int, help="print the resampling threshold that keeps this number of pairs of the whole pool"
    )
    parser.add_argument("--times", type=float, default=1.0, help="size of the whole pool, as a multiple of this one's")
    options = read_options(parser, argv)
    work = _finished_work(options)
    steps = curation.deciding_steps_of(work, curation.read_run(work)[1], locate)
    if options.pairs is not None:
        threshold = solve_threshold(work / "set", steps, options.pairs, options.times)
        print(f"resampling.threshold: {float(threshold)} keeps {options.pairs:,} pairs")
        return
    shares = "".join(f"{share:>9.0%}" for share in SHARES)
    print(f"{'threshold':44}{'in force':>10}{'pairs':>10}{'kept':>10}  keeping{shares}")
    for row in forecasts_of(work / "set", steps):
        thresholds = "".join(f"{value:9.3g}" for _, value in row.keeping)
        print(f"{row.option:44}{row.threshold:10.4g}{row.pairs:10,}{row.kept:10,}         {thresholds}")
    _print_canaries(work)


def languages(argv: Sequence[str]) -> None:
    """`mm data languages`: measure how well the captions' language is recognised, on labelled held-out lines."""
    parser = _work_parser(
        "mm data languages", "Measure how well the captions' language is recognised, on labelled held-out lines."
    )
    work = _finished_work(read_options(parser, argv))
    _, config = curation.read_run(work)
    rules = config.caption_rules
    found = confusions(work / "set", rules, config.sources) if rules is not None else []
    if rules is None or not found:
        raise UserError(f"{work}: has no captions whose language is known; those of asset:tuxpaint-stamps are")
    for group in found:
        print(f"{group.length}, score at least {group.threshold:.4g}{'kept':>12}{'dropped':>10}")
        print(f"{'in ' + ', '.join(rules.languages):42}{group.wanted_kept:10,}{group.wanted_dropped:10,}")
        print(f"{'in other languages':42}{group.others_kept:10,}{group.others_dropped:10,}")
        worst = ", ".join(f"{name} {kept} of {lines}" for name, lines, kept in group.languages[:10] if kept)
        print(f"most kept of: {worst or 'none'}")
        choices = ", ".join(f"{score:.3g} keeps {share:.0%}" for share, score in group.choices)
        print(f"of the lines in wanted languages of the other half: {choices}\n")


def load_scorer(config: ClipScoreConfig | VideoScoreConfig) -> OpenClip:
    """The open_clip model that scores how well captions match their images."""
    return OpenClip.of_file(config.model, locate(config.pretrained))


def _work_parser(prog: str, description: str) -> ArgumentParser:
    parser = new_parser(prog, description)
    parser.add_argument("--work", default=DEFAULT_WORK, metavar="FOLDER", help=WORK_HELP)
    return parser


def _finished_work(options: Namespace) -> Path:
    curation.read_run(Path(options.work))  # raises UserError if the run has not finished
    return Path(options.work)


def _print_stats(work: Path) -> None:
    for step, decision, reason, count in ledger.stats(work):
        print(f"{count:9,}  {step:16} {decision:10} {reason}")


def _refuse_unmeasured(work: Path, changes: Sequence[str]) -> None:
    """Without this check, a key of a step that did not run would fail with the step's other keys as missing."""
    measured, _ = curation.read_run(work)
    options = [word.partition("=")[0] for word in changes if word.startswith("--")]
    for step in [option[2:].partition(".")[0] for option in options if "." in option]:
        if getattr(measured, step, "unknown") is None:
            raise UserError(f"{step} was not part of the run; `mm data run` measures what it needs")


def _print_canaries(work: Path, in_force_only: bool = False) -> None:
    """The shares of canaries found at the threshold in force, or at several, if the run has canaries."""
    _, config = curation.read_run(work)
    if config.near_duplicates is None or not (work / FOLDER).is_dir():
        return
    step = curation.near_duplicates_step(config, locate)
    measured = measure_canaries(work, [step.threshold] if in_force_only else reported_thresholds(step))
    if measured:
        print(
            f"\n{EXPLANATION}\n{'canaries joined at a threshold of':44}" + _row(f"{m.threshold:.4g}" for m in measured)
        )
    for name, shares in result_rows(measured):
        print(f"{name:44}" + _row(f"{share:.1%}" for share in shares))


def _row(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>8}" for cell in cells)
