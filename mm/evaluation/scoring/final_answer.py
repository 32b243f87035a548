"""The last answer in a chain of thought, by the words that the prompt asks for."""

import re

_BEST = re.compile(r"the best answer is:?\s*(.+?)\.?\s*(?:\n|$)", re.IGNORECASE)
_FINAL = re.compile(r"FINAL ANSWER:?[ \t]*\n?[ \t]*(.*)", re.IGNORECASE)


def final_answer(response: str) -> str | None:
    """What follows the last "FINAL ANSWER:", up to the end of its line (Llama 3.2's prompts for ChartQA and AI2D).

    Marks of emphasis and a full stop at the end are left out. None: the words do not occur, or nothing follows them.
    """
    return _last(_FINAL, response)


def best_answer(response: str) -> str | None:
    """What follows the last "The best answer is", up to a full stop at the line's end (MMMU-Pro's prompts)."""
    return _last(_BEST, response)


def _last(pattern: re.Pattern[str], response: str) -> str | None:
    found = pattern.findall(response)
    text = found[-1].strip().strip("*_`").strip() if found else ""
    text = text[:-1].rstrip() if text.endswith(".") else text
    return text or None
