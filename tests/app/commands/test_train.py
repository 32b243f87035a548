"""`mm train STAGE`: a stage from its configuration file, and what is wrong with one."""

import pytest
import yaml

import mm


def test_a_stage_runs_from_its_configuration(mm_command, squares, language_model_folder, encoder_folder, tmp_path):
    config = {
        "language_model": str(language_model_folder),
        "vision_encoder": str(encoder_folder),
        "data": [{"path": str(squares)}],
        "training": {
            "steps": 5,
            "batch_size": 2,
            "learning_rates": {"language_model.*": None, "*": 0.001},
            "workers": 0,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    train = ("train", "train_image_adapter", "--config", tmp_path / "run.yaml", "--output", tmp_path / "run")
    code, _, err = mm_command(*train, "--training.steps", "1")
    assert code == 0 and err.startswith("device: cpu\n") and "step 1/1" in err
    assert mm.load(tmp_path / "run")[0].config.image_adapter.positions is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("output: [1", "parsing"),
        ("just words", "just words"),
        ("colour: red", "colour"),
        ("training: {steps: many, batch_size: 4}", "training.steps"),
        ("training: {steps: 1, batch_size: 4, stride: 2}", "stride"),
        ("training: {steps: 1, batch_size: 4, learning_rates: {'*': fast}}", "training.learning_rates"),
        ("training: {steps: 1, batch_size: 0}", "training.batch_size is 0"),
        ("data: squares", "data"),
        ("data: [{path: a, repeat: often}]", "data"),
        ("adapter: {positions: first}", "adapter.positions"),
    ],
)
def test_wrong_configurations_are_refused(refused, tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.yaml").write_text(content)
    whole = ("--output", tmp_path / "run", "--language_model", "lm", "--vision_encoder", "encoder")
    rest = () if content and content.startswith("data") else ("--data", '[{"path": "a"}]')
    rest += () if content and content.startswith("training") else ("--training.steps", 1, "--training.batch_size", 2)
    assert message in refused("train", "train_image_adapter", *whole, *rest, "--config", tmp_path / "run.yaml")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [(), ("train_everything",), ("--config", "run.yaml")])
def test_a_wrong_stage_lists_all_stages(refused, arguments):
    assert "choose from pretrain_image_encoder, train_image_adapter, train_video_adapter" in refused(
        "train", *arguments
    )


def test_a_stage_without_options_names_what_is_missing(refused):
    assert "output" in refused("train", "train_image_adapter")
