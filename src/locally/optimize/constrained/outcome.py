"""What a constrained solve returns, and how it may end."""

from dataclasses import dataclass
from enum import StrEnum

from jaxtyping import Float
from numpy import ndarray


class Status(StrEnum):
    """How a solve ended; set by every solver of this room, read from `Solution.status`."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    RANK_DEFICIENT = "the Jacobian of the constraints is rank-deficient"
    NOT_FINITE = "a function returned NaN or infinity"
    UNBOUNDED = "the objective seems unbounded below on the constraints"
    LINE_SEARCH_FAILED = "the line search found no decrease"
    NOT_DESCENT = "no penalty parameters within their limits make the step a descent direction"
    INNER_FAILED = "the Newton system could not be solved to the accuracy that the step needs"
    STOPPED = "stopped by the callback"

    @property
    def code(self) -> int:
        """0 for convergence, as SciPy has it, then in the order above."""
        return list(Status).index(self)


@dataclass(frozen=True, eq=False, kw_only=True)
class Solution:
    """The last good iterate, how the solve ended, and how it went.

    Attributes:
        x, lam: primal and dual point.
        fun, constr: f(x) and c(x).
        kkt: ||(grad_x L; c)||_2, the certificate.
        status: how the solve ended; `cause` adds what is known of why.
        nit: outer iterations.
        nfev, njev, nhev: evaluations of (f, c), of (gradient, Jacobian), of the Hessian of the Lagrangian.
        kkt_history: nit + 1 values of kkt.
        alpha_history: nit step lengths.
        sketches, multiplications: what the inner solves drew, and multiplications with entries of the KKT matrix.
        products: products with the KKT matrix (of the augmented Lagrangian method: its Hessian) in Krylov solvers.
        fallbacks: outer iterations in which MINRES finished the inner solve.
        inexact: steps taken although the inner solve ended short of its target.
        shifts: outer iterations with a modified Hessian.
        eta1_history, eta2_history, delta_history: per outer iteration, after its updates; empty for other methods.
        measured: how lambda_min(G G^T) became known.
    """

    x: Float[ndarray, " n"]
    lam: Float[ndarray, " m"]
    fun: float
    constr: Float[ndarray, " m"]
    kkt: float
    status: Status
    cause: str = ""
    nit: int
    nfev: int
    njev: int
    nhev: int
    kkt_history: tuple[float, ...]
    alpha_history: tuple[float, ...]
    sketches: int = 0
    multiplications: int = 0
    fallbacks: int = 0
    products: int = 0
    inexact: int = 0
    shifts: int = 0
    eta1_history: tuple[float, ...] = ()
    eta2_history: tuple[float, ...] = ()
    delta_history: tuple[float, ...] = ()
    measured: str = ""

    @property
    def success(self) -> bool:
        """Whether the status is CONVERGED."""
        return self.status is Status.CONVERGED

    @property
    def message(self) -> str:
        """The status, with the cause where one is known."""
        return f"{self.status}: {self.cause}" if self.cause else str(self.status)
