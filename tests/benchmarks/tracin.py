"""TracInCP and self-influence against plain passes and against peers.

pip install -r tests/requirements-slow.txt
python tests/benchmarks/tracin.py --mnist mnist.npz --ag-news FOLDER
"""

import statistics
import tempfile
from pathlib import Path

from measure import Plain, difference, loading, medians, timed, with_captum, with_vmap
from subjects import Encoder, arguments_of, cnn, fitted, images, mlp, texts

from lightning_influence import TracInCP

# The most that scores and self-influence may cost in plain passes, and the least that the peer may.
CEILINGS = {"mlp": (1.5, 1.0, 80), "cnn": (2.2, 1.5, 4.5), "transformer": (3.0, 1.1, 5)}


def compare(name, subject, peer, repeats, peer_repeats):
    """One row of the table, in seconds and in plain passes."""
    attributor, method = subject.attributor, TracInCP()
    first, _ = timed(lambda: attributor.score(method, subject.queries))
    both, own = Plain(subject, (subject.train, subject.queries)), Plain(subject, (subject.train,))
    held = Plain(subject, (subject.train, subject.queries), held=True)
    passes, own_passes, held_passes, reading = [], [], [], []

    works = {
        "plain": lambda: passes.append(both.seconds()),
        "own": lambda: own_passes.append(own.seconds()),
        "held": lambda: held_passes.append(held.seconds()),
        "loading": lambda: reading.append(loading(subject)),
        "score": lambda: attributor.score(method, subject.queries),
        "self": lambda: attributor.self_influence(method),
    }
    took = medians(works, repeats)
    plain, plain_own, at_hand, load = (statistics.median(x[1:]) for x in (passes, own_passes, held_passes, reading))
    scores = attributor.score(TracInCP(units="paper"), subject.queries)
    with tempfile.TemporaryDirectory() as folder:
        saving, _ = timed(lambda: scores.save(Path(folder) / "scores.arrow"))
    ratio, self_ratio = (took["score"] - load) / plain, (took["self"] - load) / plain_own
    most, self_most, peer_least = CEILINGS[name]
    size = sum(p.numel() for p in subject.module.parameters())
    sizes = (f"{size:,} parameters", f"{len(subject.train):,} examples", f"{len(subject.queries)} queries")
    print(f"\n{name}: {', '.join(sizes)}, {len(subject.checkpoints)} checkpoints")
    print(f"  plain passes     {plain:8.3f} s")
    print(f"  scores           {took['score'] - load:8.3f} s   {ratio:6.2f} x plain (at most {most})")
    print(f"  self-influence   {took['self'] - load:8.3f} s   {self_ratio:6.2f} x plain (at most {self_most})")
    print(f"  apart: loading {load:.3f} s, self-check {first - took['score']:.3f} s, saving {saving:.3f} s, and")
    print(f"         plain passes with their batches at hand {at_hand:.3f} s")
    if peer_repeats:
        theirs = []
        seconds = medians({"peer": lambda: theirs.append(peer(subject))}, peer_repeats, warm=False)["peer"]
        print(f"  {peer.__name__:16} {seconds:8.3f} s   {seconds / took['score']:6.1f} x ours (at least {peer_least})")
        print(f"  largest difference of scores {difference(scores.values, theirs[0]):.1e}", flush=True)


def main():
    parser = arguments_of(__doc__, texts=True)
    parser.add_argument("--only", choices=list(CEILINGS), help="one of the three")
    parser.add_argument("--full", action="store_true", help="the MLP on 60,000 examples")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-repeats", type=int, default=5, help="0 leaves the peers out")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the examples, once: does it run?")
    arguments = parser.parse_args()
    repeats, peers, share = arguments.repeats, arguments.peer_repeats, 1
    if arguments.quick:
        repeats, peers, share = 1, min(1, arguments.peer_repeats), 20

    with tempfile.TemporaryDirectory() as folder:
        if arguments.only in (None, "mlp"):
            n = 60_000 if arguments.full else 5_000
            subject = fitted(mlp(), images(arguments.mnist, n // share, 200), Path(folder) / "mlp")
            compare("mlp", subject, with_captum, repeats, peers)
        if arguments.only in (None, "cnn"):
            subject = fitted(cnn(), images(arguments.mnist, 2_000 // share, 200), Path(folder) / "cnn")
            compare("cnn", subject, with_captum, repeats, peers)
        if arguments.only in (None, "transformer"):
            subject = fitted(Encoder(), texts(arguments.ag_news, 1_000 // share, 100), Path(folder) / "transformer")
            compare("transformer", subject, with_vmap, repeats, peers)


if __name__ == "__main__":
    main()
