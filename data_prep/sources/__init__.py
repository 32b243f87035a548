"""Known source sets -> shard records, and what all sources share.

- Sets, one per file: `easy_vqa`, `openmoji`, `tuxpaint` (pictures), `fluent_emoji` (clips), `recordings` (several sets
  of speech). Each has functions that take the set's folder and yield `shards.format.Record`s in a fixed order.
- `captions` finds the captions of a folder's pictures for curation (`CAPTIONS`: text files, SVG titles, and the
  formats of known sets); `conversations` turns questions and captions into chat records; `splits` assigns splits by a
  hash of what a sample shows; `files` converts pictures to PNG and finds licences.

To add a source: write one file with `to_samples(folder, dropped)`, which yields records, appends (name, reason) to
`dropped` for each sample that it leaves out, and raises `UserError` where the folder does not hold the set. Make ids by
`make_id("set/name")`. Call `split_of` with the name of what a sample shows, so that near copies are in one split. For
curation of a set with captions in a format of its own, add a function to `captions.CAPTIONS` instead.
"""
