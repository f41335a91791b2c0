"""Algorithms 1 and 2 where states are too many to list: features by a function, transitions by a simulator.

Source: Dai, Luo, Wei and Zimmert (ICML 2023, arXiv 2301.12942), with the sampled bonuses of Luo, Wei and Lee (2021).
"""

from collections.abc import Callable, Hashable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_choice, check_count, check_shape
from locally.control.adversarial import kernels
from locally.control.adversarial.covariance import samples_for_ridge_inverse
from locally.control.adversarial.learner import sample_actions
from locally.control.adversarial.parameters import Parameters
from locally.control.validity import check_generator_state, check_index, check_unit_ball, checked_arrays

FeatureMap = Callable[[int, Any], Float[ndarray, "A d"]]


@runtime_checkable
class Simulator(Protocol):
    """Draws first states and transitions; the losses are nobody's to know."""

    def start(self, rng: np.random.Generator) -> Any:
        """A first state."""

    def step(self, h: int, state: Any, action: int, rng: np.random.Generator) -> Any:
        """A next state after `action` in `state` of layer h."""


class Node:
    """One state of one layer: pi and B of the first episodes, and C after them."""

    __slots__ = ("bonuses", "cumulative", "phi", "policies", "state")

    def __init__(self, state: Any, phi: Float[ndarray, "A d"]) -> None:
        self.state, self.phi = state, phi
        self.policies: list[Float[ndarray, " A"]] = []
        self.bonuses: list[Float[ndarray, " A"]] = []
        self.cumulative = np.zeros(len(phi))


