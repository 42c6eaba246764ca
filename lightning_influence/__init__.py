"""What did each training example do to this model? Training-data influence for PyTorch Lightning.

::

    Trainer.fit ──▶ Influence ──▶ Trajectory (on disk) ─┐
                    (callback)                          ├─▶ Attributor ──▶ Method ──▶ Scores ──▶ read · plot · log
    LightningModule, training data ─────────────────────┘  (accelerator,     (× Curvature)
                                                            per-sample gradients)

Add ``Influence(...)`` to ``Trainer(callbacks=)``, train as usual, read ``influence.scores`` afterwards. A score is
positive where having the example in the training set made the query better (a proponent), negative where it made it
worse (an opponent).
"""

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
