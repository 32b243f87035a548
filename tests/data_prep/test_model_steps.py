"""The steps that ask a model, by stand-ins for the models: what they decide, and what they change in the shards."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

import data_prep.pipeline.curation
from data_prep.pipeline.curation import rethreshold, run, write_kept
from data_prep.pipeline.forecast import forecast
from data_prep.pipeline.ledger import stats, why
from data_prep.pipeline.measuring import picture_id
from data_prep.steps.clip_score import ClipScore, ClipScoreConfig
from data_prep.steps.faces import MARGIN, FacesConfig, blurred
from data_prep.steps.near_duplicates import NearDuplicatesConfig
from data_prep.steps.nsfw import NsfwConfig
from data_prep.steps.ocr import OcrConfig
from shards.reader import ShardSet
from tests.data_prep.reports import report_of
from tests.data_prep.scripted import MiddleFace, RednessClassifier, ScriptedScorer, SizeReader

CLIP = ClipScoreConfig("any", "any", threshold=0.1)


@pytest.fixture
def scripted(monkeypatch):
    """Stand-ins in the place of every model."""
    monkeypatch.setattr(data_prep.pipeline.curation.OpenNsfw, "of_package", RednessClassifier)
    monkeypatch.setattr(data_prep.pipeline.curation.CenterFace, "of_file", lambda *_: MiddleFace())
    monkeypatch.setattr(data_prep.pipeline.curation.RapidOcr, "of_package", SizeReader)
    return lambda config: ScriptedScorer(config.pretrained)


def redness(pair) -> float:
    return RednessClassifier().score(Image.open(io.BytesIO(pair[1])).convert("RGB"))


def only(pairs: dict, *suffixes: str) -> dict:
    return {key: pair for key, pair in pairs.items() if pair[0] in suffixes}


def by_caption(work) -> dict:
    return {record.json["caption"]: record for record in ShardSet(Path(work) / "shards")}


def test_pairs_under_the_clip_score_go_and_deciding_anew_needs_no_model(pool, curate, good_pairs, scripted):
    config = curate(pool("tars", "a", good_pairs(20)), "tars", "run", resampling=None, clip_score=CLIP)
    assert run(config, Path, scripted) == 10
    work = Path(config.output)
    assert ("clip_score", "drop", "CLIP score too low", 10) in stats(work)
    assert "clip_score: drop: CLIP score too low (0.03, threshold 0.1)" in why(work, "good003")
    assert ShardSet(work / "shards").index["clip_score"].to_pylist() == pytest.approx(
        [int(caption.split()[-1]) / 100 for caption in ShardSet(work / "shards").index["caption"].to_pylist()]
    )
    rethreshold(work, replace(config, clip_score=replace(CLIP, threshold=0.05)))
    assert write_kept(work) == 15
    (about,) = forecast(work / "set", data_prep.pipeline.curation.steps_of(config, Path, scripted))[-1:]
    assert (about.option, about.pairs, about.kept) == ("clip_score.threshold", 20, 10)
    assert "clip_score.threshold" in report_of(work)
    with pytest.raises(ValueError, match="clip_score: scorer cannot be changed without `mm data run`"):
        rethreshold(work, replace(config, clip_score=replace(CLIP, pretrained="another")))
    with pytest.raises(ValueError, match="clip_score needs a model"):
        run(config)


def test_the_best_share_stays_and_ties_go_by_id():
    scores = [0.3, 0.1, 0.3, 0.3, 0.2, 0.3]
    table = pa.table({"id": [str(number) for number in range(6)], "clip_score": scores})
    for share, stay in ((0.5, {0, 2, 3}), (1.0, set(range(6))), (5 / 6, {0, 2, 3, 4, 5})):
        step = ClipScore(ClipScoreConfig("any", "any", share=share), ScriptedScorer())
        said = step.decide(table, Path())
        assert set(range(6)) - set(said["row"].to_pylist()) == stay
        assert set(said["threshold"].to_pylist()) <= {min(scores[row] for row in stay)}
    assert ClipScore(ClipScoreConfig("any", "any", share=0.5), ScriptedScorer()).decide(table[:0], Path()).num_rows == 0
    for wrong in ({}, {"threshold": 0.2, "share": 0.5}, {"share": 0.0}, {"share": 1.1}):
        with pytest.raises(ValueError, match="clip_score: "):
            ClipScoreConfig("any", "any", **wrong)


def test_a_picture_with_several_captions_is_looked_at_once(noise):
    looked = []

    class Scorer(ScriptedScorer):
        def score(self, picture, captions):
            looked.append(len(captions))
            return super().score(picture, captions)

    picture = noise(1)
    batch = {"image_id": ["a", "b", "a"], "picture": [picture] * 3, "caption": ["x 1", "x 2", "x 3"]}
    assert ClipScore(CLIP, Scorer()).measure(batch) == {"clip_score": [0.01, 0.02, 0.03]}
    assert looked == [2, 1]


def test_of_equal_pictures_the_one_with_the_best_clip_score_stays(pool, curate, good_pairs, scripted):
    pairs = only(good_pairs(12), "png")
    (one, *_) = pairs.values()
    captions = [
        f"A picture of a dog in front of the old {word} number {n}" for word, n in (("wooden wall", 50), ("wall", 90))
    ]
    twins = {f"twin{n}": ("png", one[1], caption.encode()) for n, caption in enumerate(captions)}
    settings = {"resampling": None, "near_duplicates": NearDuplicatesConfig()}
    for clip, stays in ((None, captions[0]), (CLIP, captions[1])):
        config = curate(pool("tars", f"{clip}"[:4], twins), "tars", f"{clip}"[:4], clip_score=clip, **settings)
        assert run(config, Path, scripted) == 1 and list(by_caption(config.output)) == [stays]


def test_unsafe_pictures_are_quarantined_and_shown_nowhere(pool, curate, good_pairs, scripted):
    pairs = only(good_pairs(24), "jpg", "png")
    limit = sorted(map(redness, pairs.values()))[6]
    config = curate(pool("tars", "a", pairs), "tars", "run", resampling=None, nsfw=NsfwConfig(round(limit, 3) + 0.001))
    count = run(config, Path, scripted)
    work = Path(config.output)
    unsafe = {key for key, pair in pairs.items() if redness(pair) > config.nsfw.threshold}
    assert unsafe and count == len(pairs) - len(unsafe)
    assert ("nsfw", "quarantine", "NSFW score too high", len(unsafe)) in stats(work)
    report = report_of(work)
    assert "nsfw.threshold" in report
    section = report.split("nsfw.threshold")[1].split("<h3>")[0]
    assert "<img" not in section and "<svg" in section
    for key in unsafe:
        said = why(work, key)
        assert said.count("\n") == 0 and "quarantined by nsfw: NSFW score too high (0." in said
        assert said[:12] not in report and pairs[key][2].decode() not in said
    rethreshold(work, replace(config, nsfw=NsfwConfig(1.0)))
    assert write_kept(work) == len(pairs)
    with pytest.raises(ValueError, match="nsfw: threshold is 2"):
        NsfwConfig(2)


def test_faces_are_blurred_in_what_is_written_and_nothing_else_changes(pool, curate, good_pairs, scripted):
    pairs = only(good_pairs(24), "jpg", "png")
    limit = sorted(map(redness, pairs.values()))[6]
    faces = FacesConfig("any", threshold=limit)
    config = curate(pool("tars", "a", pairs), "tars", "run", resampling=None, faces=faces)
    assert run(config, Path, scripted) == len(pairs)
    work, found = Path(config.output), by_caption(config.output)
    index = {row["id"]: row for row in ShardSet(work / "shards").index.to_pylist()}
    changed = 0
    for key, (suffix, picture, caption) in pairs.items():
        record = found[caption.decode()]
        assert record.json["image_id"] == picture_id(picture)
        (medium,) = record.media.values()
        if medium == picture:
            assert index[record.id]["faces"] == [] and index[record.id]["face_score"] < limit
            continue
        changed += 1
        assert "faces: change: faces are blurred: 1 (0." in why(work, key) and "faces: [[0.25, 0.25" in why(work, key)
        assert index[record.id]["faces"][0][:4] == [0.25, 0.25, 0.75, 0.75]
        before, after = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int) for data in (picture, medium))
        moved = np.abs(before - after).max(2)
        height, width = moved.shape
        inner = moved[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
        assert inner.mean() > 5 * moved[:, : width // 10].mean()
        if suffix == "png":
            assert not moved[:, : width // 10].any() and not moved[:, -width // 10 :].any()
    assert 0 < changed < len(pairs)
    assert ("faces", "change", "faces are blurred", changed) in stats(work)
    rethreshold(work, replace(config, faces=replace(faces, threshold=1.0)))
    assert write_kept(work) == len(pairs)
    assert all(list(by_caption(work)[pair[2].decode()].media.values()) == [pair[1]] for pair in pairs.values())
    with pytest.raises(ValueError, match=r"at least 0.1, the floor"):
        FacesConfig("any", threshold=0.05)


def test_nothing_of_a_blurred_face_can_be_told(noise):
    """Two faces of the same mean colours become the same; what lies around stays."""
    around = np.asarray(noise(5, (96, 96)))
    # the ellipse is over pixels 33 to 63, of which 6 x 6 tiles of 5 x 5 are left as one colour each; columns and rows
    # of a tile change places, which leaves the mean as it is, also where it is rounded between the two directions
    box = [48 / 96 + side * 15 / 96 / (1 + MARGIN) for side in (-1, -1, 1, 1)]
    tiles = np.random.default_rng(0).integers(0, 256, (6, 5, 6, 5, 3), dtype=np.uint8)
    one, other = around.copy(), around.copy()
    one[33:63, 33:63] = tiles.reshape(30, 30, 3)
    other[33:63, 33:63] = np.roll(tiles, (1, 2), axis=(1, 3)).reshape(30, 30, 3)
    mask = Image.new("L", (30, 30))
    ImageDraw.Draw(mask).ellipse((0, 0, 29, 29), fill=255)
    hidden = np.zeros((96, 96), bool)
    hidden[33:63, 33:63] = np.asarray(mask) > 0
    assert (one != other)[hidden].any(1).mean() > 0.9
    seen = [np.asarray(blurred(Image.fromarray(face), [[*box, 0.9]])) for face in (one, other)]
    assert (seen[0] == seen[1])[hidden].all()
    for face, result in zip((one, other), seen, strict=True):
        assert (result == face)[~hidden].all() and (result != face)[hidden].any(1).mean() > 0.5
    assert len(np.unique(seen[0][hidden], axis=0)) > 1
    for edge in ([-0.5, -0.5, 0.1, 0.1, 1.0], [0.9, 0.9, 1.5, 1.5, 1.0], [0.5, 0.5, 0.5, 0.5, 1.0]):
        assert blurred(Image.fromarray(one), [edge]).size == (96, 96)


def test_the_report_blurs_faces_as_the_shards_do(pool, curate, good_pairs, scripted):
    pairs = only(good_pairs(12), "png")
    plain = curate(pool("tars", "a", pairs), "tars", "plain", resampling=None)
    for faces, changed in ((FacesConfig("any", threshold=0.1), True), (FacesConfig("any", threshold=1.0), False)):
        config = replace(plain, output=f"{plain.output}-{changed}", faces=faces)
        run(config, Path, scripted)
        run(plain)
        pictures = [shown_in(one.output) for one in (config, plain)]
        assert pictures[0].keys() == pictures[1].keys() and len(pictures[0]) == len(pairs)
        assert all((pictures[0][name] != pictures[1][name]) == changed for name in pictures[0])


def test_a_report_without_pictures_is_written(pool, curate, good_pairs, scripted):
    models = {"nsfw": NsfwConfig(1.0), "faces": FacesConfig("any"), "ocr": OcrConfig()}
    none = {"caption_rules": None, "image_rules": None, "resampling": None}
    config = curate(pool("tars", "a", good_pairs(4)), "tars", "run", **none, **models)
    assert run(config, Path, scripted) == 4
    report = report_of(Path(config.output))
    assert "nsfw.threshold" in report and "<img" not in report


def shown_in(work) -> dict[str, str]:
    """id -> the picture that the report shows of it, as base64."""
    report = report_of(Path(work))
    found = re.findall(r"base64,([^']+)'>(?:(?!<figure>).)*<small>(\w+)</small>", report)
    return {name: data for data, name in found}


def test_text_in_pictures_joins_the_written_caption(pool, curate, good_pairs, scripted, noise, encode):
    pairs = only(good_pairs(8), "png")
    braces = ("png", encode(noise(50)), b"A {text} dog in front of the old wall\n")
    config = curate(
        pool("tars", "a", {**pairs, "braces": braces}),
        "tars",
        "run",
        resampling=None,
        ocr=OcrConfig("{caption} ({text})"),
    )
    run(config, Path, scripted)
    work = Path(config.output)
    expected = sorted(f"{pair[2].decode().strip()} (48 {{px}})" for pair in [*pairs.values(), braces])
    assert sorted(by_caption(work)) == expected
    (row, *_) = ShardSet(work / "shards").index.to_pylist()
    assert row["ocr_text"] == "48 {px}" and row["ocr_score"] == 0.9 and row["caption"] in expected
    assert row["ocr_boxes"] == [[0, 0, 0.5, 0, 0.5, 0.25, 0, 0.25]] and row["num_chars"] == len(row["caption"])
    assert "ocr_text: 48 {px}" in why(work, "braces")
    stored = pq.read_table(work / "set" / "pairs.parquet")["caption"].to_pylist()
    assert not any("px" in caption for caption in stored)
    rethreshold(work, replace(config, ocr=OcrConfig("{text}: {caption}", ", ", 0.2)))
    write_kept(work)
    assert all(caption.startswith("48 {px}, 40: A ") for caption in by_caption(work))
    rethreshold(work, replace(config, ocr=None))
    write_kept(work)
    assert sorted(by_caption(work)) == sorted(pair[2].decode().strip() for pair in [*pairs.values(), braces])
    rethreshold(work, config)  # it measures nothing, so it can join later
    write_kept(work)
    assert sorted(by_caption(work)) == expected
    for wrong in ("{caption}", "{caption} {text} {text}", "{caption} {text", "{} {caption} {text}"):
        with pytest.raises(ValueError, match="ocr: template"):
            OcrConfig(wrong)


def test_all_of_them_give_the_same_bytes_with_any_number_of_workers(pool, curate, good_pairs, bad_pairs, scripted):
    pairs = {**good_pairs(24), **bad_pairs}
    settings = {
        "resampling": None, "clip_score": ClipScoreConfig("any", "any", share=0.8), "nsfw": NsfwConfig(0.6),
        "faces": FacesConfig("any", 0.5), "ocr": OcrConfig(),
    }  # fmt: skip
    found = []
    for name, files, workers in (("one", 1, 1), ("two", 4, 2)):
        config = curate(pool("tars", name, pairs, files), "tars", name, workers=workers, **settings)
        run(config, Path, scripted)
        work = Path(config.output)
        paths = [work / "ledger.parquet", work / "set" / "pairs.parquet", work / "set" / "pictures.parquet"]
        found.append({path.name: path.read_bytes() for path in [*paths, *sorted((work / "shards").iterdir())]})
        assert {row[0] for row in stats(work)} >= {"clip_score", "nsfw", "faces", "write"}
    assert found[0] == found[1]
