"""Reads a dataset in blocks of examples."""
