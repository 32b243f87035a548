"""Supervised training of a speech encoder: CTC over the characters of transcripts, which is not in the paper.

With hours of speech, in place of the paper's millions, the language model's tokens are too many and too rare to start
with; characters are not. Shapes: B utterances, T mel frames, S encoder frames.
"""

import functools
import re
import unicodedata
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from foundation.errors import UserError
from foundation.extras import import_extra
from layers.linear import Linear
from layers.meta import meta_device
from mm.training.flops import Flops, Row
from mm.training.media_flops import speech_encoder_flops
from mm.training.speech_pretraining import SpeechEncoderObjective, SpeechEncoderShape
from speech.conformer import SpeechEncoder, SpeechEncoderConfig, num_frames
from speech.features import FRAMES_PER_SECOND

CHARACTERS_PER_SECOND = 15  # of speech, where the planner has no transcripts


@functools.cache
def character_classes() -> dict[str, int]:
    """Character -> CTC class, from 1; class 0 is the blank.

    The characters are the space, the apostrophe, digits, and the letters of the Latin, Greek and Cyrillic scripts that
    `normalise_text` leaves unchanged.
    """
    lower = (chr(code) for code in (*range(0x530), *range(0x1E00, 0x2000)))
    characters = [" ", "'", *(char for char in lower if char.isalnum() and normalise_text(char) == char)]
    return {character: index for index, character in enumerate(characters, start=1)}


def normalise_text(text: str) -> str:
    """NFKC and casefold; combining marks that have no precomposed letter are dropped."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(character for character in text if not unicodedata.combining(character))


def encode_characters(text: str) -> list[int]:
    """The classes of a transcript's characters: normalised words without punctuation, one space between them.

    Raises:
        UserError: the text has characters that are not among `character_classes`.
    """
    words = " ".join(re.findall(r"[^\W_']+(?:'[^\W_']+)*", normalise_text(text.replace("\u2019", "'"))))
    if unknown := sorted(set(words) - character_classes().keys()):
        raise UserError(f"{text[:60]!r} has letters other than Latin, Greek and Cyrillic: {''.join(unknown)[:20]}")
    return [character_classes()[character] for character in words]


@dataclass
class TranscribedUtterance:
    """Log-mel features [T, num_mels], and the classes of the transcript's characters (`encode_characters`)."""

    mel: Tensor
    characters: list[int]


@dataclass
class TranscribedBatch:
    """Padded utterances: mel [B, T, num_mels]; on the CPU lengths int64 [B] and each transcript's characters, int64."""

    mel: Tensor
    lengths: Tensor
    characters: list[Tensor]

    def to(self, device: torch.device | str) -> "TranscribedBatch":
        return TranscribedBatch(self.mel.to(device, non_blocking=True), self.lengths, self.characters)


class CharacterCtcModel(nn.Module):
    """A speech encoder with a linear layer of character classes, which is not kept."""

    def __init__(self, encoder: SpeechEncoder) -> None:
        super().__init__()
        self.speech_encoder = encoder
        self.ctc_head = Linear(encoder.config.output_width, 1 + len(character_classes()))

    def forward(self, batch: TranscribedBatch) -> Tensor:
        """Log-probabilities of the classes at each encoder frame, FP32 [B, S, classes]."""
        frames, _ = self.speech_encoder(batch.mel, batch.lengths)
        return self.ctc_head(frames).float().log_softmax(-1)


