"""Training in function space: what gradient descent does to a network whose tangent kernel stands still.

Squared loss in closed form for every time from one eigendecomposition, other losses by integrating the flow; mean and
spread of an ensemble of wide networks; early stopping as a spectral filter. Sources: Jacot et al., arXiv 1806.07572,
Section 5; Lee et al., arXiv 1902.06720, equations (8) to (16).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.integrate import solve_ivp
from scipy.linalg import eigh

from locally.checks import (
    check_between,
    check_choice,
    check_count,
    check_finite,
    check_nonnegative,
    check_positive,
    check_shape,
    check_symmetric,
)

Normalization = Literal["samples", "entries", "sum"]
Matrix = Float[ndarray, "n k"]


@dataclass(frozen=True)
class Filter:
    """How far training has come, for each eigenvector of the kernel.

    Attributes:
        remaining: share of the first residual that is left.
        share: what has been learnt over the eigenvalue, the filtered inverse.
    """

    remaining: Float[ndarray, " n"]
    share: Float[ndarray, " n"]


When = float | Filter


class KernelFlow:
    """Gradient flow (and descent) on the squared loss |f - y|^2 / (2 c) under a fixed kernel.

    Component i along an eigenvector of the kernel decays as exp(-rate w_i t / c), so that large eigenvalues are learnt
    first. One eigendecomposition, O(n^3); each time afterwards O(n^2 k).

    Args:
        k_train: kernel of the training points, symmetric positive semidefinite.
        y: targets, (n, k).
        learning_rate: > 0; time is counted in steps of this size.
        normalization: c is the number of "samples" n (the loss of the paper), of "entries" n k (a mean over everything,
            as in neural-tangents and `torch.nn.MSELoss`), or 1 ("sum").
        ridge: added to the diagonal, in multiples of its mean, >= 0.

    Attributes:
        eigenvalues, eigenvectors: of the kernel with its ridge, in ascending order.
        max_learning_rate: above it gradient descent diverges, 2 c / largest eigenvalue.

    Raises:
        ValueError: an argument is out of range, not finite or not symmetric.

    >>> flow = KernelFlow(np.diag([4.0, 1.0]), np.ones((2, 1)), normalization="sum")
    >>> flow.train(1.0).ravel().round(3), flow.train(np.inf).ravel()
    (array([0.982, 0.632]), array([1., 1.]))
    """

    def __init__(
        self,
        k_train: Float[ndarray, "n n"],
        y: Matrix,
        *,
        learning_rate: float = 1.0,
        normalization: Normalization = "samples",
        ridge: float = 0.0,
    ) -> None:
        check_finite("k_train", k_train)
        check_symmetric("k_train", k_train)
        check_shape("y", y, (len(k_train), None))
        check_finite("y", y)
        check_positive("learning_rate", learning_rate)
        check_nonnegative("ridge", ridge)
        check_choice("normalization", normalization, ("samples", "entries", "sum"))
        n, k = y.shape
        if n == 0:
            raise ValueError("k_train and y are empty")
        self.y = np.asarray(y, np.float64)
        self.ridge = ridge * float(np.trace(k_train)) / n
        self.divisor = {"samples": float(n), "entries": float(n * k), "sum": 1.0}[normalization]
        self.learning_rate = learning_rate
        # float32 would lose the small eigenvalues that rule late times
        w, self.eigenvectors = eigh(np.asarray(k_train, np.float64))
        floor = n * np.finfo(np.float64).eps * max(w[-1], 0.0)
        if w[0] < -1e3 * floor - 1e-6 * abs(w[-1]):
            raise ValueError(f"k_train must be positive semidefinite, but has an eigenvalue {w[0]:.3g}")
        self.eigenvalues = np.where(w > floor, w, 0.0) + self.ridge

    @property
    def rates(self) -> Float[ndarray, " n"]:
        """Of decay of each component, for one step of time."""
        return self.learning_rate * self.eigenvalues / self.divisor

    @property
    def max_learning_rate(self) -> float:
        """2 divisor / lambda_max of the kernel: gradient descent converges below it; infinite for a zero kernel."""
        top = float(self.eigenvalues[-1])
        return 2 * self.divisor / top if top > 0 else math.inf

    def at(self, t: float) -> Filter:
        """Gradient flow at time t >= 0, which may be infinite."""
        check_time(t)
        elapsed = np.multiply(self.rates, t, out=np.zeros_like(self.rates), where=self.rates > 0)
        return self._filter(np.exp(-elapsed), -np.expm1(-elapsed))

    def after(self, steps: int, momentum: float = 0.0) -> Filter:
        """Gradient descent after so many steps, with heavy-ball `momentum` in [0, 1).

        Raises:
            ValueError: the learning rate is above 2 (1 + momentum) c / largest eigenvalue, where descent diverges.
        """
        check_count("steps", steps, at_least=0)
        check_between("momentum", momentum, 0.0, 1.0 - 1e-12)
        bound = (1 + momentum) * self.max_learning_rate
        if self.learning_rate > bound:
            raise ValueError(f"learning_rate {self.learning_rate:g} makes descent diverge: the bound is {bound:g}")
        a = self.rates
        # velocity v and residual r of one component: v <- momentum v + a r, r <- r - v
        step = np.empty((len(a), 2, 2))
        step[:, 0, 0], step[:, 0, 1], step[:, 1, 0], step[:, 1, 1] = 1 - a, -momentum, a, momentum
        remaining = np.linalg.matrix_power(step, steps)[:, 0, 0]
        return self._filter(remaining, 1 - remaining)

    def _filter(self, remaining: Float[ndarray, " n"], learnt: Float[ndarray, " n"]) -> Filter:
        # a component of eigenvalue 0 moves nothing: the kernel with any other point has no part in it either
        share = np.divide(learnt, self.eigenvalues, out=np.zeros_like(learnt), where=self.eigenvalues > 0)
        return Filter(remaining, share)

    def train(self, when: When, f0: Matrix | None = None) -> Matrix:
        """The network's outputs on the training points at a time or after `after(steps)`, from f0 (default 0)."""
        V, filtered = self.eigenvectors, self._when(when)
        return self.y + V @ (filtered.remaining[:, None] * (V.T @ self._residual(f0)))

    def test(
        self,
        when: When,
        k_test: Float[ndarray, "m n"],
        f0_test: Float[ndarray, "m k"] | None = None,
        f0: Matrix | None = None,
    ) -> Float[ndarray, "m k"]:
        """The outputs on other points, of kernel `k_test` with the training points."""
        check_shape("k_test", k_test, (None, len(self.y)))
        check_finite("k_test", k_test)
        V, filtered = self.eigenvectors, self._when(when)
        moved = -k_test @ (V @ (filtered.share[:, None] * (V.T @ self._residual(f0))))
        if f0_test is None:
            return moved
        check_shape("f0_test", f0_test, moved.shape)
        return f0_test + moved

    def operator(self, when: When) -> Float[ndarray, "n n"]:
        """E with f_t(x) = f_0(x) - K(x, X) E (f_0(X) - y): the kernel's inverse as far as it has been learnt."""
        V = self.eigenvectors
        return (V * self._when(when).share) @ V.T

    def _when(self, when: When) -> Filter:
        return when if isinstance(when, Filter) else self.at(when)

    def leave_one_out(self, t: float, f0: Matrix | None = None) -> Float[ndarray, "n k"]:
        """Residual of each training point as if it had been left out, from one fit.

        Exact at t = infinity (kernel ridge regression and interpolation); at finite times the usual approximation that
        takes the smoother's own row.
        """
        V = self.eigenvectors
        left = self.at(t).remaining
        if math.isinf(t):
            # with a ridge r the residual is r (K + r)^-1 of the targets; the factor cancels
            w = self.eigenvalues
            left = np.divide(1.0, w, out=np.zeros_like(w), where=w > 0)
        residual = -V @ (left[:, None] * (V.T @ self._residual(f0)))
        own = np.einsum("ni,i,ni->n", V, left, V)
        return residual / np.maximum(own, np.finfo(float).tiny)[:, None]

    def _residual(self, f0: Matrix | None) -> Matrix:
        if f0 is None:
            return -self.y
        check_shape("f0", f0, self.y.shape)
        check_finite("f0", f0)
        return f0 - self.y


