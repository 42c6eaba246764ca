"""Replays a captured fit: step by step, backwards, and under other weights of its examples."""
