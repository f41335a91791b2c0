"""Fixed points of contracting maps: Picard, Anderson, BiCGSTAB, conjugate gradients and dense elimination.

Whatever runs first, Picard iteration has the last word: it ends when the change of a sweep proves the answer, so no
accelerated method can cost the guarantee of convergence. Sources: Park, Choo and Park (arXiv 2106.01680); Walker and
Ni, SIAM J. Numer. Anal. 49 (2011); van der Vorst, SIAM J. Sci. Stat. Comput. 13 (1992).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locally.checks import check_choice, check_count, check_finite, check_positive, check_shape
from locally.solvers.convergent_graph import kernels
from locally.solvers.convergent_graph.krylov import bicgstab, reversible_cg
from locally.solvers.convergent_graph.maps import Activation, ContractingMaps

Callback = Callable[[int, Tensor], object]

DEFAULT_TOL = {torch.float32: 1e-5, torch.float64: 1e-10}
ROUNDING = 4  # a sweep that changes x by this many units of rounding is as good as it gets
ASK_EVERY = 8  # sweeps between questions to an accelerator whether it is done: each waits for it


class Method(StrEnum):
    """How fixed points are found; chosen by the caller, "auto" by the solver. See `FixedPointSolver`."""

    AUTO = "auto"
    PICARD = "picard"
    ANDERSON = "anderson"
    BICGSTAB = "bicgstab"
    CG = "cg"
    DENSE = "dense"


class Status(StrEnum):
    """How the solve of one graph ended, best first; set by `FixedPointSolver`, read from `FixedPoint.statuses`."""

    CONVERGED = "converged"
    ROUNDING = "rounding keeps the error bound above the tolerance"
    ITERATION_LIMIT = "iteration limit"


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """Fixed points of all graphs and heads, and the proof.

    Attributes:
        x: the last iterates.
        statuses: one per graph.
        iterations: products with A that each graph took, of whatever method.
        changes: ||F(x') - x'|| in the last sweep, x' the iterate before x, per graph and head.
        error_bounds: q / (1 - q) of that, q = `ContractingMaps.rates`: by Banach's theorem x is no further from the
            fixed point. In the maximum norm; for adjoint maps in the sum norm. Rounding adds a few units.
        method: what was used.
    """

    x: Float[Tensor, "nodes heads"]
    statuses: tuple[Status, ...]
    iterations: Int[Tensor, " graphs"]
    changes: Float[Tensor, "graphs heads"]
    error_bounds: Float[Tensor, "graphs heads"]
    method: Method

    @property
    def status(self) -> Status:
        """The worst status of the batch."""
        return max(self.statuses, key=list(Status).index, default=Status.CONVERGED)


@dataclass(frozen=True, kw_only=True)
class FixedPointSolver:
    """Solve x = phi(gamma A x + b) for every graph and head.

    * `picard`: at most log(tol (1 - q)) / log(q) sweeps, q <= gamma the rate of the maps; the method of the paper.
    * `anderson`: mixing with least squares over the last `memory` iterates; for any activation.
    * `bicgstab`: for the identity; few products where gamma is close to 1.
    * `cg`: for the identity on reversible maps, d_i A_ij = d_j A_ji (an undirected graph with symmetric logits, as in
      personalised PageRank), by `locally.linalg.krylov.CG` on diag(d) (I - gamma A).
    * `dense`: elimination, O(G H n^3) for G graphs of up to n nodes; for the identity on small graphs.
    * `auto`: Picard iteration and, where 64 sweeps are not enough, dense elimination for graphs of up to 64 nodes,
      BiCGSTAB for larger ones, Anderson mixing for activations other than the identity.

    Args:
        method: as above.
        tol: bound on the error relative to ||x|| of each graph and head, in (0, 1); default 1e-5 for float32 and 1e-10
            for float64. Solves end earlier where rounding leaves nothing to gain.
        max_iter: limit for the products; by default the number that theory says Picard iteration needs, so that it
            never binds.
        memory: iterates that Anderson mixing looks back on, at least 1.

    Raises:
        ValueError, TypeError: a hyper-parameter is out of range.

    >>> from locally.solvers.convergent_graph.maps import Sparsity
    >>> chain = Sparsity.of(torch.tensor([0, 1]), torch.tensor([1, 2]), num_nodes=3)
    >>> maps = ContractingMaps(chain, torch.ones(2, 1), torch.tensor([[0.0], [0.0], [1.0]]), gamma=0.5)
    >>> found = FixedPointSolver(method="picard").solve(maps)
    >>> found.x.flatten().tolist(), str(found.status), found.iterations.tolist()
    ([0.25, 0.5, 1.0], 'converged', [4])
    """

    method: str = Method.AUTO
    tol: float | None = None
    max_iter: int | None = None
    memory: int = 5

    def __post_init__(self) -> None:
        check_choice("method", self.method, tuple(Method))
        if self.tol is not None:
            check_positive("tol", self.tol, below=1.0)
        if self.max_iter is not None:
            check_count("max_iter", self.max_iter)
        check_count("memory", self.memory)

    def solve(
        self,
        maps: ContractingMaps,
        x0: Float[Tensor, "nodes heads"] | None = None,
        callback: Callback | None = None,
    ) -> FixedPoint:
        """Solve from x0, or from zero where x0 is no better; see `attach` in `implicit` for gradients.

        Args:
            maps: what to solve.
            x0: a guess, such as the fixed point of slightly different maps.
            callback: sees every sweep of Picard iteration, `callback(sweep, changes)`, changes per graph and head.

        Raises:
            ValueError, TypeError: the maps are no contraction (`ContractingMaps.check`), x0 does not fit, or the method
                is for linear or reversible maps and these are not.
        """
        maps.check()
        if x0 is not None:
            check_shape("x0", x0, tuple(maps.bias.shape))
            check_finite("x0", x0)
        with torch.no_grad():
            return self._solve(maps, x0, callback)

    def _solve(self, maps: ContractingMaps, x0: Tensor | None, callback: Callback | None) -> FixedPoint:
        method = Method(self.method)
        if method in LINEAR and maps.activation is not Activation.IDENTITY:
            raise ValueError(f"method {method.value!r} is for the identity activation, got {maps.activation.value!r}")
        tol = self.tol or DEFAULT_TOL[maps.bias.dtype]
        scale = maps.norm(maps.activation(maps.bias.detach()))  # ||F(0)||
        wanted = (1 - maps.rates) * tol  # of a change relative to x, for an error of tol
        targets = wanted.clamp(min=ROUNDING * torch.finfo(maps.bias.dtype).eps)
        most = self.max_iter or most_sweeps(max(maps.rates.flatten().tolist(), default=0.0), tol)
        x, spent = torch.zeros_like(maps.bias), torch.zeros_like(maps.sparsity.starts[1:])
        if x0 is not None:
            x, spent = better_than_zero(maps, x0.detach().to(x.dtype), scale), spent + 1
        if method is Method.AUTO:
            sweeps, changes = picard(maps, x, targets, min(most, PATIENCE), callback)
            spent = spent + sweeps
            found = report(maps, x, spent, changes, wanted, targets, Method.PICARD)
            if found.status is not Status.ITERATION_LIMIT or most <= PATIENCE:
                return found
            method = self._accelerate(maps)
        if method is not Method.PICARD and maps.bias.numel():
            x, products = self._run(method, maps, x, targets, tol, self._left(most, spent))
            x, spent = better_than_zero(maps, x, scale), spent + products + 1
        sweeps, changes = picard(maps, x, targets, self._left(most, spent), callback)
        return report(maps, x, spent + sweeps, changes, wanted, targets, method)

    def _left(self, most: int, spent: Tensor) -> int:
        """Products that may still be made; what theory gives is for each stage, since it counts from zero."""
        return most if self.max_iter is None else max(most - max(spent.tolist(), default=0), 1)

    def _accelerate(self, maps: ContractingMaps) -> Method:
        """What to do with maps on which `PATIENCE` sweeps were not enough; from timings on one core."""
        if maps.activation is not Activation.IDENTITY:
            return Method.ANDERSON
        return Method.DENSE if int(maps.sparsity.starts.diff().max()) <= DENSE_NODES else Method.BICGSTAB

    def _run(
        self, method: Method, maps: ContractingMaps, x: Tensor, targets: Tensor, tol: float, most: int
    ) -> tuple[Tensor, int]:
        if method is Method.ANDERSON:
            return anderson(maps, x, targets, self.memory, most)
        if method is Method.BICGSTAB:
            return bicgstab(maps, x, targets, most)
        if method is Method.CG:
            return reversible_cg(maps, x, tol, most)
        return eliminate(maps), 0


LINEAR = (Method.DENSE, Method.BICGSTAB, Method.CG)
PATIENCE = 64  # sweeps of Picard iteration before `auto` calls for help
DENSE_NODES = 64  # nodes a graph up to which the help is elimination


def most_sweeps(rate: float, tol: float) -> int:
    """Picard iteration from zero is done after these.

    ||x_(k+1) - x_k|| <= rate^k ||F(0)|| must fall below (1 - rate) tol ||x||, and ||x|| >= ||F(0)|| / (1 + rate).
    """
    return math.ceil(math.log((1 - rate) * tol / 4) / math.log(max(rate, 1e-300))) + 2


def better_than_zero(maps: ContractingMaps, x: Tensor, scale: Tensor) -> Tensor:
    """x where a sweep changes it by no more than it changes zero, zero elsewhere: from zero the sweeps are bounded."""
    poor = ~(maps.norm(maps(x) - x) <= scale)
    return torch.where(maps.spread(poor), 0.0, x).contiguous()


def report(
    maps: ContractingMaps,
    x: Tensor,
    iterations: Tensor,
    changes: Tensor,
    wanted: Tensor,
    targets: Tensor,
    method: Method,
) -> FixedPoint:
    # a little more than the loops allow, since they round on their own
    relative = changes / maps.norm(x).clamp(min=torch.finfo(x.dtype).tiny) / 1.01
    statuses = tuple(
        Status.CONVERGED if converged else Status.ROUNDING if rounded else Status.ITERATION_LIMIT
        for converged, rounded in zip((relative <= wanted).all(1).tolist(), (relative <= targets).all(1).tolist())
    )
    bounds = maps.rates / (1 - maps.rates) * changes
    return FixedPoint(x, statuses, iterations, changes, bounds, method)


def picard(
    maps: ContractingMaps, x: Tensor, targets: Tensor, most: int, callback: Callback | None = None
) -> tuple[Int[Tensor, " graphs"], Float[Tensor, "graphs heads"]]:
    """x <- F(x) in place until it changes by at most targets ||x||; returns sweeps per graph and the last changes.

    Graphs are independent: on the CPU each is swept to its end before the next, so a batch gives bit by bit what its
    graphs give one by one.
    """
    graphs = maps.sparsity.num_graphs
    if x.device.type == "cpu" and callback is None:
        sweeps, changes = torch.zeros(graphs, dtype=torch.int64), torch.zeros(graphs, x.shape[1], dtype=torch.float64)
        starts, code = maps.sparsity.starts.numpy(), maps.activation.code
        limits = targets.double().numpy()
        outputs = x.numpy(), sweeps.numpy(), changes.numpy()
        kernels.picard(*maps.arrays, maps.gamma, code, starts, maps.adjoint, limits, most, *outputs)
        return sweeps, changes.to(x.dtype)
    sweeps = torch.full((graphs,), most, device=x.device)
    changes = torch.zeros_like(targets)
    for k in range(1, most + 1):
        y = maps(x)
        changes = maps.norm(y - x)
        x.copy_(y)
        if callback is not None:
            callback(k, changes)
        done = (changes <= targets * maps.norm(y)).all(1)
        sweeps = torch.where(done & (sweeps == most), k, sweeps)
        if (k % ASK_EVERY == 0 or k == most or x.device.type == "cpu") and bool(done.all()):
            break
    return sweeps, changes


def anderson(maps: ContractingMaps, x: Tensor, targets: Tensor, memory: int, most: int) -> tuple[Tensor, int]:
    """Anderson mixing of type II, each graph and head with a history of its own; returns x and the sweeps.

    x_(k+1) = F(x_k) - sum_j c_j (x_(j+1) - x_j + r_(j+1) - r_j), where c minimises ||r_k - sum_j c_j (r_(j+1) - r_j)||
    and r = F(x) - x. Where the residual has grown, the next step is a plain sweep, which shrinks it.
    """
    r = maps(x) - x
    steps_x = x.new_zeros(memory, *x.shape)
    steps_r = x.new_zeros(memory, *x.shape)
    gram = x.new_zeros(*targets.shape, memory, memory)
    last_norm = torch.full_like(targets, math.inf)
    slack = 10 * torch.finfo(x.dtype).eps * torch.eye(memory, dtype=x.dtype, device=x.device)
    for k in range(most):
        norm = maps.norm(r)
        running = norm > targets * maps.norm(x)
        if not running.any():
            return x, k + 1
        against = torch.stack([maps.dot(old, r) for old in steps_r], -1)
        # scaled to a unit diagonal, with 1 where there is no history yet
        size = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        size = torch.where(size > 0, size, 1.0)
        scaled = gram / (size[..., None] * size[..., None, :])
        scaled = scaled + torch.diag_embed((scaled.diagonal(dim1=-2, dim2=-1) == 0).to(x.dtype)) + slack
        c = torch.linalg.solve(scaled, against / size) / size
        c = torch.where((norm <= last_norm)[..., None] & c.isfinite(), c, 0.0)
        step = r.clone()
        for j in range(memory):
            step -= maps.spread(c[..., j]) * (steps_x[j] + steps_r[j])
        step = torch.where(maps.spread(running), step, 0.0)
        x = x + step
        r_next = maps(x) - x
        slot = k % memory
        steps_x[slot], steps_r[slot] = step, r_next - r
        row = torch.stack([maps.dot(old, steps_r[slot]) for old in steps_r], -1)
        gram[..., slot, :] = row
        gram[..., :, slot] = row
        last_norm, r = norm, r_next
    return x, most + 1


def eliminate(maps: ContractingMaps) -> Tensor:
    """(I - gamma A)^-1 b by LU; the matrices are strictly diagonally dominant, by rows or by columns."""
    s = maps.sparsity
    matrices = maps.dense()
    place = torch.arange(s.num_nodes, device=s.starts.device) - s.starts[s.batch]
    padded = maps.bias.new_zeros(*matrices.shape[:3])
    padded.permute(0, 2, 1)[s.batch, place] = maps.bias.detach()
    return torch.linalg.solve(matrices, padded).permute(0, 2, 1)[s.batch, place].contiguous()
