"""Finite lists of hypotheses, searched exactly: value functions for LOOP, models for MLE-LOOP."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_finite, check_shape
from locally.control.average_reward.hypotheses import check_transition, squared_loss_beta
from locally.control.average_reward.kernels import follow_models, follow_values, learn_models, learn_values
from locally.control.average_reward.planning import Plan
from locally.control.average_reward.walks import Trace, Walk, check_walk
from locally.control.dynamic_programming import AverageRewardSolution, solve_average_reward
from locally.control.validity import check_index, check_kernel, check_unit_interval, checked_arrays


class FiniteValue:
    """Given pairs (Q_f, J_f); every squared loss is kept, O(m (k + 1)) a step for m hypotheses and k auxiliary ones.

    Args:
        Q: Q[f, s, a].
        J: gains in [0, 1].
        auxiliary: Q[g, s, a] of the functions that Bellman backups of the hypotheses may be; default Q itself, which
            is enough where the list is closed under backups. `of_models` knows the backups.

    Raises:
        ValueError: shapes disagree, an entry is not finite, a gain lies outside [0, 1].

    >>> Q = np.array([[[0.0, -0.2]], [[-0.2, 0.0]]])
    >>> two = FiniteValue(Q, np.array([0.3, 0.8]))
    >>> two.plan(1.0, 1.0, np.random.default_rng(0)).gain
    0.8
    """

    def __init__(
        self,
        Q: Float[ndarray, "m S A"],
        J: Float[ndarray, " m"],
        auxiliary: Float[ndarray, "k S A"] | None = None,
    ) -> None:
        check_shape("Q", Q, (None, None, None))
        check_finite("Q", Q)
        check_shape("J", J, (len(Q),))
        check_unit_interval("J", J)
        if auxiliary is not None:
            check_shape("auxiliary", auxiliary, (None, *Q.shape[1:]))
            check_finite("auxiliary", auxiliary)
        G = Q if auxiliary is None else auxiliary
        self._set(Q, J, G[None] + J[:, None, None, None])

    def _set(self, Q: ndarray, J: ndarray, others: ndarray) -> None:
        self.Q, self.J = Q, J
        _, self.n_states, self.n_actions = Q.shape
        self.V = np.ascontiguousarray(Q.max(axis=2))
        self._own = np.ascontiguousarray(Q + J[:, None, None])
        self._others = np.ascontiguousarray(others)
        self.own_loss, self.other_loss = np.zeros(len(Q)), np.zeros(others.shape[:2])
        self._current, self._upsilon = 0, 0.0

    @classmethod
    def of_models(cls, P: Sequence[Float[ndarray, "S A S"]], R: Sequence[Float[ndarray, "S A"]]) -> "FiniteValue":
        """The optimal values of the given models, with every model's backup of each as auxiliary functions.

        Realisable and complete if the truth is one of them.

        >>> from locally.control.environments import riverswim
        >>> models = [riverswim(up=up) for up in (0.2, 0.35)]
        >>> FiniteValue.of_models([m.P for m in models], [m.R for m in models]).J.round(3)
        array([0.273, 0.429])
        """
        solutions = _solutions(P, R)
        made = cls.__new__(cls)
        V = np.array([s.bias for s in solutions])
        backups = np.stack([r + np.moveaxis(p @ V.T, -1, 0) for p, r in zip(P, R)], axis=1)
        made._set(np.array([s.q for s in solutions]), np.array([s.gain for s in solutions]), backups)
        return made

    def beta(self, horizon: int, span: float, delta: float, scale: float) -> float:
        """As for `HypothesisClass.beta`, by `squared_loss_beta` of log m for m hypotheses."""
        return squared_loss_beta(float(np.log(len(self.J))), horizon, span, delta, scale)

    def excess(self) -> Float[ndarray, " m"]:
        """L(f, f) - inf over g of L(f, g); f itself counts as one of the g."""
        return self.own_loss - np.minimum(self.own_loss, self.other_loss.min(axis=1))

    def plan(self, beta: float, span: float, rng: np.random.Generator) -> Plan:
        """The hypothesis of largest gain among those that fit within beta, or that fit best; it becomes current."""
        excess = self.excess()
        fits = excess <= max(beta, excess.min())
        self._current = int(np.where(fits, self.J, -np.inf).argmax())
        self._upsilon = float(excess[self._current])
        f = self._current
        bonus = np.zeros(self.Q.shape[1:])
        return Plan(self.Q[f].argmax(axis=1), float(self.J[f]), self.V[f], self._own[f], bonus, True, False)

    def estimated_span(self) -> float:
        """The span of V of the hypothesis that fits best."""
        return float(np.ptp(self.V[self.excess().argmin()]))

    def add(self, state: int, action: int, reward: float, following: int) -> None:
        """Add one step to every squared loss, O(m (k + 1)); TypeError or ValueError for one that is none."""
        self._upsilon = learn_values(*check_transition(self, state, action, reward, following), *self._arrays())

    def discrepancy(self) -> float:
        """Upsilon: by how much the current hypothesis's squared loss exceeds its best auxiliary one."""
        return self._upsilon

    def stale(self, beta: float) -> bool:
        """Whether Upsilon has come to 4 beta."""
        return self._upsilon >= 4 * beta

    def advance(self, walk: Walk, plan: Plan, beta: float, trace: Trace, start: int) -> int:
        """As for `HypothesisClass.advance`, O(m (k + 1)) a step."""
        check_walk(walk, self, plan.policy)
        taken, walk.state, self._upsilon = follow_values(
            walk.world, plan.policy, walk.state, walk.rng, *self._arrays(), self._upsilon, 4 * beta,
            *trace.part(start, trace.rewards.size),
        )  # fmt: skip
        return start + taken

    def _arrays(self) -> tuple[Any, ...]:
        return self._own, self._others, self.V, self.own_loss, self.other_loss, self._current

    def state_dict(self) -> dict[str, Any]:
        """All squared losses, the current hypothesis, and the gains, which tell the list from another."""
        losses = {"own_loss": self.own_loss.copy(), "other_loss": self.other_loss.copy()}
        return losses | {"current": self._current, "upsilon": self._upsilon, "gains": self.J.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its list had other sizes or gains."""
        losses = checked_arrays(state, {"own_loss": self.own_loss, "other_loss": self.other_loss})
        _check_gains(state, self.J)
        current, upsilon = check_index("current", state["current"], len(self.J)), float(state["upsilon"])
        self.own_loss, self.other_loss = losses.values()
        self._current, self._upsilon = current, upsilon


class FiniteModels:
    """Given models (P_f, R_f), judged by the likelihood of next states and of rewards in {0, 1}; for `MLELOOP`.

    Args:
        P: kernels of the models, at least one.
        R: their mean rewards in [0, 1]. Rewards between 0 and 1 enter as the expected likelihood of a coin.

    A step costs O(m) for m models; a plan O(m S A).

    Raises:
        ValueError: a model is no kernel, has rewards outside [0, 1], or its optimal gain depends on the start.

    >>> from locally.control.environments import riverswim
    >>> mdp = riverswim()
    >>> FiniteModels([mdp.P], [mdp.R]).J.round(6)
    array([0.428622])
    """

    def __init__(self, P: Sequence[Float[ndarray, "S A S"]], R: Sequence[Float[ndarray, "S A"]]) -> None:
        self.solutions = _solutions(P, R)
        self.P, self.R = np.array(P), np.array(R)
        _, self.n_states, self.n_actions = self.R.shape
        self.J = np.array([s.gain for s in self.solutions])
        with np.errstate(divide="ignore"):
            self._log_P, self._log_R, self._log_not_R = np.log(self.P), np.log(self.R), np.log1p(-self.R)
        self.likelihoods = np.zeros(len(self.J))
        self.visits = np.zeros(self.R.shape[1:])
        self._n_seen = 0
        self._take(0)

    def _take(self, f: int) -> None:
        """Make f current: its total-variation distances from all models, and their sums over the steps so far."""
        self._current = f
        heads = np.abs(self.P[f] * self.R[f][..., None] - self.P * self.R[..., None]).sum(axis=-1)
        tails = np.abs(self.P[f] * (1 - self.R[f][..., None]) - self.P * (1 - self.R[..., None])).sum(axis=-1)
        self._distances = (heads + tails) / 2
        self._sums = (self._distances * self.visits).sum(axis=(1, 2))
        self._distance = float(self._sums[self.likelihoods.argmax()])

    def likeliest(self) -> int:
        """Index of the maximum-likelihood model."""
        return int(self.likelihoods.argmax())

    def beta(self, horizon: int, span: float, delta: float, scale: float) -> float:
        """scale * log(m horizon / delta) for m models: a gap of log-likelihoods; the span plays no part."""
        return scale * float(np.log(len(self.J) * horizon / delta))

    def plan(self, beta: float, span: float, rng: np.random.Generator) -> Plan:
        """The model of largest gain whose log-likelihood is at most beta below the best; it becomes current.

        Raises:
            ValueError: no model allows what was observed.
        """
        best = self.likelihoods.max()
        if best == -np.inf:
            raise ValueError("models must include one that allows what was observed, but none does")
        self._take(int(np.where(best - self.likelihoods <= beta, self.J, -np.inf).argmax()))
        s = self.solutions[self._current]
        return Plan(s.policy, s.gain, s.bias, s.q + s.gain, np.zeros_like(s.q), True, False)

    def estimated_span(self) -> float:
        """The span of V* in the likeliest model."""
        return self.solutions[self.likeliest()].span

    def add(self, state: int, action: int, reward: float, following: int) -> None:
        """Add one step to log-likelihoods and distances of models, O(m); TypeError or ValueError for no step."""
        self._distance = learn_models(*check_transition(self, state, action, reward, following), *self._arrays())
        self._n_seen += 1

    def discrepancy(self) -> float:
        """Sum over all steps of the total-variation distance between the current and the likeliest model."""
        return self._distance

    def stale(self, beta: float) -> bool:
        """Whether the distance from the likeliest model has come to 3 sqrt(beta times the steps seen)."""
        return self._distance >= 3 * math.sqrt(beta * self._n_seen)

    def advance(self, walk: Walk, plan: Plan, beta: float, trace: Trace, start: int) -> int:
        """As for `HypothesisClass.advance`, O(m) a step."""
        check_walk(walk, self, plan.policy)
        taken, walk.state, self._distance = follow_models(
            walk.world, plan.policy, walk.state, walk.rng, *self._arrays(), self._distance, beta, self._n_seen,
            *trace.part(start, trace.rewards.size),
        )  # fmt: skip
        self._n_seen += taken
        return start + taken

    def _arrays(self) -> tuple[ndarray, ...]:
        learnt = self.likelihoods, self.visits, self._distances, self._sums
        return self._log_P, self._log_R, self._log_not_R, *learnt

    def state_dict(self) -> dict[str, Any]:
        """Log-likelihoods, visits, sums of distances, the current model, and the gains, which tell the list."""
        return {
            "gains": self.J.copy(),
            "likelihoods": self.likelihoods.copy(),
            "visits": self.visits.copy(),
            "sums": self._sums.copy(),
            "current": self._current,
            "distance": self._distance,
            "n_seen": self._n_seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its list had other sizes or gains."""
        here = {"likelihoods": self.likelihoods, "visits": self.visits, "sums": self._sums}
        arrays = checked_arrays(state, here)
        _check_gains(state, self.J)
        current = check_index("current", state["current"], len(self.J))
        distance, n_seen = float(state["distance"]), int(state["n_seen"])
        self.likelihoods, self.visits = arrays["likelihoods"], arrays["visits"]
        self._take(current)
        self._sums, self._distance, self._n_seen = arrays["sums"], distance, n_seen


def _check_gains(state: dict[str, Any], J: Float[ndarray, " m"]) -> None:
    gains = checked_arrays(state, {"gains": J})["gains"]
    if not np.allclose(gains, J, rtol=1e-6, atol=1e-9):
        f = int(np.abs(gains - J).argmax())
        raise ValueError(f"state must be of the same list: its hypothesis {f} has gain {gains[f]:.6g}, not {J[f]:.6g}")


def _solutions(P: Sequence[ndarray], R: Sequence[ndarray]) -> list[AverageRewardSolution]:
    if len(P) == 0 or len(P) != len(R):
        raise ValueError(f"P and R must hold one array a model, at least one, got {len(P)} and {len(R)}")
    solutions = []
    for f, (p, r) in enumerate(zip(P, R)):
        check_kernel(f"P[{f}]", p)
        check_unit_interval(f"R[{f}]", r)
        solution = solve_average_reward(p, r)
        if not solution.success:
            raise ValueError(f"P[{f}] must be weakly communicating, got a model without one gain: {solution.status}")
        solutions.append(solution)
    return solutions
