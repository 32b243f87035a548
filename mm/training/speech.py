"""What a speech adapter trains on: next tokens (paper §8.2), and CTC and distillation losses (not in the paper).

Shapes: N rows that the speech adapter gives, packed over utterances; B utterances, D the language model's width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from foundation.errors import UserError
from mm.batch import IGNORED, Batch, Sample
from mm.config import ModelConfig
from mm.model import MultimodalModel
from mm.parallel.dtensor import full_tensor
from mm.training.distillation import DistillationBatch, DistillationSample, collate_twins, distillation_loss
from mm.training.flops import Flops, Row, TrainedParts, forward_flops, media_flops
from mm.training.media_flops import Clip
from mm.training.objectives import NextTokenObjective, check_loss_weights, loss_of_hidden_states
from speech.adapter import num_tokens
from speech.conformer import SpeechEncoder
from speech.ctc_readout import CTC_SCALE
from speech.features import FeatureStatistics


class SpeechObjective(NextTokenObjective):
    """A weighted sum of up to three losses over recordings with conversations.

    - next-token: of the answer's tokens after the recording.
    - CTC: of the answer's tokens, over the rows that the speech adapter gives. A row's logits are its cosines with the
      frozen embeddings of the tokens in the micro-batch's answers; the audio placeholder's embedding is the blank. It
      aligns rows with the language model's own embeddings, which `speech.ctc_readout` relies on, and does not run the
      language model. It is for answers that repeat the recording, in conversations with one recording; other
      conversations are left out of it.
    - distillation: see `mm.training.distillation`.

    With next_token_weight and distillation_weight 0 the language model is not run.

    Args:
        ctc_weight, next_token_weight, distillation_weight: each loss is a sum over the answers' tokens, and a step
            divides their weighted sum by the number of target tokens.

    Raises:
        UserError: a weight is below 0, or all are 0.
    """

    forward_methods = (*NextTokenObjective.forward_methods, "encode_audio")

    def __init__(
        self,
        ctc_weight: float = 0.0,
        next_token_weight: float = 1.0,
        distillation_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_loss_weights(
            ctc_weight=ctc_weight, next_token_weight=next_token_weight, distillation_weight=distillation_weight
        )
        self.ctc_weight, self.next_token_weight = ctc_weight, next_token_weight
        self.distillation_weight = distillation_weight
        self.embedding_rms: Tensor | None = None
        self.padding = PaddingMeter()

    @property
    def runs_language_model(self) -> bool:
        return bool(self.next_token_weight or self.distillation_weight)

    def dummy_sample(self, module: MultimodalModel) -> Sample:
        """As the base class; for distillation with a text twin, so that it runs every part that other ranks run."""
        sample, config = super().dummy_sample(module), module.config
        if not self.distillation_weight:
            return sample
        audio_ids = (config.speech_start_id, config.audio_token_id, config.speech_end_id)
        tokens = [token for token in sample.tokens if token not in audio_ids]
        twin = Sample(tokens, [IGNORED] * len(tokens), sample.images, sample.videos)
        return DistillationSample(**vars(sample), twin=twin)

    def collate(self, samples: list[Sample]) -> Batch:
        return collate_twins(samples) if self.distillation_weight else super().collate(samples)

    def step_flops(
        self,
        config: ModelConfig,
        rows: Sequence[Row],
        trained: TrainedParts,
        activation_checkpointing: bool = False,
        encoded: Sequence[int] | None = None,
        encoded_clips: Sequence[Clip] | None = None,
    ) -> Flops:
        """As the base class. A text twin is taken to have as many tokens in place of the recording as the answer has,
        and CTC a class for each target."""
        count = super().step_flops if self.runs_language_model else media_flops
        flops = count(config, rows, trained, activation_checkpointing, encoded, encoded_clips)
        spoken = [row for row in rows if row.mel_frames]
        if self.distillation_weight and spoken:
            twins = [
                Row(row.tokens - sum(map(num_tokens, row.mel_frames)) - 2 + row.targets, row.targets) for row in spoken
            ]
            flops += Flops(loss=forward_flops(config, twins).total)
        if self.ctc_weight and spoken:
            frames = max(num_tokens(frames) for row in spoken for frames in row.mel_frames)
            classes = 1 + sum(row.targets for row in spoken)
            flops += Flops(loss=4 * len(spoken) * frames * classes * config.language_model.hidden_size)
        return flops

    def loss(self, module: MultimodalModel, batch: Batch) -> Tensor:
        self.padding.update([len(mel) for mel in batch.speech])
        adapter_rows: list[Tensor] = []
        if self.runs_language_model:
            assert module.speech_adapter is not None
            hook = module.speech_adapter.register_forward_hook(lambda _, __, out: adapter_rows.append(pack_rows(*out)))
            try:
                hidden = module.hidden_states(batch)
            finally:
                hook.remove()
            loss = hidden.new_zeros((), dtype=torch.float32)
            if self.next_token_weight:
                loss = self.next_token_weight * loss_of_hidden_states(module, hidden, batch)
            if self.distillation_weight:
                assert isinstance(batch, DistillationBatch)
                loss = loss + self.distillation_weight * distillation_loss(module, hidden, batch)
        elif batch.speech:
            adapter_rows.append(module.encode_audio(batch.speech))
            loss = adapter_rows[0].new_zeros(())
        else:
            return batch.tokens.new_zeros((), dtype=torch.float32)
        if adapter_rows:
            self.embedding_rms = adapter_rows[0].detach().float().square().mean().sqrt()
            if self.ctc_weight:
                loss = loss + self.ctc_weight * ctc_loss(module, batch, adapter_rows[0])
        return loss

    def observe(self, module: MultimodalModel) -> dict[str, float]:
        """As the base class, with `padding_share` since the last call, and, without a CTC readout, `speech/rms_ratio`:
        the RMS of the last batch's adapter rows relative to that of the language model's embeddings."""
        values = {**super().observe(module), **self.padding.pop()}
        adapter = module.config.speech_adapter
        if self.embedding_rms is not None and adapter is not None and not adapter.ctc_readout:
            table = full_tensor(module.language_model.model.embed_tokens.weight).float()
            values["speech/rms_ratio"] = float(self.embedding_rms / table.square().mean().sqrt())
        return values


class PaddingMeter:
    """The share of mel frames that only pad utterances to the longest of their micro-batch."""

    def __init__(self) -> None:
        self.num_real = self.num_frames = 0

    def update(self, lengths: Sequence[int]) -> None:
        """Count a micro-batch of utterances with these numbers of mel frames."""
        self.num_real += sum(lengths)
        self.num_frames += len(lengths) * max(lengths, default=0)

    def pop(self) -> dict[str, float]:
        """{"padding_share": share since the last call}; empty where there was no frame."""
        values = {"padding_share": 1 - self.num_real / self.num_frames} if self.num_frames else {}
        self.num_real = self.num_frames = 0
        return values


def pack_rows(padded: Tensor, lengths: Tensor) -> Tensor:
    """The first lengths[b] rows of each padded[b], [B, N, D] -> [sum of lengths, D]."""
    return torch.cat([rows[:length] for rows, length in zip(padded, lengths.tolist(), strict=True)])


def ctc_loss(model: MultimodalModel, batch: Batch, adapter_rows: Tensor) -> Tensor:
    """CTC loss of the answers' tokens, summed over the conversations with one recording and an answer.

    An answer without tokens, that of a recording without speech, is a target of blanks only. Answers of more tokens
    than rows have no loss.

    Args:
        adapter_rows: what the speech adapter gives for the batch's utterances, packed, [N, D].
    """
    assert batch.host.labels is not None
    rows_per_utterance = adapter_rows.split([num_tokens(len(mel)) for mel in batch.speech])
    not_spoken = {IGNORED, *model.config.language_model.stop_tokens}
    utterances: list[Tensor] = []
    answers: list[list[int]] = []
    for labels, row_speech in zip(batch.host.labels.tolist(), batch.row_speech, strict=True):
        if len(row_speech) == 1 and any(label != IGNORED for label in labels):
            utterances.append(rows_per_utterance[row_speech[0]])
            answers.append([label for label in labels if label not in not_spoken])
    if not utterances:
        return adapter_rows.sum() * 0.0
    answer_tokens = torch.tensor([token for answer in answers for token in answer], dtype=torch.long)
    classes, targets = answer_tokens.unique(return_inverse=True)
    device = adapter_rows.device
    embeddings = model.embed(torch.cat([model.ctc_blank(device), classes.to(device)]))
    table = F.normalize(embeddings.float(), dim=-1)  # [1 + classes, D]
    x = F.normalize(pad_sequence(utterances).float(), dim=-1)  # [N of the longest, B, D]
    with torch.autocast(device.type, enabled=False):  # in bf16 a logit near CTC_SCALE would be rounded to 0.1
        logits = CTC_SCALE * x @ table.T
    return F.ctc_loss(
        logits.log_softmax(-1),
        targets.to(device) + 1,
        torch.tensor([len(rows) for rows in utterances]),
        torch.tensor([len(answer) for answer in answers]),
        reduction="sum",
        zero_infinity=True,
    )


def set_feature_statistics(encoder: SpeechEncoder, utterances: Sequence[Tensor]) -> None:
    """Set a new conformer's mean and deviation of features to those of some utterances, each [T, num_mels].

    Raises:
        UserError: there are no utterances.
    """
    if not utterances:
        raise UserError("no sound in any of the samples from which a new conformer takes its feature statistics")
    statistics = FeatureStatistics()
    for mel in utterances:
        statistics.update(mel)
    encoder.set_feature_statistics(*statistics.mean_std())
