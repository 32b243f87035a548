import io

import pytest
from PIL import Image

from data_prep.sources.tuxpaint import concept_of, to_samples
from shards.format import check_record


@pytest.fixture
def stamp(tmp_path):
    def make(name, sentence=None, size=(300, 150), colour=(200, 0, 0)):
        path = tmp_path / "stamps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".svg":
            path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt">{colour}</svg>')
        else:
            Image.new("RGB", size, colour).save(path)
        if sentence is not None:
            path.with_suffix(".txt").write_text(f"{sentence}\nde.utf8=Etwas anderes.\n", encoding="utf-8")
        return tmp_path

    return make


def captions(records):
    return sorted(record.json["caption"] for record in records)


def test_pictures_are_shrunk_but_not_enlarged_and_transparency_becomes_white(stamp):
    folder = stamp("animals/cow.png", "A cow – “moo”.")
    stamp("animals/cat.png", "A cat.", size=(60, 20))
    clear = Image.new("RGBA", (400, 300))
    clear.paste((0, 0, 200, 255), (0, 0, 200, 300))
    clear.save(folder / "stamps" / "animals" / "cow.png")
    records = {record.json["caption"]: record for record in to_samples(folder)}
    for record in records.values():
        check_record(record)
    cow = Image.open(io.BytesIO(records["A cow – “moo”."].media["png"]))
    assert cow.size == (128, 96) and cow.mode == "RGB"
    larger = {record.json["caption"]: record for record in to_samples(folder, picture_size=200)}
    sizes = [Image.open(io.BytesIO(larger[name].media["png"])).size for name in ("A cow – “moo”.", "A cat.")]
    assert sizes == [(200, 150), (60, 20)]
    assert cow.getpixel((10, 50)) == (0, 0, 200) and cow.getpixel((120, 50)) == (255, 255, 255)
    assert Image.open(io.BytesIO(records["A cat."].media["png"])).size == (60, 20)


def test_a_readable_svg_is_used_before_the_png(stamp):
    folder = stamp("a/good.svg", "Good.", colour='<rect width="9" height="9" fill="lime"/>')
    stamp("a/good.png")
    stamp("a/linked.svg", "Linked.", colour='<image href="secret.png" width="9" height="9"/>')
    stamp("a/linked.png")
    dropped = []
    found = {r.json["caption"]: Image.open(io.BytesIO(r.media["png"])) for r in to_samples(folder, dropped)}
    assert {name: picture.size for name, picture in found.items()} == {"Good.": (128, 128), "Linked.": (128, 64)}
    assert found["Good."].getpixel((5, 5)) == (0, 255, 0)
    assert [name for name, _ in dropped] == ["stamps/a/linked.svg"] and "secret.png" in dropped[0][1]


def test_stamps_with_one_sentence_and_mirrored_stamps_are_in_one_split(stamp):
    for i in range(60):
        folder = stamp(f"a/thing{i}.png", f"A thing {i}.", size=(4, 4))
        stamp(f"b/thing{i}_other.png", f"THING {i}", size=(4, 4))
        stamp(f"a/thing{i}_mirror.png", f"Something {i}, the other way round." if i % 2 else None, size=(4, 4))
    splits_of, counts = {}, {}
    for record in to_samples(folder):
        number = "".join(filter(str.isdigit, record.json["caption"]))
        splits_of.setdefault(number, []).append(record.json["split"])
        counts[record.json["split"]] = counts.get(record.json["split"], 0) + 1
    assert len(splits_of) == 60 and all(len(side) == 3 and len(set(side)) == 1 for side in splits_of.values())
    assert counts["train"] > 0.7 * 180 and counts["test"] > 0
    assert concept_of("A Red Apple.") == concept_of("the red apple") == "red apple" and concept_of("A") == "a"


def test_splits_and_ids_do_not_depend_on_the_path_of_the_folder(stamp, tmp_path):
    for i in range(30):
        folder = stamp(f"a/{i}.png", f"Number {i}.", size=(4, 4))
    before = list(to_samples(folder))
    (folder / "stamps").rename(tmp_path / "moved")
    (tmp_path / "else" / "where").mkdir(parents=True)
    (tmp_path / "moved").rename(tmp_path / "else" / "where" / "stamps")
    assert list(to_samples(tmp_path / "else" / "where")) == before


def test_stamps_without_a_usable_sentence_or_picture_are_reported(stamp):
    folder = stamp("a/good.png", "Good.")
    stamp("a/silent.png")
    stamp("a/blank.png", "A polar bear in the snow.", colour=(255, 255, 255))
    stamp("a/foreign.png")
    (folder / "stamps/a/foreign.txt").write_text("de.utf8=Eine Kuh.\n")
    stamp("a/latin.png")
    (folder / "stamps/a/latin.txt").write_bytes(b"Caf\xe9\n")
    stamp("a/cut.png", "Cut.")
    (folder / "stamps/a/cut.png").write_bytes((folder / "stamps/a/cut.png").read_bytes()[:60])
    dropped = []
    assert captions(to_samples(folder, dropped)) == ["Good."]
    words = {"silent": "no .txt", "blank": "white", "foreign": "no English", "latin": "UTF-8", "cut": "truncated"}
    assert len(dropped) == len(words)
    for name, word in words.items():
        assert any(name in file and word in reason for file, reason in dropped), (name, dropped)


def test_a_folder_without_stamps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no pictures under 'stamps'"):
        list(to_samples(tmp_path))
