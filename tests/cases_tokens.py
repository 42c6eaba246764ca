"""Losses that are means over all tokens, pixels, labels or class weights of a batch: examples weigh by their counts."""

import pytorch_lightning as pl
import torch
from case import Case, Items, both, drawn, inputs, mlp
from torch import nn
from torch.nn import functional as F

CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
WAY_OUT = ("Pass `loss=`", "per-sample losses")


# ---- data -----------------------------------------------------------------------------------------------------------


def sequences(n, seed, ignored=-100, times=7):
    """Token ids with labels, of which the last are ignored: another number in each example."""

    def make():
        g = drawn(seed)
        x, y = torch.randint(9, (n, times), generator=g), torch.randint(9, (n, times), generator=g)
        for i in range(n):
            y[i, times - (i * 3 + seed) % (times - 2) :] = ignored
        return Items(list(zip(x, y, strict=True)))

    return make


def with_empty(n, seed):
    """Some training examples have no labels at all."""

    def make():
        items = sequences(n, seed)()
        for i in (2, 5):
            if seed == 1:
                items.items[i][1].fill_(-100)
        return items

    return make


def padded(n, seed):
    """Dicts as of Hugging Face, nested, with an attention mask."""

    def make():
        items = sequences(n, seed)()
        return Items(
            [{"inputs": {"ids": x, "mask": (y != -100).long()}, "labels": {"next": y.clamp_min(0)}} for x, y in items]
        )

    return make


def holes(n, seed, width=4):
    """Regression targets of which some are NaN: another number in each example."""

    def make():
        g = drawn(seed)
        x = torch.randn(n, 5, generator=g, dtype=torch.float64)
        y = torch.randn(n, width, generator=g, dtype=torch.float64)
        for i in range(n):
            y[i, : (i + seed) % width] = torch.nan
        return Items(list(zip(x, y, strict=True)))

    return make


def maps(n, seed, ignored=255):
    """Images with a class for each pixel; a border of another width is ignored in each."""

    def make():
        g = drawn(seed)
        x, y = torch.randn(n, 2, 5, 5, generator=g, dtype=torch.float64), torch.randint(3, (n, 5, 5), generator=g)
        for i in range(n):
            y[i, : (i + seed) % 4] = ignored
        return Items(list(zip(x, y, strict=True)))

    return make


def weighted(n, seed):
    """(x, y, weight): importance weights that come with the data."""

    def make():
        items = inputs(5, n=n, seed=seed)()
        weights = torch.rand(n, generator=drawn(seed), dtype=torch.float64) + 0.1
        return Items([(x, y, w) for (x, y), w in zip(items, weights, strict=True)])

    return make


def ragged(n, seed):
    """Sequences of unequal lengths, which the collate function pads."""

    def make():
        g = drawn(seed)
        lengths = [2 + (3 * i + seed) % 5 for i in range(n)]
        return Items([(torch.randint(9, (t,), generator=g), torch.randint(9, (t,), generator=g)) for t in lengths])

    return make


def pad(items):
    x, y = zip(*items, strict=True)
    pad = nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(one) for one in x])
    return pad(x, batch_first=True), pad(y, batch_first=True, padding_value=-100), lengths


def pad_and_count(items):
    x, y, lengths = pad(items)
    return x, y, lengths, sum(lengths.tolist())


def graphs(n, seed):
    """Nodes with a target each: another number of nodes in each example."""

    def make():
        g = drawn(seed)
        sizes = [1 + (3 * i + seed) % 5 for i in range(n)]
        return Items([tuple(torch.randn(k, d, generator=g, dtype=torch.float64) for d in (5, 3)) for k in sizes])

    return make


def end_to_end(items):
    nodes, targets = zip(*items, strict=True)
    return {"nodes": torch.cat(nodes), "targets": torch.cat(targets)}


def pad_time_first(items):
    x, y, lengths = pad(items)
    return x.T, y.T, lengths


def with_queries(make, train=8, queries=4):
    return {"train": make(train, 1), "queries": make(queries, 2)}


# ---- networks -------------------------------------------------------------------------------------------------------


def tokens(width=4):
    return nn.Sequential(nn.Embedding(9, width), nn.Tanh(), nn.Linear(width, 9))


def pixels():
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1))


