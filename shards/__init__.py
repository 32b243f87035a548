"""Training shards: their format, their writer, which data preparation uses, and their reader, which training uses."""
