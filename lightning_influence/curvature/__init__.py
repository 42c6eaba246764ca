"""One file an inverse."""
