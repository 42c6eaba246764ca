"""What a later process passes for what stood between the data and the step in the fit: the same, or something else."""

from dataclasses import dataclass
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from case import Case, Items, Step, both, drawn, mlp
from fits import QUIET
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, default_collate, random_split

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
DATA = both(5)
TRAIN, QUERIES = DATA["train"], DATA["queries"]


def changed(batch):
    """A fixed normalisation, large enough to matter."""
    return [3 * batch[0] - 1, *batch[1:]]


def same(batch):
    return batch


def loader(data=None, **options):
    return DataLoader(TRAIN() if data is None else data, 3, **options)


def offline(name, later, says=(), make=lambda: Step(mlp()), **fields):
    fields = {"train": TRAIN, "queries": QUERIES, "fit_with": loader, **fields}
    return Case(name, make, expected="refused" if says else "right", says=says, later=later, **fields)


# ---- collate functions ----------------------------------------------------------------------------------------------


def normalising(items):
    return changed(default_collate(items))


class Scaling:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, items):
        x, y = default_collate(items)
        return [self.factor * x, y]


def swapped(items):
    x, y = default_collate(items)
    return [y, x]


class Swapped(Step):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[1]), batch[0])


def sorted_by_size(items):
    return default_collate(sorted(items, key=lambda item: float(item[0].norm())))


def one_hot(items):
    x, y = default_collate(items)
    return [x, F.one_hot(y, 3).double()]


def words(seed, n=8):
    """Dicts of token ids of other lengths, with a class."""
    g = drawn(seed)
    lengths = torch.randint(2, 6, (n,), generator=g).tolist()
    return Items(
        [{"ids": torch.randint(1, 9, (k,), generator=g), "y": torch.randint(3, (), generator=g)} for k in lengths]
    )


def padded(items):
    ids = nn.utils.rnn.pad_sequence([item["ids"] for item in items], batch_first=True)
    return {"ids": ids, "mask": ids != 0, "y": torch.stack([item["y"] for item in items])}


def cropped(items):
    return {name: value[:, :2] if value.dim() > 1 else value for name, value in padded(items).items()}


class Words(Step):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Tanh()))
        self.head = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        mask = batch["mask"][..., None].double()
        mean = (self.net(batch["ids"]) * mask).sum(1) / mask.sum(1)
        return self.loss(self.head(mean), batch["y"])


TEXT = {"make": Words, "train": lambda: words(1), "queries": lambda: words(2), "collate": padded}


@dataclass
class Pairs:
    x: torch.Tensor
    y: torch.Tensor
    names: list


class NamedPairs(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Graphs:
    """Nodes of all graphs in one tensor, as graph libraries batch them; moves itself to a device."""

    def __init__(self, nodes, graph, y):
        self.nodes, self.graph, self.y = nodes, graph, y

    def to(self, device):
        return Graphs(self.nodes.to(device), self.graph.to(device), self.y.to(device))


def as_dataclass(items):
    return Pairs(*default_collate(items), [f"item {float(x[0]):.3f}" for x, _ in items])


def as_tuple(items):
    return NamedPairs(*default_collate(items))


def as_graphs(items):
    counts = torch.tensor([1 + int(y) for _, y in items])
    nodes = torch.cat([x.repeat(int(k), 1) * torch.arange(1, int(k) + 1)[:, None] for (x, _), k in zip(items, counts)])
    graph = torch.repeat_interleave(torch.arange(len(items)), counts)
    return Graphs(nodes, graph, torch.stack([y for _, y in items]))


def scaled_graphs(items):
    batch = as_graphs(items)
    return Graphs(2 * batch.nodes, batch.graph, batch.y)


class Attributes(Step):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch.x), batch.y)


class OnGraphs(Step):
    def training_step(self, batch, batch_idx):
        out = self.net(batch.nodes)
        pooled = torch.zeros(len(batch.y), out.shape[1], dtype=out.dtype).index_add(0, batch.graph, out)
        return self.loss(pooled, batch.y)


# ---- hooks ----------------------------------------------------------------------------------------------------------


