"""A stage whose data hold nothing of its modality ends before the first step, with the folder and what to do."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml

from shards.format import Record
from shards.writer import write_shards

STAGES = {
    "train_image_adapter": ("images", ["vision_encoder.*", "image_adapter.*"]),
    "finetune": ("images", ["image_adapter.*"]),
    "train_video_adapter": ("clips", ["video_adapter.*"]),
    "train_speech_adapter": ("utterances", ["speech_*"]),
}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    """Text alone."""
    turns = [{"role": "user", "content": "what shape?"}, {"role": "assistant", "content": "a circle"}]
    values = {"split": "train", "task": "chat", "language": "en", "messages": turns}
    folder = tmp_path_factory.mktemp("text") / "conversations"
    write_shards([Record(f"t{n}", {"id": f"t{n}", **values}) for n in range(12)], folder)
    return folder


@pytest.fixture
def start(everything_run, tmp_path, capsys):
    """start(stage, *data folders) -> (exit code, what is said, run folder)."""

    def run(stage: str, *data: Path) -> tuple[int, str, Path]:
        training = {"steps": 2, "batch_size": 4, "workers": 0}
        training["learning_rates"] = {**dict.fromkeys(STAGES[stage][1], 1e-3), "*": None}
        values = {"output": str(tmp_path / "run"), "start_from": str(everything_run), "training": training}
        values["data"] = [{"path": str(folder)} for folder in data]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        code = 0
        try:
            import_module(f"stages.{stage}").main(["--config", str(tmp_path / "config.yaml"), "--quiet"])
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err, tmp_path / "run"

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_data_of_text_alone_are_refused(start, conversations, stage):
    code, said, folder = start(stage, conversations)
    assert code == 1 and said.count("\n") == 1
    assert f"{conversations}: none of the 12 records to train on shows {STAGES[stage][0]}" in said
    assert f"name a folder with {STAGES[stage][0]} under `data`" in said
    assert not folder.exists()


def test_text_beside_pictures_is_trained_on(start, conversations, squares):
    code, said, folder = start("finetune", conversations, squares)
    assert code == 0 and (folder / "config.yaml").exists(), said


def test_encoders_need_their_medium(conversations, tmp_path, capsys):
    for stage, plural in (("pretrain_image_encoder", "images"), ("pretrain_speech_encoder", "utterances")):
        training = {"steps": 1, "batch_size": 2, "workers": 0, "learning_rates": {"*": 1e-3}}
        values = {"output": str(tmp_path / stage), "data": [{"path": str(conversations)}], "training": training}
        values["encoder"] = (
            {"hidden_size": 32, "num_heads": 2} if "image" in stage else {"num_layers": 1, "width": 32, "num_heads": 2}
        )
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        with pytest.raises(SystemExit, match="1"):
            import_module(f"stages.{stage}").main(["--config", str(tmp_path / "config.yaml")])
        assert f"none of the 12 records to train on shows {plural}" in capsys.readouterr().err
        assert not (tmp_path / stage).exists()
