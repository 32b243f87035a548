"""Error rates of a run that hears, on each set of recordings that it never heard, beside the control.

    python -m app.speech_sets
    python -m app.speech_report [--model runs/speech-transcription] [--sets asterisk_en,librivox]

The control hears the next recording of the set that wants another answer. Prints a Markdown table, and writes scores
and predictions of each set into the run's folder.
"""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

import mm
from app.speech_sets import SETS
from mm.evaluation.evaluate import Report, evaluate
from mm.training.command import mistakes_in_one_line
from shards.reader import ShardSet

METRICS = ("wer", "cer")
TRANSCRIBED = tuple(name for name in SETS if name != "asterisk_translations")


def report(run: Path, data: Path, sets: Sequence[str], limit: int | None = None) -> dict[str, tuple[Report, Report]]:
    """Evaluate a run on the held-out recordings of sets; set -> (heard, with another recording's sound).

    Raises:
        ValueError: a set is not there, or has nothing to transcribe; a limit below 2.
    """
    if limit is not None and limit < 2:
        raise ValueError(f"limit is {limit}; the control needs 2 recordings or more")
    held_out = {name: ShardSet(data / name).select(split="test", task="transcription") for name in sets}
    for name, records in held_out.items():
        if len(records) < 2:
            raise ValueError(f"{data / name} holds {len(records)} held-out recordings; the control needs 2 or more")
    model, processor = mm.load(run)
    reports = {}
    print("| set | recordings | WER | control | CER | real-time factor |\n|---|---|---|---|---|---|")
    for name, records in held_out.items():
        both = []
        for folder, exchange in ((name, False), (f"{name}-exchanged", True)):
            one = evaluate(
                *(model, processor, records, METRICS),
                exchange_speech=exchange, max_new_tokens=160, limit=limit, batch_size=16,
            )  # fmt: skip
            one.write(run / "evaluation" / folder)
            both.append(one)
        heard, control = both
        rates = [shown(heard, "wer"), shown(control, "wer"), shown(heard, "cer"), f"{heard.real_time_factor:.2f}"]
        print(f"| {name} | {heard.scores['wer'].num_samples} | {' | '.join(rates)} |", flush=True)
        reports[name] = heard, control
    return reports


def shown(report: Report, metric: str) -> str:
    """A rate with its 95% interval, in percent."""
    score = report.scores[metric]
    return f"{100 * score.value:.1f} ± {100 * score.interval:.1f}%"


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="speech_report", description=__doc__, exit_on_error=False)
    parser.add_argument("--model", type=Path, default=Path("runs/speech-transcription"), help="run folder")
    parser.add_argument("--data", type=Path, default=Path("data/speech"), help="folder of the sets")
    parser.add_argument("--sets", type=str, default=",".join(TRANSCRIBED), help="which: a,b,c")
    parser.add_argument("--limit", type=int, default=None, help="so many recordings of each, drawn alike each time")
    with mistakes_in_one_line("speech_report"):
        arguments = parser.parse_args(argv)
        report(arguments.model, arguments.data, arguments.sets.split(","), arguments.limit)


if __name__ == "__main__":
    main()
