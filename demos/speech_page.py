"""The page of the speech demo: error rates beside the baseline, players, mel spectrograms and transcripts."""

import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from demos.charts import line_chart, read_metrics, series
from demos.image_page import prediction_lines
from demos.scores import score_text
from foundation.html import escape, page, picture, sound, table, write_page
from mm.evaluation.evaluate import EvaluationReport
from speech.best_rq import BestRqConfig, RandomQuantizer, draw_masks
from speech.conformer import STACK
from speech.features import NUM_MELS, log_mel
from speech.reading import read_sound

SPEECH_STYLE = """
figure img { width: 100%; height: 6rem; object-fit: fill; } figure img.codes { image-rendering: pixelated; }
audio { width: 100%; } .prediction { font-weight: 600; }
.grid { grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); }
"""
NUM_PRETRAINING_EXAMPLES = 4  # recordings whose masks and codes are shown
METRIC_TITLES = {
    "wer": "word error rate (WER)",
    "cer": "character error rate (CER)",
    "exact_match": "sentences transcribed exactly",
}
CHARTS = {
    "loss": "training loss, per answer token",
    "eval/answer_accuracy": "held-out sentences transcribed word for word",
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
    file: Path, reports: dict[str, EvaluationReport], examples: list[SpeechExample], metrics: Path
) -> None:
    """Write the page.

    Args:
        reports: "original", "replaced" and "silence" (see `demos.speech.demo`).
        metrics: the run's metrics.jsonl.
    """
    rows = read_metrics(metrics)
    charts = [line_chart(title, {name: series(rows, name)}) for name, title in CHARTS.items()]
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    body = [
        "<h1>A frozen language model that hears</h1>",
        *_scores(reports),
        f'<h2>Training of the second stage</h2><div class="grid">{figures}</div>',
        "<h2>Sentences that were not trained on</h2>",
        f'<div class="grid">{"".join(map(_figure, examples))}</div>',
        "<h2>What self-supervised pre-training would predict</h2>",
        "<p>BEST-RQ masks the grey frames and predicts their codes: 16 codes for each 40 ms, each shown as a colour. "
        "The conformer of this demo was not pre-trained.</p>",
        f'<div class="grid">{"".join(map(_pretraining_figure, examples[:NUM_PRETRAINING_EXAMPLES]))}</div>',
    ]
    write_page(file, page("mm-adapters: speech", body, SPEECH_STYLE))


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
    rows = []
    for name, score in reports["original"].scores.items():
        replaced = reports["replaced"].scores[name]
        rows.append((METRIC_TITLES[name], score_text(score), score_text(replaced), f"{score.num_samples:,}"))
    silence = reports["silence"].scores["exact_match"]
    return [
        "<p>No sentence on this page was trained on; its words and its voices were. The baseline is the same model, "
        "given the sound of another sentence: its score shows how much can be guessed. Intervals are 95%.</p>",
        table(("in %", "own sound", "another sound (baseline)", "recordings"), rows, number_columns=(1, 2, 3)),
        f"<p>Of {silence.num_samples:,} recordings without speech (zeros, white noise, rumble, mains hum), "
        f"{score_text(silence)}% get an empty transcript.</p>",
    ]


def _figure(example: SpeechExample) -> str:
    return (
        f"<figure>{picture(mel_picture(example.sound), alt='log-mel features')}{sound(example.sound)}<figcaption>"
        f"{prediction_lines(example.prediction, example.reference)}"
        f'<div class="muted">of another sound: {escape(example.replaced_prediction) or "(nothing)"}</div>'
        "</figcaption></figure>"
    )


def _pretraining_figure(example: SpeechExample) -> str:
    masked = picture(mel_picture(example.sound, masked=True), alt="features, some of them masked")
    codes = picture(codes_picture(example.sound), alt="codes", attributes='class="codes"')
    return f"<figure>{masked}{codes}<figcaption>{escape(example.reference)}</figcaption></figure>"
