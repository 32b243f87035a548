"""Sets that are made: drawn, rendered, spoken, answered by a model, or mixed of other sets.

- `building` writes the records of a `Builder` to a folder of shards; `mm data build NAME` calls it. Builders, one per
  file: `charts`, `tables`, `flowcharts`, `equations` (drawn), `documents`, `screenshots` (rendered), `grounding`
  (numbered boxes or coordinates), `questions` (a table of questions), `recaptions`, `dialogues` (answered by a model
  that is passed in), `mix` (of other sets).
- Their parts: `browser` (Chromium), `plotting` (matplotlib and fonts), `topics` (names and ranges of values), `pages`
  (random web pages), `scenes` (objects on a background).
- `moving_clips` and `spoken_words` write sets of clips and of recordings for the demos and the speech stages;
  `cutouts` and `backgrounds` are what clips are made of.

To add a built set: write one file with a dataclass derived from `building.Builder` (`jobs`, `records`, and `files`
where sources have licences), or from `building.DrawnSet` (`draw`); add it to `BUILDERS` in app/commands/data_build.py;
add configs/data/NAME.yaml. All randomness must follow from the seed and the job, so that the bytes do not depend on the
number of workers.
"""
