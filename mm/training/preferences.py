"""Direct preference optimisation (DPO, arXiv 2305.18290) as the paper modifies it (§7.5.4).

The loss of a pair is -log sigmoid(beta * (log-ratio of the chosen - log-ratio of the rejected)), where a log-ratio is
that of policy to reference, summed over an answer's tokens without the end token, plus `nll_weight` times the negative
log-likelihood of the chosen answer per token, the end token included. Logits exist for a chunk of tokens at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.errors import UserError
from mm.batch import Batch
from mm.config import ModelConfig
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.training.comparisons import Comparison, ComparisonBatch, collate_comparisons
from mm.training.flops import TrainedParts, batch_clips, batch_rows
from mm.training.objectives import NextTokenObjective, target_positions
from mm.training.reference import Reference, recorded_outputs
from mm.training.target_loss import target_losses

PairLoss = Literal["sigmoid", "ipo"]


class AnswerLogProbs(NamedTuple):
    """Log-probabilities of the answers in a batch's rows, FP32.

    Attributes:
        scored: [B], summed over the tokens that are compared: without the end token, which is the format's.
        whole: [B], summed over all tokens of the answer. num_scored, num_whole: how many there are, on the host.
    """

    scored: Tensor
    whole: Tensor
    num_scored: list[int]
    num_whole: list[int]


def answer_log_probs(model: MultimodalModel, batch: Batch) -> AnswerLogProbs:
    """Log-probabilities of the labelled answer of each row; header tokens are no labels, so none of them counts."""
    hidden = model.hidden_states(batch)
    rows, columns, targets = target_positions(model, batch)
    places = (index.to(hidden.device) for index in (rows, columns))
    log_probs = -target_losses(model.language_model.lm_head, hidden[*places], targets.to(hidden.device))
    counts = torch.bincount(rows, minlength=len(batch.tokens)).tolist()
    stops = set(model.config.language_model.stop_tokens)
    ends = torch.tensor(counts).cumsum(0).tolist()
    ended = [count > 0 and int(targets[end - 1]) in stops for count, end in zip(counts, ends, strict=True)]
    num_scored = [count - is_ended for count, is_ended in zip(counts, ended, strict=True)]
    parts = log_probs.split(counts)
    scored = torch.stack([part[:count].sum() for part, count in zip(parts, num_scored, strict=True)])
    return AnswerLogProbs(scored, torch.stack([part.sum() for part in parts]), num_scored, counts)


def sigmoid_loss(advantage: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss of each pair.

    Args:
        advantage: log-ratio of the chosen answer to the reference minus that of the rejected one.
        label_smoothing: the probability that a preference is the wrong way round (conservative DPO).
    """
    right, wrong = F.logsigmoid(beta * advantage), F.logsigmoid(-beta * advantage)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(advantage: Tensor, beta: float) -> Tensor:
    """IPO's loss of each pair (arXiv 2310.12036); `advantage` is of log-ratios per token."""
    return (advantage - 1 / (2 * beta)).square()