class QueryPolicyOptimizer:
    """`PolicyOptimizer` for state spaces that are only ever seen through queries, as a Gymnasium agent.

    The policy at a state is worked out when the state is met, from what is kept of all past episodes: S+, S+ phi_k L_k
    and, for the magnitude-reduced estimator, the sample behind its shift. Bonuses are random paths of the simulator,
    drawn once for each (episode, state, action).

    Args:
        features: features(h, x) -> (A, d), in the unit ball; Q must be linear in them for every policy.
        simulator: draws first states and transitions.
        n_actions, dim, horizon, n_episodes: A, d, H, K.
        method: "log_barrier" or "magnitude_reduced".
        eta_scale, beta_scale, gamma, gamma_scale: as for `Parameters.of`.
        n_covariance_samples: simulated episodes for each covariance; by default what two-sided concentration needs.
        n_estimate_samples: simulated episodes for the shift of the magnitude-reduced estimator.
        key: key(h, x) -> a hashable that is the same for the same state; the bytes of `numpy.asarray(x)` by default.
        rng: draws actions and all samples.

    Attributes:
        parameters: eta, beta, gamma.
        episode: episodes seen.
        simulator_calls: transitions drawn so far.

    Raises:
        TypeError, ValueError: an argument is out of range, or (when a state is met) `features` returns the wrong shape
            or vectors outside the unit ball. Whether they span R^d cannot be known beforehand.

    Complexity: O(n K A (d^2 + 1)) time and O(n K A + K H d^2) memory for the whole run with n distinct states in each
    layer; the first look at a state in episode k draws k A transitions and looks up as many states of the next layer.
    Where states hardly ever recur this multiplies from layer to layer, as (K A)^H: the algorithm's own price.

    >>> class Coin:
    ...     def start(self, rng): return 0
    ...     def step(self, h, state, action, rng): return int(rng.integers(2))
    >>> agent = QueryPolicyOptimizer(
    ...     lambda h, x: np.eye(2), Coin(), n_actions=2, dim=2, horizon=2, n_episodes=50, n_covariance_samples=20, rng=0
    ... )
    >>> agent.action_probabilities(0, 0)
    array([0.5, 0.5])
    """

    def __init__(
        self,
        features: FeatureMap,
        simulator: Simulator,
        *,
        n_actions: int,
        dim: int,
        horizon: int,
        n_episodes: int,
        method: str = "log_barrier",
        eta_scale: float = 1.0,
        beta_scale: float = 1.0,
        gamma: float | None = None,
        gamma_scale: float = 1.0,
        n_covariance_samples: int | None = None,
        n_estimate_samples: int = 64,
        key: Callable[[int, Any], Hashable] | None = None,
        rng: np.random.Generator | int,
    ) -> None:
        check_choice("method", method, ("log_barrier", "magnitude_reduced"))
        if not isinstance(simulator, Simulator):
            raise TypeError(f"simulator must have start and step, got {type(simulator).__name__}")
        self.parameters = Parameters.of(
            method,  # type: ignore[arg-type]
            n_actions=n_actions,
            dim=dim,
            horizon=horizon,
            n_episodes=n_episodes,
            eta_scale=eta_scale,
            beta_scale=beta_scale,
            gamma=gamma,
            gamma_scale=gamma_scale,
        )
        if n_covariance_samples is None:
            n_covariance_samples = samples_for_ridge_inverse(self.parameters.gamma, dim)
        check_count("n_covariance_samples", n_covariance_samples)
        check_count("n_estimate_samples", n_estimate_samples)
        self.features, self.simulator, self.method = features, simulator, method
        self.n_actions, self.dim, self.horizon, self.n_episodes = n_actions, dim, horizon, n_episodes
        self.n_covariance_samples, self.n_estimate_samples = n_covariance_samples, n_estimate_samples
        self.key = key if key is not None else lambda h, x: np.asarray(x).tobytes()
        self.rng = np.random.default_rng(rng)
        self.episode, self.simulator_calls = 0, 0
        self._nodes: list[dict[Hashable, Node]] = [{} for _ in range(horizon)]
        sampled = n_estimate_samples if method == "magnitude_reduced" else 0
        self._inverses = np.empty((horizon, n_episodes, dim, dim))
        self._visited = np.empty((horizon, n_episodes, dim))  # S+ phi_k
        self._to_go = np.empty((horizon, n_episodes))
        self._samples = np.empty((horizon, n_episodes, sampled, dim))
        self._trajectory: list[tuple[Float[ndarray, " d"], float]] = []

    def action_probabilities(self, h: int, state: Any) -> Float[ndarray, " A"]:
        """The policy of the current episode at one state.

        Raises:
            ValueError: h is no layer, or the features of the state are unfit.
        """
        return self._policy(self._node(check_index("h", h, self.horizon), state, self.episode).cumulative)

    # The agent's protocol ---------------------------------------------------------------------------------------------

    def act(self, observation: tuple[int, Any]) -> int:
        """An action drawn at (h, x); a state that is met for the first time is worked out from all past episodes."""
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
        """Keep the step; the last one of an episode makes the agent learn.

        Raises:
            TypeError, ValueError: the action does not exist, the layer is not the next one, the reward is outside
                [-1, 0], the episode does not end with layer horizon - 1, or `n_episodes` were played already.
        """
        h, state = observation
        action = check_index("action", action, self.n_actions)
        if self.episode == self.n_episodes:
            raise ValueError(f"episodes must be at most n_episodes = {self.n_episodes}, on which the parameters depend")
        if h != len(self._trajectory):
            raise ValueError(f"observation must be of layer {len(self._trajectory)}, which comes next, got layer {h}")
        if not -1 <= reward <= 0:
            raise ValueError(f"reward must be minus a loss in [0, 1], got {reward!r}")
        if (terminated or truncated) != (h == self.horizon - 1):
            raise ValueError(f"episodes must have exactly {self.horizon} steps, got an end after layer {h}")
        self._trajectory.append((self._node(h, state, self.episode).phi[action], -float(reward)))
        if len(self._trajectory) == self.horizon:
            self._end_episode()

    def _end_episode(self) -> None:
        """Keep what C of any state needs of this episode; no state is updated until it is asked for."""
        k = self.episode
        sample = self._draw_features(self.n_covariance_samples)
        moments = np.einsum("nhi,nhj->hij", sample, sample) / len(sample)
        inverse = kernels.inverses(moments, np.full(self.horizon, self.parameters.gamma))
        if self._samples.size:
            self._samples[:, k] = self._draw_features(self.n_estimate_samples).transpose(1, 0, 2)
        visited, losses = zip(*self._trajectory)
        self._inverses[:, k] = inverse
        self._visited[:, k] = (inverse @ np.stack(visited)[..., None])[..., 0]
        self._to_go[:, k] = np.array(losses)[::-1].cumsum()[::-1]
        self._trajectory = []
        self.episode += 1

    # Queries ----------------------------------------------------------------------------------------------------------

    def _node(self, h: int, state: Any, episodes: int) -> Node:
        """The state's node, which knows at least the first `episodes` episodes."""
        label = self.key(h, state)
        node = self._nodes[h].get(label)
        if node is None:
            node = self._nodes[h][label] = Node(state, self._checked_features(h, state))
        first = len(node.policies)
        if first < episodes:
            past = slice(first, episodes)
            later = np.zeros((episodes - first, self.n_actions))
            if h + 1 < self.horizon:
                for k, action in np.ndindex(later.shape):
                    later[k, action] = self._later_bonus(h, state, action, first + k)
            policies, bonuses = kernels.follow(
                node.phi,
                self._inverses[h, past],
                self._visited[h, past],
                self._to_go[h, past],
                self._samples[h, past],
                later * (1 + 1 / self.horizon),
                node.cumulative,
                self.parameters.eta,
                self.parameters.beta,
                float(self.horizon),
                self.method == "log_barrier",
            )
            node.policies.extend(policies)
            node.bonuses.extend(bonuses)
        return node

    def _later_bonus(self, h: int, state: Any, action: int, k: int) -> float:
        """B_k(x', a') for one draw of x' ~ P and a' ~ pi_k; kept in the bonus that asks, so never drawn again."""
        following = self._node(h + 1, self._simulate(h, state, action), k + 1)
        return float(following.bonuses[k][sample_actions(following.policies[k], self.rng)])

    def _policy(self, cumulative: Float[ndarray, " A"]) -> Float[ndarray, " A"]:
        scaled = self.parameters.eta * cumulative[None]
        barrier = self.method == "log_barrier"
        return (kernels.log_barrier_weights(scaled) if barrier else kernels.exponential_weights(scaled))[0]

    def _draw_features(self, n: int) -> Float[ndarray, "n H d"]:
        """Features along n simulated episodes of the current policy."""
        drawn = np.empty((n, self.horizon, self.dim))
        for i in range(n):
            state = self.simulator.start(self.rng)
            for h in range(self.horizon):
                node = self._node(h, state, self.episode)
                action = sample_actions(self._policy(node.cumulative), self.rng)
                drawn[i, h] = node.phi[action]
                if h + 1 < self.horizon:
                    state = self._simulate(h, state, action)
        return drawn

    def _simulate(self, h: int, state: Any, action: int) -> Any:
        self.simulator_calls += 1
        return self.simulator.step(h, state, action, self.rng)

    def _checked_features(self, h: int, state: Any) -> Float[ndarray, "A d"]:
        phi = np.ascontiguousarray(self.features(h, state), np.float64)
        check_shape(f"features({h}, x)", phi, (self.n_actions, self.dim))
        check_unit_ball(f"features({h}, x)", phi)
        return phi

    # State ------------------------------------------------------------------------------------------------------------

    HISTORY = ("_inverses", "_visited", "_to_go", "_samples")

    def state_dict(self) -> dict[str, Any]:
        """Estimates of all past episodes, every state met so far, the episode in progress, and the generator."""
        past = slice(self.episode)
        return {
            "episode": self.episode,
            "simulator_calls": self.simulator_calls,
            "rng": self.rng.bit_generator.state,
            "history": {name.removeprefix("_"): getattr(self, name)[:, past].copy() for name in self.HISTORY},
            "trajectory": [{"phi": phi.copy(), "loss": loss} for phi, loss in self._trajectory],
            "nodes": [
                [
                    {
                        "state": np.array(node.state),
                        "cumulative": node.cumulative.copy(),
                        "policies": np.array(node.policies).reshape(-1, self.n_actions),
                        "bonuses": np.array(node.bonuses).reshape(-1, self.n_actions),
                    }
                    for node in layer.values()
                ]
                for layer in self._nodes
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """States come back as arrays: `features`, `simulator` and `key` must take those as well.

        Raises:
            ValueError: the state is of another horizon, n_actions, dim, method or number of samples, or of more
                episodes than this agent plays; then nothing has changed.
        """
        if len(state["nodes"]) != self.horizon:
            raise ValueError(f"state must have {self.horizon} layers, got {len(state['nodes'])}")
        episode, simulator_calls = int(state["episode"]), int(state["simulator_calls"])
        if not 0 <= episode <= self.n_episodes:
            raise ValueError(f"state must be of at most n_episodes = {self.n_episodes} episodes, got {episode}")
        played = {name.removeprefix("_"): getattr(self, name)[:, :episode] for name in self.HISTORY}
        history = checked_arrays(state["history"], played)
        phi = {"phi": np.empty(self.dim)}
        trajectory = [(checked_arrays(step, phi)["phi"], float(step["loss"])) for step in state["trajectory"]]
        if len(trajectory) >= self.horizon:
            raise ValueError(f"state must be of an episode of {self.horizon} steps, got {len(trajectory)} within one")
        check_generator_state(self.rng, state["rng"])
        nodes = [
            {self.key(h, saved["state"]): self._restored(h, saved, episode) for saved in layer}
            for h, layer in enumerate(state["nodes"])
        ]
        self.episode, self.simulator_calls = episode, simulator_calls
        self.rng.bit_generator.state = state["rng"]
        for name in self.HISTORY:
            getattr(self, name)[:, :episode] = history[name.removeprefix("_")]
        self._trajectory, self._nodes = trajectory, nodes

    def _restored(self, h: int, saved: dict[str, Any], episodes: int) -> Node:
        node = Node(saved["state"], self._checked_features(h, saved["state"]))
        known = len(saved["policies"])
        if known > episodes:
            raise ValueError(f"state must know {episodes} episodes at most, but a node of layer {h} knows {known}")
        rows = np.empty((known, self.n_actions))
        arrays = checked_arrays(saved, {"cumulative": node.cumulative, "policies": rows, "bonuses": rows})
        node.cumulative = arrays["cumulative"]
        node.policies, node.bonuses = list(arrays["policies"]), list(arrays["bonuses"])
        return node
