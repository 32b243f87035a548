"""The video stage: it learns clips, changes the video adapter alone, and trains on with other settings."""

import io
import json
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mm
from mm.evaluation.evaluate import evaluate
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards
from stages.train_video_adapter import main

ADAPTER = {
    "interval": 1,
    "gate_init": 0.5,
    "aggregator": {
        "factor": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_time_frequencies": 8,
    },
}
TWO_STEPS = {"steps": 2, "batch_size": 4, "learning_rates": {"video_adapter.*": 1e-3, "*": None}, "workers": 0}


def clip_record(index: int, split: str) -> Record:
    """Grey frames that brighten or, in the next record, the same frames reversed: one frame alone tells nothing."""
    rng = np.random.default_rng(index // 2)
    rises = index % 2 == 0
    shades = np.linspace(40, 210, 4) + rng.integers(-20, 20)
    frames = [
        Image.fromarray(np.full((28, 28, 3), shade, dtype=np.uint8) + rng.integers(0, 9, (28, 28, 3), dtype=np.uint8))
        for shade in shades
    ][:: 1 if rises else -1]
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], duration=200, lossless=True)
    name = f"clip-{index:04d}"
    values = {"id": name, "split": split, "task": "direction", "language": "en", "num_frames": 4, "duration": 0.8}
    answer = "yes" if rises else "no"
    if index % 4 < 2 or split != "train":
        question = [{"type": "video", "video": "clip.webp"}, {"type": "text", "text": "does it brighten?"}]
        values["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    else:
        values["caption"] = answer
    return Record(name, values, {"clip.webp": out.getvalue()})


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "shards"
    write_shards(
        [*(clip_record(n, "train") for n in range(64)), *(clip_record(n, "test") for n in range(100, 116))], folder
    )
    return folder


@pytest.fixture
def video_config(run_folder, clips, tmp_path):
    """video_config(name, **changes) -> (file, run folder)."""

    def write(name: str = "video", **changes):
        values = {
            "output": str(tmp_path / name),
            "start_from": str(run_folder),
            "adapter": ADAPTER,
            "data": [{"path": str(clips), "group_size": 2}],
            "max_frames": 4,
            "training": {
                "steps": 110,
                "batch_size": 16,
                "learning_rates": {"video_adapter.*": 5e-3, "*": None},
                "workers": 0,
                "log_every": 10,
            },
            **changes,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file, tmp_path / name

    return write


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_clips_are_learnt(video_config, clips):
    file, folder = video_config()
    main(["--config", str(file)])
    report = evaluate(*mm.load(folder), ShardSet(clips).select(split="test"), ["exact_match"], max_new_tokens=4)
    assert report.scores["exact_match"].value >= 0.9
    first, *_, last = read_metrics(folder)
    assert last["loss"] < 0.5 * first["loss"]
    assert last["frames_per_second"] == pytest.approx(4 * last["clips_per_second"])
    gates = {name for name in last if name.startswith("gate/attn_video")}
    assert gates == {f"gate/attn_video_{layer}" for layer in (2, 4, 6)}


def test_nothing_but_the_video_adapter_changes(video_config, run_folder, make_sample):
    file, folder = video_config(training=TWO_STEPS)
    main(["--config", str(file)])
    before, after = mm.load(run_folder)[0], mm.load(folder)[0]
    state = after.state_dict()
    for name, tensor in before.state_dict().items():
        assert torch.equal(state.pop(name), tensor), name
    assert {name.partition(".")[0] for name in state} == {"video_adapter"}
    rows = [make_sample("..i..", 1), make_sample(".....", 2)]
    with torch.inference_mode():
        assert torch.equal(after(mm.collate(rows)), before(mm.collate(rows)))


def test_matching_alone_trains_the_aggregator(video_config):
    """The language model is not run, and the blocks have no gradient."""
    rates = {"video_adapter.aggregator.*": 5e-3, "*": None}
    training = {"steps": 60, "batch_size": 16, "learning_rates": rates, "workers": 0, "log_every": 20}
    file, folder = video_config("aligned", training=training, matching_weight=1.0, next_token_weight=0.0)
    main(["--config", str(file)])
    first, *_, last = read_metrics(folder)
    assert last["match_accuracy"] > 0.95 and last["loss"] < 0.3 * first["loss"]
    for block in mm.load(folder)[0].video_adapter.blocks:
        assert not block.cross_attn.o_proj.weight.any()


def test_finetuning_trains_on_with_more_frames_and_larger_tiles(video_config, clips):
    file, first = video_config("first", training=TWO_STEPS)
    main(["--config", str(file)])
    changes = {"start_from": str(first), "factor": 2, "tile_size": 42, "max_frames": 3, "adapter": {}}
    file, second = video_config("second", training=TWO_STEPS, **changes)
    main(["--config", str(file)])
    model, processor = mm.load(second)
    assert model.config.video_adapter.aggregator.factor == 2
    assert model.config.vision_encoder.tile_size == 42
    assert processor.max_frames == 3
    sample = processor.record_example(ShardSet(clips)[0])
    assert len(sample.videos[0].frames) == 3
    vision_tokens = model.vision_contexts(mm.collate([sample]), None)["video"].tokens
    assert len(vision_tokens) == 2 * model.vision_encoder.config.tokens_per_tile  # of two merged frames


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {**TWO_STEPS, "learning_rates": {"*": 1e-3}}}, "freezes the language model"),
        (
            {"training": {**TWO_STEPS, "learning_rates": {"image_adapter.*": 1e-3, **TWO_STEPS["learning_rates"]}}},
            r"trains video_adapter\.\* alone",
        ),
        ({"factor": 0}, "factor is 0"),
        ({"matching_weight": -1.0}, "matching_weight is -1.0"),
        ({"next_token_weight": 0.0}, "matching_weight and next_token_weight are all 0"),
        ({"max_frames": 0}, "max_frames is 0"),
    ],
)
def test_wrong_settings_end_with_a_message_that_names_them(video_config, capsys, changes, message):
    file, folder = video_config("wrong", **changes)
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file)])
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "config.yaml").exists()


def test_every_part_has_its_file(video_config):
    file, folder = video_config("files", training=TWO_STEPS, bundle=True)
    main(["--config", str(file)])
    files = {path.stem for path in folder.glob("*.safetensors")}
    assert files == {"language_model", "extra_embeddings", "vision_encoder", "image_adapter", "video_adapter"}
