"""How the cost of TracInCP grows with queries, examples, width and tokens, on random data at one checkpoint.

python tests/benchmarks/growth.py
"""

import argparse
import statistics
import tempfile

from measure import Plain, medians
from subjects import Encoder, fitted, images, mlp, texts

from lightning_influence import TracInCP


def row(what, value, net, data, repeats):
    """Seconds of plain passes and of scores."""
    with tempfile.TemporaryDirectory() as folder:
        subject = fitted(net, data, folder, checkpoints=1)
        plain, passes = Plain(subject, data), []
        works = {
            "plain": lambda: passes.append(plain.seconds()),
            "score": lambda: subject.attributor.score(TracInCP(), subject.queries),
            "self": lambda: subject.attributor.self_influence(TracInCP()),
        }
        took = medians(works, repeats)
    ordinary = statistics.median(passes[1:])
    seconds = (ordinary, took["score"], took["score"] / ordinary, took["self"])
    print(f"| {what} | {value:,} | {' | '.join(f'{x:.3g}' for x in seconds)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the two smallest of each, once: does it run?")
    arguments = parser.parse_args()
    repeats, last = (1, 2) if arguments.quick else (arguments.repeats, 5)
    print("| grows | to | plain, s | scores, s | scores / plain | self-influence, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for n in (50, 200, 800, 3200)[:last]:
        row("queries (MLP 235k, 5,000 examples)", n, mlp(), images(None, 5_000, n), repeats)
    for n in (1_250, 5_000, 20_000, 60_000)[:last]:
        row("examples (MLP 235k, 200 queries)", n, mlp(), images(None, n, 200), repeats)
    for width in (128, 256, 512, 1024)[:last]:
        row("width (MLP, 5,000 examples, 200 queries)", width, mlp(width), images(None, 5_000, 200), repeats)
    for tokens in (16, 32, 64, 128)[:last]:
        row("tokens (Transformer, 500 examples, 50 queries)", tokens, Encoder(), texts(None, 500, 50, tokens), repeats)


if __name__ == "__main__":
    main()
