"""What following hypergradients costs a fit: seconds a step with and without, memory, and what lies on disk.

python tests/benchmarks/during.py --mnist mnist.npz            (SGD, every example, without the Hessian: lean)
python tests/benchmarks/during.py --adam --examples 20         (vectors, as many examples as are worth waiting for)
python tests/benchmarks/during.py --hessian --examples 20
"""

import resource
import statistics
import tempfile
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from subjects import QUIET, Classifier, arguments_of, images, mlp
from torch.utils.data import DataLoader

from lightning_influence import HyDRA, Influence

CEILING = 2.0


def fit(options, data, batch, *callbacks):
    """Seconds of the steps, without what comes before the first and after the last."""
    torch.manual_seed(0)
    clock = Clock()
    trainer = pl.Trainer(max_epochs=10, callbacks=[*callbacks, clock], **QUIET)
    trainer.fit(Classifier(mlp(), **options), DataLoader(data, batch, shuffle=True))
    return clock.seconds / clock.steps


class Clock(pl.Callback):
    """From the second step to the last."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = time.perf_counter()
        if trainer.global_step == 1:
            self.start, self.steps, self.seconds = now, 0, 0.0
        else:
            self.seconds, self.steps = now - self.start, self.steps + 1


def main():
    parser = arguments_of(__doc__)
    parser.add_argument("--train", type=int, default=5_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--examples", type=int, help="how many are tracked; all without it")
    parser.add_argument("--hessian", action="store_true")
    parser.add_argument("--adam", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    data, queries = images(arguments.mnist, arguments.train, 40)
    kind = {"make": torch.optim.Adam, "lr": 1e-3} if arguments.adam else {}
    some = None if arguments.examples is None else tuple(range(arguments.examples))
    method = HyDRA(mode="during_fit", hessian=arguments.hessian, examples=some)
    plain, captured, tracked, asked, disk = [], [], [], [], 0
    for _ in range(arguments.repeats):
        plain.append(fit(kind, data, arguments.batch))
        with tempfile.TemporaryDirectory() as folder:
            captured.append(fit(kind, data, arguments.batch, Influence(dirpath=folder)))
        with tempfile.TemporaryDirectory() as folder:
            influence = Influence([method], dirpath=folder, max_cost=1e9)
            tracked.append(fit(kind, data, arguments.batch, influence))
            start = time.perf_counter()
            influence.attributor.score(method, queries)
            asked.append(time.perf_counter() - start)
            disk = sum(path.stat().st_size for path in Path(folder).rglob("trackers/**/*") if path.is_file())
    base, with_it = statistics.median(plain), statistics.median(tracked)
    width = sum(p.numel() for p in mlp().parameters())
    print(f"{width:,} parameters, {arguments.train:,} examples, batches of {arguments.batch}, {method}")
    held = statistics.median(captured)
    print(f"plain step {base * 1e3:.2f} ms, captured {held * 1e3:.2f}, tracked {with_it * 1e3:.2f}")
    ceiling = "" if arguments.hessian or arguments.adam else f" (at most {CEILING:g})"
    each = statistics.median(asked) / 40
    print(f"{with_it / base:.2f} x the plain step{ceiling}; each of 40 queries {each * 1e3:.1f} ms")
    dense = (arguments.examples or arguments.train) * width * 4 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{disk / 1e6:.0f} MB on disk (as vectors {dense:.1f} GB and their states), peak {peak:.2f} GiB")


if __name__ == "__main__":
    main()
