"""The report stands alone, is about the last decision, and shows nothing that is to stay hidden."""

import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from data_prep.pipeline.curation import read_run, rethreshold, run, write_kept
from data_prep.steps.hash_lists import HashListsConfig, phash
from tests.data_prep.pipeline.test_forecast import kept
from tests.data_prep.reports import report_of
from vision.reading import read_picture


def test_the_report_is_that_of_the_last_decision_and_shows_what_a_threshold_alone_decides(work):
    _, config = read_run(work)
    before = report_of(work)
    rules = replace(config.image_rules, min_short_side=41, max_aspect_ratio=1.1)
    rethreshold(work, replace(config, image_rules=rules))
    after = report_of(work)
    assert f"{kept(work)} kept" in after and after != before
    # pictures of 48 x 40 fail both rules, those of 64 x 64 neither: no threshold alone decides about the former
    section = after[after.index("image_rules.min_short_side") : after.index("image_rules.max_aspect_ratio")]
    assert "dropped, nearest" not in section and "kept, nearest" in section
    rethreshold(work, replace(config, image_rules=replace(rules, max_aspect_ratio=4)))
    section = report_of(work)
    section = section[section.index("image_rules.min_short_side") : section.index("image_rules.max_aspect_ratio")]
    assert "dropped, nearest" in section and "kept, nearest" in section
    rethreshold(work, config)
    assert report_of(work) == before


def test_the_report_stands_alone_and_shows_each_threshold(work):
    page = report_of(work)
    assert not re.search(r"(?:src|href)=['\"]?(?!['\"]?data:)", page) and "<script" not in page
    assert f"{kept(work)} kept" in page and "data:image/webp;base64," in page
    for words in ("image_rules.min_contrast", "caption_rules.min_language_score", "resampling.threshold", "wall"):
        assert words in page
    counted = sum(map(int, re.findall(r"<td class=n>(\d+)<td>(?:write|ingest|resampling)", page)))
    assert counted == pq.read_metadata(work / "ledger.parquet").num_rows


def test_quarantined_pictures_are_not_in_the_report(pool, curate, good_pairs, tmp_path):
    pairs = good_pairs(8)
    hashed = phash(read_picture(pairs["good001"][1])).tobytes().hex()
    (tmp_path / "harm.txt").write_text(f"phash 256\n{hashed}\n")
    config = curate(pool("tars", "a", pairs), "tars", "run", resampling=None)
    config = replace(config, hash_lists=HashListsConfig((str(tmp_path / "harm.txt"),), 0))
    assert run(config) == 7
    page = report_of(Path(config.output))
    assert "number 1<" not in page and "number 2<" in page and "harm" in page
    rethreshold(Path(config.output), config)
    assert write_kept(Path(config.output)) == 7
