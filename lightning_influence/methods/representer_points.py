"""RepresenterPoints: a prediction as a sum over training examples, by the last linear layer (Yeh et al., 2018)."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.checks import check_integer, check_positive, one_of
from lightning_influence.files.arrow import read_file, write_file
from lightning_influence.gradients import Reduction
from lightning_influence.gradients.final_layer import Head, HeadRows, find_head, rows_on_host
from lightning_influence.gradients.stored_rows import head_rows, writable
from lightning_influence.methods.kinds import ForwardOnly
from lightning_influence.numerics.head_preconditioner import operations_once
from lightning_influence.numerics.heads import Link, Rows
from lightning_influence.numerics.penalised_head import HeadFit, PenalisedHead, passes
from lightning_influence.setting.samples import Samples
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.timing import Work, timed
from lightning_influence.wording import counted

# Up to this many numbers of the training examples' features are held in memory for the solve, as rows of so many.
_HELD = 2**26
_ROWS = 1024
# Of a progress bar.
_PARTS = 100


@dataclass(frozen=True)
class RepresenterPoints(ForwardOnly):
    r"""How much each training example contributes to a prediction, through the last linear layer only.

    Where the layer's weights W (bias included) minimise the mean loss plus
    :math:`\frac{\lambda}{2}\lVert W\rVert^2`, with f the layer's inputs (and a 1 for the bias), its outputs z
    for a query, the pre-activations, are a sum over the training examples:

    .. math:: z_c(q) = \sum_i \alpha_{ic} \, f_i \cdot f_q, \qquad
        \alpha_i = -\frac{1}{\lambda n} \frac{\partial \ell_i}{\partial z}, \qquad
        s(q, z_i) = -\sum_c \frac{\partial\ell_q}{\partial z_c} \alpha_{ic} \, f_i \cdot f_q

    Source: Yeh, Kim, Yen, Ravikumar. Representer Point Selection for Explaining Deep Neural Networks. NeurIPS 2018.
    Needs: the final weights.
    Units: query loss, to first order in the example's term; pre-activations if ``of`` is a class or ``"label"``.
    Cost: one forward pass per example, once: features are kept on disk with the trajectory. Then the minimisation for
    the head (the last linear layer), about a hundred passes over the features, and per score ``class + dim``
    operations. Memory: up to a GiB of features and their curvature during the minimisation.
    Departs from the paper: the head's minimum is found by Newton's method in float64, on the CPU; labels are the
    default targets.

    Args:
        of: ``"loss"``: the influence on the query's loss. A class (0, 1, ...): the terms of the query's pre-activation
            of that class, which sum to it. ``"label"``: those of the query's own class.
        weight_decay: λ as in ``torch.optim``, added to the mean loss. Yeh et al. write the penalty as λ'‖W‖², with
            λ = 2 λ'; the default is that of their code, λ' = 0.003.
        refit: whether to find the head's minimum. False: use the head as it was trained; the notes say how far the sum
            then is from the pre-activations.
        target: ``"labels"``, or ``"model"`` for the model's own outputs, as in the paper's code.
        head: name of the layer; None: the linear layer that is called last.
        max_iterations: the most Newton steps; a warning says if they do not reach the minimum.

    Raises:
        ValueError: other values; a model without such a layer; a loss other than cross-entropy, binary cross-entropy
            or squared error of the layer's outputs; a class that it does not have.

    Example:
        >>> from lightning_influence import Attributor, RepresenterPoints
        >>> attributor = Attributor(model, train=train, trajectory=trajectory)  # doctest: +SKIP
        >>> attributor.score(RepresenterPoints(of=3), queries=test).values.sum(1)  # doctest: +SKIP
    """

    of: Literal["loss", "label"] | int = "loss"
    weight_decay: float = 0.006
    refit: bool = True
    target: Literal["labels", "model"] = "labels"
    head: str | None = None
    max_iterations: int = 100

    def __post_init__(self) -> None:
        if not isinstance(self.of, int) or isinstance(self.of, bool) or self.of < 0:
            one_of("of", self.of, ("loss", "label", "a class (0, 1, ...)"))
        one_of("target", self.target, ("labels", "model"))
        hint = "The decomposition divides by it: pass the weight decay of the fit, or a small one such as 1e-3."
        check_positive("weight_decay", self.weight_decay, hint)
        check_integer("max_iterations", self.max_iterations)

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """The terms of the sum over training examples, [query, train]."""
        points, total = self._points(setting), setting.zeros(queries)
        features, weights = self._at_head(points, queries, setting.reduction_of(queries))
        # The mean over queries of weight × feature: for `aggregate="mean"`, the work does not grow with their number.
        mean = weights.T @ features / len(features)
        for columns, rows in points.tile(setting.ids):
            alpha, inputs = points.alpha(rows), points.head.augmented(rows.features)
            if queries.mean:
                product = ((alpha @ mean) * inputs).sum(1)[None]
            else:
                product = (weights @ alpha.T) * (features @ inputs.T)
            total[:, columns] = product.to(total)
            setting.on_block(len(inputs))
        return total

    def self_influence(self, setting: Setting) -> Tensor:
        """The same with each example as its own query, [train]; for the loss it is never negative."""
        points, total = self._points(setting), setting.zeros()
        for columns, rows in points.tile(setting.ids):
            inputs = points.head.augmented(rows.features)
            z = inputs @ points.fit.weight.T
            target = points.link.target(rows.outputs.double(), rows.gradients.double())
            gradient = points.link.scale * (points.link.mean(z) - target)
            weights = self._weights(gradient, target)
            total[columns] = ((weights * points.alpha(rows)).sum(1) * inputs.square().sum(1)).to(total)
            setting.on_block(len(inputs))
        return total

    def unit(self, setting: Setting) -> str:
        """Loss, or pre-activation with another ``of``."""
        return "loss" if self.of == "loss" else "pre-activation"

    def _at_head(self, points: "Points", queries: Queries, reduction: Reduction) -> tuple[Tensor, Tensor]:
        """Features of the queries, [query, dim], and the weight of each class in their scores, [query, class]."""
        head = Head(points.head.name, points.head.layer, queries.engine.task, reduction)
        blocks, own = queries.examples.blocks(queries.ids.start, queries.ids.stop), points.fit.weight
        features, weights = [], []
        for seen in rows_on_host([head.read(b.batch, b.size, own if self.refit else None) for b in blocks]):
            gradient = seen.gradients.double()
            features.append(head.augmented(seen.features))
            weights.append(self._weights(gradient, points.link.target(seen.outputs.double(), gradient)))
        return torch.cat(features), torch.cat(weights)

    def _weights(self, gradient: Tensor, target: Tensor) -> Tensor:
        """The weight of each class in the score, [example, class]."""
        if self.of == "loss":
            return -gradient
        classes = target.argmax(1) if self.of == "label" else torch.full((len(target),), int(self.of))
        if int(classes.max()) >= target.shape[1]:
            raise ValueError(f"Expected `of` to be a class below {target.shape[1]}, got {self.of!r}.")
        return torch.nn.functional.one_hot(classes, target.shape[1]).double()

    def _points(self, setting: Setting) -> "Points":
        """The decomposition, which is computed once per question."""
        return setting.state(self, self._decompose, setting)

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """Forward passes of the queries, and of the training examples and the head's minimum unless they are stored."""
        samples, folder = Samples.of(setting), _folder(setting)
        minimum, read = 0.0, 0
        with contextlib.suppress(ValueError):  # raised again when scores are computed
            head, link = self._head(setting)
            stored = [folder is not None and path.is_file() for path in self._files(setting, head, folder or Path())]
            read = 0 if stored[0] else setting.n_train
            minimum = self._seconds_of_minimum(setting, head, link) if self.refit and not stored[1] else 0.0
        forward = Work("forward passes", read + (0 if queries is None else len(queries.ids)), samples.forward)
        return [Work("head's minimum", 1, minimum), samples.reading(read / setting.n_train), forward]

    def _seconds_of_minimum(self, setting: Setting, head: Head, link: Link) -> float:
        """Estimated seconds of finding the head's minimum, at usual numbers of passes."""
        count, (classes, dim) = setting.n_train, head.weight().shape
        features = torch.ones(min(count, _ROWS), dim, dtype=torch.float64)
        weight = torch.zeros(classes, dim, dtype=torch.float64)
        rows = [(features, features.new_zeros(len(features), classes))]
        product = PenalisedHead(lambda: iter(rows), link, self.weight_decay).hessian(weight)
        moment = timed(lambda: features.T @ features) / (len(features) * dim**2)
        made = passes(link, self.weight_decay) * timed(lambda: product(weight)) * count / len(features)
        return made + moment * operations_once(count, dim)

    def _head(self, setting: Setting) -> tuple[Head, Link]:
        """The head and its loss."""
        head = find_head(setting.task, setting.reduction_of(None), setting.examples, self.head)
        return head, head.link(setting.examples)

    def _files(self, setting: Setting, head: Head, folder: Path) -> tuple[Path, Path]:
        """Where the training examples' features and the head's minimum are stored in a folder."""
        start = f"{head.name}-step-{_step(setting)}"
        return folder / f"{start}.arrow", folder / f"{start}-{self.target}-{self.weight_decay!r}.head.arrow"

    def _decompose(self, setting: Setting) -> "Points":
        head, link = self._head(setting)
        path, solved = self._files(setting, head, writable(_folder(setting), owner=head))
        with setting.progress(setting.n_train, f"inputs of the head `{head.name}`") as done:
            batches = head_rows(head, setting.examples, path, done)
        points = Points(head, link, batches, self.target == "model", self.weight_decay, setting.n_train)
        with setting.progress(_PARTS, f"solving for the head `{head.name}`", "%") as done:
            iterations = self.max_iterations if self.refit else 0
            points.solve(solved, iterations, _watch(setting, done))
        self._report(setting, points)
        return points

    def _report(self, setting: Setting, points: "Points") -> None:
        """Notes how close the head is to its minimum, and the error of the decomposition."""
        fit, error = points.fit, points.reconstruction_error()
        how = f"solved in {counted(fit.iterations, 'Newton step')}" if self.refit else "as it was trained"
        setting.note(
            f"Head `{points.head.name}` {how}: gradient norm {fit.gradient_norm:.1e} with weight decay "
            f"{self.weight_decay:g}. With `of='label'` or a class, the sum over training examples gives its outputs "
            f"for each of them to within {error:.1e}."
        )
        setting.diagnostic("head_gradient_norm", fit.gradient_norm)
        setting.diagnostic("reconstruction_error", error)
        if self.refit and not fit.converged:
            again = "" if setting.trajectory is None else ", or ask again, which goes on from there"
            when, limit = ("at the limit of time ", "`Attributor.limit_seconds`, ") if setting.late else ("", "")
            setting.warn(
                f"The head `{points.head.name}` stopped {when}after {counted(fit.iterations, 'Newton step')} at "
                f"gradient norm {fit.gradient_norm:.1e}: its outputs are not quite sums over training examples, "
                f"but to within {error:.1e}. Raise {limit}`max_iterations` or `weight_decay`{again}."
            )


