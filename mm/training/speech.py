"""What the speech stages train on: next tokens, what is heard near the embeddings of what is said, and BEST-RQ."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mm.batch import IGNORED, Batch
from mm.model import MultimodalModel
from mm.training.objectives import NextTokenObjective, check_weights, next_token_loss
from mm.training.parallel import whole
from speech.adapter import num_tokens
from speech.best_rq import BestRq, BestRqConfig, BestRqOutput, CodeStatistics, draw_masks
from speech.conformer import STACK, SpeechEncoder
from speech.features import FRAMES_PER_SECOND, FeatureStatistics

SCALE = 20.0  # of cosines to logits: the right one of some hundred tokens can have nearly all of the probability


class SpeechObjective(NextTokenObjective):
    """Next tokens after what is heard, and an auxiliary loss that needs no pass through the language model.

    The auxiliary loss is CTC over the rows that the speech adapter gives: each is compared by cosine with the language
    model's frozen embeddings of the answer's tokens, so that the adapter says in the model's own input what it heard
    and where. It fits answers that repeat what is said, a row with one utterance each; other rows have no part in it.
    An answer's tokens are told from those of all answers in the micro-batch, not from the whole vocabulary.

    Args:
        ctc_weight: of the auxiliary loss, per token of the answers. next_token_weight: of the language model's; with 0
            it is not run at all.

    Raises:
        ValueError: a weight below 0, or none above.
    """

    whole_passes = (*NextTokenObjective.whole_passes, "hear")

    def __init__(self, ctc_weight: float = 0.0, next_token_weight: float = 1.0) -> None:
        super().__init__()
        check_weights(ctc_weight=ctc_weight, next_token_weight=next_token_weight)
        self.ctc_weight, self.next_token_weight = ctc_weight, next_token_weight
        self.rms: Tensor | None = None
        self.padding = Padding()

    def loss(self, module: MultimodalModel, batch: Batch) -> Tensor:
        self.padding.update([len(mel) for mel in batch.speech])
        if not self.next_token_weight:
            if not batch.speech:
                return batch.tokens.new_zeros((), dtype=torch.float32)
            heard = [module.hear(batch.speech)]
            loss = heard[0].new_zeros(())
        else:
            heard = []
            hook = module.speech_adapter.register_forward_hook(lambda _, __, output: heard.append(packed(*output)))
            try:
                loss = self.next_token_weight * next_token_loss(module, batch)
            finally:
                hook.remove()
        if heard:
            self.rms = heard[0].detach().float().square().mean().sqrt()
            if self.ctc_weight:
                loss = loss + self.ctc_weight * ctc_loss(module, batch, heard[0])
        return loss

    def observe(self, module: MultimodalModel) -> dict[str, float]:
        """As the base, the share of padding, and how large what was heard last is beside the LM's embeddings."""
        values = {**super().observe(module), **self.padding.take()}
        if self.rms is not None:
            table = whole(module.language_model.model.embed_tokens.weight).float()
            values["speech/rms_ratio"] = float(self.rms / table.square().mean().sqrt())
        return values


class Padding:
    """The share of mel frames that stand behind utterances shorter than the longest of their micro-batch."""

    def __init__(self) -> None:
        self.real = self.all = 0

    def update(self, lengths: Sequence[int]) -> None:
        self.real += sum(lengths)
        self.all += len(lengths) * max(lengths, default=0)

    def take(self) -> dict[str, float]:
        """The share since it was last taken; nothing where nothing was heard."""
        values = {"padding_share": 1 - self.real / self.all} if self.all else {}
        self.real = self.all = 0
        return values


def packed(tokens: Tensor, lengths: Tensor) -> Tensor:
    """tokens [B, N, D] of utterances of so many tokens each, [B] -> [sum of lengths, D]."""
    return torch.cat([row[:count] for row, count in zip(tokens, lengths.tolist(), strict=True)])


def ctc_loss(model: MultimodalModel, batch: Batch, heard: Tensor) -> Tensor:
    """Negative log-likelihood of the answers' tokens, summed over rows with one utterance and an answer that fits it.

    Of an empty answer it is that of hearing nothing, which only words elsewhere in the micro-batch make uncertain.

    Args:
        heard: what the batch's utterances became, packed, [N, D].
    """
    utterances = iter(heard.split([num_tokens(len(mel)) for mel in batch.speech]))
    stops = set(model.config.language_model.stop_tokens)
    rows, answers = [], []
    for labels, number in zip(batch.host.labels.tolist(), batch.speech_per_row, strict=True):
        own = [next(utterances) for _ in range(number)]
        answer = [label for label in labels if label != IGNORED and label not in stops]
        if number == 1 and any(label != IGNORED for label in labels):
            rows.append(own[0])
            answers.append(answer)  # of a sound in which nothing is said an empty one
    if not rows:
        return heard.sum() * 0.0
    spoken = torch.tensor([token for answer in answers for token in answer], dtype=torch.long)
    classes, places = spoken.unique(return_inverse=True)
    # The audio token's own frozen row, which nothing else uses, is CTC's blank; it comes first.
    rows_of = torch.cat([torch.tensor([model.config.audio_token_id]), classes]).to(heard.device)
    table = F.normalize(model.embed(rows_of[None])[0].float(), dim=-1)  # [C, D]
    x = F.normalize(pad_sequence(rows).float(), dim=-1)  # [N, B, D]
    return F.ctc_loss(
        (SCALE * x @ table.T).log_softmax(-1),
        places.to(heard.device) + 1,
        torch.tensor([len(row) for row in rows]),
        torch.tensor([len(answer) for answer in answers]),
        reduction="sum",
        zero_infinity=True,  # an answer of more tokens than were heard
    )


