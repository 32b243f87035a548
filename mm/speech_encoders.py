"""Speech encoders alone: a folder like a run's with its one part, or Whisper's from OpenAI's own file."""

from dataclasses import asdict
from pathlib import Path

import torch

import mm.convert.whisper
from foundation.errors import UserError
from mm.convert.report import load_tensors
from mm.run_folder import (
    CONFIG_FILE,
    FORMAT,
    read_description,
    read_part,
    replaced_files,
    write_parts,
    write_yaml,
)
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from speech.whisper import WhisperEncoder, WhisperEncoderConfig


def save_speech_encoder(folder: str | Path, encoder: SpeechEncoder | WhisperEncoder) -> None:
    """Write a speech encoder alone, for `load_speech_encoder` and the speech adapter's stage."""
    with replaced_files(folder, last=CONFIG_FILE) as new:
        hashes = write_parts(new, {"speech_encoder": encoder.state_dict()})
        write_yaml(new / CONFIG_FILE, {"format": FORMAT, "speech_encoder": asdict(encoder.config), "parts": hashes})


def load_speech_encoder(path: str | Path) -> SpeechEncoder | WhisperEncoder:
    """A speech encoder from a folder of `save_speech_encoder`, from a run folder, or from a Whisper `.pt`.

    Raises:
        UserError: there is no whole encoder at that place.
    """
    path = Path(path)
    if path.suffix == ".pt":
        return mm.convert.whisper.load(path)
    description = read_description(path)
    values = description.get("speech_encoder") or description.get("model", {}).get("speech_encoder")
    if values is None:
        raise UserError(f"{path} holds no speech encoder")
    whisper = "kernel_size" not in values  # every field is written, and only a conformer has this one
    try:
        config = WhisperEncoderConfig(**values) if whisper else SpeechEncoderConfig(**values)
    except TypeError as error:
        raise UserError(f"{path / CONFIG_FILE} does not describe a speech encoder: {error}") from error
    with torch.device("meta"):
        encoder = WhisperEncoder(config) if whisper else SpeechEncoder(config)
    load_tensors(encoder, read_part(path, "speech_encoder", description), source=path)
    return encoder
