"""Questions to a fit, and what came of each: right, refused, noted, or a fault."""

import contextlib
import inspect
import random
import re
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from fits import QUIET

from generated.data import COLLATES
from generated.fitting import Fit, tensors_of
from generated.truth import BY_INDEX, CARRIES, Truth, needs_datamodule
from lightning_influence import (
    Attributor,
    ExactHessian,
    GradientDot,
    HyDRA,
    InfluenceFunction,
    TracIn,
    TracInCP,
    Trajectory,
)
from lightning_influence.replay.replay import DriftError
from lightning_influence.types import MissingEvidence

METHODS = ("dot", "tracin", "self", "files", "influence", "steps", "hydra")
WHERE = ("callback", "trainer", "loader", "dataset", "new trainer", "datamodule")
SIZES = (1, 3, 7, None)
TOLERANCE = 1e-9
DAMPING = 0.5
WAY_OUT = re.compile(
    r"\b(Pass|Use|Fit|Return|Call|Give|Set|Check|Write|Load|Let|Do not|Make|Take|Score|Try|Build|Allow)\b", re.I
)
TELLS = re.compile(
    r"differ|collate|hook|datamodule|DataModule|random|transfer|batch_idx|index|not compared|was not recorded|"
    r"depends neither in eval nor in training mode",
    re.I,
)


class Question(NamedTuple):
    method: str
    where: str
    size: int | None


class Verdict(NamedTuple):
    """What came of a question.

    ``kind``: right, refused, noted, undefined (nothing says what would be right), or a fault: "silently wrong", "false
    refusal", "unhelpful", "changed".
    """

    kind: str
    text: str = ""

    @property
    def fault(self):
        return self.kind not in ("right", "refused", "noted", "undefined")


