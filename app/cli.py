"""The `mm` command: the table of all commands and subcommands, and how one of them is found, run and ended.

`mm --help`, `mm --version` and shell completion are answered from the table. Only the module of the command that runs
is imported, so that none of the three waits for torch.
"""

import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from foundation.errors import UserError, exit_on_user_error
from foundation.logs import LOGGING_OPTIONS, OPTIONS_HELP, configure_logging_from

logger = logging.getLogger(__name__)


class Command(NamedTuple):
    """A line of the table.

    Attributes:
        help: one line of help.
        target: the function that runs it, as "module:function". It takes the arguments after the command's name. Of a
            command without a target, the subcommand's target runs. Of a command with both, the target runs and gets
            the subcommand's name as its first argument.
        subcommands: the names that may follow, for help and completion.
        again: what the same command does when it is started again after an interruption or on a full disk.
    """

    help: str
    target: str = ""
    subcommands: "Mapping[str, Command]" = MappingProxyType({})
    again: str = "starts over"


CONTINUES = "goes on where it was"

STAGES = {
    "pretrain_image_encoder": Command(
        "Train an image encoder on image-text pairs by a contrastive loss.", "stages.pretrain_image_encoder:main"
    ),
    "train_image_adapter": Command(
        "Train an image encoder and cross-attention blocks for a frozen language model.",
        "stages.train_image_adapter:main",
    ),
    "train_video_adapter": Command(
        "Train the temporal aggregator and video cross-attention blocks.", "stages.train_video_adapter:main"
    ),
    "pretrain_speech_encoder": Command(
        "Train a speech encoder on unlabelled audio by BEST-RQ.", "stages.pretrain_speech_encoder:main"
    ),
    "train_speech_adapter": Command(
        "Train a speech encoder and a speech adapter for a frozen language model.", "stages.train_speech_adapter:main"
    ),
    "finetune": Command(
        "Train a run's adapters further on conversations (SFT, quality tuning).", "stages.finetune:main"
    ),
    "train_dpo": Command("Train a run's adapters on preferences (DPO).", "stages.train_dpo:main"),
}

BUILT_SETS = {
    "charts": Command("Draw charts, answered with a Markdown table of their values."),
    "dialogues": Command("Answer spoken questions with a language model's replies to their text."),
    "documents": Command("Render pages of PDF, HTML and text files, answered with their text."),
    "equations": Command("Draw equations, answered in LaTeX."),
    "flowcharts": Command("Draw flowcharts, answered in Mermaid."),
    "grounding": Command("Ask where objects are, by numbered marks or by coordinates."),
    "mix": Command("Mix several sets by weight."),
    "preferences": Command("Turn a table of preferences, in a Hugging Face form, into shards."),
    "questions": Command("Turn a table of images, questions and answers into conversations."),
    "recaptions": Command("Caption the images of a set anew with a model."),
    "screenshots": Command("Take screenshots with a boxed element, answered with its HTML."),
    "tables": Command("Draw tables, answered in Markdown or LaTeX."),
}

DATA = {
    "run": Command("Curate a raw pool of image-text pairs into shards.", "app.commands.data:run", again=CONTINUES),
    "why": Command("Show what was decided about one pair, and why.", "app.commands.data:why"),
    "stats": Command("Count the decisions by step and reason.", "app.commands.data:stats"),
    "rethreshold": Command(
        "Decide with other thresholds, without measuring again.", "app.commands.data:rethreshold", again=CONTINUES
    ),
    "write": Command("Write the shards of the latest decisions.", "app.commands.data:write", again=CONTINUES),
    "forecast": Command("Count the pairs that other thresholds would keep.", "app.commands.data:forecast"),
    "languages": Command("Measure how well the captions' language is recognised.", "app.commands.data:languages"),
    "build": Command("Build or mix a set for annealing.", "app.commands.data_build:build", BUILT_SETS),
}

