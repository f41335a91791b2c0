"""Searches that need no gradient, on any score of sequences: what a proxy is climbed with today.

All take the same call, `search(score, start, letters, n, rng)`, ask for `rounds` x `population` scores and return the
n best different sequences that they saw. Sources: AdaLead, Sinai et al., arXiv 2010.02141; CMA-ES, Hansen, arXiv
1604.00772; REINFORCE, Williams (1992); CbAS, Brookes et al., arXiv 1901.10060, here over independent positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_between, check_count, check_positive

Score = Callable[[ndarray], ndarray]  # indices (n, length) to (n,), higher is better


@runtime_checkable
class Search(Protocol):
    def __call__(
        self, score: Score, start: Int[ndarray, "m length"], letters: int, n: int, rng: np.random.Generator
    ) -> Int[ndarray, "n length"]: ...


@dataclass
class Seen:
    """Every different sequence that was scored, and its score."""

    score: Score
    known: dict[bytes, float] = field(default_factory=dict)
    rows: list[ndarray] = field(default_factory=list)

    def __call__(self, sequences: Int[ndarray, "m length"]) -> Float[ndarray, " m"]:
        values = np.asarray(self.score(sequences), np.float64)
        if not np.isfinite(values).all():
            raise ValueError("score returned NaN or infinity")
        for row, value in zip(sequences, values.tolist()):
            key = row.tobytes()
            if key not in self.known:
                self.known[key] = value
                self.rows.append(row)
        return values

    def best(self, n: int) -> Int[ndarray, "n length"]:
        """The best n, repeated from the top where fewer were seen."""
        order = np.argsort([-v for v in self.known.values()], kind="stable")
        return np.array(self.rows)[np.resize(order[:n], n)]


@dataclass(frozen=True)
class Evolution:
    """Parents near the best, crossed and mutated, as AdaLead does it.

    Args:
        rounds, population: scores asked for are their product.
        greed: parents score within this share of the range below the best, in [0, 1].
        recombination: probability that a child takes a letter from its second parent, in [0, 1].
        mutations: expected number of changed letters in a child, > 0.

    >>> count = lambda x: (x == 2).sum(1)
    >>> start = np.zeros((4, 8), np.int64)
    >>> int(count(Evolution(40, 50)(count, start, 4, 1, np.random.default_rng(0)))[0])
    8
    """

    rounds: int = 50
    population: int = 64
    greed: float = 0.05
    recombination: float = 0.2
    mutations: float = 1.0

    def __post_init__(self) -> None:
        check_budget(self.rounds, self.population)
        check_between("greed", self.greed, 0, 1)
        check_between("recombination", self.recombination, 0, 1)
        check_positive("mutations", self.mutations)

    def __call__(
        self, score: Score, start: Int[ndarray, "m length"], letters: int, n: int, rng: np.random.Generator
    ) -> Int[ndarray, "n length"]:
        seen = Seen(score)
        population, values = start, seen(start)
        for _ in range(self.rounds):
            floor = values.max() - self.greed * np.ptp(values)
            parents = population[values >= floor]
            mother, father = parents[rng.integers(len(parents), size=(2, self.population))]
            crossed = np.where(rng.random(mother.shape) < self.recombination, father, mother)
            mutated = rng.random(crossed.shape) < self.mutations / start.shape[1]
            children = np.where(mutated, rng.integers(0, letters, crossed.shape), crossed)
            population = np.concatenate([population, children])
            values = np.concatenate([values, seen(children)])
            kept = np.argsort(-values, kind="stable")[: self.population]
            population, values = population[kept], values[kept]
        return seen.best(n)


@dataclass(frozen=True)
class CMAES:
    """Covariance matrix adaptation on logits, read off by their largest entries; starts at the best sequence.

    Args:
        rounds, population: generations and samples in each, population at least 4.
        sigma: step size at the start, beside logits of 1 at the letters of the starting sequence, > 0.
    """

    rounds: int = 50
    population: int = 64
    sigma: float = 0.5

    def __post_init__(self) -> None:
        check_budget(self.rounds, self.population, least=4)
        check_positive("sigma", self.sigma)

    def __call__(
        self, score: Score, start: Int[ndarray, "m length"], letters: int, n: int, rng: np.random.Generator
    ) -> Int[ndarray, "n length"]:
        seen = Seen(score)
        first = start[seen(start).argmax()]
        mean = np.eye(letters)[first].reshape(-1)
        d, mu = mean.size, self.population // 2
        weights = math.log(mu + 0.5) - np.log(np.arange(1, mu + 1))
        weights /= weights.sum()
        effective = 1 / (weights**2).sum()
        # Hansen's default constants (arXiv 1604.00772, Table 1)
        c_sigma = (effective + 2) / (d + effective + 5)
        damping = 1 + 2 * max(0.0, math.sqrt((effective - 1) / (d + 1)) - 1) + c_sigma
        c_path = (4 + effective / d) / (d + 4 + 2 * effective / d)
        c_1 = 2 / ((d + 1.3) ** 2 + effective)
        c_mu = min(1 - c_1, 2 * (effective - 2 + 1 / effective) / ((d + 2) ** 2 + effective))
        length = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d * d))  # E|N(0, I)|
        C, sigma = np.eye(d), self.sigma
        path_sigma, path = np.zeros(d), np.zeros(d)
        for round_ in range(1, self.rounds + 1):
            variances, B = np.linalg.eigh(C)
            scale = np.sqrt(variances.clip(1e-20))
            z = rng.standard_normal((self.population, d))
            steps = (z * scale) @ B.T
            samples = (mean + sigma * steps).reshape(self.population, -1, letters).argmax(2)
            best = np.argsort(-seen(samples), kind="stable")[:mu]
            step = weights @ steps[best]
            mean = mean + sigma * step
            whitened = B @ (weights @ z[best])
            path_sigma = (1 - c_sigma) * path_sigma + math.sqrt(c_sigma * (2 - c_sigma) * effective) * whitened
            grown = np.linalg.norm(path_sigma) / math.sqrt(1 - (1 - c_sigma) ** (2 * round_))
            steady = float(grown < (1.4 + 2 / (d + 1)) * length)
            path = (1 - c_path) * path + steady * math.sqrt(c_path * (2 - c_path) * effective) * step
            lost = (1 - steady) * c_path * (2 - c_path)
            rank_mu = (weights[:, None] * steps[best]).T @ steps[best]
            C = (1 - c_1 - c_mu + c_1 * lost) * C + c_1 * np.outer(path, path) + c_mu * rank_mu
            sigma *= math.exp(c_sigma / damping * (np.linalg.norm(path_sigma) / length - 1))
        return seen.best(n)


@dataclass(frozen=True)
class Reinforce:
    """Policy gradient on independent positions, advantages standardised in each round.

    Args:
        rounds, population: gradient steps and samples in each.
        rate: of Adam on the logits, > 0.
    """

    rounds: int = 50
    population: int = 64
    rate: float = 0.1

    def __post_init__(self) -> None:
        check_budget(self.rounds, self.population)
        check_positive("rate", self.rate)

    def __call__(
        self, score: Score, start: Int[ndarray, "m length"], letters: int, n: int, rng: np.random.Generator
    ) -> Int[ndarray, "n length"]:
        seen = Seen(score)
        seen(start)
        logits = np.log(frequencies(start, letters, np.ones(len(start))))
        first, second = np.zeros_like(logits), np.zeros_like(logits)
        for t in range(1, self.rounds + 1):
            probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            samples = draw(probabilities, self.population, rng)
            values = seen(samples)
            advantage = (values - values.mean()) / (values.std() + 1e-9)
            gradient = np.einsum("s,slk->lk", advantage, np.eye(letters)[samples] - probabilities) / self.population
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            logits += self.rate * first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        return seen.best(n)


@dataclass(frozen=True)
class CbAS:
    """Conditioning by adaptive sampling: refit a distribution to samples weighted by how surely they are good.

    The weight of a sample is p_start(x) / p(x) times the probability that its score, Gaussian around the proxy, exceeds
    the `quantile` of the round; the distribution has independent positions.

    Args:
        rounds, population: refits and samples in each.
        quantile: in [0, 1].
        noise: standard deviation of the proxy's error, in the units of the score, > 0.
    """

    rounds: int = 50
    population: int = 64
    quantile: float = 0.9
    noise: float = 0.1

    def __post_init__(self) -> None:
        check_budget(self.rounds, self.population)
        check_between("quantile", self.quantile, 0, 1)
        check_positive("noise", self.noise)

    def __call__(
        self, score: Score, start: Int[ndarray, "m length"], letters: int, n: int, rng: np.random.Generator
    ) -> Int[ndarray, "n length"]:
        from scipy.special import log_ndtr

        seen = Seen(score)
        seen(start)
        prior = frequencies(start, letters, np.ones(len(start)))
        current, level = prior, -np.inf
        at = np.arange(start.shape[1])
        for _ in range(self.rounds):
            samples = draw(current, self.population, rng)
            values = seen(samples)
            level = max(level, float(np.quantile(values, self.quantile)))
            log_weight = (np.log(prior) - np.log(current))[at, samples].sum(1) + log_ndtr((values - level) / self.noise)
            current = frequencies(samples, letters, np.exp(log_weight - log_weight.max()))
        return seen.best(n)


def check_budget(rounds: int, population: int, least: int = 2) -> None:
    check_count("rounds", rounds)
    check_count("population", population, at_least=least)


def frequencies(
    sequences: Int[ndarray, "m length"], letters: int, weights: Float[ndarray, " m"]
) -> Float[ndarray, "length letters"]:
    """Weighted shares of the letters at each position, with one pseudocount for the whole alphabet."""
    counts = np.einsum("m,mlk->lk", weights, np.eye(letters)[sequences])
    return (counts + 1 / letters) / (weights.sum() + 1)


def draw(probabilities: Float[ndarray, "length letters"], n: int, rng: np.random.Generator) -> Int[ndarray, "n length"]:
    edges = probabilities.cumsum(1)[:, :-1]
    return (rng.random((n, len(edges), 1)) > edges).sum(2)
