"""Read and write Hugging Face folders: JSON and safetensors only, no pickles, so no code of a folder runs."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foundation.errors import UserError
from mm.convert.safetensors_writer import write_safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: the file cannot be read, or holds no JSON object.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}; it must hold an object")
    return values


def read_config(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a folder's config.json and generation_config.json; the second is {} if the file is missing.

    Raises:
        UserError: it is not a folder, has no config.json, or a file is not valid JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; to read {ggufs[0]}, give the path of the file" if ggufs else ""
        raise UserError(f"{folder} has no config.json, so it is not a Hugging Face model folder{hint}")
    generation = folder / "generation_config.json"
    return read_json(folder / "config.json"), read_json(generation) if generation.is_file() else {}


def read_tensors(folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read all tensors of a folder's safetensors file or shards, to the CPU.

    Args:
        dtype: of floating-point tensors, which are converted as they are read; None keeps the stored one.

    Raises:
        UserError: there are no safetensors files, one is missing or damaged, or two shards hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(Path(folder)):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118  the file is not a dict
                    if name in tensors:
                        raise UserError(f"{path} holds {name}, and so does another shard")
                    tensor = file.get_tensor(name)
                    tensors[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}") from error
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        foreign = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if foreign:
            raise UserError(f"{folder / INDEX} names {foreign[0]!r}, which is not a safetensors file of this folder")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(f"{folder} lacks {', '.join(absent)}, named by {INDEX}; download the rest of the folder")
        return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickles:
        raise UserError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when it is read. If you trust it, convert it: "
            f'transformers.AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained("OUT")'
        )
    raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}")


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder, renamed to `folder` when the block succeeds, and deleted when it fails.

    Raises:
        UserError: `folder` exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield new
        new.chmod(0o755)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write named tensors as one safetensors file, or as shards of at most `max_shard_bytes` with an index.

    The tensors are read one after another (`layers.sources`).
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0], {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
