"""What cannot be asked about a fit on a stream, whose examples are known by id only."""

from lightning_influence.methods.method import Evidence, Method
from lightning_influence.refit import Refit


def check_stream(refit: Refit | None) -> None:
    """Raises ValueError where models would have to be retrained."""
    if refit is not None:
        raise ValueError(
            "Expected no `refit` with `lookup=`, got one: models are retrained on a dataset with a fixed order, which a"
            " stream has not. Leave it out, or collect the examples in a Dataset and fit on that."
        )


def check_method_on_stream(method: Method, n_train: int) -> None:
    """Raises ValueError where a method names examples by index, or followed the fit by index."""
    if method.needs & Evidence.TRACKER or method.scored(n_train) is not None:
        raise ValueError(
            f"Expected a method for all examples with `lookup=`, got {method!r}, which has indices of a dataset. Leave"
            " `examples=` out, or use `TracInCP()`."
        )
