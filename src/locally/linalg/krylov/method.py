"""What conjugate gradients and MINRES share: arguments, restarts from the true residual, statuses, dropping out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from locally.checks import check_between, check_count, check_finite, check_nonnegative
from locally.linalg.krylov import implicit, kernels
from locally.linalg.krylov.operators import Operator, as_operator
from locally.linalg.krylov.solution import Solution, flat_norm, power_of_two

Callback = Callable[[int, Tensor], object]

COMPILED_DEVICES = frozenset({"cpu"})
ASK_EVERY = 8  # steps between questions to an accelerator whether anything still runs: each waits for it
MOST = 64  # steps that a method may take before the others of the batch are looked at
SHRINK_AT = 0.75  # share of systems still running at which the others leave the batch
AIM = 0.99  # the recurrence aims below the tolerance, so that rounding in it does not cost a restart


class Recurrence(ABC):
    """State of one method for a batch of systems A y = r with y = 0 at the start.

    Every tensor attribute has one row per system. `codes` holds kernels.RUNNING until a system ends.
    """

    def __init__(self, A: Operator, M: Operator | None, r: Tensor, targets: Tensor, codes: Tensor):
        self.A, self.M, self.r, self.codes = A, M, r, codes
        self.compiled = r.device.type in COMPILED_DEVICES
        # compiled loops keep scalars in double precision whatever the vectors are
        self.scalar = torch.float64 if self.compiled else r.dtype
        self.targets = targets.to(self.scalar)
        self.norms = torch.linalg.vector_norm(r, dim=1).to(self.scalar)
        self.iterations = torch.zeros_like(codes, dtype=torch.int64)
        self.y = torch.zeros_like(r)

    @abstractmethod
    def step(self) -> int | None:
        """One step of every running system; returns how many still run, None where asking would take long."""

    def steps(self, most: int) -> tuple[list[Tensor], int | None]:
        """Up to `most` steps: the norms after each of them, and what `step` returns after the last."""
        known = self.step()
        return [self.norms.clone()], known

    def stretch(self) -> Float[Tensor, " batch"]:
        """||A p|| / ||p|| for the direction p in which a system ran out of curvature."""
        return torch.zeros_like(self.norms)

    def fail(self, rows: Bool[Tensor, " batch"], code: int) -> None:
        """Stop those of the rows that run, with this code."""
        self.codes[rows & (self.codes == kernels.RUNNING)] = code

    def running(self) -> int:
        return int((self.codes == kernels.RUNNING).sum())

    def select(self, index: Int[Tensor, " kept"]) -> bool:
        """Go on with these systems only, if the operators know how."""
        A, M = self.A.select(index), self.M and self.M.select(index)
        if A is None or (self.M is not None and M is None):
            return False
        self.A, self.M = A, M
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[index])
        self.bind()
        return True

    @abstractmethod
    def bind(self) -> None:
        """Called when the tensors have been replaced."""

    def arrays(self) -> dict[str, ndarray]:
        """The tensors' memory, as the compiled loops take it."""
        return {name: value.numpy() for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True)
