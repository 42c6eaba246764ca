"""What a GPU of NVIDIA has beside other devices: kernels without second derivatives, its own compiler, memory, NCCL.

``TESTED_DEVICE=cuda:0 pytest -m "device or gpu" tests`` runs it with the tests that any device shares.
"""

import os

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import devices
from devices.fits_on import fitted, trainer
from devices.test_methods import METHODS, asked, assert_same
from lightning_influence import (
    EKFAC,
    Attributor,
    ConjugateGradient,
    ExactGGN,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    TracIn,
    TracInCP,
)
from lightning_influence.replay.replay import DriftError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not devices.HERE.startswith("cuda"), reason="needs TESTED_DEVICE=cuda:0"),
]
HERE = devices.HERE


class Net(pl.LightningModule):
    """Classifies sequences of 8 rows of 6 numbers into three."""

    def __init__(self, net, optimizer=None):
        super().__init__()
        self.net, self.optimizer = net, optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, kind, **options):
        super().__init__()
        self.cell = kind(6, 8, batch_first=True, **options)
        self.out = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


class Attends(nn.Module):
    """Attention by the function whose fused kernels differ between types."""

    def __init__(self, causal=False):
        super().__init__()
        self.into, self.out, self.causal = nn.Linear(6, 48), nn.Linear(16, 3), causal

    def forward(self, x):
        query, key, value = self.into(x).view(len(x), 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(len(x), 8, 16).mean(1))


