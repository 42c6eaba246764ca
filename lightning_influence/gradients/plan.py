"""How the per-sample gradients of each parameter are computed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_influence.gradients.branches import Branch
from lightning_influence.gradients.layout import Layout
from lightning_influence.gradients.tape import Use


@dataclass(frozen=True)
class Plan:
    """How each trainable parameter's per-sample gradients are computed; the self-check decides.

    Args:
        layouts: for each parameter with a layer rule, which dimension of its activations holds the examples.
        vectorised: parameters whose gradients come from ``torch.func``.
        one_by_one: parameters whose gradients take one backward pass per example.
        separate: parameters that are never joined with others in one part.
        copy_leaves: whether activations are copied, since the model writes into them in place.
        uses: the functions that each parameter is passed to.
        unreached: parameters that the loss does not depend on.
        zero: others, whose gradients were 0 for all examples of the self-check.
        bytes_of_one: of the gradient of an example of the self-check; None: not known.
        branches: the ways that the step took there.
        mixing: what the loss follows from that may mix examples, depending on their values; see ``MixingWatch``.
        mixed_before: whether it is mixed before the step.
        reads: whether the step reads values of its batch as numbers.
        closely: whether examples with the largest and the smallest numbers are checked.
    """

    layouts: Mapping[str, Layout]
    vectorised: tuple[str, ...] = ()
    one_by_one: tuple[str, ...] = ()
    separate: frozenset[str] = frozenset()
    copy_leaves: bool = False
    uses: frozenset[Use] = frozenset()
    unreached: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    bytes_of_one: int | None = None
    branches: frozenset[Branch] = frozenset()
    mixing: str | None = None
    mixed_before: bool = False
    reads: bool = False
    closely: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters of the plan."""
        return (*self.layouts, *self.vectorised, *self.one_by_one, *self.unreached)

    def check_has(self, trained: Iterable[str]) -> None:
        """Check that the plan has all parameters that trained.

        Raises:
            ValueError: it lacks some of them.
        """
        if left_out := sorted(set(trained) - set(self.names)):
            raise ValueError(
                f"Expected every parameter that trained to be selected, got `parameters=` without `{left_out[0]}`"
                f"{f' and {len(left_out) - 1} more' if len(left_out) > 1 else ''}: a change of one weight changes all "
                "others in later steps. Leave `parameters` out."
            )

    def summary(self, parameters: Mapping[str, Tensor]) -> str:
        """One line that says how many parameters have factored gradients, the fast way, and names all others."""
        total = sum(parameters[name].numel() for name in self.names)
        factored = sum(parameters[name].numel() for name in self.layouts)
        which = f"all {total:,}" if factored == total else f"{factored:,} of {total:,}"
        text = f"Gradients of {which} parameters were computed the fast way"
        for label, names in (
            ("through torch.func", self.vectorised),
            ("one example at a time", self.one_by_one),
            ("not used by the loss", self.unreached),
        ):
            if names:
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                text += f"; {label}: {shown}"
        return text
