"""The `mm` command: each subcommand reads its arguments and calls a documented function of the rooms below.

A user's mistake ends with one line and exit code 1. Where several files are given, the good ones are done first.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace

import app.commands.data
import mm
import mm.convert.mllama
import mm.convert.open_clip
import mm.convert.whisper
import stages.finetune
import stages.pretrain_image_encoder
import stages.pretrain_speech_encoder
import stages.sweep
import stages.train_image_adapter
import stages.train_speech_adapter
import stages.train_video_adapter
from app.commands.answer import MEDIA, WHAT_IS_A_CLIP, Medium, ask, caption, load_model, transcribe
from foundation.errors import UserError, one_line
from mm.averaging import average, average_best
from mm.evaluation.evaluate import evaluate
from mm.run_folder import CONFIG_FILE, save, save_encoder
from mm.speech_encoders import save_speech_encoder
from mm.training.planner import expected_samples, plan
from shards.reader import ShardSet
from stages.train_image_adapter import TrainImageAdapter

DEFAULT_MODEL = "runs/demo"
STAGES = {
    "pretrain_image_encoder": stages.pretrain_image_encoder.main,
    "train_image_adapter": stages.train_image_adapter.main,
    "train_video_adapter": stages.train_video_adapter.main,
    "pretrain_speech_encoder": stages.pretrain_speech_encoder.main,
    "train_speech_adapter": stages.train_speech_adapter.main,
    "finetune": stages.finetune.main,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        sys.exit(_train(arguments[1:]))
    if arguments[:1] == ["data"]:
        sys.exit(app.commands.data.main(arguments[1:]))
    if arguments[:1] == ["sweep"]:
        sys.exit(stages.sweep.main(arguments[1:]))
    sys.exit(_run(arguments))


def evaluate_shards(arguments: Namespace) -> int:
    """Score a model on a folder of shards."""
    if arguments.output and Path(arguments.output).is_file():  # said before the work, not after it
        raise UserError(f"{arguments.output} is a file; name a folder for the scores")
    model, processor = load_model(arguments)
    records = ShardSet(arguments.data).select(split=arguments.split, task=arguments.task)
    report = evaluate(
        model,
        processor,
        records,
        arguments.metrics.split(","),
        blank_images=arguments.blank_images,
        exchange_speech=arguments.exchange_speech,
        frames=arguments.frames,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        limit=arguments.limit,
    )
    print(report)
    if arguments.output:
        report.write(arguments.output)
    return 1 if report.failed else 0


def average_runs(arguments: Namespace) -> int:
    """Average runs of one model: all of them, or with --data as many of the best as score best together."""
    _refuse_existing(arguments.output)
    if arguments.data is None:
        average(arguments.runs, arguments.output)
        return 0
    records = ShardSet(arguments.data).select(split=arguments.split)

    def score(run: Path) -> float:
        report = evaluate(*mm.load(run), records, [arguments.metric], limit=arguments.limit)
        return report.scores[arguments.metric].value

    print(average_best(arguments.runs, arguments.output, score))
    return 0


def plan_training(arguments: Namespace) -> int:
    """Say what a training stage costs before it runs: parameters, operations, memory, layouts that fit the GPUs."""
    names = TrainImageAdapter.__dataclass_fields__
    config = TrainImageAdapter(**{name: arguments[name] for name in names})
    if arguments.preset is None:
        shapes = stages.train_image_adapter.shapes(config)
    else:
        shapes = replace(mm.preset(arguments.preset, config.tile_size or 336), image_adapter=config.adapter)
    samples = expected_samples(shapes, config.data, config.max_tiles, arguments.text_tokens, arguments.tiles)
    costs = plan(shapes, config.training, samples, arguments.gpus, arguments.gpu_memory, arguments.tflops)
    print(costs.to_json() if arguments.json else costs)
    return 0


def convert_open_clip(arguments: Namespace) -> int:
    """Make an encoder folder of an open_clip image tower."""
    _refuse_existing(arguments.output)
    encoder = mm.convert.open_clip.load(arguments.name, arguments.pretrained, tile_size=arguments.tile_size)
    save_encoder(arguments.output, encoder)
    print(encoder.report)
    return 0


def convert_whisper(arguments: Namespace) -> int:
    """Make a speech encoder folder of one of OpenAI's Whisper files."""
    _refuse_existing(arguments.output)
    encoder = mm.convert.whisper.load(arguments.file, arguments.max_seconds)
    save_speech_encoder(arguments.output, encoder)
    print(encoder.report)
    return 0


