"""The largest learning rate at which training survives, found by trying: one network under many rates at once.

The measurement that arXiv 2006.09092 holds its rules against. All rates and repetitions step together through
`torch.func.vmap`, on the same batches, so that a sweep costs little more than its arithmetic.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, vmap

from locally.checks import check_between, check_choice, check_count, check_positive
from locally.linalg.curvature import Batch

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sweep:
    """Losses over all the data after training at each learning rate; infinite where they overflowed.

    Attributes:
        rates: ascending.
        losses: one row a repetition.
    """

    rates: Float[Tensor, " rates"]
    losses: Float[Tensor, "repetitions rates"]

    def largest_stable(self, threshold: float) -> float:
        """The largest rate whose mean loss over repetitions stays at or below `threshold`; NaN if none does."""
        stable = self.losses.mean(0) <= threshold
        return float(self.rates[stable].max()) if stable.any() else math.nan


@dataclass(frozen=True, kw_only=True)
class LearningRateSweep:
    """Trains copies of a small network at every learning rate of a list.

    Args:
        optimizer: "sgd" or "adam".
        steps: of each training, >= 1.
        momentum: of SGD, in [0, 1).
        betas, epsilon: of Adam.

    Raises:
        ValueError: an argument is out of range.
    """

    optimizer: str = "sgd"
    steps: int = 200
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, ("sgd", "adam"))
        check_count("steps", self.steps)
        check_between("momentum", self.momentum, 0, math.nextafter(1, 0))
        for name, beta in zip(("betas[0]", "betas[1]"), self.betas):
            check_between(name, beta, 0, math.nextafter(1, 0))
        check_positive("epsilon", self.epsilon)

    def run(
        self,
        model: nn.Module,
        loss: Loss,
        data: Batch,
        rates: Sequence[float],
        batch_size: int,
        *,
        generators: Sequence[Generator],
        starts: Float[Tensor, "repetitions p"] | None = None,
        callback: Callable[[int], None] | None = None,
    ) -> Sweep:
        """Train from the model's parameters, or from `starts`, on batches drawn without replacement.

        The model itself stays as it is.

        Args:
            data: all examples, (inputs, targets).
            rates: learning rates > 0.
            batch_size: in [1, number of examples].
            generators: draw the batches, one for each repetition; these do not influence each other.
            starts: flat parameters for each repetition.
            callback: called with the number of steps done.
        """
        inputs, targets = data
        if not isinstance(inputs, Tensor):
            raise TypeError(f"data must hold one tensor of inputs, got {type(inputs).__name__}")
        if not rates:
            raise ValueError("rates must name at least one learning rate")
        for rate in rates:
            check_positive("rates", rate)
        check_count("batch_size", batch_size)
        if batch_size > len(targets):
            raise ValueError(f"batch_size must be at most the {len(targets)} examples of data, got {batch_size}")
        ordered = torch.tensor(sorted(rates), dtype=torch.float64)
        flat = nn.utils.parameters_to_vector(model.parameters()).detach()
        lr = ordered.to(flat)[None, :, None]
        repetitions, copies = len(generators), len(rates)
        if not repetitions:
            raise ValueError("generators must hold at least one, for one repetition")
        if starts is None:
            starts = flat.expand(repetitions, -1)
        if starts.shape != (repetitions, len(flat)):
            raise ValueError(f"starts must have shape ({repetitions}, {len(flat)}), got {tuple(starts.shape)}")
        theta = starts[:, None].repeat(1, copies, 1)

        at = loss_of_parameters(model, loss)
        every = vmap(grad(at))

        def gradient(rows: Tensor) -> Tensor:
            # one flat stack of networks: nested ones would pay for every operation twice
            examples = (t[rows].repeat_interleave(copies, 0) for t in (inputs, targets))
            return every(theta.flatten(0, 1), *examples).view_as(theta)

        with torch.no_grad():
            first, second = torch.zeros_like(theta), torch.zeros_like(theta)
            for step in range(1, self.steps + 1):
                drawn = [torch.randperm(len(targets), generator=g)[:batch_size] for g in generators]
                g = gradient(torch.stack(drawn).to(targets.device))
                if self.optimizer == "sgd":
                    first = g if not self.momentum else first.mul_(self.momentum).add_(g)
                    theta -= lr * first
                else:
                    b1, b2 = self.betas
                    first.mul_(b1).add_(g, alpha=1 - b1)
                    second.mul_(b2).addcmul_(g, g, value=1 - b2)
                    root = (second / (1 - b2**step)).sqrt_().add_(self.epsilon)
                    theta -= lr / (1 - b1**step) * first / root
                if callback is not None:
                    callback(step)
            losses = torch.stack([vmap(at, in_dims=(0, None, None))(t, inputs, targets) for t in theta])
        return Sweep(ordered, losses.double().nan_to_num(nan=math.inf, posinf=math.inf).cpu())


def loss_of_parameters(model: nn.Module, loss: Loss) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss on a batch as a function of the flat parameters."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def at(theta: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        values = {n: part.view(p.shape) for (n, p), part in zip(named.items(), theta.split(sizes))}
        return loss(functional_call(model, values, (inputs,)), targets)

    return at
