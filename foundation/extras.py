"""Optional packages, imported where they are used: `import_extra` names the extra that installs a missing one."""

import importlib
from types import ModuleType

from foundation.errors import UserError

# Packages whose name on PyPI differs from the name that is imported by more than underscores.
_DISTRIBUTIONS = {"cv2": "opencv-python-headless", "faiss": "faiss-cpu"}


class MissingExtraError(UserError):
    """A package of an optional extra is not installed, or it does not load."""


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an optional extra.

    Args:
        module: name to import, such as "av" or "ray.exceptions".
        extra: the extra of this project that installs its package, such as "video".
        purpose: what needs it, for the message, such as "video".

    Raises:
        MissingExtraError: it cannot be imported; the message names the package and the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        package = _DISTRIBUTIONS.get(name, name.replace("_", "-"))
        raise MissingExtraError(f"{purpose} needs the package {package}: pip install 'mm-adapters[{extra}]'") from error
