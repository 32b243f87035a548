"""Activation checkpointing: layers whose activations the backward pass computes again."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from mm.training.config import TrainingConfig


class activation_checkpointing:
    """Context in which modules of the given kinds compute their activations again in the backward pass.

    Args:
        config: its `activation_checkpointing` says whether they do.
    """

    def __init__(self, module: nn.Module, kinds: tuple[type[nn.Module], ...], config: TrainingConfig) -> None:
        active = config.activation_checkpointing
        self.modules = [part for part in module.modules() if active and isinstance(part, kinds)]

    def __enter__(self) -> None:
        for module in self.modules:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            del module.forward
