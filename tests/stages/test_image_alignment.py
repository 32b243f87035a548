"""Alignment in the image adapter stage, what the next stage keeps of it, new encoders, and augmented images."""

import json

import pytest
import torch
import yaml

import mm
from shards.writer import write_shards
from stages.train_image_adapter import main
from tests.stages.test_train_image_adapter import metrics_of

ALIGNMENT = {
    "matching_weight": 1.0,
    "next_token_weight": 0.0,
    "adapter": {"gate_init": 0.5, "fit_inputs": True},
}
ALIGNED = ("vision_encoder.", "image_adapter.projection.")


def test_alignment_trains_encoder_and_projection_alone(adapter_config, tmp_path):
    """Although the configuration gives the blocks a rate and weight decay."""
    rates = {"language_model.*": None, "extra_embeddings": None, "*.gate_[af]*": 0.03, "*": 0.002}
    training = {"steps": 24, "batch_size": 16, "save_every": 100, "weight_decay": 0.1, "learning_rates": rates}
    file, aligned = adapter_config(**ALIGNMENT, training=training)
    main(["--config", str(file)])
    rows = metrics_of(aligned)
    first, *_, last = (row["match_accuracy"] for row in rows)
    assert first < 0.6 and last > 0.85  # of four colours, in questions and in captions
    held_out = [row for row in rows if "eval/loss" in row]
    assert held_out[-1]["eval/loss"] < held_out[0]["eval/loss"] and held_out[-1]["eval/match_accuracy"] > 0.85
    reported = [json.loads(line) for line in (aligned / "metrics.jsonl").read_text().splitlines()]
    assert all(row["flops_per_second"] > 0 for row in reported)
    none, initial = adapter_config(**ALIGNMENT, output=str(tmp_path / "initial"), training={"steps": 1})
    main(["--config", str(none), "--training.learning_rates", '{"image_adapter.projection.bias": 0.0, "*": null}'])
    before, after = (mm.load(folder)[0].state_dict() for folder in (initial, aligned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(ALIGNED) for name in changed)
    assert {name for name in before if name.startswith(ALIGNED) and before[name].any()} <= changed


def test_a_stage_after_alignment_keeps_what_is_aligned_and_fits_the_inputs(adapter_config, squares, tmp_path):
    file, aligned = adapter_config(**ALIGNMENT, output=str(tmp_path / "aligned"), training={"steps": 4})
    main(["--config", str(file)])
    described = (aligned / "config.yaml").read_text()
    rates = {"image_adapter.blocks.0.gate_attn": 0.0, "*": None}
    changes = {"start_from": str(aligned), "language_model": None, "vision_encoder": None, "adapter": {}}
    changes["training"] = {"steps": 1, "learning_rates": rates}
    file, folder = adapter_config(**changes)
    text = yaml.safe_load(file.read_text())
    del text["adapter"]
    file.write_text(yaml.safe_dump(text, sort_keys=False))
    main(["--config", str(file)])
    before, after = (mm.load(place)[0].state_dict() for place in (aligned, folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    fitted = ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight")
    fitted += ("cross_attn.o_proj.weight",)
    assert changed == {f"image_adapter.blocks.{block}.{name}" for block in range(3) for name in fitted}
    language_model = yaml.safe_load((folder / "config.yaml").read_text())["language_model"]
    assert language_model == yaml.safe_load(described)["language_model"] and language_model is not None


def test_augmentation_changes_what_each_epoch_sees_and_is_the_same_in_every_run(
    adapter_config, square_record, tmp_path
):
    write_shards([square_record(number) for number in range(16)], tmp_path / "few")

    def losses(name, **changes):
        """Of three epochs of the same 16 pictures, with weights that stay as they are."""
        training = {
            "steps": 3,
            "batch_size": 16,
            "learning_rates": {"image_adapter.projection.bias": 0.0, "*": None},
        }
        data, output = [{"path": str(tmp_path / "few")}], str(tmp_path / name)
        file, run = adapter_config(**{**ALIGNMENT, **changes}, data=data, output=output, training=training)
        main(["--config", str(file)])
        return [row["loss"] for row in metrics_of(run)]

    plain, augment = losses("plain"), {"max_shift": 0.3, "mirror": True}
    assert plain == pytest.approx(plain[:1] * 3, abs=1e-5)
    augmented = losses("augmented", augment=augment)
    assert min(abs(one - other) for one, other in zip(augmented, plain, strict=True)) > 1e-4
    assert len(set(augmented)) == 3
    assert losses("again", augment=augment) == augmented
    assert losses("none", augment={}) == pytest.approx(plain, abs=1e-5)


def test_a_new_encoder_has_the_given_shape_and_depends_on_the_seed(adapter_config, tmp_path):
    shape = {"tile_size": 28, "patch_size": 7, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1}
    shape |= {"num_gated_layers": 1, "num_heads": 2, "tap_points": [0]}
    rates = {"image_adapter.projection.bias": 1e-3, "*": None}
    weights = {}
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        training = {"steps": 1, "learning_rates": rates, "seed": seed}
        changes = {"vision_encoder": None, "encoder": shape, "training": training, "validation": None}
        file, folder = adapter_config(**changes, output=str(tmp_path / name))
        main(["--config", str(file)])
        encoder = mm.load(folder)[0].vision_encoder
        assert encoder.config.tokens_per_tile == 17 and encoder.config.feature_size == 32
        weights[name] = encoder.state_dict()
    one = weights.pop("one")
    equal = {
        key: all(torch.equal(one[name], tensor) for name, tensor in state.items()) for key, state in weights.items()
    }
    assert equal == {"same": True, "other": False}