class TwoParts(pl.LightningModule):
    """A step of any function (module, batch)."""

    two_groups = False

    def __init__(self, net, step):
        super().__init__()
        self.net, self.step = net, step

    def training_step(self, batch, batch_idx):
        return self.step(self.net, batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def step(function, net):
    return lambda: TwoParts(net(), function)


# ---- losses ---------------------------------------------------------------------------------------------------------


def shifted(net, batch):
    """As Hugging Face's causal language models: logits against the labels after them."""
    x, y = batch
    logits, labels = net(x)[:, :-1].contiguous(), y[:, 1:].contiguous()
    return F.cross_entropy(logits.view(-1, 9), labels.view(-1), ignore_index=-100)


def each_token(net, batch):
    x, y = batch[:2]
    losses = F.cross_entropy(net(x).flatten(0, 1), y.clamp_min(0).flatten(), reduction="none").view(y.shape)
    return losses, (y != -100).to(losses)


def by_hand(net, batch):
    losses, mask = each_token(net, batch)
    return (losses * mask).sum() / mask.sum()


def selected(net, batch):
    losses, mask = each_token(net, batch)
    return losses[mask.bool()].mean()


def masked_select(net, batch):
    losses, mask = each_token(net, batch)
    return torch.masked_select(losses, mask.bool()).mean()


def at_least_one(net, batch):
    losses, mask = each_token(net, batch)
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def divisor_at_least_one(net, batch):
    """As a detector divides by its boxes: a plain number, of which an example without any shows nothing."""
    losses, mask = each_token(net, batch)
    return (losses * mask).sum() / max(int(mask.cpu().numpy().sum()), 1)


def if_any(net, batch):
    losses, mask = each_token(net, batch)
    return losses[mask.bool()].mean() if mask.any() else 0 * losses.sum()


def of_means(net, batch):
    losses, mask = each_token(net, batch)
    return (losses * mask).mean() / mask.mean()


def as_number(net, batch):
    losses, mask = each_token(net, batch)
    return (losses * mask).sum() / int(mask.sum().item())


def logged(net, batch):
    """A mean over examples of means over tokens; the tokens of the batch are counted all the same."""
    losses, mask = each_token(net, batch)
    assert mask.sum() > 0
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


def two_counts(net, batch):
    """A mean over tokens plus a mean over examples."""
    return by_hand(net, batch) + net(batch[0]).square().mean((1, 2)).mean()


def two_of_one_count(net, batch):
    losses, mask = each_token(net, batch)
    size = net(batch[0]).square().sum(2)
    return (losses * mask).sum() / mask.sum() + 0.1 * (size * mask).sum() / mask.sum()


def of_dicts(net, batch):
    logits, mask = net(batch["inputs"]["ids"]), batch["inputs"]["mask"]
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"]["next"], reduction="none")
    return {"loss": (losses * mask).sum() / mask.sum()}


def nan_masked(net, batch):
    x, y = batch
    known = ~torch.isnan(y)
    return F.mse_loss(net(x)[known], y[known])


def nan_filled(net, batch):
    x, y = batch
    known = torch.isfinite(y)
    return torch.where(known, net(x) - y.nan_to_num(), 0).square().sum() / known.sum()


def multi_label(net, batch):
    x, y = batch
    known = (~torch.isnan(y)).to(x)
    losses = F.binary_cross_entropy_with_logits(net(x), (y.nan_to_num() > 0).to(x), reduction="none")
    return (losses * known).sum() / known.sum()


def class_weighted(**options):
    return lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], CLASS_WEIGHTS, **options)


def nll(net, batch):
    return F.nll_loss(net(batch[0]).log_softmax(1), batch[1], weight=CLASS_WEIGHTS)


def importance(net, batch):
    x, y, w = batch
    return (w * F.cross_entropy(net(x), y, reduction="none")).sum() / w.sum()


def of_lengths(net, batch):
    losses, mask = each_token(net, batch)
    return (losses * mask).sum() / batch[2].sum()


def of_counts(net, batch):
    """Divided by a plain number that the collate function counted."""
    losses, mask = each_token(net, batch)
    return (losses * mask).sum() / batch[3]


def of_all_nodes(net, batch):
    """As of graphs: what all examples have is laid end to end."""
    return F.mse_loss(net(batch["nodes"]), batch["targets"])


