"""A conformer learns from sound alone, by BEST-RQ (paper §8.2): it names the codes of what is masked. Or it spells.

The paper's encoder heard 15 million hours. With few, `transcripts` has it learn the letters of what is said, by CTC, in
a run of its own or after BEST-RQ: the paper has no such step. What comes out is an encoder folder that
`train_speech_adapter` starts from.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from foundation.errors import UserError
from mm.device import resolve_device
from mm.parallel.ranks import Ranks
from mm.processor import record_transcript
from mm.speech_encoders import load_speech_encoder, save_speech_encoder
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.data import DataSource, RecordDataset, readable_samples
from mm.training.sampler import seed_of
from mm.training.speech import set_statistics
from mm.training.speech_pretraining import (
    BestRqObjective,
    SpeechPretraining,
    SpellingEncoder,
    SpellingObjective,
    Transcribed,
    Utterance,
    spelling,
)
from mm.training.trainer import train
from shards.format import AUDIO, Record
from speech.augmentation import SpecAugmentConfig, spec_augment
from speech.best_rq import BestRqConfig
from speech.conformer import ConformerLayer, SpeechEncoder, SpeechEncoderConfig
from speech.features import FRAMES_PER_SECOND
from speech.reading import read_sound

# What may differ when an interrupted run is taken up again; `mm.training.trainer` judges `training` itself.
FREE_TO_CHANGE = ("output", "training", "device")


@dataclass
class PretrainSpeechEncoder:
    """What the stage needs.

    Attributes:
        output: folder of the run, and of the encoder at its end.
        data: shards with sound; of each record the first recording is heard, a random crop where it is longer than the
            encoder takes.
        encoder: shape of a new conformer; null with start_from, a folder of this stage whose encoder trains on.
        transcripts: learn the letters of what is said in place of BEST-RQ; records with more sound than the encoder
            takes, or other letters than Latin, Greek and Cyrillic, are left out.
        spec_augment: how what is spelt is changed each time it is heard; null changes nothing.
        best_rq: masks and codes, which are not kept.
        statistics_samples: so many recordings give a new conformer the mean and deviation of the features.
    """

    output: str
    data: list[DataSource]
    training: TrainingConfig
    encoder: SpeechEncoderConfig | None = None
    start_from: str | None = None
    transcripts: bool = False
    spec_augment: SpecAugmentConfig | None = None
    best_rq: BestRqConfig = field(default_factory=BestRqConfig)
    statistics_samples: int = 512
    device: str = "cpu"


def pretrain_speech_encoder(config: PretrainSpeechEncoder) -> None:
    """Train a speech encoder on sound alone, or on the letters of what is said; keep the encoder."""
    if config.training.tp_degree * config.training.pp_degree > 1:
        raise UserError("the encoder runs whole: leave training.tp_degree and training.pp_degree at 1")
    if config.transcripts and config.best_rq != BestRqConfig():
        raise UserError("best_rq has no part in a run with transcripts: true; leave one of them out")
    if config.spec_augment is not None and not config.transcripts:
        raise UserError("spec_augment is for transcripts: true; BEST-RQ hides parts of its own, so leave it out")
    device = resolve_device(config.device)
    torch.manual_seed(config.training.seed)
    encoder = starting_point(config)
    if config.transcripts:
        model, objective = SpellingEncoder(encoder), SpellingObjective()
        prepare = partial(prepared, encoder=encoder.config, augment=config.spec_augment, seed=config.training.seed)
    else:
        model, objective = SpeechPretraining(encoder, config.best_rq), BestRqObjective(config.best_rq)
        prepare = partial(utterance_of, encoder=encoder.config, seed=config.training.seed)
    dataset = RecordDataset(config.data, prepare, by_epoch=True)
    if config.start_from is None:
        plain = RecordDataset(config.data, partial(heard_of, encoder=encoder.config, transcripts=config.transcripts))
        known = readable_samples(plain, config.statistics_samples)
        set_statistics(encoder, [one.mel for one in known if isinstance(one, Utterance) or one.letters])
    output = Path(config.output)
    train(
        model,
        objective,
        dataset,
        config.training,
        output,
        name="speech encoder",
        device=device,
        checkpointed_modules=(ConformerLayer,),
        fsdp_modules=(ConformerLayer,),
        identity={name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE},
    )
    if Ranks.current().is_main:
        save_speech_encoder(output, encoder)


def starting_point(config: PretrainSpeechEncoder) -> SpeechEncoder:
    """A new encoder, or the one of an earlier run, in FP32.

    Raises:
        UserError: both or neither are asked for; the earlier one is no conformer.
    """
    if (config.encoder is None) == (config.start_from is None):
        raise UserError(
            "give `encoder`, the shape of a new conformer, or `start_from`, the folder of one; one of the two"
        )
    if config.encoder is not None:
        return SpeechEncoder(config.encoder)
    encoder = load_speech_encoder(config.start_from)
    if not isinstance(encoder, SpeechEncoder):
        raise UserError(f"{config.start_from} holds Whisper's encoder; this stage trains conformers")
    return encoder.float()


def sound_of(record: Record, encoder: SpeechEncoderConfig) -> Tensor:
    """The features of a record's first recording, [T, num_mels].

    Raises:
        UserError: there is none, or it cannot be read.
    """
    sounds = [data for name, data in record.media.items() if name.rpartition(".")[2] in AUDIO]
    if not sounds:
        raise UserError(f"record {record.id} holds no sound; its members are {', '.join(record.media) or 'none'}")
    return encoder.features(read_sound(sounds[0]))


def transcribed_of(record: Record, encoder: SpeechEncoderConfig) -> Transcribed:
    """A record's first recording with the letters of what is said in it.

    Raises:
        UserError: there is none, it cannot be read or is too long, other letters, or nobody knows what is said.
    """
    mel = sound_of(record, encoder)
    if len(mel) > encoder.max_mel_frames:
        raise UserError(f"{len(mel) / FRAMES_PER_SECOND:.1f} s are more than the encoder's {encoder.max_seconds} s")
    said = record_transcript(record)
    if said is None:
        raise UserError(f"record {record.id} does not tell what is said in it")
    return Transcribed(mel, spelling(said))


def heard_of(record: Record, encoder: SpeechEncoderConfig, transcripts: bool) -> Transcribed | Utterance:
    """A record as a new conformer's statistics are taken of it: whole or cut as in the first epoch, and not changed."""
    return transcribed_of(record, encoder) if transcripts else utterance_of(record, 0, encoder, seed=0)


