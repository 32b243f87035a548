"""The curation steps, one file each. What a step is: `step.py`.

To add a step: write one file with a subclass of `Step`, and add one line to `pipeline.curation.steps_of`, where the
order of the lines is the order of the decisions, and one field to `CurationConfig`. Most steps have three methods:
`measure` (the columns that the step adds), `rules` (which pairs fail, by the stored columns) and `measure_settings` (the
settings that the columns depend on).

What only one step needs is beside it: `deduplication/` (vectors of pictures, search, components) and `ngrams.py`.
`clips.py` decodes clips for all steps that measure them, `ocr.py` reads text for two steps.
"""
