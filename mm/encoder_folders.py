"""Encoders alone: a folder with one part, in the form of a run folder (`mm.run_files`), or Whisper's own file."""

from pathlib import Path
from typing import Any

import mm.convert.whisper
from foundation.errors import UserError
from layers.meta import meta_device
from mm.config import from_dict, to_dict
from mm.convert.report import load_tensors
from mm.model import build_speech_encoder
from mm.run_files import (
    CONFIG_FILE,
    ENCODERS,
    Description,
    read_description,
    read_part,
    replaced_files,
    take_part,
    write_description,
    write_parts,
)
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from speech.whisper import WhisperEncoder, WhisperEncoderConfig
from vision.encoder import VisionEncoder, VisionEncoderConfig, at_tile_size


def save_vision_encoder(folder: str | Path, encoder: VisionEncoder, write: bool = True) -> None:
    """Write an image encoder alone, for `load_vision_encoder` and the image adapter's stage.

    Args:
        write: see `mm.run_folder.save`.
    """
    _save(folder, "vision_encoder", encoder, write)


def save_speech_encoder(folder: str | Path, encoder: SpeechEncoder | WhisperEncoder, write: bool = True) -> None:
    """Write a speech encoder alone, for `load_speech_encoder` and the speech adapter's stage.

    Args:
        write: see `mm.run_folder.save`.
    """
    _save(folder, "speech_encoder", encoder, write)


def load_vision_encoder(folder: str | Path, tile_size: int | None = None) -> VisionEncoder:
    """An image encoder from a folder of `save_vision_encoder` or from a run folder.

    Args:
        tile_size: another tile size than the stored one, in pixels; the position tables are resized.

    Raises:
        UserError: the folder holds no complete encoder.
    """
    folder = Path(folder)
    description = read_description(folder)
    with meta_device():
        encoder = VisionEncoder(read_vision_encoder_shape(folder))
    load_tensors(encoder, read_part(folder, "vision_encoder", description), source=folder)
    return encoder if tile_size is None else at_tile_size(encoder, tile_size)


def read_vision_encoder_shape(folder: str | Path) -> VisionEncoderConfig:
    """The configuration of the encoder that `load_vision_encoder` would load, without its weights.

    Raises:
        UserError: as `load_vision_encoder`.
    """
    folder = Path(folder)
    return _config(folder, read_description(folder), "vision_encoder", VisionEncoderConfig)


def load_speech_encoder(path: str | Path) -> SpeechEncoder | WhisperEncoder:
    """A speech encoder from a folder of `save_speech_encoder`, from a run folder, or from a Whisper `.pt` file.

    Raises:
        UserError: there is no complete encoder at that place.
    """
    path = Path(path)
    if path.suffix == ".pt":
        return mm.convert.whisper.load(path)
    description = read_description(path)
    with meta_device():
        encoder = build_speech_encoder(read_speech_encoder_shape(path))
    load_tensors(encoder, read_part(path, "speech_encoder", description), source=path)
    return encoder


def read_speech_encoder_shape(path: str | Path) -> SpeechEncoderConfig | WhisperEncoderConfig:
    """The configuration of the encoder that `load_speech_encoder` would load.

    Raises:
        UserError: as `load_speech_encoder`.
    """
    path = Path(path)
    if path.suffix == ".pt":
        return mm.convert.whisper.load(path).config
    return _config(path, read_description(path), "speech_encoder", SpeechEncoderConfig | WhisperEncoderConfig)


def _save(folder: str | Path, part: str, encoder: VisionEncoder | SpeechEncoder | WhisperEncoder, write: bool) -> None:
    parts = {part: encoder.state_dict(keep_vars=True)}
    if not write:
        take_part(parts)
        return
    with replaced_files(folder, last=CONFIG_FILE) as new:
        hashes = write_parts(new, parts)
        write_description(new, part, **{part: to_dict(encoder.config), "parts": hashes})


def _config(folder: Path, description: Description, part: str, config_class: Any) -> Any:
    values = description.get(part) or description.get("model", {}).get(part)
    if values is None:
        raise UserError(f"{folder} holds no {ENCODERS[part]}")
    try:
        return from_dict(values, config_class)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG_FILE} does not describe its {ENCODERS[part]}: {error}") from error
