"""What logging 1,000 queries x 50,000 training examples with `top_k=20` adds to a tracker: seconds, memory, disk.

All 40 rows a query are logged, and the self-influence of all training examples. Each tracker in a process of its own,
after a first scalar, so that its start is not counted; what it does when the run ends is.

python tests/benchmarks/trackers.py    # needs tests/requirements-slow.txt
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from memory import peak  # isort: skip

SECONDS, MEGABYTES = 5.0, 200.0
TRACKERS = ("TensorBoardLogger", "CSVLogger", "WandbLogger", "MLFlowLogger", "CometLogger")


def answers(n_queries, n_train, k):
    """Scores of random numbers as they come from a `top_k` run, and self-influence."""
    from lightning_influence import Scores, SelfScores, TopK

    draw = torch.Generator().manual_seed(0)
    top = []
    for sign in (1.0, -1.0):  # no matrix: what it took would hide what logging takes
        ids = torch.stack([torch.randperm(n_train, generator=draw)[:k] for _ in range(n_queries)])
        top.append(TopK(sign * torch.rand(n_queries, k, generator=draw).sort(descending=True).values, ids))
    train_ids = torch.arange(n_train)
    scores = Scores(None, tuple(top), train_ids, torch.arange(n_queries), method="TracInCP")
    return scores, SelfScores(train_ids, torch.rand(n_train, generator=draw), "TracInCP")


def opened(kind, folder):
    """A logger that has begun, and what ends it."""
    loggers = importlib.import_module("pytorch_lightning.loggers")
    if kind == "WandbLogger":
        logger = loggers.WandbLogger(save_dir=folder, offline=True)
        return logger, logger.experiment.finish
    if kind == "MLFlowLogger":
        logger = loggers.MLFlowLogger("benchmark", tracking_uri=Path(folder, "mlruns").as_uri())
        return logger, lambda: logger.finalize("success")
    if kind == "CometLogger":
        import comet_ml

        logger = loggers.CometLogger(online=False)  # makes a disabled experiment: an offline one takes its place
        logger._experiment = comet_ml.OfflineExperiment(offline_directory=str(Path(folder, "comet")))
        return logger, logger.experiment.end
    logger = getattr(loggers, kind)(folder)
    return logger, lambda: logger.finalize("success")


def size(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def measure(kind, n_queries, n_train, k):
    """One tracker, in this process."""
    scores, itself = answers(n_queries, n_train, k)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        logger, end = opened(kind, folder)
        logger.log_metrics({"loss": 1.0}, step=1)
        logger.save()
        import matplotlib.figure  # noqa: F401 - a library is no cost of one logging
        import pandas  # noqa: F401

        memory, disk, start = peak(), size(folder), time.perf_counter()
        scores.log(logger, step=2, k=k)
        itself.log(logger, step=2)
        logged = time.perf_counter() - start
        end()
        seconds, memory = time.perf_counter() - start, (peak() - memory) * 1e3
        disk = (size(folder) - disk) / 1e6
        os.chdir("/")
    print(f"  {kind:20}{logged:8.2f}{seconds:10.2f}{memory:12.0f}{disk:12.1f}", flush=True)
    assert seconds < SECONDS, f"Expected {kind} to take less than {SECONDS} s, got {seconds:.2f}."
    assert max(memory, disk) < MEGABYTES, f"Expected less than {MEGABYTES} MB, got {memory:.0f} and {disk:.1f}."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trackers", nargs="+", default=TRACKERS, choices=TRACKERS)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--here", action="store_true", help="in this process")
    arguments = parser.parse_args()
    if arguments.here:
        for kind in arguments.trackers:
            measure(kind, arguments.queries, arguments.train, arguments.top_k)
        return
    print(f"  {'':20}{'log, s':>8}{'+ end, s':>10}{'memory, MB':>12}{'disk, MB':>12}", flush=True)
    quiet = os.environ | {"WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true", "COMET_LOGGING_CONSOLE": "ERROR"}
    for kind in arguments.trackers:
        command = [sys.executable, __file__, "--here", *sys.argv[1:], "--trackers", kind]
        subprocess.run(command, check=True, env=quiet)


if __name__ == "__main__":
    main()
