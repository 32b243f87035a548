"""The stage that pre-trains an image encoder: it learns to match images and texts, and resumes exactly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm.encoder_folders import load_vision_encoder
from mm.training.contrastive import ContrastiveObjective
from mm.training.data import RecordDataset
from shards.writer import write_shards
from stages import pretrain_image_encoder as stage
from tests.mm.training.launch import launch_function

TIMES = ("_per_second", "_seconds", "seconds_per_step", "seconds_total", "data_wait_share", "matmul_utilization")


class Interrupted(BaseException):
    pass


def metrics_of(folder: Path) -> list[dict]:
    """The reported metrics without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(TIMES)} for row in rows]


def error_of(capsys, file, *options: str) -> str:
    """The one line with which the stage ends."""
    with pytest.raises(SystemExit) as ended:
        stage.main(["--config", str(file), "--quiet", *options])
    assert ended.value.code == 1
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("pretrain_image_encoder: ") and "\n" not in shown
    return shown


def test_images_retrieve_their_texts(encoder_config, squares):
    """All texts of one colour are equal, and count as the image's own: one in four is right by chance."""
    training = {"steps": 40, "batch_size": 32, "warmup_steps": 4, "log_every": 10, "evaluate_every": 20}
    captions = {"path": str(squares), "task": "caption"}
    file, folder = encoder_config(
        training={**training, "learning_rates": {"*.gate_[af]*": 0.01, "*": 0.003}},
        data=[captions],
        validation={**captions, "split": "test"},
    )
    stage.main(["--config", str(file)])
    rows = metrics_of(folder)
    reported = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["matmul_utilization"] > 0 for row in reported if "loss" in row)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["eval/recall_at_1"] > 0.8
    assert load_vision_encoder(folder).config.tile_size == 28