@dataclass(frozen=True)
class PrincipalComponents:
    """Eigenpairs of the kernel over n, the speeds at which the components of a function are learnt.

    Attributes:
        values: descending. vectors: in columns, of unit mean square over the points.
    """

    values: Float[ndarray, " n"]
    vectors: Float[ndarray, "n n"]

    @classmethod
    def of(cls, k_train: Float[ndarray, "n n"]) -> "PrincipalComponents":
        """Those of a kernel matrix over the training set; ValueError if it is not finite or not symmetric. O(n^3)."""
        check_finite("k_train", k_train)
        check_symmetric("k_train", k_train)
        n = len(k_train)
        w, V = eigh(np.asarray(k_train, np.float64) / n)
        return cls(w[::-1].copy(), V[:, ::-1] * math.sqrt(n))

    def coefficients(self, f: Matrix) -> Matrix:
        """Of a function's values at the points."""
        return self.vectors.T @ f / len(f)

    def learnt(self, t: float) -> Float[ndarray, " n"]:
        """Share of each component that gradient flow has learnt at time t: 1 - exp(-value t)."""
        check_time(t)
        return -np.expm1(-np.maximum(self.values, 0) * t)

    def ridge_equivalent(self, t: float) -> Float[ndarray, " n"]:
        """What kernel ridge regression with lambda = 1 / t keeps of each: value / (value + 1 / t)."""
        check_positive("t", t)
        return self.values / (self.values + 1 / t)


