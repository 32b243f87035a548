"""The README's examples beside an installed wheel, which does not hold their pictures."""

import demos.readme_examples
from demos.readme_examples import check_examples


def test_without_the_pictures_one_line_says_so(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="demos")
    (tmp_path / "examples").mkdir()  # such as another package's folder of this name
    monkeypatch.setattr(demos.readme_examples, "FOLDER", tmp_path / "examples")
    assert check_examples(None, None) == []
    assert len(caplog.messages) == 1 and str(tmp_path / "examples") in caplog.text
