"""A whole training run: its metrics, what it skips, and what it leaves on disk."""

import copy
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mm.batch import IGNORED
from mm.training.checkpoint import Checkpoints
from mm.training.config import TrainingConfig
from mm.training.data import Unreadable
from mm.training.interruption import StopSignals
from mm.training.metrics import wait_warning
from mm.training.objectives import NextTokenObjective

BAD = Unreadable("square-0007", "broken or truncated picture")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_of_a_run(model, samples, config, run):
    folder = run(model, config(steps=4, log_every=2, evaluate_every=3), evaluate=lambda _: {"accuracy": 0.25})
    rows = lines(folder)
    assert [row["step"] for row in rows] == [2, 3, 4]
    assert rows[1] == {"step": 3, "eval/accuracy": 0.25} and rows[2]["eval/accuracy"] == 0.25
    for row in (rows[0], rows[2]):
        assert row["loss"] > 0 and row["gradient_norm"] > 0 and 0 <= row["data_wait_share"] <= 1
        parts = {name: value for name, value in row.items() if name.startswith("gradient_norm/")}
        assert parts.keys() == {"gradient_norm/vision_encoder", "gradient_norm/image_adapter"}
        assert max(parts.values()) < row["gradient_norm"] < sum(parts.values())
        # seven samples a step, of which five hold images
        assert row["images_per_second"] * row["seconds_per_step"] == pytest.approx(7)
        assert row["tokens_per_second"] * row["seconds_per_step"] == pytest.approx(sum(len(s.tokens) for s in samples))
        tiles = sum(image.num_tiles for sample in samples for image in sample.images)
        assert row["tiles_per_second"] * row["seconds_per_step"] == pytest.approx(tiles)
    gates = {f"gate/{kind}_{position}" for kind in ("attn", "ffn") for position in (2, 4, 6)}
    assert gates == {name for name in rows[2] if name.startswith("gate/")}
    assert rows[2]["gate/attn_4"] == model.image_adapter.blocks[1].gate_attn.tanh().item()


def test_mfu_is_the_share_of_the_peak_rate(model, samples, config, run):
    """FLOPs as the objective counts them, of every micro-batch."""
    objective = NextTokenObjective(lambda batch: 1000 * len(batch.lengths))
    folder = run(
        model, config(micro_batch_size=3), objective=objective, peak_rates={"mfu": 1e6, "matmul_utilization": 1e5}
    )
    for row in lines(folder):
        assert row["mfu"] * 1e6 * row["seconds_per_step"] == pytest.approx(1000 * len(samples))
        assert row["matmul_utilization"] == pytest.approx(10 * row["mfu"])
    assert "mfu" not in lines(run(model, config(), folder="uncounted"))[0]


def test_tensorboard_has_the_same_metrics(model, config, run):
    folder = run(model, config())
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    rows = lines(folder)
    assert set(board.Tags()["scalars"]) == set(rows[0]) - {"step"}
    losses = [(event.step, event.value) for event in board.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows]


def test_the_loss_falls_on_repeated_samples(model, config, run):
    rows = lines(run(model, config(steps=12, learning_rates={**config().learning_rates, "*": 0.01})))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def test_evaluation_does_not_count_as_time_of_steps(model, config, run):
    def slowly(_) -> dict[str, float]:
        time.sleep(0.5)
        return {}

    started = time.monotonic()
    rows = lines(run(model, config(steps=2, evaluate_every=1), evaluate=slowly))
    seconds = time.monotonic() - started
    assert len(rows) == 2 and sum(row["seconds_per_step"] for row in rows) < seconds - 2 * 0.5


class Slow(NextTokenObjective):
    """Takes a while to build a batch."""

    def collate(self, samples):
        time.sleep(0.2)
        return super().collate(samples)


def test_a_run_that_waits_for_its_data_says_so_once_and_what_would_help(model, config, run, caplog):
    run(model, config(steps=4), objective=Slow())
    warnings = [record.getMessage() for record in caplog.records if "waiting for data" in record.getMessage()]
    assert len(warnings) == 1 and "raise training.workers, now 0, up to the" in warnings[0]
    run(model, config(steps=4), "quick")
    assert len([record for record in caplog.records if "waiting for data" in record.getMessage()]) == 1
    assert "all 2 cores decode already: store smaller pictures" in wait_warning(0.5, 2, 2)


