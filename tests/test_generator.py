"""Random modules × losses × masks × loaders × hooks through the public API: right, refused or noted, never silent.

A fault prints a line such as ``python tests/test_generator.py 137 tracin loader 3``, which repeats it.
"""

import logging
import sys
import warnings
from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from generated import draws
from generated.fitting import Fit, tensors_of
from generated.judging import Question, asked
from generated.known import KNOWN, known
from generated.reverts import REVERTS

SHARDS, A_FIT, MORE = 8, 5, 60
CONFIGS = draws.configurations(more=MORE)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def faults_of(number, count=A_FIT, tally=None):
    """The faults of one fit: lines that repeat them, with what was found; and whether each is known."""
    config = CONFIGS[number]
    with asked(config) as fit:
        for question in draws.questions(config, count):
            verdict = fit.verdict(question)
            if tally is not None:
                tally[verdict.kind] += 1
            if verdict.fault:
                about = f"{number} {question.method} {question.where.replace(' ', '-')} {question.size}"
                line = f"python tests/test_generator.py {about}\n  {config}\n  {verdict.kind}: {verdict.text}"
                yield known(config, question), verdict, line


def test_every_pair_of_values_occurs():
    names = list(draws.AXES)
    seen = {pair for config in CONFIGS for pair in draws.pairs(config._asdict(), names)}
    possible = sum(len(draws.AXES[a]) * len(draws.AXES[b]) for i, a in enumerate(names) for b in names[i + 1 :])
    assert len(seen) == possible
    assert len(CONFIGS) * A_FIT >= 2000


@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_score_is_silently_wrong(shard):
    tally, faults = Counter(), []
    for number in range(shard, len(CONFIGS), SHARDS):
        faults += [line for name, _, line in faults_of(number, tally=tally) if name is None]
    print(dict(tally))
    assert not faults, f"{len(faults)} faults in {sum(tally.values())} draws\n" + "\n".join(faults[:10])
    assert tally["right"] > 0.2 * sum(tally.values())


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_fault_still_occurs(name):
    of_name = [k for k, c in enumerate(CONFIGS) if any(known(c, q) == name for q in draws.questions(c, A_FIT))]
    found = any(fault == name for number in of_name[:30] for fault, _, _ in faults_of(number))
    assert found, f"{name!r} no longer occurs: take it out of KNOWN in tests/generated/known.py"


@pytest.mark.parametrize("name", [name for name, revert in REVERTS.items() if revert.question])
def test_nothing_is_found_before_it_is_taken_away(name):
    revert = REVERTS[name]
    with asked([*revert.configs, *filter(revert.where, CONFIGS)][0]) as fit:
        verdict = fit.verdict(revert.question)
    assert not verdict.fault
    assert verdict.kind not in revert.shows


@pytest.mark.parametrize("name", REVERTS)
def test_the_generator_finds_what_is_taken_away(name, monkeypatch):
    revert = REVERTS[name]
    revert.off(monkeypatch)
    configs = [*revert.configs, *filter(revert.where, CONFIGS)][:25]
    assert configs
    for config in configs:
        with asked(config) as fit:
            for question in [revert.question] if revert.question else draws.questions(config, A_FIT):
                if known(config, question) is None and fit.verdict(question).kind in revert.shows:
                    return
    pytest.fail(f"without {name!r} nothing was found in {len(configs)} fits")


@pytest.mark.parametrize("number", range(0, len(CONFIGS), len(CONFIGS) // 24))
def test_the_weights_are_those_without_the_callback(number, tmp_path):
    config = CONFIGS[number]
    states, after = [], []
    for capture in (True, False):
        pl.seed_everything(1, verbose=False)
        fit = Fit(config, tmp_path / str(capture), capture)
        states.append(tensors_of(fit.module))
        after.append(torch.get_rng_state())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name].nan_to_num(), states[1][name].nan_to_num()) for name in states[0])
    assert torch.equal(*after)


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    number, method, where, size = sys.argv[1:]
    one = Question(method, where.replace("-", " "), None if size == "None" else int(size))
    with asked(CONFIGS[int(number)]) as fit:
        print(fit.config, one, fit.truth and fit.truth.cause, *fit.verdict(one), sep="\n")
