"""Data that cannot be read by index: streams with a lookup, several loaders, lists of indices, handles of workers."""

from pathlib import Path

import oracles
import pytest
import pytorch_lightning as pl
import torch
from fits import Double, Indexed, Net, fit, loader, recorded, seeded
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, default_collate

from lightning_influence import (
    SOURCE,
    Attributor,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    MissingEvidence,
    Refit,
    TracIn,
    TracInCP,
    Trajectory,
)
from lightning_influence.capture import store
from lightning_influence.curvature.conjugate_gradient import ConjugateGradient

QUERIES = Indexed(3)


def ones(dataset, ids):
    return [default_collate([dataset[i]]) for i in ids]


def expected(module, trajectory, seen, ids, dataset, points=None, loss=None):
    """TracInCP by one backward pass per example; ``points``: (step before, checkpoint) in place of all windows."""
    points = points or list(zip([c.step for c in trajectory.checkpoints], trajectory.checkpoints[1:], strict=False))
    place = {i: k for k, i in enumerate(ids)}
    found = []
    for before, after in points:
        weights = torch.zeros(1, len(ids), dtype=torch.float64)
        for micro in seen[before : after.step]:
            for i in micro:
                weights[0, place[i]] += 0.1 / len(micro)
        state = after.load()
        found.append(({**state.parameters, **state.buffers}, weights))
    names = [name for name, _ in module.named_parameters()]
    return oracles.tracin(module, ones(dataset, ids), ones(QUERIES, range(3)), names, iter(found), loss)


# ---- streams --------------------------------------------------------------------------------------------------------


class Numbered(IterableDataset):
    """A stream whose examples have large numbers that are not consecutive, in an order of their own."""

    def __init__(self, n=14):
        self.data = Indexed(n)
        self.n = n

    def __iter__(self):
        for i in range(self.n):
            k = (i * 5) % self.n
            yield {**self.data[k], "idx": number(k)}


def number(k):
    return 10**12 + 7 * k * k


def by_number(n=14):
    data = Indexed(n)
    place = {number(k): k for k in range(n)}
    return lambda i: {**data[place[i]], "idx": i}


def streamed(tmp_path, **options):
    options = {"sample_id": "idx", "lookup": by_number(), "dirpath": tmp_path} | options
    influence, module = Influence(**options), seeded(Double)
    fit(module, DataLoader(Numbered(), 4), influence)
    return influence, module


class Keyed(Dataset):
    """The numbers as indices, for the oracle."""

    def __getitem__(self, i):
        return by_number()(i)


def test_a_stream_with_a_lookup_is_scored_under_its_own_ids(tmp_path):
    influence, module = streamed(tmp_path, methods=[TracInCP()], queries=QUERIES, self_influence=True)
    scores, ids = influence.scores["TracInCP"], sorted(number(k) for k in range(14))
    assert scores.train_ids.tolist() == ids
    want = expected(module, influence.trajectory, module.seen, ids, Keyed())
    oracles.assert_scores(scores.values, want, 1e-10)
    offline = Attributor(module, DataLoader(Numbered(), 4), Trajectory.load(tmp_path), lookup=by_number())
    for data in (None, Numbered()):
        again = Attributor(module, data, Trajectory.load(tmp_path), lookup=by_number()).score(TracInCP(), QUERIES)
        oracles.assert_scores(again.values, want, 1e-10)
    group = [ids[3], ids[0]]
    oracles.assert_scores(offline.group(TracInCP(), group, QUERIES)[None], want[:, [3, 0]].sum(1)[None], 1e-10)
    own = offline.self_influence(TracInCP())
    assert own.train_ids.tolist() == influence.self_scores["TracInCP"].train_ids.tolist() == ids
    asked = offline.score(GradientDot(), "train")
    assert asked.query_ids.tolist() == asked.train_ids.tolist() == ids
    assert scores.at_hand[0][ids[2]]["idx"] == ids[2]
    assert "1000000000000" in str(scores.proponents(14).train_ids.tolist())


def test_replays_of_a_stream_are_those_of_the_same_examples_in_a_dataset(tmp_path):
    influence, module = streamed(tmp_path / "stream")
    ids = sorted(number(k) for k in range(14))
    order = [(i * 5) % 14 for i in range(14)]
    plain, twin = Influence(dirpath=tmp_path / "plain"), seeded(Double)
    fit(twin, DataLoader(Indexed(14), 4, sampler=order), plain)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    for method in (HyDRA(), TracIn(), InfluenceFunction(ConjugateGradient()), SOURCE(segments=2)):
        found = influence.attributor.score(method, QUERIES)
        assert found.train_ids.tolist() == ids
        oracles.assert_scores(found.values, plain.attributor.score(method, QUERIES).values, 1e-7)


