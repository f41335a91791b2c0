"""The Newton-KKT matrix [[B, G^T], [G, 0]]: its assembly, the convexity that B needs, and bounds on its conditioning.

Dense matrices get exact eigenvalues; sparse ones sparse factorisations of G G^T and Lanczos; operators Lanczos alone.
Nothing of size (n + m)^2 is formed unless H or G came dense.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import eigvalsh, qr, svdvals
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, cg, eigsh, splu

from locally.optimize.constrained.problem import Matrix, add

SMALL = 300  # sparse matrices up to this size are measured as dense ones
TIGHT = 1000  # largest KKT matrix whose spectrum is computed for the tight bound
PROBES = 32  # random vectors that estimate the Frobenius norm of an operator


class Measured(StrEnum):
    """How the smallest eigenvalue of G G^T became known."""

    DENSE = "dense singular values"
    FACTORISED = "sparse factorisation of G G^T"
    ESTIMATED = "Lanczos estimate"
    GIVEN = "given by the caller"
    NONE = "no constraints"


@dataclass(frozen=True, eq=False)
class NewtonSystem:
    """Gamma z = rhs with what the solver has to know about it.

    Attributes:
        gamma: [[B, G^T], [G, 0]], dense, CSR or an operator.
        B: H, or H + (xi_b + ||H||_F) I where H is not convex enough on the null space of G.
        shifted: whether B differs from H.
        norm: ||Gamma||_F.
        norm_B, norm_H, norm_G: Frobenius norms.
        xi_g: lambda_min(G G^T), 1 without constraints.
        measured: how xi_g became known.
    """

    gamma: Matrix
    B: Matrix
    shifted: bool
    norm: float
    norm_B: float
    norm_H: float
    norm_G: float
    xi_g: float
    measured: Measured

    @property
    def upsilon(self) -> float:
        return max(self.norm_G, self.norm_H, 1.0)

    def a_priori_inverse(self, xi_b: float) -> float:
        """Psi >= ||Gamma^-1||, from norms and the two curvature constants alone; often 10^3 to 10^6 times too large."""
        return 20 * max(self.norm_B**2, 1.0) / (min(self.xi_g, 1.0) * min(xi_b, 1.0))

    def tight_inverse(self) -> float | None:
        """||Gamma^-1||_2 from the spectrum; None where that is not cheap (operators, n + m > 1000)."""
        if isinstance(self.gamma, LinearOperator) or self.gamma.shape[0] > TIGHT:
            return None
        smallest = float(np.abs(eigvalsh(dense(self.gamma))).min())
        return 1 / smallest if smallest > 0 else np.inf


def newton_system(
    H: Matrix,
    G: Matrix,
    *,
    eps_b: float,
    xi_b: float,
    convex: bool = False,
    xi_g: float | None = None,
) -> NewtonSystem:
    """Assemble and measure.

    Args:
        H: Hessian of the Lagrangian, (n, n).
        G: Jacobian, (m, n).
        eps_b: H is shifted where the smallest eigenvalue of Z^T H Z is below, Z an orthonormal basis of null(G).
        xi_b: the shift is (xi_b + ||H||_F) I.
        convex: skip that test; the caller knows that H needs no shift.
        xi_g: a lower bound on lambda_min(G G^T) that the caller knows.
    """
    n, m = H.shape[0], G.shape[0]
    norm_H, norm_G = frobenius(H), frobenius(G) if m else 0.0
    shifted = m < n and not convex and not convex_on_null_space(H, G, eps_b, norm_H)
    B = add_identity(H, xi_b + norm_H) if shifted else H
    norm_B = frobenius(B) if shifted else norm_H
    measured_xi, how = (xi_g, Measured.GIVEN) if xi_g is not None else smallest_of_gram(G)
    norm = float(np.hypot(norm_B, np.sqrt(2) * norm_G))
    return NewtonSystem(saddle(B, G), B, shifted, norm, norm_B, norm_H, norm_G, float(measured_xi), how)


def saddle(B: Matrix, G: Matrix) -> Matrix:
    """[[B, G^T], [G, 0]] as dense as its parts are."""
    n, m = B.shape[0], G.shape[0]
    if isinstance(B, LinearOperator) or isinstance(G, LinearOperator):
        GT = G.T

        def product(v: ndarray) -> ndarray:
            v = v.reshape(n + m, -1)
            return np.concatenate([B @ v[:n] + GT @ v[n:], G @ v[:n]])

        flat = lambda v: product(v).reshape(-1)
        return LinearOperator((n + m, n + m), matvec=flat, rmatvec=flat, matmat=product, rmatmat=product, dtype=float)
    if sp.issparse(B) or sp.issparse(G):
        B, G = sp.csr_array(B), sp.csr_array(G)
        return sp.csr_array(sp.block_array([[B, G.T], [G, None]]) if m else B)
    return np.block([[B, G.T], [G, np.zeros((m, m))]])


def add_identity(H: Matrix, shift: float) -> Matrix:
    n = H.shape[0]
    return H + shift * np.eye(n) if isinstance(H, ndarray) else add(H, shift * sp.eye_array(n, format="csr"))


def dense(A: Any) -> Float[ndarray, "rows columns"]:
    return A.toarray() if sp.issparse(A) else A


def frobenius(A: Matrix) -> float:
    """||A||_F; of an operator with more than SMALL columns Hutchinson's estimate, standard error under 18 %."""
    if isinstance(A, ndarray):
        return float(np.linalg.norm(A))
    if sp.issparse(A):
        return float(np.linalg.norm(A.data))
    columns = A.shape[1]
    if columns <= SMALL:
        return float(np.linalg.norm(A @ np.eye(columns)))
    probes = np.random.default_rng(0).choice([-1.0, 1.0], size=(columns, PROBES))
    return float(np.linalg.norm(A @ probes) / np.sqrt(PROBES))


