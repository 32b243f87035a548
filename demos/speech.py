"""`make demo-speech`: a language model that reads -> one that hears forty words, all on this machine.

    python -m demos.speech [--limit N]

Flow: voices speak sentences into shards -> two stages of `train_speech_adapter` -> error rates on sentences that no
stage has heard, beside the control that hears another sentence -> a page. Each part that has been done is kept.
"""

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

import mm
import stages.train_speech_adapter
from data_prep.synthetic.spoken_words import Espeak, Flite, write_spoken_words
from demos.assets import fetch
from demos.image import compute_options
from demos.speech_page import SpeechExample, write_page
from foundation.errors import UserError
from mm.evaluation.baselines import with_other_sound
from mm.evaluation.evaluate import EvaluationReport, evaluate
from mm.run_folder import CONFIG_FILE
from mm.training.command import mistakes_in_one_line
from shards.reader import ShardSet

WORDS, ALIGNED = Path("data/demo_speech/words"), Path("runs/demo-speech-alignment")
ALIGNMENT_CONFIG, CONFIG = "configs/demo/speech_alignment.yaml", "configs/demo/speech.yaml"
NUM_SENTENCES, NUM_SILENCES = 1500, 300
METRICS = ("wer", "cer", "exact_match")
SHOWN = 16


def demo(output: Path, limit: int) -> dict[str, EvaluationReport]:
    """Run whatever of the demo has not been run yet, and write `output/index.html`.

    Args:
        output: run folder of the second stage; the shards and the first stage's run lie where the configurations say.
        limit: how many held-out recordings to evaluate on.

    Returns:
        reports: "heard", "replaced", in which each recording is another one, and "silence", where nothing is said.
    """
    if limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1")
    prepare()
    train(output)
    words = ShardSet(WORDS).select(split="test")
    records = words.select(task="transcription")
    reports = evaluate_run(output, records, words.select(task="silence"), limit)
    write_page(output / "index.html", reports, examples(records, reports), output / "metrics.jsonl")
    print(f"open {output / 'index.html'}", file=sys.stderr)
    return reports


def prepare() -> None:
    """Speak the sentences of the closed set in two voices, once."""
    if WORDS.exists():
        return
    count = write_spoken_words([Espeak(), Flite(fetch("flite-voices"))], WORDS, NUM_SENTENCES, NUM_SILENCES)
    print(f"{WORDS}: {count} recordings", file=sys.stderr)


def train(output: Path) -> None:
    """Train the first stage into ALIGNED and the second into `output`, unless they are there."""
    if (output / CONFIG_FILE).exists():
        return
    started = time.monotonic()
    if not (ALIGNED / CONFIG_FILE).exists():
        arguments = ["--config", ALIGNMENT_CONFIG, "--output", str(ALIGNED), *compute_options()]
        stages.train_speech_adapter.main([*arguments, "--language_model", str(fetch("smollm2-135m"))])
    arguments = ["--config", CONFIG, "--output", str(output), "--start_from", str(ALIGNED), *compute_options()]
    stages.train_speech_adapter.main(arguments)
    print(f"trained for {(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr)


def evaluate_run(run: Path, records: ShardSet, silences: ShardSet, limit: int) -> dict[str, EvaluationReport]:
    """Score a run on recordings, again with each one's sound replaced for another's, and where nothing is said."""
    model, processor = mm.load(run)
    reports: dict[str, EvaluationReport] = {}
    sets = {"heard": (records, METRICS, False), "replaced": (records, METRICS, True)}
    sets["silence"] = (silences, ("exact_match",), False)
    for name, (given, metrics, replace) in sets.items():
        report = evaluate(
            model, processor, given, metrics, replace_speech=replace, max_new_tokens=16, limit=limit, batch_size=32
        )
        report.write(run / "evaluation" / name)
        reports[name] = report
        print(f"{name}: {', '.join(map(str, report.scores.values()))}", file=sys.stderr)
    return reports


def examples(records: ShardSet, reports: dict[str, EvaluationReport]) -> list[SpeechExample]:
    """Recordings with what was said and what was heard; drawn at random, the same ones each time."""
    numbers = {key: number for number, key in enumerate(records.index["id"].to_pylist())}
    asked = sorted(numbers[row["id"]] for row in reports["heard"].predictions)
    replaced = {row["id"]: row["prediction"] for row in reports["replaced"].predictions}
    rows = random.Random(0).sample(reports["heard"].predictions, min(SHOWN, len(reports["heard"].predictions)))
    return [
        SpeechExample(
            sound=records[numbers[row["id"]]].media["flac"],
            other_sound=with_other_sound(records, asked, numbers[row["id"]]).media["flac"],
            reference=row["reference"],
            said=row["prediction"],
            said_of_other=replaced[row["id"]],
        )
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="demo-speech", description=__doc__, exit_on_error=False)
    parser.add_argument("--output", type=Path, default=Path("runs/demo-speech"), help="run folder")
    parser.add_argument("--limit", type=int, default=300, help="evaluate on this many held-out recordings")
    with mistakes_in_one_line("demo-speech"):
        arguments = parser.parse_args(argv)
        demo(arguments.output, arguments.limit)


if __name__ == "__main__":
    main()
