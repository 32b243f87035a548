"""MMMU and MMMU-Pro: college-level questions (Yue et al., arXiv 2311.16502, 2409.02813; official evaluation code)."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

SEED = 42  # of the official random choice
LONG_REPLY = 5  # words, beyond which an option's own text is looked for
_STRIPPED = ",.!?;:'"
_KEY_WORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_SIGNS = (":", ",", ".", "!", "?", ";", "'")
_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


@dataclass(frozen=True)
class Choice:
    """An option's letter, and whether it was drawn at random because the reply names none."""

    letter: str
    is_random: bool = False


def official_choice(reply: str, options: Sequence[str], draw: random.Random) -> Choice:
    """The option that a reply names, by the official reading.

    A letter in brackets counts, else one before a space (the article "A" too), else one before a full stop, else, in
    replies of more than five words, an option's text. Of several, the one that comes last counts. If there is none, one
    is drawn.

    Args:
        draw: `random.Random(SEED)` for a whole set, in the order of the set.
    """
    text = reply
    for sign in _STRIPPED:
        text = text.strip(sign)
    text = f" {text} "
    letters = [chr(ord("A") + number) for number in range(len(options))]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [name for name in letters if form.format(name) in text]
        if named:
            return Choice(max(named, key=lambda name: text.rfind(place.format(name))))
    if len(text.split()) > LONG_REPLY:
        lower = text.lower()
        texts = dict(zip(letters, (option.lower() for option in options), strict=True))
        named = [name for name in letters if texts[name] in lower]
        if named:
            return Choice(max(named, key=lambda name: lower.rfind(texts[name])))
    return Choice(draw.choice(letters), is_random=True)


def open_answers(reply: str) -> list[str | float]:
    """What the official reading takes from a reply to an open question: key phrases and all numbers in them."""
    phrases = _key_phrases(reply)
    found = phrases + [number for phrase in phrases for number in _numbers(phrase)]
    return list(dict.fromkeys(value for text in found for value in _normalised(text)))


def open_score(reply: str, references: Sequence[str]) -> float:
    """1 if a number of the reply equals a reference, to two decimals, or a phrase contains it, else 0 (official)."""
    targets = [value for reference in references for value in _normalised(reference)]
    for value in open_answers(reply):
        if isinstance(value, str):
            if any(isinstance(target, str) and target in value for target in targets):
                return 1.0
        elif value in targets:
            return 1.0
    return 0.0


def _key_phrases(reply: str) -> list[str]:
    """For each sentence, the shortest text after a key word; the whole reply if none has a key word."""
    text = reply.strip().strip(".").lower()
    # The official pattern looks for a capital after the full stop, and the text is in lower case: only lines part it.
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    phrases = []
    for number, sentence in enumerate(sentences):
        words = (*_KEY_WORDS, "=") if number == len(sentences) - 1 else _KEY_WORDS
        tails = [sentence.split(word)[-1].strip() for word in words if word in sentence]
        # The official loop takes a new tail while the one before is empty.
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in _SIGNS:
            phrases.append(shortest)
    return phrases or [text]


def _numbers(text: str) -> list[str]:
    return [number for pattern in (_WITH_COMMAS, _SCIENTIFIC, _SIMPLE) for number in pattern.findall(text)]


def _normalised(text: str) -> list[str | float]:
    """A number rounded to two decimals; else the text in lower case, where a single letter needs a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
