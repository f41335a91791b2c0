"""Differentiable games as the certificate sees them: a pseudo-gradient, its Jacobian, and the players' blocks.

Player i minimises f_i(x_1, ..., x_N) over its own block x_i; F(x) stacks the own gradients, J is its Jacobian.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from locally.checks import check_count, check_finite, check_shape, check_square


class Game(ABC):
    """What a certificate and the dynamics need of a game.

    Attributes:
        block_sizes: dimension of each player's block.
        affine: the Jacobian is the same everywhere, so that one sample is exact.
        local: the Jacobian describes contraction in a metric that varies from point to point, so a certificate holds in
            the small only.
    """

    block_sizes: tuple[int, ...]
    affine: bool = False
    local: bool = False

    @property
    def players(self) -> int:
        """Number of players."""
        return len(self.block_sizes)

    @property
    def dimension(self) -> int:
        """Entries of all players' strategies together."""
        return sum(self.block_sizes)

    @property
    def tangent_sizes(self) -> tuple[int, ...]:
        """Block sizes of the Jacobian; smaller than `block_sizes` where some directions change nothing."""
        return self.block_sizes

    @abstractmethod
    def pseudo_gradient(self, x: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch d"]:
        """F at one or more points."""

    @abstractmethod
    def jacobian(self, x: Float[ndarray, "samples d"]) -> Float[ndarray, "samples t t"]:
        """J at each point."""

    def jacobian_operator(self, x: Float[ndarray, " d"]) -> LinearOperator:
        """J at one point as products with J and its transpose, without forming it where the game can."""
        return aslinearoperator(self.jacobian(x[None])[0])


class QuadraticGame(Game):
    """Costs quadratic in everything: F(x) = H x + c, with an equilibrium at H x = -c.

    Args:
        H: Jacobian of the pseudo-gradient; block (i, j) is d F_i / d x_j. Symmetric for
            potential games only.
        block_sizes: sum to the order of H.
        c: constant part, default 0.

    Raises:
        ValueError: H is not square or not finite, or the sizes do not sum to its order.
    """

    affine = True

    def __init__(
        self, H: Float[ndarray, "d d"], block_sizes: Sequence[int], c: Float[ndarray, " d"] | None = None
    ) -> None:
        check_square("H", H)
        check_finite("H", H)
        self.block_sizes = check_block_sizes(block_sizes, len(H))
        self.H = np.asarray(H, dtype=float)
        self.c = np.zeros(len(H)) if c is None else np.asarray(c, dtype=float)
        check_shape("c", self.c, (len(H),))
        check_finite("c", self.c)

    def pseudo_gradient(self, x: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch d"]:
        return x @ self.H.T + self.c

    def jacobian(self, x: Float[ndarray, "samples d"]) -> Float[ndarray, "samples t t"]:
        return np.broadcast_to(self.H, (len(x), *self.H.shape))

    def equilibrium(self) -> Float[ndarray, " d"]:
        """The zero of F; unique where H is regular (LinAlgError otherwise)."""
        return np.linalg.solve(self.H, -self.c)


class DifferentiableGame(Game):
    """A game written in torch, differentiated automatically.

    Args:
        pseudo_gradient: maps a vector of all players' variables (d,) to F (d,), in torch operations.
        block_sizes: sum to d.
        device: where the Jacobians are computed; points and results travel as NumPy arrays of float64.
        chunk_size: points differentiated at once; None for all.

    >>> import torch
    >>> first = lambda x, y: (x**2 / 2 + 3 * x * y).sum()
    >>> game = DifferentiableGame.from_costs([first, lambda x, y: (y**2).sum()], (1, 1))
    >>> game.pseudo_gradient(np.array([1.0, 2.0]))
    array([7., 4.])
    >>> game.jacobian(np.zeros((1, 2)))[0]
    array([[1., 3.],
           [0., 2.]])
    """

    def __init__(
        self,
        pseudo_gradient: Callable[[Any], Any],
        block_sizes: Sequence[int],
        *,
        device: str = "cpu",
        chunk_size: int | None = None,
    ) -> None:
        self.block_sizes = check_block_sizes(block_sizes, None)
        self.field = pseudo_gradient
        self.device = device
        self.chunk_size = chunk_size

    @classmethod
    def from_costs(
        cls, costs: Sequence[Callable[..., Any]], block_sizes: Sequence[int], **options: Any
    ) -> "DifferentiableGame":
        """From one cost f_i(x_1, ..., x_N) -> scalar for each player; every cost takes all blocks."""
        if len(costs) != len(block_sizes):
            raise ValueError(f"costs must hold one function a player, got {len(costs)} for {len(block_sizes)} blocks")
        import torch

        sizes = list(block_sizes)

        def field(x: Any) -> Any:
            blocks = torch.split(x, sizes)
            return torch.cat([torch.func.grad(cost, argnums=i)(*blocks) for i, cost in enumerate(costs)])

        return cls(field, block_sizes, **options)

    def pseudo_gradient(self, x: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch d"]:
        return self._map(self.field, x.reshape(-1, x.shape[-1])).reshape(x.shape)

    def jacobian(self, x: Float[ndarray, "samples d"]) -> Float[ndarray, "samples t t"]:
        import torch

        return self._map(torch.func.jacfwd(self.field), x)

    def jacobian_operator(self, x: Float[ndarray, " d"]) -> LinearOperator:
        import torch

        point = torch.as_tensor(x, dtype=torch.float64, device=self.device)
        to_torch = lambda v: torch.as_tensor(np.ravel(v), dtype=torch.float64, device=self.device)
        pull_back = torch.func.vjp(self.field, point)[1]
        return LinearOperator(
            (self.dimension, self.dimension),
            matvec=lambda v: torch.func.jvp(self.field, (point,), (to_torch(v),))[1].detach().cpu().numpy(),
            rmatvec=lambda v: pull_back(to_torch(v))[0].detach().cpu().numpy(),
            dtype=np.float64,
        )

    def _map(self, function: Callable[[Any], Any], x: ndarray) -> ndarray:
        import torch

        points = torch.as_tensor(x, dtype=torch.float64, device=self.device)
        return torch.func.vmap(function, chunk_size=self.chunk_size)(points).detach().cpu().numpy()


def check_block_sizes(block_sizes: Sequence[int], dimension: int | None) -> tuple[int, ...]:
    if len(block_sizes) == 0:
        raise ValueError("block_sizes must name at least one player, got none")
    for size in block_sizes:
        check_count("each of block_sizes", size)
    if dimension is not None and sum(block_sizes) != dimension:
        raise ValueError(f"block_sizes must sum to {dimension}, got {tuple(block_sizes)} with sum {sum(block_sizes)}")
    return tuple(int(size) for size in block_sizes)
