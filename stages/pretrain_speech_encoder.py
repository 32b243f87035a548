"""Trains a speech encoder by itself, with BEST-RQ (paper §8.2) or with CTC over the characters of transcripts.

    mm train pretrain_speech_encoder --config configs/speech/pretraining.yaml

A new conformer, or that of an earlier run, trains as a whole; BEST-RQ's quantiser is frozen. The paper pre-trains on 15
million hours of speech. For a few hours, `character_ctc: true` trains on transcripts instead, in a run of its own or
after BEST-RQ; the paper has no such step. The output is an encoder folder, from which `train_speech_adapter` starts.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from foundation.errors import UserError
from layers.meta import meta_device
from layers.sources import draw_later
from mm.config import ModelConfig
from mm.device import resolve_device
from mm.encoder_folders import load_speech_encoder, read_speech_encoder_shape, save_speech_encoder
from mm.modalities import AUDIO
from mm.parallel.process_group import Ranks
from mm.records import record_transcript
from mm.training.character_ctc import (
    CharacterCtcModel,
    CharacterCtcObjective,
    CharacterCtcShape,
    TranscribedUtterance,
    encode_characters,
)
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.data import DataSource, RecordDataset, readable_samples
from mm.training.devices import peak_rates
from mm.training.media import check_media, likely_indices
from mm.training.offload import refuse_frozen_savings
from mm.training.sampler import seed_of
from mm.training.speech import set_feature_statistics
from mm.training.speech_pretraining import (
    CHECKPOINTED_MODULES,
    FSDP_MODULES,
    BestRqObjective,
    PretrainingShape,
    SpeechPretraining,
    Utterance,
)
from mm.training.stage_shapes import PlannedStage
from mm.training.trainer import Trainer
from shards.format import Record
from speech.augmentation import SpecAugmentConfig, spec_augment
from speech.best_rq import BestRqConfig
from speech.conformer import SpeechEncoder, SpeechEncoderConfig, new_encoder
from speech.features import FRAMES_PER_SECOND
from speech.reading import read_sound

# Settings that may change when an interrupted run resumes; `mm.training.trainer` checks `training` itself.
NOT_IN_FINGERPRINT = ("output", "training", "device")


@dataclass
class PretrainSpeechEncoder:
    """Configuration of the stage.

    Attributes:
        output: folder of the run, and of the encoder at its end.
        data: shards with sound. The first recording of each record is used; where it is longer than the encoder takes,
            BEST-RQ draws a random crop of it.
        encoder: shape of a new conformer. start_from: in place of that, the folder of an earlier run of this stage,
            whose encoder trains on.
        character_ctc: train with CTC over the transcripts' characters in place of BEST-RQ. Records whose recording is
            longer than the encoder takes, or whose transcript has letters of other scripts than Latin, Greek and
            Cyrillic, are left out.
        spec_augment: augmentation of the features for character_ctc, drawn anew in each epoch; null: none.
        best_rq: masks and codebooks of BEST-RQ; the codebooks are not kept.
        statistics_samples: number of recordings from which a new conformer takes the features' mean and deviation.
        device: "auto" is CUDA where there is one, else the CPU.
    """

    output: str
    data: list[DataSource]
    training: TrainingConfig
    encoder: SpeechEncoderConfig | None = None
    start_from: str | None = None
    character_ctc: bool = False
    spec_augment: SpecAugmentConfig | None = None
    best_rq: BestRqConfig = field(default_factory=BestRqConfig)
    statistics_samples: int = 512
    device: str = "auto"


def pretrain_speech_encoder(config: PretrainSpeechEncoder) -> None:
    """Train a speech encoder with BEST-RQ, or with CTC over transcripts' characters."""
    check(config)
    refuse_frozen_savings(config.training)
    device = resolve_device(config.device)
    encoder = initial_encoder(config)
    build: Callable[[SpeechEncoder], nn.Module]
    objective: BestRqObjective | CharacterCtcObjective
    prepare: Callable[[Record, int], object]
    if config.character_ctc:
        build, objective = CharacterCtcModel, CharacterCtcObjective()
        prepare = partial(
            augmented_utterance, encoder=encoder.config, augment=config.spec_augment, seed=config.training.seed
        )
    else:
        build, objective = partial(SpeechPretraining, config=config.best_rq), BestRqObjective(config.best_rq)
        prepare = partial(masked_utterance, encoder=encoder.config, seed=config.training.seed)
    with meta_device() as initial:
        model = build(encoder)
    draw_later(model, initial.of(model), config.training.seed)
    objective.flops = partial(objective.batch_flops, encoder=encoder.config)
    dataset = RecordDataset(config.data, prepare, by_epoch=True)
    check_media(dataset, AUDIO, shown=lambda record: bool(AUDIO.suffixes(record.media)))
    if config.start_from is None:
        set_feature_statistics(encoder, unaugmented_features(config, encoder.config))
    output = Path(config.output)
    Trainer(
        model,
        objective,
        dataset,
        config.training,
        output,
        name="speech encoder",
        device=device,
        checkpointed_modules=CHECKPOINTED_MODULES,
        fsdp_modules=FSDP_MODULES,
        peak_rates=peak_rates(device, config.training.precision, config.training.peak_tflops),
        identity={name: value for name, value in asdict(config).items() if name not in NOT_IN_FINGERPRINT},
    ).run()
    save_speech_encoder(output, encoder, write=Ranks.current().is_main)