def convert_from_mllama(arguments: Namespace) -> int:
    """Make a run folder of a Llama 3.2 Vision folder."""
    _refuse_existing(arguments.output)
    model, processor = mm.load(arguments.folder)
    save(arguments.output, model, processor, bundle=True)
    print(getattr(model, "report", "converted"))
    return 0


def convert_to_mllama(arguments: Namespace) -> int:
    """Make a Llama 3.2 Vision folder of a run folder."""
    model, processor = mm.load(arguments.folder)
    mm.convert.mllama.save(model, arguments.output)
    if getattr(model, "mllama_source", None) is None:  # else the folder that it came from gave its own files
        processor.tokenizer.save_pretrained(arguments.output)
    return 0


def _refuse_existing(output: str) -> None:
    if (Path(output) / CONFIG_FILE).exists():
        raise UserError(f"{output} holds a run already; name another folder, or remove it first")


def _train(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(f"usage: mm train STAGE --config FILE [--OPTION VALUE ...]\nstages: {', '.join(STAGES)}")
        return 0
    if arguments[:1] not in [[name] for name in STAGES]:
        print(f"mm train: name a stage: {', '.join(STAGES)}", file=sys.stderr)
        return 1
    STAGES[arguments[0]](arguments[1:])
    return 0


def _run(arguments: list[str]) -> int:
    try:
        if not arguments:
            raise UserError(f"name a command: {', '.join([*COMMANDS, 'train', 'data', 'sweep', 'convert'])}")
        parser = _parser()
        chosen = parser.instantiate(parser.parse_args(arguments))
        command = chosen[chosen.subcommand]
        if chosen.subcommand == "convert":
            return CONVERSIONS[command.subcommand](command[command.subcommand])
        return COMMANDS[chosen.subcommand](command)
    except (ValueError, OSError, ArgumentError) as error:
        print(f"mm: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _model_options(parser: ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a run folder, or a Llama 3.2 Vision folder")
    parser.add_argument("--language-model", help="where the run's language model lies now, if it moved")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="longest answer, in tokens")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="mm", description="Eyes and ears for a frozen language model.", exit_on_error=False)
    commands = parser.add_subcommands(required=True)

    one = ArgumentParser(description=caption.__doc__, exit_on_error=False)
    one.add_argument("files", nargs="+", help="pictures and clips; " + WHAT_IS_A_CLIP)
    _model_options(one, max_new_tokens=64)
    commands.add_subcommand("caption", one)

    one = ArgumentParser(description=ask.__doc__, exit_on_error=False)
    one.add_argument("question")
    for kind, what in MEDIA.items():
        one.add_argument(
            f"--{kind}",
            dest="media",
            action="extend",
            nargs="+",
            type=Medium(kind),
            metavar="FILE",
            help=f"{what}; the model gets pictures, clips and sounds in the order given here, then the question",
        )
    one.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    one.add_argument("--top-p", type=float, default=1.0)
    one.add_argument("--seed", type=int, default=0)
    _model_options(one, max_new_tokens=128)
    commands.add_subcommand("ask", one)

    one = ArgumentParser(description=transcribe.__doc__, exit_on_error=False)
    one.add_argument("files", nargs="+", help="sound files, or videos with sound")
    one.add_argument("--language", default="English", help="the language that is written, by its English name")
    _model_options(one, max_new_tokens=256)
    commands.add_subcommand("transcribe", one)

    one = ArgumentParser(description=evaluate_shards.__doc__, exit_on_error=False)
    one.add_argument("--data", required=True, help="a folder of shards")
    one.add_argument("--split", default="test")
    one.add_argument("--task", help="only records of this task")
    one.add_argument(
        "--metrics", default="vqa_accuracy", help="vqa_accuracy, exact_match, choice, bleu, chrf, wer, cer: a,b,c"
    )
    one.add_argument("--blank-images", action="store_true", help="the blind control: every image turned grey")
    one.add_argument("--exchange-speech", action="store_true", help="the deaf control: another record's sound")
    one.add_argument(
        "--frames", default="all", help="of clips: all, one (the middle), or shuffled under the true times"
    )
    one.add_argument("--batch-size", type=int, default=64)
    one.add_argument("--limit", type=int, help="a random subset of this size, always the same")
    one.add_argument("--output", help="folder for scores.json and predictions.jsonl")
    _model_options(one, max_new_tokens=32)
    commands.add_subcommand("evaluate", one)

    one = ArgumentParser(description=average_runs.__doc__, exit_on_error=False)
    one.add_argument("runs", nargs="+", help="run folders")
    one.add_argument("--output", required=True, help="run folder to write")
    one.add_argument("--data", help="a folder of shards to choose the number of runs by")
    one.add_argument("--split", default="validation")
    one.add_argument("--metric", default="vqa_accuracy", help="vqa_accuracy, exact_match, choice, bleu or chrf")
    one.add_argument("--limit", type=int, help="a random subset of this size, always the same")
    commands.add_subcommand("average", one)

    one = ArgumentParser(description=plan_training.__doc__, exit_on_error=False)
    one.add_argument("--config", action="config", help="the file of train_image_adapter or finetune; options override")
    one.add_class_arguments(TrainImageAdapter, skip={"tile_size"})
    one.add_argument("--tile-size", type=int | None, help="another tile resolution, in pixels")
    one.add_argument("--preset", help="8b, 70b or 405b: shapes of the paper, in place of those of the file's folders")
    one.add_argument("--gpus", type=int, default=1)
    one.add_argument("--gpu-memory", type=float, help="GB of each; then layouts that fit are looked for")
    one.add_argument("--tflops", type=float, help="of a GPU's matrix products; then speeds are estimated")
    one.add_argument("--text-tokens", type=int, default=64, help="per sample")
    one.add_argument("--tiles", type=int, help="per picture; else what the data's index tells, or 4")
    one.add_argument("--json", action="store_true")
    commands.add_subcommand("plan", one)

    train = ArgumentParser(description=f"Run a training stage: {', '.join(STAGES)}.", exit_on_error=False)
    commands.add_subcommand("train", train)
    data = ArgumentParser(
        description=f"Curate raw pairs: {', '.join(app.commands.data.COMMANDS)}.", exit_on_error=False
    )
    commands.add_subcommand("data", data)
    sweep = ArgumentParser(description="Finetune many times and average the best runs.", exit_on_error=False)
    commands.add_subcommand("sweep", sweep)
    convert = ArgumentParser(description="Other people's weights, in and out.", exit_on_error=False)
    commands.add_subcommand("convert", convert)  # before its own subcommands, as jsonargparse wants it
    _add_conversions(convert)
    return parser


