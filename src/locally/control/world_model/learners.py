"""What plans on a world model: tabular Q-learning and deep Q-learning. The actor-critic has a file of its own."""

from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor, nn

from locally.checks import check_between, check_count, check_positive, check_shape
from locally.control.validity import check_generator_state, checked_arrays
from locally.control.world_model.spaces import check_box, check_discrete, check_vector
from locally.errors import require


class Transitions(NamedTuple):
    """A batch of n steps, lived or imagined."""

    observations: ndarray  # (n, n_observed)
    actions: ndarray  # (n,) or (n, n_actions)
    rewards: Float[ndarray, " n"]
    next_observations: ndarray  # (n, n_observed)
    terminated: Bool[ndarray, " n"]


@runtime_checkable
class Learner(Protocol):
    """Model-free: acts, says how it would act elsewhere, learns from transitions wherever they come from."""

    def act(self, observation: Any) -> Any:
        """The action to take at one observation."""

    def sample(self, observations: ndarray) -> ndarray:
        """One action for each row of `observations`, (n, n_observed), as `act` would draw it."""

    def learn(self, batch: Transitions) -> None:
        """Take in a batch of transitions, real or imagined."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, random generators included."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the learner must have been constructed with the same arguments."""


class TabularQ:
    """Q-learning on a table over observations of integers, epsilon-greedy with ties broken at random.

    Args:
        observation_space: a Box of integers with one dimension and finite limits, or MultiDiscrete with one.
        action_space: Discrete.
        step_size: alpha in (0, 1].
        discount: gamma in [0, 1].
        epsilon: probability of a random action, in [0, 1].
        rng: seed or generator.

    Raises:
        TypeError, ValueError: a space or an argument is of another kind or out of range.

    >>> from gymnasium.spaces import Box, Discrete
    >>> learner = TabularQ(Box(0, 3, (1,), int), Discrete(2), rng=0)
    >>> learner.learn(Transitions(np.array([[0]]), np.array([1]), np.ones(1), np.array([[1]]), np.array([True])))
    >>> learner.Q[0]
    array([0. , 0.5])
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        *,
        step_size: float | int = 0.5,
        discount: float | int = 0.95,
        epsilon: float | int = 0.15,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        spaces = require("gymnasium", "control").spaces
        if isinstance(observation_space, spaces.MultiDiscrete):
            low, high = observation_space.start, observation_space.start + observation_space.nvec - 1
            check_shape("observation_space", low, (None,))
        else:
            check_box("observation_space", observation_space, bounded=True)
            if not np.issubdtype(observation_space.dtype, np.integer):
                raise TypeError(f"observation_space must hold integers, got {observation_space}")
            low, high = observation_space.low, observation_space.high
        check_discrete("action_space", action_space)
        check_between("step_size", step_size, 0, 1)
        check_between("discount", discount, 0, 1)
        check_between("epsilon", epsilon, 0, 1)
        self.low = low.astype(np.int64)
        self.first_action = int(action_space.start)
        self.Q = np.zeros((*(high.astype(np.int64) - self.low + 1), int(action_space.n)))
        self.step_size, self.discount, self.epsilon = step_size, discount, epsilon
        self.rng = np.random.default_rng(rng)

    def act(self, observation: Any) -> int:
        """A best action here, ties drawn at random, or any with probability epsilon."""
        cell = np.asarray(observation, np.int64)
        check_shape("observation", cell, self.low.shape)
        return int(self.sample(cell[None])[0])

    def sample(self, observations: ndarray) -> ndarray:
        """As `act`, for every row at once."""
        values = self.Q[self._cells(observations)]
        best = values == values.max(axis=1, keepdims=True)
        greedy = np.where(best, self.rng.random(values.shape), -1.0).argmax(axis=1)
        random = self.rng.integers(values.shape[1], size=len(values))
        return np.where(self.rng.random(len(values)) < self.epsilon, random, greedy) + self.first_action

    def learn(self, batch: Transitions) -> None:
        """One after the other: transitions of one batch may touch the same entry."""
        here = self._cells(batch.observations)
        there = self._cells(batch.next_observations)
        actions = np.asarray(batch.actions, np.int64) - self.first_action
        Q = self.Q.reshape(-1, self.Q.shape[-1])
        shape = self.Q.shape[:-1]
        froms, tos = np.ravel_multi_index(here, shape).tolist(), np.ravel_multi_index(there, shape).tolist()
        goes_on = (self.discount * ~np.asarray(batch.terminated, bool)).tolist()
        for s, a, r, s2, gamma in zip(froms, actions.tolist(), batch.rewards.tolist(), tos, goes_on):
            Q[s, a] += self.step_size * (r + gamma * Q[s2].max() - Q[s, a])

    def _cells(self, observations: ndarray) -> tuple[ndarray, ...]:
        return tuple((np.asarray(observations, np.int64) - self.low).T)

    def state_dict(self) -> dict[str, Any]:
        """The table and the generator."""
        return {"Q": self.Q.copy(), "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its table has another shape."""
        Q = checked_arrays(state, {"Q": self.Q})["Q"]
        check_generator_state(self.rng, state["rng"])
        self.Q = Q
        self.rng.bit_generator.state = state["rng"]