class Asked:
    """A fit, its truth and the questions about it."""

    def __init__(self, config, folder):
        self.config = config
        self.fit = Fit(config, folder)
        self.truth = None if config.loader == "random in dataset" else Truth(self.fit)

    def verdict(self, question):
        """What comes of one question."""
        module = self.fit.module if question.where in ("callback", "trainer") else self.fit.fresh(self.config.seed + 77)
        before = fingerprint(module)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values, notes = self.ask(question, module)
        except (ValueError, TypeError, MissingEvidence, DriftError) as error:
            found = self.refused(question, error)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = Verdict("unhelpful", f"{type(error).__name__} ({where.filename}:{where.lineno}): {error}")
        else:
            found = self.compared(question, values, notes)
        changed = [name for name, value in fingerprint(module).items() if not same(value, before.get(name))]
        return found if not changed or found.fault else Verdict("changed", f"{changed[:4]} after {found.kind}")

    def ask(self, question, module):
        attributor = self.attributor(question, module)
        method = {
            "dot": GradientDot(),
            "influence": InfluenceFunction(ExactHessian(damping=DAMPING)),
            "steps": TracIn(),
            "hydra": HyDRA(checks=0),
        }.get(question.method, TracInCP())
        if question.method == "self":
            scores = attributor.self_influence(method)
        else:
            scores = attributor.score(method, self.fit.queries)
        return scores.values, scores.notes

    def attributor(self, question, module):
        if question.where == "callback" and question.method != "files":
            return self.fit.influence.attributor
        trajectory = Trajectory.load(self.fit.influence.run_dir)
        if question.method == "files":
            trajectory = Trajectory.from_checkpoints(
                sorted(self.fit.files.glob("*.ckpt")),
                learning_rates=[step_rates(self.fit, k) for k in range(len(self.fit.watch.states))],
            )
        options = {"trajectory": trajectory, "batch_size": question.size, "loss": self.fit.loss.each}
        train = self.fit.dataset if question.where == "dataset" else self.fit.loader
        if question.where in ("callback", "trainer"):
            options["trainer"] = self.fit.trainer
        elif question.where == "new trainer":
            options["trainer"] = pl.Trainer(**QUIET)
        elif question.where == "datamodule" and "datamodule" in inspect.signature(Attributor).parameters:
            options["datamodule"] = self.fit.datamodule
        return Attributor(module, train=train, **options)

    # ---- judgement ------------------------------------------------------------------------------------------------

    def lacks(self, question):
        """Whether the question lacks a piece of the fit that no capture can store: collate or the DataModule's hook."""
        if question.where == "dataset" and (self.config.loader in COLLATES):
            return True
        return question.where in ("loader", "dataset", "new trainer") and needs_datamodule(self.config)

    def ordinary(self, question):
        """Whether a refusal would be false."""
        return (
            self.fit.ordinary
            and self.fit.loss.ordinary
            and self.truth_now().cause is None
            and self.config.loader != "batch_size=None"
            and self.config.mask not in ("some ignored", "one odd row", "odd tail", "ignored row")
            and not self.lacks(question)
            and question.method in ("dot", "tracin", "self")
            and not (question.where == "datamodule" and needs_datamodule(self.config))
        )

    def undefined(self, question, truth):
        """Files say nothing of data; expected draws say nothing of labels; an unmixed dataset is the user's choice."""
        if question.method == "files":
            return self.lacks(question) or (truth.cause is None and truth.share is not truth.mean)
        return question.where == "dataset" and self.config.loader == "mixing collate"

    def truth_now(self):
        return self.truth or Truth(self.fit)  # a random dataset gave its examples when the question was asked

    def refused(self, question, error):
        text = f"{type(error).__name__}: {error}"
        if ("Expected" not in text and not isinstance(error, MissingEvidence)) or not WAY_OUT.search(str(error)):
            return Verdict("unhelpful", text)
        return Verdict("false refusal", text) if self.ordinary(question) else Verdict("refused", text)

    def compared(self, question, values, notes):
        truth = self.truth_now()
        if self.undefined(question, truth):
            return Verdict("undefined")
        tells = [note for note in notes if TELLS.search(note)]
        note_allowed = self.lacks(question) or truth.cause is not None or self.config.module in BY_INDEX
        if truth.cause is not None:
            return Verdict("noted") if tells else Verdict("silently wrong", f"{truth.cause}, and scores came out")
        if question.method == "hydra" and self.config.module in CARRIES:
            strays = any("miss the weights of the fit" in note for note in notes)
            return Verdict("noted") if strays else Verdict("silently wrong", "the path through a buffer is missing")
        expected = self.expected(question, truth)
        size = expected.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        error = float(((values.double() - expected) / size).abs().nan_to_num(torch.inf).max())
        if error <= TOLERANCE:
            return Verdict("right")
        if tells and note_allowed:
            return Verdict("noted", f"{error:.2g}: {tells[0]}")
        return Verdict("silently wrong", f"off by {error:.2g} of a query's largest score; notes: {notes[:3]}")

    def expected(self, question, truth):
        if question.method == "dot":
            return truth.gradient_dot()
        if question.method == "files":
            return truth.tracin(draws=truth.uniform_draws(question.where != "dataset"))
        if question.method == "steps":
            return truth.tracin_steps()
        if question.method == "hydra":
            return truth.hydra()
        if question.method == "influence":
            return truth.influence(DAMPING)
        return truth.tracin(own=question.method == "self")


def step_rates(fit, k):
    """The learning rates of an epoch, one number, or one per group."""
    rates = next(step.rates for step in fit.watch.steps if step.epoch == k)
    return rates if len(rates) > 1 else rates[0]


def fingerprint(module):
    """Everything of the user's that a question could touch."""
    found = {f"tensor {name}": value for name, value in tensors_of(module).items()}
    found |= {f"mode {name}": part.training for name, part in module.named_modules()}
    found |= {f"keys {name}": sorted(part.__dict__) for name, part in module.named_modules()}
    found |= {f"grad {name}": (p.requires_grad, p.grad) for name, p in module.named_parameters()}
    found |= {f"memory {name}": p.data_ptr() for name, p in module.named_parameters()}
    found["random"] = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    found["trainer"] = id(module.__dict__.get("_trainer"))
    return found


def same(value, other):
    if isinstance(value, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(value, other)
    if isinstance(value, tuple) and isinstance(value[-1], torch.Tensor):
        return other is not None and value[0] == other[0] and value[-1] is other[-1]
    return value == other


@contextlib.contextmanager
def asked(config):
    with tempfile.TemporaryDirectory() as folder:
        yield Asked(config, Path(folder))