@dataclass
class Points:
    """The decomposition: the head at its minimum, and the training examples' features and coefficients.

    Args:
        head: the last linear layer.
        link: the loss as a function of the head's outputs.
        batches: the training examples' features, outputs and gradients at the outputs, batch by batch.
        own: whether the model's own outputs are the targets.
        weight_decay: λ.
        n_train: the number of training examples.
    """

    head: Head
    link: Link
    batches: list[HeadRows]
    own: bool
    weight_decay: float
    n_train: int
    fit: HeadFit = field(init=False)

    def target(self, rows: HeadRows) -> Tensor:
        """The targets of some training examples, [example, class]."""
        outputs = rows.outputs.double()
        return self.link.mean(outputs) if self.own else self.link.target(outputs, rows.gradients.double())

    def alpha(self, rows: HeadRows) -> Tensor:
        """The coefficients α of some training examples, [example, class]."""
        z = self.head.augmented(rows.features) @ self.fit.weight.T
        return (self.target(rows) - self.link.mean(z)) * (self.link.scale / (self.weight_decay * self.n_train))

    def tile(self, ids: range) -> Iterator[tuple[slice, HeadRows]]:
        """The batches of a range of training examples, with their columns in it."""
        start = 0
        for batch in self.batches:
            low, high = max(ids.start, start), min(ids.stop, start + len(batch.features))
            if low < high:
                yield slice(low - ids.start, high - ids.start), batch[low - start : high - start]
            start += len(batch.features)

    def solve(self, path: Path, max_iterations: int, watch: Callable[[float], Any]) -> None:
        """Finds the head's minimum, or reads it from the file; with 0 iterations the head stays as it was trained.

        Args:
            path: of the file. A solve that stopped early leaves what it found there too: the next one goes on from it.
            max_iterations: the most Newton steps.
            watch: called with the share of the way that is made; True: stop.
        """
        objective = PenalisedHead(self._training_set(), self.link, self.weight_decay)
        weight = self.head.weight()
        if max_iterations == 0:
            self.fit = HeadFit(weight, float(objective.value_and_gradient(weight)[1].norm()), 0, False)
            return
        stored = _stored(path, weight, objective) if path.is_file() else None
        if stored is None or not stored.converged:
            stored = objective.fit(
                weight if stored is None else stored.weight, max_iterations=max_iterations, watch=watch
            )
            write_file(path, "head", {"weight": stored.weight}, {"iterations": stored.iterations}, overwrite=True)
        self.fit = stored

    def reconstruction_error(self) -> float:
        """An upper bound of the decomposition's error in the pre-activations of any training example."""
        longest = max(float(self.head.augmented(rows.features).norm(dim=1).max()) for rows in self.batches)
        return self.fit.gradient_norm / self.weight_decay * longest

    def _training_set(self) -> Rows:
        """The rows, in memory in larger blocks if they fit, since the solve takes many passes over them."""
        classes, dim = self.head.shape
        if self.n_train * dim > _HELD:
            return self._rows
        features = torch.empty(self.n_train, dim, dtype=torch.float64)
        targets, start = torch.empty(self.n_train, classes, dtype=torch.float64), 0
        for some, target in self._rows():
            features[start : start + len(some)], targets[start : start + len(some)] = some, target
            start += len(some)
        return lambda: zip(features.split(_ROWS), targets.split(_ROWS), strict=True)

    def _rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.batches:
            yield self.head.augmented(rows.features), self.target(rows)