def test_only_the_examples_that_were_trained_on_have_scores(tmp_path):
    influence, module = Influence(dirpath=tmp_path, sample_id="idx", lookup=by_number()), seeded(Double)
    fit(module, DataLoader(Numbered(), 4), influence, limit_train_batches=2, max_epochs=1)
    scores = influence.attributor.score(TracInCP(), QUERIES)
    assert scores.train_ids.tolist() == sorted(i for micro in module.seen for i in micro)
    with pytest.raises(ValueError, match="`ids` that the fit recorded, got"):
        influence.attributor.group(TracInCP(), [3], QUERIES)


def test_a_stream_without_a_lookup_is_recorded_and_the_refusal_names_it(tmp_path):
    with pytest.warns(UserWarning, match=r"Scores were not computed.*`lookup=`"):
        influence, module = streamed(tmp_path, lookup=None, methods=[TracInCP()], queries=QUERIES)
    assert recorded(influence.trajectory) == module.seen
    with pytest.raises(TypeError, match=r"`Influence\(sample_id=\)`, `lookup=`"):
        Attributor(module, DataLoader(Numbered(), 4), influence.trajectory)


@pytest.mark.filterwarnings("ignore:`Influence` does not know which")
def test_a_lookup_without_ids_is_refused(tmp_path):
    influence, module = streamed(tmp_path, sample_id=None)
    with pytest.raises(MissingEvidence, match=r"Fit with `Influence\(sample_id=...\)`"):
        _ = influence.attributor
    with pytest.raises(MissingEvidence, match=r"Pass `trajectory=Trajectory.load\(dirpath\)`"):
        Attributor(module, None, lookup=by_number())


def test_what_needs_indices_is_refused_on_a_stream(tmp_path):
    influence, module = streamed(tmp_path)
    for method in (HyDRA(examples=(3,)), HyDRA(mode="during_fit")):
        with pytest.raises(ValueError, match="Leave `examples=` out"):
            influence.attributor.score(method, QUERIES)
    with pytest.raises(ValueError, match="Expected no `refit` with `lookup=`"):
        Attributor(module, None, influence.trajectory, lookup=by_number(), refit=Refit())
    wrong = Attributor(module, None, influence.trajectory, lookup={}.__getitem__)
    with pytest.raises(ValueError, match=r"`lookup` to return the training example of id 10.*KeyError"):
        wrong.score(TracInCP(), QUERIES)
    with pytest.raises(TypeError, match="`lookup` to be a function or None, got 3"):
        Influence(lookup=3)


# ---- several loaders ------------------------------------------------------------------------------------------------


class Parts(Double):
    def training_step(self, batch, batch_idx, dataloader_idx=0):
        parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else [batch]
        found = dict(zip(batch, parts, strict=True)) if isinstance(batch, dict) else dict(enumerate(parts))
        self.seen.append({key: part["idx"].tolist() for key, part in found.items() if part is not None})
        return sum(self.loss(part) for part in found.values() if part is not None)


MODES = ["max_size_cycle", "min_size", "max_size"]


def squared(module, batch):
    return (module.layer(batch["x"].double()) - batch["y"].double()).square()[:, 0]


def few_and_many(workers=0):
    return loader(Indexed(7), 2, num_workers=workers), loader(num_workers=workers)


@pytest.mark.parametrize("mode", MODES)
def test_one_of_several_loaders_is_scored(mode, tmp_path):
    influence, module = Influence(dirpath=tmp_path), seeded(Parts)
    few, many = few_and_many()
    fit(module, CombinedLoader({"a": few, "b": many}, mode), influence)
    for k, (key, data) in enumerate({"a": Indexed(7), "b": Indexed()}.items()):
        trajectory = influence.trajectory.of_loader(k)
        seen = [batch.get(key, []) for batch in module.seen]
        assert recorded(trajectory) == seen
        attributor = Attributor(module, data, trajectory, loss=squared)
        want = expected(module, trajectory, seen, list(range(len(data))), data, loss=squared)
        oracles.assert_scores(attributor.score(TracInCP(), QUERIES).values, want, 1e-10)


def test_scores_of_combined_loaders_are_refused_by_name(tmp_path):
    influence, module = Influence([TracInCP()], queries=QUERIES, dirpath=tmp_path), seeded(Parts)
    with pytest.warns(UserWarning, match=r"Scores were not computed.*for several loaders.*`loss="):
        fit(module, list(few_and_many()), influence)
    attributor = Attributor(module, Indexed(), influence.trajectory, loss=squared)
    with pytest.raises(MissingEvidence, match=r"Choose one: `trajectory.of_loader\(0\)`"):
        attributor.score(TracInCP(), QUERIES)
    for wrong in (2, -1, "a", True):
        with pytest.raises(ValueError, match=r"of a fit with 2 loaders\. Count them from 0"):
            influence.trajectory.of_loader(wrong)


