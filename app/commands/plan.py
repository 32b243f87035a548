"""`mm plan`: what a training run costs, before it runs."""

from collections.abc import Sequence
from dataclasses import fields, replace

import mm
from foundation.errors import UserError
from foundation.options import new_parser, read_options
from mm.training.expected_samples import expected_samples
from mm.training.planner import plan
from stages.train_image_adapter import TrainImageAdapter, read_model_config


def plan_training(argv: Sequence[str]) -> int:
    """Print parameters, operations, memory, and the layouts that fit the GPUs, of an image stage."""
    parser = new_parser("mm plan", "Estimate memory, operations and layouts of a training run.", config=True)
    parser.add_class_arguments(TrainImageAdapter, skip={"tile_size"})
    parser.add_argument("--tile-size", type=int | None, help="tile size in pixels, if not the encoder's")
    parser.add_argument("--preset", help="8b, 70b or 405b: the paper's shapes in place of those of the named folders")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--gpu-memory", type=float, help="GB of each GPU; lists the layouts that fit")
    parser.add_argument("--tflops", type=float, help="TFLOP/s of a GPU's matrix products; estimates speeds")
    parser.add_argument("--text-tokens", type=int, default=64, help="text tokens per sample")
    parser.add_argument("--tiles", type=int, help="tiles per image; default: as the data's index says, or 4")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = read_options(parser, argv)
    config = TrainImageAdapter(**{field.name: options[field.name] for field in fields(TrainImageAdapter)})
    if not config.next_token_weight:
        raise UserError("`mm plan` is for stages that run the language model: set next_token_weight above 0")
    if options.preset is None:
        model = read_model_config(config)
    else:
        model = replace(mm.preset(options.preset, config.tile_size or 336), image_adapter=config.adapter)
    samples = expected_samples(model, config.data, config.max_tiles, options.text_tokens, options.tiles)
    costs = plan(model, config.training, samples, options.gpus, options.gpu_memory, options.tflops)
    print(costs.to_json() if options.json else costs)
    return 0
