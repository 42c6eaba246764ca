"""Loaders that read data otherwise than one example by one index, and weights that exist only after a forward pass."""

import torch
from case import Case, Items, Step, both, inputs, mlp
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, default_collate


def step():
    return Step(mlp())


class ByLists(Dataset):
    """Examples by one index or by a list of them, as database readers and `datasets` have them."""

    def __init__(self, items, noise=0.0):
        self.items, self.noise = items, noise

    def __len__(self):
        return len(self.items)

    def __getitem__(self, ids):
        if not isinstance(ids, list):
            return self.items[ids]
        x, y = default_collate([self.items[i] for i in ids])
        return [x + self.noise * torch.randn_like(x) if self.noise else x, y]


def in_lists(data):
    return DataLoader(data, sampler=BatchSampler(SequentialSampler(data), 3, False), batch_size=None)


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class ClosedHere(Items):
    """Its file is open in worker processes only."""

    def __getitem__(self, i):
        raise TypeError("'NoneType' object is not subscriptable")


def opens(worker):
    torch.utils.data.get_worker_info().dataset.file = "open"


def sparse(items):
    x, y = default_collate(items)
    return x.to_sparse(), y


class Densifies(Step):
    """Takes sparse inputs, or dense ones of brute force."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(x.to_dense() if x.layout is not torch.strided else x), y)


class Multiplies(Step):
    """A product with the sparse matrix itself."""

    def __init__(self):
        super().__init__(nn.Tanh())
        self.first = nn.Parameter(torch.randn(5, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.net(torch.sparse.mm(x, self.first)), y)


def lazy():
    """Its first layer has no weights before the first batch."""
    return Step(nn.Sequential(nn.LazyLinear(6, dtype=torch.float64), nn.Tanh(), nn.Linear(6, 3)))


def read(change, **options):
    """Training data changed by a function; the queries stay as they are."""
    plain = both(5)
    return {"make": step, "train": lambda: change(plain["train"]()), "queries": plain["queries"]} | options


CAPTURE = [
    Case("lists of indices: a BatchSampler as sampler, batch_size=None", loader=in_lists, **read(ByLists)),
    Case("lists of indices, fit", loader=in_lists, fit=True, **read(ByLists)),
    Case(
        "lists of indices read with random numbers",
        loader=in_lists,
        expected="refused",
        says=("without random numbers", "without augmentation"),
        **read(lambda items: ByLists(items, noise=1.0)),
    ),
    Case(
        "a loader of ready batches",
        loader=lambda data: DataLoader(data, batch_size=None),
        expected="refused",
        says=("got `batch_size=None`", "Pass the Dataset of single examples"),
        **read(ByLists),
    ),
    Case(
        "a stream without a way to read an example again",
        loader=lambda data: DataLoader(data, 3),
        expected="refused",
        says=("has no examples by index", "`lookup=`"),
        **read(Stream),
    ),
    Case(
        "several training loaders at once",
        loader=lambda data: [DataLoader(data, 3), DataLoader(data, 2)],
        expected="refused",
        says=("for several loaders at once", "`trajectory.of_loader(0)`"),
        **read(ByLists),
    ),
    Case(
        "a file that worker_init_fn opens",
        loader=lambda data: DataLoader(data, 3, num_workers=1, worker_init_fn=opens),
        expected="refused",
        says=("The loader has a `worker_init_fn`", "Open it in `__getitem__`"),
        **read(lambda items: ClosedHere(items.items)),
    ),
    Case("sparse inputs", lambda: Densifies(mlp()), inputs(5), inputs(5, n=4, seed=2), collate=sparse),
    Case("sparse inputs, fit", lambda: Densifies(mlp()), inputs(5), inputs(5, n=4, seed=2), collate=sparse, fit=True),
    Case("a product with sparse inputs", Multiplies, inputs(5), inputs(5, n=4, seed=2), collate=sparse, fit=True),
    Case("LazyLinear, fit", lazy, fit=True, **both(5)),
]
