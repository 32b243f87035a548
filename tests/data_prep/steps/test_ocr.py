from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont

from data_prep.pipeline.curation import rethreshold, run, write_kept
from data_prep.pipeline.ledger import why
from data_prep.steps.ocr import OcrConfig, RapidOcr
from foundation.errors import UserError
from shards.reader import ShardSet
from tests.data_prep.runs import by_caption, only


@pytest.fixture
def captions_run(pool, curate, good_pairs, scripted, noise, encode):
    """(configuration, captions as read) of a run that adds the text `48 {px}` to every caption."""
    braces = ("png", encode(noise(50)), b"A {text} dog in front of the old wall\n")
    pairs = {**only(good_pairs(8), "png"), "braces": braces}
    ocr = OcrConfig("{caption} ({text})")
    config = curate(pool("tars", "a", pairs), "tars", "run", resampling=None, ocr=ocr)
    run(config, Path, scripted)
    return config, [pair[2].decode().strip() for pair in pairs.values()]


def test_text_in_the_picture_is_added_to_the_written_caption(captions_run):
    config, captions = captions_run
    assert sorted(by_caption(config.output)) == sorted(f"{caption} (48 {{px}})" for caption in captions)


def test_the_index_has_the_text_and_its_boxes(captions_run):
    work = Path(captions_run[0].output)
    for row in ShardSet(work / "shards").index.to_pylist():
        assert row["ocr_text"] == "48 {px}" and row["ocr_score"] == 0.9
        assert row["ocr_boxes"] == [[0, 0, 0.5, 0, 0.5, 0.25, 0, 0.25]] and row["num_chars"] == len(row["caption"])
    assert "ocr_text: 48 {px}" in why(work, "braces")


def test_the_stored_caption_is_that_of_the_source(captions_run):
    stored = pq.read_table(Path(captions_run[0].output) / "set" / "pairs.parquet")["caption"].to_pylist()
    assert not any("px" in caption for caption in stored)


def test_another_template_needs_no_other_run(captions_run):
    config, _ = captions_run
    work = Path(config.output)
    rethreshold(work, replace(config, ocr=OcrConfig("{text}: {caption}", ", ", 0.2)))
    write_kept(work)
    assert all(caption.startswith("48 {px}, 40: A ") for caption in by_caption(work))


def test_the_step_can_be_left_out_and_added_later(captions_run):
    config, captions = captions_run
    work, before = Path(config.output), sorted(by_caption(config.output))
    rethreshold(work, replace(config, ocr=None))
    write_kept(work)
    assert sorted(by_caption(work)) == sorted(captions)
    rethreshold(work, config)  # it measures nothing
    write_kept(work)
    assert sorted(by_caption(work)) == before


@pytest.mark.parametrize("template", ["{caption}", "{caption} {text} {text}", "{caption} {text", "{} {caption} {text}"])
def test_a_template_has_caption_and_text_once(template):
    with pytest.raises(UserError, match="ocr: template"):
        OcrConfig(template)


def test_rapidocr_reads_lines_and_their_corners():
    picture = Image.new("RGB", (320, 160), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((20, 10), "STOP here", font=ImageFont.load_default(40), fill="black")
    draw.text((120, 100), "Exit 42", font=ImageFont.load_default(30), fill="red")
    reader = RapidOcr.of_package()
    lines = reader.read(picture)
    assert [line.text for line in lines] == ["STOP here", "Exit 42"] and min(line.score for line in lines) > 0.8
    corners = np.array(lines[1].corners).reshape(4, 2)
    assert np.abs(corners.min(0) - (120, 105)).max() < 12 and np.abs(corners.max(0) - (215, 130)).max() < 12
    assert reader.read(picture) == lines and reader.id.startswith("rapidocr-3.")


def test_small_and_thin_pictures_have_no_text():
    reader = RapidOcr.of_package()
    assert reader.read(Image.new("RGB", (1, 1))) == [] == reader.read(Image.new("RGB", (300, 3), "white"))
