"""The demo with photographs (`make demo-photos`): a frozen language model names what CIFAR-10's pictures show.

    python -m demos.photos [--steps N] [--alignment-steps N]

Flow: asset -> shards -> alignment, which trains an image encoder from scratch -> image adapter -> evaluation, beside a
linear probe of the same encoder -> a page. Finished parts are kept: an interrupted demo continues after the last one.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace
from torch import Tensor

import configs
import data_prep.sources.cifar10
import mm
import stages.train_image_adapter
from demos.assets import announce_downloads, fetch, not_cached
from demos.command import add_device_option, run_demo, stage_options
from demos.cost import cost_line
from demos.image import check_positive, prepare
from demos.image_examples import choose_examples
from demos.image_page import write_image_page
from demos.image_training import LANGUAGE_MODEL
from foundation.options import new_parser
from mm.evaluation.evaluate import EvaluationReport, evaluate
from mm.evaluation.linear_probe import LinearProbe, fit_linear_probe, pooled_features
from mm.evaluation.metrics import Score, average
from mm.records import record_answer, record_pictures
from mm.run_files import CONFIG_FILE, replaced_files
from shards.format import Record
from shards.reader import ShardSet
from vision.encoder import VisionEncoder
from vision.reading import read_picture
from vision.tiling import tile_image

DATA, ALIGNED = Path("data/demo_photos/cifar10"), Path("runs/demo-photos-alignment")
ALIGNMENT_CONFIG, ADAPTER_CONFIG = "demo/photos_alignment.yaml", "demo/photos.yaml"
SET = "photos"  # the name of the set on the page, and of its reports
PROBE = "linear probe of the same encoder"
METRICS = ("choice", "exact_match")
NUM_EXAMPLES = 12  # photographs on the page
LEAD = (
    "A language model that was trained on text alone names what photographs of 32 x 32 pixels show, and none of its "
    "weights has changed. An image encoder, and gated cross-attention blocks through which the language model reads "
    "it, were trained from random weights, on this machine."
)
logger = logging.getLogger(__name__)


def demo(
    output: Path, steps: int | None, questions: int | None, alignment_steps: int | None = None, device: str = "auto"
) -> dict[str, EvaluationReport]:
    """Run the parts of the demo that are not finished, and write `output/index.html`.

    Args:
        output: run folder of the adapter stage; shards and the first stage lie where the configurations say.
        steps: of the adapter stage; None takes the configuration's.
        questions: how many test photographs to ask about; None takes all 10,000.
        alignment_steps: of the first stage; None takes the configuration's. Each number of steps has its own folder.
        device: of training and evaluation.

    Returns:
        reports: "photos", and "photos_blank" with blanked pictures.

    Raises:
        UserError: a number below 1; what fetches the set or the language model is missing or fails.
    """
    check_positive(steps=steps, questions=questions, alignment_steps=alignment_steps)
    announce_downloads(not_cached([*([] if DATA.exists() else ["cifar10"]), LANGUAGE_MODEL]))
    prepare(DATA, data_prep.sources.cifar10.to_samples, "cifar10")
    aligned = aligned_folder(alignment_steps)
    train(output, aligned, steps, alignment_steps, device)
    return show(output, aligned, questions, device)


def aligned_folder(steps: int | None) -> Path:
    """The run folder of the first stage; another number of steps than the configuration's has its own."""
    return ALIGNED if steps is None else ALIGNED.with_name(f"{ALIGNED.name}-{steps}")


def train(output: Path, aligned: Path, steps: int | None, alignment_steps: int | None, device: str = "auto") -> None:
    """Train the first stage into `aligned` and the second into `output`, unless they are there."""
    language_model = fetch(LANGUAGE_MODEL)
    for folder, config, number, options in (
        (aligned, ALIGNMENT_CONFIG, alignment_steps, ["--language_model", str(language_model)]),
        (output, ADAPTER_CONFIG, steps, ["--start_from", str(aligned)]),
    ):
        if not (folder / CONFIG_FILE).exists():
            started = time.monotonic()
            arguments = ["--config", str(configs.path(config)), "--output", str(folder), *options]
            stages.train_image_adapter.main([*arguments, *stage_options(device, number)])
            logger.info("%s: trained for %.1f minutes", folder, (time.monotonic() - started) / 60)


