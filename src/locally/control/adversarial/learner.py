"""What all learners of this room share: layered finite processes, many runs side by side, one agent for Gymnasium.

A learner holds R runs at once: `policies` (R, H, S, A) are what it plays next, and `tell` is given one episode of each
run. All runs have the same sizes and episodes, each may have its own process. R = 1 is an ordinary agent's.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_count, check_shape
from locally.control.adversarial import kernels
from locally.control.validity import check_generator_state, check_index, check_kernel, check_unit_ball


@runtime_checkable
class Learner(Protocol):
    """Chooses policies episode by episode from the losses of the pairs that were visited."""

    policies: Float[ndarray, "R H S A"]
    n_episodes: int
    episode: int

    def tell(self, states: Int[ndarray, "R H"], actions: Int[ndarray, "R H"], losses: Float[ndarray, "R H"]) -> None:
        """Learn from one episode that `policies` played, in each run.

        Args:
            states, actions: what was visited and done, layer by layer.
            losses: of these pairs, in [0, 1].

        Raises:
            ValueError: shapes differ, a state or action does not exist, or a loss lies outside [0, 1].
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next episode depends on, random generators included."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the learner must have been constructed with the same arguments."""


def as_runs(name: str, array: ndarray, n_axes: int) -> ndarray:
    """Contiguous floats with a leading axis of runs, whether or not there was one."""
    values = np.ascontiguousarray(array, np.float64)
    if values.ndim == n_axes:
        return values[None]
    if values.ndim != n_axes + 1:
        raise ValueError(f"{name} must have {n_axes} axes, or {n_axes + 1} with runs first, got shape {values.shape}")
    return values


def checked_features(features: ndarray) -> ndarray:
    """Features (R, H, S, A, d) in the unit ball that span R^d in every layer."""
    phi = as_runs("features", features, 4)
    if 0 in phi.shape:
        raise ValueError(f"features must have at least one layer, state, action and dimension, got shape {phi.shape}")
    check_unit_ball("features", phi)
    R, H, S, A, d = phi.shape
    ranks = np.linalg.matrix_rank(phi.reshape(R, H, S * A, d))
    if ranks.min() < d:
        run, layer = np.argwhere(ranks < d)[0]
        where = f"layer {layer}" if R == 1 else f"layer {layer} of run {run}"
        raise ValueError(f"features must span {d} dimensions in every layer, but span {ranks[run, layer]} in {where}")
    return phi


def checked_process(P: ndarray, start: ndarray | None, sizes: tuple[int, int, int, int]) -> tuple[ndarray, ndarray]:
    """Transitions (R, H, S, A, S) and first-state distributions (R, S) for features of (R, H, S, A)."""
    R, H, S, A = sizes
    kernel = as_runs("P", P, 4)
    check_shape("P", kernel, (R, H, S, A, S))
    check_kernel("P", kernel)
    first = np.tile(np.eye(S)[0], (R, 1)) if start is None else as_runs("start", start, 1)
    check_shape("start", first, (R, S))
    check_kernel("start", first)
    return kernel, first


def checked_episode(
    states: ndarray, actions: ndarray, losses: ndarray, sizes: tuple[int, int, int, int]
) -> tuple[ndarray, ndarray, ndarray]:
    """Refuses what is no episode of these sizes, and losses outside [0, 1], before anything is learnt."""
    R, H, S, A = sizes
    for name, array in {"states": states, "actions": actions, "losses": losses}.items():
        check_shape(name, array, (R, H))
    for name, array, size in (("states", states, S), ("actions", actions, A)):
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold integers, got {array.dtype}")
        if array.min() < 0 or array.max() >= size:
            raise ValueError(f"{name} must be among 0, ..., {size - 1}, got {array.min()} to {array.max()}")
    if not (losses.min() >= 0 and losses.max() <= 1):  # false for NaN as well
        raise ValueError(f"losses must lie in [0, 1], got values from {losses.min():.6g} to {losses.max():.6g}")
    return states, actions, losses


def sample_actions(policy: Float[ndarray, " A"], rng: np.random.Generator) -> int:
    return int(kernels.pick(policy, rng.random()))


