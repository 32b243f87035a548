"""Sound: mel features of an utterance; a start mark, one placeholder token per 80 ms, an end mark."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from foundation.errors import UserError
from mm.config import ModelConfig
from mm.modalities.modality import MediaLimits, Modality
from shards.format import AUDIO as AUDIO_SUFFIXES
from speech.adapter import num_tokens
from speech.reading import read_sound

MEL_FRAMES_PER_SECOND = 100


def read(source: str | Path | bytes | Tensor, config: ModelConfig, limits: MediaLimits) -> Tensor:
    """A sound file, or what `read_sound` gives -> the features of the model's speech encoder, float32 [T, num_mels]."""
    assert config.speech_encoder is not None
    sound = source if isinstance(source, Tensor) else read_sound(source)
    try:
        return config.speech_encoder.features(sound)
    except ValueError as error:
        name = "sound" if isinstance(source, bytes | Tensor) else source
        raise UserError(f"{name}: {error}") from error


def tokens(mel: Tensor, config: ModelConfig) -> list[int]:
    """The start mark, the placeholders and the end mark of an utterance."""
    placeholders = [config.audio_token_id] * num_tokens(len(mel))
    return [config.speech_start_id, *placeholders, config.speech_end_id]


def one_mel_frame(config: ModelConfig) -> Tensor:
    """One mel frame of zeros."""
    assert config.speech_encoder is not None
    return torch.zeros(1, config.speech_encoder.num_mels)


def quantities(speech: Sequence[Tensor]) -> dict[str, float]:
    """Seconds of sound."""
    return {"audio_seconds": sum(map(len, speech)) / MEL_FRAMES_PER_SECOND}


AUDIO = Modality(
    name="audio",
    plural="utterances",
    field="speech",
    part="speech_encoder",
    runs=("speech_encoder", "speech_adapter"),
    index_column="duration",
    suffixes=lambda members: [suffix for suffix in members if suffix.rpartition(".")[2] in AUDIO_SUFFIXES],
    read=read,
    token_id=lambda config: config.audio_token_id,
    num_tokens=lambda mel: num_tokens(len(mel)),
    tokens=tokens,
    dummy=one_mel_frame,
    quantities=quantities,
)
