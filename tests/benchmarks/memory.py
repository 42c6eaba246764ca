"""Peak memory of 60,000 x 1,000 scores of which the 50 strongest are kept, in a process of its own.

python tests/benchmarks/memory.py --mnist mnist.npz
"""

import resource
import subprocess
import sys
import tempfile

CEILING = 1.5  # GB


def peak():
    """GB, of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def score(path, n_train, n_queries, top_k):
    from subjects import fitted, images, mlp

    from lightning_influence import TracInCP

    bare = peak()
    with tempfile.TemporaryDirectory() as folder:
        subject = fitted(mlp(), images(path, n_train, n_queries), folder, checkpoints=2)
        before = peak()
        scores = subject.attributor.score(TracInCP(), subject.queries, top_k=top_k)
    size = f"{len(scores):,} x {len(scores.train_ids):,}"
    print(f"imports {bare:.2f} GB, with data and fit {before:.2f} GB, {size} scores with top_k={top_k} {peak():.2f} GB")
    assert peak() < CEILING, f"Expected less than {CEILING} GB, got {peak():.2f} GB."


def main():
    from subjects import arguments_of

    parser = arguments_of(__doc__)
    parser.add_argument("--train", type=int, default=60_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--here", action="store_true", help="in this process")
    arguments = parser.parse_args()
    if arguments.here:
        score(arguments.mnist, arguments.train, arguments.queries, arguments.top_k)
    else:
        subprocess.run([sys.executable, __file__, "--here", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
