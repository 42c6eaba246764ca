"""Medians of alternating runs, and what they are compared with."""

import statistics
import time

import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader

from subjects import BATCH  # isort: skip


def medians(works, repeats, warm=True):
    """Seconds of each work: all of them once as a warm-up, then in turn, as often as asked."""
    seconds = {name: [] for name in works}
    for turn in range(-1 if warm else 0, repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(work):
    """Seconds of one run, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


class Plain:
    """Ordinary forward and backward passes over DataLoaders at every checkpoint; loading those is not counted.

    With `held`, the batches are made before the clock starts.
    """

    def __init__(self, subject, datasets, held=False):
        self.subject = subject
        loaders = [DataLoader(data, BATCH) for data in datasets]
        self.sides = [list(loader) for loader in loaders] if held else loaders

    def seconds(self):
        total = 0.0
        for checkpoint in self.subject.checkpoints:
            module = self.subject.at(checkpoint).eval()
            start = time.perf_counter()
            for batches in self.sides:
                for batch in batches:
                    module.zero_grad()
                    module.training_step(batch, 0).backward()
            total += time.perf_counter() - start
        module.zero_grad()
        return total


def loading(subject):
    """Seconds of reading all checkpoints."""
    return timed(lambda: [subject.at(checkpoint) for checkpoint in subject.checkpoints])[0]


def with_captum(subject):
    """TracInCP of captum, with its faster setting."""
    from captum.influence import TracInCP

    def load(module, checkpoint):
        module.load_state_dict(checkpoint.load().parameters)
        return 0.05

    tracin = TracInCP(
        subject.module.eval(),
        subject.train,
        list(subject.checkpoints),
        load,
        loss_fn=torch.nn.CrossEntropyLoss(reduction="sum"),
        batch_size=BATCH,
        sample_wise_grads_per_batch=True,
    )
    return tracin.influence(tuple(subject.queries.tensors))


def with_vmap(subject, block=64):
    """The same by `vmap(grad)`: every example's gradient as a row, then one matrix product."""
    module = subject.module.eval()
    total = torch.zeros(len(subject.queries), len(subject.train))

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(module, parameters, (x[None],)), y[None])

    def rows(parameters, x, y):
        gradients = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
        return torch.cat([g.flatten(1) for g in gradients.values()], 1)

    for checkpoint in subject.checkpoints:
        subject.at(checkpoint)
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        asked = torch.cat([rows(parameters, x, y) for x, y in DataLoader(subject.queries, block)])
        for start, (x, y) in zip(range(0, len(subject.train), block), DataLoader(subject.train, block), strict=True):
            total[:, start : start + len(y)] += 0.05 * asked @ rows(parameters, x, y).T
    return total


def difference(ours, theirs):
    """Largest difference in units of the largest score of the query."""
    return float(((ours - theirs).abs().amax(1) / theirs.abs().amax(1)).max())
