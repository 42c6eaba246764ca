"""Several processes make the same exchanges, however their shares and what they find differ."""

import signal

import pytest
import torch
from fits import fit, loader, seeded
from gloo_score import Digits, N, data

from lightning_influence import SOURCE, Attributor, Influence
from lightning_influence.processes import Processes, _Group


@pytest.fixture
def group(monkeypatch):
    """The second of two processes, of which the first never fails, and the errors that it sends."""
    sent = []

    def gather(everyone, mine):
        sent.append(mine[1])
        everyone[:] = [(mine[0], None), mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return _Group(1, 2), sent


def test_an_error_is_sent_from_within_what_is_done_together_already(group):
    processes, sent = group
    with processes.together():
        with pytest.raises(ValueError, match="mine"), processes.together():
            raise ValueError("mine")
        assert sent[0] is not None
    assert sent[1:] == [None]


def test_an_error_that_all_know_is_sent_once(group):
    processes, sent = group
    with pytest.raises(ValueError, match="mine"), processes.together(), processes.together():
        raise ValueError("mine")
    assert len(sent) == 1


def test_an_interrupt_waits_for_the_end_of_an_exchange(monkeypatch):
    finished = []

    def gather(everyone, mine):
        signal.raise_signal(signal.SIGINT)
        everyone[:] = [mine] * 2
        finished.append(mine)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in processes of some shells
    try:
        with pytest.raises(KeyboardInterrupt):
            _Group(0, 2).gathered(3)
        assert len(finished) == 1
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


class Counted(Processes):
    """One of two processes that have all come to the same exchange, and their number until the values are joined."""

    exchanges = 0

    def gathered(self, value):
        self.exchanges += 1
        return [value, N - value] if type(value) is int else [value] * 2

    def joined(self, part, n, dim=0):
        self.until, self.exchanges = self.exchanges, 0
        return torch.zeros(n, dtype=part.dtype)


@pytest.mark.parametrize("step", [1, 11])
def test_unequal_shares_prepare_as_many_curvatures(tmp_path, monkeypatch, step):
    """23 examples are 11 and 12, in blocks of a size that divides 11."""
    influence = Influence(dirpath=tmp_path)
    module = seeded(Digits)
    fit(module, loader(data(N, 1)), influence, max_epochs=2)
    monkeypatch.setattr(SOURCE, "queries_at_once", lambda self, setting: step)
    Attributor(module, data(N, 1), influence.trajectory).self_influence(SOURCE(2))  # the curvatures are on disk
    found = []
    for rank in (0, 1):
        attributor = Attributor(module, data(N, 1), influence.trajectory)
        attributor.processes = Counted(rank, 2)
        attributor.self_influence(SOURCE(2))
        found.append(attributor.processes.until)
    assert found[0] == found[1]
