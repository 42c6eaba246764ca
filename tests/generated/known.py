"""Faults that are known and not mended yet, by axis values; a test fails as soon as one no longer occurs."""

from generated.data import COLLATES
from generated.losses import LOSSES
from generated.truth import BY_INDEX, needs_datamodule

IN_PROCESS = ("callback", "trainer")
PARTLY_IGNORED = ("some ignored", "one odd row", "odd tail", "ignored row")
OF_THE_FIT = (
    "reads estimated_stepping_batches",
    "reads num_training_batches",
    "reads max_epochs",
    "reads accumulate_grad_batches",
    "reads datamodule",
    "reads optimizers",
)


def absent(config, question):
    bare = question.where == "dataset" and config.loader in COLLATES
    return bare or (question.where not in IN_PROCESS and needs_datamodule(config))


KNOWN = {
    "collate or DataModule absent": absent,
    "Trainer attributes absent": lambda c, q: c.module in OF_THE_FIT,
    "the batch's index": lambda c, q: c.module in BY_INDEX,
    "rows without labels": lambda c, q: LOSSES[c.loss].ignores and c.mask in PARTLY_IGNORED,
    "a batch of one is squeezed": lambda c, q: c.module == "squeezes",
    "weights written in the step": lambda c, q: c.module in ("mean teacher", "centre"),
    "a weighted sampler and files": lambda c, q: q.method == "files" and c.loader == "weighted",
    "not reached in eval mode": lambda c, q: c.module in ("no gradient in eval", "second head in training"),
}


def known(config, question):
    """The name of the known fault that may occur here, or None."""
    return next((name for name, occurs in KNOWN.items() if occurs(config, question)), None)
