"""Video: frames sampled from clips, and the temporal aggregator that merges encoded frames."""
