"""Multiple choice: which option an answer names."""

import re
from collections.abc import Sequence

# A capital letter before a sign or at an end: not the article "A", nor the pronoun "I".
_ALONE = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])\)?(?=[.,:;)\]*!?]|\s*$)")
_BRACKETS = re.compile(r"[(\[]\s*([A-Z])\s*[)\]]")
_NUMBER = re.compile(r"(?<![\w.,])(\d{1,2})(?![\w]|[.,]\d)")


def letter(answer: str, num_options: int) -> str | None:
    """The letter of the option that an answer names, by a strict reading (ours); None if it names none or several.

    A letter in brackets counts first; else one that stands alone at the end or before a sign, as in "B" and "B. a cat".
    The article "A" in a sentence is no answer. Example: "A cat is shown, so C." -> "C"
    """
    known = {chr(ord("A") + number) for number in range(num_options)}
    text = answer.strip()
    if text.upper() in known:
        return text.upper()
    for pattern in (_BRACKETS, _ALONE):
        found = {name for name in pattern.findall(text) if name in known}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def option_text(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option whose text an answer is, without regard to case and a full stop (ours)."""
    text = _plain(answer)
    equal = [number for number, option in enumerate(options) if _plain(option) == text]
    return chr(ord("A") + equal[0]) if len(equal) == 1 else None


def letter_or_text(answer: str, options: Sequence[str]) -> str | None:
    """`letter`, else `option_text`, else the letter before an option's text, as in "B a cat" (ours)."""
    found = letter(answer, len(options)) or option_text(answer, options)
    if found is None and (led := re.match(r"\s*([A-Z])[\s.:)]+(.+)$", answer, re.DOTALL)):
        text = option_text(led[2], options)
        return text if text == led[1] else None
    return found


def number(answer: str, num_options: int) -> str | None:
    """The option's number from 0, as AI2D's digit prompt asks for it (ours); None if an answer has none or several."""
    found = {int(text) for text in _NUMBER.findall(answer) if int(text) < num_options}
    return str(found.pop()) if len(found) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
