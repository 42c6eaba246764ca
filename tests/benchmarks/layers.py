"""Every kind of layer and slow path beside plain passes of the same module: later scores, in plain passes.

python tests/benchmarks/layers.py [NAME ...]

A plain pass is a forward and backward pass in eval mode over the same training examples and queries, in the same
blocks. CPU seconds, by turns. Exits with 1 if a kind is above its ceiling.
"""

import argparse
import statistics
import sys
import time
import warnings

import pytorch_lightning as pl
import torch
from subjects import QUIET, Classifier
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributor, GradientDot

BLOCK = 128


class MaskedLinear(nn.Linear):
    """A layer of MADE: an output sees the inputs of lower degrees."""

    def __init__(self, inputs, outputs, degrees=16):
        super().__init__(inputs, outputs)
        rows, columns = torch.arange(outputs) % degrees, torch.arange(inputs) % degrees
        self.register_buffer("mask", (rows[:, None] >= columns[None]).float())

    def forward(self, x):
        return F.linear(x, self.mask * self.weight, self.bias)


class Apply(nn.Module):
    def __init__(self, work, **parts):
        super().__init__()
        self.work = work
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.work(self, x)


def tokens(make, width=64):
    """Something applied to embedded tokens, whose mean is classified."""
    return lambda: Apply(
        lambda m, x: m.head(m.inner(m.embed(x)).mean(1)),
        embed=nn.Linear(8, width),
        inner=make(),
        head=nn.Linear(width, 4),
    )


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


def perceptron(layer):
    return lambda: nn.Sequential(layer(64, 256), nn.ReLU(), layer(256, 256), nn.ReLU(), nn.Linear(256, 4))


def convolutions(wrap):
    return lambda: nn.Sequential(
        *(wrap(nn.Conv2d(3, 16, 3, padding=1)), nn.ReLU(), wrap(nn.Conv2d(16, 32, 3, padding=1, stride=2)), nn.ReLU()),
        *(wrap(nn.Conv2d(32, 32, 3, padding=1, stride=2)), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 4)),
    )


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module)


def cross_attention():
    latent = nn.MultiheadAttention(64, 4, batch_first=True)
    return Apply(lambda m, x: m.attention(m.query(x[:, ::2]), x, x)[0], attention=latent, query=nn.Linear(64, 64))


def merged_lora():
    """A low-rank product is added to a weight that does not train."""
    base = nn.Linear(256, 256).requires_grad_(False)
    net = Apply(
        lambda m, x: F.linear(x, m.base.weight + 2.0 * (m.up @ m.down), m.base.bias),
        base=base,
        up=parameter(256, 8),
        down=parameter(8, 256),
    )
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), net, nn.ReLU(), nn.Linear(256, 4))


def experts():
    """A mixture of experts that are one tensor each: all see all tokens, weighted by a gate."""

    def forward(m, x):
        gates = m.gate(x).softmax(-1)
        outputs = [F.linear(F.silu(F.linear(x, m.up[e])), m.down[e]) for e in range(4)]
        return (torch.stack(outputs, -1) * gates[:, :, None]).sum(-1)

    return Apply(forward, gate=nn.Linear(64, 4), up=parameter(4, 128, 64), down=parameter(4, 64, 128))


def einsum_experts():
    def forward(m, x):
        hidden = F.silu(torch.einsum("btd,edh->bteh", x, m.up))
        return torch.einsum("bteh,ehd->bted", hidden, m.down).mean(2)

    return Apply(forward, up=parameter(4, 64, 128), down=parameter(4, 128, 64))


def routed_experts():
    """Tokens are gathered by expert, as in Hugging Face's Mixtral."""

    def forward(m, x):
        flat = x.flatten(0, 1)
        to = m.gate(flat).topk(2, -1).indices
        out = torch.zeros_like(flat)
        for e in range(4):
            chosen = (to == e).any(-1).nonzero()[:, 0]
            out.index_add_(0, chosen, F.linear(F.silu(F.linear(flat[chosen], m.up[e])), m.down[e]))
        return out.view(x.shape)

    return Apply(forward, gate=nn.Linear(64, 4), up=parameter(4, 128, 64), down=parameter(4, 64, 128))


def kan(inputs, outputs, knots=8):
    """A layer of an efficient KAN: radial functions of each input, with scaled coefficients."""

    def forward(m, x):
        basis = (-(x[..., None] - m.grid).square()).exp()
        weight = m.coefficients * m.scale[..., None]
        return F.linear(F.silu(x), m.base) + F.linear(basis.flatten(1), weight.view(outputs, -1))

    net = Apply(
        forward, base=parameter(outputs, inputs), scale=parameter(outputs, inputs),
        coefficients=parameter(outputs, inputs, knots),
    )  # fmt: skip
    net.register_buffer("grid", torch.linspace(-2, 2, knots))
    return net


