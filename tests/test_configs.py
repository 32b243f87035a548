"""The shipped configurations: they can be read, their headers are right, and every learning rate has parameters."""

import dataclasses
import importlib
import re
import shlex
import typing
from fnmatch import fnmatchcase
from functools import cache

import pytest
import torch
import yaml

import configs
import mm
from app.commands.data_build import BUILDERS, read_builder
from data_prep.pipeline.curation import parse_config
from demos.speech_sets import SETS
from foundation.options import new_parser, read_options
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig
from mm.modalities import VIDEO
from mm.training.contrastive import ContrastiveModel
from mm.training.matching import MatchingObjective
from mm.training.optimizer import apply_learning_rates, muon_matrices
from mm.training.speech import SpeechObjective
from mm.training.speech_pretraining import SpeechPretraining
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from stages.finetune import Finetune
from stages.pretrain_image_encoder import PretrainImageEncoder
from stages.pretrain_speech_encoder import PretrainSpeechEncoder
from stages.sweep import Sweep
from stages.train_dpo import TrainDpo
from stages.train_image_adapter import TrainImageAdapter
from stages.train_speech_adapter import TrainSpeechAdapter
from stages.train_video_adapter import TrainVideoAdapter
from vision.encoder import VisionEncoderConfig

STAGES = {
    "finetune": Finetune,
    "pretrain_image_encoder": PretrainImageEncoder,
    "pretrain_speech_encoder": PretrainSpeechEncoder,
    "sweep": Sweep,
    "train_dpo": TrainDpo,
    "train_image_adapter": TrainImageAdapter,
    "train_speech_adapter": TrainSpeechAdapter,
    "train_video_adapter": TrainVideoAdapter,
}
HELD_OUT = {"data/speech/librivox", "data/speech/aligner"}  # recordings of which no run may learn
TINY_LM = LanguageModelConfig(64, 32, 48, num_layers=28, num_heads=2, num_kv_heads=1)


@cache
def header(name: str) -> list[str]:
    """The lines of the comment that a file starts with, without "# "."""
    lines = configs.path(name).read_text(encoding="utf-8").splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return [line[1:].strip() for line in lines[:end]]


def commands(name: str) -> list[list[str]]:
    """The commands in a file's header, split into words; a remark in brackets after a command is left out."""
    text = "\n".join(header(name)).replace("\\\n", " ")
    lines = [line.partition("    (")[0] for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(("mm ", "python -m ", "make "))]


def own_command(name: str) -> list[str]:
    """The one command in a file's header that reads the file itself."""
    (command,) = (words for words in commands(name) if f"configs/{name}" in words)
    return command


def stage_of(name: str) -> str | None:
    """The stage that a file is for; None for the data commands."""
    _, command, stage, *_ = own_command(name)
    return {"train": stage, "sweep": "sweep", "data": None}[command]


NAMES = configs.names()
TRAINING = [name for name in NAMES if not name.startswith("data/")]
WITH_MODEL = [name for name in TRAINING if name != "sweep.yaml"]


def of_stage(stage: str) -> list[str]:
    return [name for name in TRAINING if stage_of(name) == stage]


@cache
def read(name: str) -> typing.Any:
    """The configuration of a training stage, as its command reads it."""
    parser = new_parser("test", "", config=True)
    kind = STAGES[stage_of(name)]
    parser.add_class_arguments(kind)
    values = vars(read_options(parser, ["--config", str(configs.path(name))]))
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def tiny_model(stage: str, config: typing.Any) -> torch.nn.Module:
    """What a stage trains, with the adapters of its configuration beside a tiny language model; without storage."""
    with torch.device("meta"):
        if stage == "pretrain_image_encoder":
            return ContrastiveModel(config.encoder, config.text)
        if stage == "pretrain_speech_encoder":
            return SpeechPretraining(SpeechEncoder(config.encoder), config.best_rq)
        if stage == "train_speech_adapter":
            encoder = config.encoder or SpeechEncoderConfig()
            shape = mm.ModelConfig(TINY_LM, speech_encoder=encoder, speech_adapter=config.adapter)
            return mm.MultimodalModel(shape)
        encoder = VisionEncoderConfig(num_layers=31, num_gated_layers=1)
        image_adapter = config.adapter if stage == "train_image_adapter" else ImageAdapterConfig()
        video_adapter = config.adapter if stage == "train_video_adapter" else None
        return mm.MultimodalModel(mm.ModelConfig(TINY_LM, encoder, image_adapter, video_adapter=video_adapter))


@cache
def trained(name: str) -> tuple[torch.nn.Module, dict[str, float]]:
    """The model of a file's stage, and the learning rate of each parameter that trains."""
    config = read(name)
    model = tiny_model(stage_of(name), config)
    return model, apply_learning_rates(model, config.training.learning_rates)