def check(config: PretrainSpeechEncoder) -> None:
    """Check settings that exclude each other.

    Raises:
        UserError: two of them do.
    """
    if config.training.tp * config.training.pp > 1:
        raise UserError("this stage has no tensor or pipeline parallelism: leave training.tp and training.pp at 1")
    if config.character_ctc and config.best_rq != BestRqConfig():
        raise UserError("best_rq has no part in a run with character_ctc: true; leave one of them out")
    if config.spec_augment is not None and not config.character_ctc:
        raise UserError("spec_augment is for character_ctc: true; BEST-RQ has masks of its own, so leave it out")
    if (config.encoder is None) == (config.start_from is None):
        raise UserError(
            "give `encoder`, the shape of a new conformer, or `start_from`, the folder of one; one of the two"
        )


def planned(config: PretrainSpeechEncoder, model: ModelConfig | None = None) -> PlannedStage:
    """The stage for `mm plan`. Args: model: shapes in place of the encoder's."""
    encoder: object = config.encoder
    if model is not None:
        encoder = model.speech_encoder
    elif config.start_from is not None:
        encoder = read_speech_encoder_shape(config.start_from)
    if not isinstance(encoder, SpeechEncoderConfig):
        raise UserError("give `encoder`, the shape of a new conformer, or start_from, an earlier run with one")
    shape = CharacterCtcShape(encoder) if config.character_ctc else PretrainingShape(encoder, best_rq=config.best_rq)
    return PlannedStage(shape, AUDIO, max_seconds=encoder.max_seconds)


def initial_encoder(config: PretrainSpeechEncoder) -> SpeechEncoder:
    """A new encoder, or that of an earlier run.

    Raises:
        UserError: the earlier encoder is not a conformer.
    """
    if config.start_from is None:
        assert config.encoder is not None
        return new_encoder(config.encoder, config.training.seed)
    encoder = load_speech_encoder(config.start_from)
    if not isinstance(encoder, SpeechEncoder):
        raise UserError(f"{config.start_from} holds Whisper's encoder; this stage trains conformers")
    return encoder


def unaugmented_features(config: PretrainSpeechEncoder, encoder: SpeechEncoderConfig) -> list[Tensor]:
    """The features of `statistics_samples` recordings, each [T, num_mels], without augmentation.

    With character_ctc, recordings with an empty transcript are left out: they may be digital silence, whose features
    lie far below those of any sound.
    """
    unaugmented: Callable[[Record], Utterance | TranscribedUtterance]
    unaugmented = partial(masked_utterance, epoch=0, encoder=encoder, seed=0)
    if config.character_ctc:
        unaugmented = partial(transcribed_utterance, encoder=encoder)
    dataset = RecordDataset(config.data, unaugmented)
    samples = readable_samples(dataset, config.statistics_samples, likely_indices(dataset, AUDIO))
    return [sample.mel for sample in samples if isinstance(sample, Utterance) or sample.characters]


def recording_features(record: Record, encoder: SpeechEncoderConfig) -> Tensor:
    """The features of a record's first recording, [T, num_mels].

    Raises:
        UserError: the record has no recording, or it cannot be read.
    """
    recordings = [record.media[suffix] for suffix in AUDIO.suffixes(record.media)]
    if not recordings:
        raise UserError(f"record {record.id} holds no sound; its members are {', '.join(record.media) or 'none'}")
    return encoder.features(read_sound(recordings[0]))


def masked_utterance(record: Record, epoch: int, encoder: SpeechEncoderConfig, seed: int) -> Utterance:
    """A BEST-RQ sample of a record; its crop and its masks are a function of record, epoch and seed.

    Raises:
        UserError: as `recording_features`.
    """
    mel = recording_features(record, encoder)
    sample_seed = seed_of(f"{seed}/{epoch}/{record.id}")
    excess = len(mel) - encoder.max_mel_frames
    if excess > 0:
        start = torch.randint(excess + 1, (), generator=torch.Generator().manual_seed(sample_seed))
        mel = mel[start : start + encoder.max_mel_frames].clone()
    return Utterance(mel, sample_seed)


def transcribed_utterance(record: Record, encoder: SpeechEncoderConfig) -> TranscribedUtterance:
    """A record's first recording with its transcript's characters.

    Raises:
        UserError: the recording is too long, its transcript is not known or has other letters, or as
            `recording_features`.
    """
    mel = recording_features(record, encoder)
    if len(mel) > encoder.max_mel_frames:
        raise UserError(f"{len(mel) / FRAMES_PER_SECOND:.1f} s are more than the encoder's {encoder.max_seconds} s")
    transcript = record_transcript(record)
    if transcript is None:
        raise UserError(f"record {record.id} has no transcript")
    return TranscribedUtterance(mel, encode_characters(transcript))


def augmented_utterance(
    record: Record, visit: int, encoder: SpeechEncoderConfig, augment: SpecAugmentConfig | None, seed: int
) -> TranscribedUtterance:
    """A training sample for character_ctc; its augmentation is a function of record, visit and seed.

    Args:
        visit: how often the record came before, over all epochs.

    Raises:
        UserError: as `transcribed_utterance`.
    """
    sample = transcribed_utterance(record, encoder)
    if augment is None:
        return sample
    generator = torch.Generator().manual_seed(seed_of(f"{seed}/{visit}/{record.id}"))
    return TranscribedUtterance(spec_augment(sample.mel, augment, generator), sample.characters)


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(PretrainSpeechEncoder, pretrain_speech_encoder, argv, "pretrain_speech_encoder")


if __name__ == "__main__":
    main()
