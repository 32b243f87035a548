"""Evaluation: answers to the questions of a set, their scores, and baselines that lack part of the input."""
