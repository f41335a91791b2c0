"""Constrained empirical risk minimisation over subsets of covariates (arXiv 2205.15196).

Among subsets S with a head w_S whose gap is at most eps in every training environment, the least mean risk. All subsets
of one size are evaluated together: one batched solve for the heads, one product an environment for the gaps.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, combinations, islice

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.optimize import minimize

from locally.causal.invariance.moments import EnvironmentMoments, SingularCovariance, gaussian_radius
from locally.checks import check_choice, check_count

EXHAUSTIVE_LIMIT = 200_000
NEAR = 3.0  # a pooled head within this multiple of eps is worth moving
MOVED_HEADS = 200  # most subsets whose heads are moved
COLLINEAR = 1e-10  # share of a covariate's variance that the others leave


class InvarianceStatus(StrEnum):
    """Whether any subset met the constraint; set by the search, read from `SubsetFit.status`."""

    INVARIANT = "invariant on every training environment"
    INFEASIBLE = "no candidate is invariant on every training environment: the one of least gap"


@dataclass(frozen=True)
class SubsetFit:
    """What the search chose.

    Attributes:
        support: covariates, counted without the constant.
        head: weights of the support, after that of the constant where there is one.
        risk: mean risk over the environments of the constraint.
        gaps: of every environment of the constraint.
        eps: the largest gap that was allowed to this subset.
        candidates: size of the class that was searched: all subsets of the size allowed.
        status: whether any candidate met the constraint.
    """

    support: tuple[int, ...]
    head: Float[ndarray, " r"]
    risk: float
    gaps: Float[ndarray, " N"]
    eps: float
    candidates: int
    status: InvarianceStatus


@dataclass(frozen=True)
class _Block:
    """Subsets of one size, evaluated: columns with the constant, heads, gaps, risks and the allowed gaps."""

    columns: Int[ndarray, "b r"]
    heads: Float[ndarray, "b r"]
    gaps: Float[ndarray, "b N"]
    risks: Float[ndarray, " b"]
    allowed: Float[ndarray, "b N"]

    @property
    def excess(self) -> Float[ndarray, " b"]:
        """Largest gap in units of what is allowed; feasible at most at 1."""
        return (self.gaps / np.maximum(self.allowed, 1e-300)).max(axis=1)

    def take(self, which: Int[ndarray, " k"] | Bool[ndarray, " b"]) -> "_Block":
        return _Block(self.columns[which], self.heads[which], self.gaps[which], self.risks[which], self.allowed[which])


def class_size(features: int, max_size: int) -> int:
    """Subsets of at most max_size covariates."""
    return sum(math.comb(features, m) for m in range(min(max_size, features) + 1))


def search_subsets(
    moments: EnvironmentMoments,
    max_size: int,
    eps: float | None,
    *,
    heads_from: EnvironmentMoments | None = None,
    eta: float = 0.05,
    search: str = "auto",
    beam: int = 50,
    move_heads: bool = False,
    callback: Callable[[int, int], None] | None = None,
) -> SubsetFit:
    """The subset of least mean risk whose gap is at most eps in every environment.

    Args:
        moments: environments of the constraint and the risk.
        max_size: most covariates, the constant apart.
        eps: largest gap allowed, in units of the moments; None: the sampling radius at confidence 1 - eta of each
            candidate, so that a truly invariant one is kept with that probability.
        heads_from: environments whose pooled least squares gives the heads (default: the same).
        search: "exhaustive", "beam", or "auto": exhaustive up to 200,000 subsets.
        beam: subsets kept from one size to the next.
        move_heads: where a pooled head misses eps by up to a factor of 3, find the one of least risk that meets it.
        callback: called with (subsets done, subsets in the class) after every block.

    Cost: O(c N r^2 + c r^3) for c subsets of r covariates, in blocks of about 30 MiB.

    Raises:
        SingularCovariance: some candidate has dependent columns.
        ValueError: an argument out of range.
    """
    check_count("max_size", max_size, at_least=0)
    check_count("beam", beam)
    check_choice("search", search, ("auto", "exhaustive", "beam"))
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps!r}")
    if eps is None and np.isinf(moments.rows).any():
        raise ValueError("eps must be given for population moments: they have no sampling error to derive it from")
    max_size = min(max_size, moments.features)
    size = class_size(moments.features, max_size)
    exhaustive = search == "exhaustive" or (search == "auto" and size <= EXHAUSTIVE_LIMIT)
    judge = _Evaluator(moments, heads_from or moments, eps, eta)
    blocks = _all_blocks(judge, max_size) if exhaustive else _beam_blocks(judge, max_size, beam)

    best = nearest = None
    near: list[_Block] = []
    done = 0
    for block in blocks:
        done += len(block.risks)
        excess = block.excess
        feasible = excess <= 1
        if feasible.any():
            at = np.flatnonzero(feasible)[block.risks[feasible].argmin()]
            if best is None or block.risks[at] < best.risks[0] - 1e-12 * abs(best.risks[0]):
                best = block.take(np.array([at]))
        if best is None:
            at = excess.argmin()
            if nearest is None or excess[at] < nearest.excess[0]:
                nearest = block.take(np.array([at]))
        if move_heads:
            near.append(block.take((excess > 1) & (excess <= NEAR)))
        if callback is not None:
            callback(done, size)
    if move_heads:
        best = _move_heads(judge, near, best)
    chosen = best if best is not None else nearest
    assert chosen is not None
    status = InvarianceStatus.INFEASIBLE if best is None else InvarianceStatus.INVARIANT
    support = tuple((chosen.columns[0, moments.has_constant :] - moments.has_constant).tolist())
    limit = float(chosen.allowed.max())
    return SubsetFit(support, chosen.heads[0], float(chosen.risks[0]), chosen.gaps[0], limit, size, status)


class _Evaluator:
    """Heads, gaps and risks of many subsets of one size at once."""

    def __init__(
        self, moments: EnvironmentMoments, heads_from: EnvironmentMoments, eps: float | None, eta: float
    ) -> None:
        self.moments, self.eps, self.eta = moments, eps, eta
        self.head_xx, self.head_xy, _ = heads_from.pooled()
        self.xx, self.xy, self.yy = moments.pooled()
        self.flat = np.ascontiguousarray(moments.xx.reshape(len(moments), -1))

    def block_length(self, size: int) -> int:
        r = size + self.moments.has_constant
        return max(1, 4_000_000 // (len(self.moments) * max(r * r, 1)))

    def __call__(self, subsets: Int[ndarray, "b m"]) -> _Block:
        b, constant = len(subsets), self.moments.has_constant
        columns = subsets + constant
        if constant:
            columns = np.concatenate([np.zeros((b, 1), dtype=np.int64), columns], axis=1)
        W = self._heads(columns)
        r = columns.shape[1]
        d = self.xy.size
        pairs = columns[:, :, None] * d + columns[:, None, :]
        S = np.take(self.flat, pairs.reshape(-1), axis=1).reshape(len(self.flat), b, r, r)
        g = np.matmul(S, W[None, :, :, None])[..., 0] - self.moments.xy[:, columns]  # (N, b, r)
        gaps = np.sqrt(np.einsum("nbr,nbr->bn", g, g))
        risks = self.yy + np.einsum("br,br->b", W, g.mean(axis=0) - self.xy[columns])
        return _Block(columns, W, gaps, risks, self._allowed(S, W, g, columns))

    def _heads(self, columns: Int[ndarray, "b r"]) -> Float[ndarray, "b r"]:
        """Pooled least squares on each subset; refuses one whose columns depend on each other."""
        if columns.shape[1] == 0:
            return np.zeros((len(columns), 0))
        P = self.head_xx[columns[:, :, None], columns[:, None, :]]
        scale = np.sqrt(np.diagonal(P, axis1=1, axis2=2))
        if (scale == 0).any():
            at = np.unravel_index(int((scale == 0).argmax()), scale.shape)
            raise SingularCovariance(f"column {columns[at] - self.moments.has_constant} is zero in every environment")
        correlation = P / (scale[:, :, None] * scale[:, None, :])
        try:
            pivots = np.diagonal(np.linalg.cholesky(correlation), axis1=1, axis2=2).min(axis=1) ** 2
        except np.linalg.LinAlgError:
            pivots = np.linalg.eigvalsh(correlation)[:, 0]
        if (pivots < COLLINEAR).any():
            columns = columns[pivots.argmin(), self.moments.has_constant :] - self.moments.has_constant
            raise SingularCovariance(
                f"columns {columns.tolist()} of X depend on each other linearly: leave one out, or lower max_size"
            )
        return np.linalg.solve(correlation, (self.head_xy[columns] / scale)[..., None])[..., 0] / scale

    def _allowed(
        self,
        S: Float[ndarray, "N b r r"],
        W: Float[ndarray, "b r"],
        g: Float[ndarray, "N b r"],
        columns: Int[ndarray, "b r"],
    ) -> Float[ndarray, "b N"]:
        if self.eps is not None:
            return np.full((len(W), len(S)), self.eps)
        risk = self.moments.yy[:, None] + np.einsum("nbr,br->nb", g - self.moments.xy[:, columns], W)
        diagonal = np.diagonal(S, axis1=2, axis2=3)
        return gaussian_radius(diagonal.transpose(1, 0, 2), g.transpose(1, 0, 2), risk.T, self.moments.rows, self.eta)


def _all_blocks(judge: _Evaluator, max_size: int) -> Iterator[_Block]:
    """Every subset, smaller ones first."""
    d = judge.moments.features
    for size in range(max_size + 1):
        subsets = combinations(range(d), size)
        length = judge.block_length(size)
        while chunk := list(islice(subsets, length)):
            flat = np.fromiter(chain.from_iterable(chunk), dtype=np.int64, count=size * len(chunk))
            yield judge(flat.reshape(len(chunk), size))


def _beam_blocks(judge: _Evaluator, max_size: int, beam: int) -> Iterator[_Block]:
    """Subsets grown by one covariate at a time from the `beam` most promising of the size before.

    Half of the places go to the least gaps and half to the least risks: subsets of covariates that have nothing to do
    with the target have no gap either and would fill the beam alone.
    """
    kept = np.zeros((1, 0), dtype=np.int64)
    yield judge(kept)
    for _ in range(max_size):
        d = judge.moments.features
        grown = np.concatenate([np.repeat(kept, d, axis=0), np.tile(np.arange(d), len(kept))[:, None]], axis=1)
        grown = np.sort(grown, axis=1)
        grown = np.unique(grown[(np.diff(grown, axis=1) > 0).all(axis=1)], axis=0)
        length = judge.block_length(grown.shape[1])
        found = [judge(grown[start : start + length]) for start in range(0, len(grown), length)]
        yield from found
        excess = np.concatenate([block.excess for block in found])
        risks = np.concatenate([block.risks for block in found])
        by_gap = np.lexsort((risks, np.maximum(excess, 1)))[: (beam + 1) // 2]
        by_risk = np.argsort(np.where(excess <= NEAR, risks, np.inf), kind="stable")[: beam // 2]
        kept = grown[np.unique(np.concatenate([by_gap, by_risk]))]


def _move_heads(judge: _Evaluator, near: list[_Block], best: _Block | None) -> _Block | None:
    """Heads of least mean risk under the constraint itself, for subsets whose pooled heads just miss it.

    A convex programme for each subset. The risk of the pooled head is a lower bound, so subsets are taken in its order
    and the search ends where that bound passes the best risk found.
    """
    rows = sorted(
        ((block.risks[i], block.take(np.array([i]))) for block in near for i in range(len(block.risks))),
        key=lambda pair: pair[0],
    )
    for risk, row in rows[:MOVED_HEADS]:
        if best is not None and risk >= best.risks[0]:
            break
        head = constrained_head(judge.moments, row.columns[0], row.heads[0], row.allowed[0])
        Phi = np.eye(judge.xy.size)[row.columns[0]]
        gaps = judge.moments.gaps(Phi, head)[None]
        moved = _Block(row.columns, head[None], gaps, np.array([judge.moments.risks(Phi.T @ head).mean()]), row.allowed)
        if moved.excess[0] <= 1 and (best is None or moved.risks[0] < best.risks[0]):
            best = moved
    return best


def constrained_head(
    moments: EnvironmentMoments,
    columns: Int[ndarray, " r"],
    start: Float[ndarray, " r"],
    allowed: Float[ndarray, " N"],
) -> Float[ndarray, " r"]:
    """Minimise the mean risk over heads on these columns subject to a gap of at most `allowed` everywhere (SLSQP)."""
    S = moments.xx[:, columns[:, None], columns[None, :]]
    s = moments.xy[:, columns]
    P, p = S.mean(axis=0), s.mean(axis=0)
    inside = allowed * (1 - 1e-6)  # the solver meets constraints up to its own tolerance

    def slack(w: Float[ndarray, " r"]) -> Float[ndarray, " N"]:
        return inside**2 - ((S @ w - s) ** 2).sum(axis=1)

    def slack_jacobian(w: Float[ndarray, " r"]) -> Float[ndarray, "N r"]:
        return -2 * np.einsum("nij,ni->nj", S, S @ w - s)

    found = minimize(
        lambda w: w @ P @ w - 2 * p @ w,
        start,
        jac=lambda w: 2 * (P @ w - p),
        constraints={"type": "ineq", "fun": slack, "jac": slack_jacobian},
        method="SLSQP",
        options={"maxiter": 200, "ftol": 1e-12},
    )
    return found.x if np.isfinite(found.x).all() else start
