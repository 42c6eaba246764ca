"""Scores at the weights that a user deploys, and ``.ckpt`` files that do not have all that the module has."""

import warnings

import oracles
import pytest
import pytorch_lightning as pl
import torch
from case import Step, both, drawn
from fits import fit
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, default_collate

from lightning_influence import (
    Attributor,
    ExactGGN,
    GradientDot,
    Influence,
    InfluenceFunction,
    KNNShapley,
    RepresenterPoints,
    TracInCP,
    Trajectory,
)
from lightning_influence.cli import main
from lightning_influence.trajectory.files import read_manifest
from lightning_influence.types import MissingEvidence

pytestmark = pytest.mark.filterwarnings("ignore:The learning rates stored", "ignore:.*raw weights are read")
DATA = both(5, n=12)


class Validated(Step):
    """Logs a metric that is best in the second epoch."""

    def validation_step(self, batch, batch_idx):
        self.log("score", torch.tensor([0.1, 0.9, 0.5, 0.4][self.current_epoch]))


def make(norm=False, hidden=6):
    torch.manual_seed(0)
    layers = [nn.Linear(5, hidden), nn.BatchNorm1d(hidden) if norm else nn.Identity(), nn.Tanh(), nn.Linear(hidden, 3)]
    return Validated(nn.Sequential(*layers)).double()


@pytest.fixture
def fitted(tmp_path):
    """Fits three epochs; returns a function that does so."""

    def run(*callbacks, norm=False, validate=True, keep=None, **options):
        module, data = make(norm), DATA["train"]()
        loaders = DataLoader(data, 4, shuffle=False)
        keep = keep or ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", monitor="score", mode="max")
        capture = Influence(dirpath=tmp_path / "influence")
        options = {"max_epochs": 3, "num_sanity_val_steps": 0, "enable_checkpointing": True, **options}
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[capture, *callbacks, keep],
                **options,
            )
            trainer.fit(module, loaders, loaders if validate else None)
        return module, trainer, keep

    return run


def dots(module, names=None):
    """Gradient dot products at the weights that the module has now."""
    train, queries = ([default_collate([x]) for x in DATA[part]()] for part in ("train", "queries"))
    names = names or [name for name, p in module.named_parameters() if p.requires_grad]
    return oracles.tracin(module.eval(), train, queries, names, [(None, torch.ones(1, len(train)))])


def scored(trajectory, weights, norm=False, method=None, **options):
    attributor = Attributor(make(norm), DATA["train"](), trajectory, weights=weights, **options)
    return attributor.score(method or GradientDot(), DATA["queries"]())


def loaded(path, norm=False):
    module = make(norm)
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module


# ---- averaged -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("first", ["influence", "averaging"])
def test_averaged_weights_are_those_that_the_fit_leaves(fitted, tmp_path, kind, norm, first):
    averaging = EMAWeightAveraging(decay=0.5) if kind == "ema" else StochasticWeightAveraging(0.05, swa_epoch_start=1)
    if first == "averaging":  # Lightning keeps the order of the list
        late = Influence(dirpath=tmp_path / "late")
        module, _, _ = fitted(averaging, late, norm=norm)
        trajectory = Trajectory.load(tmp_path / "late")
    else:
        module, _, _ = fitted(averaging, norm=norm)
        trajectory = Trajectory.load(tmp_path / "influence")
    scores = scored(trajectory, "averaged", norm)
    oracles.assert_scores(scores.values, dots(module), 1e-10)
    assert any("averaged weights at the end of the fit" in note for note in scores.notes)
    assert main(["verify", str(tmp_path / "influence")]) == 0
    last = make(norm)
    state = trajectory.checkpoints[-1].load()
    last.load_state_dict({**state.parameters, **state.buffers})
    oracles.assert_scores(scored(trajectory, "last", norm).values, dots(last), 1e-10)
    assert not torch.allclose(dots(last), dots(module))