class DeepQ:
    """Double deep Q-learning without a replay buffer: it learns from the batches that it is given, and no others.

    Args:
        observation_space: a Box with one dimension.
        action_space: Discrete.
        hidden: width of the two hidden layers.
        lr: of Adam, positive.
        discount: gamma in [0, 1].
        epsilon: probability of a random action, in [0, 1].
        target_rate: with which the target network follows, in (0, 1].
        observation_scale: observations are divided by it, one number or one for each.
        generator: of weights and actions.

    Raises:
        TypeError, ValueError: a space or an argument is of another kind or out of range.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        *,
        hidden: int = 64,
        lr: float = 1e-3,
        discount: float | int = 0.99,
        epsilon: float | int = 0.1,
        target_rate: float | int = 0.01,
        observation_scale: Any = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_box("observation_space", observation_space)
        check_discrete("action_space", action_space)
        check_count("hidden", hidden)
        check_positive("lr", lr)
        check_between("discount", discount, 0, 1)
        check_between("epsilon", epsilon, 0, 1)
        check_between("target_rate", target_rate, 0, 1)
        self.generator = generator or torch.Generator().manual_seed(torch.seed())
        self.width = observation_space.shape[0]
        self.n_actions, self.first_action = int(action_space.n), int(action_space.start)
        self.discount, self.epsilon, self.target_rate = discount, epsilon, target_rate
        self.scale = torch.as_tensor(observation_scale, dtype=torch.float32)
        self.network = perceptron([self.width, hidden, hidden, self.n_actions], self.generator)
        self.target = perceptron([self.width, hidden, hidden, self.n_actions], self.generator)
        self.target.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=lr)

    def act(self, observation: Any) -> int:
        """The action of largest Q here, or any with probability epsilon."""
        return int(self.sample(check_vector("observation", observation, self.width)[None])[0])

    @torch.no_grad()
    def sample(self, observations: ndarray) -> ndarray:
        """As `act`, for every row at once."""
        greedy = self.network(self._read(observations)).argmax(dim=1)
        random = torch.randint(self.n_actions, greedy.shape, generator=self.generator)
        explore = torch.rand(greedy.shape, generator=self.generator) < self.epsilon
        return torch.where(explore, random, greedy).numpy() + self.first_action

    def learn(self, batch: Transitions) -> None:
        """One step of Adam on the batch's Huber loss, then the target network follows."""
        here, there = self._read(batch.observations), self._read(batch.next_observations)
        actions = torch.as_tensor(np.asarray(batch.actions, np.int64) - self.first_action)[:, None]
        with torch.no_grad():
            best = self.network(there).argmax(dim=1, keepdim=True)
            following = self.target(there).gather(1, best).flatten()
            goes_on = torch.from_numpy(~np.asarray(batch.terminated, bool)).float()
            wanted = torch.from_numpy(batch.rewards).float() + self.discount * goes_on * following
        loss = nn.functional.smooth_l1_loss(self.network(here).gather(1, actions).flatten(), wanted)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        follow(self.target, self.network, self.target_rate)

    def _read(self, observations: ndarray) -> Float[Tensor, "n width"]:
        return torch.from_numpy(np.asarray(observations, np.float32)) / self.scale

    def state_dict(self) -> dict[str, Any]:
        """Network, target network, optimizer and generator."""
        return save(self, ("network", "target", "optimizer"))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the learner must have been constructed with the same arguments."""
        load(self, state)


def perceptron(widths: list[int], generator: torch.Generator) -> nn.Sequential:
    """ReLU layers with PyTorch's default initialisation, drawn from `generator`."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, a, b)
        for parameter in (linear.weight, linear.bias):
            nn.init.uniform_(parameter, -(a**-0.5), a**-0.5, generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def follow(target: nn.Module, network: nn.Module, rate: float | int) -> None:
    """target <- target + rate (network - target)."""
    for slow, fast in zip(target.parameters(), network.parameters()):
        slow.lerp_(fast, float(rate))


def save(learner: Any, parts: tuple[str, ...]) -> dict[str, Any]:
    """State of a learner's modules, optimizers and generator, copied."""
    state: dict[str, Any] = {part: _copied(getattr(learner, part).state_dict()) for part in parts}
    return state | {"generator": learner.generator.get_state()}


def load(learner: Any, state: dict[str, Any]) -> None:
    """Go on from `save`; ValueError, and nothing changed, where a part has other shapes than the learner's."""
    parts = {part: (getattr(learner, part), saved) for part, saved in state.items() if part != "generator"}
    for part, (own, saved) in parts.items():
        if isinstance(own, torch.optim.Optimizer):
            own_shapes = dict(enumerate(p.shape for group in own.param_groups for p in group["params"]))
            shapes = {i: own_shapes[i] for i in saved["state"] if i in own_shapes}
            found = {i: moments["exp_avg"].shape for i, moments in saved["state"].items()}
        else:
            shapes = {name: value.shape for name, value in own.state_dict().items()}
            found = {name: value.shape for name, value in saved.items()}
        if shapes != found:
            raise ValueError(f"state must be of a learner of the same sizes, but its {part} has other shapes")
    for own, saved in parts.values():
        own.load_state_dict(_copied(saved))
    learner.generator.set_state(state["generator"])


def _copied(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_copied(value) for value in state]
    return state.clone() if isinstance(state, Tensor) else state
