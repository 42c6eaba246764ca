"""What a first question costs beside plain passes over the same data, beside later questions and beside dattri-LLM.

python tests/benchmarks/first_call.py [SUBJECT ...] [--mnist mnist.npz] [--ag-news FOLDER] [--repeats 5]
    [--device cuda] [--times 10]

For each subject, in one run: medians of a plain pass, of the checks before scoring (self-check, probing, planning), of
a first and a later `GradientDot`, and of dattri-LLM's where it is installed (`pip install --no-deps dattri-llm`, with
transformers and accelerate); the examples that the checks run, their time in example passes, the peak of memory beside
that of plain passes of such blocks, and these with AdamW's state; the share of the spot checks in a longer question.

Promised are at most 20 example passes where a model has more than a million parameters, and 0.15 s where it has fewer.
"""

import argparse
import contextlib
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from subjects import BATCH, Classifier, Encoder, cnn, images, mlp, texts
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_influence import Attributor, GradientDot
from lightning_influence.gradients.guard import Guard
from lightning_influence.module.task import Task


class Attention(nn.Module):
    """A block of GPT-2."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, tokens, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT2(nn.Module):
    """GPT-2's shape, with its width of 768 and its output layer tied to the embedding."""

    def __init__(self, vocabulary, layers, width=768):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(1024, width)
        self.blocks, self.norm = nn.Sequential(*[Attention(width, 12) for _ in range(layers)]), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        hidden = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(hidden))).transpose(1, 2)


class LoRA(nn.Module):
    """A frozen layer and a product of two small matrices."""

    def __init__(self, layer, rank=8):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a, self.b = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.b.weight, std=0.01)  # as after some steps

    def forward(self, x):
        return self.layer(x) + self.b(self.a(x))


def with_lora(net):
    net.requires_grad_(False)
    for block in net.blocks:
        block.qkv, block.out = LoRA(block.qkv), LoRA(block.out)
    return net


def lines(n_train, n_queries, vocabulary, tokens=32):
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(vocabulary, (n_train + n_queries, tokens + 1), generator=draw)
    pairs = TensorDataset(x[:, :-1], x[:, 1:])
    return TensorDataset(*pairs[:n_train]), TensorDataset(*pairs[n_train:])


SUBJECTS = {
    "mlp": (mlp, lambda a: images(a.mnist, 1000, 50)),
    "cnn": (cnn, lambda a: images(a.mnist, 1000, 50)),
    "transformer": (Encoder, lambda a: texts(a.ag_news, 1000, 50)),
    "gpt2-21M": (lambda: GPT2(8000, 2), lambda a: lines(64, 8, 8000)),
    "gpt2-21M-256": (lambda: GPT2(8000, 2), lambda a: lines(16, 4, 8000, 256)),
    "gpt2-68M": (lambda: GPT2(50257, 4), lambda a: lines(16, 4, 50257)),
    "gpt2-68M-lora": (lambda: with_lora(GPT2(50257, 4)), lambda a: lines(16, 4, 50257)),
}


def plain(module, datasets, batch=None):
    """Seconds of forward and backward passes; batches of 16 where the model has a vocabulary to predict."""
    batch = batch or (16 if isinstance(module.net, GPT2) else BATCH)
    device = next(module.parameters()).device
    start = now()
    for data in datasets:
        for some in DataLoader(data, batch):
            module.zero_grad()
            module.training_step([part.to(device) for part in some], 0).backward()
    module.zero_grad()
    return now() - start


def now():
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def repeated(data, times):
    """A dataset of so many times as many examples."""
    return TensorDataset(*(t.repeat(times, *[1] * (t.ndim - 1)) for t in data.tensors))


@contextlib.contextmanager
def examples_run():
    """Counts the examples of all calls of the step inside."""
    found, run = [], Task._run
    Task._run = lambda task, batch: (found.append(len(batch[-1])), run(task, batch))[1]
    try:
        yield found
    finally:
        Task._run = run


class Named(Dataset):
    """dattri-LLM wants dicts."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return {"x": x, "y": y}


def dattri(module, train, queries):
    """Seconds of dattri-LLM's TracIn; None where it is not installed."""
    try:
        from dattri_llm import AttributionArguments, AttributionTask, TracInAttributor
    except ImportError:
        return None
    batch = min(BATCH, len(train))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        start = now()
        task = AttributionTask(loss_func=lambda net, b: F.cross_entropy(net(b["x"]), b["y"]), model=module.net)
        options = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
        found = TracInAttributor(AttributionArguments(output_dir=folder, **options), task=task)
        found.attribute(Named(train), Named(queries))
        return now() - start


