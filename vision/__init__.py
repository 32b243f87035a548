"""Pictures: read safely, cut into tiles, encoded into features."""
