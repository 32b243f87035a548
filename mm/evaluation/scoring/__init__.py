"""The scoring rules of published benchmarks: pure functions over an answer's text, one file for each family of rules.

What a docstring calls official is the reading of the set's own scoring code; everything else says that it is ours.
"""
