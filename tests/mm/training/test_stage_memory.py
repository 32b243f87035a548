"""The memory of every stage's step computed from shapes, against the bytes of the tensors of a real step on the CPU."""

from dataclasses import replace

import pytest
import torch

from mm.batch import Sample
from mm.config import ModelConfig
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig
from mm.modalities import IMAGE, VIDEO
from mm.training.character_ctc import CharacterCtcShape, TranscribedUtterance
from mm.training.config import TrainingConfig
from mm.training.contrastive import Pair, PairsShape, TextTowerConfig
from mm.training.flops import Row
from mm.training.guards import Guard
from mm.training.live_bytes import LiveBytes
from mm.training.matching import MatchingObjective
from mm.training.memory import ShapeModel
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_learning_rates, build_optimizer
from mm.training.recomputation import activation_checkpointing
from mm.training.speech import SpeechObjective
from mm.training.speech_pretraining import PretrainingShape, Utterance
from mm.training.stage_shapes import ModelShape
from mm.training.trainer import train_step
from mm.video_adapter import VideoAdapterConfig
from speech.adapter import SpeechAdapterConfig
from speech.best_rq import BestRqConfig
from speech.conformer import SpeechEncoderConfig
from speech.whisper import WhisperEncoderConfig
from video.aggregator import AggregatorConfig
from video.sampling import Clip
from vision.encoder import VisionEncoderConfig
from vision.tiling import Tiles

CLOSE = 0.1  # what a plan may be off by
ENCODER = VisionEncoderConfig(
    tile_size=56, hidden_size=64, intermediate_size=256, num_layers=4, num_gated_layers=2, num_heads=4,
    tap_points=(1, 2, 3),
)  # fmt: skip
CONFORMER = SpeechEncoderConfig(4, 96, 256, 4)
CONFIG = ModelConfig(
    LanguageModelConfig(320, 128, 352, num_layers=4, num_heads=4, num_kv_heads=2),
    ENCODER,
    ImageAdapterConfig(positions=(2, 4)),
    video_adapter=VideoAdapterConfig(AggregatorConfig(4, 64, 256, num_layers=2, num_heads=4), interval=2),
    speech_encoder=CONFORMER,
    speech_adapter=SpeechAdapterConfig(128, 256, 4),
)
WHISPER = replace(CONFIG, speech_encoder=WhisperEncoderConfig(4, 96, 256, 4, max_seconds=2.0))
READOUT = replace(CONFIG, speech_adapter=replace(CONFIG.speech_adapter, ctc_readout=True))
CLIP, SOUND, PICTURE = (Row(16, 8, **media) for media in ({"clips": ((6, 1),)}, {}, {"tiles": (2,)}))
SOUND = Row(42, 8, mel_frames=(240,))
VIDEO_RATES, SPEECH_RATES = {"video_adapter.*": 1e-3, "*": None}, {"speech_*": 1e-3, "*": None}
EVERY_RATE = {"language_model.*": None, "extra_embeddings": None, "*": 1e-3}
PAIRS = PairsShape(ENCODER, TextTowerConfig(64, 2, 4, 16, embedding_size=48))
PRETRAINING = PretrainingShape(CONFORMER, best_rq=BestRqConfig(codebook_size=128, num_codebooks=4))
STAGES = {
    "clips": (ModelShape(CONFIG, NextTokenObjective()), VIDEO_RATES, [CLIP] * 3),
    "clips and everything": (ModelShape(CONFIG, NextTokenObjective()), EVERY_RATE, [CLIP, PICTURE, SOUND]),
    "matched clips": (ModelShape(CONFIG, MatchingObjective(VIDEO, 1.0, 0.0)), VIDEO_RATES, [CLIP] * 3),
    "matched pictures": (ModelShape(CONFIG, MatchingObjective(IMAGE, 1.0, 1.0)), EVERY_RATE, [PICTURE] * 4),
    "sound": (ModelShape(CONFIG, SpeechObjective()), SPEECH_RATES, [SOUND] * 3),
    "sound of a frozen encoder": (
        ModelShape(CONFIG, SpeechObjective()), {"speech_adapter.*": 1e-3, "*": None}, [SOUND] * 3,
    ),
    "whisper": (ModelShape(WHISPER, SpeechObjective()), SPEECH_RATES, [SOUND] * 3),
    "ctc": (ModelShape(READOUT, SpeechObjective(1.0, 0.0)), SPEECH_RATES, [SOUND] * 3),
    "ctc and next tokens": (ModelShape(READOUT, SpeechObjective(1.0, 1.0)), SPEECH_RATES, [SOUND] * 3),
    "distillation": (ModelShape(CONFIG, SpeechObjective(0.0, 1.0, 1.0)), SPEECH_RATES, [SOUND] * 3),
    "pairs": (PAIRS, {"*": 1e-3}, [Row(16, 0, (2,))] * 4),
    "best-rq": (PRETRAINING, {"*": 1e-3}, [Row(0, 0, mel_frames=(300,))] * 3),
    "character ctc": (CharacterCtcShape(CONFORMER), {"*": 1e-3}, [Row(0, 0, mel_frames=(300,))] * 3),
}  # fmt: skip


def real(tiles: Tiles) -> Tiles:
    """Noise: equal pictures would be encoded once."""
    return Tiles(torch.randint(0, 256, tiles.pixels.shape, dtype=torch.uint8), tiles.grid)


def real_sample(sample):
    """A sample of the same sizes with data."""
    match sample:
        case Sample():
            return replace(
                sample,
                images=[real(tiles) for tiles in sample.images],
                videos=[Clip([real(tiles) for tiles in clip.frames], clip.times) for clip in sample.videos],
                speech=[torch.randn(mel.shape) for mel in sample.speech],
            )
        case Pair():
            return Pair(real(sample.tiles), sample.text)
        case Utterance():
            return Utterance(torch.randn(sample.mel.shape), sample.seed)
        case TranscribedUtterance():
            return TranscribedUtterance(torch.randn(sample.mel.shape), sample.characters)


CASES = [(name, False) for name in STAGES] + [(name, True) for name in ("clips and everything", "sound", "pairs")]


@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_a_step_holds_as_much_as_a_real_step(name, checkpointing):
    shape, rates, rows = STAGES[name]
    shapes = ShapeModel(shape, TrainingConfig(1, len(rows), rates))
    step = shapes.step(rows, checkpointing)
    torch.manual_seed(0)
    model = materialised(shape)
    settings = TrainingConfig(1, len(rows), learning_rates=rates, activation_checkpointing=checkpointing)
    optimizer = build_optimizer(model, apply_learning_rates(model, rates), 0.1, (0.9, 0.95))
    samples = [real_sample(shape.sample(row, number, shapes.fake)) for number, row in enumerate(rows)]
    batch = shape.objective.collate(samples)
    with activation_checkpointing(model, shape.checkpointed_modules, settings):
        for _ in range(2):
            with LiveBytes().exclude(model) as live:
                train_step(model, shape.objective, optimizer, [batch], settings, "cpu", Guard(None, 0))
    assert step.peak() == pytest.approx(live.peak, rel=CLOSE)
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert shapes.state_bytes()["weights"] == weights


def materialised(shape):
    """The module of a stage with storage, and weights of any finite values."""
    model = shape.build().to_empty(device="cpu").train()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.normal_(std=0.02)
    return model
