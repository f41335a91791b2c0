"""All nodes in one process: gradients, attack and mixing of a whole round are a few calls on matrices."""

import copy
import functools
from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from locally.checks import check_count
from locally.training.byzantine.aggregation import Rule
from locally.training.byzantine.attacks import Attack, Sight, tell_lies
from locally.training.byzantine.collaboration import Collaboration, Outcome, Problem, Status

Callback = Callable[[int, Tensor], object]
Flipped = Callable[[], Tensor]  # the honest nodes' mean gradient on wrong labels
Training = Generator[tuple[Tensor, int], tuple[Tensor, Flipped], Outcome]


class Simulation:
    """Simulates a collaboration with at most f of its n nodes faulty.

    Args:
        collaboration: what the nodes do.
        attack: what the faulty ones send; None for silence.
        faulty: how many there are, f by default.

    Memory O(n D); a step costs one batched gradient and two products of an (n x D) matrix with n vectors.

    >>> from locally.training.byzantine import ALIE, Collaboration, ModelProblem, split_dirichlet
    >>> rng = np.random.default_rng(0)
    >>> labels = rng.integers(0, 3, 600)
    >>> inputs = np.eye(3)[labels] + 0.3 * rng.standard_normal((600, 3))
    >>> parts = split_dirichlet(labels, 10, 1.0, rng)
    >>> model = torch.nn.Linear(3, 3).double()
    >>> problem = ModelProblem(model, torch.from_numpy(inputs), torch.from_numpy(labels), parts)
    >>> done = Simulation(Collaboration(n=12, f=2, lr=0.5, beta=0.9), ALIE()).run(problem, steps=60)
    >>> float(problem.accuracies(done.parameters, problem.inputs, problem.labels).min()) > 0.9
    True
    """

    def __init__(
        self, collaboration: Collaboration, attack: Attack | None = None, *, faulty: int | None = None
    ) -> None:
        self.collaboration = collaboration
        self.attack = attack
        self.faulty = collaboration.f if faulty is None else faulty
        check_count("faulty", self.faulty, at_least=0)
        if self.faulty > collaboration.f:
            raise ValueError(f"faulty must be at most f = {collaboration.f}, got {self.faulty}")

    def run(
        self,
        problem: Problem,
        steps: int,
        *,
        callback: Callback | None = None,
        resume: Outcome | None = None,
    ) -> Outcome:
        """Train for `steps` steps, or up to that step from an earlier outcome, as if it had not been interrupted.

        Args:
            problem: data and gradients of the n - faulty honest nodes.
            steps: in all.
            callback: sees (steps done, parameters of the honest nodes); True stops the run.
            resume: of the same collaboration and problem, with fewer steps.
        """
        return run_together([self], problem, steps, callback=callback, resume=None if resume is None else [resume])[0]

    def _steps(self, problem: Problem, steps: int, callback: Callback | None, resume: Outcome | None) -> Training:
        """The training as a coroutine: hands out the parameters of all nodes, is sent their gradients of both kinds."""
        honest = self.collaboration.n - self.faulty
        if resume is None:
            # a row each from the start: nodes that share memory would take each other's steps
            parameters = problem.start().repeat(honest, 1)
            momenta = torch.zeros_like(parameters)
            first, used, spread = 0, 0, []
            attack = copy.deepcopy(self.attack)
        else:
            if resume.momenta is None or len(resume.parameters) != honest:
                raise ValueError(f"resume must be a simulation of {honest} honest nodes")
            parameters, momenta = resume.parameters.clone(), resume.momenta.clone()
            first, used, spread = resume.steps, resume.gradients_used, resume.spread.tolist()
            attack = copy.deepcopy(resume.memory)

        status, done = Status.FINISHED, first
        for step in range(first, steps):
            before = parameters
            gradients, flipped = yield before, step
            try:
                parameters, momenta = self._step(attack, step, before, momenta, gradients, flipped)
            except OverflowError:
                parameters = torch.full_like(before, torch.nan)
            done = step + 1
            used += problem.batch_size(step)
            spread.append(float((parameters - parameters.mean(0)).square().sum(1).mean()))
            if not bool(parameters.isfinite().all()):
                status = Status.DIVERGED
                break
            if callback is not None and callback(done, parameters):
                status = Status.STOPPED if done < steps else Status.FINISHED
                break
        return Outcome(parameters, tuple(range(honest)), status, done, used, np.array(spread), momenta, {}, attack)

    def _step(
        self,
        attack: Attack | None,
        step: int,
        before: Float[Tensor, "H D"],
        momenta: Float[Tensor, "H D"],
        gradients: Float[Tensor, "H D"],
        flipped: Flipped,
    ) -> tuple[Float[Tensor, "H D"], Float[Tensor, "H D"]]:
        """One iteration of the algorithm at all honest nodes: parameters and momenta after it."""
        c = self.collaboration
        if c.gradient_rule is not None:
            gradients = self._exchange(c.gradient_rule, gradients, attack, step, (step, 0, 1), flipped)
        momenta = c.momentum(momenta, gradients)
        parameters = c.half_step(before, momenta, step)
        for k in range(c.rounds):
            if not bool(parameters.isfinite().all()):
                break
            wrong_step = lambda: c.learning_rate(step) * flipped()
            parameters = self._exchange(c.mixing, parameters, attack, step, (step, k), wrong_step)
        return parameters, momenta

    def _exchange(
        self,
        rule: Rule,
        honest: Float[Tensor, "H D"],
        attack: Attack | None,
        step: int,
        exchange: tuple[int, ...],
        flipped: Flipped,
    ) -> Float[Tensor, "H D"]:
        c = self.collaboration
        rng = np.random.default_rng([c.seed, 1, *exchange])
        sight = Sight(honest, self.faulty, step, rule.damage(honest, self.faulty), flipped, rng)
        lies = tell_lies(attack, sight)
        heard = c.heard(len(honest), exchange, silent=lies is None)
        pool, heard = pool_of(honest, lies, heard)
        return rule.mix(pool, heard, np.arange(len(honest)))


