"""Dyna: learn a world model from what happens, learn to act from what the model says would happen."""

from typing import Any

import numpy as np
from numpy import ndarray

from locally.checks import check_choice, check_count
from locally.control.validity import check_generator_state
from locally.control.world_model.learners import Learner, Transitions
from locally.control.world_model.model import WorldModel


class DynaAgent:
    """Each step is learnt from once, by the model and the learner; then the learner plans on imagined steps.

    Imagined steps start from visited states, of which a uniform sample is kept: inputs without outcomes, so the model
    never trains on them again. They are one step long.

    Args:
        learner: acts and learns from transitions.
        model: of the world; None leaves planning out, which is the model-free baseline.
        n_planning: batches of imagined steps after each real one.
        planning_batch: imagined steps a batch; 1 for tables, tens for networks.
        planning_actions: "policy" asks the learner what it would do now, "visited" repeats what was done there.
        learn_from_real: whether the learner sees the real step as well.
        start_memory: how many visited states are kept.
        rng: of the starts, seed or generator.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range.

    Complexity: one model update, and n_planning predictions and learning steps, a real step.

    References: arXiv 2401.13034, section 5; Sutton (1990).

    >>> from locally.control.agents import play
    >>> from locally.control.world_model import Gridworld, LosseWorldModel, TabularQ
    >>> env = Gridworld(4, 4, goal=(3, 0))
    >>> spaces = env.observation_space, env.action_space
    >>> model = LosseWorldModel(*spaces, n_grids=8, scale=3.0, random_state=0)
    >>> agent = DynaAgent(TabularQ(*spaces, rng=0), model, planning_actions="visited", rng=0)
    >>> rewards = play(agent, env, 300, seed=0)
    >>> bool(rewards.sum() > 30)
    True
    """

    def __init__(
        self,
        learner: Any,
        model: WorldModel | None,
        *,
        n_planning: int = 10,
        planning_batch: int = 1,
        planning_actions: str = "policy",
        learn_from_real: bool = True,
        start_memory: int = 10_000,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        if not isinstance(learner, Learner):
            methods = "act, sample, learn, state_dict and load_state_dict"
            raise TypeError(f"learner must have {methods}, got {type(learner).__name__}")
        check_count("n_planning", n_planning, at_least=0)
        check_count("planning_batch", planning_batch)
        check_choice("planning_actions", planning_actions, ("policy", "visited"))
        check_count("start_memory", start_memory)
        self.learner, self.model = learner, model
        self.n_planning, self.planning_batch, self.planning_actions = n_planning, planning_batch, planning_actions
        self.learn_from_real, self.start_memory = learn_from_real, start_memory
        self.rng = np.random.default_rng(rng)
        self.n_steps = 0
        self.starts: ndarray | None = None  # (start_memory, n_observed), and what was done there
        self.done_there: ndarray | None = None

    def act(self, observation: Any) -> Any:
        """What the learner does here."""
        return self.learner.act(observation)

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
        """Learn from the step once, in the model and (unless `learn_from_real` is off) in the learner; then plan."""
        if self.model is not None:
            self.model.update(observation, action, reward, next_observation, terminated)
        if self.learn_from_real:
            step = (
                np.asarray(part)[None] for part in (observation, action, float(reward), next_observation, terminated)
            )
            self.learner.learn(Transitions(*step))
        self._remember(np.asarray(observation), np.asarray(action))
        if self.model is not None and self.model.ready:
            self._plan(self.model)

    def _remember(self, observation: ndarray, action: ndarray) -> None:
        if self.starts is None or self.done_there is None:
            self.starts = np.zeros((self.start_memory, *observation.shape), observation.dtype)
            self.done_there = np.zeros((self.start_memory, *action.shape), action.dtype)
        place = self.n_steps if self.n_steps < self.start_memory else int(self.rng.integers(self.n_steps + 1))
        if place < self.start_memory:
            self.starts[place], self.done_there[place] = observation, action
        self.n_steps += 1

    def _plan(self, model: WorldModel) -> None:
        """All imagined steps are predicted at once; the learner then takes them batch by batch."""
        assert self.starts is not None
        assert self.done_there is not None
        if not self.n_planning:
            return
        kept = min(self.n_steps, self.start_memory)
        rows = self.rng.integers(kept, size=self.n_planning * self.planning_batch)
        starts = self.starts[rows]
        actions = self.done_there[rows] if self.planning_actions == "visited" else self.learner.sample(starts)
        imagined = model.predict(starts, actions)
        parts = (starts, actions, imagined.rewards, imagined.next_observations, imagined.terminated)
        if self.planning_batch == 1:
            self.learner.learn(Transitions(*parts))
            return
        for at in range(0, len(rows), self.planning_batch):
            self.learner.learn(Transitions(*(part[at : at + self.planning_batch] for part in parts)))

    def state_dict(self) -> dict[str, Any]:
        """Learner, model, the sample of visited states and the generator."""
        kept = min(self.n_steps, self.start_memory)
        return {
            "learner": self.learner.state_dict(),
            "model": None if self.model is None else self.model.state_dict(),
            "n_steps": self.n_steps,
            "starts": None if self.starts is None else self.starts[:kept].copy(),
            "done_there": None if self.done_there is None else self.done_there[:kept].copy(),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; the agent must have been constructed with the same arguments.

        Raises:
            ValueError: the state is of an agent with a model and this one has none, or the other way round, or one of
                the agent's parts refuses its own.
        """
        if (state["model"] is None) != (self.model is None):
            raise ValueError("state must be of an agent that has a model where this one does")
        n_steps = int(state["n_steps"])
        starts, done_there = (self._spread_out(name, state[name], n_steps) for name in ("starts", "done_there"))
        check_generator_state(self.rng, state["rng"])
        before = self.learner.state_dict()
        self.learner.load_state_dict(state["learner"])
        if self.model is not None:
            try:
                self.model.load_state_dict(state["model"])
            except Exception:
                self.learner.load_state_dict(before)
                raise
        self.n_steps, self.starts, self.done_there = n_steps, starts, done_there
        self.rng.bit_generator.state = state["rng"]

    def _spread_out(self, name: str, kept: ndarray | None, n_steps: int) -> ndarray | None:
        if kept is None:
            return None
        if len(kept) != min(n_steps, self.start_memory):
            expected = min(n_steps, self.start_memory)
            raise ValueError(f"state must hold {expected} {name} of {n_steps} steps for this agent, got {len(kept)}")
        full = np.zeros((self.start_memory, *kept.shape[1:]), kept.dtype)
        full[: len(kept)] = kept
        return full
