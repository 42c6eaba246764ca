"""What the scores must be: one backward pass per example of the batches in the fit; nothing of the package."""

import copy
import functools

import torch
from oracles import rng_isolated
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from generated.data import COLLATES, KINDS, Rows, weights_of

BY_INDEX = ("parity of the index", "every third batch")
# Modules whose step carries the weights to later losses through a buffer, which no derivative of steps follows.
CARRIES = ("centre",)
CLOSE = 1e-9


class Truth:
    """Brute force for one fit.

    ``cause`` says why no scores can be right: examples mix, or the loss in eval mode does not reach what was trained.
    """

    def __init__(self, fit):
        self.fit, self.config, self.watch = fit, fit.config, fit.watch
        self.rows = fit.dataset.dataset if not isinstance(fit.dataset, Rows) else fit.dataset
        self.n = len(fit.dataset)
        bases = range(self.n) if fit.dataset is self.rows else fit.dataset.indices
        self.place = {base: i for i, base in enumerate(bases)}
        self.names = [n for n, p in fit.module.named_parameters() if p.requires_grad]
        self.twin = self._twin()
        self.mean = lambda one, batch, copies: 1 / len(batch)
        self.share = None
        self.cause = self._cause()

    # ---- losses and gradients -----------------------------------------------------------------------------------

    def _twin(self):
        module = self.fit.module
        trainer, module.__dict__["_trainer"] = module.__dict__["_trainer"], None
        kept = module.__dict__.pop("kept", None)
        try:
            twin = copy.deepcopy(module)
        finally:
            module.__dict__["_trainer"] = trainer
            if kept is not None:
                module.__dict__["kept"] = kept
        for name in ("log", "log_dict", "print"):
            twin.__dict__[name] = lambda *args, **kwargs: None
        return twin

    def put(self, state, facts=None):
        """The twin in eval mode at some weights, its Trainer a record of what the fit's was."""
        own = {**dict(self.twin.named_parameters()), **dict(self.twin.named_buffers())}
        tied = self.twin.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in state.items():
                if name in own or name in tied:
                    (own[name] if name in own else tied[name]).copy_(value)
                else:
                    self.twin.__dict__[name] = value.clone()
        self.twin.kept = []
        self.twin.__dict__["_trainer"] = facts
        self.twin.__dict__.update(getattr(facts, "numbers", {}))
        return self.twin.eval()

    def value(self, batch, state, facts, index, train=False):
        """The loss of a batch, with its graph."""
        twin = self.put(state, facts).train(train)
        if self.fit.loss.each is not None:
            return self.fit.loss.each(twin, batch)
        loss = twin.training_step(copy.deepcopy(batch), index)
        return loss["loss"] if isinstance(loss, dict) else loss

    def one(self, batch, k, index):
        """(loss, {name: gradient}, copies in the batch) of a batch of one in eval mode at checkpoint k."""
        return self.at(batch, self.watch.states[k], self.watch.clocks[k], index)

    def at(self, batch, state, facts, index, train=False):
        """The same at any weights and time, also in train mode."""
        copies = 1
        with rng_isolated(), torch.enable_grad():
            try:
                loss, found = self.derived(batch, state, facts, index, train)
            except (RuntimeError, ValueError, IndexError):
                two = {key: torch.cat([v, v]) for key, v in batch.items()}
                (loss, found), copies = self.derived(two, state, facts, index, train), 2
        gradients = {n: None if g is None else g.detach().clone() for n, g in zip(self.names, found, strict=True)}
        return float(loss), gradients, copies

    def derived(self, *about):
        loss = self.value(*about).sum()
        parameters = dict(self.twin.named_parameters())
        wanted = [parameters[n] for n in self.names]
        if not loss.requires_grad:
            return loss, [None] * len(wanted)
        return loss, torch.autograd.grad(loss, wanted, allow_unused=True)

    @functools.cache
    def example(self, i, k, index):
        return self.one(self.fit.entered(self.item(i)), k, index)

    @functools.cache
    def query(self, i, k, index=0):
        return self.one(self.fit.entered(self.fit.queries[i]), k, index)

    def item(self, i):
        if self.config.loader == "random in dataset":  # as the package read it
            return self.rows.given.get(i, None) or self.fit.dataset[i]
        return self.fit.dataset[i]

    def index_of(self, step):
        return step.index if self.config.module in BY_INDEX else 0

    def labels(self, y):
        known = ~y.isnan() if y.is_floating_point() else y != -100
        return int(known.sum())

    # ---- how a batch's loss follows from its examples' ------------------------------------------------------------

    def _cause(self):
        if self.config.module == "manual" and self.fit.loss.each is None:
            return "manual optimisation"
        if self.config.loader in COLLATES and self.config.loader.startswith("mixing"):
            return "the collate mixes examples"
        if not all(t.isfinite().all() for t in self.watch.states[-1].values()):
            return "the fit diverged"
        if self.fit.loss.each is None:
            self.share = next((share for share in self.shares() if self.explains(share)), None)
            if self.share is None:
                return "the loss mixes examples"
        else:
            self.share = self.mean
        if lost := self.unreached():
            return f"{lost[0]} is trained but not reached in eval mode"
        return None

    def shares(self):
        if self.fit.loss.share is not None:
            yield lambda one, batch, copies: self.fit.loss.share(one, batch)
        yield self.mean
        yield lambda one, batch, copies: 1 / copies
        yield lambda one, batch, copies: self.labels(one) / max(1, self.labels(batch))

    def explains(self, share):
        """Whether each batch's loss is the sum of its examples' losses times their shares, in eval mode."""
        for step in self.watch.steps:
            state, facts = self.watch.states[step.epoch], self.watch.clocks[step.epoch]
            with torch.no_grad(), rng_isolated():
                joint = float(self.value(step.batch, state, facts, step.index))
            total = 0.0
            for place, i in enumerate(self.place[base] for base in step.ids):
                one = {key: value[place : place + 1] for key, value in step.batch.items()}
                index = self.index_of(step)
                random_rows = self.config.loader == "random in dataset"
                loss, _, copies = (
                    self.one(one, step.epoch, index) if random_rows else self.example(i, step.epoch, index)
                )
                weight = share(one["y"], step.batch["y"], copies)
                total += weight * loss if weight else 0.0
            if joint != joint and total != total:
                return False
            if not abs(joint - total) <= CLOSE * max(1.0, abs(joint)):
                return False
        return True

    def unreached(self):
        last, start = self.watch.states[-1], self.watch.start
        moved = [n for n in self.names if not torch.equal(last[n], start[n])]
        found = [self.example(i, 1, 0)[1] for i in range(min(6, self.n))]
        return [n for n in moved if all(gradients[n] is None for gradients in found)]

    # ---- scores ---------------------------------------------------------------------------------------------------

    def coefficients(self, k, group, index=None):
        """[train]: learning rate × share over the visits of epoch k; only those with one index, where given."""
        total = torch.zeros(self.n, dtype=torch.float64)
        for step in self.watch.steps:
            if step.epoch == k and index in (None, step.index):
                for place, i in enumerate(self.place[base] for base in step.ids):
                    own = step.batch["y"][place : place + 1]
                    copies = self.example(i, k, self.index_of(step))[2]
                    total[i] += step.rates[group] * self.share(own, step.batch["y"], copies)
        return total

    def expected_coefficients(self, k, group, draws):
        """[train]: the same where only rates and the loader are known."""
        steps = [step for step in self.watch.steps if step.epoch == k]
        return sum(step.rates[group] for step in steps) * draws

    def flat(self, found, group):
        """[entries]: a gradient's entries in one parameter group; zero where the example has no label."""
        loss, gradients, _ = found
        entries = []
        for name in self.names:
            if self.group_of(name) == group:
                like = self.watch.start[name]
                value = gradients[name] if gradients[name] is not None else torch.zeros_like(like)
                entries.append(value.flatten() if loss == loss else torch.zeros_like(like).flatten())
        return torch.cat(entries) if entries else torch.zeros(0, dtype=torch.float64)

    def group_of(self, name):
        return int(self.config.module == "two groups" and name.endswith("bias"))

    @property
    def groups(self):
        return range(2 if self.config.module == "two groups" else 1)

    def train_rows(self, k, group, index=0):
        return torch.stack([self.flat(self.example(i, k, index), group) for i in range(self.n)])

    def query_rows(self, k, group):
        return torch.stack([self.flat(self.query(i, k), group) for i in range(len(self.fit.queries))])

    def gradient_dot(self):
        return sum(self.query_rows(1, g) @ self.train_rows(1, g).T for g in self.groups)

    def tracin(self, own=False, draws=None):
        """[query, train], or with themselves [train]; ``draws``: expected draws per step, where no order is known."""
        total = 0.0
        indices = sorted({self.index_of(step) for step in self.watch.steps})
        for k in range(len(self.watch.states)):
            for g in self.groups:
                for index in indices:
                    right = self.train_rows(k, g, index)
                    product = right.square().sum(1) if own else self.query_rows(k, g) @ right.T
                    only = index if self.config.module in BY_INDEX else None
                    c = self.coefficients(k, g, only) if draws is None else self.expected_coefficients(k, g, draws)
                    total = total + product * c
        return total

    def tracin_steps(self, own=False):
        """TracIn at every step: training gradients in train mode as in the fit, the queries' in eval mode."""
        total = torch.zeros(*([] if own else [len(self.fit.queries)]), self.n, dtype=torch.float64)
        for step in self.watch.steps:
            for g in self.groups:
                if not own:
                    ones = [self.fit.entered(self.fit.queries[i]) for i in range(len(self.fit.queries))]
                    left = torch.stack([self.flat(self.at(one, step.state, step.facts, 0), g) for one in ones])
                for i, one, weight in self.visits(step):
                    index = self.index_of(step)
                    right = self.flat(self.at(one, step.state, step.facts, index, train=True), g)
                    if own:
                        still = self.flat(self.at(one, step.state, step.facts, index), g)
                        total[i] += step.rates[g] * weight * (still @ right)
                    else:
                        total[:, i] += step.rates[g] * weight * (left @ right)
        return total

    def visits(self, step):
        """(example, batch of it alone, share) of a step."""
        for place, i in enumerate(self.place[base] for base in step.ids):
            one = {key: value[place : place + 1] for key, value in step.batch.items()}
            copies = self.example(i, step.epoch, self.index_of(step))[2]
            share = self.share(one["y"], step.batch["y"], copies)
            yield i, one if copies == 1 else {key: torch.cat([v, v]) for key, v in one.items()}, share

    def hydra(self):
        """[query, train]: minus the derivatives of the queries' final losses by weights of examples, unrolled."""
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            return self._hydra()

    def _hydra(self):
        w = torch.ones(self.n, dtype=torch.float64, requires_grad=True)
        start = self.watch.start
        params = {n: start[n].clone().requires_grad_(True) for n in self.names}
        for step in self.watch.steps:
            total = 0.0
            for i, one, share in self.visits(step):
                if share:
                    total = total + w[i] * share * self.called(params, one, step, train=True)
            if not torch.is_tensor(total):
                continue
            found = torch.autograd.grad(total, list(params.values()), create_graph=True, allow_unused=True)
            params = {
                name: p if g is None else p - step.rates[self.group_of(name)] * g
                for (name, p), g in zip(params.items(), found, strict=True)
            }
        end = type(self.watch.steps[0])({}, 0, 1, self.watch.states[-1], self.watch.clocks[-1])
        values = []
        for i in range(len(self.fit.queries)):
            one = self.fit.entered(self.fit.queries[i])
            copies = self.query(i, len(self.watch.states) - 1)[2]
            given = one if copies == 1 else {key: torch.cat([v, v]) for key, v in one.items()}
            values.append(self.called(params, given, end) * self.share(one["y"], one["y"], copies))
        return -torch.stack([torch.autograd.grad(v, w, retain_graph=True)[0] for v in values])

    def called(self, params, one, step, train=False):
        """A loss as a function of parameters outside of the module; everything else is as it was at the step."""
        self.put(step.state, step.facts).train(train)
        stepper, index = Stepper(self), self.index_of(step)
        named = {f"module.{name}": p for name, p in params.items()}
        return functional_call(stepper, named, (copy.deepcopy(one), index), tie_weights=True).sum()

    def influence(self, damping):
        """[query, train]: Hessian of the mean loss, dense."""
        parameters = dict(self.twin.named_parameters())
        wanted = [parameters[n] for n in self.names]
        hessian = 0.0
        for i in range(self.n):
            loss = self.value(self.fit.entered(self.item(i)), self.watch.states[1], self.watch.clocks[1], 0).sum()
            first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
            entries = torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(first, wanted, strict=True)]
            )
            lines = []
            for entry in entries:
                if not entry.requires_grad:
                    lines.append(torch.zeros_like(entries))
                    continue
                second = torch.autograd.grad(entry, wanted, retain_graph=True, allow_unused=True)
                lines.append(
                    torch.cat(
                        [
                            (torch.zeros_like(p) if s is None else s).flatten()
                            for s, p in zip(second, wanted, strict=True)
                        ]
                    )
                )
            hessian = hessian + torch.stack(lines).detach() / self.n
        damped = hessian + damping * torch.eye(len(hessian), dtype=torch.float64)
        return self.query_rows(1, 0) @ torch.linalg.solve(damped, self.train_rows(1, 0).T) / self.n

    def uniform_draws(self, knows_loader):
        if self.config.loader == "weighted" and knows_loader:
            return (weights_of(self.n) / weights_of(self.n).sum()).double()
        return torch.full((self.n,), 1 / self.n, dtype=torch.float64)


def needs_datamodule(config):
    """Whether a hook lives where only a DataModule has it."""
    return config.hooks.endswith("in datamodule") and config.hooks.split(" in ")[0] in KINDS


class Stepper(nn.Module):
    """``training_step`` (or ``loss=``) as a forward method."""

    def __init__(self, truth):
        super().__init__()
        self.module, self.each = truth.twin, truth.fit.loss.each

    def forward(self, batch, index):
        if self.each is not None:
            return self.each(self.module, batch)
        loss = self.module.training_step(batch, index)
        return loss["loss"] if isinstance(loss, dict) else loss
