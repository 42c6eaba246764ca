"""Failures that must help: errors of data, wrong arguments and interruptions name the cause, the value, the way out."""

import copy
import pickle
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lightning_influence import Attributor, GradientDot, Influence, MissingEvidence, Refit, TracInCP, Trajectory
from lightning_influence.data.examples import Examples


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=draw), torch.arange(n) % 3)


TRAIN, QUERIES = data(24), data(7, seed=1)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TRAIN, 6)

    def val_dataloader(self):
        return DataLoader(QUERIES, 4)


def fit(influence, loader=None, net=None):
    net = net or Net()
    trainer = pl.Trainer(**QUIET, max_epochs=1, callbacks=[influence])
    trainer.fit(net, loader or DataLoader(TRAIN, 6))
    return net, trainer


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    torch.manual_seed(0)
    influence = Influence(dirpath=tmp_path_factory.mktemp("run"))
    return fit(influence)[0], influence


# ---- data -----------------------------------------------------------------------------------------------------------


def dropping(*bad, none=False):
    """A collate function that leaves out some examples of TRAIN."""

    def collate(items):
        items = [(x, y) for x, y in items if not any(torch.equal(x, TRAIN[i][0]) for i in bad)]
        return None if none and not items else default_collate(items)

    return collate


@pytest.mark.parametrize("none", [False, True], ids=["an error without examples", "None without examples"])
@pytest.mark.parametrize("bad", [(0,), (23,), (5, 6, 7)], ids=str)
def test_examples_that_the_collate_function_drops_are_named(bad, none):
    loader = DataLoader(TRAIN, 6, collate_fn=dropping(*bad, none=none))
    named = rf"`collate_fn` of `train` .* drops examples? {', '.join(map(str, bad))}\. Leave them out .*`Subset\("
    with pytest.raises(ValueError, match=named):
        Attributor(Net(), train=loader).score(GradientDot(), queries=QUERIES)
    named = named.replace("train", "queries").replace("Leave them out .*", "Pass ")
    with pytest.raises(ValueError, match=named):
        Attributor(Net(), train=TRAIN).score(GradientDot(), queries=loader)


def test_an_example_that_is_dropped_among_many_is_found_where_its_block_is_read():
    everything = data(700)
    loader = DataLoader(
        everything,
        6,
        num_workers=1,
        collate_fn=lambda items: default_collate([i for i in items if not torch.equal(i[0], everything[637][0])]),
    )
    with pytest.raises(ValueError, match=r"^Expected the `collate_fn` of `train` .* drops example 637\."):
        Attributor(Net(), train=loader, batch_size=50).score(GradientDot(), queries=QUERIES)


def test_a_collate_function_that_fails_for_another_reason_is_not_said_to_drop_examples():
    def wrong(items):
        raise KeyError("colour")

    with pytest.raises(KeyError, match="colour"):
        Attributor(Net(), train=DataLoader(TRAIN, 6, collate_fn=wrong)).score(GradientDot(), queries=QUERIES)


def test_batches_of_another_layout_are_collated_once():
    calls = []

    def time_first(items):
        calls.append(len(items))
        return torch.stack([x for x, _ in items], 1)

    examples = Examples(TRAIN, time_first, 8)
    assert [block.batch.shape for block in examples.blocks()] == [(4, 8)] * 3
    assert calls == [8, 1] * 3  # and once with one example, since 4 rows may be 4 examples


class Unreadable(Dataset):
    def __init__(self, examples, wrong):
        self.examples, self.wrong = examples, wrong

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        if i == self.wrong:
            raise OSError("cannot read file")
        return self.examples[i]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("wrong", [0, 7, 23])
def test_an_error_of_the_dataset_names_the_example(wrong, workers):
    broken = DataLoader(Unreadable(TRAIN, wrong), 6, num_workers=workers)
    said = rf"^Expected `train\[{wrong}\]` .* got OSError from Unreadable: cannot read file\. Make it readable"
    with pytest.raises(ValueError, match=said):
        Attributor(Net(), train=broken, batch_size=5).score(GradientDot(), queries=QUERIES)
    with pytest.raises(ValueError, match=said.replace("train", "queries")):
        Attributor(Net(), train=TRAIN, batch_size=5).score(GradientDot(), queries=broken)


def test_a_query_of_another_dtype_is_shown_with_it():
    queries = TensorDataset(QUERIES.tensors[0], QUERIES.tensors[1])
    with pytest.raises(
        ValueError, match=r"as a batch of one: \[\(1, 4\) float64, .* got \[\(1, 4\) float32, \(1,\) int64"
    ):
        Attributor(Net().double(), train=TensorDataset(TRAIN.tensors[0].double(), TRAIN.tensors[1])).score(
            GradientDot(), queries=queries
        )


