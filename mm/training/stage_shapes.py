"""What a stage trains, without weights or data: the module's shapes, the objective, and samples of stated sizes.

The planner runs a stage's own module and objective on these. `mm.training.contrastive` and
`mm.training.speech_pretraining` have the shapes of their stages.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from layers.meta import meta_device
from mm.batch import IGNORED, Sample
from mm.config import ModelConfig
from mm.modalities import AUDIO, Modality
from mm.model import MultimodalModel
from mm.parallel.tables import CHECKPOINTED_MODULES, FSDP_MODULES
from mm.training.distillation import DistillationSample
from mm.training.flops import Flops, Row, TrainedParts
from mm.training.objectives import NextTokenObjective
from mm.training.speech import SpeechObjective
from video.sampling import Clip
from vision.tiling import CANVASES, Tiles


class StageShape(Protocol):
    """What a stage trains.

    Attributes:
        objective: computes the loss of a micro-batch.
        checkpointed_modules, fsdp_modules: as the stage gives them to `mm.training.trainer.Trainer`.
        text: whether samples have text tokens. tensor_parallel: whether the stage can run so.
    """

    objective: Any
    checkpointed_modules: tuple[type[nn.Module], ...]
    fsdp_modules: tuple[type[nn.Module], ...]
    text: bool
    tensor_parallel: bool

    @property
    def pipeline(self) -> bool:
        """Whether the stage can run as a pipeline."""

    def build(self) -> nn.Module:
        """The module, on the meta device."""

    def sample(self, row: Row, number: int, fake: FakeTensorMode) -> Any:
        """A sample of the objective, with the sizes of a row and media without data.

        Args:
            number: of the sample in its batch.
        """

    def flops(
        self,
        rows: Sequence[Row],
        trained: Collection[str],
        activation_checkpointing: bool = False,
        encoded: Sequence[int] | None = None,
    ) -> Flops:
        """The FLOPs of a forward and a backward pass.

        Args:
            trained: names of the parameters that train. encoded: see `mm.training.flops.forward_flops`.
        """


@dataclass
class ModelShape:
    """A stage with a language model. Args: objective: of `mm.training.objectives`, `matching` or `speech`."""

    config: ModelConfig
    objective: NextTokenObjective
    checkpointed_modules: tuple[type[nn.Module], ...] = CHECKPOINTED_MODULES
    fsdp_modules: tuple[type[nn.Module], ...] = FSDP_MODULES
    text: bool = True
    tensor_parallel: bool = True

    @property
    def pipeline(self) -> bool:
        """Whether `mm.parallel.pipeline.build_stage` takes the model; the loss is that of next tokens alone."""
        config = self.config
        alone = config.image_adapter is not None and config.video_adapter is None and config.speech_adapter is None
        return alone and self.objective.runs_language_model and not getattr(self.objective, "matching_weight", 0)

    def build(self) -> MultimodalModel:
        with meta_device():
            return MultimodalModel(self.config)

    def sample(self, row: Row, number: int, fake: FakeTensorMode) -> Sample:
        config = self.config
        side = config.vision_encoder.tile_size if config.vision_encoder is not None else 0
        num_mels = config.speech_encoder.num_mels if config.speech_encoder is not None else 0
        with fake:
            images = [empty_tiles(side, count) for count in row.tiles]
            frames = [[empty_tiles(side, count) for _ in range(length)] for length, count in row.clips]
            speech = [torch.empty(length, num_mels) for length in row.mel_frames]
        videos = [Clip(clip, torch.arange(len(clip), dtype=torch.float64)) for clip in frames]
        media = [config.image_token_id] * len(images) + [config.video_token_id] * len(videos)
        media += [token for mel in speech for token in AUDIO.tokens(mel, config)]
        stops = set(config.language_model.stop_tokens)
        words = [token for token in range(config.language_model.vocab_size) if token not in stops]
        answer = [words[(number * row.targets + index) % len(words)] for index in range(row.targets)]
        question = media + [words[0]] * (row.tokens - row.targets - len(media))
        sample = Sample(question + answer, [IGNORED] * len(question) + answer, images, videos, speech)
        if isinstance(self.objective, SpeechObjective) and self.objective.distillation_weight:
            twin = Sample([words[0], *answer, *answer], [IGNORED] * (1 + len(answer)) + answer)
            return DistillationSample(**vars(sample), twin=twin)
        return sample

    def flops(
        self,
        rows: Sequence[Row],
        trained: Collection[str],
        activation_checkpointing: bool = False,
        encoded: Sequence[int] | None = None,
    ) -> Flops:
        parts = TrainedParts.of(trained, self.config)
        return self.objective.step_flops(self.config, rows, parts, activation_checkpointing, encoded)


def empty_tiles(side: int, number: int) -> Tiles:
    """So many tiles of `side` pixels, of any content."""
    grid = next(grid for grid in CANVASES if math.prod(grid) == number)
    return Tiles(torch.empty(number, 3, side, side, dtype=torch.uint8), grid)


@dataclass(frozen=True)
class PlannedStage:
    """A stage for the planner: what trains, and on what.

    Attributes:
        modality: of the samples.
        context: the longest sequence. tile_size, encoder_tiles: of a tile in pixels, and the most tiles that the image
            encoder takes. max_tiles: the most tiles of a picture or frame; None: as many as the encoder takes.
        max_frames: the most frames of a clip. max_seconds: the longest sound that the speech encoder takes.
    """

    shape: StageShape
    modality: Modality
    context: int = 0
    tile_size: int = 0
    encoder_tiles: int = 0
    max_tiles: int | None = None
    max_frames: int = 0
    max_seconds: float = 0.0

    @classmethod
    def of_model(
        cls,
        shape: ModelShape,
        modality: Modality,
        max_tiles: int | None = None,
        max_frames: int = 0,
    ) -> "PlannedStage":
        """Of a stage with a language model."""
        config = shape.config
        encoder = config.vision_encoder
        return cls(
            shape,
            modality,
            config.language_model.context,
            0 if encoder is None else encoder.tile_size,
            0 if encoder is None else encoder.max_num_tiles,
            max_tiles,
            max_frames,
            0.0 if config.speech_encoder is None else config.speech_encoder.max_seconds,
        )
