"""The base class of curvatures: frozen records of how (C + diagonal)^-1 q is computed for a block of queries."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.checks import check_at_least_0
from lightning_influence.curvature.descent import Descent
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.queries import DenseQueries, EachQuery, QueryGradients
from lightning_influence.hints import HintedArguments
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import timed

# Bytes of vectors that are in memory while queries are solved for.
_BYTES = 2**29


@dataclass(frozen=True)
class PreparedCurvature:
    """What a curvature computes once for a set of weights, and what is stored beside the trajectory.

    Args:
        tensors: by name, on the device of the weights.
        diagnostics: numbers by name, such as the largest eigenvalue.
        notes: sentences that are added to the notes of the scores.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curvature(HintedArguments, ABC):
    r"""The curvature C of the mean training loss :math:`\frac1n \sum_i \ell_i`, without weight decay, and its inverse.

    The fit's L2 weight decay and the damping are added to the diagonal of C. They are passed to ``solve``, per
    parameter group of the optimizer, so that ``prepare`` does not depend on them and runs once per set of weights.

    To write your own, subclass as a frozen dataclass and implement ``prepare`` and ``solve``, and ``mean_eigenvalue``
    unless ``prepare`` returns it as the diagnostic ``"mean_eigenvalue"``.

    Args:
        damping: added to the diagonal besides the weight decay, in units of C. None chooses it from the fit: 1 / (sum
            of learning rates / (1 - momentum)) under SGD; under Adam and AdamW the root of their mean squared gradients
            / (sum of learning rates); a tenth of the mean eigenvalue with other optimizers or where no learning rates
            were captured. The notes of the scores name the value, and whether their unit is arbitrary by it.

    Raises:
        ValueError: a negative damping, or one that is not finite.
    """

    damping: float | None = None

    kind: ClassVar[str] = ""
    """Which matrix: "Hessian", "GGN" or "Fisher"."""
    share: ClassVar[float] = 1.0
    """The fraction of the default damping by learning rates to use; below 1 for approximations that smooth the
    spectrum themselves."""
    has_eigenvalues: ClassVar[bool] = False
    """Whether ``descend`` is implemented."""
    copies: ClassVar[int | None] = None
    """How many vectors of the model's size each query takes while it is solved for; None: not known."""
    unprepared: ClassVar[frozenset[str]] = frozenset({"damping"})
    """Fields that ``prepare`` does not depend on: a stored curvature can be reused when they change."""

    def __post_init__(self) -> None:
        check_at_least_0(
            "damping", self.damping, optional=True, hint="Pass None to choose it by the fit's learning rates."
        )

    @abstractmethod
    def prepare(self, setting: Setting) -> PreparedCurvature:
        """Compute all that ``solve`` needs at the module's current weights and that depends on no query or diagonal.

        Uses the whole training set, ``setting.examples``, even if only some training examples are being scored.
        """

    @abstractmethod
    def solve(
        self, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
    ) -> QueryGradients:
        """(C + diagonal)^-1 q for every query of a block.

        Args:
            prepared: the result of ``prepare`` at these weights.
            queries: the gradients q.
            setting: holds the engine and the training examples, and takes notes and diagnostics (solver residuals).
            diagonal: [group] float64, added for the parameters of each parameter group of the optimizer;
                ``setting.engine.groups`` gives the group of a parameter (0 where it has none).

        Returns:
            The solutions, in any form whose ``dot`` multiplies with blocks of training gradients.

        Raises:
            ValueError: the curvature is singular with this diagonal.
        """

    def own_products(
        self,
        prepared: PreparedCurvature,
        gradients: Gradients,
        setting: Setting,
        diagonal: Tensor,
        powers: Sequence[int] = (1,),
    ) -> Tensor:
        r"""Products of each gradient g with itself, :math:`g^\top (C + D)^{-p} g`, as self-influence takes them.

        By default each gradient is solved for; override it where that is not needed.

        Args:
            prepared: the result of ``prepare`` at these weights.
            gradients: of a block of training examples.
            setting: as for ``solve``.
            diagonal: as for ``solve``.
            powers: p of each product, 1 or 2: with 2 it is the squared norm of the solution.

        Returns:
            [power, example].
        """
        found, step = [], self.at_once(setting) or len(gradients)
        for start in range(0, len(gradients), step):
            piece = gradients.slice(slice(start, start + step))
            solved = self.solve(prepared, EachQuery([piece]), setting, diagonal)
            found.append(torch.stack([solved.norm2() if p == 2 else solved.diagonal(piece) for p in powers]))
        return torch.cat(found, 1)

    def descend(
        self, prepared: PreparedCurvature, vectors: Mapping[str, Tensor], setting: Setting, descent: Descent
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """F v and S^T v of a stretch of gradient descent (see ``Descent``), which SOURCE uses.

        Args:
            prepared: the result of ``prepare`` at these weights.
            vectors: the vectors v, [query, *shape] by name.
            setting: takes notes.
            descent: defines F and S.

        Returns:
            F v and S^T v, [query, *shape] by name.

        Raises:
            NotImplementedError: this curvature does not compute eigenvalues.
        """
        raise NotImplementedError(
            f"Expected a curvature with eigenvalues, got `{type(self).__name__}`. Use `EKFAC()` or `ExactGGN()`."
        )

    def descend_own(
        self, prepared: PreparedCurvature, vectors: Any, setting: Setting, descent: Descent
    ) -> tuple[Any, Any]:
        """The same for vectors that are multiplied with one gradient each, as self-influence takes them.

        By default dense; override it with a form in which they take less from one stretch to the next.

        Args:
            prepared: as for ``descend``.
            vectors: gradients (``QueryGradients``), or the second result of an earlier call.
            setting: as for ``descend``.
            descent: as for ``descend``.

        Returns:
            F v and S^T v in a form with ``slice(rows)`` and ``diagonal(block)``, as ``DenseQueries`` has.
        """
        moved, kept = self.descend(prepared, vectors.dense(), setting, descent)
        return DenseQueries(moved, setting.engine.groups), DenseQueries(kept, setting.engine.groups)

    def mean_eigenvalue(self, prepared: PreparedCurvature, setting: Setting) -> float:
        """The trace of C over the number of parameters; by default the diagnostic of that name, from ``prepare``."""
        return prepared.diagnostics["mean_eigenvalue"]

    def at_once(self, setting: Setting) -> int | None:
        """The most queries to solve at once: as many as fit in half a GiB, with ``copies`` of each.

        None if only the memory of their gradients limits them.
        """
        return None if self.copies is None else max(1, _BYTES // max(1, self.copies * setting.engine.vector_bytes))

    # ---- estimates ----------------------------------------------------------------------------------------------

    def seconds_of_preparing(self, setting: Setting) -> float:
        """Estimate the seconds of ``prepare``."""
        return 0.0

    def seconds_of_solving(self, setting: Setting, vectors: int) -> float:
        """Estimate the seconds of ``solve`` for this many vectors."""
        return 0.0

    def seconds_of_descent(self, setting: Setting, vectors: Mapping[str, Tensor], descent: Descent) -> float:
        """Estimate the seconds of ``descend`` for these vectors."""
        prepared = self.sampled(setting)
        return timed(lambda: self.descend(prepared, vectors, setting, descent))

    def seconds_of_own_descent(
        self, setting: Setting, gradients: QueryGradients, descent: Descent
    ) -> tuple[Any, float, float]:
        """Something like the first result of ``descend_own``, and the seconds of a first and of a further call."""
        vectors = gradients.dense()
        seconds = self.seconds_of_descent(setting, vectors, descent)
        return DenseQueries(vectors, setting.engine.groups), seconds, seconds

    def sampled(self, setting: Setting) -> PreparedCurvature:
        """What stands for the result of ``prepare`` while other work is timed; it takes next to no time."""
        return PreparedCurvature(diagnostics={"mean_eigenvalue": 1.0})

    def like_solved(
        self, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
    ) -> QueryGradients:
        """What stands for the result of ``solve`` while other work is timed: in the same form, with any numbers."""
        return DenseQueries(queries.dense(), setting.engine.groups)

    def preparation(self) -> dict[str, Any]:
        """The fields that ``prepare`` depends on; they are part of the file name on disk."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.unprepared}