class Broken(NextTokenObjective):
    """Gives no number in the steps named."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps, self.step = steps, 0

    def loss(self, module, batch):
        self.step += 1
        return super().loss(module, batch) * (float("nan") if self.step in self.steps else 1)


def test_a_step_with_a_loss_that_is_not_a_number_is_skipped_and_logged(model, config, run, caplog):
    folder = run(model, config(steps=4, log_every=2), objective=Broken(2, 3))
    assert [row["skipped_steps"] for row in lines(folder)] == [1, 1]
    assert all(row["loss"] > 0 for row in lines(folder))
    assert "skipped step 2: the loss is nan" in caplog.text and "skipped step 3" in caplog.text
    assert "skipped step 1" not in caplog.text
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_too_many_skipped_steps_in_a_row_stop_the_run(model, config, run):
    with pytest.raises(ValueError, match="the 2 steps before it were skipped; lower the learning rates"):
        run(model, config(steps=9, max_skipped=2), objective=Broken(2, 4, 5, 6))


class Watching(NextTokenObjective):
    def loss(self, module, batch):
        self.modes.append(("train", module.training))
        return super().loss(module, batch)


def test_evaluation_runs_in_eval_mode(model, config, run):
    objective = Watching()
    objective.modes = modes = []
    settings = config(steps=2, evaluate_every=1)
    run(model, settings, objective=objective, evaluate=lambda module: modes.append(("eval", module.training)) or {})
    assert modes == [("train", True), ("eval", False)] * 2 and not model.training


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_records_are_skipped_and_logged(model, samples, config, run, caplog, workers):
    folder = run(model, config(batch_size=8, workers=workers), dataset=[*samples[:3], BAD, *samples[3:]])
    assert [row["unreadable_records"] for row in lines(folder)] == [1, 1, 1]
    assert caplog.text.count("skipped record square-0007: broken or truncated picture") == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_without_readable_records_is_refused(model, config, run, workers):
    with pytest.raises(ValueError) as caught:
        run(model, config(batch_size=1, workers=workers), dataset=[BAD])
    assert str(caught.value) == "none of a step's records can be read; the first: broken or truncated picture"


def test_a_step_whose_readable_records_hold_no_target_names_the_others(model, samples, config, run):
    silent = replace(samples[0], labels=[IGNORED] * len(samples[0].tokens))
    with pytest.raises(ValueError, match=r"a step holds no targets; 1 of its records .* broken or truncated picture"):
        run(model, config(batch_size=2), dataset=[silent, BAD])


def test_a_run_that_cannot_start_leaves_no_folder(model, config, run, tmp_path):
    with pytest.raises(ValueError, match="no pattern of `learning_rates` fits"):
        run(model, config(learning_rates={"image_adapter.*": 1e-3}))
    assert not (tmp_path / "run").exists()


def test_a_file_in_place_of_the_folder_is_refused(model, config, run, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="run is a file"):
        run(model, config())
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("micro_batch_size", 0),
        ("micro_batch_size", 5),
        ("precision", "fp16"),
        ("keep", 0),
        ("log_every", 0),
        ("warmup_steps", -1),
        ("workers", -2),
        ("max_gradient_norm", 0.0),
        ("weight_decay", -0.1),
        ("spike_factor", 1.0),
        ("max_skipped", -1),
        ("learning_rates", {"*": -1e-3}),
        ("learning_rates", {"*": float("nan")}),
        ("betas", (0.9, 1.5)),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"training\.{field}"):
        TrainingConfig(**{"steps": 1, "batch_size": 4, field: value})


class Ended(NextTokenObjective):
    """Sends its process a signal in the middle of the third step."""

    step = 0

    def __init__(self, number: int, flops=None) -> None:
        super().__init__(flops)
        self.number = number

    def loss(self, module, batch):
        self.step += 1
        if self.step == 3:
            os.kill(os.getpid(), self.number)
        return super().loss(module, batch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_step_with_a_checkpoint(model, config, run, same, number, caplog):
    settings = config(steps=5, save_every=100, workers=1)
    whole, ended = copy.deepcopy(model), copy.deepcopy(model)
    count = NextTokenObjective(flops=lambda batch: int(batch.lengths.sum()))
    expected = lines(run(whole, settings, folder="whole", objective=count))
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as caught:
        run(ended, settings, objective=Ended(number, count.flops))
    assert signal.getsignal(number) is handler
    if number == signal.SIGTERM:
        assert caught.value.code == 143
    else:
        assert caplog.text.count("press it again") == 1
    folder = run(ended, settings, objective=count)
    assert [row["step"] for row in lines(folder)] == [1, 2, 3, 4, 5] and same(whole, ended)
    totals = [row["flops_total"] for row in lines(folder)]
    assert totals == [row["flops_total"] for row in expected] == sorted(set(totals))
    seconds = [row["seconds_total"] for row in lines(folder)]
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(sum(row["seconds_per_step"] for row in lines(folder)))


@pytest.mark.parametrize("moment", ["step", "evaluation", "checkpoint"])
def test_a_signal_at_the_end_of_a_run_is_obeyed_and_the_run_resumes(model, config, run, same, moment, monkeypatch):
    """It must not be lost: what started the run would go on to the next one."""
    settings = config(steps=3, save_every=100)
    whole, ended = copy.deepcopy(model), copy.deepcopy(model)
    run(whole, settings, folder="whole")

    def terminate(at: str) -> None:
        if at == moment:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(_):
        terminate("evaluation")
        return {"accuracy": 0.25}

    def save(*arguments):
        terminate("checkpoint")
        return original_save(*arguments)

    original_save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", save)
    objective = Ended(signal.SIGTERM) if moment == "step" else None
    with pytest.raises(SystemExit) as caught:
        run(ended, settings, evaluate=evaluate, objective=objective)
    assert caught.value.code == 143
    resumed = copy.deepcopy(model)
    folder = run(resumed, settings, evaluate=evaluate)
    assert [row["step"] for row in lines(folder)] == [1, 2, 3] and "eval/accuracy" in lines(folder)[-1]
    assert same(whole, resumed) and not resumed.training


def test_a_second_ctrl_c_stops_at_once():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as torchrun does, right after the terminal's
        assert signals.requested == 130
        assert signals.interrupted_at is not None
        signals.interrupted_at -= 10
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
