"""What recording costs a fit: fits with and without `Influence()` by turns, in CPU time and by the clock.

A callback marks the time at each step, so that what is paid once (start, first step, end), once a checkpoint (every
epoch) and at each step is seen apart. Every figure is a difference of medians over fits. Long steps differ by more from
one fit to the next than by what recording adds, which a clock inside the hooks and the watched loader shows too.

python tests/benchmarks/capture.py
python tests/benchmarks/capture.py --only mlp --repeats 9
"""

import argparse
import functools
import statistics
import tempfile
import time

import pytorch_lightning as pl
import torch
from subjects import QUIET, Classifier, Encoder, cnn, images, mlp, texts
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_influence import Influence
from lightning_influence.capture.loaders import Deliveries

CEILING_MS = 0.3
CEILING = 0.03  # where a step takes 10 ms or more
STEPS = 1_000
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
PARTS = ("start", "first step", "step", "checkpoint", "end")


def subjects():
    """Module, batch size, steps per epoch, and data by their number."""
    adam = {"make": torch.optim.AdamW, "lr": 1e-3}
    return {
        "mlp": (lambda: Classifier(mlp(128)), 20, 300, lambda n: images(None, n, 1)[0]),
        "wide": (lambda: Classifier(mlp(1536)), 128, 200, lambda n: images(None, n, 1)[0]),
        "cnn": (lambda: Classifier(cnn()), 32, 200, lambda n: images(None, n, 1)[0]),
        "transformer": (
            lambda: Classifier(Encoder(10_000, 128, layers=4), **adam),
            32,
            200,
            lambda n: texts(None, n, 1)[0],
        ),
    }


class Marks(pl.Callback):
    """The time at the start of each step."""

    def __init__(self):
        self.at = []

    def on_train_batch_start(self, *_):
        self.at.append([clock() for clock in CLOCKS.values()])


STEP_HOOKS = [
    *((Influence, f"on_train_batch_{when}", 1) for when in ("start", "end")),
    *((Influence, f"on_before_{what}", 1) for what in ("zero_grad", "backward", "optimizer_step")),
    *((Deliveries, "__next__", 1), (_BaseDataLoaderIter, "__next__", -1)),
]


class Inside:
    """CPU seconds inside the hooks of each step; the functions are put back at the end."""

    def __enter__(self):
        self.seconds = 0.0
        self._before = [(owner, name, vars(owner)[name]) for owner, name, _ in STEP_HOOKS]
        for owner, name, sign in STEP_HOOKS:
            setattr(owner, name, self._timed(vars(owner)[name], sign))
        return self

    def __exit__(self, *_):
        for owner, name, function in self._before:
            setattr(owner, name, function)

    def _timed(self, function, sign):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += sign * (time.thread_time() - start)

        return timed


def parts_of(marks, begin, end, steps):
    """Milliseconds of each part, by clock."""
    found = {}
    for i, name in enumerate(CLOCKS):
        at = [begin[i], *(mark[i] for mark in marks), end[i]]
        took = [(later - at[k]) * 1e3 for k, later in enumerate(at[1:])]
        start, inner, last = took[0], took[1:-1], took[-1]
        between = [t for k, t in enumerate(inner, 1) if k % steps == 0]  # with the end of an epoch
        within = [t for k, t in enumerate(inner, 1) if k % steps and k > 1]
        step = statistics.median(within)
        values = start, inner[0] - step, step, statistics.median(between) - step, last - step
        found[name] = dict(zip(PARTS, values, strict=True)) | {"all": (end[i] - begin[i]) * 1e3}
    return found


def fit(make, loader, epochs, steps, *callbacks):
    torch.manual_seed(0)
    module, marks = make(), Marks()
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[marks, *callbacks], **QUIET)
    begin = [clock() for clock in CLOCKS.values()]
    trainer.fit(module, loader)
    return parts_of(marks.at, begin, [clock() for clock in CLOCKS.values()], steps), module.state_dict()


def measure(name, epochs, repeats):
    """One model's figures."""
    make, batch, steps, data = subjects()[name]
    loader = DataLoader(data(batch * steps), batch, shuffle=True)
    without, with_it = [], []
    for turn in range(repeats + 1):
        bare, weights = fit(make, loader, epochs, steps)
        with tempfile.TemporaryDirectory() as folder:
            watched, other = fit(make, loader, epochs, steps, Influence(dirpath=folder))
        assert all(torch.equal(weights[key], other[key]) for key in weights), "the weights are not those without it"
        if turn:
            without.append(bare)
            with_it.append(watched)
    with tempfile.TemporaryDirectory() as folder, Inside() as inside:
        fit(make, loader, epochs, steps, Influence(dirpath=folder))
    size = sum(p.numel() for p in make().parameters())
    print(f"\n{name}: {size:,} parameters, batch {batch}, {steps} steps an epoch, {epochs} epochs, {repeats} fits")
    print(f"  inside the hooks of a step {inside.seconds / (epochs * steps) * 1e3:.3f} ms of CPU time")
    for clock in CLOCKS:
        figures = {}
        for part in (*PARTS, "all"):
            pair = [[each[clock][part] for each in fits] for fits in (without, with_it)]
            figures[part] = [statistics.median(x) for x in pair], [min(x) for x in pair]
        show(clock, figures, steps)


def show(clock, figures, steps):
    cost = {part: figures[part][0][1] - figures[part][0][0] for part in PARTS}
    least = figures["step"][1][1] - figures["step"][1][0]
    bare = figures["step"][0][0]
    once = cost["start"] + cost["first step"] + cost["end"]
    each = cost["step"] + (once + cost["checkpoint"] * STEPS / steps) / STEPS
    limit = f"at most {CEILING:.0%}" if bare >= 10 else f"at most {CEILING_MS} ms"
    print(f"  {clock:5} a step {bare:.2f} ms and {cost['step']:.3f} more (of the fastest fits {least:.3f});", end=" ")
    print(f"a checkpoint {cost['checkpoint']:.1f} ms")
    print(f"        start {cost['start']:.1f}, first step {cost['first step']:.1f}, end {cost['end']:.1f} ms;", end=" ")
    print(f"over {STEPS:,} steps {each:.3f} ms a step, {each / bare:.1%} ({limit})", end="; ")
    before, after = figures["all"][0]
    print(f"whole fits {before / 1e3:.2f} and {after / 1e3:.2f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(subjects()))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("Expected `--epochs` to be at least 2.")
    for name in subjects():
        if arguments.only in (None, name):
            measure(name, arguments.epochs, arguments.repeats)


if __name__ == "__main__":
    main()
