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
6. ``methods``: multiplies by the coefficients and sums over the checkpoints, for one tile of the score matrix after
   another, as ``attribution`` asks for them. What a method sees of the question is its ``setting``.
7. ``scores``: the sum is entry 7 in the row of each query, [query, train], ready to read, save, plot and log.

When the fit ends, ``callback`` asks ``attribution`` for the scores, and hands them to ``loggers``, which write them
into the experiment tracker.

Names are imported when they are first used, so that ``import lightning_influence`` costs next to nothing.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_influence.attribution.attributor import Attributor as Attributor
    from lightning_influence.callback.influence import Influence as Influence
    from lightning_influence.curvature.arnoldi import Arnoldi as Arnoldi
    from lightning_influence.curvature.conjugate_gradient import ConjugateGradient as ConjugateGradient
    from lightning_influence.curvature.curvature import Curvature as Curvature
    from lightning_influence.curvature.ekfac import EKFAC as EKFAC
    from lightning_influence.curvature.exact_ggn import ExactGGN as ExactGGN
    from lightning_influence.curvature.exact_hessian import ExactHessian as ExactHessian
    from lightning_influence.curvature.lissa import LiSSA as LiSSA
    from lightning_influence.methods.data_shapley import DataShapley as DataShapley
    from lightning_influence.methods.downsampling import Downsampling as Downsampling
    from lightning_influence.methods.gradient_dot import GradientDot as GradientDot
    from lightning_influence.methods.hydra import HyDRA as HyDRA
    from lightning_influence.methods.influence_function import InfluenceFunction as InfluenceFunction
    from lightning_influence.methods.kinds import ForwardOnly as ForwardOnly
    from lightning_influence.methods.kinds import GradientProduct as GradientProduct
    from lightning_influence.methods.kinds import WholeRun as WholeRun
    from lightning_influence.methods.knn_shapley import KNNShapley as KNNShapley
    from lightning_influence.methods.leave_one_out import LeaveOneOut as LeaveOneOut
    from lightning_influence.methods.method import Cost as Cost
    from lightning_influence.methods.method import Evidence as Evidence
    from lightning_influence.methods.method import Method as Method
    from lightning_influence.methods.representer_points import RepresenterPoints as RepresenterPoints
    from lightning_influence.methods.retraining import Retraining as Retraining
    from lightning_influence.methods.source import SOURCE as SOURCE
    from lightning_influence.methods.tracin import TracIn as TracIn
    from lightning_influence.methods.tracin_cp import TracInCP as TracInCP
    from lightning_influence.methods.tracin_ideal import TracInIdeal as TracInIdeal
    from lightning_influence.numerics.projections import RandomProjection as RandomProjection
    from lightning_influence.refit import Refit as Refit
    from lightning_influence.report import Decisions as Decisions
    from lightning_influence.report import read_decisions as read_decisions
    from lightning_influence.scores import Scores as Scores
    from lightning_influence.scores import SelfScores as SelfScores
    from lightning_influence.scores import TopK as TopK
    from lightning_influence.trajectory import Trajectory as Trajectory
    from lightning_influence.types import MissingEvidence as MissingEvidence

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
    return sorted({*globals(), *_MODULES})


if not TYPE_CHECKING:
    # Type checkers understand only a list of literals here, and take the imports above instead.
    __all__ = list(_MODULES)

    # A type checker that saw this function would accept any attribute.

    def __getattr__(name: str) -> Any:
        """Import a public name or a submodule when it is first used (PEP 562)."""
        if name in _MODULES:
            value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
            return value
        if not name.startswith("_") and name.isidentifier() and find_spec(f".{name}", __name__):
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
