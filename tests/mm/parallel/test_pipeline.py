"""Pipeline parallelism against one process: parameters held, gradients, norms and weights; with FSDP and tp as well."""

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

import mm
from foundation.errors import UserError
from mm.batch import IGNORED
from mm.config import preset
from mm.cross_attention import ImageAdapterConfig
from mm.parallel.layout import Layout
from mm.parallel.pipeline import Stage, build_stage, pad_to_common_shape, stage_layers
from mm.parallel.process_group import Ranks
from mm.training.adapters import answer_accuracy
from mm.training.contrastive import ContrastiveModel, TextTowerConfig
from mm.training.data import Unreadable, collate_step
from mm.training.guards import Guard
from mm.training.objectives import NextTokenObjective, loss_of_hidden_states, next_token_loss
from mm.training.optimizer import apply_learning_rates
from mm.training.trainer import Trainer, train_step
from tests.mm.training.checkpoint_state import state_of
from tests.mm.training.launch import launch

# Sums over micro-batches and ranks run in another order than in one pass: fp32 rounding of gradients of size 1e-3 to 1.
CLOSE = {"rtol": 1e-3, "atol": 2e-6}
PROGRAM = Path(__file__).with_name("pipeline_program.py")
PAPER = tuple(range(4, 125, 4))  # the blocks of 405B
FROZEN = {"language_model.*": None, "extra_embeddings": None}


def carry_out(folder: Path, size: int, **plan) -> str:
    """Run the program on a plan; returns its output."""
    folder.mkdir(exist_ok=True)
    torch.save(plan, folder / "plan.pt")
    done = launch(PROGRAM, folder, size)
    assert done.returncode == 0, done.output[-6000:]
    return done.output


@pytest.fixture
def uneven(samples) -> list[mm.Sample]:
    """Rows of 3 to 15 tokens with 0 to 2 images, one of them without a target."""
    text, seeing = [s for s in samples if not s.images], [s for s in samples if s.images]
    silent = mm.Sample(text[0].tokens, [IGNORED] * len(text[0].tokens))
    return [seeing[0], text[0], seeing[1], silent, seeing[2], text[1], seeing[3]]


