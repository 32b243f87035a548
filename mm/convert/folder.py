"""Hugging Face folders, read without running anything in them, and written whole: JSON and safetensors, no pickles."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foundation.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json(path: str | Path) -> dict:
    """A JSON object from a file.

    Raises:
        UserError: no such file, or no JSON object in it.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}; an object is needed")
    return values


def read_config(folder: str | Path) -> tuple[dict, dict]:
    """A folder's config.json and its generation_config.json; the second is {} where there is none.

    Raises:
        UserError: not a folder, no config.json, or a file that is not valid JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; name the file itself to read {ggufs[0]}" if ggufs else ""
        raise UserError(f"{folder} has no config.json, so it is not a Hugging Face model folder{hint}")
    generation = folder / "generation_config.json"
    return read_json(folder / "config.json"), read_json(generation) if generation.is_file() else {}


def read_tensors(folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors file or shards, on the CPU.

    Args:
        dtype: floating-point tensors are converted one by one while they are read; None keeps them as stored.

    Raises:
        UserError: no safetensors files, a missing or damaged one, or a tensor that two shards hold.
    """
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(Path(folder)):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118  the file is no dict
                    if name in tensors:
                        raise UserError(f"{path} holds {name}, which another shard holds too")
                    tensor = file.get_tensor(name)
                    tensors[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}") from error
    return tensors


def _weight_files(folder: Path) -> list[Path]:
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
            raise UserError(f"{folder} lacks {', '.join(absent)}, named by {INDEX}; fetch the rest of the folder")
        return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickles:
        raise UserError(
            f"{folder} holds {pickles[0]}, a pickle, which could run code when read. Convert it once, where you trust "
            f'it: transformers.AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained("OUT")'
        )
    raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}")


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block succeeds, and vanishes when it fails.

    Raises:
        UserError: `folder` exists and holds something.
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


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Named tensors as one safetensors file, or as several and an index when they are more than `max_shard_bytes`."""
    shards: list[dict[str, int]] = []  # sizes by name
    waiting: dict[str, Tensor] = {}

    def write() -> None:
        save_file(waiting, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in waiting.items()})
        waiting.clear()

    for name, tensor in tensors:
        if waiting and sum(t.nbytes for t in waiting.values()) + tensor.nbytes > max_shard_bytes:
            write()
        waiting[name] = tensor.contiguous()
    write()
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / SINGLE)
        return
    weight_map = {}
    for number, sizes in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(folder / f"shard-{number}", folder / file)
        weight_map |= dict.fromkeys(sizes, file)
    total = sum(sum(sizes.values()) for sizes in shards)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