def test_a_fit_with_one_loader_has_no_other(tmp_path):
    influence = Influence(dirpath=tmp_path)
    fit(seeded(Net), loader(), influence)
    with pytest.raises(ValueError, match="got 0 of a fit with one loader"):
        influence.trajectory.of_loader(0)


NESTS = {"list": list, "tuple": tuple, "nested": lambda made: {"a": made[0], "b": [made[1]]}}


@pytest.mark.parametrize("make", NESTS.values(), ids=NESTS)
def test_any_nest_of_loaders_is_recorded(make, tmp_path):
    class Nested(Parts):
        def training_step(self, batch, batch_idx):
            first, second = (batch["a"], batch["b"][0]) if isinstance(batch, dict) else batch
            return super().training_step([first, second], batch_idx)

    influence, module = Influence(dirpath=tmp_path), seeded(Nested)
    fit(module, make(few_and_many()), influence)
    for k in (0, 1):
        assert recorded(influence.trajectory.of_loader(k)) == [batch.get(k, []) for batch in module.seen]


# ---- a dataset that is given lists of indices -----------------------------------------------------------------------


class Lists(Dataset):
    """Reads many examples at once, and only so."""

    def __init__(self, n=23, noise=0.0):
        self.data, self.noise = Indexed(n), noise

    def __len__(self):
        return len(self.data)

    def __getitem__(self, ids):
        assert isinstance(ids, list)
        x = self.data.x[ids]
        x = x + self.noise * torch.randn_like(x) if self.noise else x
        return {"x": x, "y": self.data.y[ids], "idx": torch.tensor(ids)}


