"""Captions are mended before they are measured, identified and written."""

import unicodedata

import pytest

from data_prep.pipeline.curation import MEASURED, VERSION, read_config, read_run, rethreshold, run, write_kept
from data_prep.pipeline.ledger import stats
from data_prep.steps.caption_rules import CaptionRules
from data_prep.steps.step import STORED
from foundation.errors import UserError
from shards.reader import ShardSet
from tests.data_prep.runs import by_caption, decisions

KOREAN = "빨간 사과가 오래된 나무 탁자 위에 있다"


@pytest.fixture
def curated(pool, curate, noise, encode, tmp_path):
    """curated(captions, languages) -> the work folder of a run over one picture with each of these captions."""

    def make(captions, languages=("en",), same_picture=True):
        pictures = [encode(noise(0 if same_picture else index)) for index in range(len(captions))]
        pairs = {f"{index}": ("png", pictures[index], caption) for index, caption in enumerate(captions)}
        rules = CaptionRules(languages=languages)
        run(curate(pool("tars", "a", pairs), "tars", "run", resampling=None, caption_rules=rules))
        return tmp_path / "run"

    return make


def test_the_spellings_of_one_caption_are_one_pair(curated):
    text = "A café behind the old wall"
    spellings = [
        text.encode(), f"{text}\r\n".encode(), f"  {text.replace(' ', '  ')}\n".encode(), text.encode("utf-8-sig"),
        text.encode("utf-16"), text.replace(" ", "\u00a0").encode(), unicodedata.normalize("NFD", text).encode(),
    ]  # fmt: skip
    work = curated(spellings)
    assert len(decisions(work)) == 1
    assert [record.json["caption"] for record in ShardSet(work / "shards")] == [text]


def test_white_space_at_the_end_drops_no_caption(curated):
    work = curated([b"An owl", b"A cat\n", b"A dog runs\r\n"], same_picture=False)
    assert by_caption(work).keys() == {"An owl", "A cat", "A dog runs"}


def test_decomposed_captions_keep_their_language(curated):
    decomposed = unicodedata.normalize("NFD", KOREAN)
    assert decomposed != KOREAN
    assert by_caption(curated([decomposed.encode()], languages=("ko",))).keys() == {KOREAN}


def test_captions_of_nothing_but_white_space_or_marks_are_empty(curated):
    work = curated([b" \n", "\ufeff".encode(), "\u3000".encode(), b"An owl on a wall"], same_picture=False)
    assert ("ingest", "drop", "the caption is empty or missing", 3) in stats(work)


def test_a_folder_of_another_version_is_refused(work):
    assert (work / VERSION).read_text() == f"{STORED}\n"
    config = read_config(work / MEASURED)
    for change in (lambda path: path.write_text("2\n"), lambda path: path.unlink()):
        change(work / VERSION)
        for use in (lambda: run(config), lambda: read_run(work), lambda: rethreshold(work, config)):
            with pytest.raises(UserError, match=rf"run: stores measurements of version 2.* this is version {STORED}"):
                use()
        with pytest.raises(UserError, match="write into another folder, or delete this one"):
            write_kept(work)
