"""Generalised linear models: losses with exact constants, and the Johnson-Lindenstrauss reduction for low rank.

For linear models f(w; x, y) = phi(<w, x>, y) on rows of bounded norm. Bounds on gradients and their differences hold by
construction, so nothing is clipped and no per-example gradient is ever formed: one question costs two products with the
batch. Source: arXiv 2206.00846, Algorithm 4 and Corollary 6.2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import softplus

from locally.checks import check_count, check_finite, check_positive, check_shape
from locally.privacy.stationary.accounting import PrivacyStatement
from locally.privacy.stationary.convex import RecursiveRegularization
from locally.privacy.stationary.objectives import Batch, Beyond, Objective
from locally.privacy.stationary.randomness import Randomness, as_randomness
from locally.privacy.stationary.result import PrivateResult, Trace
from locally.privacy.stationary.spider import Callback, NoisyGradientDescent, PrivateSpiderBoost
from locally.privacy.stationary.tree import PrivateTreeSpider

Method = PrivateSpiderBoost | NoisyGradientDescent | PrivateTreeSpider | RecursiveRegularization


@dataclass(frozen=True)
class GlmLoss:
    """phi(t, y) with its derivative in t and bounds that hold for every t and every y in `targets`.

    Attributes:
        value, derivative: elementwise functions of predictions t and targets y.
        lipschitz, smoothness: bounds on |phi'| and |phi''|.
        convex: phi is convex in t.
        targets: smallest and largest y for which the bounds hold.
    """

    name: str
    value: Callable[[Float[Tensor, " b"], Float[Tensor, " b"]], Float[Tensor, " b"]]
    derivative: Callable[[Float[Tensor, "*#b"], Float[Tensor, "*#b"]], Float[Tensor, "*#b"]]
    lipschitz: float
    smoothness: float
    convex: bool
    targets: tuple[float, float] = (-math.inf, math.inf)


def _sigmoid_square_derivative(t: Float[Tensor, "*#b"], y: Float[Tensor, "*#b"]) -> Float[Tensor, "*#b"]:
    s = torch.sigmoid(t)
    return 2 * (s - y) * s * (1 - s)


LOGISTIC = GlmLoss(
    "logistic", lambda t, y: softplus(t) - y * t, lambda t, y: torch.sigmoid(t) - y, 1.0, 0.25, True, (0.0, 1.0)
)
# |phi'| peaks at s = 2/3: 8/27. |phi''| at y = 0 is 2 s^2 (1 - s)(2 - 3 s), largest at s = (15 - sqrt 33) / 24.
SIGMOID_SQUARE = GlmLoss(
    "sigmoid square",
    lambda t, y: (torch.sigmoid(t) - y) ** 2,
    _sigmoid_square_derivative,
    8 / 27,
    0.15405857013,
    False,
    (0.0, 1.0),
)


def huber(width: float = 1.0) -> GlmLoss:
    """Quadratic within `width` > 0 of the target, linear beyond."""
    check_positive("width", width)

    def value(t: Float[Tensor, " b"], y: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        r = (t - y).abs()
        return torch.where(r <= width, r**2 / 2, width * (r - width / 2))

    return GlmLoss("huber", value, lambda t, y: (t - y).clamp(-width, width), width, 1.0, True)


class LinearModel(Objective):
    """A generalised linear model on rows of norm at most `data_norm`.

    Args:
        X: features, float32 or float64; a NumPy array is wrapped without a copy.
        y: targets within the loss's range.
        data_norm: public bound on the Euclidean norm of every row, > 0. Never computed from the data.
        loss: LOGISTIC, SIGMOID_SQUARE, huber(width) or one of your own.
        beyond: rows longer than `data_norm` are refused (default) or clipped to it.

    Raises:
        ValueError: NaN, disagreeing shapes, targets out of range, or rows beyond the bound under "refuse".

    >>> X = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> model = LinearModel(X, torch.tensor([1.0, 0.0], dtype=torch.float64), data_norm=1.0)
    >>> model.gradient_sum(torch.zeros(2, dtype=torch.float64))
    tensor([-0.5000,  0.5000], dtype=torch.float64)
    """

    def __init__(
        self,
        X: Float[Tensor, "n d"] | Float[ndarray, "n d"],
        y: Float[Tensor, " n"] | Float[ndarray, " n"],
        *,
        data_norm: float,
        loss: GlmLoss = LOGISTIC,
        beyond: Beyond = Beyond.REFUSE,
    ) -> None:
        check_positive("data_norm", data_norm)
        rows, y = torch.as_tensor(X), torch.as_tensor(y)
        check_shape("X", rows, (None, None))
        check_shape("y", y, (rows.shape[0],))
        if min(rows.shape) == 0:
            raise ValueError(f"X must hold at least one row and one column, got shape {tuple(rows.shape)}")
        check_finite("X", rows)
        check_finite("y", y)
        low, high = loss.targets
        if bool(((y < low) | (y > high)).any()):
            raise ValueError(f"y must lie in [{low:g}, {high:g}] for the {loss.name} loss")
        norms = rows.norm(dim=1)
        longest = float(norms.max())
        if longest > data_norm * (1 + 4 * torch.finfo(rows.dtype).eps):
            if Beyond(beyond) is Beyond.REFUSE:
                raise ValueError(
                    f"rows of X must have norm at most data_norm = {data_norm:g}, got one of {longest:.6g}"
                )
            rows = rows * (data_norm / norms.clamp_min(data_norm))[:, None]
        self.X, self.y, self.loss, self.data_norm = rows, y.to(rows.dtype), loss, float(data_norm)
        self.size, self.dimension = rows.shape
        self.lipschitz = loss.lipschitz * self.data_norm
        self.smoothness = loss.smoothness * self.data_norm**2
        self.convex = loss.convex  # clipping rows, unlike clipping gradients, keeps a convex loss convex
        kept = "refused beyond" if Beyond(beyond) is Beyond.REFUSE else "clipped to"
        self.assumptions = (f"rows {kept} norm {self.data_norm:.4g}",)

    def initial_point(self) -> Float[Tensor, " d"]:
        return self.X.new_zeros(self.dimension)

    def gradient_sum(self, w: Float[Tensor, " d"], batch: Batch = None) -> Float[Tensor, " d"]:
        X, y = self._rows(batch)
        return _held(self.loss.derivative(X @ w, y), self.loss.lipschitz) @ X

    def difference_sum(
        self, w: Float[Tensor, " d"], anchor: Float[Tensor, " d"], bound: float, batch: Batch = None
    ) -> Float[Tensor, " d"]:
        X, y = self._rows(batch)
        slopes = self.loss.derivative(X @ torch.stack([w, anchor], 1), y[:, None])  # both in one pass over X
        return _held(slopes[:, 0] - slopes[:, 1], bound / self.data_norm) @ X

    def exact_gradient(self, w: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        return self.gradient_sum(w) / self.size

    def mean_loss(self, w: Float[Tensor, " d"]) -> float:
        """The mean loss. NOT private: for experiments and tests."""
        return float(self.loss.value(self.X @ w, self.y).mean())

    def projected(self, directions: Float[Tensor, "k d"]) -> "LinearModel":
        """The model on rows Phi x, clipped to norm sqrt(2) data_norm: a public map, applied to each row by itself."""
        bound = math.sqrt(2) * self.data_norm
        X = self.X @ directions.to(self.X).T
        return LinearModel(X, self.y, data_norm=bound, loss=self.loss, beyond=Beyond.CLIP)

    def _rows(self, batch: Batch) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        if batch is None:
            return self.X, self.y
        batch = batch.to(self.X.device)
        return self.X[batch], self.y[batch]


def _held(slopes: Float[Tensor, " b"], limit: float) -> Float[Tensor, " b"]:
    """Slopes within [-limit, limit]: where they are by the loss's constants, up to rounding, but noise relies on it."""
    return slopes.clamp(-limit, limit)


