"""Training stages, one module each: `python -m stages.NAME --config FILE`, or `mm train NAME --config FILE`.

A new stage is one module here: a dataclass of settings, a function that reads as the recipe, and `main`.
"""
