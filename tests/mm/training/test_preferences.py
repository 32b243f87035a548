"""DPO: losses and gradients of a plain double loop, the reference model, what is encoded and held, exact resuming."""

import copy
import json
import math

import pytest
import torch

import mm
from foundation.errors import UserError
from mm.batch import IGNORED
from mm.training import target_loss
from mm.training.comparisons import collate_comparisons
from mm.training.optimizer import apply_learning_rates
from mm.training.preferences import PreferenceObjective, answer_log_probs, ipo_loss, sigmoid_loss
from mm.training.reference import Reference
from tests.mm.conftest import FROZEN
from tests.mm.training.compared import END, make_comparisons

RATES = {**FROZEN, "*": 1e-3}
FROZEN_ENCODER = {**FROZEN, "vision_encoder.*": None, "*": 1e-3}


@pytest.fixture(scope="module")
def comparisons(make_sample):
    return make_comparisons(make_sample)


@pytest.fixture
def other_model(build_model, tiny_config, tiny_model):
    """The same language model with other adapters and another encoder, its gates open."""
    other = build_model(tiny_config, seed=5)
    other.language_model, other.extra_embeddings = tiny_model.language_model, tiny_model.extra_embeddings
    return other


def reference_of(model, other, rates=RATES) -> Reference:
    """A reference with the weights of another model, as far as they train."""
    reference = Reference()
    names = apply_learning_rates(model, rates)
    reference.start(other, names)
    return reference


def plain_log_prob(model, sample, with_end: bool) -> torch.Tensor:
    """Token by token, from all logits of the row alone."""
    logits = model(mm.collate([sample]))[0].double()
    total = torch.zeros((), dtype=torch.float64)
    for place in range(1, len(sample.tokens)):
        token = sample.labels[place]
        if token != IGNORED and (with_end or not (place == len(sample.tokens) - 1 and token == END)):
            total = total + logits[place - 1].log_softmax(-1)[token]
    return total


def plain_loss(model, other, comparisons, beta=0.1, nll_weight=0.2, smoothing=0.0, ipo=False) -> torch.Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for one in comparisons:
        ratios = []
        for answer in one.answers:
            with torch.no_grad():
                before = plain_log_prob(other, answer, with_end=False)
            ratio = plain_log_prob(model, answer, with_end=False) - before
            scored = [label for label in answer.labels if label != IGNORED]
            ratios.append(ratio / (len(scored) - (scored[-1] == END)) if ipo else ratio)
        advantage = ratios[0] - ratios[1]
        if ipo:
            loss = loss + (advantage - 1 / (2 * beta)) ** 2
        else:
            right = torch.sigmoid(beta * advantage)
            loss = loss - (1 - smoothing) * right.log() - smoothing * (1 - right).log()
        length = sum(label != IGNORED for label in one.answers[0].labels)
        loss = loss - nll_weight * plain_log_prob(model, one.answers[0], with_end=True) / length
    return loss


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, {}),
        ({"beta": 0.5, "nll_weight": 0.0, "label_smoothing": 0.1}, {"beta": 0.5, "nll_weight": 0.0, "smoothing": 0.1}),
        ({"loss": "ipo", "beta": 0.4}, {"ipo": True, "beta": 0.4}),
    ],
)
@pytest.mark.parametrize("rates", [RATES, FROZEN_ENCODER], ids=["encoder trains", "encoder frozen"])
def test_loss_and_gradients_are_those_of_a_plain_double_loop(model, other_model, comparisons, options, plain, rates):
    if rates is FROZEN_ENCODER:
        other_model.vision_encoder = model.vision_encoder
    reference = reference_of(model, other_model, rates)
    objective = PreferenceObjective(reference, rates is RATES, **options)
    before = copy.deepcopy(model.state_dict())
    loss = objective.loss(model, objective.collate(comparisons))
    loss.backward()
    found = gradients(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    expected = plain_loss(model, other_model, comparisons, **plain)
    expected.backward()
    wanted = gradients(model)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    assert found.keys() == wanted.keys() and "image_adapter.blocks.0.gate_attn" in found
    assert ("vision_encoder.class_embedding" in found) == (rates is RATES)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-6, msg=name)
    assert wanted["image_adapter.blocks.0.gate_attn"].abs() > 1e-4


