"""The page of the image demo: held-out pictures with answers and attention maps, scores beside blind ones, curves."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from demos.charts import training_charts
from demos.image_examples import Example
from demos.page import answer_lines, bars, cards, probability_text, score_section, write_demo_page
from demos.scores import scores_by_answer
from foundation.html import escape, json_data, picture
from mm.evaluation.attention_maps import AttentionMaps
from mm.evaluation.evaluate import EvaluationReport
from mm.evaluation.metrics import Score

SCRIPT = Path(__file__).with_name("attention.js").read_text(encoding="utf-8")
TITLES = {
    "answers": "Questions about shapes (easy-VQA, test split)",
    "openmoji": "Captions of emoji (OpenMoji, concepts that were not trained on)",
    "tuxpaint": "Captions of stamps (Tux Paint, pictures that were not trained on)",
    "photos": "What photographs show (CIFAR-10, test split)",
}
COMMANDS = {  # with which the reader tries a model of the set
    "answers": 'mm ask "what color is the shape?" --image examples/circle.png',
    "openmoji": "mm caption examples/boat.png",
    "photos": 'mm ask "what is in the picture?" --image FILE',
}
WITH, BLIND = "with the picture", "blind"
BASELINES = {"_blank": BLIND, "_replaced": "another picture"}  # by the end of their reports' names
PANEL = """<template id="panel"><section class="panel">
<div class="large"><p class="numbers" aria-live="polite"></p></div>
<div><button type="button" class="close">close</button><h3></h3><div class="said"></div>
<fieldset><legend>The more attention the block after a layer paid to a place, the less it is veiled:</legend>
<div class="blocks"></div></fieldset>
<fieldset><legend>while the model wrote</legend><div class="choices tokens"></div></fieldset></div>
</section></template>"""


def write_image_page(
    file: Path,
    lead: str,
    reports: Mapping[str, EvaluationReport],
    examples: Mapping[str, list[Example]],
    stages: Mapping[str, Path],
    references: Mapping[str, Mapping[str, Mapping[str, Score]]] | None = None,
) -> None:
    """Write the page.

    Args:
        lead: what the model does and how it was trained, in two sentences.
        reports: each set of `examples` under its name, and its baselines under "{name}_blank", with blanked pictures,
            and "{name}_replaced", with those of other records.
        examples: by set, one of TITLES.
        stages: title of each training stage -> its metrics.jsonl.
        references: by set, what else its scores are shown beside: title -> metric -> score.
    """
    count = sum(map(len, examples.values()))
    sections = [
        "<h2>Look for yourself</h2>",
        f"<p>{count} pictures that the model was not trained on, drawn at random and not chosen. <strong>Click a "
        "picture</strong> to see which places each cross-attention block looked at for the answer. The bars are the "
        "probability of this answer: with the picture, and blind, with a grey picture in its place.</p>",
    ]
    for name, shown in examples.items():
        sections.append(f"<h3>{escape(TITLES[name])}</h3>")
        sections.append(cards(_card(f"{name}-{index}", example) for index, example in enumerate(shown, start=1)))
    maps = {
        f"{name}-{index}": attention_data(example.attention, example.question)
        for name, shown in examples.items()
        for index, example in enumerate(shown, start=1)
        if example.attention is not None
    }
    sections += [PANEL, json_data("attention", maps), *_scores(reports, list(examples), references or {})]
    sections += training_charts(stages)
    write_demo_page(
        file,
        "A frozen language model that sees",
        lead,
        sections,
        [f"{COMMANDS[name]} --model {file.parent}" for name in examples if name in COMMANDS],
        SCRIPT,
    )


def attention_data(maps: AttentionMaps, question: str | None) -> dict[str, Any]:
    """What `attention.js` draws: the shares of each block, token and patch of the first picture, in 255 steps.

    `bytes` holds them in base64, and `largest` by block and token what a byte of 255 stands for.
    """
    shown = maps.pictures[0]
    largest = shown.patches.amax((-1, -2))  # [L, A]
    steps = (255 * shown.patches / largest.clamp(min=1e-12)[..., None, None]).round().to(torch.uint8)
    return {
        "question": question or "Describe the picture.",
        "answer": maps.answer,
        "tokens": [token.strip() or "␣" for token in maps.tokens],
        "blocks": maps.positions,
        "rows": shown.patches.shape[2],
        "columns": shown.patches.shape[3],
        "extent": shown.extent,
        "largest": _rounded(largest),
        "cls": _rounded(shown.cls.sum(-1)),
        "padding": _rounded(shown.padding),
        "bytes": base64.b64encode(steps.numpy().tobytes()).decode(),
    }


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in values.tolist()]


def _scores(
    reports: Mapping[str, EvaluationReport],
    names: list[str],
    references: Mapping[str, Mapping[str, Mapping[str, Score]]],
) -> list[str]:
    sets = {}
    for name in names:
        found = {WITH: scores_by_answer(reports[name])}
        for end, title in BASELINES.items():
            if name + end in reports:
                found[title] = scores_by_answer(reports[name + end])
        found |= {title: dict(scores) for title, scores in references.get(name, {}).items()}
        sets[TITLES[name]] = {
            metric: {title: scores[metric] for title, scores in found.items() if metric in scores}
            for metric in found[WITH]
        }
    explanation = (
        "All pictures were held out from training. Blind is the same model with a grey picture in place of the real "
        "one: its score says how much can be guessed from the question alone. Values are on a scale to 100, with 95% "
        "intervals; in brackets stands the number of samples."
    )
    return score_section(explanation, sets)


def _card(name: str, example: Example) -> str:
    image: str = picture(example.picture, f"held-out picture; expected: {example.reference}", 'class="picture"')
    if example.attention is not None:
        label = escape(f"Where did it look to answer “{example.prediction}”?")
        attributes = f'type="button" class="look" aria-expanded="false" aria-label="{label}"'
        image = f"<button {attributes}>{image}<span>where did it look?</span></button>"
    question = f"<p>{escape(example.question)}</p>" if example.question else ""
    rows = [
        (title, 100 * probability, 0.0, probability_text(probability))
        for title, probability in ((WITH, example.probability), (BLIND, example.blind_probability))
        if probability is not None
    ]
    chances = f"<div data-said>{bars(rows)}</div>" if rows else ""
    return (
        f'<div class="card" id="{escape(name)}">{image}{question}{answer_lines(example.prediction, example.reference)}'
        f'{chances}<p class="muted" data-said>blind answer: {escape(example.blind_prediction) or "(nothing)"}</p></div>'
    )
