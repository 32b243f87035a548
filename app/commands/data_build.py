"""`mm data build NAME`: sets for annealing, drawn, rendered, answered or captioned by a model, or mixed of others."""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch

import mm
from app.assets import locate
from app.commands.answer import add_device_option, add_length_option
from data_prep.synthetic.building import LEFT_OUT, Builder
from data_prep.synthetic.building import build as build_set
from data_prep.synthetic.charts import Charts
from data_prep.synthetic.dialogues import Dialogues
from data_prep.synthetic.documents import Documents
from data_prep.synthetic.equations import Equations
from data_prep.synthetic.flowcharts import Flowcharts
from data_prep.synthetic.grounding import Grounding
from data_prep.synthetic.mix import Mix
from data_prep.synthetic.preferences import Preferences
from data_prep.synthetic.questions import Questions
from data_prep.synthetic.recaptions import Recaptions
from data_prep.synthetic.screenshots import Screenshots
from data_prep.synthetic.tables import Tables
from foundation.options import new_parser, read_options
from mm.device import device_line, resolve_device
from vision.reading import read_picture

BUILDERS: dict[str, type[Builder]] = {
    "charts": Charts,
    "dialogues": Dialogues,
    "documents": Documents,
    "equations": Equations,
    "flowcharts": Flowcharts,
    "grounding": Grounding,
    "mix": Mix,
    "preferences": Preferences,
    "questions": Questions,
    "recaptions": Recaptions,
    "screenshots": Screenshots,
    "tables": Tables,
}
logger = logging.getLogger(__name__)


def build(argv: Sequence[str]) -> None:
    """Build the set that the first argument names, from `--config FILE` and the options that follow.

    Raises:
        UserError: wrong settings, or sources that are missing or empty.
    """
    builder = read_builder(argv[0], argv[1:])
    built = build_set(builder, locate)
    print(f"{built.num_records:,} records in {built.folder}")
    if built.left_out:
        print(f"{len(built.left_out):,} left out: {built.folder / LEFT_OUT} lists them with reasons")
    if isinstance(builder, Mix):
        for row in builder.report():
            print(f"{row['records']:9,}  {row['achieved']:8.4f} of {row['weight']:.4f} wanted  {row['path']}")


def read_builder(name: str, argv: Sequence[str]) -> Builder:
    """The builder of a set, with the settings of `--config FILE` and of the options that follow.

    Args:
        name: of BUILDERS.
    """
    builder_class = BUILDERS[name]
    parser = new_parser(f"mm data build {name}", f"Build the set `{name}`.", config=True)
    model_call = MODEL_CALLS.get(builder_class)
    # A builder that calls a model has a field of the function's name, in place of which options name the model.
    parser.add_class_arguments(builder_class, skip={model_call.__name__, "max_new_tokens"} if model_call else None)
    if model_call:
        add_device_option(parser)
        add_length_option(parser, max_new_tokens=64)
    values = vars(read_options(parser, argv))
    values.pop("config")
    if model_call:
        device = resolve_device(values.pop("device"))
        logger.info(device_line(device))
        values[model_call.__name__] = partial(model_call, values["model"], str(device), values["max_new_tokens"])
    return builder_class(**values)


def describe(model: str, device: str, max_new_tokens: int, picture: bytes) -> str:
    """A picture's caption by a model, by greedy decoding.

    Args:
        model: a run folder. picture: the content of an image file.
    """
    loaded, processor = _loaded(model, device)
    sample = processor.caption_prompt_for(read_picture(picture))
    return processor.decode(mm.generate_tokens(loaded, [sample], max_new_tokens)[0])


def reply(model: str, device: str, max_new_tokens: int, text: str) -> str:
    """A model's answer to a text, by greedy decoding.

    Args:
        model: a run folder.
    """
    loaded, processor = _loaded(model, device)
    return mm.generate(loaded, processor, [{"role": "user", "content": text}], max_new_tokens)


MODEL_CALLS: dict[type[Builder], Callable[..., str]] = {Recaptions: describe, Dialogues: reply}


@lru_cache(maxsize=1)
def _loaded(model: str, device: str) -> tuple[mm.MultimodalModel, mm.Processor]:
    torch.set_num_threads(1)  # the order of sums depends on threads: captions stay equal for any number of workers
    return mm.load(model, device=device)
