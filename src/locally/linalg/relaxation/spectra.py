"""Spectral theory of SOR for small or structured matrices: Young's formula and the dense residual map."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_between
from locally.linalg.relaxation.splitting import Splitting, as_csr, check_omega


def jacobi_radius(A: Any) -> float:
    """beta = rho(I - D^-1 A) of a symmetric matrix with positive diagonal, through the dense spectrum: O(n^3).

    >>> import scipy.sparse as sp
    >>> A = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(9, 9))
    >>> bool(np.isclose(jacobi_radius(A), np.cos(np.pi / 10)))
    True
    """
    split = Splitting.of(A)
    if not split.is_symmetric():
        raise ValueError("A must be symmetric")
    root = 1 / np.sqrt(split.diagonal)
    scaled = root[:, None] * as_csr(A).toarray() * root  # similar to D^-1 A, but symmetric
    return float(np.abs(1 - np.linalg.eigvalsh(scaled)).max())


def young_radius(omega: float, beta: float) -> float:
    """rho(C_omega), the asymptotic factor of SOR, from Young's formula.

    Exact for consistently ordered symmetric positive definite A, such as five-point stencils in natural or red-black
    order.

    Args:
        omega: in (0, 2).
        beta: spectral radius of Jacobi's iteration, in [0, 1).

    >>> round(young_radius(1.0, 0.9), 12)  # Gauss-Seidel squares Jacobi
    0.81
    """
    check_omega(omega)
    _check_beta(beta)
    if omega >= optimal_omega(beta):
        return omega - 1
    return (omega * beta + math.sqrt(omega**2 * beta**2 - 4 * (omega - 1))) ** 2 / 4


def optimal_omega(beta: float) -> float:
    """The omega that minimises Young's formula, 1 + (beta / (1 + sqrt(1 - beta^2)))^2.

    >>> round(optimal_omega(math.cos(math.pi / 11)), 6)  # 10 x 10 grid
    1.560388
    """
    _check_beta(beta)
    return 1 + (beta / (1 + math.sqrt(1 - beta**2))) ** 2


def sor_residual_map(A: Any, omega: float) -> Float[ndarray, "n n"]:
    """C_omega = I - A (D/omega + L)^-1, dense: SOR's residuals are r_k = C_omega^k r_0. O(n^3)."""
    check_omega(omega)
    split = Splitting.of(A)
    dense = as_csr(A).toarray()
    M = np.tril(dense, -1) + np.diag(split.diagonal / omega)
    return np.eye(split.n, dtype=split.dtype) - np.linalg.solve(M.T, dense.T).T


def _check_beta(beta: float) -> None:
    check_between("beta", beta, 0.0, 1.0)
    if beta == 1.0:
        raise ValueError("beta must be below 1: Jacobi's iteration, and with it Young's formula, needs a convergent A")
