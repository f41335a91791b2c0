"""The method as a torch optimizer, for full-batch training of small networks and other smooth fits.

Curvature comes from `locally.linalg.curvature`: generalised Gauss-Newton, Fisher or empirical Fisher of the model, as a
matrix while it is small and as products otherwise. Source: arXiv 2506.13710.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_count, check_finite, check_positive, check_shape
from locally.linalg.curvature import CurvatureOperator
from locally.optimize.gradient_normalized.method import verdict
from locally.optimize.gradient_normalized.metrics import Diagonal, Euclidean
from locally.optimize.gradient_normalized.oracle import Point
from locally.optimize.gradient_normalized.outcome import Status
from locally.optimize.gradient_normalized.search import search
from locally.optimize.gradient_normalized.systems import CholeskyThenEigen, Krylov, ShiftedSystem


class GNS(torch.optim.Optimizer):
    """One `step(closure)` is one outer iteration: the loss falls, or the parameters stay and `status` says why.

    The closure must be the full-batch loss whose curvature is given, without randomness: a step begins with the value
    and gradient that the last one ended with, unless the parameters have changed since. float64 reaches small
    gradients; float32 works until differences of the loss drown in rounding.

    Args:
        params: those of the curvature, in its order: `model.parameters()` for an operator over all of them.
        curvature: `GaussNewton`, `Fisher`, `EmpiricalFisher` or `Hessian` of the model on the same data.
        gamma0, gamma_min, gamma_max: as for `GradientNormalizedNewton`; gamma0 is a length in parameter space, > 0.
        max_trials: halvings of gamma in a step, at least 1.
        metric: positive diagonal of B, (P,), default ones.
        dense_limit: up to so many parameters the curvature is formed, P^2 numbers, and factorised.
        krylov_rtol: above it, the residual of the step relative to the gradient, in (0, 1).
        max_products: above it, the most products with the curvature in a step, each kept as two vectors; a step cut
            short so is still tested like any other.
        precision: relative accuracy of the loss; default 10 units of rounding of the parameters' dtype.

    Raises:
        ValueError, TypeError: an argument cannot be used, or params are not those of the curvature.

    >>> from locally.linalg.curvature import GaussNewton
    >>> _ = torch.manual_seed(0)
    >>> X = torch.linspace(-2, 2, 50).double()[:, None]
    >>> y, loss = torch.sin(2 * X), torch.nn.MSELoss()
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    >>> optimizer = GNS(model.parameters(), GaussNewton(model, loss, (X, y)))
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     value = loss(model(X), y)
    ...     value.backward()
    ...     return value
    >>> for _ in range(40):
    ...     value = optimizer.step(closure)
    >>> bool(value < 1e-4), optimizer.status is None
    (True, True)
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        curvature: CurvatureOperator,
        *,
        gamma0: float = 1.0,
        gamma_min: float = 1e-9,
        gamma_max: float = 1e50,
        max_trials: int = 40,
        metric: Float[Tensor, " p"] | None = None,
        dense_limit: int = 2000,
        krylov_rtol: float = 1e-6,
        max_products: int = 500,
        precision: float | None = None,
    ) -> None:
        if not isinstance(curvature, CurvatureOperator):
            raise TypeError(f"curvature must be a CurvatureOperator, got {type(curvature).__name__}")
        for name, value in (("gamma0", gamma0), ("gamma_min", gamma_min), ("gamma_max", gamma_max)):
            check_positive(name, value)
        check_count("max_trials", max_trials)
        check_count("dense_limit", dense_limit, at_least=0)
        check_count("max_products", max_products)
        check_positive("krylov_rtol", krylov_rtol, below=1.0)
        if precision is not None:
            check_positive("precision", precision, below=1.0)
        super().__init__(params, {})
        own = dict(curvature.model.named_parameters())
        mine = [p for group in self.param_groups for p in group["params"]]
        if len(mine) != len(curvature.names) or any(p is not own[n] for p, n in zip(mine, curvature.names)):
            raise ValueError("params must be the parameters of the curvature, in its order")
        if metric is not None:
            check_shape("metric", metric, (curvature.shape[0],))
            check_finite("metric", metric)
            if metric.min() <= 0:
                raise ValueError(f"metric must have positive entries, got {float(metric.min()):g}")
        self.curvature = curvature
        self.metric = Euclidean() if metric is None else Diagonal(metric)
        self.gamma_min, self.gamma_max, self.max_trials = gamma_min, gamma_max, max_trials
        self.dense_limit, self.krylov_rtol, self.max_products = dense_limit, krylov_rtol, max_products
        self.precision = 10 * torch.finfo(mine[0].dtype).eps if precision is None else precision
        self.status: Status | None = None
        self.message = ""
        self._mine = mine
        self._accepted: Point | None = None
        # beside the first parameter, so that state_dict carries it
        self.state[mine[0]] = {"gamma": float(gamma0), "steps": 0, "trials": 0}

    @property
    def gamma(self) -> float:
        """The first gamma that the next step tries."""
        return self.state[self._mine[0]]["gamma"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Take one step; `closure` clears the gradients, computes the loss, calls backward and returns the loss.

        Returns:
            The loss before the step. `status` is None while steps succeed; CONVERGED at a zero gradient, SEARCH_FAILED
            or NOT_FINITE where no trial was accepted: parameters and gradients are then those from before.

        Raises:
            ArithmeticError: loss or gradient is not finite at the present parameters, or the curvature is not;
                parameters are left as they are.
        """
        if closure is None:
            raise TypeError("step needs a closure that computes the loss and its gradient again")
        evaluated = torch.enable_grad()(closure)
        x = self._parameters()
        if self._accepted is not None and torch.equal(self._accepted.x, x):
            here = self._accepted
        else:
            value = float(evaluated().detach())
            g = self._gradient()
            if not (math.isfinite(value) and g.isfinite().all()):
                raise ArithmeticError("closure gave a loss or gradient with NaN or infinity at the present parameters")
            here = Point(x, value, g, self.metric.dual_norm(g))
        loss = x.new_tensor(here.f)
        if here.norm == 0:
            self.status, self.message = Status.CONVERGED, "the gradient is zero"
            return loss

        def evaluate(x: Tensor) -> tuple[float, Callable[[], Tensor]]:
            self._write(x)
            value = float(evaluated().detach())
            return value, self._gradient

        state = self.state[self._mine[0]]
        step = None
        try:
            step = search(
                here,
                state["gamma"],
                self._system(here),
                evaluate,
                self.metric,
                max_trials=self.max_trials,
                precision=self.precision,
            )
        finally:  # whatever a trial raised, interruptions included
            if step is None or step.point is None:
                self._write(here.x)
                self._write_gradient(here.g)
        state["trials"] += step.trials
        if step.point is None:
            self.status, self.message = verdict(step)
            return loss
        self._accepted = step.point
        state["steps"] += 1
        state["gamma"] = min(max(2 * step.gamma, self.gamma_min), self.gamma_max)
        self.status, self.message = None, ""
        return loss

    def _system(self, here: Point) -> ShiftedSystem:
        if len(here.g) <= self.dense_limit:
            return CholeskyThenEigen(self.curvature.dense(), self.metric, here.g)

        def product(v: Tensor) -> Tensor:
            self._write(here.x)  # a trial may have moved the parameters
            return self.curvature(v)

        return Krylov(product, self.metric, here.g, rtol=self.krylov_rtol, max_products=self.max_products)

    def _parameters(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self._mine])

    def _gradient(self) -> Tensor:
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self._mine])

    def _write(self, x: Tensor) -> None:
        for p, piece in zip(self._mine, x.split([p.numel() for p in self._mine])):
            p.copy_(piece.view_as(p))

    def _write_gradient(self, g: Tensor) -> None:
        for p, piece in zip(self._mine, g.split([p.numel() for p in self._mine])):
            p.grad = piece.view_as(p).clone()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("GNS holds its curvature and cannot be pickled: save state_dict() instead")
