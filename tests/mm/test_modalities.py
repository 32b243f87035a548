"""Modalities: each has its places in samples, batches and models, and what follows from its description is right."""

import dataclasses

import pytest
import torch

import mm
from mm.batch import IGNORED, dummy_sample
from mm.modalities import MODALITIES
from mm.run_folder import PARTS
from mm.training.objectives import NextTokenObjective, next_token_loss
from shards.format import AUDIO, CLIPS, PICTURES


@pytest.fixture(scope="module")
def everything(everything_run) -> mm.MultimodalModel:
    return mm.load(everything_run)[0]


def placeholders(tokens: list[int], config: mm.ModelConfig, modality) -> int:
    return tokens.count(modality.token_id(config))


@pytest.mark.parametrize("modality", MODALITIES, ids=lambda modality: modality.name)
def test_a_modality_has_its_places(modality):
    assert modality.field in {field.name for field in dataclasses.fields(mm.Sample)}
    assert {modality.field, f"row_{modality.field}"} <= {field.name for field in dataclasses.fields(mm.Batch)}
    assert modality.part in {field.name for field in dataclasses.fields(mm.ModelConfig)} & set(PARTS)


def test_names_marks_and_placeholders_differ(everything):
    for values in zip(
        *((m.name, m.field, m.part, m.mark, m.token_id(everything.config)) for m in MODALITIES), strict=True
    ):
        assert len(set(values)) == len(MODALITIES)


def test_each_member_suffix_belongs_to_one_modality():
    suffixes = [*PICTURES, "3.jpg", *CLIPS, *AUDIO]
    found = [modality.suffixes(suffixes) for modality in MODALITIES]
    assert found == [[*sorted(PICTURES), "3.jpg"], list(CLIPS), list(AUDIO)]


@pytest.mark.parametrize("modality", MODALITIES, ids=lambda modality: modality.name)
def test_an_item_has_as_many_placeholders_as_its_tokens(everything, modality):
    item = modality.dummy(everything.config)
    tokens = modality.tokens(item, everything.config)
    assert placeholders(tokens, everything.config, modality) == modality.num_tokens(item) > 0


def test_the_dummy_sample_has_one_item_of_each_modality_that_the_model_takes(everything, tiny_model, bare_model):
    for model, expected in ((everything, [1, 1, 1]), (tiny_model, [1, 0, 0]), (bare_model, [0, 0, 0])):
        sample = dummy_sample(model.config)
        assert [len(getattr(sample, modality.field)) for modality in MODALITIES] == expected
        assert set(sample.labels) == {IGNORED}
        assert torch.isfinite(model(mm.collate([sample]))).all()


def test_the_dummy_sample_runs_through_every_part_and_leaves_gradients_of_zero(everything_run):
    with torch.inference_mode(False), torch.enable_grad():
        model, _ = mm.load(everything_run)
        next_token_loss(model, mm.collate([dummy_sample(model.config)])).backward()
        for part in PARTS:
            gradients = [parameter.grad for parameter in getattr(model, part).parameters()]
            assert any(gradient is not None for gradient in gradients), part
            assert all(gradient is None or not gradient.any() for gradient in gradients), part


@pytest.mark.parametrize("number", range(8))
def test_used_parts_are_those_with_gradients(everything_run, number):
    """With each selection of modalities: of a part that a batch uses every parameter has a gradient, of others none."""
    present = [modality for bit, modality in enumerate(MODALITIES) if number >> bit & 1]
    with torch.inference_mode(False), torch.enable_grad():
        model, _ = mm.load(everything_run)
        tokens, items = [5], {}
        for modality in present:
            items[modality.field] = [modality.dummy(model.config)]
            tokens += modality.tokens(items[modality.field][0], model.config)
        batch = mm.collate([mm.Sample([*tokens, 6, 7], [IGNORED] * len(tokens) + [6, 7], **items)])
        next_token_loss(model, batch).backward()
    used = NextTokenObjective().used_parts(batch)
    assert used.keys() == set(PARTS) - {"language_model"}
    for part, is_used in used.items():
        assert {p.grad is not None for p in getattr(model, part).parameters()} == {is_used}, part


@pytest.mark.parametrize("modality", MODALITIES, ids=lambda modality: modality.name)
def test_items_and_placeholders_must_agree(everything, modality):
    config = everything.config
    item = modality.dummy(config)
    tokens = [5, *modality.tokens(item, config), 6]
    assert everything(mm.collate([mm.Sample(tokens, **{modality.field: [item]})])).shape[:2] == (1, len(tokens))
    for wrong in (mm.Sample([5, 6], **{modality.field: [item]}), mm.Sample(tokens)):
        with pytest.raises(ValueError, match=rf"row 1 has \d {modality.name} tokens .* {modality.plural}, which take"):
            everything(mm.collate([mm.Sample([5]), wrong]))


@pytest.mark.parametrize("modality", MODALITIES, ids=lambda modality: modality.name)
def test_a_model_without_the_part_refuses_items(everything, bare_model, modality):
    sample = mm.Sample([5], **{modality.field: [modality.dummy(everything.config)]})
    with pytest.raises(ValueError, match=f"the batch holds {modality.plural} and the model has no {modality.part}"):
        bare_model(mm.collate([sample]))


@pytest.mark.parametrize("modality", MODALITIES, ids=lambda modality: modality.name)
def test_text_may_not_hold_a_mark(tiny_processor, modality):
    with pytest.raises(ValueError, match="stands for media"):
        tiny_processor.prompt([{"role": "user", "content": f"look: {modality.mark}"}])


def test_throughput_counts_every_modality(everything):
    batch = mm.collate([dummy_sample(everything.config)] * 2)
    counts = NextTokenObjective().throughput(batch)
    assert counts == {
        "samples": 2,
        "images": 1,  # both rows look at the same
        "tiles": 2,  # one of the image, one of the clip's frame
        "tokens": int(batch.lengths.sum()),
        "clips": 1,
        "frames": 1,
        "audio_seconds": 0.02,
    }
