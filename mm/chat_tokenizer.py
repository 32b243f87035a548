"""Rendered conversations into tokens, in one pass; control tokens count only where the chat template wrote them.

A copy of the tokenizer knows each control token, and each medium's mark, under an alias that no text can spell. The
aliases take the place of what the template wrote, and the whole text is tokenised at once. So the tokens are those that
the tokenizer itself gives the rendered text, except that a control token spelled in a message is text.
"""

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Model
from transformers import PreTrainedTokenizerBase

from foundation.errors import UserError

# Noncharacters: valid in strings, never part of a text by Unicode's rules, and untouched by normalisation.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# Answers begin like one of these; see `ChatTokenizer.answer_start`.
FIRST_WORDS = ("The", "a", "I", "1")
MAX_TAIL, MAX_STARTS = 100, 1_000  # characters and number of the prompts' ends that are remembered
MARK_ID = -1  # in the place of a medium's mark, which has no token


def unguessable() -> str:
    """A string that no text holds: 60 random bits, spelled in noncharacters."""
    return "".join(secrets.choice(NONCHARACTERS) for _ in range(12))


@dataclass(frozen=True)
class Span:
    """A control token or a medium's mark in a text, `text[start:end]`; its name is what it spells, or the mark."""

    start: int
    end: int
    name: str


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation, and what of it the template wrote as control tokens or in the place of media."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text. T: their number.

    Attributes:
        ids: int64 [T]; MARK_ID for a medium's mark.
        starts, ends: int64 [T]; a token's characters in the text are `text[start:end]`. Tokens that share a character
            have the same range.
        names: place in the tokens -> name of the span there; without an entry for text.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    names: dict[int, str]


@dataclass(frozen=True)
class _Copy:
    """A copy of a tokenizer, with aliases in place of the control tokens.

    Attributes:
        ids: the copy's ids of added tokens -> those of the tokenizer; MARK_ID for a mark.
        aliases: the copy's ids of aliases -> what they stand for.
        spellable: ids by which its model spells control tokens in a text.
    """

    tokenizer: Tokenizer
    ids: dict[int, int]
    aliases: dict[int, str]
    spellable: set[int]


