"""What importing a stage brings with it."""

import subprocess
import sys

STAGES = [
    "finetune",
    "pretrain_speech_encoder",
    "sweep",
    "train_image_adapter",
    "train_speech_adapter",
    "train_video_adapter",
]
CHECK = """
import importlib, sys
for stage in sys.argv[1:]:
    importlib.import_module(f"stages.{stage}")
    assert "open_clip" not in sys.modules, f"{stage} imports open_clip"
importlib.import_module("stages.pretrain_image_encoder")
assert "open_clip" in sys.modules
"""


def test_only_image_encoder_pretraining_imports_open_clip():
    finished = subprocess.run([sys.executable, "-c", CHECK, *STAGES], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