class Encoder(nn.Module):
    """PyTorch's own encoder, whose eval mode has a fast path."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.into, self.encoder, self.out = nn.Linear(6, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.encoder(self.into(x)).mean(1))


class Convolves(nn.Module):
    """Images of one channel through a convolution in an order of memory."""

    def __init__(self, order=torch.contiguous_format, groups=1, norm=nn.GroupNorm):
        super().__init__()
        self.order = order
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=groups)
        self.norm = norm(4) if norm is nn.BatchNorm2d else norm(2, 4)
        self.out = nn.Linear(4 * 4 * 2, 3)

    def forward(self, x):
        x = self.first(x[:, None]).contiguous(memory_format=self.order)
        return self.out(self.norm(self.second(x).relu()).flatten(1))


NETS = {
    "RNN": lambda: Last(nn.RNN),
    "GRU": lambda: Last(nn.GRU),
    "LSTM": lambda: Last(nn.LSTM),
    "LSTM of two layers": lambda: Last(nn.LSTM, num_layers=2, bidirectional=True),
    "LSTM with projections": lambda: nn.Sequential(nn.Linear(6, 6), Projected()),
    "attention": Attends,
    "causal attention": lambda: Attends(causal=True),
    "encoder": Encoder,
    "convolutions": Convolves,
    "convolutions, channels last": lambda: Convolves(torch.channels_last),
    "grouped convolutions": lambda: Convolves(groups=4),
    "batch norm": lambda: Convolves(norm=nn.BatchNorm2d),
}


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTM(6, 8, proj_size=4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


def data(n, seed, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 8, 6, generator=draw, dtype=dtype), torch.randint(3, (n,), generator=draw))


def fit_of(net, folder, dtype=torch.float64, device="cpu", optimizer=None, methods=(), **options):
    """(module, training data, callback) after two epochs on a device."""
    torch.manual_seed(0)
    module, train = Net(net(), optimizer).to(dtype), data(14, 1, dtype)
    queries = data(3, 2, dtype) if methods else None
    influence = Influence(list(methods), queries, dirpath=folder, log_scores=False, max_cost=1e9)
    trainer(device, callbacks=[influence], **options).fit(module, DataLoader(train, 4, shuffle=True))
    return module, train, influence


ASKED = {
    "TracInCP": TracInCP(),
    "GradientDot": GradientDot(),
    "EKFAC": InfluenceFunction(EKFAC()),
    "ExactGGN": InfluenceFunction(ExactGGN(damping=0.1)),
    "ConjugateGradient": InfluenceFunction(ConjugateGradient(damping=1.0)),
    "HyDRA": HyDRA(),
    "TracIn": TracIn(),
}


def both(about, method, dtype, precision=None):
    """Scores on the GPU and on the CPU."""
    module, train, influence = about
    ask = lambda where: Attributor(  # noqa: E731
        module, train, influence.trajectory, trainer=trainer(where), batch_size=5, precision=precision
    )
    return [ask(where).score(method, data(3, 2, dtype)).values for where in (HERE, "cpu")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("method", ASKED)
@pytest.mark.parametrize("net", NETS)
def test_layers_with_kernels_of_their_own_are_scored_as_on_the_cpu(net, method, dtype, tmp_path):
    if net == "batch norm" and method in ("HyDRA", "TracIn"):
        pytest.skip("its examples change one another, which is refused on every device")
    about = fit_of(NETS[net], tmp_path, dtype)
    precision = "32-true" if dtype is torch.float32 else None
    assert_same(*both(about, ASKED[method], dtype, precision), dtype)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", ASKED)
@pytest.mark.parametrize("net", ["LSTM", "attention", "encoder", "convolutions"])
def test_fits_in_16_bits_are_scored(net, method, precision, tmp_path):
    about = fit_of(NETS[net], tmp_path, torch.float32, HERE, precision=precision)
    try:
        found = both(about, ASKED[method], torch.float32)[0]
    except DriftError:
        assert precision != "16-mixed"  # bfloat16 is coarse, and the replay rounds otherwise than the fit
        assert method in ("HyDRA", "TracIn")
        return
    assert bool(found.isfinite().all())
    assert bool(found.any())


OPTIMIZERS = {
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "capturable Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, capturable=True),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "foreach SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, nesterov=True, momentum=0.9, foreach=True),
    "a tensor as learning rate": lambda parameters: torch.optim.AdamW(
        parameters, lr=torch.tensor(0.01, device=HERE), capturable=True
    ),
}


ON_GPU_ONLY = [OPTIMIZERS[name] for name in ("capturable Adam", "a tensor as learning rate")]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["TracInCP", "HyDRA", "TracIn"])
def test_fits_of_the_gpus_own_optimizers_are_scored(optimizer, method, tmp_path):
    about = fit_of(Attends, tmp_path, torch.float64, HERE, OPTIMIZERS[optimizer])
    module, train, influence = about
    ask = Attributor(module, train, influence.trajectory, trainer=trainer(HERE))
    scores = ask.score(ASKED[method], data(3, 2))
    if OPTIMIZERS[optimizer] not in ON_GPU_ONLY:
        assert_same(scores.values, both(about, ASKED[method], torch.float64)[1], torch.float64)
    assert bool(scores.values.any())


@pytest.mark.parametrize("net", ["LSTM", "attention", "encoder", "convolutions"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_weights_with_the_callback_are_those_without(net, precision, tmp_path):
    found = []
    during = [HyDRA.during_fit()] if precision == "32-true" else []
    for methods in ([*during, TracInCP()], None):
        torch.manual_seed(0)
        module, train = Net(NETS[net]()), data(14, 1, torch.float32)
        callbacks = []
        if methods:
            queries = data(3, 2, torch.float32)
            callbacks = [Influence(methods, queries, dirpath=tmp_path, log_scores=False, max_cost=1e9)]
        torch.manual_seed(1)
        fit = trainer(HERE, callbacks=callbacks, precision=precision, deterministic="warn")
        fit.fit(module, DataLoader(train, 4, shuffle=True))
        found.append(torch.cat([p.detach().cpu().flatten() for p in module.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", METHODS)
def test_scores_where_only_deterministic_operations_are_allowed(name, tmp_path):
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    about = fitted(tmp_path / "runs", torch.float64)
    expected = asked(*about, METHODS[name], "cpu", tmp_path / "cpu")
    torch.use_deterministic_algorithms(True)
    try:
        found = asked(*about, METHODS[name], HERE, tmp_path / "gpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(found, expected, torch.float64)


@pytest.mark.parametrize("method", ["TracInCP", "EKFAC", "HyDRA"])
@pytest.mark.parametrize("net", ["attention", "convolutions", "LSTM"])
def test_a_compiled_module_is_scored(net, method, tmp_path):
    about = fit_of(NETS[net], tmp_path, torch.float32)
    module, train, influence = about
    expected = both(about, ASKED[method], torch.float32, "32-true")[1]
    compiled = torch.compile(module)
    ask = Attributor(compiled, train, influence.trajectory, trainer=trainer(HERE), precision="32-true")
    assert_same(ask.score(ASKED[method], data(3, 2, torch.float32)).values, expected, torch.float32)


def test_a_compiled_module_is_fitted(tmp_path):
    torch.manual_seed(0)
    module, train = torch.compile(Net(Attends())), data(14, 1, torch.float32)
    influence = Influence([TracInCP()], data(3, 2, torch.float32), dirpath=tmp_path, log_scores=False)
    trainer(HERE, callbacks=[influence]).fit(module, DataLoader(train, 4))
    (scores,) = influence.scores.values()
    assert bool(scores.values.any())


def test_blocks_shrink_where_memory_runs_out(tmp_path):
    torch.manual_seed(0)
    wide = lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 4096), nn.Tanh(), nn.Linear(4096, 3))  # noqa: E731
    module, train, queries = Net(wide()), data(20_000, 1, torch.float32), data(64, 2, torch.float32)
    expected = Attributor(module, train, batch_size=20_000).score(GradientDot(), queries).values
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.4e9 / whole)
    try:
        ask = Attributor(module, train, trainer=trainer(HERE), batch_size=20_000, precision="32-true")
        found = ask.score(GradientDot(), queries)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("Memory" in note for note in found.notes), found.notes
    assert_same(found.values, expected, torch.float32)


class Sharded(Net):
    """Its weights are shared by processes, by FSDP 2."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if not isinstance(next(self.parameters()), torch.distributed.tensor.DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP 2"])
