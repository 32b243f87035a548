"""What a speech adapter trains on: next tokens, and what is heard near the embeddings of what is said."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from foundation.errors import UserError
from mm.batch import IGNORED, Batch, Sample
from mm.model import MultimodalModel
from mm.parallel.ranks import whole
from mm.training.distillation import DistillationSample, collate_twins, divergence
from mm.training.objectives import NextTokenObjective, check_weights, loss_of_hidden_states
from speech.adapter import num_tokens
from speech.conformer import SpeechEncoder
from speech.ctc_readout import SCALE
from speech.features import FeatureStatistics


class SpeechObjective(NextTokenObjective):
    """Next tokens after what is heard, and an auxiliary loss that needs no pass through the language model.

    The auxiliary loss is CTC over the rows that the speech adapter gives: each is compared by cosine with the language
    model's frozen embeddings of the answer's tokens, so that the adapter says in the model's own input what it heard
    and where; the language model reads that by `speech.ctc_readout`. It fits answers that repeat what is said, a row
    with one utterance each; other rows have no part in it. An answer's tokens are told from those of all answers in the
    micro-batch, not from the whole vocabulary. CTC's blank is the audio token's own row.

    Args:
        ctc_weight: of the auxiliary loss, per token of the answers. next_token_weight: of the language model's.
        distillation_weight: of the divergence from the language model that reads the transcript, per token of the
            answers (`mm.training.distillation`). With 0 and next_token_weight 0 the language model is not run at all.

    Raises:
        UserError: a weight below 0, or none above.
    """

    forward_methods = (*NextTokenObjective.forward_methods, "encode_audio")

    def __init__(
        self,
        ctc_weight: float = 0.0,
        next_token_weight: float = 1.0,
        distillation_weight: float = 0.0,
    ) -> None:
        super().__init__()
        weights = {"next_token_weight": next_token_weight, "distillation_weight": distillation_weight}
        check_weights(ctc_weight=ctc_weight, **weights)
        self.ctc_weight, self.next_token_weight = ctc_weight, next_token_weight
        self.distillation_weight = distillation_weight
        self.rms: Tensor | None = None
        self.padding = Padding()

    @property
    def runs_language_model(self) -> bool:
        return bool(self.next_token_weight or self.distillation_weight)

    def dummy_sample(self, module: MultimodalModel) -> Sample:
        """As the base; with a twin that runs through what the twins of other ranks' samples may run through."""
        sample, config = super().dummy_sample(module), module.config
        if not self.distillation_weight:
            return sample
        sound = (config.speech_start_id, config.audio_token_id, config.speech_end_id)
        tokens = [token for token in sample.tokens if token not in sound]
        read = Sample(tokens, [IGNORED] * len(tokens), sample.images, sample.videos)
        return DistillationSample(**vars(sample), read=read)

    def collate(self, samples: list[Sample]) -> Batch:
        return collate_twins(samples) if self.distillation_weight else super().collate(samples)

    def loss(self, module: MultimodalModel, batch: Batch) -> Tensor:
        self.padding.update([len(mel) for mel in batch.speech])
        if not self.runs_language_model:
            if not batch.speech:
                return batch.tokens.new_zeros((), dtype=torch.float32)
            heard = [module.encode_audio(batch.speech)]
            loss = heard[0].new_zeros(())
        else:
            heard = []
            hook = module.speech_adapter.register_forward_hook(lambda _, __, output: heard.append(packed(*output)))
            try:
                hidden = module.hidden_states(batch)
            finally:
                hook.remove()
            loss = hidden.new_zeros((), dtype=torch.float32)
            if self.next_token_weight:
                loss = self.next_token_weight * loss_of_hidden_states(module, hidden, batch)
            if self.distillation_weight:
                loss = loss + self.distillation_weight * divergence(module, hidden, batch)
        if heard:
            self.rms = heard[0].detach().float().square().mean().sqrt()
            if self.ctc_weight:
                loss = loss + self.ctc_weight * ctc_loss(module, batch, heard[0])
        return loss

    def observe(self, module: MultimodalModel) -> dict[str, float]:
        """As the base, the share of padding, and how large what was heard last is beside the LM's embeddings, of which
        a readout leaves nothing."""
        values = {**super().observe(module), **self.padding.take()}
        if self.rms is not None and not module.config.speech_adapter.readout:
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
    unheard = {IGNORED, *model.config.language_model.stop_tokens}
    rows, answers = [], []
    for labels, number in zip(batch.host.labels.tolist(), batch.speech_per_row, strict=True):
        own = [next(utterances) for _ in range(number)]
        answer = [label for label in labels if label not in unheard]
        if number == 1 and any(label != IGNORED for label in labels):
            rows.append(own[0])
            answers.append(answer)  # of a sound in which nothing is said an empty one
    if not rows:
        return heard.sum() * 0.0
    spoken = torch.tensor([token for answer in answers for token in answer], dtype=torch.long)
    classes, places = spoken.unique(return_inverse=True)
    tokens = torch.cat([model.ctc_blank(heard.device), classes.to(heard.device)])
    table = F.normalize(model.embed(tokens).float(), dim=-1)  # [C, D]
    x = F.normalize(pad_sequence(rows).float(), dim=-1)  # [N, B, D]
    with torch.autocast(heard.device.type, enabled=False):  # a bf16 cosine near 1 is known to 0.1 of a logit
        logits = SCALE * x @ table.T
    return F.ctc_loss(
        logits.log_softmax(-1),
        places.to(heard.device) + 1,
        torch.tensor([len(row) for row in rows]),
        torch.tensor([len(answer) for answer in answers]),
        reduction="sum",
        zero_infinity=True,  # an answer of more tokens than were heard
    )


def set_statistics(encoder: SpeechEncoder, utterances: Sequence[Tensor]) -> None:
    """Give a new conformer the mean and deviation of utterances' features, each [T, num_mels].

    Raises:
        UserError: there are none.
    """
    if not utterances:
        raise UserError("no sound in any of the samples that a new conformer's feature statistics are taken of")
    statistics = FeatureStatistics()
    for mel in utterances:
        statistics.update(mel)
    encoder.set_feature_statistics(*statistics.mean_std())
