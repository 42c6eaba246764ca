"""Units, diagnostics, hyper-parameters and tables in words, for readers who have not seen the code."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_DIAGNOSTICS = {
    "agreement": "rank correlation with refits without a tenth of the examples {:.2f}",
    "attention_drift": "gradients of one step differ by {:.1e} between kernels of attention",
    "drift": "repeating the training steps misses the checkpoints by at most {:.1e} of the way between them",
    "eigenvectors": "{:.0f} eigenvectors",
    "head_gradient_norm": "gradient norm of the last layer {:.1e}",
    "leverage": "examples decide their own predictions by {:.0%} (leverage; 100%: memorised)",
    "models": "{:.0f} models",
    "queries_without_scores": "{:.0f} queries without scores",
    "reconstruction_error": "sums over training examples give the outputs of the last layer to {:.1e}",
    "score_error": "relative error of the approximation of the scores {:.2g}",
    "share_of_gradient_in_eigenvectors": "at least {:.0%} of a gradient is in the eigenvectors",
    "solver_iterations": "at most {:.0f} iterations of the solver",
    "solver_residual": "largest relative residual of the solver {:.1e}",
    "solver_scale": "scale of the solver {:.3g}",
    "standard_error_median": "median standard error {:.3g}",
}
_ALL_FAST = r"Gradients of all [\d,]+ parameters were computed the fast way$"
_ROUTINE = re.compile(
    _ALL_FAST + r"|Damping |E?K-FAC of the |Head `|Scores are "
    r"|\d+ segments? with |Exact: all |Truncated Monte Carlo: |`diagnostics\['agreement'\]`"
)
_NOTHING_AT_ZERO = ("attention_drift", "queries_without_scores", "score_error")
_IN_A_NOTE = ("damping", "weight_decay")


def unit(units: str) -> str:
    """The unit in a sentence, such as "units: loss"."""
    return "no unit (they rank; sums mean nothing)" if units == "arbitrary" else f"units: {units}"


def diagnostics(found: Mapping[str, float]) -> str:
    """Diagnostics as one sentence without its full stop; empty if all is well and none is left."""
    shown = [
        _DIAGNOSTICS.get(name, name.replace("_", " ") + " {:.3g}").format(value)
        for name, value in found.items()
        if name not in _IN_A_NOTE and (value or name not in _NOTHING_AT_ZERO)
    ]
    text = ", ".join(shown)
    return text[:1].upper() + text[1:]


def setting(value: Any) -> str:
    """A hyper-parameter as code would write it, such as EKFAC(seed=0); what is None, the default, is left out."""
    if not isinstance(value, Mapping):
        return str(value)
    arguments = ", ".join(f"{k}={setting(v)}" for k, v in value.items() if k != "name" and v is not None)
    return f"{value.get('name', '')}({arguments})"


def settings(found: Mapping[str, Any]) -> dict[str, str]:
    """Those hyper-parameters that are not None, in words.

    ``units="loss"``, a default, asks for that unit where there is one; `unit` says which the scores have.
    """
    return {name: setting(v) for name, v in found.items() if v is not None and (name, v) != ("units", "loss")}


def news(notes: Sequence[str]) -> list[str]:
    """Notes without those that every question of the kind has, such as the damping that was used."""
    return [note for note in notes if not _ROUTINE.match(note)]


def to_print(notes: Sequence[str]) -> list[str]:
    """Notes without the one that says nothing of this question: that all gradients were computed the fast way."""
    return [note for note in notes if not re.match(_ALL_FAST, note)]


def table(names: Sequence[str], rows: Sequence[Sequence[Any]], indent: str = "  ") -> str:
    """Rows as a plain-text table; columns of numbers are right-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(names), *cells]) for i in range(len(names))]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(names))
    ]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in [list(names), *cells]
    ]
    return "\n".join(indent + line for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
