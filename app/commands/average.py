"""`mm average`: one run folder from the weights of several runs of one model."""

import logging
from collections.abc import Sequence
from pathlib import Path

import mm
from app.commands.answer import add_device_option, add_key_option
from app.commands.convert import refuse_existing_run
from foundation.options import new_parser, read_options
from mm.averaging import average, average_best
from mm.device import device_line, resolve_device
from mm.evaluation.evaluate import evaluate
from shards.reader import ShardSet

logger = logging.getLogger(__name__)


def average_runs(argv: Sequence[str]) -> int:
    """Average all runs, or with --data as many of the best as score best together."""
    parser = new_parser("mm average", "Average the weights of several runs of one model.")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--output", required=True, help="run folder to write")
    parser.add_argument("--data", help="folder of shards; averages only as many of the best runs as score best on it")
    add_key_option(parser)
    parser.add_argument("--split", default="validation", help="of --data")
    parser.add_argument("--metric", default="vqa_accuracy", help="of --data; the higher the better")
    parser.add_argument("--limit", type=int, help="of --data: size of a random subset, the same each time")
    add_device_option(parser)
    options = read_options(parser, argv)
    refuse_existing_run(options.output)
    if options.data is None:
        average(options.runs, options.output)
        return 0
    device = resolve_device(options.device)
    logger.info(device_line(device))
    records = ShardSet(options.data, options.key).select(split=options.split)

    def score(run: Path) -> float:
        report = evaluate(*mm.load(run, device=device), records, [options.metric], limit=options.limit)
        return report.scores[options.metric].value

    print(average_best(options.runs, options.output, score))
    return 0