@dataclass(frozen=True)
class EarlyStopping:
    """Mean squared error along the training path, and where it is smallest."""

    times: Float[ndarray, " times"]
    errors: Float[ndarray, " times"]

    @property
    def best(self) -> float:
        """The time of the smallest error."""
        return float(self.times[self.errors.argmin()])


def early_stopping(
    flow: KernelFlow,
    times: Sequence[float] | None = None,
    *,
    k_validation: Float[ndarray, "m n"] | None = None,
    y_validation: Float[ndarray, "m k"] | None = None,
) -> EarlyStopping:
    """Error over time on validation points, or without them by leaving one training point out; O(n^2) a time.

    Args:
        times: >= 0, may end in infinity; default 40 from a tenth of the fastest component's time to the slowest one's,
            and infinity.
    """
    if (k_validation is None) != (y_validation is None):
        raise ValueError("k_validation and y_validation go together")
    if times is None:
        rates = flow.rates[flow.rates > 0]
        if not rates.size:
            raise ValueError("the kernel is 0: nothing is ever learnt")
        slowest = max(rates.min(), rates.max() * 1e-12)
        times = [*np.geomspace(0.1 / rates.max(), 10 / slowest, 40), math.inf]
    errors = []
    for t in times:
        if k_validation is None or y_validation is None:
            errors.append(np.square(flow.leave_one_out(t)).mean())
        else:
            errors.append(np.square(flow.test(t, k_validation) - y_validation).mean())
    return EarlyStopping(np.asarray(times, float), np.asarray(errors))


def ensemble(
    flow: KernelFlow,
    when: When,
    k_test: Float[ndarray, "m n"],
    nngp_train: Float[ndarray, "n n"],
    nngp_cross: Float[ndarray, "m n"],
    nngp_test: Float[ndarray, "m m"],
) -> tuple[Float[ndarray, "m k"], Float[ndarray, "m m"]]:
    """Mean and covariance over wide networks, drawn at random and trained for a time or steps (each output alike).

    Args:
        flow: of the tangent kernel; k_test the tangent kernel of test and training points.
        nngp_train, nngp_cross, nngp_test: covariance at initialisation among training, test with training, test points.
    """
    M = k_test @ flow.operator(when)
    cross = M @ nngp_cross.T
    covariance = nngp_test + M @ nngp_train @ M.T - cross - cross.T
    return M @ flow.y, (covariance + covariance.T) / 2