class EpisodicAgent:
    """A learner as an agent of the protocol of `locally.control.agents`.

    Observations are arrays (h, s) as those of `AdversarialWorld`; rewards are minus the losses; learning happens when
    an episode has seen all its layers.

    Args:
        learner: of a single run.
        rng: draws the actions.

    Raises:
        TypeError: the learner has several runs, or (in `act`) an observation is no pair of integers.
        ValueError: a reward is outside [-1, 0], an episode ends early, or a step does not follow the one before.

    >>> from locally.control.adversarial import FixedPolicy
    >>> agent = EpisodicAgent(FixedPolicy(np.full((1, 1, 2), 0.5), n_episodes=10), rng=0)
    >>> agent.act(np.array([0, 0])) in (0, 1)
    True
    """

    def __init__(self, learner: Learner, *, rng: np.random.Generator | int) -> None:
        if len(learner.policies) != 1:
            raise TypeError(f"learner must have one run to act in one environment, got {len(learner.policies)}")
        self.learner = learner
        self.rng = np.random.default_rng(rng)
        self._trajectory: list[tuple[int, int, float]] = []

    @classmethod
    def for_env(cls, env: Any, learner: Learner, *, rng: np.random.Generator | int) -> "EpisodicAgent":
        """The agent, after a check that `env` has the learner's layers, states and actions.

        Raises:
            TypeError: the action space is not finite.
            ValueError: sizes differ.
        """
        _, _, S, A = learner.policies.shape
        check_action_space(env.action_space, A)
        shape = tuple(int(n) for n in env.observation_space.nvec)
        if shape != (learner.policies.shape[1] + 1, S):
            raise ValueError(f"env has observations (h, s) below {shape}, but the learner's are below {(shape[0], S)}")
        return cls(learner, rng=rng)

    def act(self, observation: Any) -> int:
        """An action drawn from the learner's policy at (h, s)."""
        h, s = self._place(observation)
        return sample_actions(self.learner.policies[0, h, s], self.rng)

    def observe(
        self,
        observation: Any,
        action: Any,
        reward: float,
        next_observation: Any,
        *,
        terminated: bool = False,
        truncated: bool = False,
    ) -> None:
        """Keep the step; the step of the last layer makes the learner learn. Errors as for the class."""
        _, H, _, A = self.learner.policies.shape
        h, s = self._place(observation)
        a = check_index("action", action, A)
        if h != len(self._trajectory):
            raise ValueError(f"observation must be of layer {len(self._trajectory)}, which comes next, got layer {h}")
        if not -1 <= reward <= 0:
            raise ValueError(f"reward must be minus a loss in [0, 1], got {reward!r}")
        if (terminated or truncated) != (h == H - 1):
            raise ValueError(
                f"episodes must have exactly {H} steps, but layer {h} {'ended' if h < H - 1 else 'did not end'} one"
            )
        self._trajectory.append((s, a, -float(reward)))
        if len(self._trajectory) == H:
            states, actions, losses = (np.array([column]) for column in zip(*self._trajectory))
            self._trajectory = []
            self.learner.tell(states, actions, losses)

    def state_dict(self) -> dict[str, Any]:
        """The learner's state, the generator, and the steps of the episode in progress."""
        return {
            "learner": self.learner.state_dict(),
            "rng": self.rng.bit_generator.state,
            "trajectory": [list(step) for step in self._trajectory],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, in the middle of an episode if need be.

        Raises:
            TypeError, ValueError: the state is of a learner of other sizes; then nothing has changed.
        """
        _, H, S, A = self.learner.policies.shape
        if len(state["trajectory"]) >= H:
            raise ValueError(f"state must be of an episode of {H} steps, got {len(state['trajectory'])} within one")
        trajectory = [
            (check_index("state", s, S), check_index("action", a, A), float(loss)) for s, a, loss in state["trajectory"]
        ]
        check_generator_state(self.rng, state["rng"])
        self.learner.load_state_dict(state["learner"])
        self.rng.bit_generator.state = state["rng"]
        self._trajectory = trajectory

    def _place(self, observation: Any) -> tuple[int, int]:
        place = np.asarray(observation)
        if place.shape != (2,):
            raise TypeError(f"observation must be a pair (layer, state), got {observation!r}")
        _, H, S, _ = self.learner.policies.shape
        return check_index("layer", place[0], H), check_index("state", place[1], S)


def check_action_space(space: Any, n_actions: int) -> None:
    """Only finite action spaces have distributions that these learners can hold."""
    if not isinstance(getattr(space, "n", None), int | np.integer):
        raise TypeError(f"action space must be discrete, got {space!r}: continuous actions are not dealt with")
    check_count("n_actions", n_actions)
    if int(space.n) != n_actions:
        raise ValueError(f"n_actions is {n_actions}, but the action space has {int(space.n)}")
