"""What stands for a curvature while other work is timed for an estimate."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_influence.curvature.curvature import Curvature, PreparedCurvature
from lightning_influence.curvature.store import is_stored, prepared_at
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.setting.setting import Setting, Stage


@dataclass(frozen=True)
class StandIn(Curvature):
    """Solves for nothing, but in the form of another curvature, so that products take as long.

    Args:
        of: that curvature.
    """

    of: Curvature = field(kw_only=True)

    @classmethod
    def at(cls, curvature: Curvature, setting: Setting, stage: Stage) -> "StandIn":
        """That of a curvature, as if it were prepared at a stage: read if it is stored, but not computed."""
        made = cls(curvature.damping, of=curvature)
        kept: dict[int | None, PreparedCurvature] = setting.state(made, dict)  # where `prepared_at` looks first
        read = is_stored(curvature, setting, stage)
        kept[stage.position] = prepared_at(curvature, setting, stage) if read else curvature.sampled(setting)
        return made

    def prepare(self, setting: Setting) -> PreparedCurvature:
        """From a few examples, or not at all."""
        return self.of.sampled(setting)

    def solve(
        self, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
    ) -> QueryGradients:
        """Vectors in the form of the solutions."""
        return self.of.like_solved(prepared, queries, setting, diagonal)

    def own_products(
        self,
        prepared: PreparedCurvature,
        gradients: Gradients,
        setting: Setting,
        diagonal: Tensor,
        powers: Sequence[int] = (1,),
    ) -> Tensor:
        """As the curvature has them, unless it solves for each."""
        if type(self.of).own_products is Curvature.own_products:
            return super().own_products(prepared, gradients, setting, diagonal, powers)
        return self.of.own_products(prepared, gradients, setting, diagonal, powers)

    def at_once(self, setting: Setting) -> int | None:
        """As many as for the curvature."""
        return self.of.at_once(setting)
