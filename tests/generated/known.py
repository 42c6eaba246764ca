"""Faults that are known and not mended yet, by axis values; a test fails as soon as one no longer occurs."""

from generated.data import COLLATES
from generated.truth import BY_INDEX, needs_datamodule

IN_PROCESS = ("callback", "trainer")


def absent(config, question):
    bare = question.where == "dataset" and config.loader in COLLATES
    return bare or (question.where not in IN_PROCESS and needs_datamodule(config))


KNOWN = {
    "collate or DataModule absent": absent,
    "the batch's index": lambda c, q: c.module in BY_INDEX,
    "a weighted sampler and files": lambda c, q: q.method == "files" and c.loader == "weighted",
}


def known(config, question):
    """The name of the known fault that may occur here, or None."""
    return next((name for name, occurs in KNOWN.items() if occurs(config, question)), None)
