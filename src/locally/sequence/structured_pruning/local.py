"""Local pruning: which input groups of one linear layer go, and the weights that the others then need.

The layer is Y = X W with X of shape (tokens, d_in); groups of consecutive inputs are an attention head (o_proj) or one
neuron (down_proj). Optimal brain surgeon on groups: remove, update exactly, score again. Source: arXiv 2503.09657,
section 3.2 and algorithm 1.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locally.checks import check_choice, check_count, check_finite, check_nonnegative, check_shape, check_square

SCORES = ("obs+grad", "obs", "grad", "paper")
MORE_DAMPING = 10.0  # by this factor, while the Gram matrix has no Cholesky factor
DAMPING_ATTEMPTS = 8


@dataclass(frozen=True)
class LocalPruneResult:
    """One layer at one sparsity."""

    weight: Float[Tensor, "d_in d_out"]  # rows of removed groups are zero
    kept: Bool[Tensor, " groups"]
    error: float  # tr((W - W0)^T H (W - W0)): the squared change of the layer's output on the calibration data
    objective: float  # sum(-W * G + W * (H W) / 2), H damped and G = H W0
    damping: float  # relative to the mean of H's diagonal; larger than asked for where H was singular


def local_prune(
    H: Float[Tensor, "d_in d_in"],
    W: Float[Tensor, "d_in d_out"],
    *,
    groups: int,
    keep: int,
    rounds: int | None = 16,
    score: str = "obs+grad",
    damping: float = 1e-2,
) -> LocalPruneResult:
    """Keep `keep` of `groups` groups of inputs and refit the rest of the weights by least squares.

    Args:
        H: X^T X over the calibration tokens.
        W: weights; rows are inputs. Groups whose rows are all zero count as removed already.
        groups: number of groups of consecutive rows, a divisor of d_in.
        keep: groups to keep, 0 to groups; all of them leave W as it is.
        rounds: in how many rounds the others are removed; None for one group at a time.
        score: redundancy of a group p given the weights and the inverse at that time. "obs+grad": the sum of
            W_p * ([H^-1]_pp^-1 W_p / 2 + G_p), as published code has it; "obs" without the term in G = H W, which is
            half the exact loss of the least squares fit; "grad" that term alone; "paper": |G_c W_c^T| +
            |W_c|^2 / (2 [H^-1]_cc), averaged over the channels c of a group.
        damping: added to H's diagonal, relative to its mean, at least 0.

    Raises:
        ValueError: a shape, count or choice is not as above, or an entry is not finite.

    Complexity:
        O(d_in^3 + d_in^2 d_out) in double precision; memory of about six matrices d_in x max(d_in, d_out).

    Source: arXiv 2503.09657, algorithm 1 and equations 3, 4.

    >>> a, b = torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, -1.0, 1.0])
    >>> X = torch.stack([a, a, b], 1)  # the first two inputs are the same
    >>> found = local_prune(X.T @ X, torch.tensor([[1.0], [1.0], [4.0]]), groups=3, keep=2, damping=1e-9)
    >>> found.kept.sum().item(), sorted(round(w, 3) for w in found.weight[found.kept, 0].tolist())
    (2, [2.0, 4.0])
    """
    return local_prune_levels(H, W, groups=groups, keeps=[keep], rounds=rounds, score=score, damping=damping)[0]


def local_prune_levels(
    H: Float[Tensor, "d_in d_in"],
    W: Float[Tensor, "d_in d_out"],
    *,
    groups: int,
    keeps: Sequence[int],
    rounds: int | None = 16,
    score: str = "obs+grad",
    damping: float = 1e-2,
    shared: bool = True,
) -> list[LocalPruneResult]:
    """`local_prune` at several sparsities, in the order of `keeps`, with one inverse and one factor for all.

    Args:
        shared: one pass of removals down to the smallest of `keeps`, its rounds cut where a level is reached; False
            gives every level rounds of its own, as separate calls would.

    Complexity:
        As `local_prune`, plus O(keep^2 d_out) for each level. The refits are nested: in the order of removal, last
        first, the kept sets are leading blocks of one matrix and share its Cholesky factor.
    """
    levels = iterate_levels(
        H, W, groups=groups, keeps=keeps, rounds=rounds, score=score, damping=damping, shared=shared
    )
    found = dict(zip(sorted(set(keeps)), levels))
    return [found[keep] for keep in keeps]


def iterate_levels(
    H: Float[Tensor, "d_in d_in"],
    W: Float[Tensor, "d_in d_out"],
    *,
    groups: int,
    keeps: Sequence[int],
    rounds: int | None = 16,
    score: str = "obs+grad",
    damping: float = 1e-2,
    shared: bool = True,
) -> Iterator[LocalPruneResult]:
    """`local_prune_levels` one level at a time, `keeps` ascending and without repetition: one weight in memory."""
    check_square("H", H)
    check_shape("W", W, (H.shape[0], None))
    check_finite("H", H)
    check_finite("W", W)
    check_count("groups", groups)
    if H.shape[0] % groups:
        raise ValueError(f"groups must divide the {H.shape[0]} inputs, got {groups}")
    for keep in keeps:
        check_count("keep", keep, at_least=0)
        if keep > groups:
            raise ValueError(f"keep must be at most groups = {groups}, got {keep}")
    if rounds is not None:
        check_count("rounds", rounds)
    check_choice("score", score, SCORES)
    check_nonnegative("damping", damping)

    layer = _Layer.prepare(H, W, groups, damping)
    targets = sorted(set(keeps))
    for together in [targets] if shared else [[keep] for keep in targets]:
        yield from layer.refit(layer.removal_order(together, rounds, score), together)


@dataclass(frozen=True)
class _Layer:
    """The quadratic problem of one layer, restricted to the groups that are not zero on entry."""

    original: Tensor
    H: Tensor  # damped, over live inputs, double precision
    W: Tensor
    G: Tensor  # H W, never updated
    live: Tensor  # indices of groups that are not zero
    groups: int
    size: int  # inputs in a group
    ridge: float
    damping: float

    @classmethod
    def prepare(cls, H: Tensor, W: Tensor, groups: int, damping: float) -> "_Layer":
        size = H.shape[0] // groups
        diagonal = H.diagonal().double()
        # the weight of an input that is always zero says nothing
        Wd = (W.double() * (diagonal != 0).unsqueeze(1)).contiguous()
        live = Wd.view(groups, -1).ne(0).any(1).nonzero().squeeze(1)
        rows = rows_of(live, size)
        Wd = Wd[rows]
        Hd = H.double().clone() if len(live) == groups else H[rows][:, rows].double()
        mean = float(diagonal.mean()) or 1.0
        before, now = 0.0, damping
        for _ in range(DAMPING_ATTEMPTS):
            Hd.diagonal().add_((now - before) * mean)
            if not len(rows) or int(torch.linalg.cholesky_ex(Hd).info) == 0:
                break
            before, now = now, max(now, 1e-8) * MORE_DAMPING
        else:
            raise ValueError(f"H must be positive semi-definite: damped by {before:g} it has no Cholesky factor")
        if now != damping:
            warnings.warn(f"H is singular: damped by {now:g} of its mean diagonal, not {damping:g}", stacklevel=4)
        return cls(W, Hd, Wd, Hd @ Wd, live, groups, size, now * mean, now)

    def removal_order(self, targets: Sequence[int], rounds: int | None, score: str) -> list[int]:
        """Positions among the live groups in the order in which they go, down to the smallest target."""
        left = len(self.live)
        total = max(left - min(targets), 0)
        if total == 0 or left == 0:
            return []
        count = total if rounds is None else min(rounds, total)
        stops = {left - sum(divide(total, count)[: i + 1]) for i in range(count)} | {t for t in targets if t < left}
        if min(targets) == 0:  # the last of them go together: what is left when nothing else is does not matter
            stops.add(0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.H))
        W, G = self.W, self.G
        alive = torch.arange(left, device=W.device)
        order: list[int] = []
        for stop in sorted(stops, reverse=True):
            ranked = group_scores(inverse, W, G, self.size, score).argsort(stable=True)
            gone = ranked[: len(alive) - stop]
            order += alive[gone].tolist()
            stay = torch.ones(len(alive), dtype=torch.bool, device=W.device)
            stay[gone] = False
            if stop == 0:
                break
            P, Q = rows_of(gone, self.size), rows_of(stay.nonzero().squeeze(1), self.size)
            # exact update of the optimal brain surgeon on a group, and of the inverse by the same Schur complement
            factor = torch.linalg.cholesky(inverse[P][:, P])
            U = torch.cholesky_solve(inverse[P][:, Q], factor).mT
            W = W[Q] - U @ W[P]
            across = inverse[P][:, Q]
            inverse = inverse[Q][:, Q].addmm_(U, across, alpha=-1)
            G, alive = G[Q], alive[stay]
        return order

    def refit(self, order: list[int], targets: Sequence[int]) -> Iterator[LocalPruneResult]:
        """W_K = H[K, K]^-1 G[K] for the kept groups K of every target."""
        left = len(self.live)
        ranking = self._ranking(order)
        rows = rows_of(ranking, self.size)
        deepest = min(max((t for t in targets if t < self.groups), default=0), left) * self.size
        lead = rows[:deepest]
        L = torch.linalg.cholesky(self.H[lead][:, lead]) if deepest else self.H[:0, :0]
        y = torch.linalg.solve_triangular(L, self.G[lead], upper=False) if deepest else self.G[:0]
        before = float((self.G * self.W).sum())
        for target in targets:
            kept = torch.zeros(self.groups, dtype=torch.bool, device=self.W.device)
            if target == self.groups:  # nothing to prune: the very weights
                yield LocalPruneResult(self.original.clone(), ~kept, 0.0, -0.5 * before, 0.0)
                continue
            n = min(target, left) * self.size
            K = rows[:n]
            W_K = torch.linalg.solve_triangular(L[:n, :n].mT, y[:n], upper=True)
            kept[self.live[ranking[: min(target, left)]]] = True
            if target > left:  # more asked for than there are: zero groups make up the number
                kept[(~kept).nonzero().squeeze(1)[: target - left]] = True
            weight = torch.zeros_like(self.original)
            weight[rows_of(self.live, self.size)[K]] = W_K.to(weight.dtype)
            # of the minimiser, tr(D^T H D) = <G, W0> - <G_K, W_K>; the damping's part of it is no change of the output
            explained = float((self.G[K] * W_K).sum())
            change = float(self.W.square().sum() - 2 * (self.W[K] * W_K).sum() + W_K.square().sum())
            error = max(before - explained - self.ridge * change, 0.0)
            yield LocalPruneResult(weight, kept, error, -0.5 * explained, self.damping)

    def _ranking(self, order: list[int]) -> Tensor:
        """All live groups: those that never go, then the others, the last to go first."""
        gone = torch.tensor(order, dtype=torch.long, device=self.W.device)
        never = torch.ones(len(self.live), dtype=torch.bool, device=self.W.device)
        never[gone] = False
        return torch.cat([never.nonzero().squeeze(1), gone.flip(0)])


def group_scores(
    inverse: Float[Tensor, "n n"], W: Float[Tensor, "n d_out"], G: Float[Tensor, "n d_out"], size: int, score: str
) -> Float[Tensor, " groups"]:
    """Redundancy of every group of `size` rows; the smallest go first. See `local_prune` for the choices."""
    check_choice("score", score, SCORES)
    first = (W * G).sum(1)
    if score == "grad":
        return first.view(-1, size).sum(1)
    if score == "paper":
        channels = first.abs() + W.square().sum(1) / (2 * inverse.diagonal())
        return channels.view(-1, size).mean(1)
    if size == 1:
        second = W.square().sum(1) / (2 * inverse.diagonal())
    else:
        m = len(W) // size
        blocks = inverse.view(m, size, m, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        grouped = W.view(m, size, -1)
        solved = torch.cholesky_solve(grouped, torch.linalg.cholesky(blocks))
        second = (grouped * solved).sum((1, 2)) / 2
    return second if score == "obs" else second + first.view(-1, size).sum(1)


def rows_of(groups: Int[Tensor, " k"], size: int) -> Int[Tensor, " rows"]:
    """Indices of the rows of these groups, group by group."""
    return (groups.unsqueeze(1) * size + torch.arange(size, device=groups.device)).flatten()


def divide(total: int, parts: int) -> list[int]:
    """`total` in `parts` integers that differ by at most one, the larger first.

    >>> divide(10, 4)
    [3, 3, 2, 2]
    """
    return [total // parts + (i < total % parts) for i in range(parts)]