class Hooked:
    """One batch-transfer hook with a change of the batch, for a DataModule or a LightningModule."""

    hook, change = None, staticmethod(changed)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        return self.change(batch) if self.hook == HOOKS[0] else batch

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return self.change(batch) if self.hook == HOOKS[1] else batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return self.change(batch) if self.hook == HOOKS[2] else batch


class Plain(pl.LightningDataModule):
    collate = None

    def train_dataloader(self):
        return loader(collate_fn=self.collate)


class HookedData(Hooked, Plain):
    def __init__(self, hook, change=changed):
        super().__init__()
        self.hook, self.change = hook, change


class HookedStep(Hooked, Step):
    def __init__(self, hook, change=changed):
        super().__init__(mlp())
        self.hook, self.change = hook, change


class OnlyAfter(Plain):
    """Only where the Trainer says that it trains."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return changed(batch) if self.trainer.training else batch


class AllHooks(Plain):
    """In another order they give another batch."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return [(batch[0] * 2).to(device), batch[1].to(device)]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] - 3, batch[1]]


def as_all_hooks(batch):
    return [(batch[0] + 1) * 2 - 3, batch[1]]


class Collating(Plain):
    collate = staticmethod(normalising)


class Splits(Plain):
    """Splits when it is set up; without a seed in another way each time."""

    def __init__(self, seed=None):
        super().__init__()
        self.seed = seed

    def setup(self, stage):
        generator = None if self.seed is None else drawn(self.seed)
        self.part, _ = random_split(many(), [8, 16], generator=generator)

    def train_dataloader(self):
        return loader(self.part)


def noisy_in_training(batch):
    return [batch[0] + torch.randn_like(batch[0]), batch[1]]


