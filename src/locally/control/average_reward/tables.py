"""The class of all tables: Q in R^(S x A), any kernel. Upsilon costs O(1) a step."""

from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_choice, check_count, check_positive
from locally.control.average_reward.hypotheses import check_transition, squared_loss_beta
from locally.control.average_reward.kernels import follow_table, learn_table
from locally.control.average_reward.planning import Plan, Planner, optimistic_plan
from locally.control.average_reward.walks import Trace, Walk, check_walk
from locally.control.validity import checked_arrays


class TabularValue:
    """All tables. The best auxiliary table is the mean of the targets in each cell.

    Upsilon = sum over (s, a) of (n + lam) (w - (sum of r + V(s')) / (n + lam))^2 with w = Q + J: a ridge regression
    with one feature a cell, and the confidence set is an ellipsoid whose radius all cells share. Cells that were never
    tried count as leading to the least valuable state for nothing, within their part of that radius.

    Args:
        n_states, n_actions: sizes.
        lam: ridge, positive. It takes lam ||w||^2 of the radius beta, so it should shrink with the scale of beta: 0.01
            goes with `LOOP`'s default scale, 1 with scale 1. Too large, cells that were never tried look worthless.
        planner, n_starts: see `optimistic_plan`.

    Raises:
        TypeError, ValueError: an argument is out of range.

    >>> tables = TabularValue(2, 2)
    >>> _ = tables.plan(1.0, 1.0, np.random.default_rng(0))
    >>> round(tables.discrepancy(), 6)  # on the boundary of the confidence set
    1.0
    >>> tables.stale(1.0)
    False
    >>> tables.add(0, 1, 0.0, 1)  # promised much, paid nothing
    >>> tables.stale(1.0)
    True
    """

    def __init__(
        self,
        n_states: int,
        n_actions: int,
        *,
        lam: float = 0.01,
        planner: Planner = "alternate",
        n_starts: int = 8,
    ) -> None:
        check_count("n_states", n_states)
        check_count("n_actions", n_actions)
        check_positive("lam", lam)
        check_choice("planner", planner, ("alternate", "enumerate"))
        check_count("n_starts", n_starts)
        self.n_states, self.n_actions = n_states, n_actions
        self.lam, self.planner, self.n_starts = float(lam), planner, n_starts
        cells = n_states, n_actions
        self.visits, self.rewards = np.zeros(cells), np.zeros(cells)
        self.arrivals = np.zeros((*cells, n_states))
        self._w, self._targets, self._V = np.zeros(cells), np.zeros(cells), np.zeros(n_states)
        self._upsilon = 0.0

    def beta(self, horizon: int, span: float, delta: float, scale: float) -> float:
        """As for `HypothesisClass.beta`, by `squared_loss_beta` of S A."""
        return squared_loss_beta(float(self.n_states * self.n_actions), horizon, span, delta, scale)

    def _estimates(self) -> tuple[Float[ndarray, "S A S"], Float[ndarray, "S A"], Float[ndarray, "S A"]]:
        n = self.visits + self.lam
        return self.arrivals / n[:, :, None], self.rewards / n, 1 / n

    def plan(self, beta: float, span: float, rng: np.random.Generator) -> Plan:
        """The most optimistic table of the confidence set, which becomes current; see `optimistic_plan`."""
        P, r, metric = self._estimates()
        plan = optimistic_plan(
            P, r, metric, beta, span=span, ceiling=1.0, planner=self.planner, n_starts=self.n_starts, rng=rng
        )
        self._w, self._V = plan.w, plan.V
        self._targets = self.rewards + self.arrivals @ plan.V
        self._upsilon = self.recomputed_discrepancy()
        return plan

    def estimated_span(self) -> float:
        """Of the certainty-equivalent V, without a bound."""
        P, r, metric = self._estimates()
        return float(optimistic_plan(P, r, metric, 0.0, ceiling=1.0).V.max())

    def add(self, state: int, action: int, reward: float, following: int) -> None:
        """Take in one step, O(1); TypeError or ValueError for one that is none."""
        step = check_transition(self, state, action, reward, following)
        self._upsilon = learn_table(*step, *self._arrays(), self.lam, self._upsilon)

    def discrepancy(self) -> float:
        """Upsilon of the current table, kept up step by step."""
        return self._upsilon

    def recomputed_discrepancy(self) -> float:
        """Upsilon from the sums, without the increments."""
        n = self.visits + self.lam
        return float((n * (self._w - (self.rewards + self.arrivals @ self._V) / n) ** 2).sum())

    def stale(self, beta: float) -> bool:
        """Whether Upsilon has come to 4 beta."""
        return self._upsilon >= 4 * beta

    def advance(self, walk: Walk, plan: Plan, beta: float, trace: Trace, start: int) -> int:
        """As for `HypothesisClass.advance`, O(1) a step."""
        check_walk(walk, self, plan.policy)
        taken, walk.state, self._upsilon = follow_table(
            walk.world, plan.policy, walk.state, walk.rng, *self._arrays(), self.lam, self._upsilon, 4 * beta,
            *trace.part(start, trace.rewards.size),
        )  # fmt: skip
        return start + taken

    def _arrays(self) -> tuple[ndarray, ...]:
        return self.visits, self.arrivals, self.rewards, self._w, self._V, self._targets

    _NAMES = ("visits", "arrivals", "rewards", "w", "V", "targets")

    def state_dict(self) -> dict[str, Any]:
        """Counts, sums, the current table with its V, and Upsilon."""
        return {name: array.copy() for name, array in zip(self._NAMES, self._arrays())} | {"upsilon": self._upsilon}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its class had other sizes."""
        arrays, upsilon = checked_arrays(state, dict(zip(self._NAMES, self._arrays()))), float(state["upsilon"])
        self.visits, self.arrivals, self.rewards, self._w, self._V, self._targets = arrays.values()
        self._upsilon = upsilon
