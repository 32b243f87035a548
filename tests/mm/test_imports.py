"""Importing mm stays light: no package of an optional extra, no data preparation, nothing that takes a second."""

import subprocess
import sys

HEAVY = ("open_clip", "av", "cv2", "matplotlib", "decord", "ray", "torchvision", "torch._dynamo", "data_prep", "stages")


def test_importing_mm_imports_nothing_heavy():
    code = f"import sys, mm; print([name for name in {HEAVY!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_building_and_answering_do_not_import_the_compiler(run_folder):
    code = (
        f"import sys, mm; model, processor = mm.load({str(run_folder)!r}); "
        "mm.generate(model, processor, [{'role': 'user', 'content': 'hello'}], max_new_tokens=2); "
        "print('torch._dynamo' in sys.modules, 'torchvision' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
