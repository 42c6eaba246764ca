"""What retraining methods and their metrics must equal: loops over subsets, normal equations, scipy."""

import scipy.stats


def correlation_over_subsets(scores, membership, losses):
    """The linear datamodeling score, one query and one subset at a time."""
    total = 0.0
    for q in range(len(scores)):
        predicted = [sum(float(scores[q, i]) for i in range(scores.shape[1]) if row[i]) for row in membership]
        total += scipy.stats.spearmanr(predicted, [-float(loss[q]) for loss in losses])[0]
    return total / len(scores)
