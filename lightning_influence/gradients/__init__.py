"""The gradient engine: per-sample gradients in factored form, from one batched backward pass of an unchanged module.

Per-sample gradients of common layers are sums of outer products, and are not built before they must be. The cost grows
in proportion to the training examples, the checkpoints and the passes of the model itself. A query costs one matrix
product, a training example one backward pass; wider layers cost what they cost in training. Tokens (and the pixels of
a convolution) enter squared where factors are contracted first, and in proportion where a layer's gradient is built
first; each layer takes the cheaper way.
"""

from lightning_influence.gradients.block import Gradients
from lightning_influence.gradients.engine import Engine
from lightning_influence.gradients.plan import Plan
from lightning_influence.gradients.reduction import Reduction
from lightning_influence.gradients.sample import Sample
from lightning_influence.gradients.self_check import make_plan
from lightning_influence.gradients.single_examples import probe_examples

__all__ = ["Engine", "Gradients", "Plan", "Reduction", "Sample", "make_plan", "probe_examples"]