class NoisyInTraining(Step):
    """Augments on the device, as kornia's users do."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return noisy_in_training(batch) if self.training else batch


# ---- datasets -------------------------------------------------------------------------------------------------------


def many(n=24):
    return both(5, n=n)["train"]()


class Augmented(Dataset):
    """Adds noise while ``on``; from a generator of its own where ``own``."""

    def __init__(self, on, own=False):
        self.items, self.on = TRAIN().items, on
        self.own = drawn(7) if own else None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        x, y = self.items[i]
        return (x + torch.randn(x.shape, generator=self.own, dtype=x.dtype) if self.on else x), y


def edited(change):
    """The training data with each item changed by its index."""
    return lambda: Items([change(i, x, y) for i, (x, y) in enumerate(TRAIN().items)])


def flipped(i, x, y):
    return x, (y + 1) % 3 if i % 2 == 0 else y


def shifted(i, x, y):
    return x + 0.5 * (i < 3), y


def split(seed):
    return random_split(many(), [8, 16], generator=drawn(seed))[0]


def with_files(root):
    items = [(x, y, f"{root}/{i}.png") for i, (x, y) in enumerate(TRAIN().items)]
    return Items(items)


class IgnoresFiles(Step):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])


class ReadsFiles(Step):
    def training_step(self, batch, batch_idx):
        shift = torch.tensor([len(name) / 10 for name in batch[2]], dtype=batch[0].dtype)[:, None]
        return self.loss(self.net(batch[0] + shift), batch[1])


def fitted_trainer(datamodule):
    trainer = pl.Trainer(**QUIET, max_steps=1)
    trainer.fit(Step(mlp()).double(), datamodule)
    return trainer


# ---- modules --------------------------------------------------------------------------------------------------------


class Arguments(Step):
    def __init__(self, smoothing=0.0, dropout=0.0, weight=1.0, seen=0.0):
        super().__init__(nn.Sequential(*mlp(), nn.Dropout(dropout)))
        self.smoothing, self.weight, self.seen = smoothing, weight, seen

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0]) + self.seen * self.current_epoch
        return self.weight * F.cross_entropy(
            out * (1 + self.seen * self.global_step), batch[1], label_smoothing=self.smoothing
        )


_GRAPHS = {"make": lambda: OnGraphs(mlp()), "collate": as_graphs}

COLLATE = [
    offline(
        "later: a normalising collate function absent",
        lambda: {"train": TRAIN()},
        ("The fit's loader collated with `cases_offline.normalising`", "Pass the training loader as `train=`"),
        fit_with=lambda: loader(collate_fn=normalising),
    ),
    offline(
        "later: a loader with the normalising collate function",
        lambda: {"train": loader(collate_fn=normalising)},
        fit_with=lambda: loader(collate_fn=normalising),
        collate=normalising,
    ),
    offline(
        "later: a collate object with another factor",
        lambda: {"train": loader(collate_fn=Scaling(2.0))},
        ("Expected `train` to give the batches that were trained on", "batch[0]"),
        fit_with=lambda: loader(collate_fn=Scaling(3.0)),
    ),
    offline(
        "later: a normalising collate function added",
        lambda: {"train": loader(collate_fn=normalising)},
        ("here it is `cases_offline.normalising`",),
    ),
    offline(
        "later: a collate function that swaps its columns absent",
        lambda: {"train": TRAIN()},
        ("collated with `cases_offline.swapped`",),
        make=lambda: Swapped(mlp()),
        fit_with=lambda: loader(collate_fn=swapped),
    ),
    offline(
        "later: one-hot targets from the collate function absent",
        lambda: {"train": TRAIN()},
        ("collated with `cases_offline.one_hot`", "float64 in the fit"),
        fit_with=lambda: loader(collate_fn=one_hot),
    ),
    offline(
        "later: a collate function that sorts its examples",
        lambda: {"train": loader(collate_fn=sorted_by_size)},
        fit_with=lambda: loader(collate_fn=sorted_by_size),
    ),
    offline(
        "later: padded batches from their loader",
        lambda: {"train": loader(words(1), collate_fn=padded)},
        fit_with=lambda: loader(words(1), collate_fn=padded),
        **TEXT,
    ),
    offline(
        "later: padded batches without their loader",
        lambda: {"train": words(1)},
        ("collated with `cases_offline.padded`", "Pass the training loader as `train=`"),
        fit_with=lambda: loader(words(1), collate_fn=padded),
        **TEXT,
    ),
    offline(
        "later: padded batches that are cropped",
        lambda: {"train": loader(words(1), collate_fn=cropped)},
        ("collated with `cases_offline.padded`",),
        fit_with=lambda: loader(words(1), collate_fn=padded),
        **TEXT,
    ),
    offline(
        "later: batches as a dataclass from their loader",
        lambda: {"train": loader(collate_fn=as_dataclass)},
        make=lambda: Attributes(mlp()),
        fit_with=lambda: loader(collate_fn=as_dataclass),
        collate=as_dataclass,
    ),
    offline(
        "later: batches as a dataclass, data in another order",
        lambda: {"train": loader(Subset(TRAIN(), [1, 0, *range(2, 8)]), collate_fn=as_dataclass)},
        ("Example 1 of the fit is at index 0 here",),
        make=lambda: Attributes(mlp()),
        fit_with=lambda: loader(collate_fn=as_dataclass),
        collate=as_dataclass,
    ),
    offline(
        "later: batches as a named tuple from their loader",
        lambda: {"train": loader(collate_fn=as_tuple)},
        make=lambda: Attributes(mlp()),
        fit_with=lambda: loader(collate_fn=as_tuple),
        collate=as_tuple,
    ),
    offline(
        "later: graphs in one batch from their loader",
        lambda: {"train": loader(collate_fn=as_graphs)},
        fit_with=lambda: loader(collate_fn=as_graphs),
        **_GRAPHS,
    ),
    offline(
        "later: graphs in one batch with other features",
        lambda: {"train": loader(collate_fn=scaled_graphs)},
        ("`batch.nodes` has other values", "collated with `cases_offline.as_graphs`"),
        fit_with=lambda: loader(collate_fn=as_graphs),
        **_GRAPHS,
    ),
    offline(
        "later: graphs in another order",
        lambda: {"train": loader(Subset(TRAIN(), [7, *range(1, 7), 0]), collate_fn=as_graphs)},
        ("Expected `train` to give the batches that were trained on",),
        fit_with=lambda: loader(collate_fn=as_graphs),
        **_GRAPHS,
    ),
]

DATAMODULES = [
    *(
        offline(
            f"later: a DataModule's `{hook}` absent",
            lambda: {"train": TRAIN()},
            (f"`{hook}` of `HookedData`", "Pass `datamodule=`"),
            fit_with=lambda hook=hook: HookedData(hook),
        )
        for hook in HOOKS
    ),
    *(
        offline(
            f"later: a DataModule with `{hook}`",
            lambda hook=hook: {"datamodule": HookedData(hook)},
            fit_with=lambda hook=hook: HookedData(hook),
            entering=changed,
        )
        for hook in HOOKS
    ),
    *(
        offline(
            f"later: the module's own `{hook}`",
            lambda: {"train": TRAIN()},
            make=lambda hook=hook: HookedStep(hook),
            entering=changed if hook == HOOKS[1] else None,  # brute force calls the module's other two itself
        )
        for hook in HOOKS
    ),
    offline(
        "later: the module's own `on_after_batch_transfer` absent",
        lambda: {"train": TRAIN()},
        ("`on_after_batch_transfer` of `HookedStep`", "Pass the module that was trained"),
        make=lambda: HookedStep(HOOKS[2]),
        make_later=lambda: Step(mlp()),
    ),
    offline(
        "later: a DataModule beside the Dataset",
        lambda: {"train": TRAIN(), "datamodule": HookedData(HOOKS[2])},
        fit_with=lambda: HookedData(HOOKS[2]),
        entering=changed,
    ),
    offline(
        "later: the hook of a DataModule that reads the Trainer's stage",
        lambda: {"datamodule": OnlyAfter()},
        fit_with=OnlyAfter,
        entering=changed,
    ),
    offline(
        "later: all three hooks of a DataModule",
        lambda: {"datamodule": AllHooks()},
        fit_with=AllHooks,
        entering=as_all_hooks,
    ),
    offline(
        "later: a DataModule's hook with other arguments",
        lambda: {"datamodule": HookedData(HOOKS[2], same)},
        ("The loader gives the same batch",),
        fit_with=lambda: HookedData(HOOKS[2]),
    ),
    offline(
        "later: a Trainer that was fitted with the DataModule",
        lambda: {"trainer": fitted_trainer(AllHooks())},
        fit_with=AllHooks,
        entering=as_all_hooks,
    ),
    offline(
        "later: a DataModule's collate function absent",
        lambda: {"train": TRAIN()},
        ("collated with `cases_offline.normalising`", "Pass `datamodule=`"),
        fit_with=Collating,
    ),
    offline(
        "later: a Dataset beside a DataModule with a collate function",
        lambda: {"train": TRAIN(), "datamodule": Collating()},
        fit_with=Collating,
        collate=normalising,
    ),
    offline(
        "later: a DataModule that splits without a seed",
        lambda: {"datamodule": Splits()},
        ("Subset: `random_split` draws other parts",),
        fit_with=Splits,
    ),
    offline(
        "later: a DataModule that splits with a seed",
        lambda: {"datamodule": Splits(3)},
        fit_with=lambda: Splits(3),
        train=lambda: split(3),
    ),
    offline(
        "later: random augmentation in the module's transfer hook",
        lambda: {"train": TRAIN()},
        make=lambda: NoisyInTraining(mlp()),
    ),
    offline(
        "later: random augmentation in a DataModule's hook absent",
        lambda: {"train": TRAIN()},
        fit_with=lambda: HookedData(HOOKS[2], noisy_in_training),
    ),
]

CONTENT = [
    offline("later: the same dataset", lambda: {"train": TRAIN()}),
    offline("later: a Subset of all rows in their order", lambda: {"train": Subset(TRAIN(), range(8))}),
    offline(
        "later: the rows in another order",
        lambda: {"train": Subset(TRAIN(), range(7, -1, -1))},
        ("of the fit is at index", "was split, filtered or ordered in another way"),
    ),
    offline(
        "later: another split, without its seed",
        lambda: {"train": split(4)},
        ("Expected `train` to give the batches", "`random_split` draws other parts without the same `generator=`"),
        fit_with=lambda: loader(split(3)),
    ),
    offline(
        "later: the same split, by its seed",
        lambda: {"train": split(3)},
        fit_with=lambda: loader(split(3)),
        train=lambda: split(3),
    ),
    offline(
        "later: the rows of another filter",
        lambda: {"train": Subset(many(), range(1, 9))},
        ("Example 1 of the fit is at index 0 here",),
        fit_with=lambda: loader(Subset(many(), range(8))),
    ),
    offline(
        "later: rows that were edited",
        lambda: {"train": edited(shifted)()},
        ("the rows are others, or were edited", "check_data=False"),
    ),
    offline(
        "later: labels that were corrected",
        lambda: {"train": edited(flipped)()},
        ("`batch[1]` has other values", "check_data=False"),
    ),
    offline(
        "later: labels that were corrected, with `check_data=False`",
        lambda: {"train": edited(flipped)(), "check_data": False},
        train=edited(flipped),
    ),
    offline(
        "later: one column less",
        lambda: {"train": Items([(x[:4], y) for x, y in TRAIN().items])},
        ("has shape [3, 4] here, [3, 5] in the fit",),
    ),
    offline(
        "later: one part more in each item",
        lambda: {"train": Items([(x, y, 0.0) for x, y in TRAIN().items])},
        ("the batch has the parts [0], [1], [2] here, [0], [1] in the fit",),
        make=lambda: IgnoresFiles(mlp()),
    ),
    offline(
        "later: inputs of another scale, as bytes",
        lambda: {"train": Items([((30 * x).to(torch.int32), y) for x, y in TRAIN().items])},
        ("is int32 here, float64 in the fit",),
    ),
    offline(
        "later: an un-augmented dataset after random augmentation",
        lambda: {"train": TRAIN()},
        fit_with=lambda: loader(Augmented(True)),
    ),
    offline(
        "later: an un-augmented dataset after augmentation by a generator of its own",
        lambda: {"train": TRAIN()},
        fit_with=lambda: loader(Augmented(True, own=True)),
    ),
    offline(
        "later: augmentation that the fit did not have",
        lambda: {"train": Augmented(True)},
        ("Reading them draws random numbers here, which it did not in the fit",),
        fit_with=lambda: loader(Augmented(False)),
    ),
    offline(
        "later: names of files in another folder",
        lambda: {"train": with_files("/elsewhere/data")},
        make=lambda: IgnoresFiles(mlp()),
        fit_with=lambda: loader(with_files("/data")),
        train=lambda: with_files("/data"),
        queries=lambda: Items([(x, y, "a") for x, y in QUERIES().items]),
    ),
    offline(
        "later: other strings that the step reads",
        lambda: {"train": with_files("/elsewhere/data")},
        ("`batch[2]` has other values", "Expected the module to give the losses of the fit"),
        make=lambda: ReadsFiles(mlp()),
        fit_with=lambda: loader(with_files("/data")),
        queries=lambda: Items([(x, y, "a") for x, y in QUERIES().items]),
    ),
]

MODULES = [
    offline("later: the same arguments of the module", lambda: {"train": TRAIN()}, make=lambda: Arguments(0.1)),
    offline(
        "later: another rate of dropout, which eval mode does not have",
        lambda: {"train": TRAIN()},
        make=lambda: Arguments(dropout=0.5),
        make_later=lambda: Arguments(dropout=0.1),
    ),
    offline(
        "later: another label smoothing",
        lambda: {"train": TRAIN()},
        ("Expected the module to give the losses of the fit", "label smoothing", "Build it as it was trained"),
        make=lambda: Arguments(0.1),
        make_later=Arguments,
    ),
    offline(
        "later: another weight of the loss",
        lambda: {"train": TRAIN()},
        ("Expected the module to give the losses of the fit",),
        make=lambda: Arguments(weight=0.5),
        make_later=Arguments,
    ),
    offline(
        "later: a schedule in the loss, which begins at 0, absent",
        lambda: {"train": TRAIN()},
        ("Expected the module to give the losses of the fit", "the weights of step"),
        make=lambda: Arguments(seen=0.1),
        make_later=Arguments,
    ),
    offline(
        "later: another network with parameters of the same names and shapes",
        lambda: {"train": TRAIN()},
        ("Expected the module to give the losses of the fit", "its code has changed"),
        make_later=lambda: Step(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))),
    ),
]

OFFLINE = [*COLLATE, *DATAMODULES, *CONTENT, *MODULES]
