"""The demos' pages as Chromium shows them: nothing is requested or complained of, maps open, every window's width."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

import mm
from demos.image_examples import Example
from demos.image_page import write_image_page
from demos.speech_page import SpeechExample, write_speech_page
from demos.video_page import FRAME_SETS, ClipExample, write_video_page
from foundation.html import page, write_page
from mm.evaluation.evaluate import EvaluationReport
from mm.evaluation.metrics import Score
from tests.browser import PROGRAM, open_browser
from tests.media import frames, sound

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="the program chromium is not installed")
# Of each patch of the large map, how much it is veiled, 0 to 255.
VEILS = """(() => {
  const map = document.querySelector(".large canvas"), { width, height } = map;
  const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(map, 0, 0);
  const values = copy.getImageData(0, 0, width, height).data;
  return [width, height, Array.from(values.filter((_, place) => place % 4 === 3))];
})()"""
# Every text whose contrast with its background is below WCAG's level AA: 4.5, or 3 for large letters.
LOW_CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const mix = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return Array.from(canvas.getImageData(0, 0, 1, 1).data.slice(0, 3));
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("script, style, template")) continue;
    texts += 1;
    const behind = [];
    for (let node = element; node; node = node.parentElement) behind.unshift(getComputedStyle(node).backgroundColor);
    const style = getComputedStyle(element), ground = mix(behind);
    const ink = mix([...behind, element.closest("svg") ? style.fill : style.color]);
    const [low, high] = [luminance(ink), luminance(ground)].sort((a, b) => a - b);
    const limit = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
    if ((high + 0.05) / (low + 0.05) < limit) found.push([walker.currentNode.data.trim(), ink, ground]);
  }
  return [texts, found];
})()"""


@pytest.fixture(scope="module")
def tab():
    with open_browser() as tab:
        yield tab


