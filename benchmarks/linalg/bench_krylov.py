"""CG and MINRES beside SciPy's, one system and many, dense and sparse; the price of a gradient; growth in n."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy import ndarray
from scipy.sparse.linalg import cg, minres

from benchmarks.harness import Comparison, compare, growth, seconds
from locally.linalg.krylov import CG, MINRES, Diagonal, Operator, Sparse

RTOL = 1e-8


def main() -> list[Comparison]:
    return [*sparse_batches(), *preconditioned(), *dense_batches(), *indefinite(), gradient(), *growths()]


def sparse_batches() -> list[Comparison]:
    """One matrix, several right-hand sides: a loop over SciPy's cg is what a reader would write."""
    results = []
    for side, batches in ((32, (1, 8, 64)), (128, (1, 8, 64))):
        A = poisson(side)
        operator = Sparse(as_torch(A))
        for batch in batches:
            b = right_hand_sides(batch, A.shape[0])
            results.append(beside_a_loop(f"Poisson {side} x {side}, sparse", CG(rtol=RTOL), operator, [A] * batch, b))
    return results


def preconditioned() -> list[Comparison]:
    """Jacobi on a matrix whose rows differ in scale by 10^4."""
    A = poisson(64)
    scales = sp.diags_array(np.geomspace(1, 100, A.shape[0]))
    A = sp.csr_array(scales @ A @ scales)
    M = sp.diags_array(1 / A.diagonal())
    matrix = as_torch(A)
    name, method, jacobi = "scaled Poisson 64 x 64, Jacobi", CG(rtol=RTOL), Diagonal.jacobi(matrix)
    return [
        beside_a_loop(name, method, Sparse(matrix), [A] * batch, right_hand_sides(batch, A.shape[0]), (jacobi, M))
        for batch in (1, 8)
    ]


def dense_batches() -> list[Comparison]:
    """A matrix for each system, as in a batch of Gauss-Newton or kernel systems."""
    results = []
    for n, batch in ((64, 1), (64, 8), (64, 256), (256, 64)):
        rng = np.random.default_rng(0)
        factors = rng.standard_normal((batch, n, 2 * n))
        A = factors @ factors.transpose(0, 2, 1) / (2 * n) + 0.01 * np.eye(n)
        b = right_hand_sides(batch, n)
        results.append(beside_a_loop(f"dense {n} x {n}, a matrix each", CG(rtol=RTOL), torch.from_numpy(A), A, b))
    return results


def indefinite() -> list[Comparison]:
    A = poisson(64)
    shift = 0.1  # between eigenvalues of A: some are negative now
    shifted = sp.csr_array(A - shift * sp.eye_array(A.shape[0]))
    name, method, operator = "Poisson 64 x 64 less 0.1", MINRES(rtol=1e-6, shift=shift), Sparse(as_torch(A))
    return [
        beside_a_loop(name, method, operator, [shifted] * batch, right_hand_sides(batch, A.shape[0]))
        for batch in (1, 8)
    ]


def beside_a_loop(
    name: str,
    method: CG | MINRES,
    operator: Operator | torch.Tensor,
    matrices: Sequence[Any],
    b: torch.Tensor,
    preconditioners: tuple[Operator, Any] | tuple[None, None] = (None, None),
) -> Comparison:
    """A batch in one call of ours, and a call of SciPy's for each system; at least 50 ms a timing."""
    ours_M, peer_M = preconditioners
    peer = minres if isinstance(method, MINRES) else cg
    solve = lambda: method.solve(operator, b, preconditioner=ours_M)
    loop = lambda: [peer(A, row, rtol=method.rtol, M=peer_M) for A, row in zip(matrices, b.numpy())]
    solve()
    repeats = max(1, round(0.05 / seconds(solve)))
    count = f", {len(b)} systems" if len(b) > 1 else ""
    return compare(
        name,
        (f"{type(method).__name__}{count}", lambda: [solve() for _ in range(repeats)]),
        (f"SciPy {peer.__name__}{count and ' in a loop'}", lambda: [loop() for _ in range(repeats)]),
        rounds=5,
    )


def gradient() -> Comparison:
    """The backward pass is one more solve, however many steps the first one took."""
    matrix = as_torch(poisson(64))
    b = right_hand_sides(8, 64 * 64).requires_grad_()

    def forward_and_backward() -> None:
        CG(rtol=RTOL).solve(operator, b).x.square().sum().backward()

    operator = Sparse(matrix)
    forward = lambda: CG(rtol=RTOL).solve(operator, b.detach())
    return compare("Poisson 64 x 64, 8 systems", ("solve and gradient", forward_and_backward), ("solve", forward))


def growths() -> list[Comparison]:
    """100 steps each, so that the slope is that of a step."""

    def steps(n: int) -> Callable[[], object]:
        side = round(n**0.5)
        operator, b = Sparse(as_torch(poisson(side))), right_hand_sides(1, side * side)
        return lambda: CG(rtol=1e-15, max_steps=100).solve(operator, b)

    def systems(batch: int) -> Callable[[], object]:
        operator, b = Sparse(as_torch(poisson(64))), right_hand_sides(batch, 64 * 64)
        return lambda: CG(rtol=1e-15, max_steps=100).solve(operator, b)

    return [
        growth("100 steps of CG over n", "CG", [64**2, 128**2, 256**2, 512**2], steps),
        growth("100 steps of CG over the batch, 64 x 64", "CG", [1, 4, 16, 64], systems),
    ]


def poisson(side: int) -> sp.csr_array:
    T = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side))
    return sp.csr_array(sp.kronsum(T, T, format="csr"))


def as_torch(A: sp.csr_array) -> torch.Tensor:
    parts: list[ndarray] = [A.indptr, A.indices, A.data]
    return torch.sparse_csr_tensor(*(torch.from_numpy(part) for part in parts), size=A.shape)


def right_hand_sides(batch: int, n: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal((batch, n)))
