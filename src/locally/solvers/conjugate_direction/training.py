"""Training without solutions: the residual after the best step along the network's direction, made small.

Source: arXiv 2205.10763, loss of the training section.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_between, check_count, check_positive, check_shape
from locally.linalg.krylov import Operator
from locally.solvers.conjugate_direction.checkpoint import (
    CheckpointError,
    Metadata,
    read_checkpoint,
    write_checkpoint,
)
from locally.solvers.conjugate_direction.network import DirectionNetwork
from locally.solvers.conjugate_direction.poisson import Domain, PoissonOperator
from locally.solvers.conjugate_direction.ritz import ritz_vectors


def direction_loss(
    A: Operator, r: Float[Tensor, "batch n"], y: Float[Tensor, "batch n"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " batch"]]:
    """Mean of ||r - alpha A y||^2 with alpha = <y, r> / <y, A y>, the step that the solver would take; and alpha.

    0 for y a multiple of A^-1 r, about 1 for a useless y; the scale of y does not matter. Differentiable in y, through
    alpha too. Rows of r are unit vectors.
    """
    Ay = A.apply(y, *A.tensors)
    curvature = (y * Ay).sum(1)
    # a zero y has no step, and where A is singular a constant one has none that rounding leaves: they count as useless
    sizes = torch.linalg.vector_norm(y.detach(), dim=1) * torch.linalg.vector_norm(Ay.detach(), dim=1)
    sound = curvature > torch.finfo(y.dtype).eps * sizes
    alpha = torch.where(sound, (y * r).sum(1) / torch.where(sound, curvature, 1.0), 0.0)
    return (r - alpha[:, None] * Ay).square().sum(1).mean(), alpha


@dataclass(frozen=True, eq=False)
class TrainingSystem:
    """One matrix, and unit residuals (count, n) for it."""

    domain: Domain
    residuals: Float[Tensor, "count n"]

    @classmethod
    def from_ritz(
        cls,
        domain: Domain,
        *,
        steps: int = 400,
        theta: int = 20,
        count: int = 2000,
        boost: float = 9.0,
        rng: np.random.Generator | int | None = None,
        callback: Callable[[int], None] | None = None,
    ) -> "TrainingSystem":
        """Residuals from the Ritz vectors of `steps` Lanczos steps; see `RitzBasis.sample`. The paper: 10000 steps,
        theta 500, 20000 residuals."""
        generator = np.random.default_rng(rng)
        basis = ritz_vectors(domain.matrix(), steps, rng=generator, callback=callback)
        residuals = basis.sample(count, theta=theta, boost=boost, rng=generator)
        return cls(domain, torch.from_numpy(residuals))


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train.

    Args:
        steps: of Adam.
        batch_size: residuals a step.
        learning_rate: at the start; falls linearly to `final_rate` times itself. The paper: 1e-4 throughout.
        clip: largest norm of a gradient.
        validation_share: of each system's residuals, kept out of training; in (0, 1).
        validate_every: steps between validations.

    Raises:
        ValueError, TypeError: out of range.
    """

    steps: int = 2000
    batch_size: int = 10
    learning_rate: float = 1e-3
    final_rate: float = 0.02
    clip: float = 1.0
    validation_share: float = 0.1
    validate_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every"):
            check_count(name, getattr(self, name))
        check_positive("learning_rate", self.learning_rate)
        check_between("final_rate", self.final_rate, 0.0, 1.0)
        check_positive("clip", self.clip)
        check_positive("validation_share", self.validation_share, below=1.0)

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        return self.learning_rate * (1 - (1 - self.final_rate) * min(step / self.steps, 1.0))


@dataclass(frozen=True)
class Progress:
    """What a callback sees after every step."""

    step: int
    steps: int
    loss: float  # of this step's batch
    validation_loss: float | None  # where this step ended in a validation


