"""Layers: every kind that has a rule, and the shapes in which they meet."""

import warnings

import torch
from case import Call, Case, Pooled, Step, Take, both, mlp, with_statistics
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


def layer(name, make, *shape, **options):
    """A classifier around one layer."""
    fields = {k: options.pop(k) for k in ("parameters", "fit", "tolerance") if k in options}
    return Case(name, lambda: Step(make()), **both(*shape, **options), **fields)


def sequential(*layers):
    return lambda: nn.Sequential(*[make() for make in layers])


def over_space(make, channels):
    return lambda: nn.Sequential(make(), nn.Tanh(), Pooled(channels))


def token_net(embedding, head_width):
    return lambda: nn.Sequential(embedding(), nn.Tanh(), Take(), nn.Linear(head_width, 3))


def frozen(net, index):
    net[index].requires_grad_(False)
    return net


class EvenSame(nn.Conv1d):
    """Padding "same" with an even kernel pads one side more; torch warns of a copy."""

    def forward(self, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().forward(x)


class Scripted(nn.Module):
    """``F.linear`` with its operands by keyword."""

    def __init__(self):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return F.linear(input=x, weight=self.weight, bias=self.offset)


def tied_linear():
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    net[2].weight = net[0].weight
    return net


class BothWays(nn.Module):
    """A square weight that multiplies from the right, and by ``linear``."""

    def __init__(self, positions=1):
        super().__init__()
        self.weight, self.head, self.positions = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 3), positions

    def forward(self, x):
        x = torch.stack([x * (k + 1) for k in range(self.positions)], 1).squeeze(1)
        x = self.head(torch.tanh(F.linear(torch.tanh(x @ self.weight), self.weight)))
        return x if x.ndim == 2 else x.mean(1)


