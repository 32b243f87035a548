"""Trains a speech encoder and a speech adapter for a frozen language model (paper §8.2).

    mm train train_speech_adapter --config configs/speech/alignment.yaml --language_model MODEL.gguf

The speech encoder and the speech adapter train on recordings with conversations, as far as the learning rates release
them; the language model and all other parts are frozen. The adapter's output stands in the language model's input
sequence as text embeddings do.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mm.convert.llama
from foundation.errors import UserError
from mm.assembly import add_speech, from_language_model
from mm.batch import IGNORED, Sample
from mm.config import ModelConfig
from mm.encoder_folders import load_speech_encoder, read_speech_encoder_shape
from mm.modalities import AUDIO
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.processor import Processor
from mm.run_folder import language_model_of, open_model, read_shape, save
from mm.tokenizer_fit import use_stop_tokens
from mm.training.adapters import processor_overrides, train_adapters
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.data import DataSource, RecordDataset, readable_samples
from mm.training.distillation import with_twin
from mm.training.media import check_media, likely_indices
from mm.training.sampler import seed_of
from mm.training.speech import SpeechObjective, set_feature_statistics
from mm.training.stage_shapes import ModelShape, PlannedStage
from shards.format import Record
from speech.adapter import SpeechAdapterConfig
from speech.augmentation import SpecAugmentConfig, spec_augment
from speech.conformer import SpeechEncoder, SpeechEncoderConfig, new_encoder
from speech.whisper import WhisperEncoder, WhisperEncoderConfig

logger = logging.getLogger(__name__)


@dataclass
class TrainSpeechAdapter:
    """Configuration of the stage.

    Attributes:
        output: run folder, which `mm.load` opens after the stage.
        data: shards of recordings with conversations.
        start_from: an earlier run, which gets a speech encoder and adapter, or trains on those that it has.
        language_model: a Hugging Face folder or GGUF file in place of start_from, for a model without image adapter.
        encoder: shape of a new conformer. speech_encoder: in place of that, a folder of `pretrain_speech_encoder`, a
            run with a speech encoder, or one of OpenAI's Whisper files (`.pt`). Neither, where start_from has one.
        adapter: of a new speech adapter; its `ctc_readout` and `ctc_weight` go together.
        validation: shards on which loss and accuracy are reported; null: none. validation_samples: samples of it.
        statistics_samples: number of samples from which a new conformer takes the features' mean and deviation.
        spec_augment: augmentation of the training utterances, drawn anew in each epoch; null: none.
        ctc_weight, next_token_weight, distillation_weight: of the losses in `mm.training.speech.SpeechObjective`; the
            paper has the next-token loss only.
        chat_template: replaces the language model's own. allow_control_tokens, allow_omitted_text: see
            `mm.processor.Processor`; null keeps what start_from has.
        bundle: copy the language model into the run folder.
        device: "auto" is CUDA where there is one, else the CPU.
    """

    output: str
    data: list[DataSource]
    training: TrainingConfig
    start_from: str | None = None
    language_model: str | None = None
    encoder: SpeechEncoderConfig | None = None
    speech_encoder: str | None = None
    adapter: SpeechAdapterConfig = field(default_factory=SpeechAdapterConfig)
    validation: DataSource | None = None
    validation_samples: int = 256
    statistics_samples: int = 512
    spec_augment: SpecAugmentConfig | None = None
    ctc_weight: float = 0.0
    next_token_weight: float = 1.0
    distillation_weight: float = 0.0
    chat_template: str | None = None
    allow_control_tokens: bool | None = None
    allow_omitted_text: bool | None = None
    bundle: bool = False
    device: str = "auto"


def train_speech_adapter(config: TrainSpeechAdapter) -> None:
    """Train a speech encoder and a speech adapter for a frozen language model."""
    objective = SpeechObjective(config.ctc_weight, config.next_token_weight, config.distillation_weight)
    model, processor, language_model = initial_model(config)
    if config.encoder is not None:
        assert isinstance(model.speech_encoder, SpeechEncoder)
        set_feature_statistics(model.speech_encoder, speech_features(config, processor))
    prepare = partial(training_sample, processor=processor, config=config)
    train_adapters(
        model,
        processor,
        config,
        "speech adapter",
        AUDIO,
        trainable_prefix="speech_",
        objective=objective,
        prepare=prepare,
    )
    bundle = config.bundle or language_model is None
    save(config.output, model, processor, language_model, bundle, write=Ranks.current().is_main)


def planned(config: TrainSpeechAdapter, model: ModelConfig | None = None) -> PlannedStage:
    """The stage for `mm plan`. Args: model: shapes in place of those of what the configuration starts from."""
    objective = SpeechObjective(config.ctc_weight, config.next_token_weight, config.distillation_weight)
    if model is None:
        if (config.start_from is None) == (config.language_model is None):
            raise UserError("name start_from or language_model, one of the two, for their shapes; or take a --preset")
        if config.start_from is not None:
            model = read_shape(config.start_from)
        else:
            assert config.language_model is not None
            model = ModelConfig(mm.convert.llama.read_shape(config.language_model))
    if model.speech_encoder is None:
        encoder: SpeechEncoderConfig | WhisperEncoderConfig | None = config.encoder
        if config.speech_encoder is not None:
            encoder = read_speech_encoder_shape(config.speech_encoder)
        if encoder is None:
            raise UserError("give `encoder`, the shape of a new conformer, or `speech_encoder`, the place of one")
        model = replace(model, speech_encoder=encoder, speech_adapter=config.adapter)
    return PlannedStage.of_model(ModelShape(model, objective), AUDIO)


def initial_model(config: TrainSpeechAdapter) -> tuple[MultimodalModel, Processor, str | None]:
    """The model with a speech encoder and adapter, its processor, and the path of its language model.

    Raises:
        UserError: the configuration names nothing or too much to start from, no encoder, or one for a run that has an
            encoder; or it has CTC without a readout, or a new adapter with a readout and without CTC.
    """
    if (config.start_from is None) == (config.language_model is None):
        raise UserError(
            "name start_from, a run that gets a speech adapter or trains on, or language_model for a model without "
            "images; one of the two"
        )
    settings: dict[str, Any]
    if config.start_from is not None:
        model, earlier = open_model(config.start_from)
        tokenizer, settings = earlier.tokenizer, earlier.settings()
        language_model = language_model_of(config.start_from)
    else:
        assert config.language_model is not None
        language_model = config.language_model
        loaded = mm.convert.llama.open_model(language_model)
        model = from_language_model(loaded, seed=config.training.seed)
        tokenizer, settings = mm.convert.llama.load_tokenizer(language_model), {}
    if model.speech_encoder is None:
        add_speech(model, initial_encoder(config), config.adapter, seed=config.training.seed)
    else:
        check_trained_on(config, model)
    augment = config.spec_augment
    if augment and augment.changes_sound and isinstance(model.speech_encoder, WhisperEncoder):
        raise UserError(
            "spec_augment: max_warp, max_gain and max_noise are for a conformer's features, and Whisper's are others: "
            "leave them out"
        )
    processor = Processor(tokenizer, model.config, **{**settings, **processor_overrides(config)})
    use_stop_tokens(model, processor)
    if config.start_from is None:
        logger.info(model.language_model.report)
    return model, processor, language_model


def initial_encoder(config: TrainSpeechAdapter) -> SpeechEncoder | WhisperEncoder:
    """The encoder of a new speech adapter: a new conformer, or one that exists.

    Raises:
        UserError: both or neither are named; only one of `ctc_weight` and the adapter's `ctc_readout` is set.
    """
    if (config.encoder is None) == (config.speech_encoder is None):
        raise UserError(
            "give `encoder`, the shape of a new conformer, or `speech_encoder`, the place of one; one of the two"
        )
    if config.adapter.ctc_readout != bool(config.ctc_weight):
        raise UserError(
            "a new adapter has a readout and CTC that aligns it, or neither: set both `adapter.ctc_readout: true` and "
            "ctc_weight, or none of them"
        )
    if config.speech_encoder is not None:
        return load_speech_encoder(config.speech_encoder)
    assert config.encoder is not None
    return new_encoder(config.encoder, config.training.seed)


def check_trained_on(config: TrainSpeechAdapter, model: MultimodalModel) -> None:
    """Check the settings of a run whose model has a speech encoder and adapter already.

    Raises:
        UserError: CTC for an adapter without a readout; settings of a new encoder or adapter.
    """
    assert model.config.speech_adapter is not None
    if config.ctc_weight and not model.config.speech_adapter.ctc_readout:
        raise UserError(
            f"ctc_weight needs an adapter with a readout, and {config.start_from} has one without: leave it at 0, "
            "or align a new adapter with `ctc_readout: true` for the run or the language model that got that one"
        )
    if (config.encoder, config.speech_encoder) != (None, None) or config.adapter != SpeechAdapterConfig():
        raise UserError(
            f"{config.start_from} brings its own speech encoder and adapter: leave `encoder`, `speech_encoder` and "
            "`adapter` out"
        )


def speech_features(config: TrainSpeechAdapter, processor: Processor) -> list[Tensor]:
    """The features of the utterances of `statistics_samples` samples, each [T, num_mels].

    Samples with an empty answer are left out: they may be digital silence, whose features lie far below those of any
    sound.

    Raises:
        UserError: no record holds sound.
    """
    dataset = RecordDataset(config.data, processor.record_example)
    check_media(dataset, AUDIO)
    samples = readable_samples(dataset, config.statistics_samples, likely_indices(dataset, AUDIO))
    not_answer = {IGNORED, *processor.stop_tokens}
    return [mel for sample in samples if set(sample.labels) - not_answer for mel in sample.speech]


def training_sample(record: Record, visit: int, processor: Processor, config: TrainSpeechAdapter) -> Sample:
    """A record's sample, augmented, and with a text twin for distillation.

    The augmentation is a function of record, visit (how often the record came before) and seed.

    Raises:
        UserError: as `mm.training.distillation.with_twin`.
    """
    sample = with_twin(record, processor) if config.distillation_weight else processor.record_example(record)
    if config.spec_augment is None:
        return sample
    generator = torch.Generator().manual_seed(seed_of(f"{config.training.seed}/{visit}/{record.id}"))
    return replace(sample, speech=[spec_augment(mel, config.spec_augment, generator) for mel in sample.speech])


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(TrainSpeechAdapter, train_speech_adapter, argv, "train_speech_adapter")


if __name__ == "__main__":
    main()
