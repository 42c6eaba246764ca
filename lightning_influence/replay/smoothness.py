"""How smoothly the end of a fit follows the weights of its examples: how far a derivative by them can be trusted."""

import torch

from lightning_influence.replay.many import run_many
from lightning_influence.replay.replay import Replay

_STEP = 0.1


def metasmoothness(replay: Replay, seed: int = 0) -> float:
    """Whether small changes of the examples' weights move the final weights on the same way, from -1 to 1.

    The fit runs again with weights 1, 1 + h v and 1 + 2 h v, v normal and h = 0.1; counted is how much of the distance
    lies in entries whose two halves have the same sign.

    Source: Engstrom, Ilyas, Chen, Feldmann, Moses, Madry. Optimizing ML Training with Metagradient Descent. 2025,
    definition 2.
    """
    draw = torch.Generator().manual_seed(seed)
    way = torch.randn(len(replay.examples), generator=draw, dtype=torch.float64)
    like = next(iter(replay.engine.task.named_parameters().values()))
    weights = torch.stack([torch.ones_like(way), 1 + _STEP * way, 1 + 2 * _STEP * way]).to(like.dtype)
    found = run_many(replay, weights)
    trained = {name for step in replay.steps for name in step.moves.options}
    ends = torch.cat([found[name].flatten(1).double() for name in sorted(trained)], 1)
    far = (ends[2] - ends[0]).abs()
    agreeing = (ends[1] - ends[0]).sign() * (ends[2] - ends[1]).sign()
    return float((far * agreeing).sum() / far.sum()) if bool(far.sum() > 0) else 1.0
