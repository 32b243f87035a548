"""`mm data build NAME`: the sets of annealing, drawn, rendered, asked, captioned anew, or mixed of others."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

import mm
from data_prep.synthetic.building import LEFT_OUT, Builder, build
from data_prep.synthetic.charts import Charts
from data_prep.synthetic.dialogues import Dialogues
from data_prep.synthetic.documents import Documents
from data_prep.synthetic.equations import Equations
from data_prep.synthetic.flowcharts import Flowcharts
from data_prep.synthetic.grounding import Grounding
from data_prep.synthetic.mix import Mix
from data_prep.synthetic.questions import Questions
from data_prep.synthetic.recaptions import Recaptions
from data_prep.synthetic.screenshots import Screenshots
from data_prep.synthetic.tables import Tables
from foundation.errors import UserError
from vision.reading import read_picture

BUILDERS: dict[str, type[Builder]] = {
    "charts": Charts,
    "dialogues": Dialogues,
    "documents": Documents,
    "equations": Equations,
    "flowcharts": Flowcharts,
    "grounding": Grounding,
    "mix": Mix,
    "questions": Questions,
    "recaptions": Recaptions,
    "screenshots": Screenshots,
    "tables": Tables,
}


def build_set(argv: list[str], locate: Callable[[str], Path]) -> None:
    """Builds the set that the first argument names, from `--config FILE` and options.

    Raises:
        UserError: no such set; what its settings or its sources lack.
    """
    if argv[:1] not in [[name] for name in BUILDERS]:
        raise UserError(f"name a set to build: {', '.join(BUILDERS)}")
    builder = read_builder(argv[0], argv[1:])
    built = build(builder, locate)
    print(f"{built.records:,} records in {built.folder}")
    if built.left_out:
        print(f"{len(built.left_out):,} left out: {built.folder / LEFT_OUT} says what and why")
    if isinstance(builder, Mix):
        for row in builder.report():
            print(f"{row['records']:9,}  {row['achieved']:8.4f} of {row['weight']:.4f} wanted  {row['path']}")


def read_builder(name: str, argv: list[str]) -> Builder:
    """A builder with the settings of `--config FILE` and of the options that follow."""
    builder_class = BUILDERS[name]
    parser = ArgumentParser(prog=f"mm data build {name}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file; options that follow override it")
    asked = ASKED.get(builder_class)  # builders that ask a model, and how
    parser.add_class_arguments(builder_class, skip={asked.__name__, "max_new_tokens"} if asked else None)
    if asked:
        parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
        parser.add_argument("--max-new-tokens", type=int, default=64, help="longest text of the model, in tokens")
    values = vars(parser.instantiate(parser.parse_args(argv)))
    values.pop("config")
    if asked:
        values[asked.__name__] = partial(asked, values["model"], values.pop("device"), values["max_new_tokens"])
    return builder_class(**values)


def describe(model: str, device: str, max_new_tokens: int, picture: bytes) -> str:
    """A picture's caption by one of our models, likeliest token by token."""
    loaded, processor = _loaded(model, device)
    sample = processor.caption_prompt_for(read_picture(picture))
    return processor.decode(mm.generate_tokens(loaded, [sample], max_new_tokens)[0])


def reply(model: str, device: str, max_new_tokens: int, said: str) -> str:
    """What one of our models answers to a text, likeliest token by token."""
    loaded, processor = _loaded(model, device)
    return mm.generate(loaded, processor, [{"role": "user", "content": said}], max_new_tokens)


ASKED: dict[type[Builder], Callable[..., str]] = {Recaptions: describe, Dialogues: reply}


@lru_cache(maxsize=1)
def _loaded(model: str, device: str) -> tuple[mm.MultimodalModel, mm.Processor]:
    torch.set_num_threads(1)  # sums in another order may tip a token: the same captions with any number of workers
    return mm.load(model, device=device)
