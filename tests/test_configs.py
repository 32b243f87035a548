"""The stages' configurations that are shipped: they can be read, and their rates reach what they name and no more."""

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import mm
from demos.speech_sets import SETS
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig
from mm.training.contrastive import ContrastiveModel
from mm.training.optimizer import apply_learning_rates
from mm.training.speech import SpeechObjective
from mm.training.video import VideoObjective
from mm.video_adapter import VideoAdapterConfig
from speech.conformer import SpeechEncoderConfig
from stages.finetune import Finetune
from stages.pretrain_image_encoder import PretrainImageEncoder
from stages.pretrain_speech_encoder import PretrainSpeechEncoder
from stages.sweep import Sweep
from stages.train_image_adapter import TrainImageAdapter
from stages.train_speech_adapter import TrainSpeechAdapter
from stages.train_video_adapter import TrainVideoAdapter
from vision.encoder import VisionEncoderConfig

SHIPPED = Path(__file__).parent.parent / "configs"
ENCODERS = sorted(SHIPPED / "speech" / f"{name}.yaml" for name in ("character_ctc", "pretraining"))
# Of these, no gates and no pictures.
SPEECH = sorted({*SHIPPED.glob("demo/speech*.yaml"), *SHIPPED.glob("speech/*.yaml")} - {*ENCODERS})
ALIGNMENT = SHIPPED / "demo" / "video_alignment.yaml"  # its gates stay as they are
CURATION = (SHIPPED / "data").iterdir()  # trains nothing
CONFIGS = sorted(set(SHIPPED.rglob("*.yaml")) - {*CURATION, *ENCODERS, *SPEECH, ALIGNMENT})


def read(stage: type, file: Path):
    """The configuration of a stage, as its command reads it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(stage)
    return parser.instantiate(parser.parse_args(["--config", str(file)]))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_gates_have_their_rate_alone_and_the_language_model_is_frozen(file):
    is_encoder = "text" in yaml.safe_load(file.read_text())
    stages = {"encoder.yaml": PretrainImageEncoder, "finetune.yaml": Finetune, "sweep.yaml": Sweep}
    stages |= dict.fromkeys(("video.yaml", "video_adapter.yaml", "video_finetune.yaml"), TrainVideoAdapter)
    stage = stages.get(file.name, TrainImageAdapter)
    config = read(stage, file)
    config = config.base if file.name == "sweep.yaml" else config
    with torch.device("meta"):
        if is_encoder:
            model = ContrastiveModel(config.encoder, config.text)
        else:
            language_model = LanguageModelConfig(64, 32, 48, num_layers=16, num_heads=2, num_kv_heads=1)
            encoder = VisionEncoderConfig(num_layers=31, num_gated_layers=1)
            watching = VideoAdapterConfig() if stage is TrainVideoAdapter else None
            shapes = mm.ModelConfig(language_model, encoder, ImageAdapterConfig(), video_adapter=watching)
            model = mm.MultimodalModel(shapes)
    rates = apply_learning_rates(model, config.training.learning_rates)
    gates = [name for name in rates if name.rpartition(".")[2] in ("gate_attn", "gate_ffn")]
    assert gates and not any(name.startswith(("language_model.", "extra_embeddings")) for name in rates)
    if stage is TrainVideoAdapter:
        assert all(name.startswith("video_adapter.") for name in rates)
        assert VideoObjective(config.matching_weight, config.next_token_weight)
    common = config.training.learning_rates["video_adapter.*" if stage is TrainVideoAdapter else "*"]
    for name, rate in rates.items():
        if rate > common and not name.endswith(("o_proj.weight", "down_proj.weight")):
            assert model.get_parameter(name).numel() == 1, f"{name} has the gates' rate"


@pytest.mark.parametrize("file", SPEECH, ids=lambda file: file.name)
def test_speech_trains_ears_alone(file):
    config = read(TrainSpeechAdapter, file)
    language_model = LanguageModelConfig(64, 32, 48, num_layers=2, num_heads=2, num_kv_heads=1)
    encoder = config.encoder or SpeechEncoderConfig()
    with torch.device("meta"):
        model = mm.MultimodalModel(
            mm.ModelConfig(language_model, speech_encoder=encoder, speech_adapter=config.adapter)
        )
    rates = apply_learning_rates(model, config.training.learning_rates)
    if config.ctc_weight:
        assert {name.partition(".")[0] for name in rates} == {"speech_encoder", "speech_adapter"}
    else:
        assert set(rates) == {"speech_adapter.boundaries"}  # what is heard is aligned, and stays
    assert config.adapter.ctc_readout == bool(
        config.ctc_weight and config.start_from is None
    )  # a run's own has it already
    assert SpeechObjective(config.ctc_weight, config.next_token_weight, config.distillation_weight)
    held_out = {"data/speech/librivox", "data/speech/aligner"}
    assert not held_out & {source.path for source in config.data}


@pytest.mark.parametrize("file", ENCODERS, ids=lambda file: file.name)
def test_speech_encoders_of_all_configurations_fit_each_other(file):
    config = read(PretrainSpeechEncoder, file)
    assert config.encoder == SpeechEncoderConfig(6, 192, 768, 3, max_seconds=20)
    assert config.character_ctc == (file.name == "character_ctc.yaml")
    known = {f"data/speech/{name}" for name in SETS} - {"data/speech/librivox", "data/speech/aligner"}
    assert {source.path for source in config.data} <= known  # what is held out stays held out


def test_the_aggregator_alone_is_aligned():
    config = read(TrainVideoAdapter, ALIGNMENT)
    language_model = LanguageModelConfig(64, 32, 48, num_layers=16, num_heads=2, num_kv_heads=1)
    encoder = VisionEncoderConfig(num_layers=5, num_gated_layers=1, tap_points=(2, 4))
    with torch.device("meta"):
        model = mm.MultimodalModel(
            mm.ModelConfig(language_model, encoder, ImageAdapterConfig(), video_adapter=config.adapter)
        )
    rates = apply_learning_rates(model, config.training.learning_rates)
    assert rates and all(name.startswith("video_adapter.aggregator.") for name in rates)
    assert VideoObjective(config.matching_weight, config.next_token_weight)