def of_all_positions(net, batch):
    """Padding counts in the divisor, so that it depends on the longest of the batch."""
    losses, mask = each_token(net, batch)
    return (losses * mask).mean()


def time_first(net, batch):
    x, y, _ = batch
    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())


def of_pixels(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1], ignore_index=255)


# ---- counts ---------------------------------------------------------------------------------------------------------


def kept(item):
    return int((item[1] != -100).sum())


def kept_shifted(item):
    return int((item[1][1:] != -100).sum())


def known(item):
    return int((~item[1].isnan()).sum())


def class_weight(item):
    return float(CLASS_WEIGHTS[item[1]])


def right(name, function, net, data, count, fit=True, **options):
    return Case(name, step(function, net), **data, fit=fit, count=count, **options)


OF_SEQUENCES = with_queries(sequences)
OF_CLASSES = both(5)
TOKENS = [
    right("token mean: shifted labels of a language model", shifted, tokens, OF_SEQUENCES, kept_shifted),
    right("token mean by hand", by_hand, tokens, OF_SEQUENCES, kept),
    right("token mean by hand without a trajectory", by_hand, tokens, OF_SEQUENCES, kept, fit=False),
    right("token mean of selected losses", selected, tokens, OF_SEQUENCES, kept),
    right("token mean by masked_select", masked_select, tokens, OF_SEQUENCES, kept),
    right("token mean with a denominator of at least one", at_least_one, tokens, OF_SEQUENCES, kept),
    right("token mean as a quotient of means", of_means, tokens, OF_SEQUENCES, kept),
    right("token mean divided by a number", as_number, tokens, OF_SEQUENCES, kept),
    right("token mean with an auxiliary loss of the same count", two_of_one_count, tokens, OF_SEQUENCES, kept),
    right("means over tokens, then over examples", logged, tokens, OF_SEQUENCES, None),
    right(
        "token mean of nested dicts",
        of_dicts,
        tokens,
        with_queries(padded),
        lambda item: int(item["inputs"]["mask"].sum()),
    ),
    right("token mean of unequal lengths", by_hand, tokens, with_queries(ragged), lambda i: len(i[0]), collate=pad),
    right("token mean divided by lengths", of_lengths, tokens, with_queries(ragged), lambda i: len(i[0]), collate=pad),
    right(
        "token mean divided by a number of the collate function",
        of_counts,
        tokens,
        with_queries(ragged),
        lambda i: len(i[0]),
        collate=pad_and_count,
    ),
    right(
        "mean over the nodes of all graphs",
        of_all_nodes,
        mlp,
        with_queries(graphs),
        lambda i: len(i[0]),
        collate=end_to_end,
    ),
    right("token mean with examples without tokens", at_least_one, tokens, with_queries(with_empty), kept),
    right("total over at least one token", divisor_at_least_one, tokens, with_queries(with_empty), kept),
    right("token mean if there are any", if_any, tokens, with_queries(with_empty), kept),
    right("token mean in float32", by_hand, tokens, OF_SEQUENCES, kept, dtype=torch.float32),
    Case(
        "mean over padding, too",
        step(of_all_positions, tokens),
        **with_queries(ragged),
        collate=pad,
        expected="refused",
        says=WAY_OUT,
    ),
    right(
        "token mean with the time first",
        time_first,
        tokens,
        with_queries(ragged),
        lambda i: len(i[0]),
        collate=pad_time_first,
    ),
    right("regression on targets that are not NaN", nan_masked, lambda: mlp(classes=4), with_queries(holes), known),
    right("regression with a mask of NaN", nan_filled, lambda: mlp(classes=4), with_queries(holes), known),
    right("multi-label mask", multi_label, lambda: mlp(classes=4), with_queries(holes), known),
    right(
        "pixel mean with ignored pixels",
        of_pixels,
        pixels,
        with_queries(maps),
        lambda item: int((item[1] != 255).sum()),
    ),
    right("class weights with label smoothing", class_weighted(label_smoothing=0.1), mlp, OF_CLASSES, class_weight),
    right("class weights of nll_loss", nll, mlp, OF_CLASSES, class_weight),
    right("weights that come with the data", importance, mlp, with_queries(weighted), lambda item: float(item[2])),
    Case(
        "token mean plus a mean over examples",
        step(two_counts, tokens),
        **OF_SEQUENCES,
        expected="refused",
        says=("different counts", *WAY_OUT),
    ),
]
