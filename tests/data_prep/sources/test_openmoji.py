import io
import json

import pytest
from PIL import Image

from data_prep.sources.files import license_text
from data_prep.sources.openmoji import caption_of, concept_of, to_samples
from shards.format import check_record


def drawing(colour):
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><circle r="30" fill="{colour}"/></svg>'


@pytest.fixture
def make_set(tmp_path):
    def make(drawings):
        (tmp_path / "color" / "svg").mkdir(parents=True)
        (tmp_path / "data").mkdir()
        rows = []
        for i, (annotation, content) in enumerate(drawings):
            (tmp_path / "color" / "svg" / f"{i:X}.svg").write_text(content)
            rows.append({"hexcode": f"{i:X}", "annotation": annotation})
        (tmp_path / "data" / "openmoji.json").write_text(json.dumps(rows))
        return tmp_path

    return make


def test_content_of_the_records(make_set):
    records = list(to_samples(make_set([("flag: Chad", drawing("red")), ("heart", drawing("blue"))])))
    assert [record.json["caption"] for record in records] == ["heart", "flag of Chad"]
    for record in records:
        check_record(record)
        picture = Image.open(io.BytesIO(record.media["png"]))
        assert picture.size == (128, 128) and picture.mode == "RGB" and picture.getpixel((127, 127)) == (255, 255, 255)


def test_a_larger_picture_size_gives_the_same_records(make_set):
    """Drawings that are equal at 128 px give one record at every size."""
    near = drawing("red").replace('r="30"', 'r="30.001"')
    folder = make_set([("flag: Chad", drawing("red")), ("heart", drawing("blue")), ("round flag: Chad", near)])
    small, large = list(to_samples(folder)), list(to_samples(folder, picture_size=192))
    assert [record.json for record in small] == [record.json for record in large] and len(small) == 2
    assert {Image.open(io.BytesIO(record.media["png"])).size for record in large} == {(192, 192)}


def test_captions_of_annotations():
    assert caption_of("man cook: dark skin tone") == "man cook, dark skin tone"
    assert caption_of("flag: Chad") == "flag of Chad"
    assert caption_of("keycap: 5") == "keycap 5"


def test_variants_have_the_same_concept():
    cook = ["cook", "man cook", "woman cook: dark skin tone", "cook: medium-light skin tone"]
    assert {concept_of(name) for name in cook} == {"cook"}
    hands = [
        "men holding hands: light skin tone, dark skin tone",
        "woman and man holding hands",
        "people holding hands",
    ]
    assert {concept_of(name) for name in hands} == {"holding hands"}
    assert concept_of("man walking: facing right") == concept_of("person walking: light skin tone, facing right")
    assert concept_of("woman") == "woman"  # there would be nothing left
    assert concept_of("red heart") != concept_of("blue heart")
    assert concept_of("mandarin") == "mandarin" and concept_of("snowman") == "snowman"


def test_variants_and_equal_pictures_are_in_one_split(make_set):
    shades = [f"#{i:06x}" for i in range(0, 600 * 9, 9)]
    drawings = []
    for i in range(200):
        drawings.append((f"thing{i}", drawing(shades[3 * i])))
        drawings.append((f"thing{i}: dark skin tone", drawing(shades[3 * i + 1])))
        # other names that share one picture: thing7's friend looks like thing8's
        drawings.append((f"friend of thing{i // 2 * 2}: medium skin tone", drawing(shades[3 * (i // 2 * 2) + 2])))
        drawings.append((f"flag: {i}", drawing(shades[3 * i])))
    splits_of, counts = {}, {}
    for record in to_samples(make_set(drawings)):
        concept = concept_of(record.json["caption"])
        splits_of.setdefault(concept, set()).add(record.json["split"])
        counts[record.json["split"]] = counts.get(record.json["split"], 0) + 1
    assert all(len(side) == 1 for side in splits_of.values())
    assert set(counts) == {"train", "validation", "test"} and counts["train"] > 0.8 * sum(counts.values())


def test_the_shortest_name_of_equal_pictures_is_used(make_set):
    names = ["people wrestling: dark skin tone, light skin tone", "people wrestling", "man wrestling"]
    dropped = []
    records = list(to_samples(make_set([(name, drawing("red")) for name in names]), dropped))
    assert [record.json["caption"] for record in records] == ["man wrestling"]
    assert [name for name, _ in dropped] == ["color/svg/1.svg", "color/svg/0.svg"]
    assert all("same picture as color/svg/2.svg" in reason for _, reason in dropped)


def test_unusable_files_are_reported_and_the_others_used(make_set):
    blank = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><text>A</text></svg>'
    folder = make_set([("broken", "<svg"), ("blank", blank), ("good", drawing("red")), ("lost", "")])
    (folder / "color" / "svg" / "3.svg").unlink()
    dropped = []
    assert [record.json["caption"] for record in to_samples(folder, dropped)] == ["good"]
    reasons = dict(dropped)
    assert sorted(reasons) == [f"color/svg/{i}.svg" for i in (0, 1, 3)]
    assert "truncated" in reasons["color/svg/0.svg"] and "white all over" in reasons["color/svg/1.svg"]


def test_a_folder_without_the_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"openmoji\.json: not a list of drawings"):
        list(to_samples(tmp_path))
    with pytest.raises(ValueError, match="LICENSE"):
        license_text(tmp_path)
    (tmp_path / "LICENSE").write_text("CC")
    assert license_text(tmp_path) == "CC"
