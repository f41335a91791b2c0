"""Soft actor-critic for continuous actions (Haarnoja et al., 2018), fed with batches from outside."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from locally.checks import check_between, check_count, check_positive
from locally.control.world_model.learners import Transitions, follow, load, perceptron, save
from locally.control.world_model.spaces import check_box, check_vector

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


class SoftActorCritic:
    """Squashed Gaussian policy, two critics, a temperature that keeps the entropy; no replay buffer of its own.

    Args:
        observation_space: a Box with one dimension.
        action_space: a Box with one dimension and finite limits.
        hidden: width of the two hidden layers.
        lr: of the three Adams, positive.
        discount: gamma in [0, 1].
        target_rate: with which the target critics follow, in [0, 1].
        observation_scale: observations are divided by it, one number or one for each.
        generator: of weights and actions.

    Raises:
        TypeError, ValueError: a space or an argument is of another kind or out of range.

    >>> from gymnasium.spaces import Box
    >>> learner = SoftActorCritic(Box(-1, 1, (3,)), Box(-2, 2, (1,)), generator=torch.Generator().manual_seed(0))
    >>> bool(abs(learner.act(np.zeros(3))) <= 2)
    True
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        *,
        hidden: int = 64,
        lr: float = 1e-3,
        discount: float | int = 0.99,
        target_rate: float | int = 0.01,
        observation_scale: Any = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_box("observation_space", observation_space)
        check_box("action_space", action_space, bounded=True)
        check_count("hidden", hidden)
        check_positive("lr", lr)
        check_between("discount", discount, 0, 1)
        check_between("target_rate", target_rate, 0, 1)
        self.generator = generator or torch.Generator().manual_seed(torch.seed())
        n, m = observation_space.shape[0], action_space.shape[0]
        self.width, self.n_actions = n, m
        self.discount, self.target_rate = discount, target_rate
        self.scale = torch.as_tensor(observation_scale, dtype=torch.float32)
        self.centre = torch.from_numpy((action_space.high + action_space.low) / 2).float()
        self.radius = torch.from_numpy((action_space.high - action_space.low) / 2).float()
        self.actor = perceptron([n, hidden, hidden, 2 * m], self.generator)
        self.critics = torch.nn.ModuleList(perceptron([n + m, hidden, hidden, 1], self.generator) for _ in range(2))
        self.targets = torch.nn.ModuleList(perceptron([n + m, hidden, hidden, 1], self.generator) for _ in range(2))
        self.targets.load_state_dict(self.critics.state_dict())
        self.temperature = torch.nn.ParameterDict({"log": torch.zeros(())})
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=lr)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=lr)
        self.temperature_optimizer = torch.optim.Adam(self.temperature.parameters(), lr=lr)

    def act(self, observation: Any) -> Float[ndarray, " n_actions"]:
        """A draw from the policy here, within the limits of the action space."""
        return self.sample(check_vector("observation", observation, self.width)[None])[0]

    @torch.no_grad()
    def sample(self, observations: ndarray) -> Float[ndarray, "n n_actions"]:
        """A draw from the policy for each row."""
        squashed, _ = self._draw(self._read(observations))
        return (self.centre + self.radius * squashed).numpy()

    def _draw(self, observations: Float[Tensor, "n width"]) -> tuple[Float[Tensor, "n m"], Float[Tensor, " n"]]:
        """Actions in (-1, 1) and their log densities."""
        mean, raw = self.actor(observations).chunk(2, dim=1)
        log_std = LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(raw) + 1) / 2
        noise = torch.randn(mean.shape, generator=self.generator)
        before = mean + log_std.exp() * noise
        density = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2
        # log(1 - tanh(u)^2), without its cancellation
        squeeze = 2 * (math.log(2) - before - torch.nn.functional.softplus(-2 * before))
        return torch.tanh(before), (density - squeeze).sum(dim=1)

    def learn(self, batch: Transitions) -> None:
        """One step of critics, actor and temperature on a batch."""
        here, there = self._read(batch.observations), self._read(batch.next_observations)
        actions = (torch.from_numpy(np.asarray(batch.actions, np.float32)) - self.centre) / self.radius
        goes_on = torch.from_numpy(~np.asarray(batch.terminated, bool)).float()
        alpha = self.temperature["log"].exp().detach()
        with torch.no_grad():
            following, density = self._draw(there)
            value = self._smaller(self.targets, there, following) - alpha * density
            wanted = torch.from_numpy(batch.rewards).float() + self.discount * goes_on * value
        pairs = torch.cat([here, actions], dim=1)
        critic_loss = sum((critic(pairs)[:, 0] - wanted).square().mean() for critic in self.critics)
        self._descend(self.critic_optimizer, critic_loss)

        drawn, density = self._draw(here)
        self._descend(self.actor_optimizer, (alpha * density - self._smaller(self.critics, here, drawn)).mean())
        surplus = (density - self.n_actions).mean().detach()  # entropy is kept at minus the number of actions
        self._descend(self.temperature_optimizer, -self.temperature["log"] * surplus)
        follow(self.targets, self.critics, self.target_rate)

    def _smaller(self, critics: Any, observations: Tensor, actions: Tensor) -> Float[Tensor, " n"]:
        pairs = torch.cat([observations, actions], dim=1)
        return torch.minimum(critics[0](pairs)[:, 0], critics[1](pairs)[:, 0])

    def _descend(self, optimizer: torch.optim.Optimizer, loss: Any) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _read(self, observations: ndarray) -> Float[Tensor, "n width"]:
        return torch.from_numpy(np.asarray(observations, np.float32)) / self.scale

    def state_dict(self) -> dict[str, Any]:
        """Networks, temperature, the three optimizers and the generator."""
        optimizers = ("actor_optimizer", "critic_optimizer", "temperature_optimizer")
        return save(self, ("actor", "critics", "targets", "temperature", *optimizers))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the learner must have been constructed with the same arguments."""
        load(self, state)
