"""Data preparation: raw pairs to training shards (`pipeline`, `steps`, `report`), and sets that are built.

It imports nothing of `mm`: a step that needs a model takes a callable, which the caller passes in.

- `sources`: known source sets, read and written as shards.
- `steps`: the curation steps, one file each.
- `pipeline`: runs the steps over a pool; `pipeline/curation.py` shows the whole run.
- `report`: the HTML report of a run.
- `synthetic`: sets that are made, such as charts and spoken words.
"""
