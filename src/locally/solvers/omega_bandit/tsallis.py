"""Tsallis-INF over a grid of parameters, without context and with binned contexts.

Follow the regularised leader with the 1/2-Tsallis entropy: sqrt(T) regret whatever the costs, log(T) where one arm is
better by a margin. Sources: Zimmert & Seldin, JMLR 22 (2021), 1-49; arXiv 2310.02246.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, no_type_check

import numpy as np
from jaxtyping import Float
from numba import njit
from numpy import ndarray

from locally.checks import check_choice, check_count, check_finite, check_positive
from locally.solvers.omega_bandit.bandit import (
    Choice,
    ContextInterval,
    GridBandit,
    Outside,
    RandomSource,
    Real,
    restored,
)

Estimator = Literal["iw", "rv"]
ESTIMATORS: tuple[Estimator, ...] = ("iw", "rv")


def tsallis_weights(losses: Float[ndarray, " d"], eta: float) -> tuple[Float[ndarray, " d"], float]:
    """Probabilities p_i = 4 / (eta (losses_i - x))^2 and the x < min(losses) at which they sum to 1.

    Args:
        losses: cumulative loss estimates; adding a constant to all of them moves x and leaves p.
        eta: learning rate, positive.

    Returns:
        (p, x). O(d) a Newton step, a handful of steps.

    >>> p, x = tsallis_weights(np.zeros(4), eta=2.0)
    >>> p, x
    (array([0.25, 0.25, 0.25, 0.25]), -2.0)
    """
    check_finite("losses", losses)
    check_positive("eta", eta)
    smallest = losses.min()
    p, z = _normalise(eta * (np.asarray(losses, np.float64) - smallest))
    return p, float(smallest - z / eta)


class TsallisINF(GridBandit):
    """The best fixed parameter in hindsight, for costs of which nothing is assumed; contexts are ignored.

    Args:
        grid: parameters to choose from, e.g. `np.linspace(1, 1.95, 20)` for omega.
        scale: losses are divided by this before they meet the learning rate. "running" is the mean excess of the
            costs so far over `min_cost`; a number is a bound on that excess, with which the regret bounds below hold.
        estimator: "iw" weighs the loss of the arm that was played by 1/p; "rv" does so around a baseline of scale/2,
            which halves the leading constant.
        lr: eta_t = lr / sqrt(t); default 2 for "iw" and 4 for "rv".
        min_cost, rng: see `GridBandit`.

    Expected regret after T rounds against the best of d arms, for excess costs in [0, scale]: at most
    scale (4 sqrt(d T) + 1) with "iw", and 2 scale sqrt(d T) plus terms of order d log T with "rv".

    >>> bandit = TsallisINF([1.0, 1.5, 1.9], rng=0)
    >>> for _ in range(300):
    ...     choice = bandit.ask()
    ...     bandit.tell(cost=10 + 40 * abs(choice.value - 1.5), choice=choice)
    >>> bool(bandit.distribution()[1] > 0.7)
    True
    """

    def __init__(
        self,
        grid: Sequence[float] | ndarray,
        *,
        scale: float | Literal["running"] = "running",
        estimator: Estimator = "iw",
        lr: float | None = None,
        min_cost: float = 1.0,
        rng: RandomSource = None,
    ) -> None:
        super().__init__(grid, min_cost=min_cost, rng=rng)
        check_choice("estimator", estimator, ESTIMATORS)
        if isinstance(scale, str):
            check_choice("scale", scale, ("running",))
        else:
            check_positive("scale", scale)
        self.lr = (2.0 if estimator == "iw" else 4.0) if lr is None else lr
        check_positive("lr", self.lr)
        self.scale, self.estimator = scale, estimator
        self._bins = [_Losses(self.grid.size)]

    def _bin(self, context: Real | None) -> "_Losses":
        return self._bins[0]

    def distribution(self, context: Real | None = None) -> Float[ndarray, " d"]:
        seen = self._bin(context)
        rate = self.lr / np.sqrt(seen.rounds + 1) / seen.scale(self.scale)
        return _normalise(rate * (seen.cumulative - seen.cumulative.min()))[0]

    def _remember(self, context: Real | None, p: Float[ndarray, " d"], arm: int) -> list[float]:
        if self.estimator == "iw":
            return []
        # Zimmert & Seldin (2021): half the scale, but 0 for arms that are too improbable to bear it
        seen = self._bin(context)
        eta_squared = self.lr**2 / (seen.rounds + 1)
        return np.where(p >= eta_squared, seen.scale(self.scale) / 2, 0.0).tolist()

    def _learn(self, choice: Choice, memory: list[float], cost: float) -> None:
        seen = self._bin(choice.context)
        excess = cost - self.min_cost
        if self.estimator == "iw":
            seen.cumulative[choice.arm] += excess / choice.probability
        else:
            seen.cumulative += memory
            seen.cumulative[choice.arm] += (excess - memory[choice.arm]) / choice.probability
        seen.rounds += 1
        seen.total += excess

    def _settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "estimator": self.estimator, "lr": self.lr}

    def _save(self) -> dict[str, Any]:
        bins = [{"rounds": b.rounds, "total": b.total, "cumulative": b.cumulative.tolist()} for b in self._bins]
        return {"settings": self._settings(), "bins": bins}

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["settings"] != self._settings():
            raise ValueError(f"state must be of a learner with {self._settings()}, got {state['settings']}")
        bins = [
            (int(saved["rounds"]), float(saved["total"]), restored("cumulative", saved["cumulative"], seen.cumulative))
            for seen, saved in zip(self._bins, state["bins"], strict=True)
        ]
        for seen, (rounds, total, cumulative) in zip(self._bins, bins):
            seen.rounds, seen.total, seen.cumulative = rounds, total, cumulative


class BinnedTsallisINF(TsallisINF):
    """An independent Tsallis-INF for each of `n_bins` equal parts of the interval of contexts.

    Competes with the best parameter per bin; with n_bins ~ T^(1/4) and as fine a grid the regret against the best
    parameter for every context is O(T^(3/4)) where the cost is Lipschitz.

    Args:
        bounds: (low, high) of the contexts.
        n_bins: at least 1.
        outside: what to do with a context out of bounds: "clip" it to the nearer end, or "raise" ValueError.
        grid, scale, estimator, lr, min_cost, rng: see `TsallisINF`; the running scale is each bin's own.

    >>> bandit = BinnedTsallisINF([1.0, 1.5, 1.9], bounds=(0.0, 1.0), n_bins=2, rng=0)
    >>> choice = bandit.ask(context=0.7)
    >>> bandit.tell(25, choice)
    >>> bandit.distribution(context=0.1).round(3)  # the other bin has seen nothing
    array([0.333, 0.333, 0.333])
    """

    def __init__(
        self,
        grid: Sequence[float] | ndarray,
        bounds: tuple[Real, Real],
        n_bins: int = 5,
        *,
        scale: float | Literal["running"] = "running",
        estimator: Estimator = "iw",
        lr: float | None = None,
        min_cost: float = 1.0,
        outside: Outside = "clip",
        rng: RandomSource = None,
    ) -> None:
        super().__init__(grid, scale=scale, estimator=estimator, lr=lr, min_cost=min_cost, rng=rng)
        check_count("n_bins", n_bins)
        self.interval = ContextInterval(bounds, outside)
        self._bins = [_Losses(self.grid.size) for _ in range(n_bins)]

    @property
    def n_bins(self) -> int:
        """Bins of the context, each with a learner of its own."""
        return len(self._bins)

    def _bin(self, context: Real | None) -> "_Losses":
        return self._bins[min(int(self.interval.place(context) * self.n_bins), self.n_bins - 1)]

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"bounds": [self.interval.low, self.interval.high], "n_bins": self.n_bins}


class _Losses:
    """What one learner has seen: cumulative loss estimates (not yet scaled), rounds, sum of the excess costs."""

    def __init__(self, arms: int) -> None:
        self.cumulative = np.zeros(arms)
        self.rounds = 0
        self.total = 0.0

    def scale(self, setting: float | str) -> float:
        if not isinstance(setting, str):
            return setting
        # all costs at their minimum leave the mean excess at 0: nothing to scale then
        return self.total / self.rounds if self.total > 0 else 1.0


@njit(cache=True, nogil=True)
@no_type_check
def _normalise(gaps):
    """p_i = 4 / (gaps_i + z)^2 for gaps >= 0 with one of them 0, and the z at which they sum to 1.

    The sum is convex and decreasing in z and at least 1 at z = 2, where the arm with gap 0 alone gives 1: Newton from
    there climbs to the root without overshooting it, and can never cross the pole at z = 0.
    """
    z = 2.0
    for _ in range(100):
        excess, slope = -1.0, 0.0
        for gap in gaps:
            root = 2.0 / (gap + z)
            excess += root * root
            slope += root * root * root
        step = excess / slope
        z += step
        if step <= 1e-15 * z:
            break
    p = (2.0 / (gaps + z)) ** 2
    return p / p.sum(), z
