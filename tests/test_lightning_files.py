"""Lightning's ``.ckpt`` files of every kind: averages, objects, older formats, folders."""

import argparse
import enum
import functools
import os
import pickle
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fits import Net, fit, loader, seeded
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

from lightning_influence.callback.influence import Influence
from lightning_influence.cli import main
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.unpickling import Placeholder, read_plain
from lightning_influence.types import MissingEvidence

pytestmark = pytest.mark.filterwarnings("ignore:The learning rates stored", "ignore:.*raw weights are read")


def files_of_fit(folder, *callbacks, net=None, **options):
    """Three epochs with a file after each; the module, the Trainer and the raw weights at each end."""
    raw = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            raw.append({name: value.clone() for name, value in module.state_dict().items()})

    module = seeded(Net, **(net or {}))
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    options = {"max_epochs": 3, "enable_checkpointing": True, **options}
    trainer = fit(module, loader(drop_last=True), Look(), *callbacks, keep, **options)
    return module, trainer, raw


def assert_weights(checkpoint, expected):
    state = checkpoint.load()
    for name, value in expected.items():
        assert torch.equal({**state.buffers, **state.parameters}[name], value), name


def written(path, **more):
    """A small file in Lightning's layout, with anything in it."""
    weights = {"layer.weight": torch.arange(4.0)[None], "layer.bias": torch.ones(1)}
    group = {"lr": 0.1, "momentum": 0.0, "dampening": 0, "weight_decay": 0.0, "params": [0, 1]}
    state = {"state": {}, "param_groups": [group]}
    content = {"epoch": 0, "global_step": 6, "pytorch-lightning_version": "2.6.0", "state_dict": weights}
    torch.save({**content, "optimizer_states": [state], **more}, path)
    return path


# ---- averaged weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batchnorm", [False, True])
def test_either_weights_of_an_averaging_callback(tmp_path, batchnorm):
    _, _, raw = files_of_fit(tmp_path, EMAWeightAveraging(decay=0.5), net={"batchnorm": batchnorm})
    with pytest.warns(UserWarning, match=r"raw weights are read.*weights='averaged'"):
        trajectory = Trajectory.from_checkpoints(tmp_path)
    for checkpoint, expected in zip(trajectory.checkpoints, raw, strict=True):
        assert_weights(checkpoint, expected)
    averaged = Trajectory.from_checkpoints(tmp_path, weights="averaged")
    assert any("averaged weights of Lightning's `WeightAveraging` are read" in note for note in averaged.notes)
    for checkpoint, other in zip(averaged.checkpoints, raw, strict=True):
        loaded = Net.load_from_checkpoint(checkpoint.path, batchnorm=batchnorm)
        assert_weights(checkpoint, loaded.state_dict())
        assert not torch.equal(loaded.layer.weight, other["layer.weight"])


def test_either_weights_of_stochastic_weight_averaging(tmp_path):
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    module, trainer, raw = files_of_fit(tmp_path, averaging)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert_weights(Trajectory.from_checkpoints(files[-1], weights="raw").checkpoints[0], raw[-1])
    averaged = Trajectory.from_checkpoints(files[-1], weights="averaged")
    assert_weights(averaged.checkpoints[0], averaging._average_model.state_dict())
    assert not torch.equal(averaging._average_model.layer.weight, raw[-1]["layer.weight"])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    after = Trajectory.from_checkpoints(tmp_path / "after.ckpt", weights="averaged")
    assert_weights(after.checkpoints[0], module.state_dict())
    with pytest.raises(MissingEvidence, match="saved after the fit"):
        Trajectory.from_checkpoints(tmp_path / "after.ckpt", weights="raw")
    fitted = Trajectory.from_checkpoints(tmp_path)
    assert [c.path.name for c in fitted.checkpoints] == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]
    assert any("after.ckpt" in note and "left out" in note for note in fitted.notes)


