"""Kill -9: of the process that trains at ten random moments, and of workers on every kind of cluster."""

import contextlib
import multiprocessing
import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from lightning_influence import Downsampling, LeaveOneOut, Refit
from refit.ridge import Ridge, Solved, attributor, data, make_trainer

pytestmark = pytest.mark.slow
TEST, TRAIN = data(3, seed=1), data(10)
FEW = (LeaveOneOut(n_seeds=2),)


def shuffled(subset):
    return torch.utils.data.DataLoader(subset, batch_size=3, shuffle=True)


def ask(folder, make=make_trainer, n_jobs=None, module=Ridge, methods=(LeaveOneOut(n_seeds=2), Downsampling(30))):
    asker = attributor(TRAIN, Refit(module, make, shuffled, "independent", folder, n_jobs=n_jobs), Ridge())
    return torch.cat([asker.score(m, TEST).values for m in methods]), asker


def counted(log):
    def make():
        with open(log, "a") as file:
            file.write("x")
        time.sleep(0.06)  # the whole bank takes longer than ten children live, on any machine
        return make_trainer()

    return make


def models_in(asker):
    store = asker.refit.models.store
    return dict(zip(store._places, store.weights(store._places), strict=True))


def same_bank(first, second):
    ours, theirs = models_in(first), models_in(second)
    assert ours.keys() == theirs.keys()
    for key, weights in ours.items():
        assert all(torch.equal(weights[name], theirs[key][name]) for name in weights)


def looks(log):
    return log.stat().st_size if log.exists() else 0


def finished(bank):
    return len(list(bank.glob("models-*.arrow")))


def test_kill_at_ten_random_moments(tmp_path):
    expected, undisturbed = ask(tmp_path / "undisturbed")
    draw, log = random.Random(0), tmp_path / "log"
    counts = [0]
    context = multiprocessing.get_context("fork")
    for _ in range(10):
        child = context.Process(target=ask, args=(tmp_path / "bank", counted(log)))
        begun, wanted = looks(log), counts[-1] + draw.randrange(4)
        child.start()
        # Moments are counted in finished models, so that they fall within the work on machines of any speed.
        while looks(log) == begun or finished(tmp_path / "bank") < wanted:
            assert child.is_alive()
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.2))
        assert child.is_alive(), "finished before it was killed: give it more to do"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        counts.append(finished(tmp_path / "bank"))
    assert counts == sorted(counts)
    assert 0 < counts[-1] < 52
    found, disturbed = ask(tmp_path / "bank", counted(log))
    assert torch.equal(found, expected)
    same_bank(disturbed, undisturbed)
    # Each start looks at the factories three times, and each kill loses at most the model at work.
    assert len(log.read_text()) <= 52 + 10 + 11 * 3


def victim(marker):
    """A module that kills its process, once."""

    class Victim(Solved):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) == 3 and not Path(marker).exists():
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().training_step(batch, batch_idx)

    return Victim


@contextlib.contextmanager
def loky():
    yield 2


@contextlib.contextmanager
def dask():
    import joblib
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        yield None


@contextlib.contextmanager
def ray():
    import joblib
    import ray
    from ray.util.joblib import register_ray

    paths = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2))
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    register_ray()
    try:
        with joblib.parallel_config(backend="ray", n_jobs=2):
            yield None
    finally:
        ray.shutdown()


@pytest.mark.parametrize("cluster", [loky, dask, ray], ids=lambda c: c.__name__)
def test_a_killed_worker_loses_nothing(tmp_path, cluster):
    expected, undisturbed = ask(tmp_path / "undisturbed", module=Solved, methods=FEW)
    marker = tmp_path / "killed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with cluster() as n_jobs:
            found, disturbed = ask(tmp_path / "bank", n_jobs=n_jobs, module=victim(str(marker)), methods=FEW)
    assert marker.exists()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    same_bank(disturbed, undisturbed)
