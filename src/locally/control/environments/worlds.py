"""The processes as Gymnasium environments, registered as `locally/...-v0`. Importing this needs the extra `control`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.control.environments.adversarial import AdversarialMDP, random_adversarial_mdp
from locally.control.environments.continuing import (
    access_control_queue,
    garnet,
    random_linear_mdp,
    random_linear_mixture,
    riverswim,
)
from locally.control.environments.episodic import combination_lock, missing_arm, random_episodic_linear_mdp
from locally.control.environments.processes import ContinuingMDP, EpisodicMDP
from locally.control.validity import check_index, check_unit_interval
from locally.errors import require

gymnasium: Any = require("gymnasium", "control")
registration: Any = require("gymnasium.envs.registration", "control")

Trajectory = list[tuple[int, int, int, float]]  # (layer, state, action, loss)
Adversary = Callable[[int, Sequence[Trajectory]], Float[ndarray, "H d"]]


class ContinuingWorld(gymnasium.Env):
    """A process that never ends. Observations are states, actions 0, ..., A-1.

    Args:
        mdp: the process, kept as `env.unwrapped.mdp` with its exact solution.

    Each step draws two numbers from `np_random`: the next state's, then the reward's.

    >>> env = ContinuingWorld(riverswim())
    >>> state, _ = env.reset(seed=0)
    >>> env.step(0)[:2]
    (0, 0.0)
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own attribute

    def __init__(self, mdp: ContinuingMDP) -> None:
        self.mdp = mdp
        self.observation_space = gymnasium.spaces.Discrete(mdp.n_states)
        self.action_space = gymnasium.spaces.Discrete(mdp.n_actions)
        self.state = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = _first(self.mdp.start, self.np_random.random())
        return self.state, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        s, a = self.state, check_index("action", action, self.mdp.n_actions)
        self.state = int(self.mdp.cumulative[s, a].searchsorted(self.np_random.random(), side="right"))
        reward = _reward(self.mdp, self.mdp.R[s, a], self.np_random)
        return self.state, reward, False, False, {}


class EpisodicWorld(gymnasium.Env):
    """H layers, then `terminated`. Observations are arrays (h, s), with h = H in the one after the last step.

    Args:
        mdp: the process, kept as `env.unwrapped.mdp` with its exact solution.

    >>> env = EpisodicWorld(missing_arm())
    >>> env.reset(seed=0)[0], env.step(3)[0], env.step(0)[2]
    (array([0, 0]), array([1, 0]), True)
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, mdp: EpisodicMDP) -> None:
        self.mdp = mdp
        self.observation_space = gymnasium.spaces.MultiDiscrete([mdp.horizon + 1, mdp.n_states])
        self.action_space = gymnasium.spaces.Discrete(mdp.n_actions)
        self.layer, self.state = mdp.horizon, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.layer, self.state = 0, _first(self.mdp.start, self.np_random.random())
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        h, s, a = _open_layer(self), self.state, check_index("action", action, self.mdp.n_actions)
        self.state = int(self.mdp.cumulative[h, s, a].searchsorted(self.np_random.random(), side="right"))
        reward = _reward(self.mdp, self.mdp.R[h, s, a], self.np_random)
        self.layer += 1
        return self._observation(), reward, self.layer == self.mdp.horizon, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.layer, self.state])


class AdversarialWorld(gymnasium.Env):
    """Losses of the next episode at every `reset`; reward is minus the loss, which `info["loss"]` holds.

    Observations as in `EpisodicWorld`. A reset after the last episode of the sequence begins the sequence again; one
    with a seed begins it in any case.

    Args:
        mdp: transitions, features and the oblivious loss sequence.
        adversary: an adaptive one instead: called with (episode, trajectories so far) before each episode, it returns
            theta[h, :]. `thetas_played` keeps what it chose, for exact regret afterwards.

    Raises:
        ValueError: the adversary's losses leave [0, 1].

    >>> env = AdversarialWorld(random_adversarial_mdp(5, rng=0))
    >>> _ = env.reset(seed=0)
    >>> env.step(1)[4]["loss"] in (0.0, 1.0)
    True
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, mdp: AdversarialMDP, adversary: Adversary | None = None) -> None:
        self.mdp = mdp
        self.adversary = adversary
        self.observation_space = gymnasium.spaces.MultiDiscrete([mdp.horizon + 1, mdp.n_states])
        self.action_space = gymnasium.spaces.Discrete(mdp.n_actions)
        self.layer, self.state, self.episode = mdp.horizon, 0, -1
        self.history: list[Trajectory] = []
        self.thetas_played: list[Float[ndarray, "H d"]] = []
        totals = np.cumsum(mdp.P, axis=-1)
        self._cumulative = totals / totals[..., -1:]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        if seed is not None or (self.adversary is None and self.episode == self.mdp.n_episodes):
            self.episode, self.history, self.thetas_played = 0, [], []
        theta = self.mdp.thetas[self.episode]
        if self.adversary is not None:
            theta = np.asarray(self.adversary(self.episode, self.history), np.float64)
        self._losses = np.einsum("hsad,hd->hsa", self.mdp.features, theta)
        check_unit_interval("losses of the adversary", self._losses)
        self.thetas_played.append(theta)
        self.history.append([])
        self.layer, self.state = 0, _first(self.mdp.start, self.np_random.random())
        return np.array([0, self.state]), {"episode": self.episode}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        h, s, a = _open_layer(self), self.state, check_index("action", action, self.mdp.n_actions)
        self.state = int(self._cumulative[h, s, a].searchsorted(self.np_random.random(), side="right"))
        loss = float(self.np_random.random() < self._losses[h, s, a])
        self.history[-1].append((h, s, a, loss))
        self.layer += 1
        info = {"loss": loss, "episode": self.episode}
        return np.array([self.layer, self.state]), -loss, self.layer == self.mdp.horizon, False, info