def measure(name, options):
    make, read = SUBJECTS[name]
    torch.manual_seed(0)
    module, (train, queries) = Classifier(make()).eval().to(options.device), read(options)
    train = repeated(train, options.times)
    seconds = {key: [] for key in ("plain", "checks", "first", "later", "dattri-LLM")}
    for turn in range(options.repeats + 1):
        found = {"plain": plain(module, (train, queries))}
        start = now()
        with examples_run() as ran, Attributor(module, train).session(queries) as setting:
            block = min(setting.examples.block_size, len(train))
        found["checks"] = now() - start
        asked = Attributor(module, train)
        for key in ("first", "later"):
            start = now()
            asked.score(GradientDot(), queries)
            found[key] = now() - start
        found["dattri-LLM"] = dattri(copy.deepcopy(module), train, queries)
        for key, value in found.items():
            if turn and value is not None:  # the first turn warms up
                seconds[key].append(value)
    medians = {key: statistics.median(values) if values else float("nan") for key, values in seconds.items()}
    each = medians["plain"] / (len(train) + len(queries))
    parameters = sum(p.numel() for p in module.parameters())
    print(f"{name}: {parameters:,} parameters, {len(train)} + {len(queries)} examples")
    for key, value in medians.items():
        print(f"    {key:<12}{value:9.3f} s {value / medians['plain']:8.2f} x plain")
    print(
        f"    checks: {sum(ran)} examples in {len(ran)} calls, as long as {medians['checks'] / each:.1f} plain example "
        f"passes; later / plain {medians['later'] / medians['plain']:.2f}; first / dattri-LLM "
        f"{medians['first'] / medians['dattri-LLM']:.2f}"
    )
    ours, at_once = (peak(name, what, block, options) for what in ("ours", "plain"))
    state = 8 * sum(p.numel() for p in module.parameters() if p.requires_grad) / 2**20
    print(
        f"    peak memory: ours {ours:.0f} MiB; plain passes of blocks of {block} {at_once:.0f}, with AdamW's state "
        f"{at_once + state:.0f}"
    )
    print(f"    spot checks: {spot_checks(module, train, queries):.1%} of a question of {10 * len(train)} examples")


def spot_checks(module, train, queries):
    """The share of the spot checks in a longer question."""
    longer = repeated(train, 10)
    spent, check = [], Guard.check

    def timed(*args):
        start = now()
        check(*args)
        spent.append(now() - start)

    asked = Attributor(module, longer)
    with asked.session(queries):
        Guard.check, start = timed, now()
        try:
            asked.score(GradientDot(), queries)
        finally:
            Guard.check = check
    return sum(spent) / (now() - start)


def peak(name, what, block, options):
    """Mebibytes that plain passes or a first question add to a process that has torch and the data."""
    command = [sys.executable, __file__, name, "--peak", what, "--batch", str(block)]
    command += ["--device", options.device, "--times", str(options.times)]
    command += [f"--{key.replace('_', '-')}={path}" for key in ("mnist", "ag_news") if (path := getattr(options, key))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(name, what, options):
    make, read = SUBJECTS[name]
    train, queries = read(options)
    train = repeated(train, options.times)
    before = high_water(options.device)
    module = Classifier(make()).eval().to(options.device)
    if what == "plain":
        plain(module, (train, queries), options.batch)
    else:
        Attributor(module, train).score(GradientDot(), queries)
    print((high_water(options.device) - before) / 1024)


def high_water(device):
    """Kibibytes that this process has had at most, on a GPU in its memory; `ru_maxrss` would count its parent's."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1024
    return int(next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("subjects", nargs="*", default=list(SUBJECTS))
    parser.add_argument("--mnist")
    parser.add_argument("--ag-news")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--times", type=int, default=1, help="how often the training data are repeated")
    parser.add_argument("--peak")
    parser.add_argument("--batch", type=int)
    given = parser.parse_args()
    for subject in given.subjects:
        if given.peak:
            print_peak(subject, given.peak, given)
        else:
            measure(subject, given)
