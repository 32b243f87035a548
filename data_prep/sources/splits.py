"""Assigns samples to splits by a hash of what they show, so that copies are in one split."""

import hashlib
from collections.abc import Iterable

from foundation.errors import UserError


def split_of(concept: str, validation: float, test: float) -> str:
    """The split of a concept: "train", "validation" or "test".

    It depends on the concept's name and the shares alone, and not on other concepts.

    Args:
        concept: name of what a sample shows.
        validation, test: shares of all concepts; the rest is for training.
    """
    position = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") / 2**64
    if position < validation:
        return "validation"
    return "test" if position < validation + test else "train"


def check_shares(validation: float, test: float) -> None:
    """Raises UserError unless both are shares from 0 and their sum is below 1."""
    if validation < 0 or test < 0 or validation + test >= 1:
        raise UserError(f"validation is {validation} and test {test}; both must be at least 0 and their sum below 1")


def join_concepts(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Joins concepts that share evidence, directly or through other concepts (union-find).

    Args:
        pairs: (concept, evidence), such as (name, hash of the picture): two names of one picture are one concept.

    Returns:
        each concept -> the alphabetically first of the concepts that it is joined with.
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