def posterior(
    flow: KernelFlow, k_test: Float[ndarray, "m n"], k_prior: Float[ndarray, "m m"]
) -> tuple[Float[ndarray, "m k"], Float[ndarray, "m m"]]:
    """Of a Gaussian process whose covariance is the flow's kernel: networks with only their last layer trained."""
    M = k_test @ flow.operator(math.inf)
    covariance = k_prior - M @ k_test.T
    return M @ flow.y, (covariance + covariance.T) / 2


class FlowStatus(StrEnum):
    """How an integration ended; set by `integrate`, read from `Trajectory.status`."""

    FINISHED = "finished"
    FAILED = "the integrator gave up: its step became too small"
    NOT_FINITE = "the outputs left the finite numbers"


@dataclass(frozen=True)
class Trajectory:
    """Outputs at the asked times; after a failure only those that were reached."""

    times: Float[ndarray, " times"]
    train: Float[ndarray, "times n k"]
    test: Float[ndarray, "times m k"]
    status: FlowStatus


def integrate(
    k_train: Float[ndarray, "n n"],
    gradient: Callable[[Matrix], Matrix],
    f0: Matrix,
    times: Sequence[float],
    *,
    k_test: Float[ndarray, "m n"] | None = None,
    f0_test: Float[ndarray, "m k"] | None = None,
    learning_rate: float = 1.0,
    momentum: float | None = None,
    method: Literal["RK45", "BDF"] = "RK45",
    rtol: float = 1e-6,
) -> Trajectory:
    """Kernel gradient flow df/dt = -rate K g(f) for any differentiable cost.

    Args:
        gradient: g, the cost's derivative with respect to the outputs, (n, k) to (n, k), its normalisation included.
        times: >= 0, ascending, in steps of the learning rate.
        momentum: in (0, 1), of the heavy ball whose continuous limit is integrated instead, 2 n numbers of state.
        method: "BDF" where the rates differ by many orders of magnitude.
    """
    check_symmetric("k_train", k_train)
    check_shape("f0", f0, (len(k_train), None))
    check_positive("learning_rate", learning_rate)
    check_choice("method", method, ("RK45", "BDF"))
    at = np.asarray(times, float)
    if at.ndim != 1 or not at.size or not np.isfinite(at).all() or at[0] < 0 or (np.diff(at) <= 0).any():
        raise ValueError(f"times must be finite, non-negative and ascending, got {times!r}")
    if momentum is not None:
        check_positive("momentum", momentum, below=1.0)
    n, k = f0.shape
    K = k_train if k_test is None else np.vstack([k_train, k_test])
    start = f0 if k_test is None else np.vstack([f0, np.zeros((len(k_test), k)) if f0_test is None else f0_test])
    friction = 0.0 if momentum is None else (1 - momentum) / math.sqrt(learning_rate)

    def velocity(_t: float, state: ndarray) -> ndarray:
        if momentum is None:
            return -learning_rate * (K @ gradient(state.reshape(-1, k)[:n])).ravel()
        f, q = state.reshape(2, -1, k)
        return np.concatenate([q.ravel(), (-friction * q - K @ gradient(f[:n])).ravel()])

    # a heavy-ball step of rate eta advances the second-order equation by sqrt(eta)
    unit = 1.0 if momentum is None else math.sqrt(learning_rate)
    state = start.ravel() if momentum is None else np.concatenate([start.ravel(), np.zeros(start.size)])
    with np.errstate(over="ignore", invalid="ignore"):
        found = solve_ivp(velocity, (0.0, unit * at[-1]), state, method, unit * at, rtol=rtol, atol=rtol * 1e-3)
    reached = np.asarray(found.t, float)  # without any, SciPy gives lists
    outputs = np.asarray(found.y, float).T.reshape(len(reached), 1 if momentum is None else 2, len(start), k)[:, 0]
    finite = np.isfinite(outputs).all()
    status = FlowStatus.NOT_FINITE if not finite else FlowStatus.FINISHED if found.success else FlowStatus.FAILED
    return Trajectory(reached / unit, outputs[:, :n], outputs[:, n:], status)


def check_time(t: float) -> None:
    if not t >= 0:
        raise ValueError(f"t must be a time >= 0, or infinity, got {t!r}")
