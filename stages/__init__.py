"""Training stages, one script each; every one runs as `python -m stages.NAME --config FILE` and as `mm train NAME`."""