def test_the_statistics_of_an_average_have_to_belong_to_it(tmp_path):
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    module, trainer, raw = files_of_fit(tmp_path, averaging, net={"batchnorm": True})
    file = tmp_path / "epoch=2.ckpt"
    fitted = Trajectory.from_checkpoints(tmp_path)
    assert [c.path.name for c in fitted.checkpoints] == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]
    for checkpoint, expected in zip(fitted.checkpoints, raw, strict=False):
        assert_weights(checkpoint, expected)
    with pytest.raises(MissingEvidence, match=r"BatchNorm statistics.*trainer\.save_checkpoint"):
        Trajectory.from_checkpoints(file, weights="averaged")
    assert_weights(Trajectory.from_checkpoints(file, weights="raw").checkpoints[0], raw[2])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    after = Trajectory.from_checkpoints(tmp_path / "after.ckpt", weights="averaged")
    assert_weights(after.checkpoints[0], module.state_dict())


def test_a_file_from_before_averaging_began_has_no_average(tmp_path):
    class Late(EMAWeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return step_idx is not None and step_idx >= 7

    _, _, raw = files_of_fit(tmp_path, Late(decay=0.5))
    with pytest.raises(MissingEvidence, match=r"epoch=0\.ckpt.* before .* began to average"):
        Trajectory.from_checkpoints(tmp_path, weights="averaged")
    assert_weights(Trajectory.from_checkpoints(tmp_path, weights="raw").checkpoints[0], raw[0])


def test_an_average_that_was_put_in_place_after_the_fit(tmp_path):
    module, trainer, _ = files_of_fit(tmp_path, EMAWeightAveraging(decay=0.5))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    alone = Trajectory.from_checkpoints(tmp_path / "after.ckpt")
    assert_weights(alone.checkpoints[0], module.state_dict())
    assert any("average" in note and "alone" in note for note in alone.notes)
    with pytest.raises(MissingEvidence, match="saved after the fit"):
        Trajectory.from_checkpoints(tmp_path / "after.ckpt", weights="raw")


def test_a_fit_without_an_average_has_none(tmp_path):
    files_of_fit(tmp_path)
    with pytest.raises(MissingEvidence, match=r"Expected averaged weights.*torch\.save"):
        Trajectory.from_checkpoints(tmp_path, weights="averaged")
    with pytest.raises(ValueError, match="'raw' or 'averaged', got 'ema'"):
        Trajectory.from_checkpoints(tmp_path, weights="ema")


def test_an_average_in_the_state_of_another_callback(tmp_path):
    average = {"layer.weight": torch.zeros(1, 4), "layer.bias": torch.zeros(1)}
    path = written(tmp_path / "a.ckpt", callbacks={"EMA{'decay': 0.9}": {"shadow": average, "step": 3}})
    assert_weights(Trajectory.from_checkpoints(path, weights="averaged").checkpoints[0], average)
    assert_weights(Trajectory.from_checkpoints(path).checkpoints[0], {"layer.bias": torch.ones(1)})
    best = written(tmp_path / "b.ckpt", callbacks={"KeepBest": {"best_state": average}})
    with pytest.raises(MissingEvidence, match="Expected averaged weights"):
        Trajectory.from_checkpoints(best, weights="averaged")
    both = {"EMA": {"shadow": average, "ema_params": average}}
    with pytest.raises(MissingEvidence, match="Expected one average"):
        Trajectory.from_checkpoints(written(tmp_path / "c.ckpt", callbacks=both), weights="averaged")


# ---- one path, a folder ---------------------------------------------------------------------------------------------


def test_one_path_or_a_folder(tmp_path):
    files_of_fit(tmp_path / "ckpt")
    folder = Trajectory.from_checkpoints(tmp_path / "ckpt", [0.3, 0.2, 0.1])
    assert [(c.step, folder.learning_rates(k)) for k, c in enumerate(folder.checkpoints)] == [
        (5, [0.3]),
        (10, [0.2]),
        (15, [0.1]),
    ]
    for one in (tmp_path / "ckpt" / "epoch=1.ckpt", str(tmp_path / "ckpt" / "epoch=1.ckpt")):
        assert [c.step for c in Trajectory.from_checkpoints(one, 0.1).checkpoints] == [10]
    assert len(Trajectory.from_checkpoints((tmp_path / "ckpt").glob("*.ckpt"), 0.1).checkpoints) == 3
    with pytest.raises(MissingEvidence, match=r"`\.ckpt` files in the folder.*/ckpt'"):
        Trajectory.from_checkpoints(tmp_path)
    with pytest.raises(MissingEvidence, match="got the folder"):
        Trajectory.from_checkpoints([tmp_path / "ckpt"])
    with pytest.raises(MissingEvidence, match=r"`.*absent`, got 'No such file"):
        Trajectory.from_checkpoints(tmp_path / "absent")


@pytest.mark.parametrize(
    ("paths", "error", "says"),
    [
        ("s3://bucket/a.ckpt", ValueError, "on this machine.*fsspec"),
        (3, TypeError, "got 3"),
        ([3], TypeError, "got 3"),
        (None, TypeError, "got None"),
        ([], ValueError, "at least one path"),
    ],
)
def test_what_is_no_path(paths, error, says):
    with pytest.raises(error, match=says):
        Trajectory.from_checkpoints(paths)


def test_the_last_file_again_is_left_out(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_last=True)
    fit(seeded(Net), loader(), keep, enable_checkpointing=True)
    assert (tmp_path / "last.ckpt").exists()
    for paths in (tmp_path, sorted(tmp_path.glob("*.ckpt"), reverse=True)):
        trajectory = Trajectory.from_checkpoints(paths)
        assert [c.path.name for c in trajectory.checkpoints] == ["epoch=0.ckpt", "epoch=1.ckpt"]
        assert any("last.ckpt holds the same weights as epoch=1.ckpt" in note for note in trajectory.notes)
    assert len(Trajectory.from_checkpoints(tmp_path, [0.1, 0.2]).checkpoints) == 2
    rates = Trajectory.from_checkpoints(sorted(tmp_path.glob("*.ckpt")), [0.1, 0.2, 0.3])  # one for each path
    assert [rates.learning_rates(k) for k in range(2)] == [[0.1], [0.2]]


def test_two_fits_are_not_one(tmp_path):
    written(tmp_path / "a.ckpt")
    written(tmp_path / "b.ckpt", state_dict={"layer.weight": torch.zeros(1, 4), "layer.bias": torch.ones(1)})
    with pytest.raises(MissingEvidence, match=r"different weights at step 6 in .*a\.ckpt.*b\.ckpt"):
        Trajectory.from_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("inside", "says"),
    [(".metadata", "consolidate_checkpoint"), ("__0_0.distcp", "FSDP"), ("zero_to_fp32.py", "convert_zero_checkpoint")],
)
def test_a_checkpoint_in_parts_is_refused(tmp_path, inside, says):
    folder = tmp_path / "epoch=0-step=5.ckpt"
    folder.mkdir()
    (folder / inside).write_bytes(b"")
    for paths in (folder, tmp_path, [folder]):
        with pytest.raises(MissingEvidence, match=says):
            Trajectory.from_checkpoints(paths)