class PreferenceObjective(NextTokenObjective):
    """DPO on pairs: each `Comparison` has two answers.

    Args:
        reference: the weights to compare with; None: each pair brings its reference log-probabilities.
        encoder_trains: whether the reference's image encoder differs from the policy's, so that both must run.
        beta, nll_weight, loss, label_smoothing: see above.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        reference: Reference | None,
        encoder_trains: bool,
        beta: float = 0.1,
        nll_weight: float = 0.2,
        loss: PairLoss = "sigmoid",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not beta > 0:
            raise UserError(f"beta is {beta}; it must be above 0")
        if not nll_weight >= 0:
            raise UserError(f"nll_weight is {nll_weight}; it must be 0 or more")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"label_smoothing is {label_smoothing}; it must lie in [0, 0.5)")
        if loss == "ipo" and label_smoothing:
            raise UserError("label_smoothing is for the sigmoid loss: set it to 0 with ipo")
        self.reference, self.encoder_trains = reference, encoder_trains
        self.beta, self.nll_weight, self.kind, self.label_smoothing = beta, nll_weight, loss, label_smoothing
        self._sums = dict.fromkeys(("pairs", "accuracy", "margin", "chosen", "rejected", "nll"), 0.0)

    def batch_flops(self, batch: Batch, config: ModelConfig, trained: TrainedParts) -> int:
        """As the base class, with the forward pass of the reference."""
        policy = super().batch_flops(batch, config, trained)
        if self.reference is None:
            return policy
        tiles = [image.num_tiles for image in batch.images]
        untrained = TrainedParts.of((), config)
        reference = self.step_flops(config, batch_rows(batch), untrained, False, tiles, batch_clips(batch))
        return policy + reference.total - (0 if self.encoder_trains else reference.vision_encoder)

    def dummy_sample(self, module: MultimodalModel) -> Comparison:  # type: ignore[override]
        sample = super().dummy_sample(module)
        return Comparison([sample, sample])

    def collate(self, samples: list[Comparison]) -> ComparisonBatch:  # type: ignore[override]
        return collate_comparisons(samples)

    def size(self, sample: Comparison) -> int:  # type: ignore[override]
        return sample.num_tokens

    def count(self, batch: ComparisonBatch) -> int:  # type: ignore[override]
        return len(batch.groups)

    def throughput(self, batch: ComparisonBatch) -> dict[str, float]:  # type: ignore[override]
        return super().throughput(batch.rows)

    def used_parts(self, batch: ComparisonBatch) -> dict[str, bool]:  # type: ignore[override]
        return super().used_parts(batch.rows)

    def loss(self, module: MultimodalModel, batch: ComparisonBatch) -> Tensor:  # type: ignore[override]
        with self._shared_encoder(module) as replay:
            references = self._reference_log_probs(module, batch)
            replay()
            policy = answer_log_probs(module, batch.rows)
        ratios = policy.scored - references
        if self.kind == "ipo":
            ratios = ratios / torch.tensor(policy.num_scored, device=ratios.device).clamp(min=1)
        chosen, rejected = (torch.tensor([group[n] for group in batch.groups], dtype=torch.long) for n in (0, 1))
        chosen, rejected = chosen.to(ratios.device), rejected.to(ratios.device)
        advantage = ratios[chosen] - ratios[rejected]
        if self.kind == "ipo":
            losses = ipo_loss(advantage, self.beta)
        else:
            losses = sigmoid_loss(advantage, self.beta, self.label_smoothing)
        num_tokens = torch.tensor([policy.num_whole[group[0]] for group in batch.groups], device=ratios.device)
        nll = -policy.whole[chosen] / num_tokens
        self._note(ratios[chosen].detach(), ratios[rejected].detach(), nll.detach())
        # The last term is 0; it connects a batch without pairs to every part of the model.
        return losses.sum() + self.nll_weight * nll.sum() + policy.whole.sum() * 0.0

    @contextmanager
    def _shared_encoder(self, module: MultimodalModel) -> Iterator[Callable[[], None]]:
        """Context in which a frozen encoder runs once for reference and policy."""
        shares = self.reference is not None and not self.encoder_trains and module.vision_encoder is not None
        if not shares:
            yield lambda: None
            return
        assert module.vision_encoder is not None
        with recorded_outputs(module.vision_encoder) as replay:
            yield replay

    def _reference_log_probs(self, module: MultimodalModel, batch: ComparisonBatch) -> Tensor:
        """`AnswerLogProbs.scored` of each row under the reference, [B]."""
        device = batch.rows.tokens.device
        if self.reference is None:
            assert batch.references is not None or not batch.groups, "pairs without reference log-probabilities"
            references = batch.references or [0.0] * len(batch.rows.tokens)
            return torch.tensor(references, dtype=torch.float32, device=device)
        with self.reference.exchanged(module):
            return answer_log_probs(module, batch.rows).scored

    def _note(self, chosen: Tensor, rejected: Tensor, nll: Tensor) -> None:
        difference = chosen - rejected
        found: dict[str, Any] = {"pairs": len(difference), "accuracy": (difference > 0).sum(), "nll": nll.sum()}
        found |= {"margin": difference.sum(), "chosen": chosen.sum(), "rejected": rejected.sum()}
        self._sums = {name: total + found[name] for name, total in self._sums.items()}

    def observe(self, module: MultimodalModel) -> dict[str, float]:
        """As the base class, with the means over pairs since the last call: `preference/accuracy`, the share whose
        log-ratio is larger for the chosen answer, both log-ratios, their difference, and the chosen's NLL per token."""
        values = super().observe(module)
        sums = Ranks.current().all_reduce_sum(*(float(total) for total in self._sums.values()))
        totals = dict(zip(self._sums, sums, strict=True))
        self._sums = dict.fromkeys(self._sums, 0.0)
        if pairs := totals.pop("pairs"):
            values |= {f"preference/{name}": total / pairs for name, total in totals.items()}
        return values


def pair_accuracy(
    model: MultimodalModel, batches: Sequence[ComparisonBatch], device: torch.device | str
) -> dict[str, float]:
    """Held-out pairs: "likelier", the share whose chosen answer has the larger log-probability, "likelier_per_token",
    the same per token, and "nll" of the chosen answer per token."""
    totals, num_pairs = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches:
        found = answer_log_probs(model, batch.to(device).rows)
        scored, whole = found.scored.double().cpu(), found.whole.double().cpu()
        for chosen, rejected in batch.groups:
            lengths = [max(1, found.num_scored[row]) for row in (chosen, rejected)]
            totals[0] += scored[chosen] > scored[rejected]
            totals[1] += scored[chosen] / lengths[0] > scored[rejected] / lengths[1]
            totals[2] -= whole[chosen] / found.num_whole[chosen]
            num_pairs += 1
    return dict(zip(("likelier", "likelier_per_token", "nll"), (totals / num_pairs).tolist(), strict=True))
