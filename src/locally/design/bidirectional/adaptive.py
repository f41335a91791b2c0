"""What an auxiliary model teaches: how to weigh two losses, and how far to step.

Both are one step of gradient ascent on the auxiliary model's score of where the designs would be after their own next
step (bi-level optimisation with one inner step): `AdaptiveWeight` for the mixture gamma of the two losses,
`AdaptiveRate` for the learning rate of any designer that ascends by gradient. Source: arXiv 2301.02931, Section 4.3
and the learning-rate module Adaptive-eta.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_between, check_finite, check_positive

DECAY_1, DECAY_2, EPSILON = 0.9, 0.999, 1e-8  # Kingma and Ba, arXiv 1412.6980


@dataclass
class Adam:
    """Moments of a gradient and the normalised direction that they give."""

    first: Tensor
    second: Tensor
    steps: int = 0

    @classmethod
    def like(cls, x: Tensor) -> "Adam":
        return cls(torch.zeros_like(x), torch.zeros_like(x))

    def direction(self, gradient: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Take the gradient in; return what is to be subtracted, times the learning rate."""
        self.steps += 1
        self.first = DECAY_1 * self.first + (1 - DECAY_1) * gradient
        self.second = DECAY_2 * self.second + (1 - DECAY_2) * gradient.square()
        mean = self.first / (1 - DECAY_1**self.steps)
        return mean / ((self.second / (1 - DECAY_2**self.steps)).sqrt() + EPSILON)

    def copy(self) -> "Adam":
        return Adam(self.first.clone(), self.second.clone(), self.steps)


@dataclass(frozen=True)
class AdaptiveWeight:
    """gamma of gamma L_f + (1 - gamma) L_b, for each design by itself.

    After one inner step theta' = theta - rate (gamma g_f + (1 - gamma) g_b) the auxiliary score changes with gamma by
    -rate <g_aux, g_f - g_b>; Adam ascends it and the result is clipped to [0, 1].

    Args:
        start: gamma before the first step, in [0, 1].
        rate: of Adam, and of the inner step, > 0.
    """

    start: float = 0.5
    rate: float = 0.1

    def __post_init__(self) -> None:
        check_between("start", self.start, 0, 1)
        check_positive("rate", self.rate)

    def update(
        self,
        gamma: Float[Tensor, " designs"],
        moments: Adam,
        aux: Float[Tensor, "designs *shape"],
        forward: Float[Tensor, "designs *shape"],
        backward: Float[Tensor, "designs *shape"],
    ) -> Float[Tensor, " designs"]:
        """The next gamma; `moments` are advanced. The first step moves gamma by `rate`, whatever the gradient's size.

        Args:
            aux: gradient of the auxiliary model's score, higher is better.
            forward, backward: gradients of the two losses, lower is better.
        """
        descent = (aux * (self.rate * (forward - backward))).flatten(1).sum(1)
        return (gamma - self.rate * moments.direction(descent)).clamp(0, 1)


@dataclass(frozen=True)
class AdaptiveRate:
    """Adaptive-eta: a learning rate for each design, raised where the coming step pleases the auxiliary model.

    One correction of the base rate a step, not accumulated: clip(base - step <g_aux, direction>, bounds), where the
    design is about to become theta - eta * direction.

    Args:
        base: > 0.
        step: outer learning rate, > 0.
        bounds: lowest and highest rate, 0 < lowest <= base <= highest.

    >>> rate = AdaptiveRate()
    >>> rate(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), torch.tensor([[1.0, 1.0], [-1.0, 1.0]])).tolist()
    [0.10000000149011612, 0.12999999523162842]
    """

    base: float = 0.1
    step: float = 0.01
    bounds: tuple[float, float] = (1e-4, 0.5)

    def __post_init__(self) -> None:
        check_positive("base", self.base)
        check_positive("step", self.step)
        low, high = self.bounds
        if not 0 < low <= self.base <= high < float("inf"):
            raise ValueError(f"bounds must satisfy 0 < lowest <= base <= highest, got {self.bounds} and {self.base}")

    def __call__(
        self, aux: Float[Tensor, "designs *shape"], direction: Float[Tensor, "designs *shape"]
    ) -> Float[Tensor, " designs"]:
        return (self.base - self.step * (aux * direction).flatten(1).sum(1)).clamp(*self.bounds)


def adaptive_lr(
    f_aux: Callable[[Tensor], Tensor],
    theta: Float[Tensor, "designs *shape"],
    direction: Float[Tensor, "designs *shape"],
    *,
    base: float = 0.1,
    step: float = 0.01,
    bounds: tuple[float, float] = (1e-4, 0.5),
) -> Float[Tensor, " designs"]:
    """Adaptive-eta for a designer of your own, whose next step is theta - eta * direction.

    One forward and one backward pass of the auxiliary model.

    Args:
        f_aux: theta to one score for each design, (designs,), higher is better; designs do not depend on each other.
        direction: what the optimiser is about to subtract, before it is multiplied by a rate.
        base, step, bounds: as for `AdaptiveRate`.

    Raises:
        ValueError: shapes do not fit, an argument is out of range, or theta or direction hold NaN.

    >>> target = torch.tensor([1.0, 2.0])
    >>> closeness = lambda theta: -(theta - target).square().sum(1)
    >>> toward, away = -torch.ones(1, 2), torch.ones(1, 2)
    >>> [round(adaptive_lr(closeness, torch.zeros(1, 2), d).item(), 3) for d in (toward, away)]
    [0.16, 0.04]
    """
    if theta.shape != direction.shape:
        raise ValueError(f"direction must have theta's shape {tuple(theta.shape)}, got {tuple(direction.shape)}")
    check_finite("theta", theta)
    check_finite("direction", direction)
    rate = AdaptiveRate(base, step, bounds)
    point = theta.detach().requires_grad_()
    with torch.enable_grad():
        scores = f_aux(point)
        if scores.shape != (len(theta),):
            raise ValueError(f"f_aux must return shape ({len(theta)},), got {tuple(scores.shape)}")
        (aux,) = torch.autograd.grad(scores.sum(), point)
    return rate(aux, direction)
