"""The demo with several seeds: finished runs are kept, and the table holds mean and spread."""

import re

import pytest

import demos.seeds
from demos.image_training import Recipe
from demos.seeds import demo_seeds, seed_table
from mm.evaluation.metrics import Score


def test_the_table_has_mean_and_standard_deviation():
    scores = {
        seed: {"answers": {"vqa_accuracy": Score("vqa_accuracy", value, 0.1, 9), "chrf": Score("chrf", 20.0, 1, 9)}}
        for seed, value in ((0, 0.7), (1, 0.8), (2, 0.9))
    }
    lines = seed_table(scores).splitlines()
    assert lines[0].startswith("| held out | score | seed 0 | seed 1 | seed 2 | mean |")
    assert lines[2] == "| answers | all questions | 70.0 | 80.0 | 90.0 | 80.0 | 10.0 |"
    assert lines[3].endswith("| 20.0 | 20.0 | 20.0 | 20.0 | 0.0 |")
    assert seed_table({0: scores[0]}).splitlines()[2].endswith("| 70.0 | 70.0 | – |")


@pytest.mark.slow
def test_seeds_have_runs_of_their_own_and_finished_ones_are_kept(home, monkeypatch, capfd):
    options = ["--seeds", "0", "1", "--questions", "8", "--device", "cpu"]
    genuine, recipes = demos.seeds.demo, []

    def demo(recipe: Recipe, questions):
        if recipe.seed == 1 and len(recipes) == 1:
            recipes.append(None)
            raise KeyboardInterrupt
        recipes.append(recipe)
        return genuine(recipe, questions)

    monkeypatch.setattr(demos.seeds, "demo", demo)
    with pytest.raises(SystemExit) as ended:
        demos.seeds.main(options)
    assert ended.value.code == 130
    demos.seeds.main(options)
    assert [recipe.seed for recipe in recipes if recipe] == [0, 1]  # seed 0 once
    table = (home / "runs" / "demo-seeds" / "seeds.md").read_text()
    assert capfd.readouterr().out.endswith(table + "\n")
    assert table.startswith("`python -m demos.seeds --seeds 0 1 --device cpu --questions 8`\n\n| held out |")
    assert re.search(r"\| answers \| all questions \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", table)
    weights = [(home / "runs" / f"demo-encoder-seed-{seed}" / "config.yaml").is_file() for seed in (0, 1)]
    assert all(weights) and (home / "runs" / "demo-seed-1" / "index.html").is_file()


def test_each_recipe_has_a_table_of_its_own_that_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = {"answers": {"chrf": Score("chrf", 20.0, 1, 9)}}
    monkeypatch.setattr(demos.seeds, "scores_of", lambda *_: scores)
    demo_seeds(Recipe(), [0, 1], None)
    demo_seeds(Recipe(steps=300), [0], 50)
    demo_seeds(Recipe(precision="fp32", encoder_steps=420), [0], 50)
    tables = {file.parent.name: file.read_text() for file in (tmp_path / "runs").glob("*/seeds.md")}
    assert {name: table.splitlines()[0] for name, table in tables.items()} == {
        "demo-seeds": "`python -m demos.seeds --seeds 0 1`",
        "demo-300-seeds": "`python -m demos.seeds --seeds 0 --steps 300 --questions 50`",
        "demo-after-420-fp32-seeds": (
            "`python -m demos.seeds --seeds 0 --encoder-steps 420 --precision fp32 --questions 50`"
        ),
    }


@pytest.mark.parametrize(("seeds", "recipe"), [([], Recipe()), ([1, 1], Recipe()), ([1], Recipe(output="x"))])
def test_seeds_and_folders_are_checked(seeds, recipe):
    with pytest.raises(ValueError, match=r"--seeds|--output"):
        demo_seeds(recipe, seeds, None)
