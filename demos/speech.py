"""The speech demo (`make demo-speech`): a frozen language model learns to hear forty words, on this machine.

    python -m demos.speech [--limit N]

Flow: sentences in synthetic voices -> shards -> two stages of `train_speech_adapter` -> error rates on held-out
sentences, with the baseline that hears another sentence -> a page. Finished parts are kept.
"""

import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

import configs
import mm
import stages.train_speech_adapter
from data_prep.synthetic.spoken_words import Espeak, Flite, write_spoken_words
from demos.assets import fetch
from demos.command import add_device_option, run_demo, stage_options
from demos.image import check_positive
from demos.speech_page import SpeechExample, write_speech_page
from foundation.options import new_parser
from mm.evaluation.evaluate import EvaluationReport, evaluate
from mm.run_files import CONFIG_FILE
from shards.reader import ShardSet

WORDS, ALIGNMENT_RUN = Path("data/demo_speech/words"), Path("runs/demo-speech-alignment")
ALIGNMENT_CONFIG, CONFIG = "demo/speech_alignment.yaml", "demo/speech.yaml"
NUM_SENTENCES, NUM_SILENCES = 1500, 300
METRICS = ("wer", "cer", "exact_match")
NUM_EXAMPLES = 16  # recordings on the page
logger = logging.getLogger(__name__)


def demo(output: Path, limit: int, device: str = "auto") -> dict[str, EvaluationReport]:
    """Run the parts of the demo that are not finished, and write `output/index.html`.

    Args:
        output: run folder of the second stage; the shards and the first stage's run lie where the configurations say.
        limit: how many held-out recordings to evaluate on.
        device: of training and evaluation.

    Returns:
        reports: "original"; "replaced", where the model gets another recording's sound; and "silence", recordings
            without speech.

    Raises:
        UserError: a limit below 1; a voice cannot be fetched or loaded.
    """
    check_positive(limit=limit)
    prepare()
    train(output, device)
    words = ShardSet(WORDS).select(split="test")
    records = words.select(task="transcription")
    reports = evaluate_run(output, records, words.select(task="silence"), limit, device)
    folders = {"First stage: alignment by CTC": ALIGNMENT_RUN, "Second stage: transcription": output}
    stages = {title: folder / "metrics.jsonl" for title, folder in folders.items()}
    write_speech_page(output / "index.html", reports, choose_examples(records, reports), stages)
    print(f"open {output / 'index.html'}")
    return reports


def prepare() -> None:
    """Speak the sentences in two voices, unless the shards are there."""
    if WORDS.exists():
        return
    count = write_spoken_words([Espeak(), Flite(fetch("flite-voices"))], WORDS, NUM_SENTENCES, NUM_SILENCES)
    logger.info("%s: %d recordings", WORDS, count)


def train(output: Path, device: str = "auto") -> None:
    """Train the first stage into ALIGNMENT_RUN and the second into `output`, unless they are there."""
    if (output / CONFIG_FILE).exists():
        return
    started = time.monotonic()
    if not (ALIGNMENT_RUN / CONFIG_FILE).exists():
        arguments = ["--config", str(configs.path(ALIGNMENT_CONFIG)), "--output", str(ALIGNMENT_RUN)]
        arguments += ["--language_model", str(fetch("smollm2-135m"))]
        stages.train_speech_adapter.main([*arguments, *stage_options(device)])
    arguments = ["--config", str(configs.path(CONFIG)), "--output", str(output), "--start_from", str(ALIGNMENT_RUN)]
    stages.train_speech_adapter.main([*arguments, *stage_options(device)])
    logger.info("trained for %.1f minutes", (time.monotonic() - started) / 60)


def evaluate_run(
    run: Path, records: ShardSet, silences: ShardSet, limit: int, device: str = "auto"
) -> dict[str, EvaluationReport]:
    """Score a run on recordings, on the same with the sound of another one, and on sounds without speech."""
    model, processor = mm.load(run, device=device)
    reports: dict[str, EvaluationReport] = {}
    for name, shards, metrics in (
        ("original", records, METRICS),
        ("replaced", records, METRICS),
        ("silence", silences, ("exact_match",)),
    ):
        report = evaluate(
            model,
            processor,
            shards,
            metrics,
            replace_speech=name == "replaced",
            max_new_tokens=16,
            limit=limit,
            batch_size=32,
        )
        report.write(run / "evaluation" / name)
        reports[name] = report
        print(f"{name}: {', '.join(map(str, report.scores.values()))}")
    return reports


def choose_examples(records: ShardSet, reports: dict[str, EvaluationReport]) -> list[SpeechExample]:
    """Random recordings with reference and transcripts; the same ones each time."""
    row_of_id = {record_id: row for row, record_id in enumerate(records.index["id"].to_pylist())}
    replaced = {row["id"]: row["prediction"] for row in reports["replaced"].predictions}
    predictions = reports["original"].predictions
    return [
        SpeechExample(
            sound=records[row_of_id[row["id"]]].media["flac"],
            reference=row["reference"],
            prediction=row["prediction"],
            replaced_prediction=replaced[row["id"]],
        )
        for row in random.Random(0).sample(predictions, min(NUM_EXAMPLES, len(predictions)))
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options and run the demo."""
    parser = new_parser("demo-speech", "Teach a frozen language model to hear forty words.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo-speech"), help="run folder")
    parser.add_argument("--limit", type=int, default=300, help="evaluate on this many held-out recordings")
    add_device_option(parser)

    def run_with(options: Namespace) -> None:
        demo(options.output, options.limit, options.device)

    run_demo(parser, argv, run_with)


if __name__ == "__main__":
    main()