@dataclass
class CharacterCtcShape(SpeechEncoderShape):
    """The shape of character CTC, see `mm.training.stage_shapes.StageShape`."""

    def __post_init__(self) -> None:
        self.objective = CharacterCtcObjective()

    def build(self) -> CharacterCtcModel:
        with meta_device():
            return CharacterCtcModel(SpeechEncoder(self.encoder))

    def sample(self, row: Row, number: int, fake: FakeTensorMode) -> TranscribedUtterance:
        with fake:
            mel = torch.empty(row.mel_frames[0], self.encoder.num_mels)
        return TranscribedUtterance(mel, [1] * (row.mel_frames[0] * CHARACTERS_PER_SECOND // FRAMES_PER_SECOND))

    def flops(
        self,
        rows: Sequence[Row],
        trained: Collection[str],
        activation_checkpointing: bool = False,
        encoded: Sequence[int] | None = None,
    ) -> Flops:
        return self.objective.step_flops(self.encoder, [row.mel_frames[0] for row in rows], activation_checkpointing)


class CharacterCtcObjective(SpeechEncoderObjective):
    """CTC over characters at the encoder's 25 frames per second; the loss is the mean over characters.

    Utterances with an empty transcript have no loss. `observe` reports, since the last call, `character_error_rate` of
    greedy decoding and `padding_share`. Under torchrun every rank counts its own utterances, and rank 0 reports.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_edits = self.num_characters = 0

    def step_flops(
        self, encoder: SpeechEncoderConfig, mel_frames: Sequence[int], activation_checkpointing: bool = False
    ) -> Flops:
        """The FLOPs of a forward and a backward pass."""
        frames = len(mel_frames) * num_frames(max(mel_frames))
        head = 6 * encoder.width * (1 + len(character_classes())) * frames
        trained = speech_encoder_flops(encoder, mel_frames, True, int(activation_checkpointing))
        return Flops(speech_encoder=trained, loss=head)

    def batch_flops(self, batch: TranscribedBatch, encoder: SpeechEncoderConfig) -> int:
        """`step_flops` of a batch."""
        return self.step_flops(encoder, batch.lengths.tolist()).total

    def dummy_sample(self, module: CharacterCtcModel) -> TranscribedUtterance:
        return TranscribedUtterance(torch.zeros(1, module.speech_encoder.config.num_mels), [])

    def collate(self, samples: list[TranscribedUtterance]) -> TranscribedBatch:
        return TranscribedBatch(
            pad_sequence([sample.mel for sample in samples], batch_first=True),
            torch.tensor([len(sample.mel) for sample in samples]),
            [torch.tensor(sample.characters, dtype=torch.long) for sample in samples],
        )

    def count(self, batch: TranscribedBatch) -> int:
        return sum(map(len, batch.characters))

    def loss(self, module: CharacterCtcModel, batch: TranscribedBatch) -> Tensor:
        self.padding.update(batch.lengths.tolist())
        log_probs = module(batch)
        lengths = num_frames(batch.lengths)
        num_characters = torch.tensor([len(characters) for characters in batch.characters])
        losses = F.ctc_loss(
            log_probs.transpose(0, 1),
            torch.cat(batch.characters).to(log_probs.device),
            lengths,
            num_characters,
            reduction="none",
            zero_infinity=True,  # a transcript of more characters than frames has no loss
        )
        paths = log_probs.detach().argmax(-1).cpu()  # of the whole batch at once: each copy waits for the device
        for path, length, characters in zip(paths, lengths, batch.characters, strict=True):
            if len(characters):
                self.num_edits += edit_distance(collapse_path(path[:length]), characters.tolist())
                self.num_characters += len(characters)
        return losses[(num_characters > 0).to(losses.device)].sum()

    def observe(self, module: CharacterCtcModel) -> dict[str, float]:
        values = {**self.padding.pop(), "character_error_rate": self.num_edits / max(1, self.num_characters)}
        self.num_edits = self.num_characters = 0
        return values


def collapse_path(path: Tensor) -> list[int]:
    """A CTC path of classes, int64 [S] -> its labels: repeats are merged, then blanks removed."""
    return [label for label in path.unique_consecutive().tolist() if label]


def edit_distance(prediction: Sequence[Hashable], reference: Sequence[Hashable]) -> int:
    """The Levenshtein distance: the fewest substitutions, deletions and insertions between two sequences.

    Raises:
        MissingExtraError: rapidfuzz is missing.
    """
    return import_extra("rapidfuzz.distance", "speech", "an edit distance").Levenshtein.distance(prediction, reference)