# ---------------------------------------------------------------------------------------------------- every file


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_the_purpose_the_command_the_cost_and_what_to_expect(name):
    text = "\n".join(header(name))
    assert text.partition("\n\n")[0].endswith("."), "the header does not start with a sentence"
    assert re.search(r"^Cost\b.*:", text, re.MULTILINE), "no line of the cost"
    assert re.search(r"^Expect:", text, re.MULTILINE), "no line of what to expect"
    words = own_command(name)
    assert words[words.index(f"configs/{name}") - 1] == "--config"


@pytest.mark.parametrize("name", NAMES)
def test_a_header_names_commands_modules_and_files_that_exist(name):
    for words in commands(name):
        if words[:2] == ["python", "-m"]:
            importlib.import_module(words[2])
        elif words[:2] == ["mm", "train"]:
            assert words[2] in STAGES
        elif words[:3] == ["mm", "data", "build"]:
            assert words[3] in BUILDERS
        else:
            assert words[:2] in (["mm", "sweep"], ["mm", "convert"]) or words[:3] == ["mm", "data", "run"]
    text = " ".join(header(name))
    for file in re.findall(r"\b(?:configs|docs)/[\w/.-]+\.(?:yaml|md)", text):
        assert (configs.ROOT.parent / file).is_file(), file
    for file in re.findall(r"(?<![\w/])[\w]+\.yaml", text):
        assert (configs.path(name).parent / file).is_file(), file


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_configuration_is_read_by_its_stage(name):
    assert isinstance(read(name), STAGES[stage_of(name)])


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("data/")])
def test_a_data_configuration_is_read_by_its_command(name):
    _, _, command, *rest = own_command(name)
    file = str(configs.path(name))
    if command == "run":
        overrides = rest[rest.index(f"configs/{name}") + 1 :]
        assert parse_config(["--config", file, *overrides], "mm data run").output
    else:
        assert isinstance(read_builder(rest[0], ["--config", file]), BUILDERS[rest[0]])


# ------------------------------------------------------------------------------------------- training: every file


def keys_at_their_default(kind: type, values: dict, prefix: str = "") -> list[str]:
    """The keys in `values`, as dotted paths, that a dataclass has as defaults anyway."""
    hints, keys = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        if field.name not in values:
            continue
        value, key = values[field.name], f"{prefix}{field.name}"
        hint = hints[field.name]
        nested = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
        if nested and isinstance(value, dict):
            keys += keys_at_their_default(nested[0], value, f"{key}.")
        elif nested and isinstance(value, list):
            keys += [inner for item in value for inner in keys_at_their_default(nested[0], item, f"{key}.")]
        elif value == (list(field.default) if isinstance(field.default, tuple) else field.default):
            keys.append(key)
    return keys


@pytest.mark.parametrize("name", TRAINING)
def test_a_key_that_equals_its_default_has_a_comment(name):
    text = configs.path(name).read_text(encoding="utf-8")
    for key in keys_at_their_default(STAGES[stage_of(name)], yaml.safe_load(text)):
        lines = [line for line in text.splitlines() if re.search(rf"\b{key.rpartition('.')[2]}:", line)]
        assert any("  # " in line for line in lines), f"{key} equals its default and does not say why it is set"


def test_keys_at_their_default_are_found():
    source = {"path": "x", "split": "train", "repeat": 2}
    values = {"output": "x", "bundle": False, "adapter": {"gate_init": 0.0}, "data": [source], "training": {"steps": 1}}
    assert keys_at_their_default(TrainImageAdapter, values) == ["data.split", "adapter.gate_init", "bundle"]


@pytest.mark.parametrize("name", WITH_MODEL)
def test_every_pattern_of_the_learning_rates_decides_for_a_parameter(name):
    patterns = list(read(name).training.learning_rates)
    decisive = set()
    for parameter, _ in trained(name)[0].named_parameters():
        decisive.add(next(pattern for pattern in patterns if fnmatchcase(parameter, pattern)))
    assert decisive == set(patterns)


@pytest.mark.parametrize("name", WITH_MODEL)
def test_the_language_model_and_the_extra_embeddings_are_frozen(name):
    patterns = read(name).training.learning_rates
    for parameter in ("language_model.model.layers.0.self_attn.q_proj.weight", "extra_embeddings"):
        deciding = [rate for pattern, rate in patterns.items() if fnmatchcase(parameter, pattern)]
        assert stage_of(name).startswith("pretrain_") or deciding[0] is None
    _, rates = trained(name)
    assert rates and not any(parameter.startswith(("language_model.", "extra_embeddings")) for parameter in rates)


