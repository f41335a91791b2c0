"""Bilinear and quadratic saddle points and matrix games, for the solvers of this folder.

A component is a pair of columns of the operator's matrix: one that belongs to the minimising player, one to the
maximising player (for a game: one column and one row of the payoffs).
"""

from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_choice, check_shape, check_symmetric
from locally.equilibrium.halpern.kernels import COORDINATE, Bundle, Components
from locally.equilibrium.halpern.operators import (
    IMPORTANCE,
    UNIFORM,
    CompiledOperator,
    Constants,
    draw_with_replacement,
    draw_without_replacement,
    matrix,
    spectral_norm,
    vector,
)
from locally.equilibrium.halpern.resolvents import Product, Resolvent, ResolventLike, Simplex


class ColumnOperator(CompiledOperator):
    """F(u) = M u + q whose components are pairs of columns of M: one of x's, one of y's.

    Component (i, j) is M[:, i] x_i / p_i + M[:, n_x + j] y_j / p_j + q. With as many x's as y's and uniform sampling
    i = j (a component is one number); otherwise the two are drawn independently, and since a pass costs as much as
    2 n_x n_y / (n_x + n_y) pairs, that is what `n` says.
    """

    def __init__(
        self,
        x_columns: Float[ndarray, "x x_rows"],
        x_offset: int,
        y_columns: Float[ndarray, "y y_rows"],
        y_offset: int,
        shift: Float[ndarray, " dim"],
        resolvent: ResolventLike | None,
        sampling: str,
    ) -> None:
        """`x_columns` holds the columns of M that belong to x as rows, from row `x_offset` of M on; so for y."""
        check_choice("sampling", sampling, (UNIFORM, IMPORTANCE))
        self.nx, self.ny = len(x_columns), len(y_columns)
        self.dim, self.dtype, self._shift = self.nx + self.ny, x_columns.dtype, shift
        if isinstance(resolvent, Resolvent):
            resolvent.pieces(self.dim)
        self.resolvent, self.sampling = resolvent, sampling
        self.n = -(-2 * self.nx * self.ny // (self.nx + self.ny))
        self._paired = sampling == UNIFORM and self.nx == self.ny
        self._chances = [self._probabilities(columns) for columns in (x_columns, y_columns)]
        x_scale, y_scale = (np.divide(1, p, out=np.zeros_like(p), where=p > 0) for p in self._chances)
        none = np.zeros(0, self.dtype)
        self._components = Components(
            Bundle(x_columns, x_scale, x_offset, COORDINATE, 0, none),
            Bundle(y_columns, y_scale, y_offset, COORDINATE, self.nx, none),
            0.0,
        )

    def _probabilities(self, columns: Float[ndarray, "m rows"]) -> Float[ndarray, " m"]:
        squares = np.sum(columns**2, axis=1)
        if self.sampling == UNIFORM or not squares.any():
            squares = np.ones_like(squares)
        return squares / squares.sum()

    def players(self, u: Float[ndarray, " dim"]) -> tuple[Float[ndarray, " x"], Float[ndarray, " y"]]:
        """Views of x and y in u = (x, y)."""
        return u[: self.nx], u[self.nx :]

    def full(self, u: Float[ndarray, " dim"]) -> Float[ndarray, " dim"]:
        out = self._shift.copy()
        for bundle, part in zip(self._components[:2], self.players(u)):
            out[bundle.offset : bundle.offset + bundle.vectors.shape[1]] += part @ bundle.vectors
        return out

    def batch(self, u: Float[ndarray, " dim"], idx: Int[ndarray, "..."]) -> Float[ndarray, " dim"]:
        return self.diff(u, np.zeros_like(u), idx) + self._shift

    def draw(self, rng: np.random.Generator, steps: int, b: int) -> Int[ndarray, "steps b ..."]:
        if self._paired:
            return super().draw(rng, steps, b)
        if self.sampling == UNIFORM:
            b = min(b, self.nx, self.ny)
            sets = [draw_without_replacement(rng, size, steps, b) for size in (self.nx, self.ny)]
        else:
            sets = [draw_with_replacement(rng, p, steps, b) for p in self._chances]
        return np.stack(sets, axis=-1)

    def constants(self) -> Constants:
        return self._constants

    @cached_property
    def _constants(self) -> Constants:
        return Constants(self._lipschitz(), float(np.sqrt(self._expected_square())))

    def _lipschitz(self) -> float:
        M = np.zeros((self.dim, self.dim))
        for bundle in self._components[:2]:
            rows, width = bundle.vectors.shape
            M[bundle.first : bundle.first + rows, bundle.offset : bundle.offset + width] = bundle.vectors
        return spectral_norm(M)

    def _expected_square(self) -> float:
        """L_Q^2 as the top eigenvalue of a 2 x 2 form in (|x|, |y|): exact for games and for paired columns."""
        x, y = self._components[:2]
        begin, end = max(x.offset, y.offset), min(x.offset + x.vectors.shape[1], y.offset + y.vectors.shape[1])
        X, Y = (b.vectors[:, max(begin - b.offset, 0) : max(end - b.offset, 0)] for b in (x, y))  # shared rows of M
        xx, yy = (np.sum(b.vectors**2, axis=1) * b.scale for b in (x, y))
        if self._paired:
            return float(np.max(_top_eigenvalue(xx, np.sum(X * Y, axis=1) * x.scale, yy)))
        # drawn independently: E ||X dx + Y dy||^2 <= max(xx) |dx|^2 + max(yy) |dy|^2 + 2 <E X dx, E Y dy>
        cross = spectral_norm(X @ Y.T) if X.shape[1] else 0.0
        return float(_top_eigenvalue(np.max(xx), cross, np.max(yy)))


class BilinearSaddle(ColumnOperator):
    """min_x max_y <A x, y> + <c, x> - <b, y>: F(x, y) = (A^T y + c, b - A x), u = (x, y).

    Args:
        A: (y, x), float32 or float64; other numbers become float64.
        b: (y,), default 0.  c: (x,), default 0.
        resolvent: the sets that x and y are confined to, None for the whole space.
        sampling: "uniform" (L_Q = sqrt(n) times the largest row or column norm for square A) or "importance", rows and
            columns in proportion to their squared norms (L_Q = ||A||_F).

    Raises:
        ValueError: not a matrix, shapes that do not fit, NaN or infinity, A = 0.
    """

    def __init__(
        self,
        A: Any,
        b: Any = None,
        c: Any = None,
        *,
        resolvent: ResolventLike | None = None,
        sampling: str = UNIFORM,
    ) -> None:
        A = matrix("A", A)
        ny, nx = A.shape
        b, c = vector("b", b, ny, A.dtype), vector("c", c, nx, A.dtype)
        if not A.any():
            raise ValueError("A must not be zero")
        super().__init__(np.ascontiguousarray(-A.T), nx, A, 0, np.concatenate([c, b]), resolvent, sampling)
        self.A, self.b, self.c = A, b, c

    def _lipschitz(self) -> float:
        return spectral_norm(self.A)


class MatrixGame(BilinearSaddle):
    """The zero-sum game min_x max_y <A x, y> over probability vectors x, y; y collects A[i, j] from x.

    >>> game = MatrixGame([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    >>> game.gap(game.uniform_start())
    0.0
    """

    def __init__(self, A: Any, *, sampling: str = UNIFORM) -> None:
        A = matrix("A", A)
        ny, nx = A.shape
        super().__init__(A, resolvent=Product([(Simplex(), nx), (Simplex(), ny)]), sampling=sampling)

    def uniform_start(self) -> Float[ndarray, " dim"]:
        """Both players mix uniformly."""
        return np.repeat(np.array([1 / self.nx, 1 / self.ny], self.dtype), [self.nx, self.ny])

    def value_bounds(self, u: Float[ndarray, " dim"]) -> tuple[float, float]:
        """What y's and x's mixed strategies guarantee: the value of the game lies between."""
        x, y = self.players(u)
        return float((y @ self.A).min()), float((self.A @ x).max())

    def gap(self, u: Float[ndarray, " dim"]) -> float:
        """Duality gap, zero exactly at equilibria."""
        low, high = self.value_bounds(u)
        return high - low


class QuadraticSaddle(ColumnOperator):
    """min_x max_y x^T H x / 2 - <h, x> - <A x - b, y>, the Lagrangian of a quadratic programme with A x = b.

    F(x, y) = (H x - h - A^T y, A x - b), u = (x, y).

    Args:
        H: (x, x), symmetric positive semidefinite.  A: (y, x).  b: (y,).  h: (x,).
        resolvent: sets for x and y, None for the whole space.
        sampling: as for `BilinearSaddle`, over the columns of F's matrix.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity, H not symmetric or not positive semidefinite.
    """

    def __init__(
        self, H: Any, A: Any, b: Any, h: Any, *, resolvent: ResolventLike | None = None, sampling: str = UNIFORM
    ) -> None:
        H, A = matrix("H", H), matrix("A", A)
        check_symmetric("H", H)
        check_shape("A", A, (None, len(H)))
        b, h = vector("b", b, len(A), H.dtype), vector("h", h, len(H), H.dtype)
        lowest, highest = np.linalg.eigvalsh(H)[[0, -1]]
        if lowest < -1e-8 * max(highest, -lowest):
            raise ValueError(f"H must be positive semidefinite, but has the eigenvalue {lowest:.3g}")
        A = A.astype(H.dtype)
        super().__init__(np.hstack([H, A.T]), 0, -A, 0, np.concatenate([-h, -b]), resolvent, sampling)
        self.H, self.A, self.b, self.h = H, A, b, h


def _top_eigenvalue(a: Any, b: Any, c: Any) -> Any:
    """Of [[a, b], [b, c]], elementwise."""
    return (a + c) / 2 + np.sqrt(((a - c) / 2) ** 2 + b**2)
