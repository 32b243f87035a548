"""Layers that vision, video, speech and language share: linear, attention with its cache, rotary, feed-forward."""
