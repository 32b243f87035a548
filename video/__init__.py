"""Frames out of clips, and the module that merges them over time."""
