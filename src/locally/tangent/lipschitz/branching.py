"""Branch and bound over what the activations do.

A domain is a list of splits, each "this unit's input is above (below) a point"; for ReLU the point is 0 and the slope
is then known. The worst domains are split again and bounded as one batch: forward bounds with the split constraints,
then gradient bounds, then the norm. A domain in which nothing is left to split has one Jacobian, and a linear
programme says whether it is empty; so the search ends at the exact value for piecewise linear networks. The maximum
over all domains that are left is a bound at any moment. Shi et al., arXiv 2210.07394, section 3.4; the constraints,
which the paper leaves out, make it complete.
"""

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from locally.tangent.lipschitz.activations import PiecewiseLinear
from locally.tangent.lipschitz.attained import Attained, update
from locally.tangent.lipschitz.budget import Budget
from locally.tangent.lipschitz.gradients import GradientBounds, gradient_bounds, repeat_heads
from locally.tangent.lipschitz.leaves import inspect
from locally.tangent.lipschitz.network import Network
from locally.tangent.lipschitz.normalisation import Normalisation
from locally.tangent.lipschitz.normalised_gradients import NormalisedProduct
from locally.tangent.lipschitz.norms import INF, matrix_norm, row_norms
from locally.tangent.lipschitz.propagation import Box, Forward, ForwardBounds, Splits


class Status(StrEnum):
    """Why the work on one box ended; the bound holds in every case."""

    BOUNDED = "bounded"  # without branching
    CONVERGED = "converged"  # upper and attained value agree
    EXHAUSTED = "nothing left to split"  # the bound is as good as branching can make it
    TIME_LIMIT = "time limit"  # `timeout`
    DOMAIN_LIMIT = "domain limit"  # `max_domains`
    INTERRUPTED = "interrupted"  # by the callback or from the keyboard
    SOLVER_LIMIT = "the solver stopped early"  # of the mixed-integer solver, method "exact"


class Score(StrEnum):
    """Which unit to split: the one whose relaxation costs most, weighted by its coefficient in the final bound."""

    GAP = "gap"  # distance between the two chords at the middle of the gradient's interval
    AREA = "area"  # gu |gu| - gl |gl|, as in the paper
    BABSR = "babsr"  # the intercept that the bound took


Split = tuple[int, bool, float]  # unit, above, point
Callback = Callable[[float, float, int], object]  # seconds, largest bound, domains so far; True ends the search


@dataclass(frozen=True)
class Domain:
    """Part of one box, for one output (or all, in joint problems)."""

    item: int
    head: int
    splits: tuple[Split, ...]
    bound: float
    rows: tuple[float, ...]
    candidates: tuple[tuple[int, float], ...]  # units worth splitting, best first; empty: nothing is open


