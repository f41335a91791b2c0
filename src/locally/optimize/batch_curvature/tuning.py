"""Learning rate and momentum learnt on the fly: Polyak's optimal heavy ball for the curvature of the present batch.

Source: arXiv 2006.09092, the learner by stochastic Lanczos quadrature; the safeguards are ours.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from locally.checks import check_between, check_choice, check_count, check_positive
from locally.linalg.curvature import Batch, Data
from locally.linalg.lanczos import SpectralMeasure, spectral_measure
from locally.optimize.batch_curvature.measuring import MATRICES
from locally.optimize.batch_curvature.rules import optimal_heavy_ball

Loss = Callable[[Tensor, Tensor], Tensor]


class TuningStatus(StrEnum):
    """What one call of `CurvatureTuner.step` did; set by it, read from `Tuning.status`."""

    UPDATED = "updated"
    LIMITED = "updated, by no more than the largest change allowed"
    WAITING = "between two measurements"  # nothing was measured, nothing set
    NOT_FINITE = "left alone: the curvature is not finite"
    NOT_CONVEX = "left alone: no positive curvature"


@dataclass(frozen=True)
class Tuning:
    """What one call of `CurvatureTuner.step` saw and set.

    Attributes:
        status: whether learning rate and momentum were set.
        lr, momentum: in force from now on, of the first group.
        largest, smallest: curvatures L and mu that they follow from; NaN where none were measured.
    """

    status: TuningStatus
    lr: float
    momentum: float
    largest: float = math.nan
    smallest: float = math.nan


class CurvatureTuner:
    """Sets learning rate and momentum of SGD from the spectrum of the loss on the batch at hand.

    Every `every` calls, `steps` Lanczos steps give the largest curvature L and a small positive one mu, and Polyak's
    formulas the heavy ball for them: lr = 4 / (sqrt L + sqrt mu)^2, momentum = ((sqrt L - sqrt mu) / (sqrt L + sqrt
    mu))^2. A batch overstates L, which is on the safe side. Costs `steps` products, of 2 to 3 gradients each.

    Args:
        optimizer: `torch.optim.SGD` or anything whose groups have "lr" and "momentum".
        model, loss: the network that it trains, and the mean over examples.
        every: calls from one measurement to the next, >= 1.
        steps: Lanczos steps, >= 2.
        damping: factor on Polyak's learning rate, in (0, 1]: the loss is no quadratic.
        max_momentum: in [0, 1).
        max_change: a learning rate changes by no more than this factor a measurement, > 1.
        quantile: None takes as mu the smallest Ritz value outside the bulk around zero, whose half width the most
            negative one shows; q in (0, 1) the q-quantile of the positive spectral mass.
        matrix: "hessian" or "gauss-newton".
        mode: "eval" measures with running statistics and without dropout, "train" with batch norm as it trains; the
            model's own mode is back afterwards.
        random_state: seed of the probes.
        options: further keyword arguments of the curvature operator.

    Raises:
        ValueError, TypeError: the optimizer has no momentum, or an argument is out of range.

    >>> w = nn.Linear(2, 1, bias=False)
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 0.1]])
    >>> optimizer = torch.optim.SGD(w.parameters(), lr=3.0, momentum=0.9)
    >>> tuner = CurvatureTuner(optimizer, w, nn.MSELoss(), steps=2, damping=1.0)
    >>> tuned = tuner.step((X, torch.zeros(2, 1)))  # curvatures 1 and 0.01
    >>> str(tuned.status), round(tuned.lr, 4), round(tuned.momentum, 5)
    ('updated', 3.3058, 0.66942)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        loss: Loss,
        *,
        every: int = 100,
        steps: int = 20,
        damping: float = 0.5,
        max_momentum: float = 0.99,
        max_change: float = 2.0,
        quantile: float | None = None,
        matrix: str = "hessian",
        mode: str = "eval",
        random_state: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        check_count("every", every)
        check_count("steps", steps, at_least=2)
        check_between("damping", damping, 0, 1)
        check_positive("damping", damping)
        check_between("max_momentum", max_momentum, 0, 1)
        check_positive("1 - max_momentum", 1 - max_momentum)
        check_positive("max_change - 1", max_change - 1)
        if quantile is not None:
            check_positive("quantile", quantile, below=1)
        check_choice("matrix", matrix, tuple(MATRICES))
        check_choice("mode", mode, ("eval", "train"))
        check_count("random_state", random_state, at_least=0)
        if any("momentum" not in group for group in optimizer.param_groups):
            raise ValueError(f"optimizer must have momentum as SGD has, got {type(optimizer).__name__}")
        self.optimizer, self.model, self.loss = optimizer, model, loss
        self.every, self.steps, self.damping = every, steps, damping
        self.max_momentum, self.max_change, self.quantile = max_momentum, max_change, quantile
        self.matrix, self.mode, self.random_state = matrix, mode, random_state
        self.options = options or {}
        self.calls = 0

    def step(self, batch: Batch) -> Tuning:
        """Call before each step of the optimizer with the batch that it will see, (inputs, targets).

        Raises:
            ValueError, TypeError: the batch or the model cannot be used, as for `CurvatureOperator`.
        """
        due = self.calls % self.every == 0
        self.calls += 1
        if not due:
            return self._report(TuningStatus.WAITING)
        try:
            spectrum = self.spectrum(batch)
        except ArithmeticError:
            return self._report(TuningStatus.NOT_FINITE)
        decay = float(self.optimizer.param_groups[0].get("weight_decay", 0.0))  # adds to every curvature
        largest = spectrum.largest + decay
        if largest <= 0:
            return self._report(TuningStatus.NOT_CONVEX, largest)
        smallest = min(smallest_curvature(spectrum, self.quantile) + decay, largest)
        ball = optimal_heavy_ball(largest, smallest)
        limited = False
        for group in self.optimizer.param_groups:
            low, high = group["lr"] / self.max_change, group["lr"] * self.max_change
            wanted = self.damping * ball.lr
            group["lr"] = min(max(wanted, low), high)
            group["momentum"] = min(ball.momentum, self.max_momentum)
            limited |= group["lr"] != wanted
        return self._report(TuningStatus.LIMITED if limited else TuningStatus.UPDATED, largest, smallest)

    def spectrum(self, data: Data) -> SpectralMeasure:
        """Quadrature of the curvature at the present parameters, from one probe that differs from call to call."""
        with model_mode(self.model, training=self.mode == "train"):
            options = {"batch_statistics": self.mode == "train"} | self.options
            op = MATRICES[self.matrix](self.model, self.loss, data, **options)
            seed = torch.Generator(op.device).manual_seed(self.random_state + self.calls)
            return spectral_measure(op, steps=self.steps, probes=1, generator=seed)

    def state_dict(self) -> dict[str, int]:
        """What a resumed training needs beside the optimizer's state."""
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken; the optimizer's state is restored apart."""
        check_count("calls", state["calls"], at_least=0)
        self.calls = state["calls"]

    def _report(self, status: TuningStatus, largest: float = math.nan, smallest: float = math.nan) -> Tuning:
        first = self.optimizer.param_groups[0]
        return Tuning(status, float(first["lr"]), float(first["momentum"]), largest, smallest)


def smallest_curvature(spectrum: SpectralMeasure, quantile: float | None) -> float:
    """mu: a positive curvature that is not noise.

    Sampling noise spreads the bulk as far above zero as below, so a Ritz value larger than the most negative one is
    large stands outside it. At worst that is the largest curvature itself.
    """
    seen = spectrum.weights > 0
    nodes, weights = spectrum.nodes[seen], spectrum.weights[seen]
    floor = max(-float(nodes.min()), 1e-6 * float(nodes.max())) if quantile is None else 0.0
    above = nodes > floor
    if not above.any():
        return max(float(nodes.max()), floor)
    nodes, weights = nodes[above], weights[above]
    if quantile is None:
        return float(nodes.min())
    order = nodes.argsort()
    mass = weights[order].cumsum(0)
    return float(nodes[order][int(torch.searchsorted(mass, quantile * mass[-1]))])


@contextmanager
def model_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode for a while, every module's own afterwards."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was
