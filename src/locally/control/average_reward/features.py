"""Classes that are linear in features: values, values under a kernel, mixtures of known transition kernels.

Upsilon is the squared distance of the current parameter from the ridge regression in the data's metric, kept up to date
in O(d^2) a step.
"""

import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import nnls

from locally.checks import check_choice, check_count, check_finite, check_positive, check_shape, check_symmetric
from locally.control.average_reward.hypotheses import check_transition, squared_loss_beta
from locally.control.average_reward.kernels import follow_linear, learn_linear
from locally.control.average_reward.planning import Plan, Planner, optimistic_plan
from locally.control.average_reward.walks import Trace, Walk, check_walk
from locally.control.validity import (
    TOLERANCE,
    check_kernel,
    check_unit_ball,
    check_unit_interval,
    checked_arrays,
)

Trigger = Literal["discrepancy", "determinant"]
ASCENTS = 20  # of a mixture's plan
DOUBLINGS, BISECTIONS = 8, 30  # of the multiplier that puts theta on the boundary
SUM_WEIGHT = 1e4  # of sum(theta) = 1 beside the data


class _Regression:
    """Ridge regression of targets y_i on x_i, watched against a fixed parameter w.

    Sums: gram = lam I + sum x x', arrivals[:, s'] = sum of the x that led to s', sums = sum x r, targets = sum x y with
    the V that was current at each step, gradient = gram w - (sum x y with the V that is current now, or as stored).
    """

    def __init__(self, n_states: int, n_actions: int, dim: int, lam: float, trigger: Trigger) -> None:
        check_positive("lam", lam)
        check_choice("trigger", trigger, ("discrepancy", "determinant"))
        self.n_states, self.n_actions, self.dim = n_states, n_actions, dim
        self.lam, self.trigger = float(lam), trigger
        self.gram: ndarray = lam * np.eye(dim)
        self.inverse: ndarray = np.eye(dim) / lam
        self.arrivals = np.zeros((dim, n_states))
        self.sums, self.targets, self._gradient, self._w = (np.zeros(dim) for _ in range(4))
        self._V = np.zeros(n_states)
        self._upsilon = self._growth = 0.0
        self._pay = 1.0  # whether the reward is part of the target

    def beta(self, horizon: int, span: float, delta: float, scale: float) -> float:
        """As for `HypothesisClass.beta`, by `squared_loss_beta` of the complexity."""
        return squared_loss_beta(self.complexity(horizon), horizon, span, delta, scale)

    def complexity(self, horizon: int) -> float:
        """The dimension d, which stands for the size of the class in beta."""
        return float(self.dim)

    def _rows(self) -> Float[ndarray, "S A d"]:
        """x for each (s, a), as the current hypothesis sees them."""
        raise TypeError("of the classes that follow")

    def _watch(self, w: Float[ndarray, " d"], V: Float[ndarray, " S"], gradient: Float[ndarray, " d"]) -> None:
        self._w, self._V, self._gradient = w, V, gradient
        self._upsilon = float(gradient @ self.inverse @ gradient)
        self._growth = 0.0

    def _refresh(self) -> None:
        """Rank-one updates lose a digit now and then; a plan starts from a fresh inverse."""
        self.inverse = np.linalg.inv(self.gram)

    def add(self, state: int, action: int, reward: float, following: int) -> None:
        """Take in one step, O(d^2), by rank-one updates; TypeError or ValueError for one that is none."""
        s, a, r, s_next = check_transition(self, state, action, reward, following)
        self._upsilon, more = learn_linear(self._rows()[s, a], self._pay * r, s_next, self._V, *self._arrays())
        self._growth += more

    def discrepancy(self) -> float:
        """Upsilon: squared distance of the current parameter from the regression's, in the metric of the data."""
        return self._upsilon

    def stale(self, beta: float) -> bool:
        """Whether Upsilon has come to 4 beta, or det(gram) has doubled since the plan, as `trigger` says."""
        limit, growth_limit = self._limits(beta)
        return self._upsilon >= limit or self._growth >= growth_limit

    def _limits(self, beta: float) -> tuple[float, float]:
        """Of Upsilon and of the growth of log det gram: one of them is in force."""
        return (4 * beta, math.inf) if self.trigger == "discrepancy" else (math.inf, math.log(2))

    def advance(self, walk: Walk, plan: Plan, beta: float, trace: Trace, start: int) -> int:
        """As for `HypothesisClass.advance`, O(d^2) a step."""
        check_walk(walk, self, plan.policy)
        taken, walk.state, self._upsilon, self._growth = follow_linear(
            walk.world, plan.policy, walk.state, walk.rng, self._rows(), self._pay, self._V, *self._arrays(),
            self._upsilon, self._growth, *self._limits(beta), *trace.part(start, trace.rewards.size),
        )  # fmt: skip
        return start + taken

    def _arrays(self) -> tuple[ndarray, ...]:
        return self._w, self.gram, self.inverse, self.arrivals, self.sums, self.targets, self._gradient

    _NAMES = ("w", "gram", "inverse", "arrivals", "sums", "targets", "gradient")

    def state_dict(self) -> dict[str, Any]:
        """Sums, Gram matrix and its inverse, the current parameter and its V."""
        arrays = {name: array.copy() for name, array in zip(self._NAMES, self._arrays())}
        return arrays | {"V": self._V.copy(), "upsilon": self._upsilon, "growth": self._growth}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its class had other sizes."""
        arrays = checked_arrays(state, dict(zip(self._NAMES, self._arrays())) | {"V": self._V})
        upsilon, growth = float(state["upsilon"]), float(state["growth"])
        *sums, self._V = arrays.values()
        self._w, self.gram, self.inverse, self.arrivals, self.sums, self.targets, self._gradient = sums
        self._upsilon, self._growth = upsilon, growth


class LinearValue(_Regression):
    """Q + J = phi . w. Complete where P and r are linear in phi.

    Args:
        features: phi(s, a), Euclidean norm at most 1.
        lam: ridge, positive; see `TabularValue`.
        planner, n_starts: see `optimistic_plan`. The regression's kernel may have negative entries; where its equation
            does not converge, the plan says so.
        trigger: "discrepancy" is LOOP's. "determinant" makes a new plan when det(gram) has doubled, which with the same
            confidence set is FOPO of Wei et al. (AISTATS 2021).

    Raises:
        TypeError, ValueError: a feature is too long or not finite, an option is out of range.

    >>> from locally.control.environments import one_hot_features
    >>> LinearValue(one_hot_features(2, 3)).dim
    6
    """

    def __init__(
        self,
        features: Float[ndarray, "S A d"],
        *,
        lam: float = 0.01,
        planner: Planner = "alternate",
        n_starts: int = 8,
        trigger: Trigger = "discrepancy",
    ) -> None:
        check_shape("features", features, (None, None, None))
        check_unit_ball("features", features)
        check_choice("planner", planner, ("alternate", "enumerate"))
        check_count("n_starts", n_starts)
        S, A, d = features.shape
        super().__init__(S, A, d, lam, trigger)
        self.features = np.ascontiguousarray(features, np.float64)
        self.planner, self.n_starts = planner, n_starts

    def _rows(self) -> Float[ndarray, "S A d"]:
        return self.features

    def _estimates(self) -> tuple[Float[ndarray, "S A S"], Float[ndarray, "S A"], Float[ndarray, "n n"]]:
        projected = self.features @ self.inverse
        flat = projected.reshape(-1, self.dim)
        return projected @ self.arrivals, projected @ self.sums, flat @ self.features.reshape(-1, self.dim).T

    def plan(self, beta: float, span: float, rng: np.random.Generator) -> Plan:
        """The most optimistic w of the confidence set, which becomes current; see `optimistic_plan`."""
        self._refresh()
        P, r, metric = self._estimates()
        plan = optimistic_plan(
            P, r, metric, beta, span=span, ceiling=1.0, planner=self.planner, n_starts=self.n_starts, rng=rng
        )
        # the parameter behind w = phi . theta: the regression's, plus the one behind the bonus
        targets = self.sums + self.arrivals @ plan.V
        phi = self.features.reshape(-1, self.dim)
        theta = self.inverse @ targets + np.linalg.lstsq(phi, plan.bonus.ravel())[0]
        self._watch(theta, plan.V, self.gram @ theta - targets)
        return plan

    def estimated_span(self) -> float:
        """The span of V for the regression without a bonus and without a bound."""
        self._refresh()
        P, r, metric = self._estimates()
        return float(optimistic_plan(P, r, metric, 0.0, ceiling=1.0).V.max())

    def recomputed_discrepancy(self) -> float:
        """Upsilon from the sums, without the increments."""
        gradient = self.gram @ self._w - self.sums - self.arrivals @ self._V
        return float(gradient @ np.linalg.solve(self.gram, gradient))


class KernelValue(LinearValue):
    """Q + J in the reproducing space of a kernel on state-action pairs, through its eigenvectors.

    Args:
        kernel: k((s, a), (s', a')), positive semi-definite with diagonal at most 1, (s, a) numbered s A + a.
        n_states: number of states.
        rtol: eigenvalues below rtol times the largest are left out.
        lam, planner, n_starts, trigger: as for `LinearValue`.

    The radius of the confidence set goes by the effective dimension sum_i m_i / (m_i + lam), m_i the eigenvalues of
    the kernel matrix after `horizon` steps spread evenly over the pairs.

    Raises:
        TypeError, ValueError: the kernel is not symmetric, not positive or too large.

    >>> x = np.linspace(0, 1, 8)
    >>> smooth = KernelValue(np.exp(-((x[:, None] - x) ** 2) / 0.5), n_states=4)
    >>> smooth.complexity(1000) < 6
    True
    """

    def __init__(
        self,
        kernel: Float[ndarray, "n n"],
        n_states: int,
        *,
        rtol: float = 1e-8,
        lam: float = 0.01,
        planner: Planner = "alternate",
        n_starts: int = 8,
        trigger: Trigger = "discrepancy",
    ) -> None:
        check_count("n_states", n_states)
        check_finite("kernel", kernel)
        check_symmetric("kernel", kernel)
        check_positive("rtol", rtol, below=1)
        if len(kernel) % n_states:
            raise ValueError(f"kernel must have n_states * n_actions rows, got {len(kernel)} for {n_states} states")
        values, vectors = np.linalg.eigh(kernel)
        if values[0] < -TOLERANCE * max(values[-1], 1):
            raise ValueError(f"kernel must be positive semi-definite, got the eigenvalue {values[0]:.3g}")
        kept = values > rtol * values[-1]
        phi = vectors[:, kept] * np.sqrt(values[kept])
        features = phi.reshape(n_states, len(kernel) // n_states, -1)
        self._eigenvalues = values[kept]
        super().__init__(features, lam=lam, planner=planner, n_starts=n_starts, trigger=trigger)

    def complexity(self, horizon: int) -> float:
        """The effective dimension after `horizon` steps that are spread evenly over the pairs."""
        spread = self._eigenvalues * horizon / (self.n_states * self.n_actions)
        return float((spread / (spread + self.lam)).sum())


class LinearMixture(_Regression):
    """P_theta = sum_i theta_i P_i with known P_i: value-targeted regression, one parameter for model and value.

    Each step regresses V_f(s') on x_f(s, a) = sum_s' mixture(s, a, s') V_f(s') with the V_f that was current then, and
    the targets stay: Upsilon = ||theta_f - theta^||^2 in the metric of the data. V_f is centred at the middle of its
    range. Plans climb from theta to the optimal policy of P_theta and back to the theta of the ellipsoid that serves
    this policy's occupancy and V best; the gain never falls. One of the starts is extended value iteration, in which
    every (s, a) has a theta of its own.

    Args:
        mixture: mixture[s, a, s', i] = P_i(s' | s, a).
        rewards: mean rewards, if they are known.
        reward_features: psi with r = psi . theta, if they share the parameter; exactly one of the two.
        simplex: theta is a probability vector, so that every P_theta is a kernel. False for base functions that are
            signed measures; then P_theta may have negative entries.
        lam, n_starts, trigger: as for `LinearValue`.

    Raises:
        TypeError, ValueError: with `simplex`, a mixture[..., i] is no kernel; rewards outside [0, 1] or given twice.

    >>> from locally.control.environments import random_linear_mixture
    >>> mdp = random_linear_mixture(rng=0)
    >>> LinearMixture(mdp.mixture, rewards=mdp.R).dim
    4
    """

    def __init__(
        self,
        mixture: Float[ndarray, "S A S d"],
        *,
        rewards: Float[ndarray, "S A"] | None = None,
        reward_features: Float[ndarray, "S A d"] | None = None,
        simplex: bool = True,
        lam: float = 0.01,
        n_starts: int = 4,
        trigger: Trigger = "discrepancy",
    ) -> None:
        check_shape("mixture", mixture, (None, None, None, None))
        check_finite("mixture", mixture)
        if simplex:
            check_kernel("mixture[..., i]", np.moveaxis(mixture, -1, 0))
        if (rewards is None) == (reward_features is None):
            raise ValueError("give exactly one of rewards and reward_features")
        if rewards is not None:
            check_unit_interval("rewards", rewards)
        if reward_features is not None:
            check_unit_ball("reward_features", reward_features)
        check_count("n_starts", n_starts)
        S, A, _, d = mixture.shape
        super().__init__(S, A, d, lam, trigger)
        self.mixture, self.simplex, self.n_starts = mixture, simplex, n_starts
        self._psi = np.zeros((S, A, d)) if reward_features is None else np.asarray(reward_features, np.float64)
        self._known = np.zeros((S, A)) if rewards is None else np.asarray(rewards, np.float64)
        self._pay = 0.0 if reward_features is None else 1.0
        self._x = self._psi.copy()

    def _rows(self) -> Float[ndarray, "S A d"]:
        return self._x

    def plan(self, beta: float, span: float, rng: np.random.Generator) -> Plan:
        """The best of the climbs from all starts, which becomes current; `Plan.converged` says whether it ended."""
        self._refresh()
        centre = self.inverse @ self.targets
        best: tuple[Plan, Float[ndarray, " d"]] | None = None
        for start in self._starts(beta, span, centre, rng):
            found = self._climb(start, beta, span, centre)
            if best is None or (found[0].converged, found[0].gain) > (best[0].converged, best[0].gain):
                best = found
        assert best is not None
        plan, theta = best
        V = plan.V - plan.V.max() / 2
        self._x = np.ascontiguousarray(self._psi + np.einsum("satd,t->sad", self.mixture, V))
        self._watch(theta, V, self.gram @ theta - self.targets)
        return plan

    def _climb(
        self, theta: Float[ndarray, " d"], beta: float, span: float, centre: Float[ndarray, " d"]
    ) -> tuple[Plan, Float[ndarray, " d"]]:
        plan = self._optimal(theta, span)
        for _ in range(ASCENTS):
            direction = self._direction(plan, theta)
            candidate = self._farthest(direction, beta, centre)
            following = self._optimal(candidate, span)
            if not following.gain > plan.gain + 1e-9:
                break
            theta, plan = candidate, following
        return plan, theta

    def _optimal(self, theta: Float[ndarray, " d"], span: float) -> Plan:
        """Of the one model P_theta: a plan over an ellipsoid of radius 0."""
        P = self.mixture @ theta
        P = np.maximum(P, 0) if self.simplex else P
        r = self._known + self._psi @ theta
        return optimistic_plan(P, r, np.ones_like(r), 0.0, span=span, ceiling=1.0)

    def _direction(self, plan: Plan, theta: Float[ndarray, " d"]) -> Float[ndarray, " d"]:
        """d gain / d theta = sum of mu(s, a) (psi + sum_s' mixture V), mu the long-run share of time at (s, a)."""
        each = np.arange(self.n_states)
        chain = np.maximum(self.mixture @ theta, 0)[each, plan.policy]
        S = self.n_states
        M = np.eye(S) - chain / chain.sum(axis=1, keepdims=True) + 1
        mu = np.linalg.lstsq(M.T, np.ones(S))[0]
        x = self._psi + np.einsum("satd,t->sad", self.mixture, plan.V)
        return mu @ x[each, plan.policy]

    def _farthest(
        self, direction: Float[ndarray, " d"], beta: float, centre: Float[ndarray, " d"]
    ) -> Float[ndarray, " d"]:
        """Maximise direction . theta over the ellipsoid around `centre` and, where asked, the simplex."""
        step = self.inverse @ direction
        length = np.sqrt(max(direction @ step, 0.0))
        theta = centre + np.sqrt(beta) / length * step if length > 0 else centre.copy()
        if not self.simplex or (theta.min() >= 0 and abs(theta.sum() - 1) <= TOLERANCE):
            return theta
        # theta(nu) minimises ||theta - centre||^2 / 2 - nu direction . theta over the simplex in the data's metric: its
        # distance grows with nu, from the nearest model to the vertex that is farthest along the direction
        nearest = self._on_simplex(centre)
        if length == 0 or self._distance(nearest, centre) >= beta:
            return nearest  # no model fits as well as the ellipsoid asks, and this one fits best
        low, high = 0.0, np.sqrt(beta)
        for _ in range(DOUBLINGS):
            if self._distance(self._on_simplex(centre + high / length * step), centre) >= beta:
                break
            low, high = high, 4 * high
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            inside = self._distance(self._on_simplex(centre + middle / length * step), centre) < beta
            low, high = (middle, high) if inside else (low, middle)
        return self._on_simplex(centre + low / length * step)

    def _distance(self, theta: Float[ndarray, " d"], centre: Float[ndarray, " d"]) -> float:
        return float((theta - centre) @ self.gram @ (theta - centre))

    def _on_simplex(self, target: Float[ndarray, " d"]) -> Float[ndarray, " d"]:
        """The probability vector nearest to target in the data's metric."""
        along = self.inverse.sum(axis=1)
        flat = target + along * (1 - target.sum()) / along.sum()  # first onto sum = 1, then to the orthant within it
        if flat.min() >= 0:
            return flat
        root = np.linalg.cholesky(self.gram).T
        weight = SUM_WEIGHT * np.sqrt(np.trace(self.gram))
        theta, _ = nnls(np.vstack([root, np.full(self.dim, weight)]), np.append(root @ flat, weight))
        return theta / theta.sum() if theta.sum() > 0 else np.eye(self.dim)[flat.argmax()]

    def _starts(
        self, beta: float, span: float, centre: Float[ndarray, " d"], rng: np.random.Generator
    ) -> list[Float[ndarray, " d"]]:
        extended = self._farthest(self._extended_direction(beta, span, centre), beta, centre)
        random = rng.standard_normal((self.n_starts - 1, self.dim))
        return [extended, *(self._farthest(g, beta, centre) for g in random)]

    def _extended_direction(self, beta: float, span: float, centre: Float[ndarray, " d"]) -> Float[ndarray, " d"]:
        """Extended value iteration with max over theta of theta . x = centre . x + sqrt(beta) ||x|| for each (s, a)."""
        V = np.zeros(self.n_states)
        for _ in range(200):
            x = self._psi + np.einsum("satd,t->sad", self.mixture, V)
            width = np.sqrt(np.maximum(np.einsum("sad,de,sae->sa", x, self.inverse, x), 0))
            w = np.minimum(self._known + x @ centre + np.sqrt(beta) * width, 1 + V.max())
            top = w.max(axis=1)
            change = np.minimum(top, top.min() + span) - V
            V = V + 0.5 * change
            V -= V.min()
            if np.ptp(change) < 1e-4:
                break
        a = w.argmax(axis=1)
        return x[np.arange(self.n_states), a].mean(axis=0)

    def estimated_span(self) -> float:
        """The span of V* for the theta of the regression, without a bound on it."""
        self._refresh()
        centre = self.inverse @ self.targets
        return float(self._optimal(self._farthest(np.zeros(self.dim), 0.0, centre), np.inf).V.max())

    def recomputed_discrepancy(self) -> float:
        """Upsilon from the sums, without the increments."""
        gradient = self.gram @ self._w - self.targets
        return float(gradient @ np.linalg.solve(self.gram, gradient))

    def state_dict(self) -> dict[str, Any]:
        """As for the other regressions, and the x_f(s, a) of the current hypothesis."""
        return super().state_dict() | {"x": self._x.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its class had other sizes."""
        x = checked_arrays(state, {"x": self._x})["x"]
        super().load_state_dict(state)
        self._x = x
