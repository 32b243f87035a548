"""Commands under torchrun: the ranks share the model, answer as one process does, and only the first one prints."""

import json
from pathlib import Path

import pytest

from app.cli import main
from tests.mm.training.launch import launch_function


def run_on_ranks(size: int, folder: Path, *arguments) -> tuple[int, str]:
    """The exit code of `mm`, and what all ranks print."""
    done = launch_function(main, ([str(argument) for argument in arguments],), folder, size)
    return done.returncode, done.output


@pytest.mark.distributed
def test_evaluation_on_two_ranks(mm_command, run_folder, squares, tmp_path):
    options = ("--model", run_folder, "--task", "vqa", "--metrics", "vqa_accuracy,choice,pmi_choice")
    command = ("evaluate", "--data", squares, *options, "--max-new-tokens", 6, "--limit", 6)
    _, alone, _ = mm_command(*command, "--output", tmp_path / "alone")
    code, printed = run_on_ranks(2, tmp_path, *command, "--output", tmp_path / "shared", "--tp", 2)
    assert code == 0 and alone.strip() in printed and printed.count("vqa_accuracy") == 1

    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").open()]

    for row, other in zip(rows("shared"), rows("alone"), strict=True):
        assert row.pop("pmi") == pytest.approx(other.pop("pmi"), abs=2e-3)  # rounded to 3 digits
        assert row == other


@pytest.mark.distributed
def test_evaluation_in_a_pipeline(mm_command, run_folder, squares, tmp_path):
    command = ("evaluate", "--data", squares, "--model", run_folder, "--task", "vqa", "--max-new-tokens", 6)
    command += ("--limit", 5, "--metrics", "bleu")
    _, alone, _ = mm_command(*command, "--output", tmp_path / "alone")
    code, printed = run_on_ranks(2, tmp_path, *command, "--output", tmp_path / "shared", "--pp", 2)
    assert code == 0 and alone.strip() in printed and printed.count("bleu") == 1
    assert len({(tmp_path / name / "predictions.jsonl").read_text() for name in ("alone", "shared")}) == 1
    code, printed = run_on_ranks(2, tmp_path, *command, "--metrics", "choice", "--pp", 2)
    assert code == 1 and "mm evaluate: one stage of a pipeline scores no given answers" in printed
    code, printed = run_on_ranks(2, tmp_path, *command, "--pp", 2, "--batch-size", 2, "--micro-batches", 3)
    assert code == 1 and "num_micro_batches is 3; it must be 1 to max_rows, 2" in printed


@pytest.mark.distributed
def test_a_sampled_answer_on_two_ranks(mm_command, everything_run, random_picture, tmp_path):
    random_picture(40, 30).save(tmp_path / "a.png")
    command = ("ask", "what is it?", "--image", tmp_path / "a.png", "--model", everything_run, "--temperature", 1.5)
    _, alone, _ = mm_command(*command, "--seed", 3, "--max-new-tokens", 12)
    code, printed = run_on_ranks(2, tmp_path, *command, "--seed", 3, "--max-new-tokens", 12, "--tp", 2)
    assert code == 0 and printed.count(alone) == 1 and alone.strip()


@pytest.mark.distributed
def test_ranks_that_the_options_do_not_fit(run_folder, tmp_path):
    command = ("caption", tmp_path / "a.png", "--model", run_folder)
    code, printed = run_on_ranks(2, tmp_path, *command)
    assert code == 1 and "mm caption: tp is 1, which takes 1 rank, and the command runs on 2" in printed
    assert "Traceback" not in printed
    code, printed = run_on_ranks(4, tmp_path, *command, "--tp", 4)
    assert code == 1 and "mm caption: tp is 4; it must divide num_kv_heads of the language model, 2" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tp", "2"), "tp is 2 and pp is 1, which takes 2 ranks, and the command runs on 1: start it by torchrun"),
        (("--tp", "2", "--pp", "2"), "tp is 2 and pp is 2, which takes 4 ranks"),
        (("--tp", "0"), "tp is 0; it must be at least 1"),
        (("--pp", "-1"), "pp is -1; it must be at least 1"),
        (("--tp", "two"), "tp"),
        (("--micro-batches", "2"), "micro-batches are 2, and pp is 1"),
    ],
)
def test_options_of_one_process(refused, run_folder, squares, options, message):
    assert message in refused("evaluate", "--data", squares, "--model", run_folder, *options)