def test_a_fit_without_an_average_says_so(fitted, tmp_path):
    fitted()
    trajectory = Trajectory.load(tmp_path / "influence")
    assert "averaged" not in read_manifest(trajectory.path)
    for given in (trajectory, None):
        with pytest.raises(MissingEvidence, match=r"Expected averaged weights.*path of the `\.ckpt` file"):
            scored(given, "averaged")


def test_an_average_that_lightning_did_not_use_is_none(fitted, tmp_path):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch == 1

    module, _, _ = fitted(StochasticWeightAveraging(0.05, swa_epoch_start=1), Stop())
    with pytest.raises(MissingEvidence, match="Expected averaged weights"):
        scored(Trajectory.load(tmp_path / "influence"), "averaged")
    oracles.assert_scores(scored(Trajectory.load(tmp_path / "influence"), "last").values, dots(module), 1e-10)


def test_averaged_weights_of_files(fitted, tmp_path):
    module, _, _ = fitted(EMAWeightAveraging(decay=0.5), keep=ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1))
    trajectory = Trajectory.from_checkpoints(tmp_path / "ckpt", 0.05)
    oracles.assert_scores(scored(trajectory, "averaged").values, dots(module), 1e-10)
    raw = scored(trajectory, "last").values
    own = scored(Trajectory.load(tmp_path / "influence"), "last").values
    assert torch.equal(raw, own)


# ---- best -----------------------------------------------------------------------------------------------------------


def test_best_weights(fitted, tmp_path):
    _, trainer, keep = fitted()
    trajectory = Trajectory.load(tmp_path / "influence")
    assert keep.best_model_path.endswith("epoch=1.ckpt")
    best = dots(loaded(keep.best_model_path))
    scores = scored(trajectory, "best")
    oracles.assert_scores(scores.values, best, 1e-10)
    assert any("best by 'score'" in note and "step 6" in note for note in scores.notes)
    assert list(scores.checkpoints) == [6]
    oracles.assert_scores(scored(trajectory, keep.best_model_path).values, best, 1e-10)
    oracles.assert_scores(scored(None, "best", trainer=trainer).values, best, 1e-10)
    losses = Attributor(make(), DATA["train"](), trajectory, weights="best").losses()
    module = loaded(keep.best_model_path).eval()
    expected = [module.training_step(default_collate([x]), 0).item() for x in DATA["train"]()]
    assert losses.values.tolist() == pytest.approx(expected, abs=1e-12)


def test_every_method_of_final_weights_uses_the_best(fitted, tmp_path):
    _, _, keep = fitted()
    trajectory = Trajectory.load(tmp_path / "influence")
    at_best = loaded(keep.best_model_path)
    for method in (InfluenceFunction(ExactGGN(damping=0.1)), KNNShapley(), RepresenterPoints(weight_decay=0.1)):
        plain = Attributor(at_best, DATA["train"]()).score(method, DATA["queries"]())
        scores = scored(trajectory, "best", method=method)
        last = scored(trajectory, "last", method=method)
        assert torch.allclose(scores.values, plain.values, rtol=1e-8, atol=1e-12), method
        # The nearest neighbours happen to be the same.
        assert isinstance(method, KNNShapley) or not torch.allclose(scores.values, last.values, rtol=1e-3), method
        # nothing that was kept beside the run belongs to other weights
        assert torch.equal(scored(trajectory, "last", method=method).values, last.values)


def test_methods_that_follow_the_fit_say_that_they_are_not_changed(fitted, tmp_path):
    fitted(EMAWeightAveraging(decay=0.5))
    trajectory = Trajectory.load(tmp_path / "influence")
    plain = scored(trajectory, "last", method=TracInCP())
    for weights in ("best", "averaged"):
        scores = scored(trajectory, weights, method=TracInCP())
        assert torch.equal(scores.values, plain.values)
        assert any(f"`weights='{weights}'` does not change `TracInCP`" in note for note in scores.notes)
    assert not any("weights=" in note for note in plain.notes)
    assert any("weights='averaged'" in note for note in scored(trajectory, "last").notes)


