"""Algorithm 3 where states are too many to list: features by a function, no simulator.

Source: Dai, Luo, Wei and Zimmert (ICML 2023, arXiv 2301.12942).
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from locally.checks import check_shape
from locally.control.adversarial import kernels
from locally.control.adversarial.epochs import epoch_coefficients, epoch_inverses, epoch_weights
from locally.control.adversarial.learner import sample_actions
from locally.control.adversarial.parameters import EpochParameters
from locally.control.adversarial.query import FeatureMap
from locally.control.validity import check_generator_state, check_index, check_unit_ball, checked_arrays


class QueryLinearMDPOptimizer:
    """`LinearMDPOptimizer` for state spaces that are only ever seen along episodes, as a Gymnasium agent.

    The policy at a state is worked out anew from the estimates of all past epochs whenever the state is met: nothing is
    kept for single states, and no transition is ever asked for. Observations are pairs (h, x).

    Args:
        features: features(h, x) -> (A, d), in the unit ball, of a linear process.
        n_actions, dim, horizon, n_episodes: A, d, H, K.
        epoch, cover_episodes, explore, known_up_to, eta_scale, beta_scale, gamma, ridge: as for `LinearMDPOptimizer`.
        rng: draws actions, episodes of exploration, layers, components of the cover, halves.

    Attributes:
        parameters: what the arguments come to.
        episode: episodes seen.

    Raises:
        TypeError, ValueError: an argument is out of range, or (when a state is met) `features` returns the wrong shape
            or vectors outside the unit ball. Whether they span R^d cannot be known beforehand.

    Complexity: O(j A d^2) a step in epoch j; O(k H A d^2) for the plan of episode k of the cover. Memory O(H d^2) for
    each epoch and each episode of the cover.

    >>> agent = QueryLinearMDPOptimizer(lambda h, x: np.eye(2), n_actions=2, dim=2, horizon=1, n_episodes=100, rng=0)
    >>> agent.act((0, 0.3)) in (0, 1)
    True
    """

    def __init__(
        self,
        features: FeatureMap,
        *,
        n_actions: int,
        dim: int,
        horizon: int,
        n_episodes: int,
        epoch: int | None = None,
        cover_episodes: int | None = None,
        explore: float | None = None,
        known_up_to: float | None = None,
        eta_scale: float = 1.0,
        beta_scale: float = 1.0,
        gamma: float | None = None,
        ridge: float = 1.0,
        rng: np.random.Generator | int,
    ) -> None:
        self.parameters = EpochParameters.of(
            n_actions=n_actions,
            dim=dim,
            horizon=horizon,
            n_episodes=n_episodes,
            epoch=epoch,
            cover_episodes=cover_episodes,
            explore=explore,
            known_up_to=known_up_to,
            eta_scale=eta_scale,
            beta_scale=beta_scale,
            gamma=gamma,
            ridge=ridge,
        )
        self.features, self.n_actions, self.dim, self.horizon = features, n_actions, dim, horizon
        self.n_episodes, self.episode = n_episodes, 0
        self.rng = np.random.default_rng(rng)
        K0, W, H, A, d = self.parameters.cover_episodes, self.parameters.epoch, horizon, n_actions, dim
        epochs = (n_episodes - K0) // W
        # phase 0: every plan of the cover, and what it saw
        self._plans = np.zeros((K0, H, d))
        self._plan_inverses = np.broadcast_to(np.eye(d) / self.parameters.ridge, (K0, H, d, d)).copy()
        self._cover_phi = np.zeros((K0, H, A, d))
        self._cover_actions = np.zeros((K0, H), np.int64)
        self._cover_inverse = np.zeros((H, d, d))
        # phase 1: the estimates of every epoch, and the episodes of the current one
        self._inverses = np.zeros((H, epochs, d, d))
        self._coefficients = np.zeros((H, epochs, d))
        self._phi = np.zeros((W, H, A, d))
        self._policies = np.zeros((W, H, A))
        self._known = np.zeros((W, H), bool)
        self._actions = np.zeros((W, H), np.int64)
        self._losses = np.zeros((W, H))
        self._weights = np.zeros((W, H))
        self._turn, self._component = 0, 0  # layers below the turn are played by this component of the cover
        self._layer = 0

    @property
    def _filled(self) -> int:
        return (self.episode - self.parameters.cover_episodes) % self.parameters.epoch

    @property
    def _past_epochs(self) -> int:
        return max(0, self.episode - self.parameters.cover_episodes) // self.parameters.epoch

    def action_probabilities(self, h: int, state: Any) -> Float[ndarray, " A"]:
        """What is played at a state of layer h in the current episode.

        Raises:
            ValueError: h is no layer, or the features of the state are unfit.
        """
        phi = self._checked_features(check_index("h", h, self.horizon), state)
        if self.episode < self.parameters.cover_episodes:
            return np.eye(self.n_actions)[self._explorer(phi, h, self.episode)]
        if h < self._turn:
            return np.eye(self.n_actions)[self._explorer(phi, h, self._component)]
        return self._epoch_policy(phi, h)[0]

    # The agent's protocol ---------------------------------------------------------------------------------------------

    def act(self, observation: tuple[int, Any]) -> int:
        """An action drawn at (h, x), worked out anew from the estimates of all past epochs."""
        h, state = observation
        return sample_actions(self.action_probabilities(h, state), self.rng)

    def observe(
        self,
        observation: tuple[int, Any],
        action: Any,
        reward: float,
        next_observation: Any,
        *,
        terminated: bool = False,
        truncated: bool = False,
    ) -> None:
        """Keep the step; the last one of an epoch, or of the cover's episode, makes the agent learn.

        Raises:
            TypeError, ValueError: the action does not exist, the layer is not the next one, the reward is outside
                [-1, 0], the episode does not end with layer horizon - 1, or `n_episodes` were played already.
        """
        h, state = observation
        action = check_index("action", action, self.n_actions)
        if self.episode == self.n_episodes:
            raise ValueError(f"episodes must be at most n_episodes = {self.n_episodes}, on which the parameters depend")
        if h != self._layer:
            raise ValueError(f"observation must be of layer {self._layer}, which comes next, got layer {h}")
        if not -1 <= reward <= 0:
            raise ValueError(f"reward must be minus a loss in [0, 1], got {reward!r}")
        if (terminated or truncated) != (h == self.horizon - 1):
            raise ValueError(f"episodes must have exactly {self.horizon} steps, got an end after layer {h}")
        phi = self._checked_features(h, state)
        if self.episode < self.parameters.cover_episodes:
            self._cover_phi[self.episode, h], self._cover_actions[self.episode, h] = phi, action
        else:
            i = self._filled
            self._phi[i, h], self._actions[i, h], self._losses[i, h] = phi, action, -reward
            self._policies[i, h], self._known[i, h] = self._epoch_policy(phi, h)
        self._layer = (h + 1) % self.horizon
        if self._layer == 0:
            self._end_episode()

    def _end_episode(self) -> None:
        cover = self.parameters.cover_episodes
        if self.episode < cover:
            self._plan_cover(self.episode + 1)
        elif self._filled == self.parameters.epoch - 1:
            self._end_epoch()
        self.episode += 1
        if self.episode >= cover:
            exploring = self.rng.random(1) < self.parameters.explore
            turn = self.rng.integers(self.horizon, size=1)
            self._component = int(self.rng.integers(cover, size=1)[0])
            self._turn = int(turn[0]) if exploring[0] else 0
            self._weights[self._filled] = epoch_weights(exploring, turn, self.horizon)[0]

    # Phase 0 ----------------------------------------------------------------------------------------------------------

    def _plan_cover(self, seen: int) -> None:
        """Optimistic value iteration on `seen` episodes, without losses; at the last, the covariance of the cover."""
        phi = self._cover_phi[np.arange(seen)[:, None], np.arange(self.horizon), self._cover_actions[:seen]]
        moments = np.ascontiguousarray(np.einsum("nhi,nhj->hij", phi, phi))
        ridge = np.full(self.horizon, self.parameters.ridge)
        if seen == len(self._plans):
            self._cover_inverse = kernels.inverses(moments / seen, ridge / seen)
            return
        inverse = self._plan_inverses[seen] = kernels.inverses(moments, ridge)
        for h in reversed(range(self.horizon - 1)):
            following = self._optimism(self._cover_phi[:seen, h + 1], h + 1, seen).max(axis=-1)
            self._plans[seen, h] = inverse[h] @ (phi[:, h].T @ following)

    def _optimism(self, phi: Float[ndarray, "*n A d"], h: int, plan: int) -> Float[ndarray, "*n A"]:
        norms = np.einsum("...i,ij,...j->...", phi, self._plan_inverses[plan, h], phi)
        return np.minimum(self.horizon, phi @ self._plans[plan, h] + np.sqrt(np.maximum(norms, 0)))

    def _explorer(self, phi: Float[ndarray, "A d"], h: int, plan: int) -> int:
        return int(self._optimism(phi, h, plan).argmax())

    # Phase 1 ----------------------------------------------------------------------------------------------------------

    def _epoch_policy(self, phi: Float[ndarray, "A d"], h: int) -> tuple[Float[ndarray, " A"], bool]:
        """pi_j at a state of these features, by the whole recursion over past epochs; and whether it is known."""
        uniform = np.full(self.n_actions, 1 / self.n_actions)
        norms = np.einsum("ai,ij,aj->a", phi, self._cover_inverse[h], phi)
        if norms.max() > self.parameters.known_up_to:
            return uniform, False
        j = self._past_epochs
        cumulative = np.zeros(self.n_actions)
        kernels.follow(
            phi,
            self._inverses[h, :j],
            self._coefficients[h, :j],
            np.ones(j),
            np.zeros((j, 0, self.dim)),
            np.zeros((j, self.n_actions)),
            cumulative,
            self.parameters.eta,
            self.parameters.beta,
            float(self.horizon),
            True,
        )
        return kernels.log_barrier_weights(self.parameters.eta * cumulative[None])[0], True

    def _end_epoch(self) -> None:
        W, H = self.parameters.epoch, self.horizon
        order = self.rng.permuted(np.arange(W)[None], axis=1)
        first, second = np.split(order, [W // 2], axis=1)
        taken = np.arange(W)[:, None], np.arange(H), self._actions
        phi, weights = self._phi[taken][None], self._weights[None]
        inverse = epoch_inverses(weights, phi, first, self.parameters.gamma)
        bonuses = self._bonuses(inverse[0])[taken]
        j = self._past_epochs
        self._coefficients[:, j] = epoch_coefficients(weights, phi, self._losses[None], bonuses[None], second, inverse)[
            0
        ]
        self._inverses[:, j] = inverse[0]

    def _bonuses(self, inverse: Float[ndarray, "H d d"]) -> Float[ndarray, "W H A"]:
        """b at the states of the epoch, nothing where they are unknown."""
        norms = np.einsum("whai,hij,whaj->wha", self._phi, inverse, self._phi)
        mean = (self._policies * norms).sum(axis=-1, keepdims=True)
        known: Bool[ndarray, "W H"] = self._known
        return self.parameters.beta * (norms + mean) * known[..., None]

    def _checked_features(self, h: int, state: Any) -> Float[ndarray, "A d"]:
        phi = np.ascontiguousarray(self.features(h, state), np.float64)
        check_shape(f"features({h}, x)", phi, (self.n_actions, self.dim))
        check_unit_ball(f"features({h}, x)", phi)
        return phi

    # State ------------------------------------------------------------------------------------------------------------

    SAVED = (
        "_plans",
        "_plan_inverses",
        "_cover_phi",
        "_cover_actions",
        "_cover_inverse",
        "_inverses",
        "_coefficients",
        "_phi",
        "_policies",
        "_known",
        "_actions",
        "_losses",
        "_weights",
    )
    COUNTERS = ("episode", "_turn", "_component", "_layer")

    def state_dict(self) -> dict[str, Any]:
        """Plans of the cover, estimates of all epochs, the current epoch, counters and generator."""
        return {
            "rng": self.rng.bit_generator.state,
            "counters": {name.removeprefix("_"): getattr(self, name) for name in self.COUNTERS},
            "arrays": {name.removeprefix("_"): getattr(self, name).copy() for name in self.SAVED},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if an array of it has another shape here."""
        arrays = checked_arrays(state["arrays"], {name.removeprefix("_"): getattr(self, name) for name in self.SAVED})
        counters = {name: int(state["counters"][name.removeprefix("_")]) for name in self.COUNTERS}
        check_generator_state(self.rng, state["rng"])
        for name in self.SAVED:
            setattr(self, name, arrays[name.removeprefix("_")])
        for name, count in counters.items():
            setattr(self, name, count)
        self.rng.bit_generator.state = state["rng"]
