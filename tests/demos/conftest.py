"""Stand-ins for the demo's sets, models and configurations, small and made here."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw

import configs
import demos.image
import demos.image_training

ENCODER = {
    **{"tile_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 64},
    **{"num_layers": 2, "num_gated_layers": 1, "num_heads": 2, "tap_points": [1]},
}
TRAINING = {"batch_size": 8, "log_every": 1, "evaluate_every": 2, "save_every": 1, "workers": 0}
COLOURS = ("red", "green", "blue", "black")


def easy_vqa(folder: Path) -> None:
    for part, count in (("train", 160), ("test", 12)):
        (folder / part / "images").mkdir(parents=True)
        questions = []
        for number in range(count):
            colour, shape = COLOURS[number % 4], ("circle", "rectangle")[number // 4 % 2]
            picture = Image.new("RGB", (28, 28), (number, 200, 255))
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if shape == "circle" else draw.rectangle)((4, 4, 20, 20), fill=colour)
            picture.save(folder / part / "images" / f"{number}.png")
            questions += [["what color is it?", colour, number], ["what shape is it?", shape, number]]
            questions += [["is it a circle?", "yes" if shape == "circle" else "no", number]]
        (folder / part / "questions.json").write_text(json.dumps(questions))


def openmoji(folder: Path) -> None:
    (folder / "color" / "svg").mkdir(parents=True)
    (folder / "data").mkdir()
    rows = [{"hexcode": f"{number:X}", "annotation": f"thing <{number}>"} for number in range(60)]
    for number, row in enumerate(rows):
        y, x = divmod(number, 8)
        shape = f'<circle cx="{x + 1}" cy="{y + 1}" r="1" fill="{COLOURS[number % 4]}"/>'
        body = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{shape}</svg>'
        (folder / "color" / "svg" / f"{row['hexcode']}.svg").write_text(body)
    (folder / "data" / "openmoji.json").write_text(json.dumps(rows))


def tuxpaint(folder: Path) -> None:
    (folder / "stamps").mkdir(parents=True)
    for number in range(60):
        picture, (y, x) = Image.new("RGB", (20, 30), "white"), divmod(number, 6)
        ImageDraw.Draw(picture).rectangle((3 * x, 2 * y, 3 * x + 4, 2 * y + 8), fill=COLOURS[number % 4])
        picture.save(folder / "stamps" / f"stamp{number}.png")
        (folder / "stamps" / f"stamp{number}.txt").write_text(f"A stamp of & number {number}.\n")


def named(*sets: str) -> dict:
    return {"data": [{"path": f"data/demo/{name}"} for name in sets]}


@pytest.fixture
def home(tmp_path, monkeypatch, language_model_folder) -> Path:
    """A folder to run the demo in, with small assets and small configurations in place of the shipped ones."""
    assets = {"smollm2-135m": language_model_folder}
    for name, make in {"easy-vqa": easy_vqa, "openmoji": openmoji, "tuxpaint-stamps": tuxpaint}.items():
        assets[name] = tmp_path / "assets" / name
        make(assets[name])
        (assets[name] / "LICENSE").write_text(f"licence of {name}")
    for module in (demos.image, demos.image_training):
        monkeypatch.setattr(module, "fetch", assets.__getitem__)
    monkeypatch.setattr(demos.image, "missing_programs", list)
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    sets = [{"path": f"data/demo/{name}"} for name in ("easy_vqa", "openmoji", "tuxpaint")]
    names = {"path": "data/demo/easy_vqa_names"}
    alignment = {"data": [names, *sets[1:]], "validation": {**names, "split": "validation"}, "encoder": ENCODER}
    alignment |= {"max_tiles": 1, "matching_weight": 1.0, "next_token_weight": 0.0, "adapter": {"positions": [2, 6]}}
    adapter = {"data": sets, "validation": {**sets[0], "split": "validation"}}
    questions = {"data": [{"path": "data/demo/easy_vqa_yes_no", "group_size": 2}], "validation": adapter["validation"]}
    rates = {"language_model.*": None, "extra_embeddings": None, "*": 0.001}
    (tmp_path / "configs" / "demo").mkdir(parents=True)
    (tmp_path / "configs" / "data").mkdir()
    curation = configs.path(demos.image.CURATION_CONFIG).read_text().replace("workers: 2", "workers: 1")
    (tmp_path / "configs" / demos.image.CURATION_CONFIG).write_text(curation)
    for name, values, more in (
        ("alignment", alignment, {"steps": 3, "learning_rates": {"image_adapter.blocks.*": None, **rates}}),
        ("questions", questions, {"steps": 2, "learning_rates": rates, "muon": ["image_adapter.blocks.*"]}),
        ("adapter", adapter, {"steps": 4, "learning_rates": rates}),
        (
            "annealing",
            {**named("openmoji_192", "tuxpaint_192"), "tile_size": 42},
            {"steps": 2, "learning_rates": rates},
        ),
        (
            "finetune",
            named("easy_vqa_chats", "openmoji_chats", "tuxpaint_chats"),
            {"steps": 3, "learning_rates": rates},
        ),
    ):
        text = yaml.safe_dump({**values, "training": {**TRAINING, **more}}, sort_keys=False)
        (tmp_path / "configs" / "demo" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(configs, "ROOT", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path