def test_a_best_file_that_is_gone(fitted, tmp_path):
    _, _, keep = fitted()
    best = dots(loaded(keep.best_model_path))
    trajectory = Trajectory.load(tmp_path / "influence")
    (tmp_path / "ckpt").rename(tmp_path / "moved")
    scores = scored(trajectory, "best")  # the run has a checkpoint of that step, too
    oracles.assert_scores(scores.values, best, 1e-10)
    assert any("not there any more" in note for note in scores.notes)
    oracles.assert_scores(scored(trajectory, tmp_path / "moved" / "epoch=1.ckpt").values, best, 1e-10)


def test_the_best_among_files(fitted, tmp_path):
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", monitor="score", mode="max", save_top_k=-1)
    fitted(keep=keep)
    best = dots(loaded(keep.best_model_path))
    (tmp_path / "ckpt").rename(tmp_path / "moved")
    trajectory = Trajectory.from_checkpoints(tmp_path / "moved", 0.05)
    scores = scored(trajectory, "best")
    oracles.assert_scores(scores.values, best, 1e-10)
    assert list(scores.checkpoints) == [6]
    (tmp_path / "moved" / "epoch=1.ckpt").unlink()
    with pytest.raises(MissingEvidence, match="got nothing there"):
        scored(trajectory, "best")


def test_a_best_file_of_averaged_weights_that_is_gone(fitted, tmp_path):
    _, _, keep = fitted(EMAWeightAveraging(decay=0.5))
    trajectory = Trajectory.load(tmp_path / "influence")
    oracles.assert_scores(scored(trajectory, "best").values, dots(loaded(keep.best_model_path)), 1e-10)
    (tmp_path / "ckpt").rename(tmp_path / "moved")
    with pytest.raises(MissingEvidence, match=r"got nothing there\. Pass `weights=`"):
        scored(trajectory, "best")


def test_a_best_file_that_another_fit_wrote_over(fitted, tmp_path):
    _, _, keep = fitted()
    content = torch.load(keep.best_model_path, weights_only=True)
    content["state_dict"] = make().state_dict()
    torch.save(content, keep.best_model_path)
    with pytest.raises(MissingEvidence, match="another fit, or a callback"):
        scored(Trajectory.load(tmp_path / "influence"), "best")


def test_without_a_best_file(fitted, tmp_path):
    fitted(keep=ModelCheckpoint(tmp_path / "none", save_top_k=0))
    with pytest.raises(MissingEvidence, match="Expected a file of `ModelCheckpoint`"):
        scored(Trajectory.load(tmp_path / "influence"), "best")


@pytest.mark.parametrize("weights", ["ema", "final", 3, None, ""])
def test_words_that_are_no_weights(fitted, weights):
    with pytest.raises(ValueError, match=r"'last', 'best', 'averaged' or the path"):
        scored(None, weights)


# ---- what is not in a file ------------------------------------------------------------------------------------------


class Frozen(Step):
    """A backbone and a buffer that are not saved."""

    def __init__(self, freeze=True):
        super().__init__(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
        self.register_buffer("shift", torch.randn(5, generator=drawn(3)))
        self.strict_loading = False
        if freeze:
            self.net[0].requires_grad_(False)

    def forward(self, x):
        return self.net(x + self.shift)

    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "net.2" in name}


def backbone(**options):
    torch.manual_seed(0)
    return Frozen(**options).double()


def frozen_files(tmp_path):
    module, keep = backbone(), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(module, DataLoader(DATA["train"](), 4), keep, enable_checkpointing=True)
    return module


def test_a_frozen_backbone_may_be_missing(tmp_path):
    module = frozen_files(tmp_path)
    trajectory = Trajectory.from_checkpoints(tmp_path, 0.05)
    assert not any("net.0" in name for name in trajectory.checkpoints[-1].load().parameters)
    attributor = Attributor(backbone(), DATA["train"](), trajectory)
    scores = attributor.score(GradientDot(), DATA["queries"]())
    oracles.assert_scores(scores.values, dots(module, ["net.2.weight", "net.2.bias"]), 1e-10)
    assert any("the module's own values are used: `net.0.weight`, `net.0.bias`" in note for note in scores.notes)
    with pytest.raises(ValueError, match=r"no `net\.0\.weight`.*requires_grad_\(False\)"):
        Attributor(backbone(freeze=False), DATA["train"](), trajectory)


