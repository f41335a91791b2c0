"""Logistic regression whose weights obey linear equations and lie on the unit sphere."""

from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from scipy.special import expit

from locally.checks import check_count, check_finite, check_shape
from locally.optimize.constrained.problem import EqualityProblem
from locally.optimize.constrained.problems.instance import Instance

DRAWS = 1000


def constrained_logistic(
    features: Any,
    labels: Float[ndarray, " samples"],
    *,
    equations: int = 10,
    random_state: int | np.random.Generator | None = 0,
) -> Instance:
    """min mean log(1 + exp(-y_i a_i . x)) subject to A x = b and ||x||^2 = 1, with A and b standard normal.

    Equations that have no solution on the sphere are drawn again. The start is all ones, multipliers too. Source:
    experiments of arXiv 2305.18379.

    Args:
        features: (samples, n), an array or a SciPy sparse matrix.
        labels: -1 or 1.
        equations: rows of A, below n.
        random_state: draws A and b.

    Raises:
        ValueError: shapes do not fit, labels are not -1 or 1, features hold NaN, or there are too many equations for
            the sphere.
    """
    data = sp.csr_array(features, dtype=float) if sp.issparse(features) else np.asarray(features, dtype=float)
    check_shape("features", data, (None, None))
    check_finite("features", data.data if sp.issparse(data) else data)
    samples, n = data.shape
    check_shape("labels", labels, (samples,))
    if not np.isin(labels, (-1.0, 1.0)).all():
        raise ValueError("labels must be -1 or 1")
    check_count("equations", equations, at_least=0)
    if equations >= n:
        raise ValueError(f"equations must be below the {n} features, got {equations}")
    rng = np.random.default_rng(random_state)
    A, b = equations_that_meet_the_sphere(equations, n, rng)
    signed = sp.csr_array(sp.diags_array(labels) @ data) if sp.issparse(data) else labels[:, None] * data

    def hess(x: ndarray, lam: ndarray) -> ndarray:
        p = expit(signed @ x)
        weights = p * (1 - p) / samples
        curved = (signed.multiply(weights[:, None]).T @ signed).toarray() if sp.issparse(signed) else None
        H = (signed * weights[:, None]).T @ signed if curved is None else curved
        H[np.diag_indices(n)] += 2 * lam[-1]
        return H

    problem = EqualityProblem(
        n=n,
        m=equations + 1,
        fun=lambda x: float(np.logaddexp(0.0, -(signed @ x)).mean()),
        grad=lambda x: -(signed.T @ expit(-(signed @ x))) / samples,
        constr=lambda x: np.append(A @ x - b, x @ x - 1),
        jac=lambda x: np.vstack([A, 2 * x]),
        hess=hess,
    )
    return Instance("constrained logistic regression", problem, np.ones(n), np.ones(equations + 1))


def equations_that_meet_the_sphere(
    m: int, n: int, rng: np.random.Generator
) -> tuple[Float[ndarray, "m n"], Float[ndarray, " m"]]:
    """Standard normal A and b for which the shortest solution of A x = b is shorter than 1."""
    for _ in range(DRAWS):
        A, b = rng.standard_normal((m, n)), rng.standard_normal(m)
        if np.linalg.norm(np.linalg.lstsq(A, b, rcond=None)[0]) < 1:
            return A, b
    raise ValueError(f"equations must leave solutions on the unit sphere: with {m} of them none of {DRAWS} draws did")
