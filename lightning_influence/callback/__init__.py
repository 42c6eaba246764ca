"""`Influence`, the one callback."""