class ChatTokenizer:
    """Tokenises rendered conversations.

    Args:
        tokenizer: a fast one.
        control_tokens: texts of the added tokens that count only where the chat template writes them.
        marks: texts that stand for media, each with the added token that it stands for, or None.

    Raises:
        UserError: the tokenizer is not a fast one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, control_tokens: Iterable[str], marks: Mapping[str, str | None]
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError(
                f"the tokenizer is a {type(tokenizer).__name__}, which does not say where its tokens stand in a text; "
                "give the model a tokenizer.json"
            )
        self._backend = backend
        self._marks = dict(marks)
        self._controls = sorted(set(control_tokens))
        names = [*self._controls, *self._marks]
        first = unguessable()
        assert len(names) < 32**3
        self._aliases = {name: first + _spell(index) for index, name in enumerate(names)}
        longest_first = sorted(names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._control_pattern = re.compile(
            "|".join(re.escape(n) for n in longest_first if n in self._controls) or "(?!)"
        )
        # Only a model whose own vocabulary has a control token can spell it; the unknown token is spelled by design.
        unknown = getattr(backend.model, "unk_token", None) or tokenizer.unk_token
        model_ids = (backend.model.token_to_id(name) for name in self._controls if name != unknown)
        self._spellable = {id for id in model_ids if id is not None}
        self._starts: dict[tuple[str, str], int] = {}  # of answers, by the prompt's last control token and what follows

    def find(self, text: str, hidden: Sequence[int] = ()) -> list[Span]:
        """The control tokens and marks in a rendered text.

        Args:
            hidden: sorted positions; a control token around one of them is text.
        """
        spans, position = [], 0
        while match := self._pattern.search(text, position):
            start, position = match.span()
            if bisect_right(hidden, start) < bisect_right(hidden, position):
                position = start + 1
            else:
                spans.append(Span(start, position, match[0]))
        return spans

    def hidden_positions(self, text: str) -> list[int]:
        """Positions in a message's text, one inside each control token that it spells or begins to spell at its end.

        A position lies after the first character, so that the template's stripping of white space is not disturbed.
        """
        positions, position = [], 0
        while match := self._control_pattern.search(text, position):
            position = match.start() + 1
            positions.append(position)
        stripped = text.rstrip()
        for start in range(max(0, len(stripped) - self._longest_prefix), len(stripped)):
            if stripped[start:] in self._prefixes:  # the text that follows could complete it
                positions.append(start + 1)
        return sorted(set(positions))

    def encode(self, rendering: Rendering) -> Tokens:
        """The tokens of a text, in one pass."""
        return self._encode(self._copy, rendering)

    def answer_start(self, prompt: Rendering) -> int:
        """Where the tokens of an answer begin, at the end of a prompt or before it.

        Some vocabularies join the white space at a prompt's end with the answer's first word. It is then the answer's.
        """
        last = prompt.spans[-1] if prompt.spans else Span(0, 0, "")
        offset = last.start  # tokens after a control token do not depend on what is before it
        tail = prompt.text[offset:]
        end = last.name, tail
        if end not in self._starts:  # such as "<|start|>assistant\n", the same in each turn
            spans = [Span(0, last.end - offset, last.name)] if prompt.spans else []
            start = self._start_in(tail, spans)
            if not prompt.spans or len(tail) > MAX_TAIL or len(self._starts) == MAX_STARTS:
                return offset + start
            self._starts[end] = start
        return offset + self._starts[end]

    def _start_in(self, tail: str, spans: list[Span]) -> int:
        """`answer_start` in the end of a prompt."""
        start = len(tail)
        for word in FIRST_WORDS:
            tokens = self.encode(Rendering(tail + word, spans))
            across = np.flatnonzero((tokens.starts < len(tail)) & (tokens.ends > len(tail))).tolist()
            start = min([start, *(int(tokens.starts[place]) for place in across if place not in tokens.names)])
        return start

    def encode_prompt(self, prompt: Rendering) -> Tokens:
        """The tokens of a prompt, as they are when an answer follows."""
        end = self.answer_start(prompt)
        tokens = self.encode(replace(prompt, text=prompt.text + FIRST_WORDS[0]))
        kept = np.flatnonzero(tokens.starts < end)
        names = {new: tokens.names[old] for new, old in enumerate(kept.tolist()) if old in tokens.names}
        return Tokens(tokens.ids[kept], tokens.starts[kept], tokens.ends[kept], names)

    def _encode(self, copy: _Copy, rendering: Rendering) -> Tokens:
        spans = rendering.spans
        while True:
            text, alias_starts = self._replace_spans(rendering.text, spans)
            encoding = copy.tokenizer.encode(text, add_special_tokens=False)
            ids = encoding.ids
            added = [place for place, token in enumerate(ids) if token in copy.ids]
            places = [place for place in added if ids[place] in copy.aliases]
            offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
            if len(places) == len(spans):
                break
            # The tokenizer itself does not recognise a control token here, such as one of a single word inside another.
            found = offsets[places].tolist()
            spans = [
                span
                for span, start in zip(spans, alias_starts, strict=True)
                if any(first <= start < end for first, end in found)
            ]
            assert len(spans) == len(found)
        if not copy.spellable.isdisjoint(ids):
            return self._encode(self._strict_copy, rendering)
        # Tokens after an alias are as far from its end as those of the rendered text are from the span's.
        shifts = [0]
        shifts += [
            span.end - start - len(self._aliases[span.name]) for span, start in zip(spans, alias_starts, strict=True)
        ]
        starts = offsets[:, 0] + np.repeat(shifts, np.diff([0, *(place + 1 for place in places), len(ids)]))
        ends = offsets[:, 1] + np.repeat(shifts, np.diff([0, *places, len(ids)]))
        _locate_bytes(starts, ends, rendering.text)
        names = {place: copy.aliases[ids[place]] for place in places}
        for place in added:
            ids[place] = copy.ids[ids[place]]
        return Tokens(np.array(ids, np.int64), starts, ends, names)

    def _replace_spans(self, text: str, spans: Sequence[Span]) -> tuple[str, list[int]]:
        """The text with aliases in the place of spans, and where they start."""
        pieces: list[str] = []
        starts: list[int] = []
        length = position = 0
        for span in spans:
            pieces += [text[position : span.start], self._aliases[span.name]]
            starts.append(length + span.start - position)
            length = starts[-1] + len(pieces[-1])
            position = span.end
        return "".join([*pieces, text[position:]]), starts

    @cached_property
    def _prefixes(self) -> set[str]:
        return {name[:length] for name in self._controls for length in range(1, len(name))}

    @cached_property
    def _longest_prefix(self) -> int:
        return max((len(name) for name in self._controls), default=1) - 1

    @cached_property
    def _copy(self) -> _Copy:
        return self._copy_with(self._backend.model, self._spellable)

    @cached_property
    def _strict_copy(self) -> _Copy:
        """A copy whose model cannot spell a control token; it takes seconds for a large vocabulary."""
        aliases = {name: self._aliases[name] for name in self._controls}
        return self._copy_with(_without_pieces(self._backend, aliases), set())

    def _copy_with(self, model: Model, spellable: set[int]) -> _Copy:
        tokenizer = Tokenizer(model)
        if self._backend.normalizer is not None:
            tokenizer.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            tokenizer.pre_tokenizer = self._backend.pre_tokenizer
        added = {token.content: token for _, token in sorted(self._backend.get_added_tokens_decoder().items())}
        added |= {name: AddedToken(name, normalized=False) for name in self._controls if name not in added}
        tokenizer.add_tokens([_renamed(token, self._aliases.get(name, name)) for name, token in added.items()])
        ids = {_id(tokenizer, self._aliases.get(name, name)): _id(self._backend, name) for name in added}
        for mark, content in self._marks.items():
            token = added.get(content or "", AddedToken(mark, normalized=False))
            tokenizer.add_tokens([_renamed(token, self._aliases[mark])])
            ids[_id(tokenizer, self._aliases[mark])] = MARK_ID
        aliases = {_id(tokenizer, alias): name for name, alias in self._aliases.items()}
        return _Copy(tokenizer, ids, aliases, spellable)


def _spell(number: int) -> str:
    """A number below 32,768 in three noncharacters."""
    return "".join(NONCHARACTERS[number // base % 32] for base in (1024, 32, 1))


def _id(tokenizer: Tokenizer, piece: str) -> int:
    found = tokenizer.token_to_id(piece)
    assert found is not None
    return found


def _locate_bytes(starts: np.ndarray, ends: np.ndarray, text: str) -> None:
    """Give the byte tokens of several unknown characters one character each, in place.

    Unigram models give all bytes of neighbouring unknown characters the range of all those characters.

    Args:
        starts, ends: int64 [T]: the tokens' ranges.
    """
    joined = (starts[1:] == starts[:-1]) & (ends[1:] == ends[:-1]) & (ends[1:] - starts[1:] > 1)
    if not joined.any():
        return
    runs = np.flatnonzero(np.diff(joined.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    for first, last in runs.tolist():  # tokens `first` to `last`, of one range
        places = [place for place in range(starts[first], ends[first]) for _ in text[place].encode()]
        if len(places) == last + 1 - first:
            starts[first : last + 1] = places
            ends[first : last + 1] = np.array(places) + 1


def _renamed(token: AddedToken, content: str) -> AddedToken:
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(content, **flags)


def _without_pieces(backend: Tokenizer, aliases: Mapping[str, str]) -> Model:
    """The tokenizer's model with pieces renamed to aliases; their ids stay, and no text gets them."""
    values = json.loads(backend.to_str())
    model = values["model"]
    unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
    names = {piece: alias for piece, alias in aliases.items() if piece != unknown}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    values |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(values)).model
