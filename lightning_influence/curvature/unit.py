"""Whether influence functions have the size of a change of the loss."""

from lightning_influence.curvature.curvature import Curvature, PreparedCurvature
from lightning_influence.curvature.damping import Diagonal
from lightning_influence.curvature.leverage import own_influence
from lightning_influence.setting.setting import Setting

# Chosen on tests/benchmarks/units.py: slopes of self-influence against exact leave-one-out were 0.65 to 0.90 at
# leverages up to 0.21 (conjugate gradients), and 0.33 at 0.29. In 26 other fits they were 0.65 to 2.6 in the 9 with
# EK-FAC and the unit loss, but 0.29 in one with a leverage of 0.06. Slopes on queries were down to 0.03.
_MEMORISED = 0.25
# EK-FAC ranks best at a share of the damping, which makes scores about twice as large in the same fits. Where it was
# within this factor, slopes were below 3.
_INFLATED = 2.2


def why_arbitrary(
    curvature: Curvature, prepared: PreparedCurvature, setting: Setting, diagonal: Diagonal, corrected: bool
) -> str | None:
    """Why the scores' size is not that of the change of loss without an example; None if it is.

    Args:
        curvature: that the scores are computed with.
        prepared: at the weights in place.
        setting: the question; its diagnostics get the leverage of a sample of examples.
        diagonal: what is added to the curvature's.
        corrected: whether the scores are those of a Newton step, which divides by 1 - leverage.
    """
    whole = curvature.share == 1
    if diagonal.implied is None or (whole and not diagonal.is_near):
        return "their size depends on the damping, which does not follow from the length of the fit"
    if corrected:
        return None
    implied = diagonal.total if whole else diagonal.decay + diagonal.implied
    sample = own_influence(curvature, prepared, setting, implied, diagonal.total)
    setting.diagnostic("leverage", sample.leverage)
    if sample.leverage > _MEMORISED:
        return (
            f"the fit has memorised training examples (in a sample, they decide {sample.leverage:.0%} of their own "
            "predictions, which is their leverage): gradients at the final weights tell the order of these, not "
            "how much leaving them out would change. `LeaveOneOut()` measures that"
        )
    if not 1 / _INFLATED <= sample.inflation <= _INFLATED:
        return (
            f"their damping makes them {sample.inflation:.2g} times as large as the one that stands for the length "
            f"of the fit, `damping={float(diagonal.implied.max()):.3g}`"
        )
    return None
