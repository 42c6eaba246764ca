"""What a curvature is: a frozen record that says how (C + diagonal)^-1 q is computed for a block of queries at once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from lightning_influence.checks import check_at_least_0
from lightning_influence.curvature.descent import Descent
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.setting.setting import Setting


@dataclass(frozen=True)
class Prepared:
    """What a curvature computes once at a set of weights; this is what lies on disk beside the trajectory.

    Args:
        tensors: by name, on the weights' device.
        figures: numbers by name, such as the largest eigenvalue.
        notes: what a reader of the scores must know.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curvature(ABC):
    """The curvature C of the mean training loss, (1/n) sum over examples, without any regulariser; and its inverse.

    Subclass as a frozen dataclass, one file each.

    What is added to its diagonal, the fit's L2 weight decay and the damping, is given to ``solve`` for each parameter
    group of the optimizer, so that ``prepare`` does not depend on it: a curvature is prepared once per set of weights.

    Args:
        damping: added to the diagonal besides the weight decay, in units of C; None: the rule of ``damping.py``.

    Raises:
        ValueError: a negative damping, or one that is not finite.
    """

    damping: float | None = None

    kind: ClassVar[str] = ""
    """Which matrix: "Hessian", "GGN" or "Fisher"."""
    share: ClassVar[float] = 1.0
    """Of the default damping by learning rates, what suits an approximation that blurs the spectrum already."""
    has_eigenvalues: ClassVar[bool] = False
    """Whether ``descend`` is offered."""
    unprepared: ClassVar[frozenset[str]] = frozenset({"damping"})
    """Settings that ``prepare`` does not look at: what is on disk serves whatever they are."""

    def __post_init__(self) -> None:
        check_at_least_0("damping", self.damping, optional=True, hint="None follows the fit's learning rates.")

    @abstractmethod
    def prepare(self, setting: Setting) -> Prepared:
        """Everything about the module's current weights that solving needs, whatever the queries and the diagonal.

        Looks at the whole training set, ``setting.examples``, whatever the tile.
        """

    @abstractmethod
    def solve(self, prepared: Prepared, queries: QueryGradients, setting: Setting, diagonal: Tensor) -> QueryGradients:
        """(C + diagonal)^-1 q for every query of a block.

        Args:
            prepared: by ``prepare`` at these weights.
            queries: gradients q.
            setting: takes ``note`` and ``diagnostic`` (residual, iterations), and gives products with the curvature.
            diagonal: [group] float64, what is added for the parameters of each of the optimizer's groups; which group
                a parameter is in, ``setting.engine.groups`` says (absent: 0).

        Returns:
            The directions, in any form whose ``dot`` multiplies with blocks of training gradients.

        Raises:
            ValueError: singular with this diagonal.
        """

    def descend(
        self, prepared: Prepared, vectors: Mapping[str, Tensor], setting: Setting, descent: Descent
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """F v and S^T v behind a stretch of gradient descent, for vectors given by name, [query, *shape].

        Args:
            prepared: by ``prepare`` at these weights.
            vectors: v.
            setting: the question's.
            descent: which defines F and S.

        Raises:
            NotImplementedError: the eigenvalues are not known.
        """
        raise NotImplementedError(f"`{type(self).__name__}` knows no eigenvalues. Use `EKFAC()` or `ExactGGN()`.")

    @abstractmethod
    def mean_eigenvalue(self, prepared: Prepared, setting: Setting) -> float:
        """Trace of C over the number of parameters."""

    def at_once(self, setting: Setting) -> int | None:
        """How many queries may be solved at once; None: as many as their gradients' factors allow."""
        return None

    def seconds(self, setting: Setting, vectors: int) -> float:
        """Roughly what ``prepare``, and ``solve`` for so many vectors, will take."""
        return 0.0

    def preparation(self) -> dict[str, Any]:
        """The settings that ``prepare`` depends on, for the name on disk."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.unprepared}