def test_runs_and_lightning_files_are_told_apart(tmp_path, capsys):
    files_of_fit(tmp_path / "ckpt", Influence(dirpath=tmp_path / "influence"))
    run = tmp_path / "influence" / "run-0"
    for paths in (tmp_path / "influence", run, next((run / "checkpoints").glob("*.pt"))):
        with pytest.raises(MissingEvidence, match=r"`Trajectory\.load`"):
            Trajectory.from_checkpoints(paths)
    for path in (tmp_path / "ckpt", tmp_path / "ckpt" / "epoch=1.ckpt"):
        with pytest.raises(MissingEvidence, match=r"`Trajectory\.from_checkpoints`"):
            Trajectory.load(path)
        for command in ("show", "verify", "top"):
            assert main([command, str(path)]) == 1
            assert "Trajectory.from_checkpoints" in capsys.readouterr().err


# ---- objects, none of which is rebuilt ------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Config(dict):
    """Like an AttributeDict or a DictConfig."""


class Built:
    def __init__(self):
        self.made = True

    def __setstate__(self, state):
        raise AssertionError("executed")


def by_name(x):
    return x


OBJECTS = {
    "path": Path("/data"),
    "namespace": argparse.Namespace(lr=0.1, path=Path("x")),
    "enum": Colour.RED,
    "enum as a key": {Colour.RED: 1},
    "dict of a class": Config(a=1, b=Config(c=[1])),
    "list of a class": type("Items", (list,), {"__module__": __name__})([1, 2]),
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(3),
    "object with a state": Built(),
    "partial": functools.partial(by_name, 1),
    "function": by_name,
    "class": Built,
    "module": torch.nn.Linear(2, 2),
    "dtype": torch.bfloat16,
    "bytes": b"\x00\xff",
    "set": {1, 2},
    "defaultdict": defaultdict(list, a=[1]),
    "types": types.SimpleNamespace(a=1),
    "slice": slice(1, 2),
    "sparse": torch.eye(2).to_sparse(),
    "tensor with an attribute": torch.ones(2),
}
OBJECTS["tensor with an attribute"].note = "x"
Items = type(OBJECTS["list of a class"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", OBJECTS)
def test_weights_are_read_from_between_objects(tmp_path, name, zipped, monkeypatch):
    save = functools.partial(torch.save, _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(torch, "save", save)
    path = written(
        tmp_path / "a.ckpt", hyper_parameters={"it": OBJECTS[name]}, callbacks={Built: {"of": OBJECTS[name]}}
    )
    trajectory = Trajectory.from_checkpoints(path)
    assert trajectory.learning_rates(0) == [0.1]
    assert_weights(trajectory.checkpoints[0], {"layer.weight": torch.arange(4.0)[None], "layer.bias": torch.ones(1)})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(tmp_path, protocol, monkeypatch):
    monkeypatch.setattr(torch, "save", functools.partial(torch.save, pickle_protocol=protocol))
    path = written(tmp_path / "a.ckpt", hyper_parameters=OBJECTS | {"sparse": None})
    assert_weights(Trajectory.from_checkpoints(path).checkpoints[0], {"layer.weight": torch.arange(4.0)[None]})


def test_numbers_of_numpy_are_numbers(tmp_path):
    group = {"lr": np.float64(0.25), "dampening": 0, "momentum": np.float32(0.5), "params": [0]}
    states = [{"state": {}, "param_groups": [group]}]
    trajectory = Trajectory.from_checkpoints(written(tmp_path / "a.ckpt", optimizer_states=states))
    assert trajectory.learning_rates(0) == [0.25]
    assert trajectory.settings[0]["groups"][0]["momentum"] == 0.5


def test_weights_of_all_types_and_views(tmp_path):
    base = torch.randn(4, 6)
    weights = {
        "a": base[1:3, ::2],
        "b": base.T,
        "c": torch.nn.Parameter(torch.ones(2)),
        "d": torch.arange(3).to(torch.uint16),
        "e": torch.randn(2, dtype=torch.cfloat).conj(),
        "f": torch.randn(3, dtype=torch.bfloat16),
        "g": torch.tensor(True),
    }
    path = written(tmp_path / "a.ckpt", state_dict=weights, hyper_parameters=Built())
    found = Trajectory.from_checkpoints(path).checkpoints[0].load().parameters
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_tensors_stay_on_disk(tmp_path, monkeypatch):
    path, load, calls = written(tmp_path / "a.ckpt", hyper_parameters=Built()), torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **options: calls.append(options["mmap"]) or load(*args, **options))
    assert isinstance(read_plain(path)["hyper_parameters"], Placeholder)
    assert calls == [True, True]


def test_a_weight_that_is_no_plain_tensor_is_named(tmp_path):
    weights = {"w": torch.ones(2), "s": torch.eye(2).to_sparse()}
    path = written(tmp_path / "a.ckpt", state_dict=weights, hyper_parameters=Built())
    with pytest.raises(MissingEvidence, match=r"`s` of class `torch\._utils\._rebuild_sparse_tensor`"):
        Trajectory.from_checkpoints(path)


class Hostile:
    """A pickle that calls what it is given."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickles(mark):
    command = f"touch {mark}"
    by_opcodes = (
        b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",  # a call
        b"(S'" + command.encode() + b"'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'" + command.encode() + b"'\no.",  # OBJ
        b"cbuiltins\ngetattr\n(cos\n__dict__\nS'get'\ntR(S'system'\ntR(S'" + command.encode() + b"'\ntR.",
        b'cbuiltins\neval\n(S\'__import__("os").system("' + command.encode() + b"\")'\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}S'__globals__'\n}sb.",  # BUILD on one of the functions that rebuild
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x0c__defaults__q\x00)s\x86b.",
        b"ctorch.hub\nload\n(S'a'\nS'b'\ntR.",
        b"cpickle\nloads\n(C\x10cos\nsystem\n(S'x'\ntR.tR.",
    )
    return [
        Hostile(os.system, command),
        Hostile(subprocess.call, ["touch", str(mark)]),
        Hostile(eval, f"open({str(mark)!r}, 'w')"),
        Hostile(exec, f"open({str(mark)!r}, 'w')"),
        Hostile(functools.partial(os.system, command)),
        Hostile(map, os.system, [command]),
        Hostile(os.popen, command),
        Hostile(torch.load, str(mark)),
        *by_opcodes,
    ]


def raw_legacy(path, payload):
    """A legacy file by hand, whose object is the given pickle."""
    with path.open("wb") as file:
        for value in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        file.write(payload)
        pickle.dump([], file, protocol=2)


def raw_zip(path, payload):
    """A zip file in torch's layout, whose object is the given pickle."""
    import zipfile

    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, payload if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("number", range(17))
def test_nothing_is_executed(tmp_path, number):
    mark = tmp_path / "executed"
    hostile = hostile_pickles(mark)[number]
    before = torch._utils._rebuild_tensor_v2.__defaults__
    if isinstance(hostile, bytes):
        for write in (raw_legacy, raw_zip):
            write(tmp_path / "a.ckpt", hostile)
            with pytest.raises(MissingEvidence):
                Trajectory.from_checkpoints(tmp_path / "a.ckpt")
    else:
        for zipped in (True, False):
            file = tmp_path / "a.ckpt"
            content = {"state_dict": {"w": torch.ones(2)}, "global_step": 1, "epoch": 0, "x": hostile}
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            assert_weights(Trajectory.from_checkpoints(file, 0.1).checkpoints[0], {"w": torch.ones(2)})
    assert not mark.exists()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


FUZZ = r"""
import io, random, sys
from lightning_influence.trajectory.unpickling import _Unpickler

seen, watching = [], False
kinds = {"os", "subprocess", "exec", "compile", "open", "import", "pickle", "object", "code", "socket", "shutil"}
sys.addaudithook(lambda event, _: seen.append(event) if watching and event.split(".")[0] in kinds else None)
names = ["os system", "builtins eval", "builtins getattr", "builtins __import__", "subprocess Popen", "pickle loads",
         "torch._utils _rebuild_tensor_v2", "torch._tensor _rebuild_from_type_v2", "torch Size", "torch float32",
         "collections OrderedDict", "collections defaultdict", "_codecs encode", "builtins set", "numpy dtype",
         "numpy.core.multiarray scalar", "torch.storage UntypedStorage", "torch.hub load"]
pieces = [["c" + name.replace(" ", "\n") + "\n" for name in names],
          ["S'x'\n", "S'latin1'\n", "I5\n", "N", "]", "}", ")", "(", "(I1\nI2\nt"],
          list("RbotaesudlQ20") + ["\x81", "\x85", "\x86", "\x90", "\x92", "\x93", "ios\nsystem\n", "\x82\x01"]]
draw, finished = random.Random(0), 0
for _ in range(8000):
    program = "".join(draw.choice(draw.choice((pieces[0], pieces[1], pieces[1], pieces[2], pieces[2])))
                      for _ in range(draw.randint(3, 20)))
    watching = True
    try:
        _Unpickler(io.BytesIO(b"\x80\x04" + program.encode("latin1") + b"."), encoding="utf-8").load()
        finished += 1
    except Exception:
        pass
    watching = False
print(finished, seen)
"""


def test_random_pickles_execute_nothing():
    """Programs of a pickle's instructions, under an audit hook that sees imports, processes, files and attributes."""
    done = subprocess.run([sys.executable, "-c", FUZZ], capture_output=True, text=True, timeout=120, check=True)
    finished, seen = done.stdout.split(maxsplit=1)
    assert int(finished) > 200
    assert seen.strip() == "[]"


def test_a_class_that_was_imported_is_not_called(tmp_path):
    path = written(tmp_path / "a.ckpt", hyper_parameters=Built())
    Trajectory.from_checkpoints(path)  # `Built.__setstate__` raises
    content = read_plain(path)
    assert content["hyper_parameters"].name.endswith("Built")


def test_a_module_that_was_saved_whole_is_no_checkpoint(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.ckpt")
    with pytest.raises(MissingEvidence, match="Expected `state_dict`"):
        Trajectory.from_checkpoints(tmp_path / "a.ckpt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "b.ckpt")
    with pytest.raises(MissingEvidence, match="TorchScript"):
        Trajectory.from_checkpoints(tmp_path / "b.ckpt")
    (tmp_path / "c.ckpt").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(MissingEvidence, match="Expected a whole checkpoint"):
        Trajectory.from_checkpoints(tmp_path / "c.ckpt")
    (tmp_path / "d.ckpt").write_bytes(b"")
    with pytest.raises(MissingEvidence, match="Expected a whole checkpoint"):
        Trajectory.from_checkpoints(tmp_path / "d.ckpt")


# ---- older versions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("version", ["0.9.0", "1.2.10", "1.5.10"])
def test_files_of_older_versions(tmp_path, version, zipped):
    for epoch in (1, 2):
        content = {
            "epoch": epoch,  # counts the epochs that ended
            "global_step": 6 * epoch,
            "pytorch-lightning_version": version,
            "state_dict": {"layer.weight": torch.full((1, 4), float(epoch)), "layer.bias": torch.ones(1)},
            "callbacks": {ModelCheckpoint: {"best_model_path": Path("x"), "best_model_score": torch.tensor(1.0)}},
            "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "momentum": 0, "dampening": 0}]}],
            "lr_schedulers": [],
            "hparams_name": "hparams",
            "hyper_parameters": argparse.Namespace(lr=0.1),
        }
        torch.save(content, tmp_path / f"{epoch}.ckpt", _use_new_zipfile_serialization=zipped)
    trajectory = Trajectory.from_checkpoints(tmp_path)
    assert [(c.step, c.epoch) for c in trajectory.checkpoints] == [(6, 0), (12, 1)]
    assert_weights(trajectory.checkpoints[1], {"layer.weight": torch.full((1, 4), 2.0)})
    assert any("before 1.6" in note for note in trajectory.notes)
    assert not trajectory.adaptive


def test_weights_alone_need_the_step(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "a.ckpt")
    with pytest.raises(MissingEvidence, match="no number under `global_step` and `epoch`"):
        Trajectory.from_checkpoints(tmp_path / "a.ckpt", 0.1)


def test_learning_rates_that_are_no_numbers(tmp_path):
    states = [{"state": {}, "param_groups": [{"lr": Built(), "params": [0]}]}]
    with pytest.raises(MissingEvidence, match=r"numbers as learning rates.*Pass `learning_rates=`"):
        Trajectory.from_checkpoints(written(tmp_path / "a.ckpt", optimizer_states=states))


def test_a_setting_of_torch_that_forbids_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(MissingEvidence, match="TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        Trajectory.from_checkpoints(written(tmp_path / "a.ckpt", hyper_parameters=Built()))
