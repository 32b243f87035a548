"""Reads the pairs of the webdataset tars of a raw pool, for `pool.py`."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shards.tars import KeyRule, Member, read_members, split_name

TEXTS = ("txt", "json")
_RULES: tuple[KeyRule, KeyRule] = ("first_dot", "last_dot")


@dataclass(frozen=True)
class TarPair:
    """A pair of a tar.

    Attributes:
        key: of its members.
        place: byte of the picture in the tar; 0 where it has none.
        picture: bytes; None where it is missing.
        caption: bytes, not yet decoded; None where it is missing.
        problem: of the pair, where its bytes do not show it.
    """

    key: str
    place: int
    picture: bytes | None
    caption: bytes | None
    problem: str | None


def read_pairs(path: Path, media: frozenset[str], unit: str, rule: KeyRule) -> Iterator[TarPair]:
    """Yields the pairs of a tar in their order.

    Consecutive members of one key in one tar are a pair; a second picture or text without a number begins the next.

    Args:
        media: suffixes of pictures, or of clips.
        unit: what those are called in the plural.
        rule: where a member's name is divided into key and suffix.

    Raises:
        tarfile.ReadError: the tar is corrupt or truncated; the pairs before that have been yielded.
        OSError: it cannot be read.
    """
    names = _Names(path, media)
    members: dict[str, Member] = {}
    sample = ("", 0)  # key, and the byte at which its tar begins
    broken: tarfile.ReadError | None = None
    with open(path, "rb") as file:
        try:
            for member in read_members(file, rule):
                is_repeated = member.suffix in members or (member.suffix in media and members.keys() & media)
                if members and (is_repeated or (member.key, member.tar) != sample):
                    yield _pair(members, media, unit, rule, names)
                    members = {}
                sample = member.key, member.tar
                members[member.suffix] = member
        except tarfile.ReadError as error:
            broken = error
    if members:
        yield _pair(members, media, unit, rule, names)
    if broken is not None:
        raise broken


def _pair(members: dict[str, Member], media: frozenset[str], unit: str, rule: KeyRule, names: "_Names") -> TarPair:
    pictures = [member for member in members.values() if _kind(member.name, media) == "picture"]
    text = members.get("txt") or members.get("json")
    caption, problem = None, f"several {unit} under one key" if len(pictures) > 1 else None
    if "txt" in members:
        caption = members["txt"].content
    elif "json" in members:
        try:
            value = json.loads(members["json"].content).get("caption")
            caption = value.encode() if isinstance(value, str) else None
        except (ValueError, AttributeError, RecursionError):
            problem = problem or "the json member is broken"
    links = [member.name for member in (*pictures[:1], text) if member is not None and member.is_link]
    if links:
        problem = f"a member is a link: {links[0]}; write the tar anew with --hard-dereference"
    elif not pictures or text is None:
        problem = names.where_the_rest_is(list(members.values()), pictures, text, rule) or problem
    picture = pictures[0] if pictures and not pictures[0].is_link else None
    key = next(iter(members.values())).key
    return TarPair(key, picture.place if picture else 0, picture.content if picture else None, caption, problem)


def _kind(name: str, media: frozenset[str]) -> str | None:
    suffix = name.rpartition(".")[2].lower()
    return "picture" if suffix in media else "text" if suffix in TEXTS else None


@dataclass(frozen=True)
class _Names:
    """The names of a tar's members, which are read where a pair lacks something, to say where that is."""

    path: Path
    media: frozenset[str]

    @cached_property
    def _by_key(self) -> dict[tuple[str, str, str], list[str]]:
        """(rule, key, kind) -> names."""
        found: dict[tuple[str, str, str], list[str]] = {}
        with open(self.path, "rb") as file:
            try:
                for member in read_members(file, contents=False):
                    kind = _kind(member.name, self.media)
                    for rule in _RULES if kind is not None else ():
                        split = split_name(member.name, rule)
                        assert split is not None and kind is not None  # it was a member
                        found.setdefault((rule, split[0], kind), []).append(member.name)
            except tarfile.ReadError:  # reading the pairs says so
                pass
        return found

    def where_the_rest_is(
        self, members: list[Member], pictures: list[Member], text: Member | None, rule: KeyRule
    ) -> str | None:
        """The problem of a pair whose text or picture is elsewhere in the tar; None where it is not.

        Args:
            members: of the pair.
            rule: by which they were put together.
        """
        lacks, have = ("text", pictures[:1]) if pictures else ("picture", [text] if text is not None else [])
        own = {member.name for member in members}
        for member in have:
            for other in (rule, *(other for other in _RULES if other != rule)):
                split = split_name(member.name, other)
                names = self._by_key.get((other, split[0], lacks), []) if split is not None else []
                name = next((name for name in names if other != rule or name not in own), None)
                if name is not None:
                    advice = f"set `key: {other}`" if other != rule else "write members of one sample one after another"
                    return f"its {lacks} came under another key: {name} is not with {member.name}; {advice}"
        return None
