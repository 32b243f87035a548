"""A conformer learns from sound alone, by BEST-RQ (paper §8.2): it names the codes of what is masked.

The paper's encoder heard 15 million hours. What comes out is an encoder folder that `train_speech_adapter` starts from.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from mm.config import usable_device
from mm.speech_encoders import save_speech_encoder
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.data import RecordDataset, Source, readable_samples
from mm.training.loop import train
from mm.training.order import seed_of
from mm.training.parallel import Ranks
from mm.training.speech import BestRqObjective, SpeechPretraining, Utterance, set_statistics
from shards.format import AUDIO, Record
from speech.best_rq import BestRqConfig
from speech.conformer import ConformerLayer, SpeechEncoder, SpeechEncoderConfig
from speech.reading import read_sound

# What may differ when an interrupted run is taken up again; `mm.training.loop` judges `training` itself.
FREE_TO_CHANGE = ("output", "training", "device")


@dataclass
class PretrainSpeechEncoder:
    """What the stage needs.

    Attributes:
        output: folder of the run, and of the encoder at its end.
        data: shards with sound; of each record the first recording is heard, a random crop where it is longer than the
            encoder takes.
        encoder: shape of the conformer. best_rq: masks and codes, which are not kept.
        statistics_samples: so many recordings give the mean and deviation of the features.
    """

    output: str
    data: list[Source]
    training: TrainingConfig
    encoder: SpeechEncoderConfig = field(default_factory=SpeechEncoderConfig)
    best_rq: BestRqConfig = field(default_factory=BestRqConfig)
    statistics_samples: int = 512
    device: str = "cpu"


def pretrain_speech_encoder(config: PretrainSpeechEncoder) -> None:
    """Train a speech encoder on recordings without words; keep the encoder."""
    if config.training.tensor_ranks * config.training.pipeline_ranks > 1:
        raise ValueError("the encoder runs whole: leave training.tensor_ranks and training.pipeline_ranks at 1")
    device = usable_device(config.device)
    torch.manual_seed(config.training.seed)
    model = SpeechPretraining(SpeechEncoder(config.encoder), config.best_rq)
    prepare = partial(utterance_of, encoder=config.encoder, seed=config.training.seed)
    dataset = RecordDataset(config.data, prepare, by_epoch=True)
    known = readable_samples(dataset, config.statistics_samples)
    set_statistics(model.speech_encoder, [utterance.mel for utterance in known])
    output = Path(config.output)
    train(
        model,
        BestRqObjective(config.best_rq),
        dataset,
        config.training,
        output,
        name="speech encoder",
        device=device,
        layers=(ConformerLayer,),
        units=(ConformerLayer,),
        identity={name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE},
    )
    if Ranks.here().first:
        save_speech_encoder(output, model.speech_encoder)


def utterance_of(record: Record, epoch: int, encoder: SpeechEncoderConfig, seed: int) -> Utterance:
    """A record's first recording; where it is cut and what is masked follow from record, epoch and seed.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    sounds = [data for name, data in record.media.items() if name.rpartition(".")[2] in AUDIO]
    if not sounds:
        raise ValueError(f"record {record.id} holds no sound; its members are {', '.join(record.media) or 'none'}")
    mel = encoder.features(read_sound(sounds[0]))
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
