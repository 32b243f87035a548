"""What a speech encoder trains on by itself: BEST-RQ's codes of what is masked, or the letters of what is said."""

import functools
import re
import sys
import unicodedata
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from foundation.errors import UserError
from layers.linear import Linear
from mm.evaluation.metrics import count_edits
from mm.training.speech import Padding
from speech.best_rq import BestRq, BestRqConfig, BestRqOutput, CodeStatistics, draw_masks
from speech.conformer import STACK, SpeechEncoder, num_frames
from speech.features import FRAMES_PER_SECOND


class EncoderObjective:
    """What objectives of a speech encoder share; samples have `mel`, batches `mel` and `lengths`."""

    forward_methods = ()

    def __init__(self) -> None:
        self.padding = Padding()

    def size(self, sample: "Utterance | Transcribed") -> int:
        return len(sample.mel)

    def throughput(self, batch: "UtteranceBatch | TranscribedBatch") -> dict[str, float]:
        return {"audio_seconds": int(batch.lengths.sum()) / FRAMES_PER_SECOND, "mel_frames": batch.mel[..., 0].numel()}


# ------------------------------------------------------------------------------------------------------- BEST-RQ


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


class BestRqObjective(EncoderObjective):
    """The codes behind masks; the loss is the mean over masked frames and codebooks.

    Reported are, since the last report: the share of codes that were targets, averaged over codebooks, their
    perplexity, the share of mel frames that were masked, how many codes were guessed, and the share of padding.
    Collapsed codes are warned of. Over several ranks each counts its own, and the first reports.
    """

    def __init__(self, config: BestRqConfig) -> None:
        super().__init__()
        self.config = config
        self._begin()

    def _begin(self) -> None:
        self.statistics, self.correct, self.targets = CodeStatistics(self.config), 0, 0

    def dummy_sample(self, module: SpeechPretraining) -> Utterance:
        return Utterance(torch.zeros(1, module.speech_encoder.config.num_mels), None)

    def collate(self, samples: list[Utterance]) -> UtteranceBatch:
        lengths = [len(sample.mel) for sample in samples]
        masks = draw_masks(lengths, [sample.seed or 0 for sample in samples], self.config)
        for row, sample in enumerate(samples):
            masks[row] &= sample.seed is not None
        return UtteranceBatch(
            pad_sequence([sample.mel for sample in samples], batch_first=True), torch.tensor(lengths), masks
        )

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


# ------------------------------------------------------------------------------------------------------- letters


@functools.cache
def alphabet() -> dict[str, int]:
    """Letter -> class, from 1 on; 0 is CTC's blank. A blank, an apostrophe, digits, and the letters of Latin, Greek and
    Cyrillic as `normalised` leaves them."""
    small = (chr(code) for code in (*range(0x530), *range(0x1E00, 0x2000)))
    letters = [" ", "'", *(letter for letter in small if letter.isalnum() and normalised(letter) == letter)]
    return {letter: number for number, letter in enumerate(letters, start=1)}


def normalised(text: str) -> str:
    """NFKC, casefolded, without the marks that stand on no letter of their own then."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(letter for letter in text if not unicodedata.combining(letter))


def spelling(text: str) -> list[int]:
    """A transcript's letters as classes of `alphabet`: its words without punctuation, one blank between them.

    Raises:
        UserError: it has letters that are not in the alphabet.
    """
    words = " ".join(re.findall(r"[^\W_']+(?:'[^\W_']+)*", normalised(text.replace("\u2019", "'"))))
    if strange := sorted(set(words) - alphabet().keys()):
        raise UserError(f"{text[:60]!r} has letters other than Latin, Greek and Cyrillic: {''.join(strange)[:20]}")
    return [alphabet()[letter] for letter in words]


@dataclass
class Transcribed:
    """Log-mel features [T, num_mels], and the `spelling` of what is said."""

    mel: Tensor
    letters: list[int]


@dataclass
class TranscribedBatch:
    """Utterances side by side: mel [B, T, num_mels]; on the CPU lengths int64 [B] and each one's letters."""

    mel: Tensor
    lengths: Tensor
    letters: list[Tensor]

    def to(self, device: torch.device | str) -> "TranscribedBatch":
        return TranscribedBatch(self.mel.to(device, non_blocking=True), self.lengths, self.letters)


class SpellingEncoder(nn.Module):
    """A speech encoder, and a linear layer that names letters, which is not kept."""

    def __init__(self, encoder: SpeechEncoder) -> None:
        super().__init__()
        self.speech_encoder = encoder
        self.letters = Linear(encoder.config.output_width, 1 + len(alphabet()))

    def forward(self, batch: TranscribedBatch) -> Tensor:
        """Log-probabilities of the classes at each frame, FP32 [B, S, classes]."""
        frames, _ = self.speech_encoder(batch.mel, batch.lengths)
        return self.letters(frames).float().log_softmax(-1)


class SpellingObjective(EncoderObjective):
    """CTC over the letters of what is said, at the encoder's 25 frames a second; the loss is the mean over letters.

    A sound in which nothing is said teaches nothing. Reported is the letter error rate along the likeliest path, of the
    utterances since the last report. Over several ranks each counts its own, and the first reports.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wrong = self.letters = 0

    def dummy_sample(self, module: SpellingEncoder) -> Transcribed:
        return Transcribed(torch.zeros(1, module.speech_encoder.config.num_mels), [])

    def collate(self, samples: list[Transcribed]) -> TranscribedBatch:
        return TranscribedBatch(
            pad_sequence([sample.mel for sample in samples], batch_first=True),
            torch.tensor([len(sample.mel) for sample in samples]),
            [torch.tensor(sample.letters, dtype=torch.long) for sample in samples],
        )

    def count(self, batch: TranscribedBatch) -> int:
        return sum(map(len, batch.letters))

    def loss(self, module: SpellingEncoder, batch: TranscribedBatch) -> Tensor:
        self.padding.update(batch.lengths.tolist())
        scores = module(batch)
        num_letters = torch.tensor([len(letters) for letters in batch.letters])
        losses = F.ctc_loss(
            scores.transpose(0, 1),
            torch.cat(batch.letters).to(scores.device),
            num_frames(batch.lengths),
            num_letters,
            reduction="none",
            zero_infinity=True,  # more letters than frames
        )
        paths = scores.detach().argmax(-1).cpu()  # once: to read is to wait for the device
        for path, length, letters in zip(paths, num_frames(batch.lengths), batch.letters, strict=True):
            if len(letters):
                self.wrong += count_edits(heard_letters(path[:length]), letters.tolist())
                self.letters += len(letters)
        return losses[(num_letters > 0).to(losses.device)].sum()

    def observe(self, module: SpellingEncoder) -> dict[str, float]:
        values = {**self.padding.take(), "letter_error_rate": self.wrong / max(1, self.letters)}
        self.wrong = self.letters = 0
        return values


def heard_letters(path: Tensor) -> list[int]:
    """A path of classes, int64 [S] -> repeated ones and blanks left out."""
    return [number for number in path.unique_consecutive().tolist() if number]