def show(output: Path, aligned: Path, questions: int | None, device: str = "auto") -> dict[str, EvaluationReport]:
    """Evaluate the run and the probe on the same test photographs, print the scores, write the page."""
    model, processor = mm.load(output, device=device)
    photographs = ShardSet(DATA)
    test = photographs.select(split="test")
    reports = {}
    for name, is_blank in ((SET, False), (f"{SET}_blank", True)):
        reports[name] = evaluate(
            model,
            processor,
            test,
            METRICS,
            blank_images=is_blank,
            batch_size=64,
            max_new_tokens=6,
            limit=questions,
        )
        reports[name].write(output / "evaluation" / name)
        print(f"{name}: {reports[name]}")
    assert model.vision_encoder is not None
    asked = {row["id"] for row in reports[SET].predictions}
    asked_rows = [row for row, record_id in enumerate(test.index["id"].to_pylist()) if record_id in asked]
    train_records = photographs.select(split="train")
    probe = fit_probe(model.vision_encoder, [train_records[row] for row in range(len(train_records))])
    score = probe_score(probe, model.vision_encoder, [test[row] for row in asked_rows])
    with replaced_files(output / "evaluation" / "probe", last="scores.json") as new:
        content = {"value": score.value, "interval": score.interval, "num_samples": score.num_samples}
        (new / "scores.json").write_text(json.dumps({"scores": {score.name: content}}, indent=2) + "\n")
    print(score)

    examples = choose_examples(model, processor, {SET: test}, reports, NUM_EXAMPLES)
    titles = {"Alignment, which trains the image encoder": aligned, "Image adapter": output}
    curves = {title: folder / "metrics.jsonl" for title, folder in titles.items()}
    write_image_page(output / "index.html", LEAD, reports, examples, curves, {SET: {PROBE: {"choice": score}}})
    print(f"{cost_line(curves.values())}\nopen {output / 'index.html'}")
    return reports


def fit_probe(encoder: VisionEncoder, records: Sequence[Record]) -> LinearProbe:
    """A linear probe of the encoder, fitted to records of one picture and its class as answer."""
    logger.info("fitting a linear probe to %d photographs", len(records))
    return fit_linear_probe(_features(encoder, records), [record_answer(record) for record in records])


def probe_score(probe: LinearProbe, encoder: VisionEncoder, records: Sequence[Record]) -> Score:
    """The share of records for which the probe predicts the answer."""
    predictions = probe.predict(_features(encoder, records))
    hits = [float(name == record_answer(record)) for name, record in zip(predictions, records, strict=True)]
    return average(PROBE, hits)


def _features(encoder: VisionEncoder, records: Sequence[Record]) -> Tensor:
    tile_size = encoder.config.tile_size
    return pooled_features(
        encoder, [tile_image(read_picture(record_pictures(record)[0]), tile_size, max_tiles=1) for record in records]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options and run the demo."""
    parser = new_parser("demo-photos", "Teach a frozen language model to name what photographs show.")
    parser.add_argument("--output", type=Path, help="run folder; default: runs/demo-photos, or with the steps' numbers")
    parser.add_argument("--steps", type=int, help="steps of the adapter stage, in place of the configuration's")
    parser.add_argument("--alignment-steps", type=int, help="steps of the first stage, likewise")
    parser.add_argument("--questions", type=int, default=2000, help="ask about this many of the test photographs")
    add_device_option(parser)

    def run_with(options: Namespace) -> None:
        numbers = {"": options.steps, "after-": options.alignment_steps}
        suffixes = [f"-{prefix}{number}" for prefix, number in numbers.items() if number is not None]
        output = options.output or Path("".join(["runs/demo-photos", *suffixes]))
        demo(output, options.steps, options.questions, options.alignment_steps, options.device)

    run_demo(parser, argv, run_with)


if __name__ == "__main__":
    main()
