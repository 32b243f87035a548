"""Distillation of a speech-reading model from the same language model reading the transcript.

Each sample whose transcript is known has a text twin: the same conversation with the transcript in place of the
recording. The loss is the KL divergence between the next-token distributions after the recording and those after the
transcript, over the answer's tokens. It is not in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.errors import UserError
from mm.batch import IGNORED, Batch, Sample, collate
from mm.model import MultimodalModel
from mm.processor import Processor
from mm.records import record_messages, record_transcript
from shards.format import Record


@dataclass
class DistillationSample(Sample):
    """A sample with its text twin; None where the transcript is not known."""

    twin: Sample | None = None


@dataclass
class DistillationBatch(Batch):
    """A batch with its rows' text twins; the twin of a row without one has no targets."""

    twins: Batch | None = None

    def to(self, device: torch.device | str) -> "DistillationBatch":
        assert self.twins is not None
        return DistillationBatch(**vars(super().to(device)), twins=self.twins.to(device))


def with_twin(record: Record, processor: Processor) -> DistillationSample:
    """A record's sample, with its text twin if it has one recording and a transcript of it.

    Raises:
        UserError: the twin is longer than the context, or as `Processor.record_example`, for the twin too.
    """
    sample = processor.record_example(record)
    transcript = record_transcript(record)
    if not transcript or not sample.speech:
        return DistillationSample(**vars(sample))
    messages = record_messages(record)
    num_recordings = sum(part.get("type") == "audio" for message in messages for part in _parts(message))
    if num_recordings != 1:
        return DistillationSample(**vars(sample))
    twin = processor.example(_replace_audio(messages, transcript))
    if len(twin.tokens) > processor.context:
        raise UserError(
            f"with its transcript the conversation has {len(twin.tokens)} tokens, over the context of "
            f"{processor.context}"
        )
    return DistillationSample(**vars(sample), twin=twin)


def _replace_audio(messages: list[dict], transcript: str) -> list[dict]:
    text = {"type": "text", "text": transcript}
    return [
        {**message, "content": [text if part.get("type") == "audio" else part for part in _parts(message)]}
        for message in messages
    ]


def _parts(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def collate_twins(samples: Sequence[Sample]) -> DistillationBatch:
    """A batch of the samples and a batch of their twins."""
    no_twin = Sample([0], [IGNORED])
    twins = [sample.twin if isinstance(sample, DistillationSample) and sample.twin else no_twin for sample in samples]
    return DistillationBatch(**vars(collate(samples)), twins=collate(twins))


def distillation_loss(model: MultimodalModel, hidden: Tensor, batch: DistillationBatch) -> Tensor:
    """KL divergence from the twins' distributions to the samples', summed over the targets of rows with a twin.

    Args:
        hidden: the normalised hidden states of the batch's tokens, [B, T, D].
    """
    assert batch.twins is not None and batch.host.labels is not None and batch.twins.host.labels is not None
    twin_labels = batch.twins.host.labels
    with torch.no_grad():
        teacher = _log_probs_at_targets(model, model.hidden_states(batch.twins), twin_labels)
    has_twin = (twin_labels != IGNORED).any(1)
    labels = batch.host.labels.masked_fill(~has_twin[:, None], IGNORED)
    student = _log_probs_at_targets(model, hidden, labels)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def _log_probs_at_targets(model: MultimodalModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the token at each target, FP32 [N, V]."""
    rows, columns = (index.to(hidden.device) for index in (labels[:, 1:] != IGNORED).nonzero(as_tuple=True))
    return model.language_model.lm_head(hidden[rows, columns]).float().log_softmax(-1)
