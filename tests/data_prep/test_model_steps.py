"""The steps that ask a model, by stand-ins for the models: what they decide, and what they change in the shards."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_prep.curation
from data_prep.clip_score import ClipScore, ClipScoreConfig
from data_prep.curation import rethreshold, run, write_kept
from data_prep.faces import FacesConfig, blurred
from data_prep.forecast import forecast
from data_prep.ledger import stats, why
from data_prep.measuring import picture_id
from data_prep.near_duplicates import NearDuplicatesConfig
from data_prep.nsfw import NsfwConfig
from data_prep.ocr import OcrConfig
from shards.reader import ShardSet
from tests.data_prep.scripted import MiddleFace, RednessClassifier, ScriptedScorer, SizeReader

CLIP = ClipScoreConfig("any", "any", threshold=0.1)


@pytest.fixture
def scripted(monkeypatch):
    """Stand-ins in the place of every model."""
    monkeypatch.setattr(data_prep.curation.OpenNsfw, "of_package", RednessClassifier)
    monkeypatch.setattr(data_prep.curation.CenterFace, "of_file", lambda *_: MiddleFace())
    monkeypatch.setattr(data_prep.curation.RapidOcr, "of_package", SizeReader)
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
    rethreshold(work, replace(config, clip_score=replace(CLIP, threshold=0.05)), Path, scripted)
    assert write_kept(work, Path, scripted) == 15
    (about,) = forecast(work / "set", data_prep.curation.steps_of(config, Path, scripted))[-1:]
    assert (about.option, about.pairs, about.kept) == ("clip_score.threshold", 20, 10)
    assert "clip_score.threshold" in (work / "report.html").read_text()
    with pytest.raises(ValueError, match="clip_score: scorer cannot be changed without `mm data run`"):
        rethreshold(work, replace(config, clip_score=replace(CLIP, pretrained="another")), Path, scripted)
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
    report = (work / "report.html").read_text()
    assert "nsfw.threshold" in report
    section = report.split("nsfw.threshold")[1].split("<h3>")[0]
    assert "<img" not in section and "<svg" in section
    for key in unsafe:
        said = why(work, key)
        assert said.count("\n") == 0 and "quarantined by nsfw: NSFW score too high (0." in said
        assert said[:12] not in report and pairs[key][2].decode() not in said
    rethreshold(work, replace(config, nsfw=NsfwConfig(1.0)), Path, scripted)
    assert write_kept(work, Path, scripted) == len(pairs)
    bare = {"caption_rules": None, "image_rules": None, "nsfw": NsfwConfig(1.0)}  # nothing there for the report to show
    assert run(replace(config, output=f"{config.output}-bare", **bare), Path, scripted) == len(pairs)
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
    rethreshold(work, replace(config, faces=replace(faces, threshold=1.0)), Path, scripted)
    assert write_kept(work, Path, scripted) == len(pairs)
    assert all(list(by_caption(work)[pair[2].decode()].media.values()) == [pair[1]] for pair in pairs.values())
    with pytest.raises(ValueError, match=r"at least 0.1, the floor"):
        FacesConfig("any", threshold=0.05)


def test_nothing_of_a_blurred_face_is_left_but_a_few_colours(noise):
    """Pixels that change places within a sixth of the face's width and height change nothing."""
    generator = np.random.default_rng(0)
    one = generator.integers(0, 256, (96, 96, 3), dtype=np.uint8)
    blocks = one[30:66, 30:66].reshape(6, 6, 6, 6, 3).swapaxes(1, 2).reshape(36, 36, 3)
    shuffled = np.stack([generator.permutation(block) for block in blocks])
    other = one.copy()
    other[30:66, 30:66] = shuffled.reshape(6, 6, 6, 6, 3).swapaxes(1, 2).reshape(36, 36, 3)
    half = 18 / 1.3  # with its margin the face is 36 px wide
    face = [*[(48 - half) / 96] * 2, *[(48 + half) / 96] * 2, 0.9]
    after = [np.asarray(blurred(Image.fromarray(pixels), [face]), int) for pixels in (one, other)]
    inner = slice(36, 60)
    assert np.abs(one[inner, inner].astype(int) - other[inner, inner]).mean() > 50
    assert np.abs(after[0] - after[1])[inner, inner].max() <= 2  # the mean of a block is rounded twice
    for before, left in zip((one, other), after, strict=True):
        assert (before[:30] == left[:30]).all() and (before[:, 66:] == left[:, 66:]).all()
    picture = noise(5)
    for edge in ([-0.5, -0.5, 0.1, 0.1, 1.0], [0.9, 0.9, 1.5, 1.5, 1.0], [0.5, 0.5, 0.5, 0.5, 1.0]):
        assert blurred(picture, [edge]).size == picture.size


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
    rethreshold(work, replace(config, ocr=OcrConfig("{text}: {caption}", ", ", 0.2)), Path, scripted)
    write_kept(work, Path, scripted)
    assert all(caption.startswith("48 {px}, 40: A ") for caption in by_caption(work))
    rethreshold(work, replace(config, ocr=None), Path, scripted)
    write_kept(work, Path, scripted)
    assert sorted(by_caption(work)) == sorted(pair[2].decode().strip() for pair in [*pairs.values(), braces])
    rethreshold(work, config, Path, scripted)  # it measures nothing, so it can join later
    write_kept(work, Path, scripted)
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
