"""General linear representations by a growing penalty on gaps (arXiv 2205.15196, constrained risk minimisation).

Variables are a basis M of the row space of Phi and a head w on it. Gaps are measured through the projector
P = M' (M M')^-1 M, so that they belong to the space and not to the basis, and rescaling M cannot make them small. All
of it in covariates whitened by their pooled moments: a mixture of the covariates then has the same gaps, and the square
of a gap is about the risk that another head on the representation could save there.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize

from locally.causal.invariance.moments import EnvironmentMoments, SingularCovariance
from locally.causal.invariance.search import COLLINEAR

PENALTIES = 10.0 ** np.arange(7)
MARGIN = 0.95  # a finite penalty leaves gaps slightly above the level it aims at


def penalised_representation(
    moments: EnvironmentMoments,
    rank: int,
    eps: float,
    restarts: int,
    max_iter: int,
    rng: np.random.Generator,
) -> tuple[Float[ndarray, "r d"], Float[ndarray, " r"]]:
    """Phi with Phi S Phi' = I for the pooled S, and its head.

    Of all restarts the one of least mean risk that meets eps, or else the one of least gap. Where the moments hold a
    constant, the first row of Phi is that coordinate and `rank` counts the others.
    """
    moments, whiten = _whitened(moments)
    best: tuple[tuple[bool, float], Float[ndarray, "r d"], Float[ndarray, " r"]] | None = None
    for attempt in range(restarts):
        M, w = _start(moments, rank, None if attempt == 0 else rng)
        for penalty in PENALTIES:
            M, w = _minimise(moments, M, w, MARGIN * eps, float(penalty), max_iter)
        Phi = M
        if moments.has_constant:
            Phi = np.zeros((rank + 1, M.shape[1] + 1))
            Phi[0, 0], Phi[1:, 1:] = 1.0, M
        gap = float(moments.gaps(Phi, w).max())
        met = gap <= eps
        key = (not met, float(moments.risks(Phi.T @ w).mean()) if met else gap)
        if best is None or key < best[0]:
            best = key, Phi, w
    assert best is not None
    return best[1] @ whiten, best[2]


def penalised_risk(
    moments: EnvironmentMoments,
    M: Float[ndarray, "k d"],
    w: Float[ndarray, " r"],
    eps: float,
    penalty: float,
) -> tuple[float, Float[ndarray, "k d"], Float[ndarray, " r"]]:
    """Mean risk + penalty * sum_e max(0, gap_e - eps)^2, and its gradients in M and w.

    w starts with the weight of the constant where there is one, on which M does not act. O(N d^2).
    """
    c = int(moments.has_constant)
    v = np.concatenate([w[:c], M.T @ w[c:]])
    g = moments.gradients(v)
    inverse = np.linalg.pinv(M @ M.T, hermitian=True)  # a step may leave M short of its rank
    along = g[:, c:] @ M.T @ inverse  # coordinates of the projected gradients
    projected = g.copy()
    projected[:, c:] = along @ M
    gaps = np.sqrt((projected**2).sum(axis=1))
    over = np.maximum(gaps - eps, 0)
    value = moments.risks(v).mean() + penalty * (over**2).sum()

    weight = np.divide(over, gaps, out=np.zeros_like(gaps), where=gaps > 0)  # d over^2 = weight * d gap^2
    by_v = 2 * g.mean(axis=0) + 2 * penalty * np.einsum("n,nij,nj->i", weight, moments.xx, projected)
    off = (g - projected)[:, c:]
    by_space = 2 * penalty * (along * weight[:, None]).T @ off
    return float(value), np.outer(w[c:], by_v[c:]) + by_space, np.concatenate([by_v[:c], M @ by_v[c:]])


def _whitened(moments: EnvironmentMoments) -> tuple[EnvironmentMoments, Float[ndarray, "d d"]]:
    """The moments of W x, and W, which makes the pooled moments the identity; the constant stays as it is.

    Raises:
        SingularCovariance: the pooled covariance has no inverse.
    """
    S = moments.pooled()[0]
    values, vectors = np.linalg.eigh(S)
    if values[0] < COLLINEAR * values[-1]:
        raise SingularCovariance("columns of X depend on each other linearly: leave some out")
    W = (vectors / np.sqrt(values)) @ vectors.T
    return replace(moments, xx=W @ moments.xx @ W.T, xy=moments.xy @ W.T), W


def _minimise(
    moments: EnvironmentMoments,
    M: Float[ndarray, "k d"],
    w: Float[ndarray, " r"],
    eps: float,
    penalty: float,
    max_iter: int,
) -> tuple[Float[ndarray, "k d"], Float[ndarray, " r"]]:
    """L-BFGS at one weight of the penalty; the basis comes back orthonormal."""
    size = M.size

    def objective(flat: Float[ndarray, " n"]) -> tuple[float, Float[ndarray, " n"]]:
        value, by_M, by_w = penalised_risk(moments, flat[:size].reshape(M.shape), flat[size:], eps, penalty)
        scale = 1 / max(1.0, penalty)
        return value * scale, np.concatenate([by_M.ravel(), by_w]) * scale

    start = np.concatenate([M.ravel(), w])
    options = {"maxiter": max_iter, "ftol": 1e-15, "gtol": 1e-12}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    moved, head = found.x[:size].reshape(M.shape), found.x[size:]
    Q, R = np.linalg.qr(moved.T)
    c = int(moments.has_constant)
    return Q.T, np.concatenate([head[:c], R @ head[c:]])


def _start(
    moments: EnvironmentMoments, rank: int, rng: np.random.Generator | None
) -> tuple[Float[ndarray, "k d"], Float[ndarray, " r"]]:
    """A random space, or without rng the one of pooled least squares and the directions in which gradients vary least;
    the head is pooled least squares on it.
    """
    c = int(moments.has_constant)
    S, s, _ = moments.pooled()
    v = np.linalg.lstsq(S, s, rcond=None)[0]
    d = len(v) - c
    if rng is not None:
        M = np.linalg.qr(rng.standard_normal((d, rank)))[0].T
    else:
        g = moments.gradients(v)[:, c:]
        quiet = np.linalg.eigh(g.T @ g)[1]
        M = np.linalg.qr(np.column_stack([v[c:], quiet[:, : rank - 1]]))[0].T
    Phi = np.zeros((rank + c, d + c))
    Phi[:c, :c], Phi[c:, c:] = 1.0, M
    return M, np.linalg.lstsq(Phi @ S @ Phi.T, Phi @ s, rcond=None)[0]
