"""Error rates, BLEU and chrF of a run that hears, on each set of recordings that it never heard, beside the control.

    python -m demos.speech_sets
    python -m demos.speech_report [--model runs/speech-transcription] [--sets asterisk_en,librivox]

The control hears the next recording of the set that wants another answer; of sounds in which nothing is said there is
none, and the share of empty transcripts is told (exact_match). Prints a Markdown table, and writes scores and
predictions of each set into the run's folder.
"""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

import mm
from demos.speech_sets import SETS
from foundation.errors import UserError
from mm.evaluation.evaluate import EvaluationReport, evaluate
from mm.evaluation.metrics import Score
from mm.training.command import mistakes_in_one_line
from shards.reader import ShardSet

ANSWERS = ("bleu", "chrf")  # of what is not what was said
METRICS = {"asterisk_translations": ANSWERS, "asterisk_en_dialogues": ANSWERS, "silences": ("exact_match",)}
ERROR_RATES = ("wer", "cer")  # of all other sets


def report(run: Path, data: Path, sets: Sequence[str], limit: int | None = None) -> dict[str, list[EvaluationReport]]:
    """Evaluate a run on the held-out recordings of sets; set -> what was heard, and but for silences the same
    with another recording's sound.

    Raises:
        UserError: a set is not there, or holds too few recordings; a limit below 2.
    """
    if limit is not None and limit < 2:
        raise UserError(f"limit is {limit}; the control needs 2 recordings or more")
    tasks = {name: None if name in METRICS else "transcription" for name in sets}
    held_out = {name: ShardSet(data / name).select(split="test", task=task) for name, task in tasks.items()}
    for name, records in held_out.items():
        if len(records) < 2:
            raise UserError(f"{data / name} holds {len(records)} held-out recordings; the control needs 2 or more")
    model, processor = mm.load(run)
    reports = {}
    print("| set | recordings | heard | control | real-time factor |\n|---|---|---|---|---|")
    for name, records in held_out.items():
        metrics = METRICS.get(name, ERROR_RATES)
        reports[name] = []
        for replace in (False,) if name == "silences" else (False, True):
            options = {"replace_speech": replace, "max_new_tokens": 160, "limit": limit, "batch_size": 16}
            one = evaluate(model, processor, records, metrics, **options)
            one.write(run / "evaluation" / (f"{name}-replaced" if replace else name))
            reports[name].append(one)
        scores = [", ".join(map(shown, one.scores.values())) for one in reports[name]]
        number, factor = reports[name][0].scores[metrics[0]].num_samples, reports[name][0].shown_factor()
        print(f"| {name} | {number} | {scores[0]} | {' '.join(scores[1:])} | {factor} |", flush=True)
    return reports


def shown(score: Score) -> str:
    """A score with its 95% interval, all on a scale to 100."""
    return f"{score.name} {score.value * score.scale:.1f} ± {score.interval * score.scale:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="speech_report", description=__doc__, exit_on_error=False)
    parser.add_argument("--model", type=Path, default=Path("runs/speech-transcription"), help="run folder")
    parser.add_argument("--data", type=Path, default=Path("data/speech"), help="folder of the sets")
    parser.add_argument("--sets", type=str, default=",".join(SETS), help="which: a,b,c")
    parser.add_argument("--limit", type=int, default=None, help="so many recordings of each, drawn alike each time")
    with mistakes_in_one_line("speech_report"):
        arguments = parser.parse_args(argv)
        report(arguments.model, arguments.data, arguments.sets.split(","), arguments.limit)


if __name__ == "__main__":
    main()
