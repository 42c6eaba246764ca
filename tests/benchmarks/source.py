"""SOURCE over many checkpoints beside TracInCP and one EK-FAC score, and how they grow with the number of queries.

python tests/benchmarks/source.py --mnist mnist.npz --ag-news FOLDER
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

from subjects import Encoder, arguments_of, cnn, fitted, images, mlp, texts
from torch.utils.data import Subset

from lightning_influence import EKFAC, SOURCE, Attributor, InfluenceFunction, TracInCP

QUERIES = (100, 200)
CEILING = 40  # seconds on two idle cores, for 100 queries of the MLP, factors included


SUBJECTS = {  # network, training examples, checkpoints, options of the fit
    "mlp": (lambda: mlp(128, 0.1), 5_000, 50, {"momentum": 0.9}),
    "cnn": (cnn, 2_000, 10, {}),
    "transformer": (Encoder, 1_000, 10, {}),
}
METHODS = {"SOURCE": SOURCE(), "TracInCP": TracInCP(), "EK-FAC": InfluenceFunction(EKFAC())}


def asked(subject, method, count, fresh):
    """CPU and elapsed seconds of one question; a fresh one computes the curvatures as well."""
    trajectory, folder = subject.attributor.trajectory, subject.attributor.trajectory.path / "curvature"
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    attributor = Attributor(subject.module, subject.train, trajectory)
    queries = Subset(subject.queries, range(count))
    processor, clock = time.process_time(), time.perf_counter()
    attributor.score(method, queries)
    return time.process_time() - processor, time.perf_counter() - clock


def compare(name, subject, repeats):
    """The table of one subject: medians of turns, each with its curvatures and without."""
    took = {}
    for _ in range(repeats):
        for label, method in METHODS.items():
            for count in QUERIES:
                for fresh in (True, False) if label != "TracInCP" else (False,):
                    took.setdefault((label, count, fresh), []).append(asked(subject, method, count, fresh))
    checkpoints = len(subject.attributor.trajectory.checkpoints) - 1
    print(f"\n{name}: {len(subject.train):,} examples, {checkpoints} checkpoints; CPU (elapsed) seconds")
    for label in METHODS:
        for fresh in (True, False):
            found = [took.get((label, count, fresh)) for count in QUERIES]
            if found[0] is None:
                continue
            (few, wall), (many, many_wall) = (
                [statistics.median(t) for t in zip(*turns, strict=True)] for turns in found
            )
            words = "with its curvatures" if fresh else ""
            print(
                f"  {label:9} {few:7.1f} ({wall:6.1f}) for {QUERIES[0]} queries, {many:7.1f} ({many_wall:6.1f}) for "
                f"{QUERIES[1]}: {many / few:4.2f} x  {words}",
                flush=True,
            )
    if name == "mlp":
        print(f"  SOURCE for {QUERIES[0]} queries: at most {CEILING} s elapsed on two idle cores")


def main():
    parser = arguments_of(__doc__, texts=True)
    parser.add_argument("--only", choices=list(SUBJECTS), help="one of the three")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the examples, once: does it run?")
    arguments = parser.parse_args()
    repeats, share = (1, 20) if arguments.quick else (arguments.repeats, 1)
    with tempfile.TemporaryDirectory() as folder:
        for name, (net, count, checkpoints, options) in SUBJECTS.items():
            if arguments.only in (None, name):
                given = (count // share, max(QUERIES))
                data = texts(arguments.ag_news, *given) if name == "transformer" else images(arguments.mnist, *given)
                subject = fitted(net(), data, Path(folder) / name, max(3, checkpoints // share), **options)
                compare(name, subject, repeats)


if __name__ == "__main__":
    main()
