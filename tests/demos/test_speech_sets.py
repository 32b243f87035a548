"""The table of speech sets: which assets each needs, licences, and that existing sets are kept. Sets are stand-ins."""

import inspect

import numpy as np
import pytest

import demos.image
import demos.speech_sets
from data_prep.sources.recordings import transcription_record
from shards.reader import ShardSet


@pytest.fixture
def fetched(tmp_path, monkeypatch) -> list[str]:
    """The names of the fetched assets; each set is replaced by one recording that says its assets' names."""
    names: list[str] = []

    def fetch(name: str):
        names.append(name)
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "LICENSE").write_text(f"licence of {name}")
        return tmp_path / name

    def to_samples(*folders_and_dropped):
        *folders, dropped = folders_and_dropped
        dropped.append(("a file", "broken"))
        text = "+".join(folder.name for folder in folders)
        yield transcription_record(text, "test", "en", text, np.zeros(1600, np.int16))

    sets = {name: (to_samples, *assets) for name, (_, *assets) in demos.speech_sets.SETS.items()}
    monkeypatch.setattr(demos.speech_sets, "SETS", sets)
    monkeypatch.setattr(demos.image, "fetch", fetch)
    return names


def test_each_set_is_written_once_with_its_licence(fetched, tmp_path, capfd):
    demos.speech_sets.main(["--output", str(tmp_path / "speech")])
    assert "1 samples, 1 left out" in capfd.readouterr().err
    of_sets = {name: assets for name, (_, *assets) in demos.speech_sets.SETS.items()}
    assert fetched == [asset for assets in of_sets.values() for asset in assets]
    assert of_sets["sentences"] == ["wordnet-base", "flite-voices"]
    for name, assets in of_sets.items():
        (record,) = ShardSet(tmp_path / "speech" / name)
        assert record.json["messages"][1]["content"][0]["text"] == "+".join(assets)
        licenses = {file.name: file.read_text() for file in (tmp_path / "speech" / name).glob("LICENSE*")}
        of_one = {"LICENSE": f"licence of {assets[0]}"} if assets else {}
        of_all = {f"LICENSE.{asset}": f"licence of {asset}" for asset in assets}
        assert licenses == (of_one if len(assets) < 2 else of_all)
    fetched.clear()
    demos.speech_sets.main(["--output", str(tmp_path / "speech")])
    assert not fetched


def test_each_set_takes_a_folder_per_asset():
    for to_samples, *assets in demos.speech_sets.SETS.values():
        inspect.signature(to_samples).bind(*assets, [])
    to_samples, *_ = demos.speech_sets.SETS["silences"]
    records = list(to_samples([]))
    assert len(records) == demos.speech_sets.NUM_SILENCES and {record.json["task"] for record in records} == {"silence"}


def test_a_wrong_option_ends_with_one_line(capsys):
    with pytest.raises(SystemExit, match="1"):
        demos.speech_sets.main(["--speed", "9"])
    assert capsys.readouterr().err.count("\n") == 1
