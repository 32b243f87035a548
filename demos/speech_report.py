"""Error rates, BLEU and chrF of a speech run on held-out recordings, beside a baseline with another recording's sound.

    python -m demos.speech_sets
    python -m demos.speech_report [--model runs/speech-transcription] [--sets asterisk_en,librivox]

The baseline gets the sound of the set's next recording that has another reference. Recordings without speech have no
baseline; their score is the share of empty transcripts (exact_match). Prints a Markdown table, and writes scores and
predictions of each set into the run's folder.
"""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

import mm
from demos.command import add_device_option, run_demo
from demos.scores import score_text
from demos.speech_sets import SETS
from foundation.errors import UserError
from foundation.options import new_parser
from mm.evaluation.evaluate import EvaluationReport, evaluate
from shards.reader import ShardSet

ANSWER_METRICS = ("bleu", "chrf")  # where the answer is not a transcript
ERROR_RATES = ("wer", "cer")  # of every set that METRICS does not name
METRICS = {
    "asterisk_translations": ANSWER_METRICS,
    "asterisk_en_dialogues": ANSWER_METRICS,
    "silences": ("exact_match",),
}


def report(
    run: Path, data: Path, sets: Sequence[str], limit: int | None = None, device: str = "auto"
) -> dict[str, list[EvaluationReport]]:
    """Evaluate a run on the held-out recordings of each set, and print a row of the table for each.

    Args:
        data: folder of the sets.
        limit: recordings of each set, the same ones each time; None takes all.

    Returns:
        set -> its report and, for all but "silences", the baseline's.

    Raises:
        UserError: a set is not there or holds fewer than 2 recordings; a limit below 2.
    """
    if limit is not None and limit < 2:
        raise UserError(f"--limit is {limit}; the baseline needs 2 recordings or more")
    tasks = {name: None if name in METRICS else "transcription" for name in sets}
    held_out = {name: ShardSet(data / name).select(split="test", task=task) for name, task in tasks.items()}
    for name, records in held_out.items():
        if len(records) < 2:
            raise UserError(f"{data / name} holds {len(records)} held-out recordings; the baseline needs 2 or more")
    model, processor = mm.load(run, device=device)
    reports: dict[str, list[EvaluationReport]] = {}
    print("| set | recordings | own sound | another sound | real-time factor |\n|---|---|---|---|---|")
    for name, records in held_out.items():
        metrics = METRICS.get(name, ERROR_RATES)
        reports[name] = []
        for replace_speech in (False,) if name == "silences" else (False, True):
            evaluated = evaluate(
                model,
                processor,
                records,
                metrics,
                replace_speech=replace_speech,
                max_new_tokens=160,
                limit=limit,
                batch_size=16,
            )
            evaluated.write(run / "evaluation" / (f"{name}-replaced" if replace_speech else name))
            reports[name].append(evaluated)
        own, *baseline = [
            ", ".join(f"{score.name} {score_text(score)}" for score in evaluated.scores.values())
            for evaluated in reports[name]
        ]
        first = reports[name][0]
        count, factor = first.scores[metrics[0]].num_samples, first.real_time_text()
        print(f"| {name} | {count} | {own} | {' '.join(baseline)} | {factor} |", flush=True)
    return reports


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options and print the table."""
    parser = new_parser("speech-report", "Error rates of a speech run on held-out recordings, with a baseline.")
    parser.add_argument("--model", type=Path, default=Path("runs/speech-transcription"), help="run folder")
    parser.add_argument("--data", type=Path, default=Path("data/speech"), help="folder of the sets")
    parser.add_argument("--sets", type=str, default=",".join(SETS), help="names of sets: a,b,c")
    parser.add_argument("--limit", type=int, default=None, help="at most this many recordings of each set")
    add_device_option(parser)

    def run_with(options: Namespace) -> None:
        report(options.model, options.data, options.sets.split(","), options.limit, options.device)

    run_demo(parser, argv, run_with)


if __name__ == "__main__":
    main()