@dataclass(frozen=True)
class JohnsonLindenstrauss:
    """Run a private method on randomly projected rows and map its answer back.

    The guarantee becomes free of the dimension: it depends on the rank of the data and on n epsilon only. Rows longer
    than sqrt(2) data_norm after the projection are clipped, so privacy holds for every draw of the projection and the
    whole delta goes to the method (the paper keeps half of it for the draws on which norms are not preserved).

    Args:
        method: any method of this folder; its sizes refer to the projected problem.
        dimension: k >= 1, number of random directions; see `projection_dimension`.

    References:
        arXiv 2206.00846, Algorithm 4.
    """

    method: Method
    dimension: int

    def __post_init__(self) -> None:
        check_count("dimension", self.dimension)

    def minimize(
        self,
        objective: LinearModel,
        *,
        rng: int | torch.Generator | Randomness | None = None,
        callback: Callback | None = None,
    ) -> PrivateResult:
        """Project, run the method from 0, and return Phi^T w; a trace comes back in the full space too.

        Raises:
            ValueError: as the method, or a dimension beyond that of the data.
        """
        if self.dimension > objective.dimension:
            raise ValueError(f"dimension must be at most that of the data {objective.dimension}, got {self.dimension}")
        randomness = as_randomness(rng)
        # One flat draw: Phi has independent N(0, 1/k) entries, so that E ||Phi x||^2 = ||x||^2.
        flat = randomness.normal(objective.X.new_zeros(self.dimension * objective.dimension))
        directions = flat.reshape(self.dimension, objective.dimension) / math.sqrt(self.dimension)
        found = self.method.minimize(objective.projected(directions), rng=randomness, callback=callback)
        trace = found.trace
        if trace is not None:
            trace = Trace(trace.iterates @ directions, trace.estimates @ directions)
        statement = self._stated(found.privacy, objective)
        return replace(found, w=directions.T @ found.w, privacy=statement, trace=trace)

    def privacy_statement(self, objective: LinearModel) -> PrivacyStatement:
        """What a run will cost; looks at no data."""
        nothing = objective.X.new_zeros((self.dimension, objective.dimension))
        return self._stated(self.method.privacy_statement(objective.projected(nothing)), objective)

    def _stated(self, privacy: PrivacyStatement, objective: LinearModel) -> PrivacyStatement:
        projected = f"rows then projected to {self.dimension} dimensions and clipped to sqrt(2) times that norm"
        return replace(privacy, assumptions=(*objective.assumptions, projected, *privacy.assumptions[1:]))


