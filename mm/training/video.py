"""What a video adapter trains on : next tokens (paper §7.3), and a matching loss (not in the paper)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mm.batch import IGNORED, Batch
from mm.model import MultimodalModel
from mm.training.objectives import NextTokenObjective, check_loss_weights, next_token_loss

SCALE = 20.0  # of cosines to logits, so that the right one of some hundred answers can get nearly all the probability


class VideoObjective(NextTokenObjective):
    """A weighted sum of two losses over clips with conversations.

    - next-token: of the answer's tokens after the clip.
    - matching: which of the micro-batch's answers belongs to a clip, as in the image side of CLIP's loss. The logits
      are cosines between the mean of a clip's vision tokens and the mean of the language model's frozen embeddings of
      each answer. The language model is not run. It is for questions that the clip alone answers, in conversations
      with one clip; other conversations are left out of it.

    With next_token_weight 0 the language model is not run.

    Args:
        matching_weight: of the matching loss, summed over clips.
        next_token_weight: of the next-token loss, summed over target tokens. A step divides the weighted sum of both by
            the number of target tokens.

    Raises:
        UserError: a weight is below 0, or both are 0.
    """

    forward_methods = (*NextTokenObjective.forward_methods, "encode_videos")

    def __init__(self, matching_weight: float = 0.0, next_token_weight: float = 1.0) -> None:
        super().__init__()
        check_loss_weights(matching_weight=matching_weight, next_token_weight=next_token_weight)
        self.matching_weight, self.next_token_weight = matching_weight, next_token_weight
        self.num_matched = self.num_clips = 0

    def loss(self, module: MultimodalModel, batch: Batch) -> Tensor:
        vision_tokens: list[Tensor] = []
        loss = torch.zeros((), device=batch.tokens.device)
        if self.next_token_weight:
            assert module.video_adapter is not None
            hook = module.video_adapter.register_forward_hook(lambda _, __, output: vision_tokens.append(output))
            try:
                loss = self.next_token_weight * next_token_loss(module, batch)
            finally:
                hook.remove()
        elif batch.videos:
            vision_tokens.append(module.encode_videos(batch.videos))
        if self.matching_weight and vision_tokens:
            matching, num_matched, num_clips = matching_loss(module, batch, vision_tokens[0])
            loss = loss + self.matching_weight * matching
            self.num_matched += num_matched
            self.num_clips += num_clips
        return loss

    def observe(self, module: MultimodalModel) -> dict[str, float]:
        """As the base class, with `match_accuracy`: the share of clips since the last call that are nearest to their
        own answer."""
        values = super().observe(module)
        if self.num_clips:
            values["match_accuracy"] = self.num_matched / self.num_clips
        self.num_matched = self.num_clips = 0
        return values


def matching_loss(model: MultimodalModel, batch: Batch, vision_tokens: Tensor) -> tuple[Tensor, int, int]:
    """Cross-entropy of each clip's own answer among the micro-batch's, summed over rows with one clip and an answer.

    Args:
        vision_tokens: of the batch's clips, packed, [N, D].

    Returns:
        The loss, the number of clips that are nearest to their own answer, and the number of clips.
    """
    assert batch.host.labels is not None
    clips = iter(vision_tokens.split(model.clip_sizes(batch.videos)))
    not_answer = {IGNORED, *model.config.language_model.stop_tokens}
    pooled: list[Tensor] = []
    answers: list[tuple[int, ...]] = []
    for labels, num_clips in zip(batch.host.labels.tolist(), batch.videos_per_row, strict=True):
        row_clips = [next(clips) for _ in range(num_clips)]
        answer = tuple(label for label in labels if label not in not_answer)
        if num_clips == 1 and answer:
            pooled.append(row_clips[0].float().mean(0))
            answers.append(answer)
    if not pooled:
        return vision_tokens.sum() * 0.0, 0, 0
    classes = sorted(set(answers))
    device = vision_tokens.device
    targets = torch.tensor([classes.index(answer) for answer in answers], device=device)
    table = F.normalize(torch.stack([_mean_embedding(model, answer, device) for answer in classes]), dim=-1)
    logits = SCALE * F.normalize(torch.stack(pooled), dim=-1) @ table.T
    num_matched = int((logits.argmax(-1) == targets).sum())
    return F.cross_entropy(logits, targets, reduction="sum"), num_matched, len(targets)


def _mean_embedding(model: MultimodalModel, tokens: Sequence[int], device: torch.device) -> Tensor:
    return model.embed(torch.tensor([tokens], device=device))[0].float().mean(0)