def alone(model, samples, config) -> dict:
    """Loss, norms and gradients of one step of one process over all samples at once."""
    model = copy.deepcopy(model)
    apply_learning_rates(model, config.learning_rates)

    class Spy(torch.optim.SGD):
        def step(self) -> None:
            self.seen = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    spy = Spy([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batches = collate_step(list(samples), NextTokenObjective(), None).batches
    step = train_step(model, NextTokenObjective(), spy, batches, replace(config, pp=1), "cpu", Guard(None, 0))
    return {"loss": step.loss, "norms": step.norms, "gradients": spy.seen}


def stages(model, ranks: int) -> list[Stage]:
    cuts = stage_layers(model.image_adapter.positions, model.config.language_model.num_layers, ranks)
    return [Stage(model, cuts, rank, loss_of_hidden_states) for rank in range(ranks)]


def names(module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_stage_layers_of_the_paper():
    cuts = stage_layers(PAPER, 126, 31)
    assert cuts == [range(start, start + 4) for start in range(0, 120, 4)] + [range(120, 126)]
    assert [len(layers) // 4 for layers in stage_layers(PAPER, 126, 16)] == [2] * 15 + [1]
    assert [len(layers) for layers in stage_layers(PAPER, 126, 8)] == [16] * 7 + [14]
    assert stage_layers(PAPER, 126, 1) == [range(126)]


@pytest.mark.parametrize("positions", [PAPER, tuple(range(3, 126, 4)), (0, 5, 6, 20, 126)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_stages_end_with_blocks_and_have_about_equally_many(positions, ranks):
    cuts = stage_layers(positions, 126, ranks)
    assert [depth for layers in cuts for depth in layers] == list(range(126))
    assert {layers.stop for layers in cuts[:-1]} <= set(positions)
    blocks = [sum(max(position - 1, 0) in layers for position in positions if position) for layers in cuts]
    assert max(blocks) - min(blocks) <= 1 and sum(blocks) == len([p for p in positions if p])


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_holds_its_layers_and_the_shared_modules(build_model, tiny_config, tied):
    language_model = replace(tiny_config.language_model, tied_embeddings=tied)
    model = build_model(replace(tiny_config, language_model=language_model))
    first, middle, last = stages(model, 3)
    everywhere = {n for n in names(model) if n.startswith(("vision_encoder", "extra_", "image_adapter.projection"))}
    table, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"

    def own(start: int, block: int) -> set[str]:
        modules = [f"language_model.model.layers.{depth}." for depth in (start, start + 1)]
        prefixes = (*modules, f"image_adapter.blocks.{block}.")
        return everywhere | {name for name in names(model) if name.startswith(prefixes)}

    assert names(first) == own(0, 0) | {table}
    assert names(middle) == own(2, 1)
    assert names(last) == own(4, 2) | {"language_model.model.norm.weight"} | ({table} if tied else {head})
    for stage in (first, middle, last):
        for name, parameter in stage.named_parameters():
            assert parameter is model.get_parameter(name)  # a stage copies no weights
    assert first.holders["vision_encoder.class_embedding"] == [0, 1, 2]
    assert first.holders[table] == ([0, 2] if tied else [0])


def test_building_a_stage_draws_no_random_numbers(model):
    before = torch.get_rng_state()
    stages(model, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_stages_of_405b_on_the_meta_device():
    with torch.device("meta"):
        model = mm.MultimodalModel(preset("405b"))
    everywhere = count(model.vision_encoder) + count(model.image_adapter.projection) + model.extra_embeddings.numel()
    layer, block = count(model.language_model.model.layers[0]), count(model.image_adapter.blocks[0])
    head = count(model.language_model.model.norm) + count(model.language_model.lm_head)

    def held(ranks: int, rank: int) -> int:
        return count(Stage(model, stage_layers(model.image_adapter.positions, 126, ranks), rank, loss_of_hidden_states))

    ordinary = held(31, 1)
    assert ordinary == everywhere + 4 * layer + block == pytest.approx(17e9, rel=0.02)  # of 505B
    assert held(31, 0) == ordinary + count(model.language_model.model.embed_tokens)
    assert held(31, 30) == ordinary + 2 * layer + head
    assert held(16, 15) == everywhere + 6 * layer + block + head
    assert held(8, 7) == everywhere + 14 * layer + 3 * block + head


@pytest.mark.parametrize("positions", [(2, 4, 6), (0, 3, 5)])
def test_stages_in_sequence_compute_the_models_loss(build_model, tiny_config, uneven, positions):
    model = build_model(replace(tiny_config, image_adapter=ImageAdapterConfig(positions=positions)))
    batch = mm.collate(uneven)
    hidden: tuple = ()
    for stage in stages(model, 2):
        stage.batches = [batch]
        hidden = (stage(*hidden, index=torch.tensor([0])),)
    assert hidden[0] == next_token_loss(model, batch)


def test_stages_encode_a_shared_picture_once(build_model, tiny_config, shared_pictures):
    model, batch, encoded = build_model(tiny_config), mm.collate(shared_pictures), []
    expected = NextTokenObjective().loss(model, batch)
    hidden: tuple[torch.Tensor, ...] = ()
    model.vision_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    for stage in stages(model, 3):  # in one process they share the encoder
        stage.batches = pad_to_common_shape([batch, mm.collate(shared_pictures * 2)])
        hidden = (stage(*hidden, index=torch.tensor(0)),)
    torch.testing.assert_close(hidden[0], expected, **CLOSE)
    assert encoded == [3] * 3 and len(batch.images) == 3


def test_padding_to_a_common_shape_changes_no_loss_or_gradient(model, uneven):
    apply_learning_rates(model, {**FROZEN, "*": 1e-3})
    parts = [mm.collate(uneven[start : start + 3]) for start in (0, 3, 6)]
    padded = pad_to_common_shape(parts)
    assert {batch.tokens.shape for batch in padded} == {(3, 15)} and len({b.tokens.shape for b in parts}) == 3
    for part, larger in zip(parts, padded, strict=True):
        found = []
        for batch in (part, larger):
            loss = next_token_loss(model, batch)
            loss.backward()
            found.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
            model.zero_grad()
        (loss, gradients), (same_loss, same_gradients) = found
        assert same_loss == pytest.approx(loss, rel=1e-5) and gradients.keys() == same_gradients.keys()
        for name, gradient in gradients.items():
            # not divided by the number of targets, so some 20 times as large
            torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-3, atol=4e-5, msg=name)


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(ValueError, match=r"pp is 4; .* has 3 of them .* at most 3"):
        stage_layers((2, 4, 6), 6, 4)


@pytest.mark.parametrize(
    ("changes", "num_ranks", "message"),
    [
        ({}, 2, r"pp is 2, .* 1 micro-batches \(of 7 in 7 samples\)"),
        ({"micro_batch_size": 4}, 4, r"1 micro-batches \(of 4 in 4 samples\)"),
    ],
)
def test_fewer_micro_batches_than_stages_are_refused(model, config, tmp_path, monkeypatch, changes, num_ranks, message):
    monkeypatch.setattr(Ranks, "current", lambda: Ranks(0, num_ranks))
    monkeypatch.setattr(Ranks, "check_consistent", lambda *_: None)
    with pytest.raises(UserError, match=message):
        Trainer(model, NextTokenObjective(), [None] * 8, config(pp=2, **changes), tmp_path / "run", "test").run()


def test_only_a_language_model_with_an_image_adapter_is_split(model):
    bare = mm.MultimodalModel(replace(model.config, vision_encoder=None, image_adapter=None))
    contrastive = ContrastiveModel(
        model.config.vision_encoder, TextTowerConfig(hidden_size=8, num_layers=1, num_heads=1, embedding_size=8)
    )
    for other in (bare, contrastive):
        with pytest.raises(ValueError, match="only a language model with an image adapter is split"):
            build_stage(other, Layout(pp=2), "cpu", "fp32", loss_of_hidden_states)


def test_a_stage_refuses_the_samples_that_the_whole_model_refuses(model, make_sample, tmp_path):
    answer = make_sample(".i")
    wrong = mm.collate([mm.Sample(answer.tokens, answer.tokens, answer.images)])
    unplaced = mm.collate([mm.Sample([5, 6], [5, 6], answer.images)])
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        stage = Stage(model, [range(6)], 0, loss_of_hidden_states, group=dist.group.WORLD)
        with pytest.raises(RuntimeError) as caught:
            stage.forward_backward([wrong], 1.0)
        assert isinstance(caught.value.__cause__, AssertionError) and "no targets" in str(caught.value.__cause__)
        with pytest.raises(UserError, match="row 0 has 0 image tokens"):
            stage.forward_backward([unplaced], 1.0)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 3, 4])
def test_pipeline_steps_and_runs_equal_those_of_one_process(
    build_model, tiny_config, tiny_model, uneven, config, tmp_path, size
):
    """Pipelines of 2 and 3 ranks, and on 4 ranks of 2 with dp_shard, dp_replicate or tp of 2.

    Runs are interrupted and resumed, in the same layout and in others. One launch for all: starting ranks is slow.
    """

    def settings(**changes):
        pp = 3 if size == 3 else 2
        return config(**{"max_gradient_norm": 1e9, "micro_batch_size": 2, "pp": pp, **changes})

    steps = {"plain": (tiny_model, settings()), "clipped": (tiny_model, settings(max_gradient_norm=0.1))}
    released = replace(tiny_config, image_adapter=ImageAdapterConfig(positions=(0, 3, 5)))
    if size == 2:
        steps["released"] = (build_model(released), settings(micro_batch_size=3))
    if size == 3:
        frozen = dict.fromkeys(("vision_encoder.*", "image_adapter.projection.*", "image_adapter.blocks.0.*"))
        steps["frozen first stage"] = (tiny_model, settings(learning_rates={**FROZEN, **frozen, "*": 1e-3}))
        tied = replace(tiny_config, language_model=replace(tiny_config.language_model, tied_embeddings=True))
        steps["tied"] = (build_model(tied), settings(micro_batch_size=1))
    if size == 4:
        steps["dp_replicate"] = (tiny_model, settings(dp_shard=1))
        steps["bf16"] = (build_model(released), settings(precision="bf16"))
        steps["tp"] = (tiny_model, settings(tp=2))
        steps["tp bf16"] = (tiny_model, settings(tp=2, precision="bf16"))
    long = {
        "steps": 4,
        "batch_size": 6,
        "save_every": 2,
        "learning_rates": {**FROZEN, "*": 1e-4},
        "micro_batch_size": 1,
    }
    staged = settings(**long, max_gradient_norm=1.0, activation_checkpointing=True, evaluate_every=3)
    whole, second = replace(staged, pp=1), "checkpoints/step-00000002"
    records, lone = [*uneven, Unreadable("square-0007", "broken picture")], copy.deepcopy(tiny_model)
    evaluate = partial(answer_accuracy, batches=[mm.collate(uneven)], device=torch.device("cpu"))
    Trainer(lone, NextTokenObjective(), records, whole, tmp_path / "alone", "test", evaluate=evaluate).run()
    runs = [
        ("run", tiny_model, staged, None, None),
        ("ended", tiny_model, staged, None, 3),
        ("ended", tiny_model, staged, None, None),
    ]
    if size == 2:
        runs += [("from one process", tiny_model, staged, f"alone/{second}", None)]
    if size == 4:
        runs += [
            ("sharded", tiny_model, whole, None, None),
            ("to shards", tiny_model, whole, f"run/{second}", None),
            ("from shards", tiny_model, staged, f"sharded/{second}", None),
            ("to tp", tiny_model, replace(staged, tp=2), f"run/{second}", None),
            ("bf16 run", tiny_model, replace(staged, precision="bf16"), None, None),
        ]
    output = carry_out(tmp_path, size, samples=uneven, steps=steps, records=records, runs=runs)

    for name, (model, case) in steps.items():
        assert_same_step(torch.load(tmp_path / f"{name}.pt"), model, uneven, case, name)
    validated = lines(tmp_path / "alone")[-1]["eval/loss"]
    for name, _, case, *_ in runs:
        if case.precision == "bf16":
            assert lines(tmp_path / name)[-1]["eval/loss"] == pytest.approx(validated, rel=0.02)
        else:
            assert_same_weights(torch.load(tmp_path / name / "weights.pt"), lone, tiny_model, name)
    assert_one_process_resumes(tmp_path / "run" / second, tmp_path / "to one process", records, whole, tiny_model, lone)
    assert_same_metrics(lines(tmp_path / "run"), lines(tmp_path / "alone"))
    num_unreadable = sum(
        row.get("unreadable_records", 0) for name in {name for name, *_ in runs} for row in lines(tmp_path / name)
    )
    assert output.count("skipped record square-0007: broken picture") == num_unreadable > 0  # by one rank each time
    assert_stopped_run_has_the_same_last_checkpoint(tmp_path / "run", tmp_path / "ended", size)


def assert_one_process_resumes(checkpoint: Path, folder: Path, records, config, start, expected) -> None:
    """One process resumes a pipeline's checkpoint and ends with the expected weights."""
    model = copy.deepcopy(start)
    shutil.copytree(checkpoint, folder / "checkpoints" / checkpoint.name)
    Trainer(model, NextTokenObjective(), records, config, folder, "test").run()
    assert_same_weights(model.state_dict(), expected, start, folder.name)
    assert [row["step"] for row in lines(folder)] == [3, 4]


def assert_same_metrics(rows: list[dict], expected: list[dict]) -> None:
    for one, two in zip(rows, expected, strict=True):
        for kind in ("gate/", "eval/"):
            assert {name for name in one if kind in name} == {name for name in two if kind in name}
        for name in ("loss", "gradient_norm", "gate/attn_2", "gate/ffn_6"):
            assert one[name] == pytest.approx(two[name], rel=1e-3), name
        for name in (name for name in one if "eval/" in name):
            assert one[name] == pytest.approx(two[name], rel=1e-4), name


def assert_stopped_run_has_the_same_last_checkpoint(whole: Path, stopped: Path, size: int) -> None:
    """A run that was stopped in its third step and resumed has the same last checkpoint, with each tensor once."""
    checkpoints = [sorted((folder / "checkpoints").iterdir()) for folder in (whole, stopped)]
    assert [[path.name for path in paths] for paths in checkpoints] == [
        ["step-00000002", "step-00000004"],
        ["step-00000003", "step-00000004"],
    ]
    last, same = (paths[-1] for paths in checkpoints)
    for file in (f"__{rank}_0.distcp" for rank in range(size)):
        assert (last / file).read_bytes() == (same / file).read_bytes(), file
    assert state_of(last) == state_of(same)
    stored = FileSystemReader(last).read_metadata().storage_data.values()
    assert sum(one.length for one in stored) == sum(file.stat().st_size for file in last.glob("*.distcp"))


def assert_same_step(found: list[dict], model, samples, case, name: str) -> None:
    """The ranks have the loss, norms and gradients of one process."""
    expected = alone(model, samples, replace(case, precision="fp32", tp=1))
    near = {"rel": 0.02} if case.precision == "bf16" else {"rel": 1e-4}
    for rank in found:
        assert len({shape for shape in rank["shapes"]}) > 1, name  # there was something to pad
        assert rank["loss"] == pytest.approx(expected["loss"], **near), name
        assert (rank["loss"], rank["norms"]) == (
            found[0]["loss"],
            found[0]["norms"],
        )  # the guard must decide the same on all
        assert rank["norms"] == pytest.approx(expected["norms"], **near), name
        assert rank["frozen_with_gradient"] == []
    assert {n for rank in found for n in rank["gradients"]} == expected["gradients"].keys()
    if case.precision == "fp32":
        for rank in found:
            for parameter, gradient in rank["gradients"].items():
                whole = expected["gradients"][parameter]
                torch.testing.assert_close(gradient, whole, **CLOSE, msg=f"{name} {parameter}")
    ranks = len(found) // case.pp
    wholes = [count(stage) for stage in stages(model, case.pp)]
    shards = case.dp_shard or ranks // case.tp
    for number, rank in enumerate(found):
        share = 1.1 / shards if case.tp == 1 else 0.7  # embeddings and the projection stand on both
        assert sum(rank["held"].values()) < share * wholes[number // ranks], name
    gate = expected["gradients"]["image_adapter.blocks.2.gate_attn"]
    assert gate.abs() > 1e-4  # there is something to compare


def assert_same_weights(found: dict, lone, start, name: str) -> None:
    """Trained to where one process came, from where both started; the language model as it was."""
    for parameter, tensor in lone.state_dict().items():
        before = start.state_dict()[parameter]
        if parameter.startswith(("language_model.", "extra_embeddings")):
            assert torch.equal(found[parameter], before), f"{name} {parameter}"
        else:
            moved = (tensor - before).norm()
            assert moved > 0 and (found[parameter] - tensor).norm() < 0.01 * moved, f"{name} {parameter}"


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]
