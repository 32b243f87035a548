"""The page of the image demo: scores beside blind controls, training curves, pictures with answers and captions."""

from dataclasses import dataclass
from pathlib import Path

from demos.charts import training_charts
from demos.scores import score_text, scores_by_answer
from foundation.html import escape, page, picture, table, write_page
from mm.evaluation.evaluate import EvaluationReport

TITLES = {
    "answers": "Questions about shapes (easy-VQA, test split)",
    "openmoji": "Captions of emoji (OpenMoji, concepts that were not trained on)",
    "tuxpaint": "Captions of stamps (Tux Paint, pictures that were not trained on)",
}
PICTURE_STYLE = """
figure img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; background: #fff; }
.prediction { font-weight: 600; }
"""


@dataclass(frozen=True)
class Example:
    """A held-out picture and what the model answered.

    Attributes:
        picture: the file, PNG, JPEG or WebP.
        question: None where a caption was asked for.
        reference: the expected answer.
        prediction: the model's answer.
        blind_prediction: its answer to the same question with the picture blanked.
    """

    picture: bytes
    question: str | None
    reference: str
    prediction: str
    blind_prediction: str


def write_image_page(
    file: Path, reports: dict[str, EvaluationReport], examples: dict[str, list[Example]], metrics: Path
) -> None:
    """Write the page.

    Args:
        reports: each set of `examples` under its name and, with blanked pictures, under "{name}_blank".
        examples: by set, one of TITLES.
        metrics: the run's metrics.jsonl.
    """
    body = ["<h1>A frozen language model that sees</h1>", *_scores(reports, list(examples)), *training_charts(metrics)]
    for name, shown in examples.items():
        body.append(f'<h2>{escape(TITLES[name])}</h2><div class="grid">{"".join(map(_figure, shown))}</div>')
    write_page(file, page("mm-adapters demo", body, PICTURE_STYLE))


def prediction_lines(prediction: str, reference: str) -> str:
    """The prediction, and the reference where it differs from it by more than case and outer spaces."""
    is_right = prediction.strip().lower() == reference.strip().lower()
    shown = f'<div class="prediction {"good" if is_right else "bad"}">{escape(prediction) or "(nothing)"}</div>'
    return shown if is_right else f"{shown}<div>expected: {escape(reference)}</div>"


def _scores(reports: dict[str, EvaluationReport], names: list[str]) -> list[str]:
    rows = []
    for name in names:
        blind_scores = scores_by_answer(reports[f"{name}_blank"])
        for metric, score in scores_by_answer(reports[name]).items():
            values = (score_text(score), score_text(blind_scores[metric]), f"{score.num_samples:,}")
            rows.append((TITLES[name], metric.replace("_", " "), *values))
    header = ("set", "score, in %", "with the picture", "blind control", "samples")
    return [
        "<p>Every picture on this page was held out from training. The blind control is the same model with a grey "
        "picture in place of the real one: its score shows how much can be guessed from the question alone. "
        "Intervals are 95%.</p>",
        table(header, rows, number_columns=(2, 3, 4)),
    ]


def _figure(example: Example) -> str:
    question = f"<div>{escape(example.question)}</div>" if example.question else ""
    return (
        f"<figure>{picture(example.picture, alt=example.reference)}<figcaption>{question}"
        f"{prediction_lines(example.prediction, example.reference)}"
        f'<div class="muted">blind: {escape(example.blind_prediction) or "(nothing)"}</div></figcaption></figure>'
    )
