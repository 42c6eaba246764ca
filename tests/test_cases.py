"""Every case through the real ``Attributor``: right against brute force, or refused with cause and way out.

``python tests/test_cases.py > tests/CASES.md`` runs them all and writes the table.
"""

import contextlib
import copy
import fnmatch
import functools
import logging
import random
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import pytest
import pytorch_lightning as pl
import torch
from cases import CASES
from fits import QUIET
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, default_collate

from lightning_influence import Attributor, GradientDot, Influence, MissingEvidence, TracInCP, Trajectory

BATCH = 3
torch.set_num_threads(1)
# Of torch, about [batch, 1] against [batch], and a batch of one that loses that dimension.
pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")
RIGHT = [name for name, case in CASES.items() if case.expected == "right"]
REFUSED = [name for name, case in CASES.items() if case.expected == "refused"]
WITH_WAY_OUT = [name for name in REFUSED if CASES[name].way_out is not None]


class Asked:
    """A case made ready: module, data, the Trainer where there is one, and what brute force says."""

    def __init__(self, case, folder):
        self.case = case
        self.train, self.queries = case.train(), case.queries()
        self.collate = case.collate or default_collate
        torch.manual_seed(0)
        self.module = case.make()
        if case.dtype is torch.float64:
            self.module = self.module.double()
        self.trainer = made(**case.trainer) if case.trainer is not None else None
        self.loader = (case.loader or in_order(case.collate))(self.train)
        self.trajectory = self.fitted(folder) if case.fit or case.offline or case.later else None
        self.files = case.files(self.module, folder) if case.files else None
        if self.files is not None:
            self.trajectory = self.files.read()
        torch.manual_seed(99)
        self.asked = case.make().to(case.dtype) if case.offline else self.module
        if case.later is not None:
            self.module = self.asked = (case.make_later or case.make)().to(case.dtype)
            assert self.attributor  # a DataModule that splits at random does so here, before anything is compared

    @functools.cached_property
    def attributor(self):
        if self.case.later is not None:
            return Attributor(self.asked, trajectory=self.trajectory, **self.case.later())
        return Attributor(
            self.asked,
            self.loader,
            self.trajectory,
            self.trainer,
            BATCH,
            loss=self.case.loss,
            parameters=self.case.parameters,
            weights=self.files.weights if self.files else "last",
        )

    def fitted(self, folder):
        """Two epochs in the dataset's order, so that every coefficient is known without any record."""
        capture = Influence(dirpath=folder)
        trainer = made(**{"max_epochs": 2, "callbacks": [capture], **(self.case.trainer or {})})
        trainer.fit(self.module, self.loader if self.case.fit_with is None else self.case.fit_with())
        return Trajectory.load(folder)

    # ---- brute force ----------------------------------------------------------------------------------------------

    @property
    def inner_module(self):
        return getattr(self.module, "_orig_mod", self.module)

    @property
    def names(self):
        patterns = self.case.parameters
        patterns = [patterns] if isinstance(patterns, str) else patterns
        named = [oracles.clean(n) for n, p in self.module.named_parameters() if p.requires_grad]
        return [n for n in named if patterns is None or any(fnmatch.fnmatchcase(n, p) for p in patterns)]

    @property
    def groups(self):
        two = self.inner_module.two_groups and self.trajectory is not None
        return {name: int(name.endswith("bias")) if two else 0 for name in self.names}

    def windows(self):
        """(weights, coefficient [group, train]) of both epochs: learning rate / size of the example's batch."""
        if self.files is not None:
            return self.files.windows
        if self.trajectory is None:
            return [(None, torch.ones(1, len(self.train)))]
        states = [checkpoint.load() for checkpoint in self.trajectory.checkpoints][1:]
        n = len(self.train)
        sizes = torch.tensor([min(BATCH, n - i // BATCH * BATCH) for i in range(n)], dtype=torch.float64)
        share = torch.ones(n, dtype=torch.float64) if self.case.summed else 1 / sizes
        if self.case.count is not None:
            counts = torch.tensor([float(self.case.count(self.train[i])) for i in range(n)], dtype=torch.float64)
            share = torch.cat([part / part.sum() for part in counts.split(BATCH)])
        rates = torch.tensor([[0.05], [0.2]] if self.inner_module.two_groups else [[0.05]], dtype=torch.float64)
        return [
            ({**state.parameters, **state.buffers}, rates * 0.5**epoch * share) for epoch, state in enumerate(states)
        ]

    def at_their_time(self, windows, first=0):
        """Each window while the module's Trainer stands where the fit wrote its weights: a loss may follow the step."""
        trainer = self.inner_module._trainer
        if self.trajectory is None or trainer is None:
            yield from windows
            return
        loop = trainer.fit_loop
        epochs, steps = loop.epoch_progress.current, loop.epoch_loop.automatic_optimization.optim_progress
        counters = epochs, steps.optimizer.step.total
        before = [counter.completed for counter in counters]
        try:
            for epoch, window in enumerate(windows, start=first):
                counters[0].completed, counters[1].completed = epoch, (epoch + 1) * -(-len(self.train) // BATCH)
                yield window
        finally:
            for counter, completed in zip(counters, before, strict=True):
                counter.completed = completed

    def ones(self, dataset):
        """Every example as a batch of one; of a random dataset, as it was when the package read it."""
        given = getattr(dataset, "given", None)
        batches = [self.collate([dataset[i] if given is None else given[i]]) for i in range(len(dataset))]
        batches = [self.case.entering(batch) for batch in batches] if self.case.entering is not None else batches
        return [self.trainer.precision_plugin.convert_input(b) for b in batches] if self.trainer else batches

    def expected(self):
        train, queries, loss = self.ones(self.train), self.ones(self.queries), self.case.alone or self.case.loss
        about = self.inner_module, train, queries, self.names
        if self.case.double_truth:
            train, queries = tree_map_only(torch.Tensor, in_double, (train, queries))
            about = copy.deepcopy(self.inner_module).double(), train, queries, self.names
        final = self.files.final if self.files else None
        last = [(self.windows()[-1][0] if final is None else final, torch.ones(2, len(train)))]

        def windows():
            return self.at_their_time(self.windows())

        indices = [i // BATCH for i in range(len(train))] if self.case.by_index else None
        options = {"loss": loss, "groups": self.groups, "indices": indices}
        found = {} if self.trajectory is None else {"tracin": oracles.tracin(*about, windows(), **options)}
        if indices is None:
            found["gradient dot"] = oracles.tracin(*about, self.at_their_time(last, first=1), loss)
        return found | {
            "mean": oracles.tracin(*about, windows(), **options, mean=True),
            "self": oracles.tracin_self(about[0], train, self.names, windows(), **options),
        }

    # ---- the package ----------------------------------------------------------------------------------------------

    def actual(self):
        method = GradientDot() if self.trajectory is None else TracInCP()
        ask = self.attributor
        found = {} if self.trajectory is None else {"tracin": ask.score(method, self.queries).values}
        if self.case.by_index:
            with pytest.raises(ValueError, match=r"does not depend on `batch_idx` for `GradientDot`.*pass `loss=`"):
                ask.score(GradientDot(), self.queries)
        else:
            found["gradient dot"] = ask.score(GradientDot(), self.queries).values
        return found | {
            "mean": ask.score(method, self.queries, aggregate="mean").values,
            "self": ask.self_influence(method).values,
        }

    def check(self):
        with untouched(self.module, self.trainer):
            actual = self.actual()
        expected = self.expected()
        assert actual.keys() == expected.keys()
        for question, values in expected.items():
            if self.files is None or self.files.windows or question == "gradient dot":
                oracles.assert_scores(actual[question], values, self.case.allowed)


def in_double(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def in_order(collate):
    """Makes a loader of batches in the dataset's order."""
    return lambda data: DataLoader(data, BATCH, shuffle=False, collate_fn=collate)


def made(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(**{**QUIET, **options})


# ---- nothing is touched ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def untouched(module, trainer=None):
    """Asserts that the block leaves module, random states and loggers as they were."""
    before = snapshot(module, trainer)
    yield
    after = snapshot(module, trainer)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert_same(after[name], value, name)


def snapshot(module, trainer):
    parts = dict(module.named_modules())
    state = {f"state {name}": tensor.detach().clone() for name, tensor in module.state_dict(keep_vars=True).items()}
    state |= {f"buffer {name}": tensor.clone() for name, tensor in module.named_buffers()}
    state |= {f"tensor {name}": id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    state |= {f"memory {name}": p.data_ptr() for name, p in module.named_parameters()}
    state |= {f"requires_grad {name}": p.requires_grad for name, p in module.named_parameters()}
    state |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
    state |= {f"mode {name}": part.training for name, part in parts.items()}
    state |= {f"attributes {name}": sorted(part.__dict__) for name, part in parts.items()}
    for name, part in parts.items():
        for key, value in part.__dict__.items():
            if key.endswith("_hooks"):
                state[f"hooks {name}.{key}"] = list(value)
            elif isinstance(value, (int, float, str, list, dict, set, type(None), torch.Tensor)) and key[0] != "_":
                state[f"value {name}.{key}"] = frozen(value)
    state["trainer of module"] = id(getattr(module, "_trainer", None))
    state["torch random"], state["python random"] = torch.get_rng_state(), random.getstate()
    state["numpy random"] = [np.random.get_state()[1].tolist(), np.random.get_state()[2]]
    state["settings"] = (torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.get_default_dtype())
    if trainer is not None:
        state["loggers"], state["logged"] = list(trainer.loggers), frozen(dict(trainer.logged_metrics))
    return state


def frozen(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: frozen(v) for key, v in value.items()}
    return [frozen(v) for v in value] if isinstance(value, (list, tuple, set)) else value


def assert_same(actual, expected, name):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")
    elif isinstance(expected, (list, tuple)) and any(isinstance(e, (torch.Tensor, list, dict)) for e in expected):
        assert len(actual) == len(expected), name
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e, name)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_same(actual[key], value, f"{name} {key}")
    else:
        assert actual == expected, name


# ---- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RIGHT)
def test_scores_equal_brute_force(name, tmp_path):
    Asked(CASES[name], tmp_path).check()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_with_cause_and_way_out(name, tmp_path):
    if CASES[name].files is not None:  # refused where the files are read
        with pytest.raises((ValueError, TypeError, MissingEvidence)) as caught:
            Asked(CASES[name], tmp_path).attributor.score(GradientDot(), CASES[name].queries())
    else:
        asked = Asked(CASES[name], tmp_path)
        with untouched(asked.module), pytest.raises((ValueError, TypeError)) as caught:
            asked.attributor.score(GradientDot(), asked.queries)
    for fragment in CASES[name].says:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("name", WITH_WAY_OUT)
def test_the_way_out_of_a_refusal_is_right(name, tmp_path):
    case = CASES[name]
    Asked(replace(case, loss=case.way_out, expected="right"), tmp_path).check()


def test_random_transforms_give_the_same_scores_twice(tmp_path):
    asked = Asked(CASES["random transforms"], tmp_path)
    first = asked.attributor.score(GradientDot(), asked.queries).values
    torch.manual_seed(99)
    again = Attributor(asked.module, asked.loader, batch_size=5).score(GradientDot(), asked.queries).values
    torch.testing.assert_close(again, first)


def test_the_table_lists_every_case_with_its_outcome():
    written = (Path(__file__).parent / "CASES.md").read_text()
    again = "Run `python tests/test_cases.py > tests/CASES.md`."
    assert written == page(lambda case: case.expected), f"tests/CASES.md is not the table of the cases. {again}"


def outcome(case):
    """What happens when the case is run, in words."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            Asked(case, Path(folder)).check()
        except (ValueError, TypeError, MissingEvidence) as error:
            text = str(error)
            missing = [fragment for fragment in case.says if fragment not in text]
            return "refused" if case.expected == "refused" and not missing else f"unexpected: {text}"
        except (AssertionError, RuntimeError) as error:
            return f"wrong: {error}"
        return "right" if case.expected == "right" else "wrong: should have been refused"


HEAD = """# Cases

What a LightningModule, its loss and its data may do. `tests/test_cases.py` sends each case through the real
`Attributor` and compares the scores with one backward pass per example (1e-10 of a query's largest score in float64,
1e-5 in float32), or checks that it is refused with the cause and the way out.

{} cases: {} are right, {} are refused.

`tests/test_third_party.py` (slow) compares architectures and LightningModules of other projects, with random weights,
with brute force: BERT, GPT-2, Llama, T5 and ViT of Hugging Face, a ResNet-18 shape with BatchNorm, a U-Net, graph
networks on torch_geometric batches, and the LightningModules of chemprop, pytorch-forecasting and GluonTS. Most take
factored rules throughout, recurrent layers too. Packed sequences and graph batches are right and
slow: one example at a time, 12 to 26 plain passes on small models.

| case | outcome |
| --- | --- |
"""


def page(outcome_of):
    """Markdown: every case with its outcome."""
    outcomes = {name: outcome_of(case) for name, case in CASES.items()}
    counts = [list(outcomes.values()).count(outcome) for outcome in ("right", "refused")]
    ways_out = {name: " (right with `loss=`)" if case.way_out is not None else "" for name, case in CASES.items()}
    rows = [f"| {name} | {outcome}{ways_out[name]} |\n" for name, outcome in outcomes.items()]
    return HEAD.format(len(CASES), *counts) + "".join(rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # some modules print
        written = page(outcome)
    print(written, end="")
    print(f"{len(CASES)} cases in {time.perf_counter() - start:.0f} s", file=sys.stderr)