def projection_dimension(
    n: int,
    epsilon: float,
    delta: float,
    lipschitz: float,
    smoothness: float,
    initial_gap: float,
    rank: int | None = None,
    convex: bool = False,
) -> int:
    """k = min(argmin_j [rate(j) + L0 log(n) / sqrt(j)], rank log(2n / delta)) of Algorithm 4.

    Args:
        n: number of examples. epsilon, delta: the budget.
        lipschitz, smoothness: L0 and L1 of the model (the norm of the rows included).
        initial_gap: bound on F(0) - inf F.
        rank: public bound on the rank of the data, where there is one.
        convex: use the rate of recursive regularisation instead of Private SpiderBoost's.

    >>> projection_dimension(5000, 1.0, 1e-6, 1.0, 0.25, 1.0, rank=20)
    461
    """
    check_count("n", n)
    check_positive("epsilon", epsilon)
    check_positive("delta", delta, below=1)
    j = np.arange(1, max(2, n) + 1)
    abar = np.sqrt(j * math.log(1 / delta)) / (n * epsilon)
    if convex:
        rate = lipschitz * (1 / math.sqrt(n) + abar)
    else:
        rate = (math.sqrt(initial_gap * smoothness * lipschitz) * abar) ** (2 / 3) + lipschitz * abar
    k = int(j[np.argmin(rate + lipschitz * math.log(n) / np.sqrt(j))])
    return k if rank is None else max(1, min(k, math.ceil(rank * math.log(2 * n / delta))))
