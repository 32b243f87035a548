"""The report is one file about the last decision, and shows no quarantined or unblurred picture."""

import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from data_prep.pipeline.curation import read_run, rethreshold, run, write_kept
from data_prep.steps.faces import FacesConfig
from data_prep.steps.hash_lists import HashListsConfig, phash
from data_prep.steps.nsfw import NsfwConfig
from data_prep.steps.ocr import OcrConfig
from tests.data_prep.pipeline.test_forecast import kept
from tests.data_prep.reports import report_of
from tests.data_prep.runs import only
from vision.reading import read_picture


def test_the_report_shows_pairs_that_one_threshold_alone_decides_about(work):
    _, config = read_run(work)
    before = report_of(work)
    rules = replace(config.image_rules, min_short_side=41, max_aspect_ratio=1.1)
    rethreshold(work, replace(config, image_rules=rules))
    after = report_of(work)
    assert f"{kept(work)} kept" in after and after != before
    # pictures of 48 x 40 px fail both rules, so no threshold alone decides about them; those of 64 x 64 px pass both
    section = after[after.index("image_rules.min_short_side") : after.index("image_rules.max_aspect_ratio")]
    assert "dropped, nearest" not in section and "kept, nearest" in section
    rethreshold(work, replace(config, image_rules=replace(rules, max_aspect_ratio=4)))
    section = report_of(work)
    section = section[section.index("image_rules.min_short_side") : section.index("image_rules.max_aspect_ratio")]
    assert "dropped, nearest" in section and "kept, nearest" in section
    rethreshold(work, config)
    assert report_of(work) == before


def test_the_report_is_one_file_without_scripts_and_links(work):
    page = report_of(work)
    assert not re.search(r"(?:src|href)=['\"]?(?!['\"]?data:)", page) and "<script" not in page
    assert f"{kept(work)} kept" in page and "data:image/webp;base64," in page
    for words in ("image_rules.min_contrast", "caption_rules.min_language_score", "resampling.threshold", "wall"):
        assert words in page
    counted = sum(map(int, re.findall(r'<td class="number">(\d+)</td><td>(?:write|ingest|resampling)', page)))
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


def test_faces_are_blurred_as_in_the_shards(pool, curate, good_pairs, scripted):
    pairs = only(good_pairs(12), "png")
    plain = curate(pool("tars", "a", pairs), "tars", "plain", resampling=None)
    for faces, changed in ((FacesConfig("any", threshold=0.1), True), (FacesConfig("any", threshold=1.0), False)):
        config = replace(plain, output=f"{plain.output}-{changed}", faces=faces)
        run(config, Path, scripted)
        run(plain)
        pictures = [pictures_in(one.output) for one in (config, plain)]
        assert pictures[0].keys() == pictures[1].keys() and len(pictures[0]) == len(pairs)
        assert all((pictures[0][name] != pictures[1][name]) == changed for name in pictures[0])


def test_a_report_may_have_no_pictures(pool, curate, good_pairs, scripted):
    models = {"nsfw": NsfwConfig(1.0), "faces": FacesConfig("any"), "ocr": OcrConfig()}
    none = {"caption_rules": None, "image_rules": None, "resampling": None}
    config = curate(pool("tars", "a", good_pairs(4)), "tars", "run", **none, **models)
    assert run(config, Path, scripted) == 4
    report = report_of(Path(config.output))
    assert "nsfw.threshold" in report and "<img" not in report


def pictures_in(work) -> dict[str, str]:
    """Beginning of an id -> its picture in the report, as base64."""
    report = report_of(Path(work))
    found = re.findall(r'base64,([^"]+)"[^>]*>(?:(?!<figure).)*<small>(\w+)</small>', report)
    return {name: data for data, name in found}
