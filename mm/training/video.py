"""What the video stage trains on: next tokens, and what is watched near the embeddings of what is said of it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mm.batch import IGNORED, Batch
from mm.model import MultimodalModel
from mm.training.objectives import NextTokenObjective, check_weights, next_token_loss

SCALE = 20.0  # of cosines to logits: the right one of some hundred answers can have nearly all of the probability


class VideoObjective(NextTokenObjective):
    """Next tokens after what is watched, and an auxiliary loss that needs no pass through the language model.

    The auxiliary loss tells clips' answers apart by what the aggregator gives: the mean over a clip's vision tokens is
    compared by cosine with the mean of the language model's frozen embeddings of each answer in the micro-batch, and
    has to be nearest to its own (the loss of CLIP's picture side). It fits questions that a clip alone decides, however
    they are worded, in rows with one clip each; other rows have no part in it.

    Args:
        matching_weight: of the auxiliary loss, summed over clips. next_token_weight: of the language model's, summed
            over target tokens; with 0 it is not run at all. A step divides both by its target tokens.

    Raises:
        UserError: a weight below 0, or none above.
    """

    forward_methods = (*NextTokenObjective.forward_methods, "encode_videos")

    def __init__(self, matching_weight: float = 0.0, next_token_weight: float = 1.0) -> None:
        super().__init__()
        check_weights(matching_weight=matching_weight, next_token_weight=next_token_weight)
        self.matching_weight, self.next_token_weight = matching_weight, next_token_weight
        self.matched = self.compared = 0

    def loss(self, module: MultimodalModel, batch: Batch) -> Tensor:
        watched: list[Tensor] = []
        loss = torch.zeros((), device=batch.tokens.device)
        if self.next_token_weight:
            adapter = module.video_adapter
            hook = adapter.register_forward_hook(lambda _, __, output: watched.append(output))
            try:
                loss = self.next_token_weight * next_token_loss(module, batch)
            finally:
                hook.remove()
        elif batch.videos:
            watched.append(module.encode_videos(batch.videos))
        if self.matching_weight and watched:
            matching, right, clips = matching_loss(module, batch, watched[0])
            loss = loss + self.matching_weight * matching
            self.matched, self.compared = self.matched + right, self.compared + clips
        return loss

    def observe(self, module: MultimodalModel) -> dict[str, float]:
        """As the base, and the share of clips since the last report that were nearest to their own answer."""
        values = super().observe(module)
        if self.compared:
            values["matched"] = self.matched / self.compared
        self.matched = self.compared = 0
        return values


def matching_loss(model: MultimodalModel, batch: Batch, watched: Tensor) -> tuple[Tensor, int, int]:
    """Negative log-likelihood of the right answer among the micro-batch's, summed over rows with a clip and an answer.

    Args:
        watched: the vision tokens of the batch's clips, packed, [N, D].

    Returns:
        the loss, how many of the clips were nearest to their own answer, and how many there were.
    """
    clips = iter(watched.split(model.clip_sizes(batch.videos)))
    stops = set(model.config.language_model.stop_tokens)
    pooled: list[Tensor] = []
    answers: list[tuple[int, ...]] = []
    for labels, number in zip(batch.host.labels.tolist(), batch.videos_per_row, strict=True):
        own = [next(clips) for _ in range(number)]
        answer = tuple(label for label in labels if label != IGNORED and label not in stops)
        if number == 1 and answer:
            pooled.append(own[0].float().mean(0))
            answers.append(answer)
    if not pooled:
        return watched.sum() * 0.0, 0, 0
    among = sorted(set(answers))
    own = torch.tensor([among.index(answer) for answer in answers], device=watched.device)
    table = F.normalize(torch.stack([_mean_embedding(model, answer, watched.device) for answer in among]), dim=-1)
    logits = SCALE * F.normalize(torch.stack(pooled), dim=-1) @ table.T
    right = int((logits.argmax(-1) == own).sum())
    return F.cross_entropy(logits, own, reduction="sum"), right, len(own)


def _mean_embedding(model: MultimodalModel, tokens: Sequence[int], device: torch.device) -> Tensor:
    return model.embed(torch.tensor([tokens], device=device))[0].float().mean(0)
