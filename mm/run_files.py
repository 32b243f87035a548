"""The files of a run folder, or of an encoder alone: its description, and one safetensors file per part.

`config.yaml` is the description. It is written last, so that a folder with it is complete. Its fields:

    format          2; `_upgrade` is the one function that reads format 1
    kind            "model", "vision_encoder" or "speech_encoder": what the folder holds
    model           configurations of all parts (`mm.config.to_dict`); of an encoder alone: its own, under its name
    processor       settings of the processor; only of a model
    language_model  path and SHA-256 of the frozen LM; null where the folder holds it; only of a model
    parts           SHA-256 of each part's file
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foundation.errors import UserError
from foundation.hashing import file_sha256, files_sha256
from layers.sources import needs_all_ranks, read
from mm.convert.safetensors_writer import file_order, write_safetensors

FORMAT = 2
CONFIG_FILE = "config.yaml"
ENCODERS = {"vision_encoder": "image encoder", "speech_encoder": "speech encoder"}  # kinds of folders besides "model"
# Fields of configurations whose names changed since format 1, by the part that holds them.
FORMAT_1_NAMES = {
    "speech_adapter": {"readout": "ctc_readout"},
    "aggregator": {"num_waves": "num_time_frequencies"},
}

Description = dict[str, Any]


@contextmanager
def replaced_files(folder: str | Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files are moved into `folder` when the block succeeds, the file `last` at the end.

    The old file `last` is removed first, so that a folder with it is always complete. After an error nothing new stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".new-*"):  # of a process that was killed
        shutil.rmtree(leftover)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        yield new
        (folder / last).unlink(missing_ok=True)
        for entry in sorted(new.iterdir(), key=lambda entry: entry.name == last):
            target = folder / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def hash_weights(path: str | Path) -> str:
    """SHA-256 of a GGUF file, or of a folder's safetensors files taken in the order of their names.

    Raises:
        UserError: neither a file nor a folder with such files.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} is neither a file nor a folder with safetensors files")
    return files_sha256(files)


def write_parts(folder: Path, parts: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    """Write each part's tensors to its file, one after another; return the files' SHA-256."""
    hashes = {}
    for name, state in parts.items():
        file = folder / f"{name}.safetensors"
        write_safetensors(file, state)
        hashes[name] = file_sha256(file)
    return hashes


def take_part(parts: dict[str, dict[str, Tensor]]) -> None:
    """What `write_parts` needs of the ranks that do not write: they read the tensors that all ranks read together."""
    for state in parts.values():
        for name in file_order(state):
            if needs_all_ranks(state[name]):
                read(state[name])


def read_part(folder: Path, name: str, description: Description) -> dict[str, Tensor]:
    """A part's tensors, memory-mapped.

    Raises:
        UserError: its file is missing, or is not the one that the description was written with.
    """
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        raise UserError(f"{folder} is incomplete: {file.name} is missing; write the run anew")
    if file_sha256(file) != description["parts"].get(name):
        raise UserError(f"{file} is not what {CONFIG_FILE} describes: it was damaged or replaced; write the run anew")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def write_description(folder: Path, kind: str, **values: Any) -> None:
    """Write the description of a folder.

    Args:
        kind: what the folder holds, see above. values: the other fields, in order.
    """
    plain = json.loads(json.dumps({"format": FORMAT, "kind": kind, **values}))  # tuples as lists
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")


def read_description(folder: str | Path) -> Description:
    """The description of a run folder or of an encoder alone, in the present format.

    Raises:
        UserError: there is none, or it is not complete.
    """
    folder = Path(folder)
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UserError(why_not_a_model(folder))
    try:
        description = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(description, dict) or description.get("format") not in (1, FORMAT):
        raise UserError(f"{file} is not a run of format {FORMAT} or of format 1")
    if description["format"] == 1:
        description = _upgrade(description)
    if not isinstance(description.get("parts"), dict):  # the last entry
        raise UserError(f"{file} is not complete: it does not list its parts; write the run anew")
    if description.get("kind") not in ("model", *ENCODERS):
        raise UserError(f"{file} has kind {description.get('kind')!r}; it can be {', '.join(('model', *ENCODERS))}")
    if description["kind"] == "model" and not (
        all(isinstance(description.get(name), dict) for name in ("model", "processor"))
        and "language_model" in description
    ):
        raise UserError(f"{file} is not complete: it lacks the processor or the language model; write the run anew")
    return description


def _upgrade(description: Description) -> Description:
    """A description of format 1 as format 2: with the kinds written down, and fields under their present names."""

    def upgrade(name: str, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if name == "speech_encoder":  # format 1 wrote every field, and only the conformer has this one
            values = {"kind": "conformer" if "kernel_size" in values else "whisper", **values}
        new_names = FORMAT_1_NAMES.get(name, {})
        return {new_names.get(field, field): upgrade(field, value) for field, value in values.items()}

    kind = next((name for name in ("model", *ENCODERS) if name in description), "model")
    fields = {name: upgrade(name, value) for name, value in description.items() if name != "format"}
    return {"format": FORMAT, "kind": kind, **fields}


def why_not_a_model(folder: Path) -> str:
    """What a folder without a model is, and what to do, as an error message."""
    if not folder.is_dir():
        return f"there is no folder {folder}; `make demo` makes runs/demo, `mm train` makes others"
    if any(folder.glob("checkpoints/*")):
        return (
            f"{folder} holds a training run that has not finished: no {CONFIG_FILE}; run the same `mm train` command "
            "again and it resumes"
        )
    return f"{folder} is neither a run folder ({CONFIG_FILE}) nor a Llama 3.2 Vision folder (config.json of mllama)"