def test_precomputed_reference_log_probabilities_give_the_same_loss(model, other_model, comparisons):
    names = apply_learning_rates(model, RATES)
    reference = Reference()
    reference.start(other_model, names)
    batch = collate_comparisons(comparisons)
    with torch.no_grad():
        scored = answer_log_probs(other_model, batch.rows).scored.tolist()
    known = copy.deepcopy(comparisons)
    for index, one in enumerate(known):
        one.reference = scored[2 * index : 2 * index + 2]
    online, offline = PreferenceObjective(reference, True), PreferenceObjective(None, True)
    expected = online.loss(model, batch)
    torch.testing.assert_close(offline.loss(model, offline.collate(known)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reference_that_equals_the_policy_leaves_log_2_and_the_nll_bit_for_bit(model, comparisons, precision):
    objective = PreferenceObjective(reference_of(model, model), True)
    batch = objective.collate(comparisons)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = objective.loss(model, batch)
        policy = answer_log_probs(model, batch.rows)
    nll = torch.stack([-policy.whole[group[0]] / policy.num_whole[group[0]] for group in batch.groups])
    log_2 = -torch.nn.functional.logsigmoid(torch.zeros(len(batch.groups)))
    assert torch.equal(loss, log_2.sum() + 0.2 * nll.sum())
    loss.backward()
    assert gradients(model)["image_adapter.blocks.1.gate_ffn"].abs() > 0  # also after autocast of the reference's pass


@pytest.mark.parametrize(
    ("case", "passes"), [("encoder trains", 2), ("encoder frozen", 1), ("precomputed", 1)], ids=lambda value: str(value)
)
def test_a_picture_is_encoded_once_per_set_of_weights(model, comparisons, case, passes):
    rates = FROZEN_ENCODER if case == "encoder frozen" else RATES
    reference = None if case == "precomputed" else reference_of(model, model, rates)
    known = copy.deepcopy(comparisons)
    for one in known:
        one.reference = [0.0, 0.0] if case == "precomputed" else None
    objective = PreferenceObjective(reference, case != "encoder frozen")
    encoded, keys = [], []
    count = model.vision_encoder.layers[0].register_forward_hook(
        lambda _, inputs, __: encoded.append(inputs[0].shape[0])
    )
    projection = model.image_adapter.blocks[0].cross_attn.k_proj
    shapes = projection.register_forward_hook(lambda _, inputs, __: keys.append(inputs[0].shape[0]))
    batch = objective.collate(known)
    objective.loss(model, batch)
    count.remove(), shapes.remove()
    distinct = {id(tiles) for one in comparisons for answer in one.answers for tiles in answer.images}
    assert len(batch.rows.images) == len(distinct) == 5  # ten answers, in which they stand twelve times
    assert sum(encoded) == passes * len(distinct)
    tokens = sum(model.vision_encoder.num_vision_tokens(tiles) for tiles in batch.rows.images)
    assert keys == [tokens] * (2 if reference is not None else 1)  # chosen and rejected share keys and values


def test_logits_exist_for_a_chunk_of_answer_tokens_at_a_time(model, comparisons, monkeypatch):
    shapes = []
    batch = collate_comparisons(comparisons).rows
    expected = answer_log_probs(model, batch)
    hook = model.language_model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    apply_learning_rates(model, RATES)
    monkeypatch.setattr(target_loss, "MAX_LOGITS", 7 * model.config.language_model.vocab_size)
    found = answer_log_probs(model, batch)
    forward = len(shapes)
    found.whole.sum().backward()
    hook.remove()
    assert len(shapes) == 2 * forward  # the backward pass computes them again
    assert all(rows <= 7 and len(shape) == 1 for rows, *shape in shapes)
    assert sum(rows for rows, _ in shapes[:forward]) == sum(found.num_whole) == int((batch.labels != IGNORED).sum())
    torch.testing.assert_close(found.scored, expected.scored, rtol=1e-5, atol=1e-5)


def test_the_losses_of_pairs():
    advantage = torch.tensor([-3.0, 0.0, 2.0])
    expected = [math.log1p(math.exp(-0.1 * value)) for value in advantage.tolist()]
    assert sigmoid_loss(advantage, 0.1).tolist() == pytest.approx(expected)
    swapped = [0.9 * one + 0.1 * (one + 0.1 * value) for one, value in zip(expected, advantage.tolist(), strict=True)]
    assert sigmoid_loss(advantage, 0.1, 0.1).tolist() == pytest.approx(swapped)  # log sigmoid(-x) = log sigmoid(x) - x
    assert ipo_loss(advantage, 0.1).tolist() == pytest.approx([64.0, 25.0, 9.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta is 0"),
        ({"nll_weight": -1.0}, "nll_weight is -1"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "with ipo"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        PreferenceObjective(None, True, **options)


# ---------------------------------------------------------------------------------------------- in the trainer


class Interrupted(BaseException):
    """Like Ctrl-C."""


class Watching(PreferenceObjective):
    """Keeps the policy's weights before each step, and may stop."""

    def __init__(self, *args, stop_at=None, **options):
        super().__init__(*args, **options)
        self.weights, self.stop_at = [], stop_at

    def loss(self, module, batch):
        if len(self.weights) + 1 == self.stop_at:
            raise Interrupted
        self.weights.append({name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad})
        return super().loss(module, batch)


def test_the_reference_follows_as_the_formula_says_and_the_frozen_model_does_not_move(
    model, comparisons, config, run, saved
):
    before = copy.deepcopy(model.state_dict())
    reference = Reference(mix=0.6, every=2)
    objective = Watching(reference, True)
    folder = run(model, config(steps=5, batch_size=5), dataset=comparisons, objective=objective, reference=reference)
    after = [*objective.weights[1:], dict(model.named_parameters())]
    tensors = saved(folder / "checkpoints" / "step-00000005")
    names = [name for name in tensors if name.startswith("reference.")]
    assert sorted(names) == sorted(f"reference.{name}" for name in objective.weights[0])
    for name, first in objective.weights[0].items():
        expected = first
        for step in (2, 4):
            expected = 0.4 * expected + 0.6 * after[step - 1][name].detach()
        torch.testing.assert_close(tensors[f"reference.{name}"], expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(tensors[f"reference.{name}"], after[-1][name])
    frozen = [name for name in before if name.startswith(("language_model.", "extra_embeddings"))]
    assert frozen and all(torch.equal(before[name], model.state_dict()[name]) for name in frozen)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["preference/accuracy"] == 0 and rows[0]["preference/margin"] == 0  # equal to the reference
    assert rows[4]["loss"] < rows[0]["loss"] and rows[4]["preference/margin"] > 0


@pytest.mark.parametrize("stop_at", [2, 4, 5])
def test_a_resumed_run_ends_as_the_uninterrupted_one(model, comparisons, config, run, same, saved, stop_at):
    settings = config(steps=6, batch_size=5, save_every=3)
    other = copy.deepcopy(model)

    def train(one, folder, stop=None):
        reference = Reference(mix=0.6, every=2)
        objective = Watching(reference, True, stop_at=stop)
        return run(one, settings, folder, dataset=comparisons, objective=objective, reference=reference)

    whole = train(model, "whole")
    with pytest.raises(Interrupted):
        train(copy.deepcopy(other), "parts", stop_at)
    parts = train(other, "parts")
    assert same(model, other)
    one, two = (saved(folder / "checkpoints" / "step-00000006") for folder in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any(name.startswith("reference.") for name in one)


def test_micro_batches_give_the_loss_of_one_batch(model, other_model, comparisons):
    objective = PreferenceObjective(reference_of(model, other_model), True)
    whole = objective.loss(model, objective.collate(comparisons))
    parts = [objective.loss(model, objective.collate(comparisons[n : n + 2])) for n in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)
    assert objective.count(objective.collate(comparisons)) == 5


def test_a_dummy_adds_nothing_and_reaches_every_part(model, other_model, comparisons):
    objective = PreferenceObjective(reference_of(model, other_model), True)
    dummy = objective.dummy_sample(model)
    alone = objective.collate([dummy])
    assert objective.count(alone) == 0 and alone.groups == []
    loss = objective.loss(model, alone)
    loss.backward()
    found = gradients(model)
    assert loss.item() == 0 and "vision_encoder.class_embedding" in found
    assert all(not gradient.any() for gradient in found.values())
    one, two = (objective.loss(model, objective.collate(rows)) for rows in (comparisons, [*comparisons, dummy]))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=0)