def _add_conversions(parser: ArgumentParser) -> None:
    kinds = parser.add_subcommands(required=True)

    one = ArgumentParser(description=convert_open_clip.__doc__, exit_on_error=False)
    one.add_argument("name", help="open_clip's name of the model, such as ViT-H-14-quickgelu")
    one.add_argument("pretrained", help="open_clip's tag of the weights, such as metaclip_fullcc, or a file")
    one.add_argument("output", help="folder to write")
    one.add_argument("--tile-size", type=int, help="another resolution than the tower's, in pixels")
    kinds.add_subcommand("open-clip", one)

    one = ArgumentParser(description=convert_whisper.__doc__, exit_on_error=False)
    one.add_argument("file", help="such as tiny.en.pt")
    one.add_argument("output", help="folder to write")
    one.add_argument("--max-seconds", type=float, default=30.0, help="a shorter window than Whisper's: costs less")
    kinds.add_subcommand("whisper", one)

    for name, command in (("from-mllama", convert_from_mllama), ("to-mllama", convert_to_mllama)):
        one = ArgumentParser(description=command.__doc__, exit_on_error=False)
        one.add_argument("folder", help="what to convert")
        one.add_argument("output", help="folder to write")
        kinds.add_subcommand(name, one)


COMMANDS = {
    "caption": caption,
    "ask": ask,
    "transcribe": transcribe,
    "evaluate": evaluate_shards,
    "average": average_runs,
    "plan": plan_training,
}
CONVERSIONS = {
    "open-clip": convert_open_clip,
    "whisper": convert_whisper,
    "from-mllama": convert_from_mllama,
    "to-mllama": convert_to_mllama,
}

if __name__ == "__main__":
    main()
