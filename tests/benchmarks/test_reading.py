"""The benchmark of reading runs on tiny inputs, and its contestants read the same amount."""

import json
import sys

from benchmarks import reading


def test_the_benchmark_runs_and_all_contestants_read_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reading", "--quick", "--repetitions", "1", "--output", str(tmp_path)])
    reading.main()
    rows = json.loads((tmp_path / "reading.json").read_text())["rows"]
    names = [row["case"] for row in rows]
    assert len(set(names)) == len(names) == 5 + 4 + 4 + 3 + 2
    shown = capsys.readouterr().out
    for row in rows:
        counts = list(row["counts"].values())
        # FFmpeg decodes whole frames, some of which it leaves out at the ends of short files. Our examples end with the
        # last answer, before the template's line break.
        tolerance = {"samples": 0.05 * counts[0], "tokens": 1}.get(row["unit"], 0)
        assert counts[0] > 0 and all(abs(count - counts[0]) <= tolerance for count in counts), row
        assert all(spread["median"] > 0 for spread in row["seconds"].values()) and reading.line(row) in shown
