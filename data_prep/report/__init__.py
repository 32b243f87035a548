"""The HTML report of a run: `report.py` writes it; the other files make its parts."""