def report(**values: float) -> EvaluationReport:
    return EvaluationReport({name: Score(name, value, 0.05, 40) for name, value in values.items()}, [], [])


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny_model, tiny_processor, random_picture) -> dict[str, Path]:
    """The page of each demo with a few examples: the tiny model's maps, over pictures of several tiles, and curves."""
    folder = tmp_path_factory.mktemp("pages")
    metrics = folder / "metrics.jsonl"
    gates = {f"gate/{part}_{depth}": 0.5 for part in ("attn", "ffn") for depth in (2, 4, 6)}
    rows = [{"step": step, "loss": 3 / step, "eval/answer_accuracy": 0.3 * step, **gates} for step in (1, 2, 3)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = []
    for number, size in enumerate([(28, 28), (84, 28), (28, 90), (56, 40)]):
        out = io.BytesIO()
        random_picture(*size, seed=number).save(out, format="PNG")
        content = [{"type": "image", "image": out.getvalue()}, {"type": "text", "text": "what shape is it?"}]
        answer = "a red circle" if number else "a blue square, a green triangle and averyverylongwordofacaption"
        maps = mm.attention_maps(tiny_model, tiny_processor, [{"role": "user", "content": content}], answer)
        question = "what shape is it?" if number else None
        examples.append(Example(out.getvalue(), question, "a red circle", answer, "", 0.9, 1e-5, maps))
    files = {name: folder / f"{name}.html" for name in ("image", "video", "speech")}
    reports = {"answers": report(vqa_accuracy=0.9, chrf=31.0), "answers_blank": report(vqa_accuracy=0.6)}
    write_image_page(files["image"], "Two sentences.", reports, {"answers": examples}, {"Image adapter": metrics})

    clip = io.BytesIO()
    first, *others = frames(0, 4)
    first.save(clip, format="WEBP", save_all=True, append_images=others, duration=200)
    predictions = {name: "left to right" for name in FRAME_SETS}
    clips = [ClipExample(clip.getvalue(), "which way does it move?", "right", predictions)] * 3
    by_frames = {f"direction/{name}": report(exact_match=0.5) for name in FRAME_SETS}
    write_video_page(files["video"], by_frames, clips, clips[:1], {"Video adapter": metrics})

    recording = SpeechExample(sound(0.5), "one two", "one two", "three")
    heard = {name: report(wer=1.3, cer=0.2) for name in ("original", "replaced")}
    silence = report(exact_match=1.0)
    write_speech_page(files["speech"], {**heard, "silence": silence}, [recording] * 2, {"First stage": metrics})
    return files


@pytest.mark.parametrize("name", ["image", "video", "speech"])
@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_pages_request_nothing_and_fit_windows_in_both_colour_schemes(tab, pages, name, width):
    grounds = []
    for scheme in ("light", "dark"):
        tab.open(pages[name], width=width, scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        num_texts, low = tab.evaluate(LOW_CONTRAST)
        assert num_texts > 20 and low == []
        ground = Image.open(io.BytesIO(tab.picture())).convert("L").getpixel((2, 2))
        grounds.append(ground)
        others = [address for address in tab.requests if not address.startswith("data:")]
        assert others == [pages[name].as_uri()] and tab.problems == []
    assert grounds[0] > 200 and grounds[1] < 60


def test_a_click_shows_the_map_of_each_block_and_token(tab, pages):
    tab.open(pages["image"])
    assert tab.evaluate("document.querySelectorAll('.panel').length") == 1  # of the first example
    tab.click("#answers-2 .look")
    examples = json.loads(tab.evaluate("document.getElementById('attention').textContent"))
    example = examples["answers-2"]
    assert tab.evaluate("document.querySelector('.panel').previousElementSibling.id") == "answers-2"
    expanded = "Array.from(document.querySelectorAll('.look'), (button) => button.getAttribute('aria-expanded'))"
    assert tab.evaluate(expanded) == ["false", "true", "false", "false"]
    assert tab.evaluate("Array.from(document.querySelectorAll('.tokens button'), (b) => b.textContent)") == [
        "whole answer",
        *example["tokens"],
    ]
    width, height, mean = tab.evaluate(VEILS)
    assert (width, height) == (6, 2) == (example["columns"], example["rows"])
    assert min(mean) == 0 < max(mean)  # the place of the largest share is not veiled
    shown = [mean]
    size = width * height
    data = tab.evaluate(f"Array.from(atob({json.dumps(example['bytes'])}), (letter) => letter.charCodeAt(0))")
    for block in range(len(example["blocks"])):
        for token in range(len(example["tokens"])):
            tab.click(f".blocks button:nth-of-type({block + 2})")
            tab.click(f".tokens button:nth-of-type({token + 2})")
            veils = tab.evaluate(VEILS)[2]
            start = (block * len(example["tokens"]) + token) * size
            shares = data[start : start + size]
            for veil, share in zip(veils, shares, strict=True):
                assert veil == pytest.approx(255 * 0.86 * (1 - share / 255), abs=2)
            assert veils not in shown
            shown.append(veils)
            numbers = tab.evaluate("document.querySelector('.numbers').textContent")
            assert f"layer {example['blocks'][block]}, “{example['tokens'][token]}”" in numbers
    assert tab.problems == []


def test_the_map_lies_over_the_picture(tab, pages):
    """A picture of 28 x 90 on a canvas of three tiles: the last row of patches reaches beyond its lower edge."""
    tab.open(pages["image"])
    tab.click("#answers-3 .look")
    boxes = "['img', 'canvas'].map((name) => document.querySelector(`.large ${name}`).getBoundingClientRect().toJSON())"
    picture, canvas = tab.evaluate(boxes)
    example = json.loads(tab.evaluate("document.getElementById('attention').textContent"))["answers-3"]
    for side, count, extent in (
        ("height", example["rows"], example["extent"][0]),
        ("width", example["columns"], example["extent"][1]),
    ):
        assert canvas[side] / picture[side] == pytest.approx(count / extent, rel=0.01)
    assert (canvas["x"], canvas["y"]) == (picture["x"], picture["y"])
    assert picture["height"] / picture["width"] == pytest.approx(90 / 28, rel=0.01)


@pytest.mark.parametrize("key", ["Enter", " "])
def test_maps_open_and_close_by_the_keyboard(tab, pages, key):
    tab.open(pages["image"])
    tab.evaluate("document.querySelector('#answers-2 .look').focus()")
    tab.press(key)
    assert tab.evaluate("document.querySelector('.panel').previousElementSibling.id") == "answers-2"
    tab.press("Tab")  # into the panel, which follows in the document
    assert tab.evaluate("document.activeElement.className") == "close"
    tab.press("Escape")
    assert tab.evaluate("document.querySelectorAll('.panel').length") == 0
    assert tab.evaluate("document.activeElement.closest('.card').id") == "answers-2"
    labels = "Array.from(document.querySelectorAll('button'), (b) => b.getAttribute('aria-label') || b.textContent)"
    assert all(label.strip() for label in tab.evaluate(labels)) and tab.problems == []


def test_the_address_names_the_example_that_is_open(tab, pages):
    tab.open(pages["speech"])  # from a page to a place on itself, a browser does not load it again
    tab.open(pages["image"], fragment="#answers-4")
    assert tab.evaluate("document.querySelector('.panel').previousElementSibling.id") == "answers-4"


def test_requests_and_complaints_are_noticed(tab, tmp_path):
    """What the other tests rely on: the policy stops a request, and console and exceptions are read."""
    body = '<img src="http://127.0.0.1:9/picture.png" alt=""><script>alert(1)</script>'
    write_page(tmp_path / "page.html", page("title", body, script="console.error('wrong'); missing();"))
    tab.open(tmp_path / "page.html")
    found = " ".join(tab.problems)
    assert "picture.png" in found and "script-src" in found and "wrong" in found and "missing is not defined" in found
    (tmp_path / "plain.html").write_text('<img src="http://127.0.0.1:9/picture.png" alt="">')
    tab.open(tmp_path / "plain.html")
    assert "http://127.0.0.1:9/picture.png" in tab.requests
