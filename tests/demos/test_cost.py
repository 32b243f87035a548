"""What a run has cost, how a demo tells its progress, and the README's examples."""

import json
import logging
from pathlib import Path

import pytest

import mm
from app.commands.answer import ask, caption
from demos.cost import cost_line, training_cost
from demos.image_training import Recipe
from demos.progress import Progress
from demos.readme_examples import EXAMPLES, check_examples

ROOT = Path(__file__).parents[2]


def metrics(file: Path, *rows: dict) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_cost_is_the_sum_over_stages(tmp_path):
    one = metrics(
        tmp_path / "one.jsonl",
        {"step": 1, "flops_total": 1e13, "seconds_total": 60},
        {"step": 2, "flops_total": 4e13, "seconds_total": 240},
        {"step": 2, "eval/accuracy": 0.5},
    )
    two = metrics(tmp_path / "two.jsonl", {"step": 5, "flops_total": 2.4e13, "seconds_total": 306})
    assert training_cost([one, two]) == (6.4e13, 546)
    assert cost_line([one, two]) == "trained with 6.4e13 FLOP in 9.1 minutes (117 GFLOP/s)"
    assert "not counted" in cost_line([one, metrics(tmp_path / "old.jsonl", {"step": 1, "loss": 2.0})])


def test_the_time_left_follows_the_machines_speed(caplog):
    caplog.set_level(logging.INFO, logger="demos")
    now = [0.0]
    progress = Progress({"sets": 60, "encoder": 120, "adapter": 240, "page": 30}, lambda: now[0])
    progress.skip("sets")
    progress.begin("encoder")
    now[0] += 240  # half as fast as the reference machine
    progress.begin("adapter")
    now[0] += 480
    progress.begin("page")
    assert caplog.messages == [
        "part 2 of 4: encoder; about 6 minutes left",
        "part 3 of 4: adapter; about 9 minutes left",
        "part 4 of 4: page; about 1 minute left",
    ]


def test_each_recipe_has_folders_of_its_own():
    assert str(Recipe().adapter) == "runs/demo" and str(Recipe().encoder) == "runs/demo-encoder"
    recipe = Recipe(steps=6, encoder_steps=5, seed=1, precision="fp32")
    assert str(recipe.adapter) == "runs/demo-6-after-5-seed-1-fp32"
    assert str(recipe.encoder) == "runs/demo-encoder-5-seed-1-fp32"
    assert str(Recipe(question_steps=4).questions) == "runs/demo-vqa-4"
    assert str(Recipe(question_steps=4, encoder_steps=5).adapter) == "runs/demo-questions-4-after-5"
    assert Recipe(seed=0).adapter != Recipe().adapter and Recipe(steps=6).encoder == Recipe().encoder
    assert Recipe(output=Path("elsewhere")).adapter == Path("elsewhere")


def test_the_readme_shows_the_examples():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for example in EXAMPLES:
        assert (ROOT / "examples" / example.picture).is_file() and f"examples/{example.picture}" in text
        assert example.question is None or example.question in text


def test_a_caption_contains_a_word_and_an_answer_is_one():
    boat, colour, _ = EXAMPLES
    assert boat.is_right("A Sailboat at sea.") and not boat.is_right("A banana.")
    assert colour.is_right("blue") and not colour.is_right("Blue") and not colour.is_right("blue circle")


def test_examples_are_answered_as_the_commands_answer_them(run_folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = check_examples(*mm.load(run_folder))
    assert len(lines) == len(EXAMPLES) and all(": ok" in line or ": NOT" in line for line in lines)
    for example, line in zip(EXAMPLES, lines, strict=True):
        capsys.readouterr()
        picture = f"examples/{example.picture}"
        if example.question is None:
            caption([picture, "--model", str(run_folder)])
        else:
            ask([example.question, "--image", picture, "--model", str(run_folder)])
        answer = capsys.readouterr().out.removeprefix(f"{picture}: ").removesuffix("\n")
        assert f"-> {answer!r}: " in line


@pytest.mark.parametrize(("answer", "right"), [("yes", True), ("Yes", False), ("yes.", False), ("", False)])
def test_yes_is_exactly_yes(answer, right):
    assert EXAMPLES[2].is_right(answer) is right
