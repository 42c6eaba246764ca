"""Atomic file writes, and tensors as Arrow files."""
