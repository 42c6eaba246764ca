"""Random numbers of a device: captured, replayed, seeded and put back."""

import pytest
import torch

import devices
from devices.fits_on import Net, data, fitted, trainer
from lightning_influence import Attributor, HyDRA, LeaveOneOut, Refit, TracIn
from lightning_influence.devices import kinds_in_use, rng_states
from lightning_influence.module.random_state import isolated_random_state, random_states, seed_for
from lightning_influence.replay.replay import DriftError

pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore")]
HERE = devices.HERE


def test_the_device_is_known():
    kind, count = HERE.split(":")[0], torch.accelerator.device_count()
    assert list(kinds_in_use()) == [kind]
    assert [str(device) for device in rng_states()] == [f"{kind}:{i}" for i in range(count)]


def test_states_are_put_back_compared_and_seeded():
    before = random_states()
    with isolated_random_state():
        torch.randn(3, device=HERE)
        assert random_states() != before
        drawn = []
        for _ in range(2):
            seed_for(5, seed=3)
            drawn.append(torch.randn(3, device=HERE).cpu())
        assert torch.equal(*drawn)
    assert random_states() == before


@pytest.mark.parametrize("method", [HyDRA(checks=0), TracIn(), LeaveOneOut(examples=(0,))], ids=lambda m: m.name)
def test_dropout_on_the_device_is_replayed(method, dtype, tmp_path):
    module, train, influence = fitted(tmp_path / "runs", dtype, HERE, net=Net(dropout=0.4))
    refit = Refit(dirpath=tmp_path / "models") if isinstance(method, LeaveOneOut) else None
    ask = Attributor(module, train, influence.trajectory, trainer=trainer(HERE), refit=refit)
    before = random_states()
    scores = ask.score(method, data(3, 2, dtype))  # a replay that drifts raises
    assert not [note for note in scores.notes if "drift" in note.lower()]
    assert random_states() == before


def test_the_callback_changes_no_weights_and_no_random_numbers(tmp_path):
    found = []
    for folder in (tmp_path, None):
        torch.manual_seed(0)
        module = Net(dropout=0.4)
        options = {"methods": [HyDRA.during_fit()], "queries": data(2, 2, torch.float32)}
        torch.manual_seed(1)
        if folder is None:
            from torch.utils.data import DataLoader

            torch.manual_seed(0)
            trainer(HERE).fit(module, DataLoader(data(14, 1, torch.float32), 4, shuffle=True))
        else:
            fitted(folder, torch.float32, HERE, net=module, **options)
        found.append((torch.cat([p.flatten() for p in module.parameters()]), rng_states()[torch.device(HERE)]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_replay_elsewhere_says_where_the_fit_drew(tmp_path):
    module, train, influence = fitted(tmp_path, torch.float32, HERE, net=Net(dropout=0.5))
    ask = Attributor(module, train, influence.trajectory, trainer=trainer("cpu"))
    kind = HERE.split(":")[0]
    with pytest.raises(DriftError, match=f"drew random numbers on {kind}, which cannot be repeated on cpu"):
        ask.score(TracIn(max_drift=1e-4), data(3, 2, torch.float32))
