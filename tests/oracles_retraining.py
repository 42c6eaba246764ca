"""What retraining methods and their metrics must equal: loops over subsets and orders, normal equations, scipy."""

import itertools
import math

import scipy.stats
import torch


def correlation_over_subsets(scores, membership, losses):
    """The linear datamodeling score, one query and one subset at a time."""
    total = 0.0
    for q in range(len(scores)):
        predicted = [sum(float(scores[q, i]) for i in range(scores.shape[1]) if row[i]) for row in membership]
        total += scipy.stats.spearmanr(predicted, [-float(loss[q]) for loss in losses])[0]
    return total / len(scores)


def ridge_losses(x, y, ids, asked_x, asked_y, decay, divisor=None):
    """[query] halved squared errors of the ridge regression on some examples, by normal equations."""
    x, y = x[list(ids)], y[list(ids)]
    n = divisor or len(x)
    weight = torch.linalg.inv(x.T @ x / n + decay * torch.eye(x.shape[1], dtype=x.dtype)) @ (x.T @ y / n)
    return (asked_x @ weight - asked_y) ** 2 / 2


def leave_one_out(losses_on, n):
    """[query, train]; ``losses_on(ids)`` gives [query]."""
    whole = losses_on(range(n))
    return torch.stack([losses_on([j for j in range(n) if j != i]) - whole for i in range(n)], 1)


def shapley_by_orders(value_of, n):
    """[query, train]: the mean marginal contribution over all n! orders; ``value_of(ids)`` gives [query]."""
    total = 0.0
    for order in itertools.permutations(range(n)):
        values = [value_of(sorted(order[:k])) for k in range(n + 1)]
        gains = torch.empty(len(values[0]), n, dtype=torch.float64)
        for place, i in enumerate(order):
            gains[:, i] = values[place + 1] - values[place]
        total = total + gains
    return total / math.factorial(n)


def banzhaf(value_of, n):
    """[query, train]: the mean marginal contribution over all subsets of the others."""
    columns = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        subsets = [s for k in range(n) for s in itertools.combinations(others, k)]
        columns.append(sum(value_of(sorted([*s, i])) - value_of(list(s)) for s in subsets) / len(subsets))
    return torch.stack(columns, 1)


def with_and_without(membership, losses):
    """Values, standard errors and counts, one example and one query at a time."""
    n_train, n_query = membership.shape[1], losses.shape[1]
    values, errors = torch.empty(n_query, n_train), torch.empty(n_query, n_train)
    values, errors = values.double(), errors.double()
    for i in range(n_train):
        for q in range(n_query):
            inside = [float(loss[q]) for row, loss in zip(membership, losses, strict=True) if row[i]]
            outside = [float(loss[q]) for row, loss in zip(membership, losses, strict=True) if not row[i]]
            values[q, i] = mean(outside) - mean(inside)
            errors[q, i] = math.sqrt(variance(outside) / max(len(outside), 1) + variance(inside) / max(len(inside), 1))
    return values, errors, membership.sum(0), (~membership).sum(0)


def mean(numbers):
    return sum(numbers) / len(numbers) if numbers else math.nan


def variance(numbers):
    if len(numbers) < 2:
        return math.nan
    return sum((x - mean(numbers)) ** 2 for x in numbers) / (len(numbers) - 1)


def knn_value(distances, same, ids, k):
    """The share of the k nearest among some examples that have the query's label: [query]."""
    found = []
    for row, right in zip(distances, same, strict=True):
        nearest = sorted(ids, key=lambda i: (float(row[i]), i))[:k]
        found.append(sum(float(right[i]) for i in nearest) / k)
    return torch.tensor(found, dtype=torch.float64)


def rank_correlation(left, right):
    """Pearson's correlation of ranks, ties at their mean rank; NaN for a constant."""
    if len(set(left)) < 2 or len(set(right)) < 2:
        return math.nan
    a, b = ([sum(y < x for y in v) + (sum(y == x for y in v) + 1) / 2 for x in v] for v in (left, right))
    mean = (len(a) + 1) / 2
    over = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return over / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


def paired_difference(best, other, truth, columns, rows):
    """By how much ``other`` predicts ``truth`` worse, in a mean over queries, for one choice of queries and subsets."""
    gaps = []
    for q in rows:
        actual = [float(truth[q, s]) for s in columns]
        pair = [rank_correlation([float(one[q, s]) for s in columns], actual) for one in (best, other)]
        if not any(math.isnan(x) for x in pair):
            gaps.append(pair[0] - pair[1])
    return sum(gaps) / len(gaps) if gaps else math.nan


def paired_interval(best, other, truth, n, seed, level):
    """The ends of the percentile bootstrap interval of ``paired_difference``, over queries and subsets."""
    queries, subsets = truth.shape
    draw = torch.Generator().manual_seed(seed)
    columns = torch.randint(subsets, (n, 1, subsets), generator=draw)[:, 0].tolist()
    rows = torch.randint(queries, (n, queries), generator=draw).tolist()
    found = sorted(paired_difference(best, other, truth, c, r) for c, r in zip(columns, rows, strict=True))
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        place = share * (n - 1)
        low = math.floor(place)
        ends.append(found[low] + (place - low) * (found[min(low + 1, n - 1)] - found[low]))
    return ends
