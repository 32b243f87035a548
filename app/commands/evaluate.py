"""`mm evaluate`: a model's scores on a folder of shards."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from app.commands.answer import add_key_option, add_length_option, add_model_options, load_model
from app.commands.ranks import add_pipeline_options, micro_batches, on_ranks
from foundation.errors import UserError
from foundation.options import new_parser, read_options
from mm.evaluation.evaluate import METRICS, evaluate
from mm.parallel.pipelined_inference import InferenceStage, generate_in_pipeline
from mm.parallel.process_group import Ranks
from shards.reader import ShardSet


def evaluate_shards(argv: Sequence[str]) -> int:
    """Print a model's scores on a folder of shards, and write them where --output says.

    Returns:
        1 if some records could not be read.

    Raises:
        UserError: the output is a file; no such records; what `mm.evaluation.evaluate.evaluate` refuses.
    """
    parser = new_parser("mm evaluate", "Score a model on a folder of shards.")
    parser.add_argument("--data", required=True, help="a folder of shards")
    add_key_option(parser)
    parser.add_argument("--split", default="test", help="only records of this split")
    parser.add_argument("--task", help="only records of this task")
    parser.add_argument("--metrics", default="vqa_accuracy", help=f"separated by commas: {', '.join(METRICS)}")
    parser.add_argument("--blank-images", action="store_true", help="blind baseline: every image is grey")
    parser.add_argument("--replace-images", action="store_true", help="baseline: images of another record")
    parser.add_argument("--replace-speech", action="store_true", help="deaf baseline: audio of another record")
    parser.add_argument(
        "--frames", default="all", help="of clips: all, one (the middle frame), or shuffled (the times stay)"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, help="size of a random subset, the same each time")
    parser.add_argument("--output", help="folder for scores.json and predictions.jsonl")
    add_model_options(parser)
    add_pipeline_options(parser)
    add_length_option(parser, max_new_tokens=32)
    options = read_options(parser, argv)
    if options.output and Path(options.output).is_file():  # checked before the scores are computed
        raise UserError(f"{options.output} is a file; name a folder for the scores")
    num_micro_batches = micro_batches(options)
    with on_ranks(options) as share:
        model, processor = load_model(options, share)
        generate = None
        if isinstance(model, InferenceStage):
            pipeline = {"num_micro_batches": num_micro_batches, "max_rows": options.batch_size}
            generate = partial(generate_in_pipeline, model, **pipeline)
        report = evaluate(
            model,
            processor,
            ShardSet(options.data, options.key).select(split=options.split, task=options.task),
            options.metrics.split(","),
            blank_images=options.blank_images,
            replace_speech=options.replace_speech,
            replace_images=options.replace_images,
            frames=options.frames,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            limit=options.limit,
            generate=generate,
        )
        print(report)
        if options.output and Ranks.current().is_main:
            report.write(options.output)
    return 1 if report.failed else 0