def saved(path, state, **more):
    torch.save({"epoch": 0, "global_step": 3, "state_dict": state, **more}, path)
    return Trajectory.from_checkpoints(path, 0.1)


@pytest.mark.parametrize("prefix", ["module.", "_forward_module.", "_orig_mod.", "net._orig_mod"])
def test_prefixes_of_wrappers(tmp_path, prefix):
    module = make()
    state = module.state_dict()
    named = (
        {name.replace("net.", "net._orig_mod.", 1): value for name, value in state.items()}
        if prefix == "net._orig_mod"
        else {prefix + name: value for name, value in state.items()}
    )
    trajectory = saved(tmp_path / "a.ckpt", {name: value + 0.1 for name, value in named.items()})
    with torch.no_grad():
        expected = make()
        expected.load_state_dict({name: value + 0.1 for name, value in state.items()})
    oracles.assert_scores(scored(trajectory, "last").values, dots(expected), 1e-10)


def test_a_prefix_that_belongs_to_the_module_stays(tmp_path):
    class Own(Step):
        def __init__(self):
            super().__init__(None)
            self.net = None
            self.module = nn.Linear(5, 3)

        def forward(self, x):
            return self.module(x)

    module = Own().double()
    trajectory = saved(tmp_path / "a.ckpt", {k: v + 1 for k, v in module.state_dict().items()})
    attributor = Attributor(module, DATA["train"](), trajectory)
    assert attributor.trajectory.checkpoints[0].prefix == ""
    attributor.score(GradientDot(), DATA["queries"]())


def test_more_in_the_file_than_in_the_module(tmp_path):
    state = {**make().state_dict(), "net.4.weight": torch.ones(3, 3), "net.4.bias": torch.ones(3)}
    trajectory = saved(tmp_path / "a.ckpt", state)
    with pytest.raises(ValueError, match=r"also `net\.4\.bias`, `net\.4\.weight`.*strict_loading"):
        scored(trajectory, "last")
    module = make()
    module.strict_loading = False
    scores = Attributor(module, DATA["train"](), trajectory).score(GradientDot(), DATA["queries"]())
    assert any("but not in the module" in note and "net.4.bias" in note for note in scores.notes)


def test_more_in_a_run_than_in_the_module(fitted, tmp_path):
    fitted()
    module = make()
    module.net = module.net[:1]
    trajectory = Trajectory.load(tmp_path / "influence")
    with pytest.raises(ValueError, match=r"also `net\.3\.bias`, `net\.3\.weight`.*strict_loading"):
        Attributor(module, DATA["train"](), trajectory).score(GradientDot(), DATA["queries"]())


def test_a_hook_that_is_not_called_is_noted(tmp_path):
    class Hooked(Validated):
        def on_load_checkpoint(self, checkpoint):
            raise AssertionError

    trajectory = saved(tmp_path / "a.ckpt", make().state_dict())
    module = make()
    module.__class__ = Hooked
    scores = Attributor(module, DATA["train"](), trajectory).score(GradientDot(), DATA["queries"]())
    assert any("`on_load_checkpoint` is not called" in note for note in scores.notes)


def test_a_file_of_weights_alone_can_be_the_final_ones(tmp_path):
    module = make()
    torch.save({"state_dict": {k: v + 0.1 for k, v in module.state_dict().items()}}, tmp_path / "a.ckpt")
    scores = scored(None, tmp_path / "a.ckpt")
    oracles.assert_scores(scores.values, dots(loaded(tmp_path / "a.ckpt")), 1e-10)
    assert any("a.ckpt" in note for note in scores.notes)
