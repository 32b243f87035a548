"""The speech demo's page: error rates beside the control, players, mel pictures, hypotheses. One file, offline."""

import base64
import html
import io
import os
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from demos.page import STYLE, chart_of
from mm.evaluation.evaluate import EvaluationReport
from speech.best_rq import BestRqConfig, RandomQuantizer, draw_masks
from speech.conformer import STACK
from speech.features import NUM_MELS, log_mel
from speech.reading import read_sound

OWN_STYLE = """
figure img { aspect-ratio: auto; height: 6rem; object-fit: fill; image-rendering: auto; } audio { width: 100%; }
figure img.codes { image-rendering: pixelated; }
.grid { grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); }
"""
PRETRAINED = 4  # examples whose masks and codes are shown
NAMES = {"wer": "words wrong (WER)", "cer": "characters wrong (CER)", "exact_match": "sentences right to the letter"}


@dataclass(frozen=True)
class SpeechExample:
    """A recording (FLAC bytes) with what is said in it and what the model repeated; and the control's recording, with
    what the model repeated of that."""

    sound: bytes
    other_sound: bytes
    reference: str
    said: str
    said_of_other: str


def write_page(file: Path, reports: dict[str, EvaluationReport], examples: list[SpeechExample], metrics: Path) -> None:
    """Write the page; `reports` holds "heard", "replaced" and "silence"."""
    curves = (
        ("training loss, per answer token", "loss"),
        ("held-out sentences repeated word for word", "eval/answer_accuracy"),
    )
    charts = (chart_of(title, metrics, name) for title, name in curves)
    body = [
        "<h1>A frozen language model that hears</h1>",
        *_scores(reports),
        "<h2>Training of the second stage</h2><div class=grid>",
        *(f"<figure>{chart}</figure>" for chart in charts if chart),
        f"</div><h2>Sentences that were not trained on</h2><div class=grid>{''.join(map(_figure, examples))}</div>",
        "<h2>What pre-training without words would ask</h2><p>BEST-RQ hides the grey frames and asks for their codes: "
        "16 numbers for each 40 ms, a colour each. This demo's conformer was not trained so.</p><div class=grid>",
        *map(_pretraining, examples[:PRETRAINED]),
        "</div>",
    ]
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'><title>mm-adapters: speech</title>"
    style = f"<style>{STYLE}{OWN_STYLE}</style>"
    page = f"<!doctype html><html lang=en>{head}{style}<body>{''.join(body)}</body></html>\n"
    new = file.with_suffix(".new")
    new.write_text(page, encoding="utf-8")
    os.replace(new, file)


def mel_picture(sound: bytes, masked: bool = False) -> bytes:
    """Log-mel features of a sound file as a PNG: time from left to right, low bins at the bottom.

    Args:
        masked: hide what BEST-RQ hides, in grey.
    """
    mel = log_mel(read_sound(sound)).T.flip(0).numpy()  # [80, T]
    low, high = np.percentile(mel, (5, 99))
    shades = np.clip((mel - low) / max(high - low, 1e-6), 0, 1)
    pixels = (255 * matplotlib.colormaps["magma"](shades)[..., :3]).astype(np.uint8)
    if masked:
        pixels[:, draw_masks([mel.shape[1]], [0], BestRqConfig())[0].numpy()] = 128
    return _png(pixels)


def codes_picture(sound: bytes) -> bytes:
    """BEST-RQ's codes of a sound file as a PNG: 40 ms a column, a codebook a row, each code a colour of its own."""
    mel, config = log_mel(read_sound(sound)), BestRqConfig()
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
    for name, score in reports["heard"].scores.items():
        both = (score, reports["replaced"].scores[name])
        cells = (f"{one.value * one.scale:.1f} ± {one.interval * one.scale:.1f}" for one in both)
        numbers = "".join(f"<td class=number>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{NAMES[name]}</td>{numbers}<td class=number>{score.num_samples:,}</td></tr>")
    nothing = reports["silence"].scores["exact_match"]
    return [
        "<p>No sentence on this page was trained on; its words and its voices were. The control is the same model, "
        "given another sentence's sound: what it gets right, it guesses. Intervals are 95%.</p>",
        "<table><tr><th>in %<th>own sound<th>control<th>recordings</tr>",
        *rows,
        "</table>",
        f"<p>Of {nothing.num_samples:,} sounds in which nothing is said (zeros, hiss, rumble, hum), "
        f"{nothing.value * nothing.scale:.1f} ± {nothing.interval * nothing.scale:.1f}% get an empty transcript.</p>",
    ]


def _figure(example: SpeechExample) -> str:
    right = example.said.strip().lower() == example.reference.strip().lower()
    expected = "" if right else f"<div>said: {html.escape(example.reference)}</div>"
    return (
        f"<figure><img src='{_data('image/png', mel_picture(example.sound))}' alt='log-mel features'>"
        f"<audio controls preload=none src='{_data('audio/flac', example.sound)}'></audio><figcaption>"
        f"<div class='said {'right' if right else 'wrong'}'>{html.escape(example.said) or '(nothing)'}</div>{expected}"
        f"<div class=blind>of another sound: {html.escape(example.said_of_other) or '(nothing)'}</div>"
        "</figcaption></figure>"
    )


def _pretraining(example: SpeechExample) -> str:
    hidden, codes = mel_picture(example.sound, masked=True), codes_picture(example.sound)
    return (
        f"<figure><img src='{_data('image/png', hidden)}' alt='features, some of them masked'>"
        f"<img class=codes src='{_data('image/png', codes)}' alt='codes'>"
        f"<figcaption>{html.escape(example.reference)}</figcaption></figure>"
    )


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
