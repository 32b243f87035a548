"""Layers that several rooms share: rotary positions, attention with its cache, feed-forward."""
