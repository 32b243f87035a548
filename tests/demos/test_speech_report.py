"""Error rates on each set, beside the baseline that hears another recording."""

import json
import shutil

import numpy as np
import pytest

from data_prep.sources.recordings import transcription_record, translation_record
from data_prep.synthetic.spoken_words import silences
from demos.speech_report import main
from shards.writer import write_shards


@pytest.fixture
def sets(tmp_path):
    for name, count in (("aligner", 3), ("librivox", 2), ("sentences", 1)):
        sounds = (np.random.default_rng(number).normal(0, 900, 4000).astype(np.int16) for number in range(count))
        records = [transcription_record(f"{name}/{n}", "test", "en", f"word {n}", s) for n, s in enumerate(sounds)]
        write_shards(records, tmp_path / "speech" / name)
    words = ("uno", "due", "tre")
    sounds = (np.random.default_rng(number).normal(0, 900, 4000).astype(np.int16) for number in range(3))
    records = [translation_record(word, "test", "it", word, s, "one") for word, s in zip(words, sounds, strict=True)]
    write_shards(records, tmp_path / "speech" / "asterisk_translations")
    write_shards(silences(60), tmp_path / "speech" / "silences")
    return tmp_path / "speech"


def test_every_set_has_error_rates_and_a_baseline(everything_run, sets, tmp_path, capsys):
    run = shutil.copytree(everything_run, tmp_path / "run")
    main(["--model", str(run), "--data", str(sets), "--sets", "aligner,librivox"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert [row[:2] for row in rows] == [["aligner", "3"], ["librivox", "2"]]
    for name in ("aligner", "aligner-replaced"):
        scores = json.loads((run / "evaluation" / name / "scores.json").read_text())
        assert scores["replaced_speech"] == name.endswith("replaced") and scores["real_time_factor"] > 0
    wer = json.loads((run / "evaluation" / "aligner" / "scores.json").read_text())["scores"]["wer"]
    assert rows[0][2].startswith(f"wer {100 * wer['value']:.1f} ± {100 * wer['interval']:.1f}, cer ")


def test_translations_are_scored_by_bleu_and_chrf(everything_run, sets, tmp_path, capsys):
    run = shutil.copytree(everything_run, tmp_path / "run")
    main(["--model", str(run), "--data", str(sets), "--sets", "asterisk_translations"])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "±" in line)
    chrf = json.loads((run / "evaluation" / "asterisk_translations" / "scores.json").read_text())["scores"]["chrf"]
    assert row.startswith("| asterisk_translations | 3 | bleu ")
    assert f"chrf {chrf['value']:.1f} ± {chrf['interval']:.1f} | bleu " in row


def test_silences_are_scored_by_the_share_of_empty_transcripts(everything_run, sets, tmp_path, capsys):
    run = shutil.copytree(everything_run, tmp_path / "run")
    main(["--model", str(run), "--data", str(sets), "--sets", "silences", "--limit", "3"])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "±" in line)
    assert row.startswith("| silences | 3 | exact_match ")
    rows = [json.loads(line) for line in (run / "evaluation" / "silences" / "predictions.jsonl").open()]
    assert len(rows) == 3 and all(row["reference"] == "" for row in rows)
    share = 100 * sum(not row["prediction"] for row in rows) / 3
    assert row.startswith(f"| silences | 3 | exact_match {share:.1f} ")
    assert not (run / "evaluation" / "silences-replaced").exists()


def test_small_and_missing_sets_are_refused(everything_run, sets, capsys):
    for name, message in (
        ("sentences", "holds 1 held-out recordings"),
        ("asterisk_en", "asterisk_en"),
    ):
        with pytest.raises(SystemExit, match="1"):
            main(["--quiet", "--model", str(everything_run), "--data", str(sets), "--sets", name])
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    with pytest.raises(SystemExit, match="1"):
        main(["--model", str(everything_run), "--data", str(sets), "--sets", "librivox", "--limit", "1"])
    assert "limit is 1" in capsys.readouterr().err