class BothWaysWithBias(nn.Module):
    """The same with a bias, both times."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.head = (
            nn.Parameter(torch.randn(5, 5)),
            nn.Parameter(torch.randn(5)),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        x = torch.tanh(torch.addmm(self.bias, x, self.weight))
        return self.head(torch.tanh(F.linear(x, self.weight, self.bias)))


class Odd(nn.Module):
    """A parameter of a rare kind, beside a usual network."""

    def __init__(self, odd):
        super().__init__()
        self.net, self.odd = mlp(), nn.Parameter(odd)

    def forward(self, x):
        return self.net(x) * (1 + self.odd.abs().sum())


def reused():
    shared = nn.Linear(5, 5)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(5, 3))


def reused_convolution():
    shared = nn.Conv2d(2, 2, 3, padding=1)
    return nn.Sequential(shared, nn.Tanh(), shared, Pooled(2))


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, **options), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.bag(x)))


class WeightedBags(Bags):
    def forward(self, x):
        return self.head(self.bag(x, per_sample_weights=x.to(self.head.weight) / 3))


class FlatBags(Bags):
    """Ids in one row with offsets."""

    def forward(self, x):
        offsets = torch.arange(0, x.numel(), x.shape[1])
        return self.head(self.bag(x.flatten(), offsets))


def transposed(kind, *shape, **options):
    return layer(
        f"ConvTranspose{len(shape) - 1}d {options}".replace("{", "").replace("}", ""),
        over_space(lambda: kind(2, 4, **options), 4),
        *shape,
    )


def frozen_bias():
    net = mlp()
    net[0].bias.requires_grad_(False)
    return net


MASK = (torch.arange(15).view(3, 5) % 4 > 0).double()


def computed_net():
    """The scale of its weight is called a bias, so that it is in the group of the biases."""
    return Applied(
        lambda m, x: m.head(torch.tanh(F.linear(x, m.w / m.w.norm(dim=1, keepdim=True) * m.bias))),
        w=torch.randn(4, 5),
        bias=torch.ones(4, 1),
        head=nn.Linear(4, 3),
    )


class Applied(nn.Module):
    """``work(self, x)`` with some tensors: floating ones are parameters, a name that starts with "_" is a buffer."""

    def __init__(self, work, **tensors):
        super().__init__()
        self.work = work
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Module):
                setattr(self, name, tensor)
            elif name.startswith("_"):
                self.register_buffer(name, tensor)
            else:
                setattr(self, name, nn.Parameter(tensor))

    def forward(self, x):
        return self.work(self, x)


def computed(name, work, *shape, fit=False, high=None, **sizes):
    """A layer whose weight is computed from parameters; a tuple is the size of a random tensor."""

    def make():
        made = {k: torch.randn(v) if isinstance(v, tuple) else v for k, v in sizes.items()}
        return Applied(work, **made)

    return layer(name, make, *shape, fit=fit, **({} if high is None else {"high": high}))


def two_uses(m, x):
    """A masked weight that is computed anew for each of its uses."""
    return m.head(torch.tanh(F.linear(torch.tanh(F.linear(x, m.w * m._mask)), m.w * m._mask)))


def written_over(m, x):
    """What was computed is written to before it is used."""
    weight = m.w * m._mask
    weight[0] = 0
    return m.head(torch.tanh(F.linear(x, weight)))


def by_length(m, x):
    """A slice that is as long as the examples are, and one more."""
    return m.head(torch.tanh(x + m.pos[: x.shape[1]] * m.scale).mean(1) @ m.w[1:5, :4].mT)


class Masked(Step):
    """A mask with few distinct rows that changes: after each epoch, or in each step, past its version."""

    each_step = False

    def training_step(self, batch, batch_idx):
        if self.each_step:
            self.net._mask.data.copy_(self.net._first.flip(batch_idx % 2))
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.net._mask.copy_(self.net._mask.flip(0))


def masked(each_step=False):
    tiles = torch.arange(80)[:, None] // 20 >= torch.arange(60)[None] // 15
    step = Masked(
        Applied(
            lambda m, x: m.head(F.linear(x, m.w * m._mask).tanh()),
            w=torch.randn(80, 60) / 8,
            head=nn.Linear(80, 3),
            _mask=tiles.double(),
            _first=tiles.double(),
        )
    )
    step.each_step = each_step
    return step


def routed(m, x):
    """Tokens are taken by expert, as in Hugging Face's Mixtral."""
    tokens = x.flatten(0, 1)
    weights, to = m.gate(tokens).softmax(-1).topk(2)
    out = torch.zeros_like(tokens)
    for e in range(3):
        which, of_expert = torch.where((to == e).T)
        gate, up = F.linear(tokens[of_expert], m.up[e]).chunk(2, -1)
        own = F.linear(F.silu(gate) * up, m.down[e]) * weights[of_expert, which, None]
        out.index_add_(0, of_expert, own)
    return m.head(out.view(x.shape).mean(1))


