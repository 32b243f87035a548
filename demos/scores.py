"""Scores as the demos show them: on a scale to 100, and by kind of answer."""

from mm.evaluation.evaluate import EvaluationReport
from mm.evaluation.metrics import Score, average


def score_text(score: Score) -> str:
    """Value and half of the 95% interval on a scale to 100: "85.8 ± 1.5"."""
    return f"{score.value * score.scale:.1f} ± {score.interval * score.scale:.1f}"


def scores_by_answer(report: EvaluationReport) -> dict[str, Score]:
    """A report's scores, and its accuracy again over yes/no questions and over all others.

    The wording of a yes/no question gives much of its answer away, so the two are shown apart.
    """
    scores = dict(report.scores)
    if "vqa_accuracy" in scores:
        for name, is_yes_no in (("yes or no", True), ("other answers", False)):
            rows = [row for row in report.predictions if (row["reference"] in ("yes", "no")) == is_yes_no]
            if rows:
                scores[name] = average(name, [row["scores"]["vqa_accuracy"] for row in rows])
    return scores