def run_together(
    simulations: Sequence[Simulation],
    problem: Problem,
    steps: int,
    *,
    callback: Callback | None = None,
    resume: Sequence[Outcome] | None = None,
) -> list[Outcome]:
    """Several simulations on one problem, step by step, so that one batched call gives the gradients of all.

    Arguments and results as for `Simulation.run`, one for each; on small models many times as fast as one by one.
    """
    check_count("steps", steps)
    earlier: Sequence[Outcome | None] = [None] * len(simulations) if resume is None else resume
    running = {k: s._steps(problem, steps, callback, e) for k, (s, e) in enumerate(zip(simulations, earlier))}
    outcomes: dict[int, Outcome] = {}
    asked: dict[int, tuple[Tensor, int]] = {}
    misled: set[int] = set()  # simulations whose adversary has asked for gradients on wrong labels

    def advance(k: int, sent: tuple[Tensor, Flipped] | None) -> None:
        try:
            asked[k] = next(running[k]) if sent is None else running[k].send(sent)
        except StopIteration as stop:
            outcomes[k] = stop.value
            asked.pop(k, None)

    for k in running:
        advance(k, None)
    while asked:
        step = min(step for _, step in asked.values())
        now = {k: parameters for k, (parameters, at) in asked.items() if at == step}
        wrong: dict[int, Tensor] = {}

        def flipped(k: int, step: int = step, now: dict[int, Tensor] = now, wrong: dict[int, Tensor] = wrong) -> Tensor:
            if k not in wrong:  # the first to ask gets those that asked in earlier steps theirs as well
                misled.add(k)
                found = gradients_of_all(problem, {j: now[j] for j in now if j in misled}, step, flipped=True)
                wrong.update({j: gradients.mean(0) for j, gradients in found.items()})
            return wrong[k]

        for k, gradients in gradients_of_all(problem, now, step).items():
            advance(k, (gradients, functools.partial(flipped, k)))
    return [outcomes[k] for k in range(len(simulations))]


def gradients_of_all(
    problem: Problem, parameters: dict[int, Tensor], step: int, *, flipped: bool = False
) -> dict[int, Tensor]:
    """Of the honest nodes of every simulation, in one call."""
    nodes = [node for own in parameters.values() for node in range(len(own))]
    found = problem.gradients(torch.cat(list(parameters.values())), step, nodes, flipped=flipped)
    return dict(zip(parameters, found.split([len(own) for own in parameters.values()])))


def pool_of(
    honest: Float[Tensor, "H D"], lies: Tensor | None, heard: Bool[ndarray, "H n"]
) -> tuple[Float[Tensor, "P D"], Bool[ndarray, "H P"]]:
    """All vectors under way, and who hears which: lies told to one node alone take rows that nobody else hears."""
    H = len(honest)
    if lies is None:
        return honest, heard[:, :H]
    if lies.ndim == 2:
        return torch.cat([honest, lies]), heard
    f = lies.shape[1]
    own = np.zeros((H, H, f), dtype=bool)
    own[np.arange(H), np.arange(H)] = heard[:, H:]
    return torch.cat([honest, lies.reshape(H * f, -1)]), np.concatenate([heard[:, :H], own.reshape(H, H * f)], axis=1)
