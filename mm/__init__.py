"""mm-adapters: eyes and ears for a frozen language model.

model, processor = mm.load("runs/demo")
print(mm.generate(model, processor, messages, max_new_tokens=64))
"""

from typing import TYPE_CHECKING, Any

import vision.tiling as _tiling  # noqa: F401  scripts reach vision.tiling after `import mm` alone
from mm.batch import Batch, Sample, collate
from mm.config import ModelConfig, preset
from mm.generation import generate, generate_tokens, stream
from mm.model import MultimodalModel
from mm.processor import Processor
from mm.run_folder import load

if TYPE_CHECKING:
    from mm.evaluation.attention_maps import attention_maps

__all__ = [
    "Batch",
    "ModelConfig",
    "MultimodalModel",
    "Processor",
    "Sample",
    "attention_maps",
    "collate",
    "generate",
    "generate_tokens",
    "load",
    "preset",
    "stream",
]


def __getattr__(name: str) -> Any:
    """`attention_maps`, imported when it is asked for: answering needs no evaluation."""
    if name == "attention_maps":
        from mm.evaluation.attention_maps import attention_maps

        return attention_maps
    raise AttributeError(f"module 'mm' has no attribute {name!r}")
