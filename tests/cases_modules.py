"""Whole modules: attention, recurrence, bare parameters, adapters, wrappers, control flow."""

import warnings

import torch
from case import Call, Case, Items, Pooled, Step, both, drawn, mlp
from cases_layers import layer, sequential
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    def __init__(self, batch_first=True, cross=False, **options):
        super().__init__()
        self.first = batch_first
        self.cross = cross
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        other = x[..., :2] if self.cross else x
        h = self.attention(x, other, other)[0]
        return self.head(torch.tanh(h).mean(1 if self.first else 0))


class Encoder(nn.Module):
    def __init__(self, masked=False, **options):
        super().__init__()
        one = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, **options)
        self.encoder = nn.TransformerEncoder(one, 2, enable_nested_tensor=False)
        self.masked = masked
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        mask = torch.arange(x.shape[1]) >= 3 + (x[:, 0, :1] > 0) if self.masked else None
        h = self.encoder(x, src_key_padding_mask=mask)
        h = h if mask is None else h.masked_fill(mask[..., None], 0.0)
        return self.head(h.mean(1))


class TimeMajor(nn.Module):
    """A whole ``nn.Transformer`` with its default dimension order."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():  # torch says that time-major input is slower
            warnings.simplefilter("ignore")
            self.transformer = nn.Transformer(4, 2, 1, 1, 8, dropout=0.0)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.head(self.transformer(x, x[:2]).mean(0))


class LanguageModel(nn.Module):
    """Embedding and output layer share one table."""

    def __init__(self, flat):
        super().__init__()
        self.embedding, self.mix, self.flat = nn.Embedding(9, 4), nn.Linear(4, 4), flat
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        h = torch.tanh(self.mix(self.embedding(x)))
        return self.out(h.flatten(0, 1)) if self.flat else self.out(h)


def next_token(logits, y):
    return F.cross_entropy(logits.reshape(-1, 9), y.flatten())


class Recurrent(nn.Module):
    def __init__(self, kind, batch_first=True, **options):
        super().__init__()
        self.first = batch_first
        self.recurrent = kind(4, 3, batch_first=batch_first, **options)
        width = options.get("proj_size", 3)
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x):
        h = self.recurrent(x if self.first else x.transpose(0, 1))[0]
        return self.head(h.mean(1 if self.first else 0))


RECTIFIERS = {"nonlinearity": "relu", "bidirectional": True}


def half_frozen(net):
    for name, parameter in net.recurrent.named_parameters():
        parameter.requires_grad_(not name.endswith("reverse"))
    return net


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class LastStates(nn.Module):
    """Starts from states that train, and looks at the last ones of both layers."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.LSTM(4, 3, num_layers=2), nn.Linear(12, 3)
        self.initial = nn.Parameter(torch.randn(2, 2, 1, 3))

    def forward(self, x):
        h, c = self.initial.expand(2, 2, len(x), 3)
        _, states = self.recurrent(x.transpose(0, 1), (h.contiguous(), c.contiguous()))
        return self.head(torch.cat([*states[0], *states[1]], -1))


class Packed(nn.Module):
    """Sorts the batch by length, and puts a Linear on the packed rows."""

    def __init__(self):
        super().__init__()
        self.into, self.recurrent, self.head = nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        lengths = 2 + (x[:, 0, 0] > 0).long() + (x[:, 0, 1] > 0).long()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed = packed._replace(data=torch.tanh(self.into(packed.data)))
        return self.head(self.recurrent(packed)[1][0][0])


class Bare(nn.Module):
    """Parameters without a module of their own."""

    def __init__(self):
        super().__init__()
        self.matrix, self.scale, self.shift = (nn.Parameter(torch.randn(*s)) for s in ((5, 3), (3,), (3,)))
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return (torch.tanh(x @ self.matrix) * self.scale + self.shift) / self.temperature.exp()


class Vision(nn.Module):
    """Class token expanded over the batch, positions added."""

    def __init__(self):
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 6, 4))
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(torch.tanh(self.mix(torch.tanh(x).cumsum(1))).mean(1))


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.Parameter(torch.randn(2, 5, 3))

    def forward(self, x):
        return torch.einsum("nd,hdk->nhk", x, self.heads).tanh().sum(1)


class ScalarScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.tensor(1.5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.scale * self.head(self.scale * x)


class SequenceFirstBias(nn.Module):
    """A parameter with one value a position, added to time-major activations."""

    def __init__(self):
        super().__init__()
        self.positions, self.head = nn.Parameter(torch.randn(6, 1, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(x.transpose(0, 1) + self.positions).mean(0))


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.form = nn.Bilinear(5, 5, 3)

    def forward(self, x):
        return self.form(x, x.flip(1))


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 3).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return self.base(x) + 0.5 * (x @ self.down.T @ self.up.T)


class MergedLoRA(LoRA):
    """The product is added to the weight first."""

    def forward(self, x):
        return F.linear(x, self.base.weight + 0.5 * self.up @ self.down, self.base.bias)


class FreshLoRA(nn.Module):
    """At its start the second factor is zero: the first one's gradient is zero, too."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 3).requires_grad_(False)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def normed(parametrize):
    def make():
        net = mlp()
        parametrize(net[0])
        return net

    return make


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.head, self.reentrant = mlp(5, 6, 5), nn.Linear(5, 3), reentrant

    def forward(self, x):
        x = x.requires_grad_() if self.reentrant and torch.is_grad_enabled() else x
        return self.head(checkpoint(self.inner, x, use_reentrant=self.reentrant))


class InPlace(nn.Module):
    """Writes into what its layers returned."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.a(x).relu_()
        h = self.b(x)
        h += x
        h[:, 0] = 0
        h.mul_(2.0).tanh_()
        return self.c(h)


class Experts(nn.Module):
    """Each example goes to one of two experts; one of the two may get none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward(self, x):
        to, out = (x[:, 0] > 0).long() + (x[:, 1] > 1), x.new_zeros(len(x), 3)
        for e, expert in enumerate(self.experts):
            chosen = (to == e).nonzero()[:, 0]
            if len(chosen):
                out = out.index_add(0, chosen, expert(x[chosen]))
        return out


class TokenExperts(nn.Module):
    """Tokens are sorted by expert: their order in the batch is gone."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 3)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        to = (tokens[:, 0] > 0.8).long()
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            chosen = (to == e).nonzero()[:, 0]
            out = out.index_add(0, chosen, torch.tanh(expert(tokens[chosen])))
        return self.head(out.view(x.shape).mean(1))


class EarlyExit(nn.Module):
    """Examples that are sure leave; the others go on, in an order of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        out = self.a(x)
        unsure = out.detach().abs().amax(1).argsort()[: (x[:, 0] > 0).sum()]
        more = torch.zeros_like(out)
        more[(x[:, 0] > 0).nonzero()[:, 0]] = self.b(x[x[:, 0] > 0])
        return out + more + 0 * unsure.sum()


class Shuffled(nn.Module):
    """Orders the batch by content before a layer and back behind it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.b(torch.tanh(self.a(x[order]))[order.argsort()])


class Loops(nn.Module):
    """As many calls as the batch asks for: those of a padded example change nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        rounds = 1 + (x[:, :3] > 0).sum(1)
        for i in range(int(rounds.max())):
            x = torch.where((i < rounds)[:, None], torch.tanh(self.a(x)), x)
        return self.b(x)


class Averaging(nn.Module):
    """Buffers that every forward pass changes, and that change what it returns."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(5), persistent=False)

    def forward(self, x):
        x = x - self.mean + self.calls / 10
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.head(x)


class Counting(Averaging):
    """A number that every forward pass changes, and that changes what it returns."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return super().forward(x + self.count / 10)


class Penalised(Step):
    """Differentiates inside the step."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.detach().clone().requires_grad_()
        scores = self.net(x)
        (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        return self.loss(scores, y) + 0.1 * slope.square().sum(1).mean()


def ragged_sequences(n, seed):
    g = drawn(seed)
    return lambda: Items([(torch.randn(4, 4, generator=g, dtype=torch.float64), i % 3) for i in range(n)])


def compiled_inside():
    net = mlp(5, 6, 5)
    return nn.Sequential(torch.compile(net, backend="eager"), nn.Tanh(), nn.Linear(5, 3))


def compiled_whole():
    return torch.compile(Step(mlp()), backend="eager")


sequence = sequential(lambda: nn.Linear(4, 4), nn.Tanh)


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up, self.head = nn.Conv2d(2, 8, 2, stride=2), nn.PixelShuffle(2), Pooled(4)

    def forward(self, x):
        return self.head(torch.cat([self.up(torch.tanh(self.down(x))), x], 1))


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.detached = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.used(x) + self.detached(x).detach()


MODULES = [
    layer("MultiheadAttention, batch first", Attention, 6, 4, fit=True),
    layer("MultiheadAttention, time first", lambda: Attention(False), 6, 4),
    layer("MultiheadAttention with keys of another width", lambda: Attention(cross=True, kdim=2, vdim=2), 6, 4),
    layer("MultiheadAttention with bias_kv", lambda: Attention(add_bias_kv=True), 6, 4),
    layer("MultiheadAttention without bias", lambda: Attention(bias=False), 6, 4),
    layer("TransformerEncoder", lambda: Encoder(batch_first=True), 6, 4, fit=True),
    layer(
        "TransformerEncoder, norm first, gelu",
        lambda: Encoder(batch_first=True, norm_first=True, activation="gelu"),
        6,
        4,
    ),
    layer("TransformerEncoder with padding", lambda: Encoder(masked=True, batch_first=True), 6, 4),
    layer("Transformer, time first", TimeMajor, 6, 4),
    Case(
        "tied embedding and output",
        lambda: Step(LanguageModel(False), next_token),
        **both(6, high=9, target=(6,), classes=9),
        fit=True,
    ),
    Case(
        "tied embedding and output, flattened",
        lambda: Step(LanguageModel(True), next_token),
        **both(6, high=9, target=(6,), classes=9),
    ),
    layer("LSTM", lambda: Recurrent(nn.LSTM), 6, 4),
    layer("GRU, time first", lambda: Recurrent(nn.GRU, batch_first=False), 6, 4),
    layer("LSTM, two layers, both directions", lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), 6, 4),
    layer("RNN with dropout", lambda: Recurrent(nn.RNN, num_layers=2, dropout=0.5), 6, 4),
    layer("RNN of rectifiers, one direction frozen", lambda: half_frozen(Recurrent(nn.RNN, **RECTIFIERS)), 6, 4),
    layer("LSTM with projections", lambda: Recurrent(nn.LSTM, proj_size=2), 6, 4),
    layer("GRU without bias", lambda: Recurrent(nn.GRU, bias=False), 6, 4),
    layer("LSTM, first and last states", LastStates, 6, 4),
    layer("GRUCell in a loop", lambda: Cells(nn.GRUCell), 6, 4),
    layer("LSTMCell in a loop", lambda: Cells(nn.LSTMCell), 6, 4),
    layer("RNNCell in a loop", lambda: Cells(nn.RNNCell), 6, 4),
    layer("packed sequences sorted by length", Packed, 4, 4),
    layer("bare parameters", Bare, 5, fit=True),
    layer("class token and positions", Vision, 5, 4),
    layer("einsum with a parameter", Einsum, 5),
    layer("one number as a parameter", ScalarScale, 5),
    layer("positions of time-major activations", SequenceFirstBias, 6, 4),
    layer("Bilinear", Bilinear, 5),
    layer("LoRA", LoRA, 5, fit=True),
    layer("LoRA merged into the weight", MergedLoRA, 5),
    layer("LoRA at its start", FreshLoRA, 5, fit=True),
    layer("weight norm", normed(parametrizations.weight_norm), 5, fit=True),
    layer("spectral norm", normed(parametrizations.spectral_norm), 5),
    layer("orthogonal parametrization", normed(parametrizations.orthogonal), 5),
    layer("pruned weights", normed(lambda m: prune.random_unstructured(m, "weight", 0.4)), 5),
    layer("compiled submodule", compiled_inside, 5),
    Case("compiled module", compiled_whole, **both(5)),
    layer("gradient checkpointing", lambda: Checkpointed(False), 5),
    layer("gradient checkpointing, reentrant", lambda: Checkpointed(True), 5),
    layer(
        "ReLU in place behind the first layer",
        lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)),
        5,
        fit=True,
    ),
    layer(
        "ReLU in place behind BatchNorm",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Pooled(4)),
        2,
        5,
        4,
    ),
    layer("activations in place", InPlace, 5),
    layer("experts by example", Experts, 5),
    layer("experts by token", TokenExperts, 5, 4),
    layer("early exit", EarlyExit, 5),
    layer("examples sorted inside", Shuffled, 5),
    layer("a data-dependent number of calls", Loops, 5),
    layer("buffers updated in forward", Averaging, 5, fit=True),
    Case(
        "a number counted in forward",
        lambda: Step(Counting()),
        **both(5),
        fit=True,
        expected="refused",
        says=("`net.count`", "`self.global_step`", "pass `loss=`"),
    ),
    Case("gradient penalty in the step", lambda: Penalised(mlp()), **both(5)),
    layer(
        "AlphaDropout and activations with memory",
        sequential(lambda: nn.Linear(5, 4), nn.AlphaDropout, nn.SELU, lambda: nn.Linear(4, 3)),
        5,
    ),
    layer(
        "LocalResponseNorm, pooling, upsampling",
        sequential(
            lambda: nn.Conv2d(2, 4, 3, padding=1),
            lambda: nn.LocalResponseNorm(2),
            lambda: nn.MaxPool2d(2),
            lambda: nn.Upsample(scale_factor=2),
            lambda: nn.Conv2d(4, 4, 1),
            lambda: Pooled(4),
        ),
        2,
        4,
        4,
    ),
    layer("PixelShuffle and concatenated skips", Skips, 2, 4, 4),
    layer("a layer that the loss does not reach", Unreached, 5),
    layer(
        "a layer with a zero gradient",
        lambda: nn.Sequential(nn.Linear(5, 4), Call(lambda x: x * 0), nn.Linear(4, 3)),
        5,
    ),
]