@pytest.mark.parametrize("name", TRAINING)
def test_what_a_run_starts_from_is_the_output_of_another_configuration(name):
    outputs = {read(other).output for other in TRAINING}
    outputs |= {words[4] for other in NAMES for words in commands(other) if words[:3] == ["mm", "convert", "whisper"]}
    config = read(name).base if name == "sweep.yaml" else read(name)
    for key in ("start_from", "vision_encoder", "speech_encoder"):
        folder = getattr(config, key, None)
        assert folder is None or folder in outputs or folder.startswith("encoders/"), f"{key}: {folder}"


# ------------------------------------------------------------------------------------------------- single stages


GATED = [*of_stage("pretrain_image_encoder"), *of_stage("train_image_adapter"), *of_stage("finetune")]
GATED += of_stage("train_video_adapter")
GATED = [name for name in GATED if name not in ("demo/alignment.yaml", "demo/video_alignment.yaml")]


@pytest.mark.parametrize("name", GATED)
def test_only_gates_and_zero_matrices_have_more_than_the_common_rate(name):
    model, rates = trained(name)
    assert any(parameter.endswith(("gate_attn", "gate_ffn")) for parameter in rates)
    training = read(name).training
    patterns = training.learning_rates
    of_muon = muon_matrices(dict(model.named_parameters()), rates, training.muon)  # whose steps are bounded otherwise
    common = patterns["video_adapter.*" if stage_of(name) == "train_video_adapter" else "*"]
    for parameter, rate in rates.items():
        if rate > common and parameter not in of_muon and not parameter.endswith(("o_proj.weight", "down_proj.weight")):
            assert model.get_parameter(parameter).numel() == 1, f"{parameter} has the gates' rate"


@pytest.mark.parametrize("name", of_stage("train_image_adapter"))
def test_only_the_demos_first_stages_align_and_train_no_block(name):
    config, (_, rates) = read(name), trained(name)
    aligns = (config.matching_weight, config.next_token_weight) == (1.0, 0.0)
    assert aligns == name.endswith("alignment.yaml")
    assert aligns or (config.matching_weight, config.next_token_weight) == (0.0, 1.0)
    assert aligns == (not any(parameter.startswith("image_adapter.blocks.") for parameter in rates))


@pytest.mark.parametrize("name", of_stage("train_video_adapter"))
def test_video_stages_train_the_video_adapter_alone(name):
    config, (_, rates) = read(name), trained(name)
    assert all(parameter.startswith("video_adapter.") for parameter in rates)
    aligns = config.matching_weight > 0 and config.next_token_weight == 0
    assert aligns == all(parameter.startswith("video_adapter.aggregator.") for parameter in rates)
    MatchingObjective(VIDEO, config.matching_weight, config.next_token_weight)  # raises for weights that do not fit


@pytest.mark.parametrize("name", of_stage("train_speech_adapter"))
def test_speech_stages_align_encoder_and_adapter_or_train_the_boundary_embeddings(name):
    config, (_, rates) = read(name), trained(name)
    if config.ctc_weight:
        assert {parameter.partition(".")[0] for parameter in rates} == {"speech_encoder", "speech_adapter"}
    else:
        assert set(rates) == {"speech_adapter.boundaries"}
    assert config.adapter.ctc_readout == bool(config.ctc_weight and config.start_from is None)
    SpeechObjective(config.ctc_weight, config.next_token_weight, config.distillation_weight)


@pytest.mark.parametrize("name", [*of_stage("train_speech_adapter"), *of_stage("pretrain_speech_encoder")])
def test_no_run_learns_from_held_out_recordings(name):
    config = read(name)
    assert not HELD_OUT & {source.path for source in config.data}


@pytest.mark.parametrize("name", of_stage("pretrain_speech_encoder"))
def test_speech_encoders_have_one_shape_and_known_data(name):
    config = read(name)
    assert config.encoder == SpeechEncoderConfig(6, 192, 768, 3, max_seconds=20)
    assert config.character_ctc == (name == "speech/character_ctc.yaml")
    assert {source.path for source in config.data} <= {f"data/speech/{name}" for name in SETS}


def test_a_sweep_finetunes_the_shipped_configuration():
    base = read("sweep.yaml").base
    assert base == read("finetune.yaml")


# --------------------------------------------------------------------------------------------------- the package


def test_a_shipped_file_is_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.path("demo/adapter.yaml").is_absolute() and configs.path("demo/adapter.yaml").is_file()
    assert configs.names() == sorted(set(configs.names())) and "sweep.yaml" in configs.names()
    with pytest.raises(FileNotFoundError, match=r"no configuration demo/nothing\.yaml is shipped"):
        configs.path("demo/nothing.yaml")