# ---- wrong arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"module": None}, "Expected `module` .* got None. Pass an instance"),
        ({"module": Net}, "Expected `module` .* got <class .*Net'>. Pass an instance"),
        ({"trajectory": "runs"}, r"Expected `trajectory` .* got 'runs'. Pass `Trajectory.load\('runs'\)`"),
        ({"trajectory": Path("runs")}, r"got PosixPath.* Pass `Trajectory.load\('runs'\)`"),
        ({"trajectory": 5}, r"Expected `trajectory` .* got 5. Pass `Trajectory.load\(influence.run_dir\)`"),
        ({"trainer": 5}, "Expected `trainer` to be a Trainer or None, got 5"),
        ({"trainer": pl.Trainer}, "Expected `trainer` to be a Trainer or None, got <class"),
        ({"refit": 5}, r"Expected `refit` to be a Refit or None, got 5. Pass `Refit\(\)`"),
        ({"refit": Refit}, r"Expected `refit` to be a Refit or None, got <class"),
        ({"loss": "x"}, "Expected `loss` to be a function or None, got 'x'"),
        ({"train": "x"}, "Expected `train` to be a Dataset or a DataLoader, got 'x'"),
        ({"train": TensorDataset}, "Expected `train` to be a Dataset or a DataLoader, got the class `TensorDataset`"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_an_attributor_names_a_wrong_argument(fitted, wrong, said):
    given = {"module": Net(), "train": TRAIN, "trajectory": fitted[1].trajectory} | wrong
    with pytest.raises(TypeError, match=said):
        Attributor(**given)


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"queries": None}, TypeError, "Expected `queries` .* got None. Pass an object with examples"),
        ({"queries": "foo"}, ValueError, "Expected `queries` .* got 'foo'. Pass data, or one of these names"),
        ({"queries": "val:x"}, ValueError, "Expected `queries` .* got 'val:x'. Pass data, or one of these names"),
        ({"measurement": 3}, TypeError, "Expected `measurement` to be a function or None, got 3"),
        ({"path": 5}, TypeError, "Expected `path` to be a path, got 5. Pass the file"),
        ({"path": ""}, ValueError, "Expected `path` to be a path, got ''. Pass the file"),
    ],
    ids=str,
)
@pytest.mark.parametrize("by", ["train", "datamodule"])
def test_a_question_names_a_wrong_argument(wrong, error, said, by):
    given = {"train": TRAIN} if by == "train" else {"datamodule": Data()}
    with pytest.raises(error, match=said):
        Attributor(Net(), **given).score(GradientDot(), **{"queries": QUERIES} | wrong)


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"dirpath": 3}, TypeError, "Expected `dirpath` to be a path, got 3. Pass a folder"),
        ({"dirpath": ""}, ValueError, "Expected `dirpath` to be a path, got ''. Pass a folder"),
        ({"queries": TensorDataset}, TypeError, "Expected `queries` .* got the class `TensorDataset`. Pass an object"),
        ({"methods": None}, TypeError, r"got None. Write `\[TracInCP\(\)\]` or, to only record, `\[\]`"),
        ({"methods": TracInCP}, TypeError, r"Write `\[TracInCP\(\)\]`\.$"),
        ({"methods": "TracInCP"}, TypeError, r"Write `\[TracInCP\(\)\]`\.$"),
        ({"methods": GradientDot()}, TypeError, r"Write `\[GradientDot\(.*\)\]`\.$"),
    ],
    ids=str,
)
def test_the_callback_names_a_wrong_argument(wrong, error, said):
    with pytest.raises(error, match=said):
        Influence(**wrong)


@pytest.mark.parametrize("wrong", [None, 5, ["runs"]], ids=str)
def test_loading_a_run_from_no_path_is_refused(wrong):
    with pytest.raises(TypeError, match=r"Expected `dirpath` to be a path, got .* Pass `influence.run_dir`"):
        Trajectory.load(wrong)


# ---- the callback after its fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
def test_a_copy_of_the_callback_says_how_to_ask_further(fitted, again):
    copied = again(fitted[1])
    with pytest.raises(
        MissingEvidence, match=r"got a copy of it.*`Attributor\(model, train=.*influence\.trajectory\)`"
    ):
        _ = copied.attributor
    assert Attributor(Net(), train=DataLoader(TRAIN, 6), trajectory=copied.trajectory) is not None


def test_questions_leave_the_trainer_of_a_datamodule_as_it_was():
    seen = []

    class Watching(Data):
        def setup(self, stage):
            seen.append(self.trainer)

    datamodule = Watching()
    attributor = Attributor(Net(), datamodule=datamodule)
    for _ in range(2):
        attributor.score(GradientDot(), queries="val")
        assert datamodule.trainer is None
    assert len(seen) == 1
    assert seen[0] is not None