def by_mask(m, x):
    """Time comes first, and each token has one expert: a network with biases and a normalisation."""
    x = x.transpose(0, 1).contiguous()
    best, to = m.gate(x).max(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out[to == e] = expert(x[to == e])
    return m.head((out * best[..., None]).mean(0))


def in_order(m, x):
    """Tokens are sorted by expert, and each expert has the next few."""
    tokens = x.flatten(0, 1)
    best, to = m.gate(tokens).max(-1)
    order = to.argsort(stable=True)
    parts = tokens[order].split(to.bincount(minlength=3).tolist())
    own = torch.cat([F.linear(part, m.w[e] * m._mask) for e, part in enumerate(parts)])
    return m.head((torch.zeros_like(own).index_copy(0, order, own) * best[:, None]).view(x.shape).mean(1))


def latent(m, x):
    h = m.attention(torch.tanh(x[:, :2]), x, x)[0]
    return m.head(torch.tanh(h).mean(1))


def head():
    return nn.Linear(4, 3)


GRID = torch.arange(20).view(4, 5)
COMPUTED = [
    computed("masked Linear", lambda m, x: F.linear(x, m._mask * m.w, m.b), 5, w=(3, 5), b=(3,), _mask=MASK, fit=True),
    computed(
        "masked Linear over positions",
        lambda m, x: m.head(torch.tanh(F.linear(x, m.w * m._mask)).mean(1)),
        *(6, 5),
        w=(4, 5),
        _mask=(GRID % 3 > 0).double(),
        head=head(),
    ),
    computed("masked twice", two_uses, 5, w=(5, 5), _mask=torch.ones(5, 5).tril(), head=nn.Linear(5, 3)),
    computed("a computed weight that is written to", written_over, 5, w=(4, 5), _mask=torch.ones(4, 5), head=head()),
    computed("weight times a number", lambda m, x: F.linear(x, m.w * 0.3, m.b / 2), 5, w=(3, 5), b=(3,)),
    computed("weight scaled by rows", lambda m, x: F.linear(x, m.w * m._by), 5, w=(3, 5), _by=torch.rand(3, 1)),
    computed("weight scaled by columns", lambda m, x: x @ (m.w / m._by).T, 5, w=(3, 5), _by=1 + torch.rand(5)),
    computed("weight times another", lambda m, x: F.linear(x, m.w * m.by[:, None]), 5, w=(3, 5), by=(3,), fit=True),
    computed("weight of a sum", lambda m, x: F.linear(x, m._base - 0.5 * m.w + m.v), 5, w=(3, 5), v=(3, 5), _base=MASK),
    computed("low rank", lambda m, x: x @ (m.up @ m.down).T, 5, up=(3, 2), down=(2, 5), fit=True),
    computed("low rank, transposed", lambda m, x: x @ (m.down.T @ m.up.t()), 5, up=(3, 2), down=(2, 5)),
    computed("joined weights", lambda m, x: F.linear(x, torch.cat([m.a, m.b[:1] * 2])), 5, a=(2, 5), b=(3, 5)),
    computed("joined columns", lambda m, x: F.linear(x, torch.cat([m.a, m.b], dim=-1)), 5, a=(3, 2), b=(3, 3)),
    computed(
        "chunks of one weight",
        lambda m, x: m.head(torch.tanh(F.linear(x, m.w.chunk(2)[0], m.b[:4]) * F.linear(x, m.w[4:], m.b[4:])).mean(1)),
        *(6, 5),
        w=(8, 5),
        b=(8,),
        head=head(),
        fit=True,
    ),
    computed(
        "overlapping slices", lambda m, x: F.linear(x[:, :3], m.w[:3]) + F.linear(x[:, 2:], m.w[1:4]), 5, w=(4, 3)
    ),
    computed("slice of each length", by_length, 6, 4, pos=(8, 4), scale=(4,), w=(5, 6), head=head()),
    computed(
        "matrices in one tensor", lambda m, x: F.linear(x, m.w[0]) * F.linear(x, m.w[2]), 5, w=(3, 3, 5), fit=True
    ),
    computed("weight in another shape", lambda m, x: F.linear(x, m.w.reshape(3, -1)), 6, w=(3, 2, 3)),
    computed("transposed weight in another shape", lambda m, x: F.linear(x, m.w.T.reshape(3, 6)), 6, w=(9, 2)),
    computed("normalised rows", lambda m, x: F.linear(x, F.normalize(m.w, dim=1)), 5, w=(3, 5), fit=True),
    computed("softmax of a weight", lambda m, x: x @ m.w.softmax(0), 5, w=(5, 3)),
    computed("detached beside itself", lambda m, x: F.linear(x, m.w + (m.w.round() - m.w).detach()), 5, w=(3, 5)),
    computed(
        "scaled table", lambda m, x: m.head(F.embedding(x, m.w * 2).tanh().mean(1)), 6, w=(9, 4), head=head(), high=9
    ),
    computed("masked table", lambda m, x: F.embedding(x, m.w * m._m).mean(1), 6, w=(9, 3), _m=torch.rand(9, 3), high=9),
    computed(
        "difference and quotient",
        lambda m, x: (m.a - x[:, :3] / m.b.exp()) / m.c - m.d,
        5,
        a=(3,),
        b=(3,),
        c=torch.tensor(1.5),
        d=(3,),
    ),
    computed("einsum, out by in", lambda m, x: torch.einsum("bi,oi->bo", x, m.w), 5, w=(3, 5), fit=True),
    computed(
        "einsum, weight first", lambda m, x: torch.einsum("iko,bti->btok", m.w, x).mean((1, 3)), 6, 5, w=(5, 2, 3)
    ),
    computed("einsum over two letters", lambda m, x: torch.einsum("bti,toi->bo", x, m.w), 6, 5, w=(6, 3, 5)),
    computed("einsum by edges", lambda m, x: torch.einsum("bik,iok->bio", x, m.w).sum(1), 5, 4, w=(5, 3, 4), fit=True),
    computed(
        "einsum, large matrices",
        lambda m, x: m.head(torch.einsum("teh,ehd->ted", torch.einsum("bi,edi->bed", x, m.v).tanh(), m.w).mean(1)),
        *(5,),
        v=(2, 40, 5),
        w=(2, 40, 30),
        head=nn.Linear(30, 3),
    ),
    computed(
        "experts by token, one tensor",
        routed,
        *(6, 4),
        gate=nn.Linear(4, 3),
        up=(3, 10, 4),
        down=(3, 4, 5),
        head=head(),
        fit=True,
    ),
    computed(
        "experts by mask, time first",
        by_mask,
        *(6, 4),
        gate=nn.Linear(4, 2),
        experts=nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 4)) for _ in range(2)),
        head=head(),
    ),
    computed(
        "masked experts in order",
        in_order,
        *(6, 4),
        gate=nn.Linear(4, 3),
        w=(3, 4, 4),
        _mask=torch.ones(4, 4).tril(),
        head=head(),
    ),
    layer(
        "cross-attention",
        lambda: Applied(latent, attention=nn.MultiheadAttention(4, 2, batch_first=True), head=head()),
        6,
        4,
        fit=True,
    ),
    layer(
        "weight norm of a convolution",
        over_space(lambda: parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), 4),
        2,
        6,
        5,
        fit=True,
    ),
    layer(
        "spectral norm of a convolution",
        over_space(lambda: parametrizations.spectral_norm(nn.Conv1d(2, 4, 3)), 4),
        2,
        9,
    ),
    Case("a mask that changes between checkpoints", masked, **both(60), fit=True),
    Case("a mask written to in the step", lambda: masked(True), **both(60), fit=True, by_index=True),
    computed(
        "an empty matrix",
        lambda m, x: F.linear(x, torch.cat([m.a, m.b]) + m.c @ m.d),
        5,
        a=(0, 5),
        b=(3, 5),
        c=(3, 0),
        d=(0, 5),
    ),
    Case("weight norm in two groups", lambda: Step(computed_net(), two_groups=True), **both(5), fit=True),
]