class KrylovMethod(ABC):
    """Hyper-parameters and the call; see `CG` and `MINRES`."""

    rtol: float = 1e-5
    atol: float = 0.0
    max_steps: int | None = None
    probe_symmetry: bool = False

    def __post_init__(self) -> None:
        check_between("rtol", self.rtol, 0.0, 1.0)
        check_nonnegative("atol", self.atol)
        if self.rtol == self.atol == 0:
            raise ValueError("rtol and atol must not both be zero: rounding would never let a solve end")
        if self.max_steps is not None:
            check_count("max_steps", self.max_steps)

    def solve(
        self,
        A: Tensor | Operator | Callable[..., Tensor],
        b: Float[Tensor, "*batch n"],
        x0: Float[Tensor, "*batch n"] | None = None,
        *,
        preconditioner: Tensor | Operator | Callable[[Tensor], Tensor] | None = None,
        parameters: Sequence[Tensor] = (),
        callback: Callback | None = None,
    ) -> Solution:
        """Solve A x = b for every row of b.

        Args:
            A: symmetric, in the dtype and on the device of b: a dense tensor (n, n) for all systems or (*batch, n, n),
                a sparse matrix (n, n), an `Operator`, or a callable that maps (batch, n) to (batch, n) row by row; the
                rows are b's, its batch dimensions flattened to one. A callable must leave its argument as it was.
            b: float32 or float64.
            x0: where to start; zero by default. No gradient flows to it.
            preconditioner: an approximate inverse of A, symmetric positive definite, in any form that A may have. Must
                not depend on the residual otherwise than linearly. No gradient flows to it.
            parameters: tensors that a callable A takes after its vector, `A(v, *parameters)`, and that gradients shall
                reach. A dense or sparse A gets its gradient without.
            callback: sees every step, `callback(step, residual_norms)`, the norms one per system.

        Returns:
            A `Solution`. A system counts as converged when ||b - A x||_2 <= max(rtol ||b||_2, atol), computed from x
            itself. A zero row of b has the answer zero wherever the solve starts.

        Raises:
            TypeError, ValueError: an argument is not as above, before any work; or the callable returns another shape
                or dtype, or depends on tensors that require gradients and are not among `parameters`.

        Gradients come from the implicit function theorem: the backward pass solves A u = dL/dx with the same method and
        tolerances and returns u for b and -u x' for A, so memory does not depend on the number of steps, and backward
        may be differentiated again. It warns (RuntimeWarning) where its own solve fails and raises RuntimeError where
        A turns out not to be symmetric. A must not be singular for gradients to have this form.
        """
        check_vectors(b, x0)
        track = torch.is_grad_enabled()
        operator = self._operator(as_operator("A", A, b, parameters=parameters, track=track))
        M = None if preconditioner is None else as_operator("preconditioner", preconditioner, b)
        n = b.shape[-1]
        start = None if x0 is None else x0.detach().reshape(-1, n)
        found = self._solve_rows(operator, M, b.reshape(-1, n), start, callback)
        shaped = {name: value.reshape(b.shape[:-1] + value.shape[1:]) for name, value in vars(found).items()}
        return Solution(**shaped)

    def _solve_rows(
        self, A: Operator, M: Operator | None, b: Tensor, x0: Tensor | None = None, callback: Callback | None = None
    ) -> Solution:
        with torch.no_grad():
            rows = b.detach().contiguous()
            found = None
            if M is None and x0 is None and callback is None and not self.probe_symmetry:
                found = self._at_once(A, rows)
            if found is None:
                found = _Solve(self, A, M, rows, x0, callback).run()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (b, *A.tensors)):
            found = replace(found, x=implicit.attach(found, b, A, lambda g: self._solve_rows(A, M, g)))
        return found

    def _operator(self, A: Operator) -> Operator:
        return A

    def _at_once(self, A: Operator, b: Tensor) -> Solution | None:
        """A shortcut for systems so small that the bookkeeping would cost more than the solve; None if there is none.

        Only a solve that converged counts: why another did not, the long way finds out.
        """
        return None

    @abstractmethod
    def _recurrence(
        self, A: Operator, M: Operator | None, r: Tensor, targets: Tensor, codes: Tensor, patience: Tensor
    ) -> Recurrence:
        """`patience`: steps that a system has to halve its residual before it counts as inconsistent, 0 for any."""

    def _inconsistent(self, step: Tensor, r: Tensor, M: Operator | None) -> Tensor:
        """What becomes of x - x0 where A turned out singular and b outside its range, with residual r."""
        return step


