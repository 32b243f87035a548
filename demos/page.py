"""The scaffold of the demos' pages: their look, scores with bars and intervals, and what examples have in common.

Introduction -> examples -> scores -> training curves -> commands to try. `page.css` holds the look of all pages.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from demos.scores import score_text
from foundation.html import Markup, escape, page, write_page
from mm.evaluation.metrics import Score

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
METRIC_TITLES = {
    "vqa_accuracy": "all questions",
    "yes or no": "questions answered with yes or no",
    "other answers": "questions with other answers",
    "choice": "right answer chosen among the possible ones",
    "exact_match": "answers that are right word for word",
    "pmi_choice": "own caption chosen among 20",
    "bleu": "captions: BLEU",
    "chrf": "captions: chrF",
    "wer": "word error rate (WER), lower is better",
    "cer": "character error rate (CER), lower is better",
}
UNBOUNDED = ("wer", "cer")  # may be above 100
Bar = tuple[str, float, float, str]  # name, length and half the interval in per cent of the track, the value as text


def write_demo_page(
    file: Path, title: str, lead: str, sections: Iterable[str], commands: Sequence[str], script: str = ""
) -> None:
    """Write a demo's page.

    Args:
        lead: what this is, in two sentences.
        sections: HTML.
        commands: shell commands with which the reader tries the model.
        script: JavaScript, as in `foundation.html.page`.
    """
    body = [f"<header><h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p></header>', "<main>", *sections]
    lines = "\n".join(map(escape, commands))
    body += [f"<h2>Try it</h2><p>In the folder in which the demo ran:</p><pre>{lines}</pre>", "</main>"]
    write_page(file, page(f"mm-adapters: {title}", body, STYLE, script))


def score_section(explanation: str, sets: Mapping[str, Mapping[str, Mapping[str, Score]]]) -> list[str]:
    """Scores with their intervals, each beside its baselines.

    Args:
        explanation: text.
        sets: title -> metric -> what the model was given -> score. The first of these is the model's own, and the
            others are baselines; one that was not measured is left out.
    """
    boxes = []
    for title, metrics in sets.items():
        parts = [f"<h3>{escape(title)}</h3>"]
        for metric, scores in metrics.items():
            samples = next(iter(scores.values())).num_samples
            parts.append(f"<h4>{escape(METRIC_TITLES.get(metric, metric.replace('_', ' ')))} ({samples:,})</h4>")
            ends = (score.scale * (score.value + score.interval) for score in scores.values())
            longest = max([100.0, *ends]) / 100 if metric in UNBOUNDED else 1.0
            rows = [
                (
                    name if score.num_samples == samples else f"{name} ({score.num_samples:,})",
                    score.scale * score.value / longest,
                    score.scale * score.interval / longest,
                    score_text(score),
                )
                for name, score in scores.items()
            ]
            parts.append(bars(rows))
        boxes.append(f'<div class="card">{"".join(parts)}</div>')
    return [f'<h2>How good it is</h2><p>{escape(explanation)}</p><div class="scores">{"".join(boxes)}</div>']


def bars(rows: Iterable[Bar]) -> Markup:
    """Values as bars, the first in the accent's colour, with their intervals where these are not 0."""
    parts = []
    for index, (name, length, interval, text) in enumerate(rows):
        low, high = max(0.0, length - interval), min(100.0, length + interval)
        whisker = f'<span class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%"></span>' if interval else ""
        fill = f'<span class="fill" style="width:{min(length, 100):.2f}%"></span>'
        parts.append(
            f'<span>{escape(name)}</span><span class="track{" other" if index else ""}" aria-hidden="true">'
            f"{fill}{whisker}</span><span>{escape(text)}</span>"
        )
    return Markup(f'<div class="bars">{"".join(parts)}</div>')


def probability_text(probability: float) -> str:
    """A probability in per cent, or as "1 in 25,000" where it is small."""
    if probability >= 0.0995:
        return f"{100 * probability:.0f}%"
    if probability >= 0.001:
        return f"{100 * probability:.2g}%"
    if probability < 1e-9:
        return "under 1 in a billion"
    odds = 1 / probability
    digits = 10 ** (len(str(int(odds))) - 2)
    return f"1 in {round(odds / digits) * digits:,}"


def answer_lines(prediction: str, reference: str) -> str:
    """The prediction with a mark, and the reference where it differs from it by more than case and outer spaces."""
    is_right = prediction.strip().lower() == reference.strip().lower()
    mark, kind = ("✓", "good") if is_right else ("✗", "bad")
    shown = (
        f'<p class="prediction {kind}" data-said><span aria-label="{"right" if is_right else "wrong"}">{mark}</span> '
        f"<span>{escape(prediction) or '(nothing)'}</span></p>"
    )
    return shown if is_right else f"{shown}<p data-said>expected: {escape(reference)}</p>"


def cards(examples: Iterable[str], is_wide: bool = False) -> str:
    """Cards side by side, as many as the window's width has room for."""
    return f'<div class="cards{" wide" if is_wide else ""}">{"".join(examples)}</div>'