def _first(start: Float[ndarray, " S"], u: float) -> int:
    return int(min(np.cumsum(start).searchsorted(u, side="right"), np.flatnonzero(start)[-1]))


def _open_layer(env: Any) -> int:
    if env.layer >= env.mdp.horizon:
        raise gymnasium.error.ResetNeeded("the episode is over, or none has begun: call reset")
    return env.layer


def _reward(mdp: ContinuingMDP | EpisodicMDP, mean: float, rng: np.random.Generator) -> float:
    u = rng.random()  # drawn either way, so that the states do not depend on the noise
    return float(u < mean) if mdp.noise == "bernoulli" else float(mean)


def _seeded(make: Callable[..., Any], world: type) -> Callable[..., Any]:
    """`instance` seeds the random process itself; `reset(seed=...)` seeds what happens in it."""

    def build(*, instance: int = 0, render_mode: None = None, **arguments: Any) -> Any:
        return world(make(rng=instance, **arguments))

    return build


def _fixed(make: Callable[..., Any], world: type) -> Callable[..., Any]:
    def build(*, render_mode: None = None, **arguments: Any) -> Any:
        return world(make(**arguments))

    return build


def _adversarial(
    *,
    n_episodes: int = 1000,
    instance: int = 0,
    adversary: Adversary | None = None,
    render_mode: None = None,
    **sizes: Any,
) -> Any:
    return AdversarialWorld(random_adversarial_mdp(n_episodes, rng=instance, **sizes), adversary)


MAKERS: dict[str, Callable[..., Any]] = {
    "locally/RiverSwim-v0": _fixed(riverswim, ContinuingWorld),
    "locally/AccessControlQueue-v0": _fixed(access_control_queue, ContinuingWorld),
    "locally/Garnet-v0": _seeded(garnet, ContinuingWorld),
    "locally/LinearMDP-v0": _seeded(random_linear_mdp, ContinuingWorld),
    "locally/LinearMixture-v0": _seeded(random_linear_mixture, ContinuingWorld),
    "locally/EpisodicLinearMDP-v0": _seeded(random_episodic_linear_mdp, EpisodicWorld),
    "locally/CombinationLock-v0": _seeded(combination_lock, EpisodicWorld),
    "locally/MissingArm-v0": _fixed(missing_arm, EpisodicWorld),
    "locally/AdversarialLinearMDP-v0": _adversarial,
}

for _name, _make in MAKERS.items():
    if _name not in registration.registry:
        registration.register(_name, entry_point=_make)