def einsum_kan(inputs, outputs, knots=8):
    """A layer of pykan: the coefficients are contracted by edges."""

    def forward(m, x):
        basis = (-(x[..., None] - m.grid).square()).exp()
        return torch.einsum("bik,iok->bio", basis, m.coefficients).sum(1)

    net = Apply(forward, coefficients=parameter(inputs, outputs, knots))
    net.register_buffer("grid", torch.linspace(-2, 2, knots))
    return net


def mamba(width=64, states=8):
    """The parameters of a state-space layer, with the scan as a loop."""

    def forward(m, x):
        h = F.silu(m.conv(m.into(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, b, c = m.parts(h).split([4, states, states], -1)
        step, a = F.softplus(m.step(step)), -torch.exp(m.a_log)
        decay = torch.exp(step[..., None] * a)
        state, outputs = 0, []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + (step[:, t] * h[:, t])[..., None] * b[:, t, None]
            outputs.append((state * c[:, t, None]).sum(-1))
        return m.out(torch.stack(outputs, 1) + h * m.d)

    return Apply(
        forward,
        into=nn.Linear(width, width),
        conv=nn.Conv1d(width, width, 4, groups=width, padding=3),
        parts=nn.Linear(width, 4 + 2 * states),
        step=nn.Linear(4, width),
        a_log=nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1)),
        d=nn.Parameter(torch.ones(width)),
        out=nn.Linear(width, width),
    )


def positions():
    return Apply(lambda m, x: m.mix(x + m.positions[:, : x.shape[1]]), positions=parameter(1, 64, 64), mix=encoder())


def encoder():
    return nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)


FLAT, IMAGES, SEQUENCES = (64,), (3, 16, 16), (16, 8)
KINDS = {
    "Linear": (perceptron(nn.Linear), FLAT, None),
    "masked Linear": (perceptron(MaskedLinear), FLAT, 4.0),
    "low-rank product merged": (merged_lora, FLAT, None),
    "KAN": (lambda: nn.Sequential(kan(64, 32), kan(32, 4)), FLAT, None),
    "KAN by einsum": (lambda: nn.Sequential(einsum_kan(64, 32), einsum_kan(32, 4)), FLAT, None),
    "convolution": (convolutions(lambda m: m), IMAGES, None),
    "weight norm": (convolutions(parametrizations.weight_norm), IMAGES, 2.5),
    "weight norm (old)": (convolutions(old_weight_norm), IMAGES, 2.5),
    "spectral norm": (convolutions(parametrizations.spectral_norm), IMAGES, None),
    "Transformer layer": (tokens(encoder), SEQUENCES, None),
    "cross-attention": (tokens(cross_attention), SEQUENCES, 3.3),
    "learned positions": (tokens(positions), SEQUENCES, None),
    "LSTM": (tokens(lambda: Apply(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(64, 64, batch_first=True))), SEQUENCES, None),
    "experts": (tokens(experts), SEQUENCES, 3.0),
    "experts by einsum": (tokens(einsum_experts), SEQUENCES, 3.0),
    "experts by token": (tokens(routed_experts), SEQUENCES, None),
    "state space": (tokens(mamba), SEQUENCES, None),
}


def data(shape, count, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=draw)
    return TensorDataset(x, torch.randint(0, 4, (count,), generator=draw))


def measure(name, examples, queries, repeats):
    make, shape, most = KINDS[name]
    torch.manual_seed(0)
    module, train, asked = Classifier(make()), data(shape, examples, 1), data(shape, queries, 2)
    loader = DataLoader(train, BLOCK)
    attributor = Attributor(module, loader, batch_size=BLOCK, trainer=pl.Trainer(**QUIET))
    parameters = [p for p in module.parameters() if p.requires_grad]

    def plain():
        module.eval()
        for side in (loader, DataLoader(asked, BLOCK)):
            for batch in side:
                torch.autograd.grad(module.training_step(batch, 0), parameters, allow_unused=True)

    works = {"plain": plain, "score": lambda: attributor.score(GradientDot(), asked)}
    notes = works["score"]().notes
    seconds = {key: [] for key in works}
    for turn in range(-1, repeats):
        for key, work in works.items():
            start = time.process_time()
            work()
            if turn >= 0:
                seconds[key].append(time.process_time() - start)
    took = {key: statistics.median(values) for key, values in seconds.items()}
    ratio = took["score"] / took["plain"]
    path = next((note for note in notes if "factored per-sample gradients" in note), "")
    slow = path.partition(";")[2].strip() or "-"
    ceiling = "" if most is None else f"at most {most}"
    print(f"| {name} | {took['plain']:.3f} | {took['score']:.3f} | {ratio:.2f} | {ceiling} | {slow} |", flush=True)
    return most is None or ratio <= most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*KINDS, []], help="kinds of layers; none: all")
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{asked.examples} examples, {asked.queries} queries, blocks of {BLOCK}, torch {torch.__version__}\n")
    print("| layer | plain s | scores s | x plain | ceiling | not factored |\n| --- | --- | --- | --- | --- | --- |")
    found = [measure(name, asked.examples, asked.queries, asked.repeats) for name in asked.names or KINDS]
    sys.exit(not all(found))


if __name__ == "__main__":
    main()