class _Solve:
    """One call: cycles of the recurrence, each from the true residual of the last, until every system is settled."""

    def __init__(
        self,
        method: KrylovMethod,
        A: Operator,
        M: Operator | None,
        b: Tensor,
        x0: Tensor | None,
        callback: Callback | None,
    ):
        self.method, self.A, self.M, self.b, self.callback = method, A, M, b, callback
        batch, n = b.shape
        self.budget = method.max_steps or 10 * n
        self.spent = 0
        b_norms = flat_norm(b)
        self.tolerance = (method.rtol * b_norms).clamp(min=method.atol)
        zero = torch.zeros_like(b)
        self.start = zero if x0 is None else torch.where(b_norms[:, None] > 0, x0, zero)
        self.x = self.start
        self.r = b if x0 is None else b - A @ self.x
        self.norms = self.first_norms = b_norms if x0 is None else flat_norm(self.r)
        self.iterations = torch.zeros(batch, dtype=torch.int64, device=b.device)
        self.codes = torch.full((batch,), kernels.RUNNING, dtype=torch.int8, device=b.device)
        self.codes[self.norms <= self.tolerance] = kernels.CONVERGED
        self.codes[~self.norms.isfinite()] = kernels.NOT_FINITE
        self.doubted = torch.zeros_like(self.codes, dtype=torch.bool)
        self.segments: list[tuple[Tensor, Tensor, Tensor]] = []  # systems, their steps, their norms

    def run(self) -> Solution:
        if self.method.probe_symmetry:
            self.codes[(self.codes == kernels.RUNNING) & ~self.probe.symmetric] = kernels.NOT_SYMMETRIC
        while self.spent < self.budget and bool((self.codes == kernels.RUNNING).any()):
            self._judge(*self._cycle())
        self.codes[self.codes == kernels.RUNNING] = kernels.ITERATION_LIMIT
        return Solution(self.x, self.codes, self.iterations, self.norms, self._history())

    def _cycle(self) -> tuple[Tensor, Tensor, Tensor]:
        """Run the recurrence until it thinks that it is done; returns the corrections y, the codes and the stretches.

        It solves A y = r / scale with scale a power of two, so that no square overflows or underflows.
        """
        scale = power_of_two(self.r)
        state = self.method._recurrence(
            self.A,
            self.M,
            self.r / scale[:, None],
            AIM * self.tolerance / scale,
            self.codes.clone(),
            torch.where(self.doubted, 2 * self.iterations + 10, 0),
        )
        members = torch.arange(len(scale), device=scale.device)
        y, codes, stretch = torch.zeros_like(self.r), self.codes.clone(), torch.zeros_like(scale)
        iterations = torch.zeros_like(self.iterations)
        rows: list[Tensor] = []  # residual norms of `members` since the last harvest
        harvested = 0

        def harvest() -> None:
            y[members], codes[members], iterations[members] = state.y, state.codes, state.iterations
            stretch[members] = state.stretch().to(stretch.dtype)
            if rows:
                norms = torch.stack(rows, 1).to(scale.dtype) * scale[members, None]
                self._remember(members, state.iterations, harvested, norms)

        shown = self.norms.clone()
        running, shrinks = state.running(), True
        while running and self.spent < self.budget:
            norms, known = state.steps(1 if self.callback is not None else min(MOST, self.budget - self.spent))
            self.spent += len(norms)
            rows += norms
            if self.callback is not None:
                shown[members] = state.norms.to(shown.dtype) * scale[members]
                self.callback(self.spent, shown.clone())
            if known is not None:
                running = known
            elif self.spent % ASK_EVERY == 0:
                running = state.running()
            if shrinks and 0 < running < SHRINK_AT * len(members):
                harvest()
                harvested += len(rows)
                rows.clear()
                keep = torch.nonzero(state.codes == kernels.RUNNING)[:, 0]
                shrinks = state.select(keep)
                members = members[keep] if shrinks else members
        harvest()
        self.iterations += iterations
        return scale[:, None] * y, codes, stretch

    def _judge(self, step: Tensor, codes: Tensor, stretch: Tensor) -> None:
        """Move to x + step where that helped, and settle what the recurrence said against the true residual."""
        ran = self.codes == kernels.RUNNING
        x = self.x + step
        r = self.b - self.A @ x
        norms = flat_norm(r)
        reached = norms <= self.tolerance
        if reached[ran].all():  # nothing to tell apart
            self.x, self.r = torch.where(ran[:, None], x, self.x), torch.where(ran[:, None], r, self.r)
            self.norms = torch.where(ran, norms, self.norms)
            self.codes[ran] = kernels.CONVERGED
            return
        halved = norms < self.norms / 2
        broken = (codes != kernels.RUNNING) & (codes != kernels.CONVERGED)
        undo = ~reached & (broken & ~(norms <= self.norms) | self.doubted & ~halved)
        self.x = torch.where(undo[:, None], self.x, x)
        self.r = torch.where(undo[:, None], self.r, r)
        self.norms = torch.where(undo, self.norms, norms)

        self.codes = torch.where(ran, codes, self.codes)
        self.codes[ran & reached] = kernels.CONVERGED
        # the limit alone is no sign of anything, unless a symmetric A would have been done by then
        suspicious = (
            (codes != kernels.RUNNING) | (self.iterations >= r.shape[1]) | (norms >= self.first_norms) | self.doubted
        )
        failed = ran & ~reached & suspicious & (codes != kernels.NOT_FINITE) & (codes != kernels.BAD_PRECONDITIONER)
        if not failed.any():
            return
        probe = self.probe
        # a null vector to half the digits; p'Ap <= 4 eps ||A|| ||p||^2 and A >= 0 give 2 sqrt(eps) ||A||
        null_direction = stretch <= 16 * math.sqrt(torch.finfo(r.dtype).eps) * probe.norm
        drifted = failed & (codes == kernels.CONVERGED)
        claimed = failed & (codes == kernels.INCONSISTENT)
        flat = failed & (codes == kernels.NO_CURVATURE)
        self.codes[drifted] = kernels.STAGNATED
        self.codes[drifted & halved] = kernels.RUNNING
        # a trial from here tells bad condition, where it makes headway, from a residual outside the range
        self.codes[claimed] = kernels.RUNNING
        self.codes[failed & self.doubted & ~halved] = kernels.INCONSISTENT
        self.doubted |= claimed
        self.codes[flat] = kernels.INDEFINITE
        self.codes[flat & null_direction] = kernels.INCONSISTENT
        self.codes[failed & ~probe.symmetric] = kernels.NOT_SYMMETRIC
        singular = failed & (self.codes == kernels.INCONSISTENT)
        if singular.any():
            shortest = self.start + self.method._inconsistent(self.x - self.start, self.r, self.M)
            self.x = torch.where(singular[:, None], shortest, self.x)

    @cached_property
    def probe(self) -> "Probe":
        return probe(self.A, self.b)

    def _remember(self, members: Tensor, iterations: Tensor, harvested: int, norms: Tensor) -> None:
        """Keep the norms of the steps harvested + 1, ... of this cycle that each system took part in."""
        step = torch.arange(harvested + 1, harvested + norms.shape[1] + 1, device=norms.device)
        took_part = step <= iterations[:, None]
        columns = (self.iterations[members, None] + step)[took_part]
        self.segments.append((members[:, None].expand_as(norms)[took_part], columns, norms[took_part]))

    def _history(self) -> Tensor:
        steps = int(self.iterations.max()) if len(self.iterations) else 0
        history = self.norms.new_full((len(self.norms), steps + 1), math.nan)
        history[:, 0] = self.first_norms
        for systems, columns, norms in self.segments:
            history[systems, columns] = norms
        return history


