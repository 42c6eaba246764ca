"""Which configurations and questions are drawn: every pair of axis values, then at random."""

import itertools
import random

from generated.data import HOOKS, LOADERS, MASKS
from generated.fitting import Config
from generated.judging import METHODS, SIZES, WHERE, Question
from generated.losses import LOSSES
from generated.modules import MODULES, NOT_DRAWN

AXES = {
    "module": tuple(name for name in MODULES if name not in NOT_DRAWN),
    "loss": tuple(LOSSES),
    "mask": MASKS,
    "loader": tuple(LOADERS),
    "hooks": HOOKS,
}
QUESTIONS = {"method": METHODS, "where": WHERE, "size": SIZES}


def covering(axes, rng):
    """Rows in which every pair of values of two axes occurs: each covers most new pairs of 20 tries."""
    names = list(axes)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}
    rows = []
    while missing:
        (a, x), (b, y) = min(missing)
        best, best_new = None, -1
        for _ in range(20):
            row = {name: rng.choice(values) for name, values in axes.items()} | {a: x, b: y}
            new = sum(pair in missing for pair in pairs(row, names))
            if new > best_new:
                best, best_new = row, new
        missing -= set(pairs(best, names))
        rows.append(best)
    return rows


def pairs(row, names):
    return [((a, row[a]), (b, row[b])) for a, b in itertools.combinations(names, 2)]


def configurations(seed=0, more=0):
    """The covering rows, then random ones."""
    rng = random.Random(seed)
    rows = covering(AXES, rng)
    rows += [{name: rng.choice(values) for name, values in AXES.items()} for _ in range(more)]
    return [Config(**row, seed=1000 * seed + k) for k, row in enumerate(rows)]


def questions(config, count):
    """Distinct questions about one fit; the costly curvature only for small ones."""
    rng = random.Random(f"{config}")
    found = []
    while len(found) < count:
        one = Question(*(rng.choice(values) for values in QUESTIONS.values()))
        if one not in found and sensible(config, one):
            found.append(one)
    return found


def sensible(config, question):
    if question.where == "datamodule" and not config.hooks.endswith("datamodule"):
        return False
    if question.where not in ("callback", "trainer") and config.loader in ("a worker", "random in dataset"):
        return False
    if question.where == "callback" and question.size is not None:
        return False
    if question.method == "influence":
        return config.module in ("linear", "reads max_epochs") and config.loss in (
            "ce",
            "label smoothing",
            "bce",
            "mse",
        )
    if question.method == "files":
        return (
            config.module != "two groups"
            and config.loss
            not in (
                "ce sum",
                "token mean",
                "masked mean",
                "selected mean",
                "class weights",
            )
            and config.module not in BY_EPOCH
        )
    if question.method in ("steps", "hydra"):
        return config.module not in (*BY_EPOCH, "cnn", "no gradient in eval", "second head in training")
    return True


BY_EPOCH = ("reads current_epoch", "reads global_step", "reads optimizers", "parity of the index", "every third batch")