def test_a_fit_of_one_process_by_nccl(sharded, tmp_path):
    torch.manual_seed(0)
    module, train = (Sharded if sharded else Net)(Attends()), data(16, 1, torch.float32)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1) if sharded else "ddp"
    influence = Influence([TracInCP()], data(3, 2, torch.float32), dirpath=tmp_path, log_scores=False)
    try:
        fit = trainer(HERE, callbacks=[influence], strategy=strategy)
        fit.fit(module, DataLoader(train, 4))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    queries, whole = data(3, 2, torch.float32), Net(Attends())
    expected, found = (
        Attributor(whole, train, influence.trajectory, trainer=trainer(where), precision="32-true")
        .score(TracInCP(), queries)
        .values
        for where in ("cpu", HERE)
    )
    assert_same(found, expected, torch.float32)
    if not sharded:  # whose weights are scored once they are whole
        assert_same(next(iter(influence.scores.values())).values, expected, torch.float32)


def test_copies_from_pinned_memory_of_workers_arrive(tmp_path):
    torch.manual_seed(0)
    module, train = Net(Attends()).double(), data(500, 1)
    loader = DataLoader(train, 16, shuffle=True, num_workers=2, pin_memory=True, persistent_workers=True)
    influence = Influence(dirpath=tmp_path)
    trainer(HERE, callbacks=[influence]).fit(module, loader)
    found = [
        Attributor(module, loader, influence.trajectory, trainer=trainer(where)).score(TracInCP(), data(9, 2)).values
        for where in (HERE, "cpu")
    ]
    assert_same(*found, torch.float64)


def test_many_blocks_on_the_gpu_race_with_no_copy():
    """Blocks are copied while the one before is computed: a buffer that is used again too early would show."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 256), nn.Tanh(), nn.Linear(256, 3))
    module, train = Net(net).double(), data(40_000, 1)
    found = [
        Attributor(module, train, trainer=trainer(where), batch_size=256).score(GradientDot(), data(9, 2)).values
        for where in (HERE, "cpu")
    ]
    assert_same(*found, torch.float64)


def test_rows_in_float16_that_overflow_are_refused_or_right(tmp_path):
    about = fit_of(NETS["attention"], tmp_path, torch.float32)
    found = both(about, GradientDot(), torch.float32, "16-mixed")
    torch.testing.assert_close(*found, rtol=0, atol=0.05 * float(found[1].abs().max()))