LAYERS = [
    *COMPUTED,
    layer("Linear", lambda: nn.Linear(5, 3), 5, fit=True),
    layer("MLP", mlp, 5, fit=True),
    layer("Linear without bias", lambda: nn.Linear(5, 3, bias=False), 5),
    layer(
        "Linear over one more dimension",
        sequential(lambda: nn.Linear(5, 4), nn.Tanh, Take, lambda: nn.Linear(4, 3)),
        6,
        5,
    ),
    layer(
        "Linear over two more dimensions",
        sequential(lambda: nn.Linear(5, 4), nn.Tanh, lambda: Call(lambda x: x.mean((1, 2))), lambda: nn.Linear(4, 3)),
        2,
        3,
        5,
    ),
    layer(
        "Linear on flattened positions",
        sequential(
            lambda: Call(lambda x: x.flatten(0, 1)),
            lambda: nn.Linear(5, 4),
            nn.Tanh,
            lambda: Call(lambda x: x.view(-1, 6, 4).square().mean(1)),
            lambda: nn.Linear(4, 3),
        ),
        6,
        5,
    ),
    layer(
        "Linear on flattened time-major positions",
        sequential(
            lambda: Call(lambda x: x.transpose(0, 1).flatten(0, 1)),
            lambda: nn.Linear(5, 4),
            nn.Tanh,
            lambda: Call(lambda x: x.view(6, -1, 4).square().mean(0)),
            lambda: nn.Linear(4, 3),
        ),
        6,
        5,
    ),
    layer("Linear called by keyword", Scripted, 5),
    layer("frozen first layer", lambda: frozen(mlp(), 0), 5, fit=True),
    layer("frozen bias", frozen_bias, 5),
    layer("parameters=: one pattern", mlp, 5, parameters="net.2.*"),
    layer("parameters=: weights only", mlp, 5, parameters=["*.weight"]),
    layer("parameters=: biases only", mlp, 5, parameters=["*.bias"]),
    layer("tied Linear weights with their own biases", tied_linear, 5, fit=True),
    layer("reused Linear", reused, 5),
    layer("square weight used both ways", BothWays, 5, fit=True),
    layer("square weight used both ways at 40 positions", lambda: BothWays(40), 5),
    layer("square weight and bias used both ways", BothWaysWithBias, 5),
    layer("reused Conv2d", reused_convolution, 2, 5, 4),
    # convolutions
    layer("Conv1d", over_space(lambda: nn.Conv1d(2, 4, 3), 4), 2, 9),
    layer("Conv1d, same, even kernel", over_space(lambda: EvenSame(2, 4, 4, padding="same"), 4), 2, 9),
    layer("Conv1d, same, dilation", over_space(lambda: nn.Conv1d(2, 4, 3, padding="same", dilation=2), 4), 2, 9),
    layer("Conv1d, circular", over_space(lambda: nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular"), 4), 2, 9),
    layer("Conv2d", over_space(lambda: nn.Conv2d(2, 4, 3), 4), 2, 6, 5, fit=True),
    layer("Conv2d without bias", over_space(lambda: nn.Conv2d(2, 4, 3, bias=False), 4), 2, 6, 5),
    layer("Conv2d, padding", over_space(lambda: nn.Conv2d(2, 4, 3, padding=(2, 1)), 4), 2, 6, 5),
    layer("Conv2d, padding valid", over_space(lambda: nn.Conv2d(2, 4, (3, 2), padding="valid"), 4), 2, 6, 5),
    layer("Conv2d, same", over_space(lambda: nn.Conv2d(2, 4, (3, 5), padding="same"), 4), 2, 6, 5),
    layer("Conv2d, stride that leaves a rest", over_space(lambda: nn.Conv2d(2, 4, 2, stride=(2, 3)), 4), 2, 7, 5),
    layer("Conv2d, dilation", over_space(lambda: nn.Conv2d(2, 4, 2, dilation=(1, 3)), 4), 2, 6, 5),
    layer("Conv2d, reflect", over_space(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), 4), 2, 6, 5),
    layer("Conv2d, replicate", over_space(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate"), 4), 2, 6, 5),
    layer("Conv2d, circular", over_space(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), 4), 2, 6, 5),
    layer("Conv2d, groups", over_space(lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), 6), 4, 6, 5),
    layer("Conv2d, depthwise", over_space(lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), 4), 4, 6, 5),
    layer("Conv2d, 1 x 1", over_space(lambda: nn.Conv2d(2, 4, 1), 4), 2, 6, 5),
    layer("Conv3d", over_space(lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=1), 4), 2, 3, 4, 5),
    layer(
        "Conv3d, groups, dilation", over_space(lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 1, 2)), 4), 2, 3, 4, 5
    ),
    layer(
        "Conv2d over frames flattened into the batch",
        sequential(
            lambda: Call(lambda x: x.flatten(0, 1)),
            lambda: nn.Conv2d(2, 4, 3),
            nn.Tanh,
            lambda: Call(lambda x: x.mean((2, 3)).view(-1, 3, 4).square().mean(1)),
            lambda: nn.Linear(4, 3),
        ),
        3,
        2,
        5,
        4,
    ),
    transposed(nn.ConvTranspose1d, 2, 5, kernel_size=3, stride=2),
    transposed(nn.ConvTranspose2d, 2, 4, 3, kernel_size=3, stride=2, padding=1, output_padding=1),
    transposed(nn.ConvTranspose2d, 2, 4, 3, kernel_size=2, groups=2, dilation=2, bias=False),
    transposed(nn.ConvTranspose3d, 2, 3, 2, 2, kernel_size=2, stride=(1, 2, 1)),
    # tables
    layer("Embedding with repeated ids", token_net(lambda: nn.Embedding(9, 4), 4), 6, high=9, fit=True),
    layer("Embedding, padding_idx", token_net(lambda: nn.Embedding(9, 4, padding_idx=2), 4), 6, high=9),
    layer("Embedding, negative padding_idx", token_net(lambda: nn.Embedding(9, 4, padding_idx=-1), 4), 6, high=9),
    layer("Embedding of one id", sequential(lambda: nn.Embedding(9, 4), lambda: nn.Linear(4, 3)), high=9),
    layer(
        "Embedding of a grid of ids",
        sequential(lambda: nn.Embedding(9, 4), lambda: Call(lambda x: x.tanh().mean((1, 2))), lambda: nn.Linear(4, 3)),
        2,
        3,
        high=9,
    ),
    layer("Embedding, sparse gradients", token_net(lambda: nn.Embedding(9, 4, sparse=True), 4), 6, high=9),
    layer("Embedding, max_norm", token_net(lambda: nn.Embedding(9, 4, max_norm=0.5), 4), 6, high=9),
    layer("EmbeddingBag, mean", Bags, 5, high=9),
    layer("EmbeddingBag, sum, padding_idx", lambda: Bags(mode="sum", padding_idx=3), 5, high=9),
    layer("EmbeddingBag, max", lambda: Bags(mode="max"), 5, high=9),
    layer("EmbeddingBag, weights", lambda: WeightedBags(mode="sum"), 5, high=9),
    layer("EmbeddingBag with offsets", FlatBags, 5, high=9),
    # normalisations
    layer(
        "LayerNorm", sequential(lambda: nn.Linear(5, 4), lambda: nn.LayerNorm(4), nn.Tanh, lambda: nn.Linear(4, 3)), 5
    ),
    layer(
        "LayerNorm over two dimensions",
        sequential(lambda: nn.LayerNorm((3, 4)), nn.Tanh, nn.Flatten, lambda: nn.Linear(12, 3)),
        3,
        4,
    ),
    layer(
        "LayerNorm over positions", sequential(lambda: nn.LayerNorm(4), nn.Tanh, Take, lambda: nn.Linear(4, 3)), 6, 4
    ),
    layer(
        "LayerNorm without bias", sequential(lambda: nn.LayerNorm(4, bias=False), nn.Tanh, lambda: nn.Linear(4, 3)), 4
    ),
    layer("RMSNorm", sequential(lambda: nn.RMSNorm(4), nn.Tanh, lambda: nn.Linear(4, 3)), 4),
    layer("GroupNorm", over_space(lambda: nn.GroupNorm(2, 4), 4), 4, 3, 5),
    layer("InstanceNorm, affine", over_space(lambda: nn.InstanceNorm2d(4, affine=True), 4), 4, 3, 5),
    layer(
        "InstanceNorm with running statistics",
        over_space(lambda: with_statistics(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)), 4),
        4,
        7,
    ),
    layer(
        "BatchNorm1d",
        lambda: with_statistics(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))),
        5,
        fit=True,
    ),
    layer("BatchNorm1d over positions", over_space(lambda: with_statistics(nn.BatchNorm1d(4)), 4), 4, 6),
    layer(
        "BatchNorm2d",
        lambda: with_statistics(nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), Pooled(4))),
        2,
        6,
        5,
        fit=True,
    ),
    layer("BatchNorm3d", over_space(lambda: with_statistics(nn.BatchNorm3d(2)), 2), 2, 3, 2, 2),
    layer("dropout", lambda: nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, 3)), 5, fit=True),
    layer("PReLU", sequential(lambda: nn.Linear(5, 4), nn.PReLU, lambda: nn.Linear(4, 3)), 5),
    layer("PReLU by channel", over_space(lambda: nn.PReLU(4), 4), 4, 3, 2),
    Case("bias and weight in different parameter groups", lambda: Step(mlp(), two_groups=True), **both(5), fit=True),
    Case(
        "convolution with bias in another group",
        lambda: Step(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), Pooled(4)), two_groups=True),
        **both(2, 6, 5),
        fit=True,
    ),
    Case("tied weights in two groups", lambda: Step(tied_linear(), two_groups=True), **both(5), fit=True),
    Case("a parameter without entries", lambda: Step(Odd(torch.zeros(0, 3))), **both(5)),
    Case(
        "complex parameter left out",
        lambda: Step(Odd(torch.ones(3, dtype=torch.complex128))),
        **both(5),
        parameters="net.net.*",
    ),
]