def _folder(setting: Setting) -> Path | None:
    """Where features are stored with the trajectory, if it is on disk."""
    run = None if setting.trajectory is None else setting.trajectory.path
    return None if run is None else run / "features"


def _step(setting: Setting) -> int:
    """The optimizer step of the weights; 0 without a trajectory."""
    return 0 if setting.trajectory is None else setting.trajectory.checkpoints[-1].step


def _stored(path: Path, like: Tensor, objective: PenalisedHead) -> HeadFit | None:
    """The head in the file; converged if its gradient vanishes: the minimum is unique, so no other check is needed."""
    try:
        _, columns, metadata = read_file(path, ["head"])
    except ValueError:
        return None
    weight = columns["weight"].clone()
    if weight.shape != like.shape or not bool(weight.isfinite().all()):
        return None
    norm = float(objective.value_and_gradient(weight)[1].norm())
    return HeadFit(weight, norm, metadata["iterations"], objective.is_minimum(weight, norm))


def _watch(setting: Setting, done: Callable[[int], Any]) -> Callable[[float], bool]:
    """Turns the share of a way into calls with the parts of it that are new; True when the limit of time is reached."""
    made = 0

    def watch(share: float) -> bool:
        nonlocal made
        now = int(_PARTS * share)
        if now > made:
            done(now - made)
            made = now
        return setting.late

    return watch
