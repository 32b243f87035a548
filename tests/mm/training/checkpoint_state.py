"""Reads what a checkpoint says of its run, for comparisons of runs."""

import json
from pathlib import Path
from typing import Any


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint, without the seconds that training took: these differ from run to run."""
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["unlogged"]["totals"].pop("seconds") > 0
    return state
