"""The answers: what each training example did to each query, and to itself."""

from lightning_influence.scores.id_checks import BaseIds
from lightning_influence.scores.scores import Scores
from lightning_influence.scores.self_scores import SelfScores
from lightning_influence.scores.topk import TopK

__all__ = ["BaseIds", "Scores", "SelfScores", "TopK"]
