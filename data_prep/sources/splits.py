"""Which side of a split a sample lies on: a hash of what it shows decides, so that all its copies are on one."""

import hashlib
from collections.abc import Iterable

from foundation.errors import UserError


def split_of(concept: str, validation: float, test: float) -> str:
    """ "train", "validation" or "test"; the two shares are of all concepts, the rest is for training.

    Depends on the concept's name alone: adding or removing others moves nothing.
    """
    place = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") / 2**64
    if place < validation:
        return "validation"
    return "test" if place < validation + test else "train"


def check_shares(validation: float, test: float) -> None:
    """UserError unless both are shares that leave something to train on."""
    if validation < 0 or test < 0 or validation + test >= 1:
        raise UserError(f"validation is {validation} and test {test}; they are shares, and 1 is not reached by both")


def join_concepts(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Joins concepts that share evidence, also by way of others.

    Args:
        pairs: (concept, evidence), e.g. (name, hash of the picture): two names of one picture are one concept.

    Returns:
        each concept -> the alphabetically first of the concepts it is joined to.
    """
    parents: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parents.setdefault(node, node) != node:
            parents[node] = node = parents[parents[node]]
        return node

    for concept, evidence in pairs:
        first, second = sorted((root(("concept", concept)), root(("evidence", evidence))))
        parents[second] = first
    return {name: root((kind, name))[1] for kind, name in list(parents) if kind == "concept"}