@dataclass
class Problem:
    """What all domains of a search share. Joint problems (ord 1 and 2) bound all outputs in every domain."""

    net: Network
    box: Box
    root: ForwardBounds
    spec: Tensor
    ord: float
    budget: Budget
    score: Score
    candidates: int

    def __post_init__(self) -> None:
        self.joint = self.ord != INF
        sizes = [self.net.nodes[v].size for v in self.net.activations]
        self.starts = dict(zip(self.net.activations, itertools.accumulate(sizes, initial=0)))
        self.exact_leaves = all(isinstance(self.net.nodes[v].op, PiecewiseLinear) for v in self.net.activations)

    def forward(self, items: Tensor, splits: list[tuple[Split, ...]]) -> ForwardBounds:
        root, box = self.root.take(items), self.box.take(items)
        return Forward(self.net, box, self.budget, root=root, splits=self._limits(splits)).bounds

    def _limits(self, splits: list[tuple[Split, ...]]) -> Splits:
        like = self.box.lower
        below = like.new_full((len(splits), self.net.hidden), -INF)
        above = like.new_full((len(splits), self.net.hidden), INF)
        entries = [(d, unit, side, point) for d, path in enumerate(splits) for unit, side, point in path]
        for limit, wanted in ((below, True), (above, False)):
            chosen = [(d, unit, point) for d, unit, side, point in entries if side is wanted]
            if chosen:
                d, unit, point = zip(*chosen)
                # a unit that was split twice keeps the tighter limit
                index = torch.tensor(d) * self.net.hidden + torch.tensor(unit)
                values = torch.tensor(point, dtype=like.dtype).to(like.device)
                limit.view(-1).scatter_reduce_(0, index.to(like.device), values, "amax" if wanted else "amin")
        cut = lambda limit: {
            v: limit[:, start : start + self.net.nodes[v].size].view(-1, *self.net.nodes[v].shape)
            for v, start in self.starts.items()
        }
        return Splits(cut(below), cut(above))

    def evaluate(self, domains: list[tuple[int, int, tuple[Split, ...], float]]) -> list[Domain]:
        """Bound domains given as (item, head, splits, bound of the parent); proven empty ones are left out."""
        heads = len(self.spec) if self.joint else 1
        size = max(1, self.budget.batch(2 * heads) // 4)
        found: list[Domain] = []
        for start in range(0, len(domains), size):
            found += self._evaluate(domains[start : start + size], heads)
        return found

    def _evaluate(self, domains: list[tuple[int, int, tuple[Split, ...], float]], heads: int) -> list[Domain]:
        device = self.box.lower.device
        items = torch.tensor([d[0] for d in domains], device=device)
        forward = self.forward(items, [d[2] for d in domains])
        spec = self.spec.repeat(len(domains), 1) if self.joint else self.spec[[d[1] for d in domains]]
        slopes = repeat_heads(forward.slopes, heads)
        gradients = gradient_bounds(self.net, slopes, spec, self.budget)
        kept: dict[int, Tensor] = {}
        rows = row_norms(self.net, gradients, self.ord, kept).view(-1, heads)
        lower, upper = (t.reshape(len(domains), heads, -1) for t in (gradients.lower[0], gradients.upper[0]))
        values = matrix_norm(lower, upper, rows, self.ord)
        scores = self._scores(gradients, slopes, kept).view(len(domains), heads, -1).sum(1)
        scores = torch.where(self._splittable(forward), scores, 0.0)
        points = torch.cat(
            [
                self.net.nodes[v].op.split_point(*(t[u].flatten(1) for t in (forward.lower, forward.upper)))
                for v in self.starts
                for u in self.net.nodes[v].inputs
            ],
            dim=1,
        )
        top = scores.topk(min(self.candidates, scores.shape[1]), dim=1)
        at = points.gather(1, top.indices).tolist()
        choices = [
            tuple((unit, point) for unit, point, score in zip(*row) if score > 0)
            for row in zip(top.indices.tolist(), at, top.values.tolist())
        ]
        empty = forward.infeasible.tolist()
        return [
            Domain(item, head, splits, min(parent, value), tuple(row), choice)
            for (item, head, splits, parent), value, row, choice, gone in zip(
                domains, values.tolist(), rows.tolist(), choices, empty
            )
            if not gone
        ]

    def _splittable(self, forward: ForwardBounds) -> Tensor:
        """(domains, units): a normalisation's value can be open because of the others', with nothing left to halve."""
        wide = []
        for v in self.starts:
            (u,) = self.net.nodes[v].inputs
            width = (forward.upper[u] - forward.lower[u]).flatten(1)
            normalised = isinstance(self.net.nodes[v].op, Normalisation)
            wide.append(width > 1e-12 if normalised else torch.ones_like(width, dtype=torch.bool))
        return torch.cat(wide, dim=1)

    def _scores(self, b: GradientBounds, slopes: dict, kept: dict[int, Tensor]) -> Tensor:
        """(heads, units); 0 where the slope is known."""
        scores = []
        for v in self.starts:
            node = self.net.nodes[v]
            sl, su = slopes[v]
            if v not in b.products or v not in kept:
                scores.append(torch.zeros(len(b.spec), node.size, dtype=sl.dtype, device=sl.device))
                continue
            lines, A = b.products[v], kept[v][:, 0]
            gl, gu = b.lower[v], b.upper[v]
            if isinstance(lines, NormalisedProduct):
                is_open = su[:, 0] - sl[:, 0] > 1e-12
                scores.append(torch.where(is_open, lines.cost(A).clamp(min=0) + 1e-100, 0.0).flatten(1))
                continue
            match self.score:
                case Score.GAP:
                    score = A.abs() * lines.gap((gl + gu) / 2)
                case Score.AREA:
                    score = A.abs() * (gu * gu.abs() - gl * gl.abs()) + 1
                case Score.BABSR:
                    score = A.clamp(min=0) * lines.upper_intercept + A.clamp(max=0) * lines.lower_intercept
            is_open = su - sl > 1e-12
            scores.append(torch.where(is_open, score.clamp(min=0) + 1e-100, 0.0).flatten(1))
        return torch.cat(scores, dim=1)


@dataclass
class Search:
    """A queue of domains for each box; `run` splits until time, domains or gaps are used up, and can go on later.

    Attributes:
        final: largest bound among domains that cannot be split further, per box.
        settled: per box and output, the largest bound of domains that no longer matter to the value.
        history: (seconds, largest bound over boxes, domains).
    """

    problem: Problem
    attained: Attained
    rtol: float
    queues: list[list[tuple[float, int, Domain]]] = field(default_factory=list)
    final: list[float] = field(default_factory=list)
    settled: list[list[float]] = field(default_factory=list)
    history: list[tuple[float, float, int]] = field(default_factory=list)
    domains: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        p = self.problem
        self._order = itertools.count()
        outputs = len(p.spec)
        self.queues = [[] for _ in range(len(p.box))]
        self.final = [0.0] * len(p.box)
        self.settled = [[0.0] * outputs for _ in range(len(p.box))]
        heads = [0] if p.joint else range(outputs)
        for domain in p.evaluate([(i, h, (), INF) for i in range(len(p.box)) for h in heads]):
            self._keep(domain)

    def value(self, item: int) -> float:
        queue = self.queues[item]
        return max(self.final[item], -queue[0][0] if queue else 0.0, *self._settled_values(item))

    def _settled_values(self, item: int) -> list[float]:
        return [] if self.problem.joint else self.settled[item]

    def per_output(self, item: int) -> list[float]:
        rows = list(self.settled[item])
        for _, _, domain in self.queues[item]:
            self._raise(rows, domain)
        return rows

    def _raise(self, rows: list[float], domain: Domain) -> None:
        values = domain.rows if self.problem.joint else (domain.bound,)
        for k, value in enumerate(values, start=0 if self.problem.joint else domain.head):
            rows[k] = max(rows[k], value)

    def _keep(self, domain: Domain) -> None:
        heapq.heappush(self.queues[domain.item], (-domain.bound, next(self._order), domain))
        self.domains += 1

    def _settle(self, domain: Domain) -> None:
        self._raise(self.settled[domain.item], domain)
        if self.problem.joint:
            self.final[domain.item] = max(self.final[domain.item], domain.bound)

    def _open(self, item: int) -> bool:
        queue = self.queues[item]
        if not queue:
            return False
        goal = max(float(self.attained.value[item]) * (1 + self.rtol), self.final[item], *self._settled_values(item))
        return -queue[0][0] > goal

    def run(
        self, *, timeout: float, max_domains: int, batch_size: int, callback: Callback | None = None
    ) -> list[Status]:
        """Split until done; KeyboardInterrupt, or a callback that returns True, ends it with the bounds so far."""
        began, before = time.perf_counter(), self.seconds
        ended: Status | None = None
        while ended is None:
            self.seconds = before + time.perf_counter() - began
            worst = max(self.value(i) for i in range(len(self.queues)))
            self.history.append((self.seconds, worst, self.domains))
            todo = [i for i in range(len(self.queues)) if self._open(i)]
            if not todo:
                break
            try:
                if callback is not None and callback(self.seconds, worst, self.domains) is True:
                    ended = Status.INTERRUPTED
                elif self.seconds - before >= timeout:
                    ended = Status.TIME_LIMIT
                elif self.domains >= max_domains:
                    ended = Status.DOMAIN_LIMIT
                else:
                    self._step(todo, max(1, batch_size // len(todo)))
            except KeyboardInterrupt:
                ended = Status.INTERRUPTED
        return [self._status(i, ended) for i in range(len(self.queues))]

    def _status(self, item: int, ended: Status | None) -> Status:
        if self.value(item) <= float(self.attained.value[item]) * (1 + self.rtol):
            return Status.CONVERGED
        return ended if ended is not None and self._open(item) else Status.EXHAUSTED

    def _step(self, todo: list[int], per_item: int) -> None:
        popped: list[Domain] = []
        try:
            for i in todo:
                for _ in range(per_item):
                    if not self._open(i):
                        break
                    popped.append(heapq.heappop(self.queues[i])[2])
            self._split([d for d in popped if d.candidates])
            popped = [d for d in popped if not d.candidates]
            while popped:
                self._close(popped[-1])
                popped.pop()
        except BaseException:  # nothing that was taken from a queue may be lost
            for domain in popped:
                heapq.heappush(self.queues[domain.item], (-domain.bound, next(self._order), domain))
            raise

    def _split(self, domains: list[Domain]) -> None:
        """Both children for every candidate unit of every domain; the unit whose worse child is best is kept."""
        jobs = [
            (d.item, d.head, (*d.splits, (unit, above, point)), d.bound)
            for d in domains
            for unit, point in d.candidates
            for above in (True, False)
        ]
        if not jobs:
            return
        children = {(*c.splits, (c.item, c.head)): c for c in self.problem.evaluate(jobs)}
        for d in domains:
            pairs = [
                [children.get((*d.splits, (unit, above, point), (d.item, d.head))) for above in (True, False)]
                for unit, point in d.candidates
            ]
            for child in min(pairs, key=lambda pair: max((c.bound for c in pair if c), default=0.0)):
                if child is not None:
                    self._place(child)

    def _place(self, child: Domain) -> None:
        if child.bound <= float(self.attained.value[child.item]):
            self._settle(child)
            self.domains += 1
        else:
            self._keep(child)

    def _close(self, domain: Domain) -> None:
        """Nothing to split: discard it if its pattern is empty, else it is final and its point may be attained."""
        if self.problem.exact_leaves:
            items = torch.tensor([domain.item], device=self.problem.box.lower.device)
            forward = self.problem.forward(items, [domain.splits])
            box = self.problem.box.take(items)
            leaf = inspect(forward.halfspaces, box, self.problem.net.gamma)
            if leaf.empty:
                return
            if leaf.point is not None:
                point = leaf.point.clamp(box.lower[0], box.upper[0]).expand(1, *self.problem.box.lower.shape)
                inside = (point >= self.problem.box.lower) & (point <= self.problem.box.upper)
                point = torch.where(inside, point, self.attained.point)
                p = self.problem
                update(p.net, self.attained, point, p.spec, p.ord, p.budget)
        self._settle(domain)
        self.final[domain.item] = max(self.final[domain.item], domain.bound)
