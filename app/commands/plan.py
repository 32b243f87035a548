"""`mm plan`: what a training run costs, before it runs."""

import importlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import mm
from app.cli import STAGES
from foundation.errors import UserError
from foundation.options import new_parser, read_options
from mm.training.config import TrainingConfig
from mm.training.devices import device_named
from mm.training.dry_run import dry_run, report
from mm.training.expected_samples import SampleSizes, expected_samples
from mm.training.layouts import SLOW_LINKS
from mm.training.planner import HOST_LINK, STORAGE, plan
from mm.training.traffic import Links

DEFAULT_STAGE = "train_image_adapter"


def plan_training(argv: Sequence[str]) -> int:
    """Print parameters, operations, memory, and the layouts that fit the GPUs, of a stage's run."""
    named = bool(argv) and argv[0] in STAGES
    stage, rest = (argv[0], argv[1:]) if named else (DEFAULT_STAGE, argv)
    module = importlib.import_module(STAGES[stage].target.partition(":")[0])
    config_class = _config_class(module)
    description = f"Estimate memory, operations and layouts of a run of a stage ({', '.join(STAGES)}); here of {stage}."
    parser = new_parser("mm plan", description, config=True)
    has_tile_size = any(field.name == "tile_size" for field in fields(config_class))
    parser.add_class_arguments(config_class, skip={"tile_size"} if has_tile_size else None)
    if has_tile_size:
        parser.add_argument("--tile-size", type=int | None, help="tile size in pixels, if not the encoder's")
    parser.add_argument("--preset", help="8b, 70b or 405b: the paper's shapes in place of those of the named folders")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--gpu", help="a GPU by name, such as h100, for its memory, specified rate and links")
    parser.add_argument("--gpu-memory", type=float, help="GB of each GPU; lists the layouts that fit")
    parser.add_argument("--tflops", type=float, help="TFLOP/s of a GPU's matrix products; estimates speeds")
    parser.add_argument("--storage", type=float, default=STORAGE, help="GB/s that all ranks together write")
    parser.add_argument("--link", type=float, help="GB/s from a GPU to another of its node; default: of --gpu, or 32")
    parser.add_argument("--network", type=float, default=Links.network, help="GB/s from each GPU to other nodes")
    parser.add_argument("--text-tokens", type=int, default=64, help="text tokens per sample")
    parser.add_argument("--tiles", type=int, help="tiles per image or frame; default: as the data's index says, or 4")
    parser.add_argument("--frames", type=int, help="frames per clip; default: the stage's max_frames")
    parser.add_argument("--seconds", type=float, help="seconds of an utterance; default: as the index says, or 20")
    help_text = "start a rank of each end of the pipeline, take a step with fake tensors, print what it holds and sends"
    parser.add_argument("--dry-run", action="store_true", help=help_text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = read_options(parser, rest)
    config = config_class(**{field.name: options[field.name] for field in fields(config_class)})
    model = None
    if options.preset is not None:
        tile_size = getattr(config, "tile_size", None) or 336
        speech = "speech" in stage and getattr(config, "encoder", None) is None
        model = mm.preset(options.preset, tile_size, speech=speech)
    planned = module.planned(config, model)
    sizes = SampleSizes(options.text_tokens, options.tiles, options.frames, options.seconds)
    samples = expected_samples(planned, config.data, sizes)
    training: TrainingConfig = config.training
    if options.dry_run:
        ranks = [0] if training.pp == 1 else [0, options.gpus - 1]  # without a pipeline none holds more than the first
        print(report([dry_run(planned.shape, training, samples.largest, options.gpus, rank) for rank in ranks]))
        return 0
    for name in ("link", "network", "storage"):
        if options[name] is not None and not options[name] > 0:
            raise UserError(f"{name} is {options[name]:g}; it must be above 0")
    gigabytes, teraflops, host_link = options.gpu_memory, options.tflops, HOST_LINK
    links = replace(SLOW_LINKS, network=options.network)
    if options.gpu is not None:
        device = device_named(options.gpu)
        gigabytes = device.gigabytes if gigabytes is None else gigabytes
        teraflops = device.rate(training.precision) / 1e12 if teraflops is None else teraflops
        host_link, links = device.host_link, replace(links, node=device.link)
    if options.link is not None:
        links = replace(links, node=options.link)
    costs = plan(
        planned.shape, training, samples, options.gpus, gigabytes, teraflops, host_link, links, options.storage
    )
    print(costs.to_json() if options.json else costs)
    return 0


def _config_class(module: Any) -> Any:
    """The dataclass of a stage's settings: the one in its module that has `training`."""
    return next(
        value
        for value in vars(module).values()
        if is_dataclass(value)
        and getattr(value, "__module__", None) == module.__name__
        and any(field.name == "training" for field in fields(value))
    )
