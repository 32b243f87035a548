"""How tensors read from a file get into a module: strictly, without a second copy, and with a report by name.

Every converter ends here: it turns what it read into tensors under the module's own names and calls `load_tensors`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foundation.errors import UserError

MOST_NAMED = 20  # names that an error lists before it says "and N more"
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoadingReport:
    """What happened to every tensor of a file and every parameter of the module; `str` is what commands print.

    Attributes:
        source: the file or folder.
        num_loaded: parameters that were filled.
        missing: names that the module needs and the file lacks.
        unexpected: names in the file that the module has no place for.
        reshaped: "name: [stored shape] -> [shape in the module]", where the layout differs.
        ignored: names left out on purpose, with the reason.
        notes: what else the reader should know, e.g. a context that was limited.
    """

    source: str
    num_loaded: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    ignored: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.num_loaded} tensors loaded"]
        for title in ("missing", "unexpected", "reshaped", "notes"):
            lines += _section(title, getattr(self, title))
        lines += _section("left out", [f"{name} ({reason})" for name, reason in self.ignored.items()])
        return "\n".join(lines)


def load_tensors(
    module: nn.Module,
    tensors: dict[str, Tensor],
    *,
    source: object,
    stored_name: Callable[[str], str] = str,
    reshaped: Iterable[str] = (),
    ignored: dict[str, str] | None = None,
    notes: Iterable[str] = (),
) -> LoadingReport:
    """Make `tensors` the parameters of a module, best one built on the meta device: nothing is copied.

    Parameters that the module shares under two names are given once, under the first name, and stay shared.

    Args:
        tensors: by the module's names; a name that the module lacks is reported as unexpected.
        source: the file or folder, for messages.
        stored_name: turns a name of the module into the file's, for messages.
        reshaped, ignored, notes: what the converter did; they go into the report.

    Raises:
        UserError: missing or unexpected tensors, wrong shapes, or tensors that are not floating point, by name.
    """
    shared = _shared_names(module)
    expected = {name: tensor.shape for name, tensor in module.state_dict().items() if name not in shared}
    found = {name: tensor for name, tensor in tensors.items() if name in expected}
    report = LoadingReport(
        str(source),
        len(found),
        tuple(stored_name(name) for name in expected if name not in tensors),
        tuple(name for name in tensors if name not in expected),
        tuple(reshaped),
        dict(ignored or {}),
        tuple(notes),
    )
    misshapen = [
        f"{stored_name(name)}: {list(tensor.shape)} in the file, the model has {list(expected[name])}"
        for name, tensor in found.items()
        if tensor.shape != expected[name]
    ]
    mistyped = [f"{stored_name(name)}: {t.dtype}" for name, t in found.items() if t.dtype not in FLOATING]
    problems = _section("missing", report.missing) + _section("unexpected", report.unexpected)
    problems += _section("of another shape", misshapen) + _section("not plain floating point", mistyped)
    if problems:
        raise UserError("\n".join([f"{source} does not fit the model that its configuration describes:", *problems]))
    module.load_state_dict({name: tensor.contiguous() for name, tensor in found.items()}, strict=False, assign=True)
    for name, first in shared.items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, module.get_parameter(first))
    return report


def _shared_names(module: nn.Module) -> dict[str, str]:
    """Second names of parameters that the module holds under two, each with the first."""
    first_names: dict[int, str] = {}
    shared = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if first != name:
            shared[name] = first
    return shared


def _section(title: str, items: Iterable[str]) -> list[str]:
    items = list(items)
    if not items:
        return []
    more = [f"    and {len(items) - MOST_NAMED} more"] if len(items) > MOST_NAMED else []
    return [f"  {title} ({len(items)}):", *(f"    {item}" for item in items[:MOST_NAMED]), *more]
