import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.pipeline.pool import RawSource
from data_prep.report.language_confusion import confusions, confusions_html
from data_prep.sources.splits import split_of
from data_prep.steps.caption_rules import CaptionRules

TUX, OTHER = RawSource("stamps", "folder", "tuxpaint"), RawSource("other", "folder", "text")


@pytest.fixture
def stored(tmp_path):
    """stored(rows of (source, key, caption, score, words)) -> the folder of a set that holds them."""

    def write(rows: list[tuple]):
        ids = [f"{number:032x}" for number in range(len(rows))]
        source, key, caption, score, words = (list(column) for column in zip(*rows, strict=True))
        pq.write_table(pa.table({"id": ids, "source": source, "key": key}), tmp_path / "sources.parquet")
        about = {"id": ids, "caption": caption, "language_score": score, "words": pa.array(words, pa.int32())}
        pq.write_table(pa.table(about), tmp_path / "pairs.parquet")
        return tmp_path

    return write


def is_held_out(caption: str) -> bool:
    return split_of(f"line/{caption}", 0, 0.5) == "test"


def test_held_out_lines_are_counted_once_by_length_and_language(stored):
    rules = CaptionRules(languages=("en",), min_language_score=0.6, min_short_language_score=0.3)
    rows, expected = [], {}
    for number in range(400):
        language = ("en", "en_GB", "de", "pt_BR")[number % 4]
        caption, words = f"line {number}", 3 if number % 3 else 7
        score = round(np.random.default_rng(number).random(), 3)
        rows.append(("stamps", f"a{number}.png#{language}", caption, score, words))
        rows.append(("stamps", f"a{number}_mirror.png#{language}", caption, score, words))  # the same line again
        rows.append(("other", f"b{number}", f"{caption} of an unknown language", score, words))
        if is_held_out(caption):
            limit = 0.3 if words < 5 else 0.6
            key = (words, language[:2] if language[:2] != "en" else "", score >= limit)
            expected[key] = expected.get(key, 0) + 1
    rows.append(("stamps", "c.png#en", "an apple", 0.9, 2))
    rows.append(("stamps", "c.png#fr", "an apple", 0.9, 2))  # spelt as in English, so keeping it is no error
    rows.append(("stamps", "d.png#?", "what is this", 0.9, 3))
    if is_held_out("an apple"):
        expected[3, "", True] += 1
    found = confusions(stored(rows), rules, [TUX, OTHER])
    for one, words, threshold in zip(found, (3, 7), (0.3, 0.6), strict=True):
        assert one.threshold == threshold
        assert (one.wanted_kept, one.wanted_dropped) == (expected[words, "", True], expected[words, "", False])
        for language, lines, kept in one.languages:
            assert kept == expected[words, language, True]
            assert lines == kept + expected[words, language, False]
        assert {language for language, _, _ in one.languages} == {"de", "pt"}
        assert one.others_kept == sum(kept for _, _, kept in one.languages) > 0
        assert one.languages[0][2] / one.languages[0][1] >= one.languages[1][2] / one.languages[1][1]
        # each choice of a threshold keeps its share of the wanted lines in the half "choosing"
        scores = [
            score
            for _, key, caption, score, w in rows
            if "#en" in key and "_mirror" not in key and (w < 5) == (words < 5) and not is_held_out(caption)
        ]
        for share, at in one.choices:
            assert share <= np.mean(np.array(scores) >= at) <= share + 1.5 / len(scores)
    page = confusions_html(found)
    assert "under 5 words" in page and f'<td class="number">{found[0].others_kept}' in page


def test_a_pool_without_lines_of_known_language_has_no_table(stored):
    folder = stored([("other", "a", "some line", 0.5, 2)])
    assert confusions(folder, CaptionRules(), [OTHER]) == [] and confusions_html([]) == ""
    assert confusions(folder, CaptionRules(), [TUX, OTHER]) == []