def prepared(
    record: Record, visit: int, encoder: SpeechEncoderConfig, augment: SpecAugmentConfig | None, seed: int
) -> Transcribed:
    """What is heard of a record and the letters of what is said in it; how the sound is changed follows from record,
    visit (which time it comes, from 0) and seed.

    Raises:
        UserError: as `transcribed_of`.
    """
    sample = transcribed_of(record, encoder)
    if augment is None:
        return sample
    generator = torch.Generator().manual_seed(seed_of(f"{seed}/{visit}/{record.id}"))
    return Transcribed(spec_augment(sample.mel, augment, generator), sample.letters)


def utterance_of(record: Record, epoch: int, encoder: SpeechEncoderConfig, seed: int) -> Utterance:
    """A record's first recording; where it is cut and what is masked follow from record, epoch and seed.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    mel = sound_of(record, encoder)
    own = seed_of(f"{seed}/{epoch}/{record.id}")
    most = encoder.max_mel_frames
    if len(mel) > most:
        start = torch.randint(len(mel) - most + 1, (), generator=torch.Generator().manual_seed(own))
        mel = mel[start : start + most].clone()
    return Utterance(mel, own)


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(PretrainSpeechEncoder, pretrain_speech_encoder, argv, "pretrain_speech_encoder")


if __name__ == "__main__":
    main()