def in_lists(workers=0, **options):
    sampler = BatchSampler(RandomSampler(range(23)), 4, False)
    return DataLoader(Lists(**options), sampler=sampler, batch_size=None, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_lists_of_indices_are_scored(workers, tmp_path):
    influence, module = Influence([TracInCP(), HyDRA()], queries=QUERIES, dirpath=tmp_path), seeded(Double)
    fit(module, in_lists(workers), influence)
    trajectory = influence.trajectory
    assert recorded(trajectory) == module.seen
    assert trajectory.dataset_size == 23
    want = expected(module, trajectory, module.seen, list(range(23)), Indexed())
    oracles.assert_scores(influence.scores["TracInCP"].values, want, 1e-10)
    plain = Attributor(module, loader(), trajectory)
    oracles.assert_scores(influence.scores["HyDRA"].values, plain.score(HyDRA(), QUERIES).values, 1e-10)
    assert Attributor(module, in_lists(), trajectory).score(GradientDot(), in_lists()).values.shape == (23, 23)


def test_random_lists_are_refused(tmp_path):
    influence, module = Influence(dirpath=tmp_path), seeded(Double)
    fit(module, in_lists(noise=0.1), influence)
    with pytest.raises(ValueError, match="without augmentation"):
        influence.attributor.score(TracInCP(), QUERIES)


# ---- sparse batches -------------------------------------------------------------------------------------------------


class Compressed(Double):
    def loss(self, batch):
        x = batch["x"]
        return super().loss({"x": x.to_dense() if x.layout is torch.sparse_csr else x, "y": batch["y"]})


def compressed(items):
    batch = default_collate(items)
    return batch | {"x": batch["x"].to_sparse_csr()}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_batches_in_compressed_rows_are_scored(tmp_path):
    influence, module = Influence([TracInCP()], queries=QUERIES, dirpath=tmp_path), seeded(Compressed)
    fit(module, DataLoader(Indexed(), 4, collate_fn=compressed), influence)
    want = expected(module, influence.trajectory, module.seen, list(range(23)), Indexed())
    oracles.assert_scores(influence.scores["TracInCP"].values, want, 1e-10)


# ---- handles that workers open --------------------------------------------------------------------------------------


class Handled(Indexed):
    handle = None

    def __getitem__(self, i):
        return self.handle[i] if self.handle is None else super().__getitem__(i)


def opens(worker):
    torch.utils.data.get_worker_info().dataset.handle = True


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_handle_that_workers_open_is_named(batch_size, tmp_path):
    influence, module = Influence(dirpath=tmp_path), seeded(Double)
    made = loader(Handled(), num_workers=1, worker_init_fn=opens)
    fit(module, made, influence)
    assert recorded(influence.trajectory) == module.seen
    attributor = Attributor(module, made, influence.trajectory, batch_size=batch_size)
    with pytest.raises(ValueError, match=r"`worker_init_fn`.*Open it in `__getitem__`.*`Attributor\(train=\)`"):
        attributor.score(TracInCP(), QUERIES)
    assert Attributor(module, Indexed(), influence.trajectory).score(TracInCP(), QUERIES).values.shape == (3, 23)


# ---- checkpoints that are removed -----------------------------------------------------------------------------------


def kept(tmp_path, keep_last, epochs=6, **options):
    influence, module = Influence(dirpath=tmp_path, keep_last=keep_last, **options), seeded(Double)
    fit(module, loader(), influence, max_epochs=epochs)
    return influence, module


@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_the_newest_checkpoints_are_kept_with_their_own_spans(keep_last, tmp_path):
    influence, module = kept(tmp_path, keep_last)
    trajectory = influence.trajectory
    steps = [6 * epoch for epoch in range(6 - keep_last + 1, 7)]
    assert [c.step for c in trajectory.checkpoints] == [0, *steps]
    files = sorted(path.name for path in (influence.run_dir / "checkpoints").iterdir())
    assert files == [f"step-{step:08d}.pt" for step in (0, *steps)]
    points = list(zip([step - 6 for step in steps], trajectory.checkpoints[1:], strict=True))
    want = expected(module, trajectory, module.seen, list(range(23)), Indexed(), points)
    scores = influence.attributor.score(TracInCP(), QUERIES)
    oracles.assert_scores(scores.values, want, 1e-10)
    assert any(f"count steps {steps[0] - 5} to 36 only" in note for note in scores.notes)


def test_replays_need_only_the_initial_checkpoint(tmp_path):
    some, _ = kept(tmp_path / "some", 1)
    every, _ = kept(tmp_path / "all", None)
    for method in (HyDRA(), TracIn(), GradientDot()):
        found, want = (each.attributor.score(method, QUERIES).values for each in (some, every))
        oracles.assert_scores(found, want, 1e-10)
    with pytest.raises(MissingEvidence, match="Fit without `keep_last=`"):
        some.attributor.score(SOURCE(), QUERIES)
    assert not [note for note in every.trajectory.notes if "removed" in note]


@pytest.mark.parametrize("options", [{"every_n_train_steps": 4}, {"every_n_epochs": 4}, {"every_n_epochs": 0}])
def test_other_schedules_keep_the_final_weights(options, tmp_path):
    influence, module = kept(tmp_path, 2, **options)
    trajectory = influence.trajectory
    assert trajectory.checkpoints[0].step == 0
    assert trajectory.checkpoints[-1].step == 36
    assert torch.equal(trajectory.checkpoints[-1].load().parameters["layer.weight"], module.layer.weight.detach())
    assert len(list((influence.run_dir / "checkpoints").iterdir())) == len(trajectory.checkpoints) <= 3


def test_whenever_a_fit_is_killed_its_manifest_lists_whole_files(tmp_path, monkeypatch):
    """After every single change of the folder, what can be loaded loads."""
    looked, unlink, write = [], Path.unlink, store.write_atomically

    def look():
        if (tmp_path / "run-0" / "manifest.json").exists():
            looked.append([c.load() and c.step for c in Trajectory.load(tmp_path).checkpoints])

    def unlinks(path, *args, **kwargs):
        look()
        unlink(path, *args, **kwargs)
        look()

    def writes(*args, **kwargs):
        look()
        entry = write(*args, **kwargs)
        look()
        return entry

    monkeypatch.setattr(Path, "unlink", unlinks)
    monkeypatch.setattr(store, "write_atomically", writes)
    kept(tmp_path, 2)
    assert [0, 12, 18] in looked
    assert looked[-1] == [0, 30, 36]


class SavesAt(pl.Callback):
    """A checkpoint of the user's after some epochs."""

    def __init__(self, epoch, path):
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_fit_keeps_what_its_parent_kept(tmp_path):
    first = Influence(dirpath=tmp_path, keep_last=2)
    fit(seeded(Double), loader(), SavesAt(3, tmp_path / "x.ckpt"), first, max_epochs=6)
    second = Influence(dirpath=tmp_path, keep_last=2)
    fit(seeded(Double), loader(), second, max_epochs=8, ckpt_path=tmp_path / "x.ckpt")
    trajectory = second.trajectory
    assert [c.step for c in first.trajectory.checkpoints] == [0, 30, 36]
    assert all(c.load() for c in trajectory.checkpoints)
    assert len(trajectory.steps) == 48
    spans = [trajectory.exposure(i, "mean", 23).sum().item() for i in range(1, len(trajectory.checkpoints))]
    assert spans == pytest.approx([0.1 * 6] * len(spans))


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_a_wrong_number_to_keep_is_refused(wrong):
    with pytest.raises(ValueError, match="`keep_last` to be a positive integer or None"):
        Influence(keep_last=wrong)
