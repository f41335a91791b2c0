"""Upper bounds on iteration counts as functions of omega: the surrogate costs that the regret bounds speak of.

For the analysis of small systems; all but `near_asymptotic_cost` go through dense spectra, O(n^3). Sources: arXiv
2310.02246; Hackbusch, Iterative Solution of Large Sparse Systems (2016), corollary 3.45; Axelsson, Iterative
Solution Methods (1994), theorem 7.17.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_between, check_positive
from locally.linalg.relaxation import Splitting, sor_residual_map
from locally.linalg.relaxation.splitting import as_csr, check_omega


def near_asymptotic_cost(radius: float, tau: float, rtol: float) -> float:
    """U = 1 + ln(rtol) / ln(rho + tau (1 - rho)), the surrogate cost of SOR at spectral radius rho.

    Args:
        radius: rho(C_omega), in [0, 1); `young_radius` gives it for consistently ordered matrices.
        tau: how far SOR is from its asymptotic rate, in [0, 1); see `asymptocity`.
        rtol: tolerance of the solve, in (0, 1).

    As a function of omega, U falls up to the best omega and rises after it, and is Lipschitz after it, if tau >= 1/e^2
    or the Jacobi radius is at least 4/e^2 (1 - 1/e^2).

    >>> round(near_asymptotic_cost(radius=0.56, tau=0.17, rtol=1e-8), 2)
    41.53
    """
    for name, value in (("radius", radius), ("tau", tau)):
        check_between(name, value, 0.0, 1.0)
        if value == 1.0:
            raise ValueError(f"{name} must be below 1, got {value!r}")
    check_positive("rtol", rtol, below=1.0)
    rate = radius + tau * (1 - radius)
    return 1 + math.log(rtol) / math.log(rate) if rate > 0 else 1.0


def asymptocity(A: Any, omegas: Float[ndarray, " d"], counts: Int[ndarray, " d"]) -> float:
    """Smallest tau with ||C^(k-1)||^(1/(k-1)) <= rho + tau (1 - rho) at every omega, C = C_omega and k its count.

    With it `near_asymptotic_cost` bounds the counts: k - 1 iterations do not reach the tolerance, so rtol <=
    ||C^(k-1)||.
    """
    worst = 0.0
    for omega, count in zip(omegas, counts, strict=True):
        if count <= 1:
            continue
        C = sor_residual_map(A, float(omega))
        radius = float(np.abs(np.linalg.eigvals(C)).max())
        average = float(np.linalg.norm(np.linalg.matrix_power(C, int(count) - 1), 2)) ** (1 / (int(count) - 1))
        worst = max(worst, (average - radius) / (1 - radius))
    return worst


def energy_norm_factor(A: Any, omega: float) -> float:
    """Bound on the factor by which SOR reduces the A-norm of the error in one iteration (Hackbusch).

    A must be positive definite.

    >>> import scipy.sparse as sp
    >>> T = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(9, 9))
    >>> bool(0 < energy_norm_factor(T, 1.5) < 1)
    True
    """
    check_omega(omega)
    scaled = _jacobi_scaled(A)
    lower = np.tril(scaled, -1)
    eigenvalues = np.linalg.eigvalsh(scaled)
    big_omega = 1 / omega - 0.5
    # ||C||_A^2 = 1 - 2 Omega / lambda_max(A^-1 M M^T) with M = I/omega + L in the scaled variables, and
    # M M^T = A/omega + Omega^2 - 1/4 + L L^T. The corollary takes Omega^2 + ||L L^T|| >= 1/4, as on fine grids; where
    # that fails it is the largest eigenvalue of A that bounds.
    excess = big_omega**2 - 0.25 + float(np.linalg.norm(lower, 2)) ** 2
    worst = 1 / omega + excess / float(eigenvalues[0] if excess >= 0 else eigenvalues[-1])
    return math.sqrt(max(1 - 2 * big_omega / worst, 0.0))


def energy_norm_iterations(A: Any, omega: float, rtol: float) -> float:
    """Bound on SOR's iterations from the energy norm: ||r_k|| <= sqrt(kappa) factor^k ||r_0||."""
    check_positive("rtol", rtol, below=1.0)
    factor = energy_norm_factor(A, omega)
    if factor == 0.0:
        return 1.0
    return 1 + math.log(rtol / math.sqrt(_condition(A))) / math.log(factor)


def ssor_cg_iterations(A: Any, omega: float, rtol: float) -> float:
    """Bound on the iterations of SSOR-preconditioned conjugate gradients from x = 0 (Axelsson)."""
    check_omega(omega)
    check_positive("rtol", rtol, below=1.0)
    # with A = D^1/2 S D^1/2 the extreme eigenvalues of D A^-1 and (L D^-1 L^T - D/4) A^-1 are those of the same with S
    scaled = _jacobi_scaled(A)
    lower = np.tril(scaled, -1)
    inverse = np.linalg.inv(scaled)
    mu = float(np.linalg.eigvalsh(inverse)[-1])
    delta = float(np.linalg.eigvals((lower @ lower.T - np.eye(len(scaled)) / 4) @ inverse).real.max())
    smallest = (2 - omega) / (1 + (2 - omega) ** 2 * mu / (4 * omega) + delta * omega)  # of P^-1 A; the largest is 1
    spread = math.sqrt(1 / min(smallest, 1.0))
    if spread == 1.0:
        return 1.0
    amplification = math.sqrt(_condition(A)) / rtol
    return 1 + math.acosh(amplification) / -math.log(1 - 2 / (1 + spread))


def _jacobi_scaled(A: Any) -> Float[ndarray, "n n"]:
    """D^-1/2 A D^-1/2, dense: similar to D^-1 A."""
    split = Splitting.of(A)
    if not split.is_symmetric():
        raise ValueError("A must be symmetric")
    root = 1 / np.sqrt(split.diagonal)
    scaled = root[:, None] * as_csr(A).toarray() * root
    smallest = float(np.linalg.eigvalsh(scaled)[0])
    if smallest <= 0:
        raise ValueError(f"A must be positive definite, but D^-1 A has an eigenvalue {smallest:.3g}")
    return scaled


def _condition(A: Any) -> float:
    eigenvalues = np.linalg.eigvalsh(as_csr(A).toarray())
    return float(eigenvalues[-1] / eigenvalues[0])
