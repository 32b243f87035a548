"""Frames of a clip, each with the time at which it is shown."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vision.tiling import Tiles


@dataclass
class Clip:
    """Sampled frames, cut into tiles.

    Attributes:
        frames: F frames, each with its own tiles, in the order of time.
        times: float64 [F], seconds from the start of the clip at which each frame is shown.
    """

    frames: list[Tiles]
    times: Tensor

    def to(self, device: torch.device | str) -> "Clip":
        return Clip([tiles.to(device) for tiles in self.frames], self.times.to(device))
