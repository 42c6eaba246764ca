"""Representer points of a CNN against TracInCP with five checkpoints, features stored; the head's solve apart.

python tests/benchmarks/representer.py --mnist mnist.npz
"""

import argparse
import tempfile
from pathlib import Path

from measure import medians, timed
from subjects import cnn, fitted, images

from lightning_influence import RepresenterPoints, TracInCP

# Times as long that TracInCP must take at least.
FLOOR = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", help="an npz with x_train, y_train, x_test, y_test; random images without it")
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


if __name__ == "__main__":
    main()
