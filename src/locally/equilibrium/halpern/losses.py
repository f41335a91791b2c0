"""Operators from torch losses: the gradients of two players' losses, example by example, on any device.

For equilibria of models that are written in torch. The solvers then run on tensors of the data's device and dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from locally.checks import check_count, check_finite, check_positive, check_shape
from locally.equilibrium.halpern.operators import Constants, FiniteSumOperator
from locally.equilibrium.halpern.resolvents import Resolvent, ResolventLike

Loss = Callable[..., Tensor]


class TorchOperator(FiniteSumOperator):
    """F(x, y) = (d loss_x / dx, d loss_y / dy); build it with `from_torch`."""

    dtype = None

    def __init__(
        self,
        loss_x: Loss,
        loss_y: Loss | None,
        data: Sequence[Tensor],
        dim_x: int,
        dim_y: int,
        constants: Constants | None,
        cocoercive: bool,
        resolvent: ResolventLike | None,
    ) -> None:
        self.loss_x, self.loss_y, self.data = loss_x, loss_y, tuple(data)
        self.dim_x, self.n, self.dim = dim_x, len(data[0]), dim_x + dim_y
        self._constants, self.cocoercive, self.resolvent = constants, cocoercive, resolvent

    def start(self, u0: Any) -> Float[Tensor, " dim"]:
        if not isinstance(u0, Tensor):
            raise TypeError(f"u0 must be a torch tensor, got {type(u0).__name__}")
        check_shape("u0", u0, (self.dim,))
        if not u0.is_floating_point():
            raise TypeError(f"u0 must be floating point, got {u0.dtype}")
        check_finite("u0", u0)
        return u0.detach().clone()

    def full(self, u: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        return self._gradients(u, self.data)

    def batch(self, u: Float[Tensor, " dim"], idx: Int[ndarray, " b"]) -> Float[Tensor, " dim"]:
        return self._gradients(u, [part[torch.as_tensor(idx, device=part.device)] for part in self.data])

    def constants(self) -> Constants | None:
        return self._constants

    def _gradients(self, u: Tensor, data: Sequence[Tensor]) -> Tensor:
        with torch.enable_grad():
            x = u[: self.dim_x].detach().requires_grad_()
            if self.dim == self.dim_x:
                return torch.autograd.grad(self.loss_x(x, *data), x)[0]
            y = u[self.dim_x :].detach().requires_grad_()
            loss = self.loss_x(x, y, *data)
            if self.loss_y is None:
                of_x, of_y = torch.autograd.grad(loss, (x, y))
                return torch.cat([of_x, -of_y])
            (of_x,) = torch.autograd.grad(loss, x)
            (of_y,) = torch.autograd.grad(self.loss_y(x, y, *data), y)
            return torch.cat([of_x, of_y])


def from_torch(
    loss_x: Loss,
    loss_y: Loss | None = None,
    *,
    data: Tensor | Sequence[Tensor],
    dim_x: int,
    dim_y: int = 0,
    L: float | None = None,
    cocoercive: bool = False,
    resolvent: ResolventLike | None = None,
) -> TorchOperator:
    """The equilibrium condition of two players whose losses are means over the rows of `data`.

    Args:
        loss_x: (x, y, *data) -> mean loss of x over the rows given, a scalar that autograd can follow; (x, *data) where
            dim_y = 0.
        loss_y: the same for y; None for a zero-sum game, whose y maximises loss_x.
        data: one tensor or several of equal length; component i is their i-th rows.
        dim_x, dim_y: numbers of coordinates of the flat vectors x and y; u = (x, y).
        L: a constant that is at once Lipschitz, Lipschitz in expectation and, with `cocoercive`, a cocoercivity
            constant; without it the solvers need L themselves.
        cocoercive: whether the components are cocoercive on average, as gradients of smooth convex losses are.
        resolvent: the problem's own G.

    Raises:
        TypeError, ValueError: data that are not tensors of equal, positive length, sizes or L out of range.

    >>> from locally.equilibrium.halpern import vr_halpern
    >>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [2.0, 0.0]], dtype=torch.float64)
    >>> spread = lambda x, rows: ((x - rows) ** 2).sum(1).mean() / 2
    >>> op = from_torch(spread, data=rows, dim_x=2, L=1.0, cocoercive=True)
    >>> vr_halpern(op, torch.zeros(2, dtype=torch.float64), restart=True, random_state=0).x.round(decimals=4)
    tensor([2., 2.], dtype=torch.float64)
    """
    parts = [data] if isinstance(data, Tensor) else list(data)
    if not parts or not all(isinstance(part, Tensor) and part.ndim for part in parts):
        raise TypeError("data must be one or several torch tensors with at least one dimension")
    if len({len(part) for part in parts}) > 1 or not len(parts[0]):
        raise ValueError(f"data must have equal, positive lengths, got {[len(part) for part in parts]}")
    check_count("dim_x", dim_x)
    check_count("dim_y", dim_y, at_least=0)
    if dim_y == 0 and loss_y is not None:
        raise ValueError("loss_y needs dim_y >= 1, got 0")
    if L is not None:
        check_positive("L", L)
    if isinstance(resolvent, Resolvent):
        resolvent.pieces(dim_x + dim_y)
    constants = None if L is None else Constants(L, L, L if cocoercive else None)
    return TorchOperator(loss_x, loss_y, parts, dim_x, dim_y, constants, cocoercive, resolvent)