class Trainer:
    """Adam on `direction_loss`, one system a step in turn. The same seed gives the same weights, resumed or not.

    Args:
        network: trained in place, on its own device and in its own dtype.
        systems: one, as in the paper, or several grids of any sizes.
        config: see `TrainingConfig`.
        seed: of the split and the batches.

    Attributes:
        step: steps made.
        validations: (step, loss on held-out residuals).

    Raises:
        ValueError: no system, another number of axes than the network's, too few residuals to hold some out.
    """

    def __init__(
        self,
        network: DirectionNetwork,
        systems: Sequence[TrainingSystem],
        config: TrainingConfig | None = None,
        *,
        seed: int = 0,
    ):
        self.network, self.config, self.seed = network, config or TrainingConfig(), seed
        if not systems:
            raise ValueError("systems must hold at least one system")
        weight = next(network.parameters())
        self.systems = [self._split(system, index, weight) for index, system in enumerate(systems)]
        self.optimizer = torch.optim.Adam(network.parameters(), lr=self.config.learning_rate)
        self.step = 0
        self.validations: list[tuple[int, float]] = []

    def _split(self, system: TrainingSystem, index: int, like: Tensor) -> "_Split":
        domain = system.domain
        if domain.ndim != self.network.config.ndim:
            raise ValueError(f"systems[{index}] has {domain.ndim} axes, the network {self.network.config.ndim}")
        check_shape(f"systems[{index}].residuals", system.residuals, (None, domain.n))
        count = len(system.residuals)
        held_out = math.ceil(self.config.validation_share * count)
        if held_out >= count:
            raise ValueError(f"systems[{index}] has {count} residuals, too few to hold some out for validation")
        order = np.random.default_rng([self.seed, index]).permutation(count)
        residuals = system.residuals.to(like)[torch.from_numpy(order)]
        fluid = torch.as_tensor(domain.fluid, dtype=like.dtype, device=like.device)
        operator = PoissonOperator(domain, like.dtype, like.device)
        return _Split(domain.shape, fluid, operator, residuals[held_out:], residuals[:held_out])

    def run(self, steps: int | None = None, callback: Callable[[Progress], None] | None = None) -> list[float]:
        """Make `steps` more steps, by default all that are left; returns the batches' losses.

        Raises:
            FloatingPointError: the loss is not finite; the weights are those before that step.
        """
        stop = self.config.steps if steps is None else min(self.step + steps, self.config.steps)
        losses = []
        while self.step < stop:
            losses.append(self._advance())
            self.step += 1
            validation = None
            if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
                validation = self.validate()
                self.validations.append((self.step, validation))
            if callback is not None:
                callback(Progress(self.step, self.config.steps, losses[-1], validation))
        return losses

    def _advance(self) -> float:
        part = self.systems[self.step % len(self.systems)]
        # a generator for each step: a resumed run draws what an uninterrupted one would have
        rng = np.random.default_rng([self.seed, len(self.systems), self.step])
        r = part.train[torch.from_numpy(rng.integers(len(part.train), size=self.config.batch_size))]
        self.optimizer.param_groups[0]["lr"] = self.config.rate(self.step)
        self.optimizer.zero_grad()
        loss = part.loss(self.network, r)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of step {self.step} is {loss.item()}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss on the held-out residuals of all systems."""
        losses = []
        for part in self.systems:
            batches = part.held_out.split(4 * self.config.batch_size)
            total = sum(part.loss(self.network, r).item() * len(r) for r in batches)
            losses.append(total / len(part.held_out))
        return math.fsum(losses) / len(losses)

    def save(self, path: str | Path) -> None:
        """Weights, optimizer and progress, as safetensors; `resume` goes on from there, `load_network` solves."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            if state := self.optimizer.state.get(parameter):
                tensors[f"adam.{name}.exp_avg"] = state["exp_avg"]
                tensors[f"adam.{name}.exp_avg_sq"] = state["exp_avg_sq"]
        metadata = Metadata(self.network.config, self.step, tuple(self.validations), self._origin())
        write_checkpoint(path, tensors, metadata)

    def _origin(self) -> dict[str, Any]:
        return {"grids": [list(part.shape) for part in self.systems], "seed": self.seed}

    def resume(self, path: str | Path) -> None:
        """Take over the state of a checkpoint that a trainer with the same network, seed and grids saved.

        Raises:
            CheckpointError: it is no such checkpoint.
        """
        metadata, tensors = read_checkpoint(path)
        expected = self._origin()
        if metadata.network != self.network.config or metadata.training != expected:
            raise CheckpointError(path, f"was trained as {metadata.network} with {metadata.training}, not {expected}")
        if metadata.steps and not any(name.startswith("adam.") for name in tensors):
            raise CheckpointError(path, "holds weights only; a training run goes on from what Trainer.save wrote")
        weights = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        self.network.load_state_dict(weights)
        self.step, self.validations = metadata.steps, list(metadata.validations)
        if not self.step:
            return
        for name, parameter in self.network.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"adam.{name}.exp_avg"].to(parameter),
                "exp_avg_sq": tensors[f"adam.{name}.exp_avg_sq"].to(parameter),
            }


@dataclass(frozen=True, eq=False)
class _Split:
    """A system on the network's device, its residuals shuffled and split."""

    shape: tuple[int, ...]
    fluid: Tensor
    operator: PoissonOperator
    train: Tensor
    held_out: Tensor

    def loss(self, network: DirectionNetwork, r: Tensor) -> Tensor:
        y = network(r.reshape(-1, *self.shape)) * self.fluid
        return direction_loss(self.operator, r, y.reshape(r.shape))[0]
