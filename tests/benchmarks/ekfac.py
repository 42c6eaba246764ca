"""Influence functions by EK-FAC against kronfluence and plain passes: factors included, same damping, same labels.

pip install --no-deps kronfluence==1.0.1 && pip install accelerate datasets einops einconv opt_einsum scikit-learn tqdm
python tests/benchmarks/ekfac.py --mnist mnist.npz
"""

import contextlib
import copy
import io
import logging
import tempfile
from pathlib import Path

from measure import Plain, timed
from subjects import BATCH, arguments_of, cnn, fitted, images, mlp
from torch.nn import functional as F

from lightning_influence import EKFAC, Attributor, InfluenceFunction

# Times as long that the peer must take at least, and the least rank correlation of a query's scores with its.
FLOORS = {"mlp": 30, "cnn": 8}
CORRELATION = 0.99


def with_kronfluence(subject, damping, folder):
    """[query, train]: factors and scores, with the settings of a plain call but the damping and empirical labels."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classify(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    logging.disable(logging.CRITICAL)
    task, net = Classify(), copy.deepcopy(subject.module.net).eval()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        net = prepare_model(net, task)
        analyzer = Analyzer("kronfluence", net, task, cpu=True, output_dir=str(folder), disable_tqdm=True)
        analyzer.fit_all_factors(
            "factors",
            subject.train,
            per_device_batch_size=BATCH,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
            overwrite_output_dir=True,
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            subject.queries,
            subject.train,
            per_device_query_batch_size=100,
            per_device_train_batch_size=BATCH,
            score_args=ScoreArguments(damping_factor=damping),
            overwrite_output_dir=True,
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    logging.disable(logging.NOTSET)
    return scores


def rank_correlations(ours, theirs):
    """[query]: Spearman's; scores hardly tie."""
    ranks = [x.argsort(1).argsort(1).double() for x in (ours, theirs)]
    ranks = [r - r.mean(1, keepdim=True) for r in ranks]
    return (ranks[0] * ranks[1]).sum(1) / (ranks[0].norm(dim=1) * ranks[1].norm(dim=1))


def compare(name, subject, repeats, peer, folder):
    """One row of the table."""
    subject.at(subject.checkpoints[-1])
    # Without a trajectory nothing is kept on disk: every question prepares its own factors.
    attributor = Attributor(subject.module, subject.train)

    def asked(tolerance):
        method = InfluenceFunction(EKFAC(labels="empirical", tolerance=tolerance))
        return attributor.score(method, subject.queries)

    first, _ = timed(lambda: asked(0.02))
    plain = Plain(subject, (subject.train, subject.queries))
    plain.subject = type("Last", (), {"checkpoints": subject.checkpoints[-1:], "at": staticmethod(subject.at)})
    seconds, exact_seconds, passes = [], [], []
    for _ in range(repeats):
        passes.append(plain.seconds())
        took, scores = timed(lambda: asked(0.02))
        seconds.append(took)
        took, exact = timed(lambda: asked(0))
        exact_seconds.append(took)
    took, exact_took, plain_took = (sorted(x)[len(x) // 2] for x in (seconds, exact_seconds, passes))
    own = rank_correlations(scores.values, exact.values)
    damping = scores.figures["damping"]
    print(f"\n{name}: {len(subject.train):,} examples, {len(subject.queries)} queries, damping {damping:.3g}")
    print(f"  plain pass            {plain_took:8.3f} s")
    print(f"  EK-FAC                {took:8.3f} s   {took / plain_took:5.1f} x plain")
    print(f"  EK-FAC, tolerance=0   {exact_took:8.3f} s   {exact_took / plain_took:5.1f} x plain")
    print(f"  apart: self-check of the first question {max(0.0, first - took):.3f} s")
    print(f"  rank correlation of the two: {float(own.min()):.4f} to {float(own.max()):.4f}", flush=True)
    if peer:
        theirs_took, theirs = timed(lambda: with_kronfluence(subject, damping, folder))
        print(
            f"  kronfluence           {theirs_took:8.3f} s   {theirs_took / took:5.1f} x ours (at least {FLOORS[name]})"
        )
        for label, ours in (("EK-FAC", scores), ("tolerance=0", exact)):
            found = rank_correlations(ours.values, theirs)
            scale = float((ours.values * len(subject.train) * theirs).sum() / theirs.square().sum())
            print(
                f"  {label}: rank correlation with kronfluence, worst query {float(found.min()):.4f} (at least "
                f"{CORRELATION}), median {float(found.median()):.4f}; scale {scale:.4f}"
            )
    for note in scores.notes:
        print(f"  {note}")


def main():
    parser = arguments_of(__doc__)
    parser.add_argument("--only", choices=list(FLOORS), help="one of the two")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="leave kronfluence out")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the examples, once: does it run?")
    arguments = parser.parse_args()
    repeats, share = (1, 20) if arguments.quick else (arguments.repeats, 1)
    sizes = {"mlp": 5_000, "cnn": 2_000}
    with tempfile.TemporaryDirectory() as folder:
        for name, net in (("mlp", mlp), ("cnn", cnn)):
            if arguments.only in (None, name):
                data = images(arguments.mnist, sizes[name] // share, 200)
                subject = fitted(net(), data, Path(folder) / name)
                compare(name, subject, repeats, not arguments.no_peer, Path(folder) / name)


if __name__ == "__main__":
    main()
