"""The language model that reads what is said, as the teacher of itself where it hears it.

Each sample with a known transcript has a twin: the same conversation with the transcript in the recording's place. Over
the answer's tokens, the probabilities after hearing are held against those after reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.errors import UserError
from mm.batch import IGNORED, Batch, Sample, collate
from mm.model import MultimodalModel
from mm.processor import Processor, record_messages, record_transcript
from shards.format import Record


@dataclass
class DistillationSample(Sample):
    """A sample with its twin that reads; without one where it is not known what is said."""

    read: Sample | None = None


@dataclass
class DistillationBatch(Batch):
    """A batch with its rows' twins; a row without a twin has one without targets."""

    read: Batch | None = None

    def to(self, device: torch.device | str) -> "DistillationBatch":
        return DistillationBatch(**vars(super().to(device)), read=self.read.to(device))


def with_twin(record: Record, processor: Processor) -> DistillationSample:
    """A record's sample and its twin, which it has if it is known what its one recording says.

    Raises:
        UserError: as `Processor.record_example`, of the twin too.
    """
    sample = processor.record_example(record)
    said = record_transcript(record)
    messages = record_messages(record) if said and sample.speech else []
    sounds = [part for message in messages for part in _parts(message) if part.get("type") == "audio"]
    if len(sounds) != 1:
        return DistillationSample(**vars(sample))
    read = processor.example(_read(messages, said))
    if len(read.tokens) > processor.context:
        raise UserError(f"what is said has {len(read.tokens)} tokens, over the context of {processor.context}")
    return DistillationSample(**vars(sample), read=read)


def _read(messages: list[dict], said: str) -> list[dict]:
    """The messages with what is said in the place of the recording."""
    text = {"type": "text", "text": said}
    parts = ([text if part.get("type") == "audio" else part for part in _parts(message)] for message in messages)
    return [{**message, "content": content} for message, content in zip(messages, parts, strict=True)]


def _parts(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def collate_twins(samples: Sequence[Sample]) -> DistillationBatch:
    """Samples side by side, and their twins."""
    nothing = Sample([0], [IGNORED])
    reads = [sample.read if isinstance(sample, DistillationSample) and sample.read else nothing for sample in samples]
    return DistillationBatch(**vars(collate(samples)), read=collate(reads))


def divergence(model: MultimodalModel, hidden: Tensor, batch: DistillationBatch) -> Tensor:
    """KL divergence of hearing's probabilities from reading's, summed over the target tokens of rows with a twin.

    Args:
        hidden: the normalised hidden states of the batch's tokens, [B, T, D].
    """
    with torch.no_grad():
        reading = _at_targets(model, model.hidden_states(batch.read), batch.read.host.labels)
    twins = (batch.read.host.labels != IGNORED).any(1)
    hearing = _at_targets(model, hidden, batch.host.labels.masked_fill(~twins[:, None], IGNORED))
    return F.kl_div(hearing, reading, reduction="sum", log_target=True)


def _at_targets(model: MultimodalModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities before each target, FP32 [N, V]."""
    rows, columns = (place.to(hidden.device) for place in (labels[:, 1:] != IGNORED).nonzero(as_tuple=True))
    return model.language_model.lm_head(hidden[rows, columns]).float().log_softmax(-1)