@dataclass(frozen=True)
class Probe:
    """What two products with a random vector tell of A."""

    symmetric: Bool[Tensor, " batch"]
    norm: Float[Tensor, " batch"]  # a lower bound of ||A||_2


def probe(A: Operator, like: Float[Tensor, "batch n"]) -> Probe:
    """<A u, A u> = <u, A A u> for a fixed random u, to half the digits: symmetric A pass, almost no other A does."""
    generator = torch.Generator(like.device).manual_seed(0)
    u = torch.randn(like.shape[1], dtype=like.dtype, device=like.device, generator=generator).repeat(len(like), 1)
    v = A @ u
    scale = power_of_two(v)[:, None]
    v = v / scale
    w = A @ v
    u_norm, v_norm, w_norm = (torch.linalg.vector_norm(t, dim=1) for t in (u, v, w / scale))
    gap = (v_norm.square() - (u * (w / scale)).sum(1)).abs()
    symmetric = gap <= math.sqrt(torch.finfo(like.dtype).eps) * u_norm * w_norm
    return Probe(symmetric, torch.where(v_norm == 0, 0.0, w_norm * scale[:, 0] / v_norm))


def check_vectors(b: Tensor, x0: Tensor | None) -> None:
    for name, vector in (("b", b), ("x0", x0)):
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(vector).__name__}")
        if vector.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {vector.dtype}")
        check_finite(name, vector)
    if b.ndim == 0 or b.shape[-1] == 0:
        raise ValueError(f"b must have shape (n,) or (*batch, n) with n >= 1, got {tuple(b.shape)}")
    if x0 is not None and (x0.shape != b.shape or x0.dtype != b.dtype or x0.device != b.device):
        expected, got = ((tuple(t.shape), t.dtype, str(t.device)) for t in (b, x0))
        raise ValueError(f"x0 must have the shape, dtype and device of b, {expected}, got {got}")