def test_an_interrupted_run_ends_as_an_uninterrupted_one(encoder_config, tmp_path, monkeypatch):
    file, whole = encoder_config()
    stage.main(["--config", str(file)])
    parts, genuine, calls = tmp_path / "parts", ContrastiveObjective.loss, []

    def interrupt(self, module, batch):
        calls.append(batch)
        if len(calls) == 6:
            raise Interrupted
        return genuine(self, module, batch)

    monkeypatch.setattr(ContrastiveObjective, "loss", interrupt)
    with pytest.raises(Interrupted):
        stage.main(["--config", str(file), "--output", str(parts)])
    assert not (parts / "config.yaml").exists()
    stage.main(["--config", str(file), "--output", str(parts)])
    assert len(calls) == 6 + 8 - 3  # it resumed at step 3
    one, other = (load_file(folder / "vision_encoder.safetensors") for folder in (parts, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert metrics_of(parts) == metrics_of(whole)
    last = [folder / "checkpoints" / "step-00000008" / "__0_0.distcp" for folder in (parts, whole)]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one(encoder_config, tmp_path):
    file, alone = encoder_config(training={"steps": 3, "evaluate_every": 2, "save_every": 2})
    stage.main(["--config", str(file)])
    together = tmp_path / "together"
    arguments = ["--config", str(file), "--output", str(together)]
    done = launch_function(stage.main, (arguments,), tmp_path, 2, timeout=240)
    assert done.returncode == 0, done.output[-3000:]
    assert done.output.count("step 3/3") == 1  # one rank reports
    for one, two in zip(metrics_of(alone), metrics_of(together), strict=True):
        assert two.pop("tile_imbalance", 0) == 0  # one tile each
        found, expected = two.pop("eval/recall_at_1", 0), one.pop("eval/recall_at_1", 0)
        assert found == pytest.approx(expected, abs=0.07)  # of 32 pictures two may lie between texts
        assert one == pytest.approx(two, rel=2e-3)
    one, other = (load_vision_encoder(folder).state_dict() for folder in (alone, together))
    assert one.keys() == other.keys()
    for name, tensor in one.items():  # Adam's first steps go by a gradient's sign, of whatever size: 3 steps of 0.002
        assert (tensor - other[name]).abs().mean() < 2e-4, name


def test_a_run_is_a_function_of_its_seed(encoder_config, tmp_path):
    file, folder = encoder_config(training={"steps": 2})
    stage.main(["--config", str(file)])
    for name, seed in (("same", "0"), ("other", "1")):
        stage.main(["--config", str(file), "--output", str(tmp_path / name), "--training.seed", seed])
    first, same, other = (metrics_of(place) for place in (folder, tmp_path / "same", tmp_path / "other"))
    assert first == same and first[0]["loss"] != other[0]["loss"]


def test_an_unreadable_validation_image_is_skipped(encoder_config, square_record, tmp_path):
    cut = square_record(0)
    cut.media["png"] = cut.media["png"][:100]
    write_shards([cut, square_record(1), square_record(2)], tmp_path / "few")
    file, folder = encoder_config(validation={"path": str(tmp_path / "few"), "split": "train"}, training={"steps": 1})
    stage.main(["--config", str(file)])
    assert "eval/recall_at_1" in metrics_of(folder)[-1]


def test_a_records_text_is_its_caption_or_its_messages(square_record):
    assert stage.record_text(square_record(1, caption=True)) == "a green square"
    assert stage.record_text(square_record(1)) == "what colour is the square? green"


def test_a_record_without_text_is_skipped(encoder_config, square_record, tmp_path, capfd):
    records = [square_record(n) for n in range(4)]
    records[2].json.pop("messages")
    records[2].json["caption"] = None
    write_shards(records, tmp_path / "few")
    changes = {"training": {"steps": 1, "batch_size": 4}, "validation": None}
    file, _ = encoder_config(data=[{"path": str(tmp_path / "few")}], **changes)
    stage.main(["--config", str(file)])
    assert "skipped record square-0002" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"micro_batch_size": 8}}, "training.micro_batch_size"),
        ({"training": {"tp": 2}}, "training.tp"),
        ({"loss": "triplet"}, "loss 'triplet' is not known; it can be clip or siglip"),
        ({"training": {"learning_rates": {"*": None}}}, "freezes every parameter"),
        ({"encoder": {"num_heads": 5}}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"encoder": {"tap_points": [3]}}, "tap_points [3] are outside 0..2"),
        ({"encoder": {"activation": "relu"}}, "activation 'relu' is not supported"),
        ({"text": {"num_heads": 5}}, "text.hidden_size 32 is not a multiple of num_heads 5"),
        ({"text": {"context": 1}}, "text.context is 1"),
        ({"max_tiles": 9}, "max_tiles is 9; the encoder takes 1 to 4"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"validation_pairs": 0}, "0 samples to validate on"),
        ({"device": "abacus"}, "'abacus' cannot be used on this machine"),
        ({"data": [{"pth": "x"}]}, "pth"),
        ({"encoder": {"depth": 3}}, "depth"),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(encoder_config, capsys, changes, message):
    file, folder = encoder_config(**changes)
    assert message in error_of(capsys, file)
    assert not folder.exists()


def test_a_run_does_not_resume_with_another_shape(encoder_config, capsys):
    file, _ = encoder_config()
    stage.main(["--config", str(file)])
    capsys.readouterr()
    assert "another encoder;" in error_of(capsys, file, "--encoder.num_layers", "1", "--encoder.tap_points", "[0]")
    assert "another text;" in error_of(capsys, file, "--text.num_layers", "2")


def test_a_pair_is_a_records_first_image_and_text(squares):
    tokenizer = stage.open_clip.SimpleTokenizer(context_length=8)
    source = stage.DataSource(str(squares), split="test", task="caption")
    pair = RecordDataset([source], lambda record: stage.image_text_pair(record, tokenizer, 28, 1))[0]
    assert pair.tiles.pixels.shape == (1, 3, 28, 28) and tokenizer.decode(pair.text[1:4].tolist()) == "a red square "