def set_statistics(encoder: SpeechEncoder, utterances: Sequence[Tensor]) -> None:
    """Give a new conformer the mean and deviation of utterances' features, each [T, num_mels].

    Raises:
        ValueError: there are none.
    """
    if not utterances:
        raise ValueError("no sound in any of the samples that a new conformer's feature statistics are taken of")
    statistics = FeatureStatistics()
    for mel in utterances:
        statistics.update(mel)
    encoder.set_feature_statistics(*statistics.mean_std())


@dataclass
class Utterance:
    """Log-mel features [T, num_mels], and the seed of its masks; None masks nothing."""

    mel: Tensor
    seed: int | None


@dataclass
class UtteranceBatch:
    """Utterances side by side: mel [B, T, num_mels], lengths int64 [B] and masks bool [B, T], both on the CPU."""

    mel: Tensor
    lengths: Tensor
    masks: Tensor

    def to(self, device: torch.device | str) -> "UtteranceBatch":
        return UtteranceBatch(self.mel.to(device, non_blocking=True), self.lengths, self.masks)


class SpeechPretraining(nn.Module):
    """A speech encoder and what BEST-RQ needs beside it."""

    def __init__(self, encoder: SpeechEncoder, config: BestRqConfig) -> None:
        super().__init__()
        self.speech_encoder = encoder
        self.best_rq = BestRq(config, encoder.config.width, encoder.config.num_mels)

    def forward(self, batch: UtteranceBatch) -> BestRqOutput:
        return self.best_rq(self.speech_encoder, batch.mel, batch.lengths, batch.masks)


class BestRqObjective:
    """The codes behind masks; the loss is the mean over masked frames and codebooks.

    Reported are, since the last report: the share of codes that were targets, averaged over codebooks, their
    perplexity, the share of mel frames that were masked, how many codes were guessed, and the share of padding.
    Collapsed codes are warned of. Over several ranks each counts its own, and the first reports.
    """

    whole_passes = ()

    def __init__(self, config: BestRqConfig) -> None:
        self.config, self.padding = config, Padding()
        self._begin()

    def _begin(self) -> None:
        self.statistics, self.correct, self.targets = CodeStatistics(self.config), 0, 0

    def idle(self, module: SpeechPretraining) -> Utterance:
        return Utterance(torch.zeros(1, module.speech_encoder.config.num_mels), None)

    def collate(self, samples: list[Utterance]) -> UtteranceBatch:
        lengths = [len(sample.mel) for sample in samples]
        masks = draw_masks(lengths, [sample.seed or 0 for sample in samples], self.config)
        for row, sample in enumerate(samples):
            masks[row] &= sample.seed is not None
        return UtteranceBatch(
            pad_sequence([sample.mel for sample in samples], batch_first=True), torch.tensor(lengths), masks
        )

    def size(self, sample: Utterance) -> int:
        return len(sample.mel)

    def count(self, batch: UtteranceBatch) -> int:
        """Masked frames of the encoder, times codebooks. Behind an utterance nothing is masked, so that a last frame
        that its mel frames do not fill is none."""
        masks = F.pad(batch.masks, (0, -batch.masks.shape[1] % STACK)).unflatten(1, (-1, STACK))
        return int(masks.all(-1).sum()) * self.config.num_codebooks

    def loss(self, module: SpeechPretraining, batch: UtteranceBatch) -> Tensor:
        self.padding.update(batch.lengths.tolist())
        output = module(batch)
        self.statistics.update(output.targets, output.num_masked, output.num_frames)
        self.correct += int(output.num_correct)
        self.targets += output.num_targets
        return output.loss_sum

    def throughput(self, batch: UtteranceBatch) -> dict[str, float]:
        return {"audio_seconds": int(batch.lengths.sum()) / FRAMES_PER_SECOND, "mel_frames": batch.mel[..., 0].numel()}

    def observe(self, module: SpeechPretraining) -> dict[str, float]:
        if warning := self.statistics.warning():
            print(f"warning: {warning}", file=sys.stderr)
        values = {
            "codes/coverage": float(self.statistics.coverage().mean()),
            "codes/perplexity": float(self.statistics.perplexity().mean()),
            "masked_share": self.statistics.masked_share(),
            "codes/guessed": self.correct / max(1, self.targets),
            **self.padding.take(),
        }
        self._begin()
        return values
