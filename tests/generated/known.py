"""Faults that are known and not mended yet, by axis values; a test fails as soon as one no longer occurs."""

KNOWN = {}
"""Name to (configuration, question) -> bool; empty where all is mended."""


def known(config, question):
    """The name of the known fault that may occur here, or None."""
    return next((name for name, occurs in KNOWN.items() if occurs(config, question)), None)
