"""Configuration files for tiny stages on coloured squares."""

from pathlib import Path

import pytest
import yaml

ENCODER = {
    "tile_size": 28,
    "patch_size": 14,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_gated_layers": 1,
    "num_heads": 2,
    "tap_points": [0, 1],
}
TEXT = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "context": 12, "embedding_size": 16}


def merged(values: dict, changes: dict) -> dict:
    """`values` with `changes`: nested dicts are merged (except `learning_rates`), everything else is replaced."""
    nested = {
        name: merged(values[name], change)
        for name, change in changes.items()
        if isinstance(change, dict) and name in values and name != "learning_rates"
    }
    return {**values, **changes, **nested}


@pytest.fixture
def adapter_config(squares, language_model_folder, encoder_folder, tmp_path):
    """adapter_config(**changes) -> (file, run folder) of the adapter stage."""
    values = {
        "output": str(tmp_path / "run"),
        "language_model": str(language_model_folder),
        "vision_encoder": str(encoder_folder),
        "data": [{"path": str(squares)}],
        "validation": {"path": str(squares), "split": "validation", "task": "vqa"},
        "adapter": {"positions": [2, 4, 6]},
        "training": {
            "steps": 8,
            "batch_size": 4,
            "learning_rates": {"language_model.*": None, "extra_embeddings": None, "*.gate_[af]*": 0.03, "*": 0.001},
            "warmup_steps": 2,
            "log_every": 1,
            "evaluate_every": 4,
            "save_every": 3,
            "workers": 0,
        },
    }
    return lambda **changes: written(tmp_path, merged(values, changes))


@pytest.fixture
def encoder_config(squares, tmp_path):
    """encoder_config(**changes) -> (file, run folder) of the encoder stage."""
    values = {
        "output": str(tmp_path / "encoder"),
        "data": [{"path": str(squares)}],
        "validation": {"path": str(squares), "split": "test"},
        "encoder": ENCODER,
        "text": TEXT,
        "max_tiles": 1,
        "training": {
            "steps": 8,
            "batch_size": 16,
            "learning_rates": {"*.gate_[af]*": 0.01, "*": 0.002},
            "log_every": 1,
            "evaluate_every": 4,
            "save_every": 3,
            "workers": 0,
        },
    }
    return lambda **changes: written(tmp_path, merged(values, changes))


def written(folder: Path, values: dict) -> tuple[Path, Path]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return file, Path(values["output"])
