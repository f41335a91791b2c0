"""Learning rates, momentum and damping from curvature and batch size.

Source: arXiv 2006.09092 for the scaling rules; Polyak (1964) for the optimal heavy ball.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from locally.checks import check_choice, check_count, check_finite, check_nonnegative, check_positive
from locally.linalg.curvature import CurvatureOperator
from locally.linalg.lanczos import ExtremeEigenvalues, Status

RULES = ("sgd", "adam")


def largest_learning_rate(sharpness: float, *, momentum: float = 0.0, averaged: bool = False) -> float:
    """The largest learning rate at which gradient steps on a quadratic of curvature at most `sharpness` do not grow.

    2 (1 + rho) / lambda for the heavy ball v <- rho v + g, w <- w - lr v. Where the momentum is an average,
    v <- rho v + (1 - rho) g as in Adam, 1 / (1 - rho) times as much.

    Args:
        sharpness: lambda > 0, the largest eigenvalue of the Hessian.
        momentum: rho in [0, 1).
        averaged: whether the gradient enters the momentum with weight 1 - rho.

    >>> largest_learning_rate(4.0), largest_learning_rate(4.0, momentum=0.5)
    (0.5, 0.75)
    """
    check_positive("sharpness", sharpness)
    check_momentum(momentum)
    limit = 2 * (1 + momentum) / sharpness
    return limit / (1 - momentum) if averaged else limit


def scale_learning_rate(lr: float, old_batch: int, new_batch: int, *, optimizer: str = "sgd") -> float:
    """The rule of thumb below the knee: in proportion to the batch for SGD, to its square root for Adam and RMSprop.

    `CurvatureReport.scale_learning_rate` says for SGD where the proportion ends.

    >>> scale_learning_rate(0.1, 32, 128), scale_learning_rate(0.1, 32, 128, optimizer="adam")
    (0.4, 0.2)
    """
    check_positive("lr", lr)
    check_count("old_batch", old_batch)
    check_count("new_batch", new_batch)
    check_choice("optimizer", optimizer, RULES)
    return lr * (new_batch / old_batch) ** (1.0 if optimizer == "sgd" else 0.5)


def scale_damping(damping: float, old_batch: int, new_batch: int, *, old_lr: float, new_lr: float) -> float:
    """Damping of a second-order step: the least that keeps it stable is proportional to lr / B.

    >>> scale_damping(1e-2, 32, 64, old_lr=0.1, new_lr=0.1)
    0.005
    """
    check_nonnegative("damping", damping)
    check_count("old_batch", old_batch)
    check_count("new_batch", new_batch)
    check_positive("old_lr", old_lr)
    check_positive("new_lr", new_lr)
    return damping * (new_lr / old_lr) * (old_batch / new_batch)


@dataclass(frozen=True)
class HeavyBall:
    """Learning rate and momentum of x <- x - lr g + momentum (x - x_before)."""

    lr: float
    momentum: float


def optimal_heavy_ball(largest: float, smallest: float) -> HeavyBall:
    """Polyak's learning rate and momentum for curvatures in [smallest, largest]; errors fall like sqrt(momentum)^k.

    >>> ball = optimal_heavy_ball(1.0, 0.01)
    >>> round(ball.lr, 4), round(ball.momentum, 5)
    (3.3058, 0.66942)
    """
    check_positive("smallest", smallest)
    check_positive("largest", largest)
    if smallest > largest:
        raise ValueError(f"smallest = {smallest} is larger than largest = {largest}")
    L, mu = math.sqrt(largest), math.sqrt(smallest)
    return HeavyBall(4 / (L + mu) ** 2, ((L - mu) / (L + mu)) ** 2)


# Adaptive optimizers --------------------------------------------------------------------------------------------------


def preconditioned(
    op: Callable[[Tensor], Tensor], denominator: Float[Tensor, " p"]
) -> Callable[[Float[Tensor, "*k p"]], Float[Tensor, "*k p"]]:
    """D^{-1/2} A D^{-1/2} for D = diag(denominator): symmetric, with the spectrum of D^{-1} A.

    Raises:
        ValueError: an entry of `denominator` is not positive.
    """
    check_finite("denominator", denominator)
    if not (denominator > 0).all():
        raise ValueError(f"denominator must be positive, its smallest entry is {float(denominator.min()):.3g}")
    root = denominator.rsqrt()
    return lambda v: root * op(root * v)


def adam_denominator(optimizer: torch.optim.Optimizer) -> Float[Tensor, " p"]:
    """sqrt(v) + eps of every parameter, bias corrected, in the order of the optimizer's groups.

    Raises:
        ValueError: the optimizer keeps no second moments, or has taken no step yet.
    """
    pieces = []
    for group in optimizer.param_groups:
        if "betas" not in group or "eps" not in group:
            raise ValueError(f"optimizer must keep second moments as Adam does, got {type(optimizer).__name__}")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in state:
                raise ValueError("optimizer has no second moments yet: take a step first")
            correction = 1 - group["betas"][1] ** float(state["step"])
            pieces.append(((state["exp_avg_sq"] / correction).sqrt() + group["eps"]).flatten())
    return torch.cat(pieces)


def largest_adam_learning_rate(
    op: CurvatureOperator,
    optimizer: torch.optim.Optimizer,
    *,
    rtol: float = 1e-3,
    generator: Generator | None = None,
) -> float:
    """The largest stable learning rate of Adam at its present second moments, on the quadratic model `op`.

    2 (1 + beta1) / (1 - beta1) over the largest eigenvalue of D^{-1/2} H D^{-1/2}, D = sqrt(v) + eps. Where eps
    outweighs sqrt(v) this is the limit of SGD scaled by eps, and so is its growth with the batch.

    Args:
        op: curvature on a batch of the size in question, over the parameters of `optimizer` in its order.
        optimizer: one group of parameters of `torch.optim.Adam` or `AdamW`, some steps old.

    Raises:
        ValueError: the optimizer does not fit, or there is no positive curvature.
        ArithmeticError: Lanczos did not converge.
    """
    denominator = adam_denominator(optimizer)
    if len(denominator) != op.shape[0]:
        raise ValueError(f"optimizer holds {len(denominator)} parameters, op is over {op.shape[0]}")
    start = torch.randn(op.shape[0], dtype=op.dtype, device=op.device, generator=generator)
    found = ExtremeEigenvalues(rtol=rtol).solve(preconditioned(op, denominator), start, generator=generator)
    if found.status is not Status.CONVERGED:
        raise ArithmeticError(f"Lanczos on the preconditioned curvature ended with: {found.status}")
    sharpness = float(found.values[0])
    if sharpness <= 0:
        raise ValueError(
            f"op has no positive curvature (largest eigenvalue {sharpness:.3g}): no learning rate is too large"
        )
    return largest_learning_rate(sharpness, momentum=optimizer.param_groups[0]["betas"][0], averaged=True)


def check_momentum(momentum: float) -> None:
    check_nonnegative("momentum", momentum)
    if momentum >= 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}")