def smallest_of_gram(G: Matrix) -> tuple[float, Measured]:
    """lambda_min(G G^T), and how it was found; 0 where a factorisation breaks down."""
    m = G.shape[0]
    if m == 0:
        return 1.0, Measured.NONE
    if not isinstance(G, LinearOperator) and (isinstance(G, ndarray) or m <= SMALL):
        return float(svdvals(dense(G))[-1]) ** 2, Measured.DENSE
    if m <= SMALL:
        return float(svdvals(np.asarray(G.T @ np.eye(m)))[-1]) ** 2, Measured.DENSE
    start = np.ones(m)  # ARPACK's own is random
    if sp.issparse(G):
        try:
            return float(eigsh(sp.csc_array(G @ G.T), k=1, sigma=0.0, v0=start)[0][0]), Measured.FACTORISED
        except (RuntimeError, ArpackError):
            return 0.0, Measured.FACTORISED
    gram = LinearOperator((m, m), matvec=lambda v: G @ (G.T @ v), dtype=float)

    def inverse(v: ndarray) -> ndarray:
        y, stopped = cg(gram, np.ravel(v), rtol=1e-6)
        if stopped:
            raise np.linalg.LinAlgError
        return y

    try:
        # Lanczos on the inverse needs few steps where one on G G^T needs thousands; a Ritz value lies above the
        # eigenvalue, so the tolerance and a margin go off it
        inverted = LinearOperator((m, m), matvec=inverse, dtype=float)
        found = eigsh(gram, k=1, sigma=0.0, OPinv=inverted, tol=1e-2, v0=start)[0][0]
        return 0.9 * float(found), Measured.ESTIMATED
    except (ArpackNoConvergence, np.linalg.LinAlgError):
        return 0.0, Measured.ESTIMATED


def convex_on_null_space(H: Matrix, G: Matrix, eps_b: float, norm_H: float) -> bool:
    """Whether the smallest eigenvalue of Z^T H Z is at least eps_b, Z an orthonormal basis of null(G).

    For a Lanczos that does not converge the answer is no: a shift that was not needed costs steps, a missing one the
    descent.
    """
    n, m = H.shape[0], G.shape[0]
    small = n <= SMALL and not isinstance(H, LinearOperator) and not isinstance(G, LinearOperator)
    if small or (isinstance(H, ndarray) and isinstance(G, ndarray)):
        Z = qr(dense(G).T)[0][:, m:] if m else np.eye(n)
        return bool(eigvalsh(Z.T @ dense(H) @ Z)[0] >= eps_b)
    if sp.issparse(H) and gershgorin(H) >= eps_b:
        return True
    project = null_space_projector(G)

    def projected(v: ndarray) -> ndarray:
        inside = project(np.ravel(v))
        # the range of G^T is moved out of the way, above every eigenvalue of H
        return project(H @ inside) + norm_H * (np.ravel(v) - inside)

    operator = LinearOperator((n, n), matvec=projected, dtype=float)
    try:
        found = eigsh(operator, k=1, which="SA", tol=1e-3, v0=np.cos(np.arange(n)), maxiter=20 * n)[0][0]
    except ArpackNoConvergence:
        return False
    return bool(found - 1e-3 * abs(found) >= eps_b)


def smallest_eigenvalue(H: Matrix) -> float:
    """Of a symmetric matrix; where Lanczos does not converge Gershgorin's bound or, of an operator, the norm's."""
    n = H.shape[0]
    if isinstance(H, ndarray) or (sp.issparse(H) and n <= SMALL):
        return float(eigvalsh(dense(H))[0])
    try:
        return float(eigsh(H, k=1, which="SA", tol=1e-3, v0=np.cos(np.arange(n)), maxiter=20 * n)[0][0])
    except ArpackNoConvergence:
        return gershgorin(H) if sp.issparse(H) else -frobenius(H)


def gershgorin(H: Any) -> float:
    """Lower bound on the eigenvalues of a sparse symmetric matrix."""
    diagonal = H.diagonal()
    radius = np.asarray(abs(H).sum(axis=1)).ravel() - np.abs(diagonal)
    return float((diagonal - radius).min())


def null_space_projector(G: Matrix) -> Any:
    """v -> (I - G^T (G G^T)^-1 G) v, by a sparse factorisation or, for an operator, conjugate gradients."""
    if G.shape[0] == 0:
        return lambda v: v
    if isinstance(G, LinearOperator):
        gram = LinearOperator((G.shape[0],) * 2, matvec=lambda y: G @ (G.T @ y), dtype=float)
        return lambda v: v - G.T @ cg(gram, G @ v, rtol=1e-12)[0]
    rows = sp.csc_array(G)
    try:
        solve = splu(sp.csc_array(rows @ rows.T)).solve
    except RuntimeError:  # G has not full rank, which the solver reports from smallest_of_gram
        return lambda v: v
    return lambda v: v - rows.T @ solve(rows @ v)


def equilibration(gamma: Any, rounds: int = 5) -> Float[ndarray, " d"]:
    """d > 0 for which the rows of diag(d) Gamma diag(d) have nearly equal length (Ruiz, 2001); ones for an operator."""
    size = gamma.shape[0]
    scale = np.ones(size)
    if isinstance(gamma, LinearOperator):
        return scale
    squared = gamma.power(2) if sp.issparse(gamma) else gamma**2
    for _ in range(rounds):
        lengths = scale * np.sqrt(squared @ scale**2)
        scale /= np.sqrt(np.where(lengths > 0, lengths, 1.0))
    return scale
