"""The page of the speech demo: players, mel spectrograms and transcripts, error rates beside the baseline, curves."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from demos.charts import training_charts
from demos.page import answer_lines, cards, score_section, write_demo_page
from foundation.html import escape, picture, sound
from mm.evaluation.evaluate import EvaluationReport
from speech.best_rq import BestRqConfig, RandomQuantizer, draw_masks
from speech.conformer import STACK
from speech.features import NUM_MELS, log_mel
from speech.reading import read_sound

MEL = 'class="mel"'  # pictures with time from left to right
NUM_PRETRAINING_EXAMPLES = 4  # recordings whose masks and codes are shown
CHARTS = {
    "loss": "Training loss",
    "eval/answer_accuracy": "Held-out sentences transcribed word for word",
}


@dataclass(frozen=True)
class SpeechExample:
    """A held-out recording and what the model transcribed.

    Attributes:
        sound: the FLAC file.
        reference: the spoken words.
        prediction: the model's transcript.
        replaced_prediction: its transcript of another recording that was given in place of this one (the baseline).
    """

    sound: bytes
    reference: str
    prediction: str
    replaced_prediction: str


def write_speech_page(
    file: Path, reports: dict[str, EvaluationReport], examples: list[SpeechExample], stages: Mapping[str, Path]
) -> None:
    """Write the page.

    Args:
        reports: "original", "replaced" and "silence" (see `demos.speech.demo`).
        stages: title of each training stage -> its metrics.jsonl.
    """
    sections = [
        "<h2>Sentences that were not trained on</h2>",
        cards(map(_card, examples), is_wide=True),
        *_scores(reports),
        *training_charts(stages, CHARTS),
        "<h2>What self-supervised pre-training would predict</h2>",
        "<p>BEST-RQ masks the grey frames and predicts their codes: 16 codes for each 40 ms, each shown as a colour. "
        "The conformer of this demo was not pre-trained.</p>",
        cards(map(_pretraining_card, examples[:NUM_PRETRAINING_EXAMPLES]), is_wide=True),
    ]
    write_demo_page(
        file,
        "A frozen language model that hears",
        "A language model that was trained on text alone transcribes sentences of 42 words, and none of its weights "
        "has changed. A conformer and the speech adapter behind it were trained from random weights, on this machine, "
        "in minutes.",
        sections,
        [f"mm transcribe hello.wav --model {file.parent}"],
    )


def mel_picture(recording: bytes, masked: bool = False) -> bytes:
    """Log-mel features of a sound file as a PNG: time from left to right, low bins at the bottom.

    Args:
        masked: paint the frames that BEST-RQ would mask in grey.
    """
    mel = log_mel(read_sound(recording)).T.flip(0).numpy()  # [80, T]
    low, high = np.percentile(mel, (5, 99))
    shades = np.clip((mel - low) / max(high - low, 1e-6), 0, 1)
    pixels = (255 * matplotlib.colormaps["magma"](shades)[..., :3]).astype(np.uint8)
    if masked:
        pixels[:, draw_masks([mel.shape[1]], [0], BestRqConfig())[0].numpy()] = 128
    return _png(pixels)


def codes_picture(recording: bytes) -> bytes:
    """BEST-RQ's codes of a sound file as a PNG: one column per 40 ms, one row per codebook, one colour per code."""
    mel, config = log_mel(read_sound(recording)), BestRqConfig()
    normal = (mel - mel.mean(0)) / mel.std(0).clamp(min=1e-2)
    stacked = normal[: len(normal) // STACK * STACK].reshape(-1, STACK * NUM_MELS)
    codes = RandomQuantizer(STACK * NUM_MELS, config)(stacked).T.numpy()  # [16, T / 4]
    return _png(np.random.default_rng(0).integers(0, 256, (config.codebook_size, 3), dtype=np.uint8)[codes])


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def _scores(reports: dict[str, EvaluationReport]) -> list[str]:
    own, replaced = reports["original"].scores, reports["replaced"].scores
    sentences = {name: {"own sound": own[name], "another sound": replaced[name]} for name in own}
    silence = {"exact_match": {"empty transcripts": reports["silence"].scores["exact_match"]}}
    explanation = (
        "No sentence on this page was trained on; its words and its voices were. The baseline is the same model, given "
        "the sound of another sentence: its score shows how much can be guessed. Values are on a scale to 100, with "
        "95% intervals; in brackets stands the number of recordings."
    )
    sets = {"Sentences": sentences, "Recordings without speech (zeros, white noise, rumble, mains hum)": silence}
    return score_section(explanation, sets)


def _card(example: SpeechExample) -> str:
    return (
        f'<div class="card">{picture(mel_picture(example.sound), "log-mel features", MEL)}{sound(example.sound)}'
        f"{answer_lines(example.prediction, example.reference)}"
        f'<p class="muted">of another sound: {escape(example.replaced_prediction) or "(nothing)"}</p></div>'
    )


def _pretraining_card(example: SpeechExample) -> str:
    masked = picture(mel_picture(example.sound, masked=True), "features, some of them masked", MEL)
    codes = picture(codes_picture(example.sound), "codes", MEL)
    return f'<div class="card">{masked}{codes}<p>{escape(example.reference)}</p></div>'
