"""What the demos' command lines have in common: logging, one-line errors, the device, and options for the stages."""

import logging
import sys
from collections.abc import Callable, Sequence

import torch
from jsonargparse import ArgumentParser, Namespace

from foundation.errors import exit_on_user_error
from foundation.logs import configure_logging_from
from foundation.options import read_options
from mm.device import device_line, resolve_device

logger = logging.getLogger(__name__)


def add_device_option(parser: ArgumentParser) -> None:
    """Adds `--device`; "auto" is CUDA where the machine has it, else the CPU."""
    parser.add_argument("--device", default="auto", help="such as auto, cpu or cuda:1")


def run_demo(parser: ArgumentParser, argv: Sequence[str] | None, demo: Callable[[Namespace], object]) -> None:
    """Parse the options, set up logging and call a demo with the options.

    Args:
        argv: the command line, `--quiet` and `--debug` included; None takes the process's own.

    Raises:
        SystemExit: 1 for a user's mistake, 130 for Ctrl-C.
    """
    arguments, debug = configure_logging_from(sys.argv[1:] if argv is None else argv)
    with exit_on_user_error(parser.prog, debug, again="keeps the finished parts and continues"):
        options = read_options(parser, arguments)
        if "device" in options:
            logger.info(device_line(resolve_device(options.device)))
        demo(options)


def stage_options(device: str, steps: int | None = None, precision: str | None = None) -> list[str]:
    """The options that a demo passes to each of its training stages.

    bf16 takes half the time on GPUs and on processors that multiply it in hardware; elsewhere it takes far longer.

    Args:
        steps: training steps; None leaves them to the stage's configuration.
        precision: "fp32" or "bf16"; None takes the faster one.
    """
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    if resolve_device(device).type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported()
    options = ["--device", device, "--training.precision", precision or ("bf16" if has_bf16 else "fp32")]
    if steps is not None:
        options += ["--training.steps", str(steps)]
    level = logging.getLogger("demos").getEffectiveLevel()
    if level <= logging.DEBUG:
        options.append("--debug")
    elif level > logging.INFO:
        options.append("--quiet")
    return options
