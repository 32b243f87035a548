"""Stage 4: a frozen language model learns to hear (paper §8.2).

Speech encoder and speech adapter train together on recordings with conversations; the language model and whatever else
the model has stay as they were, bit for bit. What the adapter makes of a recording stands in the language model's input
as text does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import mm.convert.llama
from foundation.errors import UserError
from mm.assembly import add_speech, from_language_model
from mm.batch import IGNORED, Sample
from mm.encoder_folders import load_speech_encoder
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.processor import Processor
from mm.run_folder import language_model_of, load, save
from mm.training.adapters import train_adapters
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.data import DataSource, RecordDataset, readable_samples
from mm.training.distillation import with_twin
from mm.training.objectives import check_loss_weights
from mm.training.sampler import seed_of
from mm.training.speech import SpeechObjective, set_feature_statistics
from shards.format import Record
from speech.adapter import SpeechAdapterConfig
from speech.augmentation import SpecAugmentConfig, spec_augment
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from speech.whisper import WhisperEncoder


@dataclass
class TrainSpeechAdapter:
    """What the stage needs.

    Attributes:
        output: run folder, which `mm.load` opens when the stage has ended.
        start_from: an earlier run, which gets ears, or trains on where it has them.
        language_model: a Hugging Face folder or a GGUF file in place of that, for a model that only hears.
        encoder: shape of a new conformer. speech_encoder: in place of that, a folder of `pretrain_speech_encoder`, a
            run that hears, or one of OpenAI's Whisper files (`.pt`). Neither, where the run hears already.
        adapter: of the new speech adapter; `ctc_readout` and `ctc_weight` belong together.
        data: shards of recordings with conversations. validation: shards to report loss and accuracy on; null reports
            nothing.
        statistics_samples: so many samples give a new conformer the mean and deviation of its features.
        spec_augment: how each training utterance is changed, otherwise each time it comes; null changes nothing.
        ctc_weight, next_token_weight, distillation_weight: see `mm.training.speech.SpeechObjective`. The paper has the
            second loss only.
        chat_template: see `mm.processor.Processor`.
        bundle: copy the language model into the run folder.
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
    bundle: bool = False
    device: str = "cpu"


def train_speech_adapter(config: TrainSpeechAdapter) -> None:
    """Train a speech encoder and a speech adapter for a frozen language model."""
    weights = {name: getattr(config, name) for name in ("ctc_weight", "next_token_weight", "distillation_weight")}
    check_loss_weights(**weights)  # before a language model is read for nothing
    model, processor, language_model = starting_point(config)
    objective = SpeechObjective(**weights)
    prepare = partial(prepared, processor=processor, config=config)
    train_adapters(model, processor, config, "speech adapter", only="speech_", objective=objective, prepare=prepare)
    if Ranks.current().is_main:
        bundle = config.bundle or language_model is None
        save(config.output, model, processor, language_model=None if bundle else language_model, bundle=bundle)


def starting_point(config: TrainSpeechAdapter) -> tuple[MultimodalModel, Processor, str | None]:
    """The model in FP32 with ears, its processor, and where its language model lies.

    Raises:
        UserError: nothing or too much to start from, no encoder, or one for a run that has its own; CTC for an adapter
            without a readout, or a new one with a readout that nothing aligns.
    """
    if (config.start_from is None) == (config.language_model is None):
        raise UserError(
            "name start_from, a run that gets ears or trains on, or language_model for a model that only hears; one "
            "of the two"
        )
    if config.start_from is not None:
        model, earlier = load(config.start_from, dtype=torch.float32)
        tokenizer, settings = earlier.tokenizer, earlier.settings()
        language_model = language_model_of(config.start_from)
    else:
        language_model = config.language_model
        loaded = mm.convert.llama.load(language_model, dtype=torch.float32)
        print(loaded.report)
        model = from_language_model(loaded, seed=config.training.seed)
        tokenizer, settings = mm.convert.llama.load_tokenizer(language_model), {}
    given = (config.encoder, config.speech_encoder)
    if model.speech_encoder is not None:
        if config.ctc_weight and not model.config.speech_adapter.ctc_readout:
            raise UserError(
                f"ctc_weight needs an adapter with a readout, and {config.start_from} has one without: leave it at 0, "
                "or align a new adapter with `ctc_readout: true` for the run or the language model that got that one"
            )
        if given != (None, None) or config.adapter != SpeechAdapterConfig():
            raise UserError(
                f"{config.start_from} brings its own speech encoder and adapter: leave `encoder`, `speech_encoder` and "
                "`adapter` out"
            )
    elif (config.encoder is None) == (config.speech_encoder is None):
        raise UserError(
            "give `encoder`, the shape of a new conformer, or `speech_encoder`, the place of one; one of the two"
        )
    elif config.adapter.ctc_readout != bool(config.ctc_weight):
        raise UserError(
            "a new adapter has a readout and CTC that aligns it, or neither: set both `adapter.ctc_readout: true` and "
            "ctc_weight, or none of them"
        )
    else:
        add_speech(model, encoder_of(config), config.adapter, seed=config.training.seed)
    augment = config.spec_augment
    if augment and augment.changes_sound and isinstance(model.speech_encoder, WhisperEncoder):
        raise UserError(
            "spec_augment: max_warp, max_gain and max_noise are for a conformer's features, and Whisper's are others: "
            "leave them out"
        )
    if config.chat_template is not None:
        settings["chat_template"] = config.chat_template
    processor = Processor(tokenizer, model.config, **settings)
    if config.encoder is not None:
        set_feature_statistics(model.speech_encoder, sounds_of(config, processor))
    return model, processor, language_model


def sounds_of(config: TrainSpeechAdapter, processor: Processor) -> list[Tensor]:
    """The features of some utterances of the data, each [T, num_mels]; of those in which nothing is said none, since
    digital silence lies far below any sound and would stretch the scale."""
    samples = readable_samples(RecordDataset(config.data, processor.record_example), config.statistics_samples)
    stops = {IGNORED, *processor.stop_tokens}
    return [mel for sample in samples if set(sample.labels) - stops for mel in sample.speech]


def prepared(record: Record, visit: int, processor: Processor, config: TrainSpeechAdapter) -> Sample:
    """A training sample, with its twin if it is distilled from; how its utterances are changed follows from record,
    visit (which time it comes, from 0) and seed."""
    sample = with_twin(record, processor) if config.distillation_weight else processor.record_example(record)
    if config.spec_augment is None:
        return sample
    generator = torch.Generator().manual_seed(seed_of(f"{config.training.seed}/{visit}/{record.id}"))
    return replace(sample, speech=[spec_augment(mel, config.spec_augment, generator) for mel in sample.speech])


def encoder_of(config: TrainSpeechAdapter) -> torch.nn.Module:
    """The encoder that the configuration names, in FP32."""
    if config.speech_encoder is not None:
        return load_speech_encoder(config.speech_encoder).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        return SpeechEncoder(config.encoder)


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(TrainSpeechAdapter, train_speech_adapter, argv, "train_speech_adapter")


if __name__ == "__main__":
    main()
