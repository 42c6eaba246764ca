"""What did each training example do to this model? Training-data influence for PyTorch Lightning.

::

    Trainer.fit ──▶ Influence ──▶ Trajectory (on disk) ─┐
                    (callback)                          ├─▶ Attributor ──▶ Method ──▶ Scores ──▶ read · plot · log
    LightningModule, training data ─────────────────────┘  (accelerator,     (× Curvature)
                                                            per-sample gradients)

Add ``Influence(...)`` to ``Trainer(callbacks=)``, train as usual, read ``influence.scores`` afterwards. A score is
positive where having the example in the training set made the query better (a proponent), negative where it made it
worse (an opponent).

A walk through the code, with training example 7 under ``TracInCP``. Each stop is a folder of this package:

1. ``capture``: the sampler draws 7. The callback records which optimizer step trained on it, at which learning rate and
   in how large a batch, and writes checkpoints.
2. ``trajectory``: reads these files back. For each checkpoint, the steps that saw example 7 add up to its coefficient.
3. ``data``: reads example 7 from the dataset again, under a random seed of its own, and collates it with its neighbours
   into a block.
4. ``module``: calls ``training_step`` on the block, in eval mode and with the weights of a checkpoint.
5. ``gradients``: one batched backward pass gives the per-sample gradients as factors, and their inner products with the
   gradients of the queries.
6. ``methods``: multiplies by the coefficients and sums over the checkpoints.
7. ``scores``: the sum is entry 7 in the row of each query, [query, train], ready to read, save, plot and log.

Names are imported when they are first used, so that ``import lightning_influence`` costs next to nothing.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "SOURCE",
    "Arnoldi",
    "Attributor",
    "ConjugateGradient",
    "Cost",
    "Curvature",
    "DataShapley",
    "Decisions",
    "Downsampling",
    "Evidence",
    "ExactGGN",
    "ExactHessian",
    "ForwardOnly",
    "GradientDot",
    "GradientProduct",
    "HyDRA",
    "Influence",
    "InfluenceFunction",
    "KNNShapley",
    "LeaveOneOut",
    "LiSSA",
    "Method",
    "MissingEvidence",
    "RandomProjection",
    "Refit",
    "RepresenterPoints",
    "Retraining",
    "Scores",
    "SelfScores",
    "TopK",
    "TracIn",
    "TracInCP",
    "TracInIdeal",
    "Trajectory",
    "WholeRun",
    "read_decisions",
]

if TYPE_CHECKING:
    from lightning_influence.attribution.attributor import Attributor
    from lightning_influence.callback.influence import Influence
    from lightning_influence.curvature.arnoldi import Arnoldi
    from lightning_influence.curvature.conjugate_gradient import ConjugateGradient
    from lightning_influence.curvature.curvature import Curvature
    from lightning_influence.curvature.ekfac import EKFAC
    from lightning_influence.curvature.exact_ggn import ExactGGN
    from lightning_influence.curvature.exact_hessian import ExactHessian
    from lightning_influence.curvature.lissa import LiSSA
    from lightning_influence.methods.data_shapley import DataShapley
    from lightning_influence.methods.downsampling import Downsampling
    from lightning_influence.methods.gradient_dot import GradientDot
    from lightning_influence.methods.hydra import HyDRA
    from lightning_influence.methods.influence_function import InfluenceFunction
    from lightning_influence.methods.kinds import ForwardOnly, GradientProduct, WholeRun
    from lightning_influence.methods.knn_shapley import KNNShapley
    from lightning_influence.methods.leave_one_out import LeaveOneOut
    from lightning_influence.methods.method import Cost, Evidence, Method
    from lightning_influence.methods.representer_points import RepresenterPoints
    from lightning_influence.methods.retraining import Retraining
    from lightning_influence.methods.source import SOURCE
    from lightning_influence.methods.tracin import TracIn
    from lightning_influence.methods.tracin_cp import TracInCP
    from lightning_influence.methods.tracin_ideal import TracInIdeal
    from lightning_influence.numerics.projections import RandomProjection
    from lightning_influence.refit import Refit
    from lightning_influence.report import Decisions, read_decisions
    from lightning_influence.scores import Scores, SelfScores, TopK
    from lightning_influence.trajectory import Trajectory
    from lightning_influence.types import MissingEvidence

_MODULES = {
    "Attributor": "attribution.attributor",
    "Influence": "callback.influence",
    "Arnoldi": "curvature.arnoldi",
    "ConjugateGradient": "curvature.conjugate_gradient",
    "Curvature": "curvature.curvature",
    "EKFAC": "curvature.ekfac",
    "ExactGGN": "curvature.exact_ggn",
    "ExactHessian": "curvature.exact_hessian",
    "LiSSA": "curvature.lissa",
    "DataShapley": "methods.data_shapley",
    "Downsampling": "methods.downsampling",
    "GradientDot": "methods.gradient_dot",
    "HyDRA": "methods.hydra",
    "InfluenceFunction": "methods.influence_function",
    "KNNShapley": "methods.knn_shapley",
    "LeaveOneOut": "methods.leave_one_out",
    "ForwardOnly": "methods.kinds",
    "GradientProduct": "methods.kinds",
    "WholeRun": "methods.kinds",
    "Cost": "methods.method",
    "Evidence": "methods.method",
    "Method": "methods.method",
    "RepresenterPoints": "methods.representer_points",
    "Retraining": "methods.retraining",
    "SOURCE": "methods.source",
    "TracIn": "methods.tracin",
    "TracInCP": "methods.tracin_cp",
    "TracInIdeal": "methods.tracin_ideal",
    "RandomProjection": "numerics.projections",
    "Refit": "refit",
    "Decisions": "report",
    "read_decisions": "report",
    "Scores": "scores",
    "SelfScores": "scores",
    "TopK": "scores",
    "Trajectory": "trajectory",
    "MissingEvidence": "types",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker that saw this function would accept any attribute

    def __getattr__(name: str) -> Any:
        """Import a public name or a submodule when it is first used (PEP 562)."""
        if name in _MODULES:
            value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
            return value
        if not name.startswith("_") and name.isidentifier() and find_spec(f".{name}", __name__):
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
