import ast
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from foundation.errors import UserError
from foundation.extras import MissingExtraError, import_extra

ROOT = Path(__file__).parents[2]


def test_an_installed_module_is_imported():
    assert import_extra("json.decoder", "data", "a test") is sys.modules["json.decoder"]


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("rapidfuzz.distance", "rapidfuzz"),
        ("cv2", "opencv-python-headless"),
        ("whisper_normalizer", "whisper-normalizer"),
    ],
)
def test_a_missing_module_is_a_users_mistake_that_names_package_and_extra(module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as raised:
        import_extra(module, "speech", "an edit distance")
    assert isinstance(raised.value, UserError)
    for part in (f"package {package}:", "pip install 'mm-adapters[speech]'", "an edit distance"):
        assert part in str(raised.value)


def test_each_use_names_an_extra_that_has_the_package():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {name: value.replace("-", "_") for name, value in setup["options.extras_require"].items()}
    packages = {"cv2": "opencv_python_headless", "faiss": "faiss_cpu"}
    found = 0
    for path in [
        file for folder in ("data_prep", "mm", "speech", "video", "vision") for file in (ROOT / folder).rglob("*.py")
    ]:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "import_extra":
                continue
            module, extra = call.args[:2]
            if isinstance(module, ast.Constant):
                name = module.value.partition(".")[0]
                assert packages.get(name, name) in extras[extra.value], (
                    f"{path}: {name} is not in the extra {extra.value}"
                )
                found += 1
    assert found >= 12
