"""Hyper-reduction of local models: evaluate a nonlinear term at a few points, an integral over a few elements.

A Galerkin model of N unknowns whose residual is assembled over the whole mesh is no faster than the full one; each
local basis therefore gets points or elements of its own. `LocalReducedBases(hyper_reduction=...)` calls back for every
cluster. Sources: Q-DEIM, Drmac & Gugercin (2016); empirical cubature by non-negative least squares, Farhat et al.
(2014), as in the reduced models of arXiv 2108.04012.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import nnls

from locally.checks import check_between, check_count, check_finite, check_shape


@dataclass(frozen=True)
class EmpiricalInterpolation:
    """f ~ operator @ f[points], exact for f in the span of the basis.

    Attributes:
        points: (p,) unknowns to evaluate.
        operator: (n_dof, p).
        amplification: the error of the interpolation is at most this factor above the best in the span, >= 1.
    """

    points: Int[ndarray, " p"]
    operator: Float[ndarray, "n_dof p"]
    amplification: float

    def __call__(self, values: Float[ndarray, "p *t"]) -> Float[ndarray, "n_dof *t"]:
        return self.operator @ values


def q_deim(basis: Float[ndarray, "n_dof N"], n_points: int | None = None) -> EmpiricalInterpolation:
    """Points of a basis by QR with column pivoting of its transpose; with more points than modes, least squares.

    Args:
        basis: of the term to interpolate, full column rank; orthonormal columns make `amplification` the bound.
        n_points: N (default) to n_dof. Points beyond N are those where the rows left have the largest leverage.

    >>> f = q_deim(np.linalg.qr(np.vander(np.linspace(-1, 1, 50), 3))[0])
    >>> f(np.linspace(-1, 1, 50)[f.points] ** 2)[:2].round(4)
    array([1.  , 0.92])
    """
    n_dof, N = basis.shape
    p = N if n_points is None else n_points
    check_count("n_points", p, at_least=N)
    if p > n_dof:
        raise ValueError(f"n_points must not exceed the {n_dof} unknowns, got {p}")
    check_finite("basis", basis)
    R, pivots = scipy.linalg.qr(basis.T, mode="r", pivoting=True)
    if n_dof < N or abs(R[N - 1, N - 1]) <= 1e-13 * abs(R[0, 0]):
        raise ValueError("basis must have full column rank")
    points = pivots[:N]
    if p > N:
        leverage = np.einsum("ij,ij->i", basis, np.linalg.solve(basis[points].T @ basis[points], basis.T).T)
        leverage[points] = -np.inf
        points = np.concatenate([points, np.argsort(leverage)[::-1][: p - N]])
    inverse = np.linalg.pinv(basis[points])
    return EmpiricalInterpolation(points, basis @ inverse, float(np.linalg.norm(inverse, 2)))


@dataclass(frozen=True)
class Cubature:
    """integral of g ~ weights @ g[elements].

    Attributes:
        elements, weights: (p,) which elements, and their positive weights.
        relative_residual: over the training integrands, the volume included.
    """

    elements: Int[ndarray, " p"]
    weights: Float[ndarray, " p"]
    relative_residual: float

    def __call__(self, values: Float[ndarray, "p *t"]) -> Any:
        return self.weights @ values


def empirical_cubature(
    integrands: Float[ndarray, "elements q"], weights: Float[ndarray, " elements"], tol: float = 1e-6
) -> Cubature:
    """Few elements with positive weights that integrate the training integrands and the constant as all elements do.

    Args:
        integrands: values of q integrands on the elements (such as the virtual work of residuals on modes).
        weights: (elements,) their full quadrature weights, positive.
        tol: relative error allowed over the integrands, in [0, 1]: directions of less energy are not fitted.

    At most rank + 1 elements carry weight; the non-negative least squares costs O(elements rank^2).

    >>> x = np.linspace(0, 1, 201)
    >>> rule = empirical_cubature(np.vander(x, 4), np.full(201, 1 / 201))
    >>> len(rule.elements) <= 5, bool(abs(rule(x[rule.elements] ** 3) - (x**3).mean()) < 1e-8)
    (True, True)
    """
    check_shape("weights", weights, (integrands.shape[0],))
    check_finite("integrands", integrands)
    check_finite("weights", weights)
    check_between("tol", tol, 0, 1)
    if not (weights > 0).all():
        raise ValueError(f"weights must be positive, the smallest is {weights.min():.3g}")
    # fit in the weighted inner product, where sums over elements are integrals
    root = np.sqrt(weights)[:, None]
    U, s, _ = np.linalg.svd(np.column_stack([integrands, np.ones(len(weights))]) * root, full_matrices=False)
    tail = np.sqrt(np.cumsum((s**2)[::-1])[::-1])
    kept = U[:, : max(int((tail > tol * tail[0]).sum()), 1)] / root
    A = np.vstack([kept.T, np.ones(len(weights))])
    b = A @ weights
    found, residual = nnls(A, b)
    elements = np.flatnonzero(found)
    return Cubature(elements, found[elements], float(residual / np.linalg.norm(b)))
