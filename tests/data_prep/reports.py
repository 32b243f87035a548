"""The report of a finished run, written and read."""

from pathlib import Path

from data_prep.report.report import write_report


def report_of(work: Path) -> str:
    """The HTML that `write_report` writes about the run's last decision."""
    write_report(work)
    return (work / "report.html").read_text()
