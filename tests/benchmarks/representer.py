"""Representer points of a CNN against TracInCP with five checkpoints, features stored; solves of heads apart.

The solves are of logistic regressions on pixels and of heads that are wide, have many classes or few examples: seconds
of the CPU, products with the Hessian, and the error that is left, relative to the weight.

python tests/benchmarks/representer.py --mnist mnist.npz
"""

import tempfile
import time
from pathlib import Path

import torch
from measure import medians, timed
from subjects import arguments_of, cnn, fitted, images
from torch.nn import functional as F

from lightning_influence import RepresenterPoints, TracInCP
from lightning_influence.numerics.heads import Link
from lightning_influence.numerics.penalised_head import PenalisedHead

# Times as long that TracInCP must take at least.
FLOOR = 20


def heads(mnist, share):
    """Name -> features [example, dim], targets [example, class], link, weight decay."""
    subject = images(mnist, 5_000 // share, 10)[0].tensors
    pixels, labels = subject[0].flatten(1).double(), subject[1]
    pixels = torch.cat([pixels, torch.ones(len(pixels), 1).double()], 1)
    digits = F.one_hot(labels, 10).double()
    draw = torch.Generator().manual_seed(0)

    def drawn(n, dim, classes):
        scales = torch.arange(1, dim + 1).double() ** -0.5
        features = torch.randn(n, dim, generator=draw).double() * scales
        logits = features @ torch.randn(dim, classes, generator=draw).double()
        return features, F.one_hot(logits.argmax(1), classes).double()

    made = {f"pixels, {decay:g}": (pixels, digits, Link("softmax"), decay) for decay in (0.006, 1e-4, 1e-6)}
    made["wide"] = (*drawn(4_000 // share, 1_024, 10), Link("softmax"), 0.006)
    made["wider than examples"] = (*drawn(50, 2_048, 10), Link("softmax"), 0.006)
    made["500 classes"] = (*drawn(2_000 // share, 128, 500), Link("softmax"), 0.006)
    made["40 labels"] = (*drawn(5_000 // share, 300, 40), Link("sigmoid"), 0.006)
    made["regression"] = (*drawn(5_000 // share, 500, 3), Link("identity"), 1e-4)
    return made


class Counted(PenalisedHead):
    """Counts products with the Hessian."""

    products = 0

    def hessian(self, weight):
        product = super().hessian(weight)

        def counted(direction):
            Counted.products += 1
            return product(direction)

        return counted


def solves(mnist, share):
    """Prints what each head's minimum takes."""
    for name, (features, targets, link, decay) in heads(mnist, share).items():
        rows = list(zip(features.split(1_024), targets.split(1_024), strict=True))
        Counted.products, start = 0, time.process_time()
        found = Counted(lambda rows=rows: iter(rows), link, decay).fit(torch.zeros(targets.shape[1], features.shape[1]))
        seconds = time.process_time() - start
        left = found.gradient_norm / decay / float(found.weight.norm())
        print(
            f"  {name:22} {seconds:7.2f} s, {found.iterations:3} Newton steps, {Counted.products:5} products, "
            f"error {left:.0e}{'' if found.converged else ', NOT CONVERGED'}"
        )


def main():
    parser = arguments_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the examples, once: does it run?")
    arguments = parser.parse_args()
    repeats, share = (1, 20) if arguments.quick else (arguments.repeats, 1)

    with tempfile.TemporaryDirectory() as folder:
        subject = fitted(cnn(), images(arguments.mnist, 2_000 // share, 200), Path(folder) / "cnn")
        attributor, queries = subject.attributor, subject.queries
        features, scores = timed(lambda: attributor.score(RepresenterPoints(), queries))
        solve, _ = timed(lambda: attributor.score(RepresenterPoints(weight_decay=0.01), queries))
        works = {
            "representer": lambda: attributor.score(RepresenterPoints(), queries),
            "tracin": lambda: attributor.score(TracInCP(), queries),
        }
        took = medians(works, repeats)
    ratio = took["tracin"] / took["representer"]
    print(f"{len(subject.train):,} examples, {len(queries)} queries, {len(subject.checkpoints)} checkpoints")
    print(f"  features, solve and scores, the first time   {features:8.3f} s")
    print(f"  features stored, another head solved         {solve:8.3f} s")
    print(f"  features and head stored                     {took['representer']:8.3f} s")
    print(f"  TracInCP                                     {took['tracin']:8.3f} s   {ratio:.1f} x (at least {FLOOR})")
    print(f"  {scores.notes[0]}")
    print("Minima of heads")
    solves(arguments.mnist, share)


if __name__ == "__main__":
    main()
