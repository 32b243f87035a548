"""Load tensors into a module strictly and without a copy, and report every name.

Every converter renames the tensors that it has read to the module's names, and then calls `load_tensors`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foundation.errors import UserError
from layers.sources import set_source

MAX_NAMES = 20  # names that a message lists before "and N more"
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoadingReport:
    """What became of every tensor of a file and every parameter of a module; commands print its `str`.

    Attributes:
        source: the file or folder.
        num_loaded: parameters that were loaded.
        missing: names of parameters that the file lacks.
        unexpected: names of tensors that the module does not have.
        reshaped: "name: [stored shape] -> [shape in the module]", where they differ.
        ignored: names of tensors that were left out on purpose, with the reason.
        notes: further remarks, such as a limited context.
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
    """Make `tensors` the parameters of a module without a copy; build the module on the meta device.

    A parameter that the module holds under two names (tied weights) is given once, under the first name, and stays
    tied.

    Args:
        tensors: by the module's names; names that it lacks are reported as unexpected.
        source: the file or folder, for messages.
        stored_name: the file's name of one of the module's parameters, for messages.
        reshaped, ignored, notes: for the report.

    Raises:
        UserError: tensors are missing, unexpected, of another shape, or not floating point; the message names them.
    """
    tied = _tied_names(module)
    expected = {name: tensor.shape for name, tensor in module.state_dict().items() if name not in tied}
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
    for name, tensor in found.items():
        if tensor.is_meta:
            set_source(module.get_parameter(name), tensor.source)  # type: ignore[attr-defined]  # it has one
    for name, first in tied.items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, module.get_parameter(first))
    return report


def _tied_names(module: nn.Module) -> dict[str, str]:
    """Further names of tied parameters -> the first name."""
    first_names: dict[int, str] = {}
    tied = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if first != name:
            tied[name] = first
    return tied


def _section(title: str, items: Iterable[str]) -> list[str]:
    items = list(items)
    if not items:
        return []
    more = [f"    and {len(items) - MAX_NAMES} more"] if len(items) > MAX_NAMES else []
    return [f"  {title} ({len(items)}):", *(f"    {item}" for item in items[:MAX_NAMES]), *more]
