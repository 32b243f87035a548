"""A matching loss (not in the paper), which aligns vision tokens with answers, beside the loss of next tokens.

Shapes: N vision tokens of a micro-batch's images or clips, packed; I images or clips, A answers, C different answers,
D the language model's width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from mm.batch import IGNORED, Batch
from mm.config import ModelConfig
from mm.modalities import IMAGE, VIDEO, Modality
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.training.flops import Flops, Row, TrainedParts, media_flops
from mm.training.media_flops import Clip
from mm.training.objectives import NextTokenObjective, check_loss_weights, next_token_loss

SCALE = 20.0  # of cosines to logits, so that the right one of some hundred answers can get nearly all the probability


class MatchingObjective(NextTokenObjective):
    """A weighted sum of two losses over images or clips with captions or conversations.

    - next-token: of the answers' tokens.
    - matching: which of the micro-batch's answers belongs to an image or clip, and how near it is, see `matching_loss`.
      The language model is not run. It is for captions, and for questions that the image or clip alone answers.

    With next_token_weight 0 the language model is not run.

    Args:
        modality: IMAGE or VIDEO, whose vision tokens are matched.
        matching_weight: of the matching loss, summed over answers.
        next_token_weight: of the next-token loss, summed over target tokens. A step divides the weighted sum of both by
            the number of target tokens.

    Raises:
        UserError: a weight is below 0, or both are 0.
    """

    forward_methods = (*NextTokenObjective.forward_methods, "encode_images", "encode_videos")

    def __init__(
        self,
        modality: Modality,
        matching_weight: float = 0.0,
        next_token_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_loss_weights(matching_weight=matching_weight, next_token_weight=next_token_weight)
        self.kind = modality.name  # a modality's functions cannot be pickled, and workers may get the objective so
        self.matching_weight, self.next_token_weight = matching_weight, next_token_weight
        self.num_matched = self.num_answers = 0

    @property
    def modality(self) -> Modality:
        return IMAGE if self.kind == IMAGE.name else VIDEO

    @property
    def runs_language_model(self) -> bool:
        return bool(self.next_token_weight)

    def step_flops(
        self,
        config: ModelConfig,
        rows: Sequence[Row],
        trained: TrainedParts,
        activation_checkpointing: bool = False,
        encoded: Sequence[int] | None = None,
        encoded_clips: Sequence[Clip] | None = None,
    ) -> Flops:
        """As the base class; the matching loss itself is not counted."""
        count = super().step_flops if self.runs_language_model else media_flops
        return count(config, rows, trained, activation_checkpointing, encoded, encoded_clips)

    def loss(self, module: MultimodalModel, batch: Batch) -> Tensor:
        vision_tokens: list[Tensor] = []
        loss = torch.zeros((), device=batch.tokens.device)
        if self.runs_language_model:
            part = _last_part(module, self.modality)
            hook = part.register_forward_hook(lambda _, __, output: vision_tokens.append(output))
            try:
                loss = self.next_token_weight * next_token_loss(module, batch)
            finally:
                hook.remove()
        elif batch.items(self.modality):
            vision_tokens.append(_encode(module, batch, self.modality))
        if self.matching_weight and vision_tokens:
            matching, num_matched, num_answers = matching_loss(module, batch, self.modality, vision_tokens[0])
            loss = loss + self.matching_weight * matching
            self.num_matched += num_matched
            self.num_answers += num_answers
        return loss

    def observe(self, module: MultimodalModel) -> dict[str, float]:
        """As the base class, with `match_accuracy`: the share of answers since the last call to which their image or
        clip is nearer than to the answers that they are compared with, over all ranks."""
        values = super().observe(module)
        if self.matching_weight:
            num_matched, num_answers = Ranks.current().all_reduce_sum(self.num_matched, self.num_answers)
            if num_answers:
                values["match_accuracy"] = num_matched / num_answers
        self.num_matched = self.num_answers = 0
        return values


def match_accuracy(
    model: MultimodalModel, batches: Sequence[Batch], modality: Modality, device: torch.device
) -> dict[str, float]:
    """The matching loss on batches with labels, without running the language model.

    Returns:
        "loss" per answer, and "match_accuracy", see `MatchingObjective.observe`; answers are compared within batches.
    """
    loss, num_matched, num_answers = 0.0, 0, 0
    for batch in batches:
        batch = batch.to(device)
        if batch.items(modality):
            sums = matching_loss(model, batch, modality, _encode(model, batch, modality))
            loss, num_matched, num_answers = loss + float(sums[0]), num_matched + sums[1], num_answers + sums[2]
    if not num_answers:
        raise UserError(
            f"no validation sample has an answer about a single {modality.name} that stands beside another answer to "
            "be compared with: validate on more samples, in larger micro-batches"
        )
    return {"loss": loss / num_answers, "match_accuracy": num_matched / num_answers}


class Answer(NamedTuple):
    """An answer about an image or clip. Attributes: item: its index in the batch. question, answer: tokens."""

    item: int
    question: tuple[int, ...]
    answer: tuple[int, ...]


def matching_loss(
    model: MultimodalModel, batch: Batch, modality: Modality, vision_tokens: Tensor
) -> tuple[Tensor, int, int]:
    """How well each image or clip fits its own answer: better than others, and how well by itself; summed over answers.

    Fits are cosines, as in the image side of CLIP's loss: between the mean of an image's vision tokens and the mean of
    the language model's frozen embeddings of an answer, less what all embeddings have in common. Two embeddings of
    SmolLM2 have a cosine of 0.44 on average, which would leave little between answers. The loss is the cross-entropy of
    the own answer among the micro-batch's, with SCALE times the cosines as logits, plus 1 - the cosine of the own one.

    An answer is compared with others to the same question, because several answers about one image are right, each to
    its own question. If no other answer to its question stands in the micro-batch, it is compared with all of them.
    Other answers about the same image to the same question, such as a second caption, are right as well and take no
    part. An answer with nothing to compare it with is not counted.

    Args:
        vision_tokens: of the batch's images or clips, packed, [N, D].

    Returns:
        The loss, the number of answers to which their image or clip is nearest, and the number of answers compared.
    """
    answers = answers_of(batch, modality, model.config.language_model.stop_tokens)
    if not answers:
        return vision_tokens.sum() * 0.0, 0, 0
    device = vision_tokens.device
    items = vision_tokens.split(_sizes(model, batch, modality))
    pooled = torch.stack([items[answer.item].float().mean(0) for answer in answers])  # [A, D]
    classes = sorted({answer.answer for answer in answers})
    table = torch.stack([_mean_embedding(model, tokens, device) for tokens in classes])  # [C, D]
    table = table - _mean_embedding(model, centre_tokens(model), device)
    targets, compared = candidates(answers, classes)
    targets = targets.to(device)
    with torch.autocast(device.type, enabled=False):  # in bf16 a logit near SCALE would be rounded to 0.1
        cosines = F.normalize(pooled, dim=-1) @ F.normalize(table, dim=-1).T
    logits = (SCALE * cosines).masked_fill(~compared.to(device), -torch.inf)
    is_counted = (compared.sum(1) > 1).to(device)
    num_matched = int(((logits.argmax(-1) == targets) & is_counted).sum())
    distances = 1 - cosines.gather(1, targets[:, None])[:, 0]
    loss = F.cross_entropy(logits, targets, reduction="sum") + distances[is_counted].sum()
    return loss, num_matched, int(is_counted.sum())


def answers_of(batch: Batch, modality: Modality, stop_tokens: Sequence[int]) -> list[Answer]:
    """Every answer in the rows with one item of the modality; the question is the text between it and the one before.

    Answers without tokens besides `stop_tokens` are left out.
    """
    host = batch.host
    assert host.labels is not None, "the batch has no labels"
    answers: list[Answer] = []
    for tokens, labels, items in zip(
        host.tokens.tolist(), host.labels.tolist(), batch.row_items(modality), strict=True
    ):
        if len(items) != 1:
            continue
        question: list[int] = []
        answer: list[int] = []
        for token, label in zip([*tokens, 0], [*labels, IGNORED], strict=True):
            if label != IGNORED:
                answer += [label] if label not in stop_tokens else []
                continue
            if answer:
                answers.append(Answer(items[0], tuple(question), tuple(answer)))
                question, answer = [], []
            question.append(token)
    return answers


def candidates(answers: Sequence[Answer], classes: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """The class of each answer, int64 [A], and the classes that it is compared with, bool [A, C]; see `matching_loss`.

    Args:
        classes: the different answers.
    """
    index = {tokens: number for number, tokens in enumerate(classes)}
    of_question: dict[tuple[int, ...], set[int]] = {}
    of_item: dict[int, set[int]] = {}
    of_both: dict[tuple[int, tuple[int, ...]], set[int]] = {}
    for answer in answers:
        number = index[answer.answer]
        of_question.setdefault(answer.question, set()).add(number)
        of_item.setdefault(answer.item, set()).add(number)
        of_both.setdefault((answer.item, answer.question), set()).add(number)
    compared = torch.zeros(len(answers), len(classes), dtype=torch.bool)
    for row, answer in enumerate(answers):
        own = {index[answer.answer]}
        others = of_question[answer.question] - of_both[answer.item, answer.question]
        if not others:
            others = set(range(len(classes))) - of_item[answer.item]
        compared[row, list(own | others)] = True
    return torch.tensor([index[answer.answer] for answer in answers]), compared


def _encode(model: MultimodalModel, batch: Batch, modality: Modality) -> Tensor:
    """The vision tokens of the batch's images or clips, packed, [N, D]."""
    return model.encode_images(batch.images) if modality is IMAGE else model.encode_videos(batch.videos)


def _last_part(model: MultimodalModel, modality: Modality) -> nn.Module:
    """The module whose output is the modality's vision tokens."""
    part = model.image_adapter.projection if modality is IMAGE and model.image_adapter else model.video_adapter
    assert part is not None
    return part


def _sizes(model: MultimodalModel, batch: Batch, modality: Modality) -> list[int]:
    """The number of vision tokens of each image or clip."""
    if modality is VIDEO:
        return model.clip_sizes(batch.videos)
    assert model.vision_encoder is not None
    return [model.vision_encoder.num_vision_tokens(tiles) for tiles in batch.images]


def centre_tokens(model: MultimodalModel) -> range:
    """Some thousand tokens spread over the vocabulary, whose mean embedding stands for that of all."""
    size = model.config.language_model.vocab_size
    return range(0, size, max(1, size // 1024))


def _mean_embedding(model: MultimodalModel, tokens: Sequence[int], device: torch.device) -> Tensor:
    return model.embed(torch.tensor([tokens], device=device))[0].float().mean(0)
