"""The curation steps, one file each. What a step is: `step.py`.

To add a step: write one file with a subclass of `Step`, add a field for its settings to
`pipeline.curation.CurationConfig`, and add one line to `pipeline.curation.steps_of`, in the order of the decisions.
Most steps have three methods: `measure` (the columns that the step adds), `rules` (which pairs fail, by the stored
columns) and `measure_settings` (the settings that the columns depend on).

What only one step needs is beside it: `deduplication/` (vectors of pictures, search, components) and `ngrams.py`.
`clips.py` decodes clips for all steps that measure them, `ocr.py` reads text for two steps.
"""