CONVERT = {
    "open-clip": Command("Convert an open_clip image tower into an encoder folder.", "app.commands.convert:open_clip"),
    "whisper": Command("Convert a Whisper file into a speech encoder folder.", "app.commands.convert:whisper"),
    "from-mllama": Command("Convert a Llama 3.2 Vision folder into a run folder.", "app.commands.convert:from_mllama"),
    "to-mllama": Command("Convert a run folder into a Llama 3.2 Vision folder.", "app.commands.convert:to_mllama"),
}

SHELLS = {name: Command(f"Print the script for {name}.") for name in ("bash", "zsh", "fish")}

COMMANDS = {
    "caption": Command("Caption images and video clips.", "app.commands.answer:caption"),
    "ask": Command("Ask a question about images, video clips and audio.", "app.commands.answer:ask"),
    "transcribe": Command("Transcribe the speech in audio or video files.", "app.commands.answer:transcribe"),
    "serve": Command("Serve a model by OpenAI's API.", "app.commands.serve:serve"),
    "evaluate": Command("Score a model on a folder of shards.", "app.commands.evaluate:evaluate_shards"),
    "average": Command("Average the weights of several runs of one model.", "app.commands.average:average_runs"),
    "plan": Command("Estimate memory, operations and layouts of a training run.", "app.commands.plan:plan_training"),
    "train": Command("Run a training stage.", subcommands=STAGES),
    "sweep": Command("Finetune with many settings and average the best runs.", "stages.sweep:main"),
    "data": Command("Curate data and build training sets.", subcommands=DATA),
    "convert": Command("Convert other projects' weights, in and out.", subcommands=CONVERT),
    "completion": Command("Print a shell completion script.", "app.commands.completion:completion", SHELLS),
}

ROOT = Command("Gives a frozen language model eyes and ears.", subcommands=COMMANDS)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `mm`.

    Raises:
        SystemExit: always; 0, 1 for a user's mistake or a file that failed, 130 for Ctrl-C.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    words, debug = configure_logging_from(given)
    path, command = find(words)
    name, rest = " ".join(["mm", *path]), words[len(path) :]
    with exit_on_user_error(name, debug, command.again):
        if not path and rest == ["--version"]:
            print(f"mm-adapters {importlib.metadata.version('mm-adapters')}")
            sys.exit(0)
        if command.subcommands and rest in (["-h"], ["--help"]):
            print(help_text(name, command))
            sys.exit(0)
        if command.subcommands and rest[:1] not in [[subcommand] for subcommand in command.subcommands]:
            wrong = f"unknown command {rest[0]!r}" if rest else "a command is missing"
            raise UserError(f"{wrong}; choose from {', '.join(command.subcommands)}")
        module, _, function = command.target.partition(":")
        if module.startswith("stages."):  # torchrun starts stages without this command: they read these options too
            rest += [word for word in LOGGING_OPTIONS if word in given]
        sys.exit(getattr(importlib.import_module(module), function)(rest) or 0)


def find(words: Sequence[str]) -> tuple[list[str], Command]:
    """The command that the first words name, as far down as they name one.

    Returns:
        The names of the command, and its line of the table; ([], ROOT) where the first word names no command.
    """
    path: list[str] = []
    command = ROOT
    for word in words:
        if command.target or word not in command.subcommands:
            break
        path, command = [*path, word], command.subcommands[word]
    return path, command


def help_text(name: str, command: Command) -> str:
    """The help of a command that has subcommands, with a line for each of them."""
    width = max(map(len, command.subcommands)) + 2
    lines = [f"  {subcommand:{width}}{line.help}" for subcommand, line in command.subcommands.items()]
    if command.subcommands is STAGES:
        word, usage = "STAGE", f"usage: {name} STAGE --config FILE [--KEY VALUE ...]"
    else:
        word, usage = "COMMAND", f"usage: {name} {'[--version] ' if command is ROOT else ''}COMMAND ..."
    notes = [
        f"`{name} {word} --help` lists the options of one of them.",
        "Options of commands are written in --kebab-case. Configuration keys are written in snake_case, in files and",
        "as options that override them: --training.steps 10.",
        OPTIONS_HELP,
    ]
    return "\n".join([usage, "", command.help, "", *lines, "", *notes])


if __name__ == "__main__":
    main()
