"""Empirical audits: a lower confidence bound on epsilon from runs on two neighbouring inputs.

For whoever wants to know that an implementation does what its accountant says. The bound is one-sided: an honest
mechanism exceeds its claim with probability at most 1 - confidence; a wrong one is caught only if the score tells the
two inputs apart well enough.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import beta

from locally.checks import check_count, check_finite, check_positive, check_shape
from locally.privacy.stationary.accounting import Adjacency
from locally.privacy.stationary.objectives import PerExampleObjective
from locally.privacy.stationary.randomness import Randomness, as_randomness
from locally.privacy.stationary.result import PrivateResult
from locally.privacy.stationary.spider import PrivateSpiderBoost


@dataclass(frozen=True)
class Audit:
    """The mechanism is not (e, delta)-private for any e < `epsilon`, at the given confidence.

    Attributes:
        epsilon: the lower bound, 0 where nothing could be shown.
        true_positive_rate, false_positive_rate: the confidence bounds at the threshold that gave it.
        confidence: probability that the bound is below the true epsilon.
    """

    epsilon: float
    true_positive_rate: float
    false_positive_rate: float
    confidence: float


def audit(
    scores: Float[ndarray, " runs"],
    neighbour_scores: Float[ndarray, " neighbour_runs"],
    delta: float,
    confidence: float = 0.95,
) -> Audit:
    """Lower bound on epsilon from a score that is larger when the mechanism ran on the first input.

    The threshold is picked on the first half of either sample and judged on the second, so that picking it costs no
    confidence; the two rates get half of the error probability each (Clopper-Pearson).

    Args:
        scores, neighbour_scores: one score per independent run on either input, at least 2 of each.
        delta: the delta at which epsilon is bounded, in (0, 1).
        confidence: in (0, 1).

    Raises:
        ValueError: too few scores, NaN, or a probability out of range.

    >>> rng = np.random.default_rng(0)
    >>> found = audit(rng.normal(1, 1, 20_000), rng.normal(0, 1, 20_000), delta=1e-5)
    >>> 1.0 < found.epsilon < 4.38  # what one release at sensitivity 1 and noise 1 costs
    True
    """
    check_positive("delta", delta, below=1)
    check_positive("confidence", confidence, below=1)
    for name, sample in (("scores", scores), ("neighbour_scores", neighbour_scores)):
        check_shape(name, sample, (None,))
        check_finite(name, sample)
        if len(sample) < 2:
            raise ValueError(f"{name} must hold at least 2 runs, got {len(sample)}")
    error = (1 - confidence) / 2
    half, neighbour_half = len(scores) // 2, len(neighbour_scores) // 2
    picked = _best_threshold(scores[:half], neighbour_scores[:neighbour_half], delta, error)
    if picked is None:
        return Audit(0.0, 0.0, 1.0, confidence)
    threshold, swapped = picked
    first, second = scores[half:], neighbour_scores[neighbour_half:]
    if swapped:
        first, second = -second, -first
    hits, alarms = int((first >= threshold).sum()), int((second >= threshold).sum())
    tpr, fpr = _rate_low(hits, len(first), error), _rate_high(alarms, len(second), error)
    return Audit(_epsilon(float(tpr), float(fpr), delta), float(tpr), float(fpr), confidence)


def audit_spiderboost(
    method: PrivateSpiderBoost,
    *,
    runs: int,
    confidence: float = 0.95,
    rng: int | torch.Generator | Randomness | None = None,
) -> Audit:
    """Audit whole runs of a method on the pair of inputs that is easiest to tell apart.

    The score is the log-likelihood ratio of the released path: no attack on this pair does better.

    Args:
        method: on every example at each release; its noise is then that of a run on any data.
        runs: on either input, at least 2.
        confidence: in (0, 1).
        rng: None draws from the operating system's secure source.

    Raises:
        ValueError: too few runs, a method that samples batches, or a probability out of range.

    >>> method = PrivateSpiderBoost(epsilon=4.0, delta=0.01, steps=4, phase=2)
    >>> audit_spiderboost(method, runs=500, rng=0).epsilon <= 4.0
    True
    """
    check_count("runs", runs, at_least=2)
    if method.anchor_batch is not None or method.variation_batch is not None:
        raise ValueError("method must use every example at each release, got one with batches")
    first, second = worst_case_pair(method.adjacency)
    if any(m.noise_multiplier == 0 for m in method.privacy_statement(first).mechanisms):
        raise ValueError("method must add noise at each release, got a noise multiplier of 0")
    randomness = as_randomness(rng)
    traced = replace(method, keep_trace=True)
    scores = [
        np.array([_path_score(traced, side, traced.minimize(side, rng=randomness)) for _ in range(runs)])
        for side in (first, second)
    ]
    return audit(scores[0], scores[1], method.delta, confidence)


def worst_case_pair(adjacency: Adjacency) -> tuple[PerExampleObjective, PerExampleObjective]:
    """Neighbours on the line whose every release differs by its whole sensitivity, with L0 = L1 = 1.

    Of two examples one has no gradient. The other has x (1000 + w), clipped to x: x is 1 on one side and -1, or 0 where
    the example is missing, on the other.
    """

    def side(x: float) -> PerExampleObjective:
        data = torch.tensor([[0.0], [x]], dtype=torch.float64)
        return PerExampleObjective(lambda w, x: x * (1000 + w), data, dimension=1, lipschitz=1.0, smoothness=1.0)

    return side(1.0), side(-1.0 if adjacency == Adjacency.REPLACE else 0.0)


def _path_score(method: PrivateSpiderBoost, objective: PerExampleObjective, found: PrivateResult) -> float:
    """Log-likelihood ratio of a released path towards the first of the pair, up to a constant."""
    assert found.trace is not None
    multipliers = [m.noise_multiplier for m in found.privacy.mechanisms]
    points, released = found.trace.iterates[:, 0].tolist(), found.trace.estimates[:, 0].tolist()
    score = 0.0
    for t, estimate in enumerate(released):
        if t % method.phase == 0:
            z, bound, release = multipliers[0], 1.0, estimate
        else:
            moved = points[t] - points[t - 1]
            z, bound = multipliers[-1], objective.difference_bound(abs(moved))
            release = math.copysign(1.0, moved) * (estimate - released[t - 1])
        sensitivity = method.adjacency.bounded_terms * bound / objective.size
        score += release / (sensitivity * z**2)
    return score


def _best_threshold(
    scores: Float[ndarray, " runs"], neighbour_scores: Float[ndarray, " neighbour_runs"], delta: float, error: float
) -> tuple[float, bool] | None:
    """The threshold with the largest bound on this half, and whether the inputs change roles for it.

    Both events, a high score on the first input and a low one on the second, bound the same epsilon.
    """
    best, picked = 0.0, None
    for swapped, first, second in ((False, scores, neighbour_scores), (True, -neighbour_scores, -scores)):
        thresholds = np.quantile(np.concatenate([first, second]), np.linspace(0.01, 0.999, 200))
        hits = len(first) - np.searchsorted(np.sort(first), thresholds)
        alarms = len(second) - np.searchsorted(np.sort(second), thresholds)
        tpr, fpr = _rate_low(hits, len(first), error), _rate_high(alarms, len(second), error)
        bounds = np.log(np.maximum(tpr - delta, 1e-300) / fpr)
        at = int(np.argmax(bounds))
        if bounds[at] > best:
            best, picked = float(bounds[at]), (float(thresholds[at]), swapped)
    return picked


def _epsilon(tpr: float, fpr: float, delta: float) -> float:
    return max(0.0, math.log((tpr - delta) / fpr)) if tpr > delta else 0.0


def _rate_low(hits: int | ndarray, runs: int, error: float) -> ndarray:
    """Clopper-Pearson lower bound on a rate."""
    hits = np.asarray(hits)
    return np.where(hits == 0, 0.0, beta.ppf(error, np.maximum(hits, 1), runs - hits + 1))


def _rate_high(hits: int | ndarray, runs: int, error: float) -> ndarray:
    """Clopper-Pearson upper bound on a rate."""
    hits = np.asarray(hits)
    return np.where(hits == runs, 1.0, beta.ppf(1 - error, hits + 1, np.maximum(runs - hits, 1)))
