"""Kaczmarz sweeps beside passes over the same rows on one core; whole solves beside LSMR.

A sweep reads each row once, as a product A v does, and writes x besides, which stays in cache: 8 bytes an entry of a
dense matrix, 12 of a sparse one (a number and a 32-bit column), `bytes` in the details. Both matrices have 360 MB,
beyond the last-level cache, so that every pass over them fetches its rows from memory. Three passes are compared with:

- the product, as NumPy or SciPy computes it. A sweep cannot be shared out, since each row needs the step before it, so
  the product that it is measured by runs on one core too; the dense one on all cores stands beside it. SciPy's sparse
  product knows one core only.
- reading alone: the sum of the stored numbers, the most that memory gives one core. A sparse product is slower than
  that, because it has to look up v at each entry; a sweep looks up x and writes it back.
- in random order, the inner products of the rows in that order.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
from numba import njit
from scipy.sparse.linalg import lsmr
from threadpoolctl import threadpool_limits

from benchmarks.harness import Comparison, compare, growth
from locally.linalg.sketching import Gaussian, Kaczmarz, Rows, SketchAndProject


def main() -> list[Comparison]:
    dense = np.random.default_rng(0).standard_normal((45_000, 1000))
    sparse = scattered(1_500_000, 20_000, 20)
    return [
        *against_a_pass("dense 45000 x 1000", dense),
        *against_a_pass("sparse 1500000 x 20000, 20 entries a row", sparse),
        solve("dense 45000 x 1000", dense),
        blocks(),
        growth("dense sweep over entries", "Rows.sweep", [8_000_000, 16_000_000, 32_000_000], sweep),
    ]


def scattered(n: int, d: int, mean: int) -> sp.csr_array:
    """Rows of normal entries in random columns, `mean` of them a row on average, each row of a length of its own."""
    rng = np.random.default_rng(0)
    indptr = np.zeros(n + 1, dtype=np.int32)
    np.cumsum(rng.binomial(d, mean / d, size=n), out=indptr[1:])
    columns = rng.integers(d, size=indptr[-1], dtype=np.int32)
    A = sp.csr_array((rng.standard_normal(columns.size), columns, indptr), shape=(n, d))
    A.sum_duplicates()
    return A


def on_one_core(product: Callable[[], object]) -> None:
    with threadpool_limits(1):
        product()


def against_a_pass(name: str, A: Any) -> list[Comparison]:
    rng = np.random.default_rng(1)
    rows, x = Rows.of(A), np.zeros(A.shape[1])
    v = rng.standard_normal(A.shape[1])
    b = A @ v
    mixed = rng.permutation(A.shape[0])
    out = np.zeros(A.shape[0])
    products = products_sparse if rows.sparse else products_dense
    stored = [A.data, A.indices] if rows.sparse else [A.reshape(-1)]
    size = sum(part.nbytes for part in stored)
    passes: list[tuple[str, Callable[[], object]]] = [
        ("product with the matrix, one core", lambda: on_one_core(lambda: A @ v)),
        ("reading the matrix, one core", lambda: [total(part) for part in stored]),
    ]
    if not rows.sparse:
        passes.append(("product with the matrix, all cores", lambda: A @ v))
    in_order = ("Rows.sweep", lambda: rows.sweep(x, b))
    return [
        *(compare(f"one sweep in storage order, {name}", in_order, one, rounds=15, bytes=size) for one in passes),
        compare(
            f"one sweep in random order, {name}",
            ("Rows.sweep", lambda: rows.sweep(x, b, mixed)),
            ("inner products with the rows in that order", lambda: products(*rows.arrays, v, mixed, out)),
            rounds=15,
            bytes=size,
        ),
    ]


@njit(fastmath={"reassoc"})
def total(numbers):
    """Sum in as many partial sums as the compiler likes, so that memory alone sets the time."""
    s = numbers[0]
    for i in range(1, numbers.size):
        s += numbers[i]
    return s


@njit(fastmath={"reassoc", "contract", "nsz"})
def products_dense(A, v, order, out):
    for t in range(order.size):
        total = 0.0
        for j in range(v.size):
            total += A[order[t], j] * v[j]
        out[t] = total


@njit
def products_sparse(indptr, indices, data, v, order, out):
    for t in range(order.size):
        total = 0.0
        for p in range(indptr[order[t]], indptr[order[t] + 1]):
            total += data[p] * v[indices[p]]
        out[t] = total


def solve(name: str, A: Any) -> Comparison:
    b = A @ np.random.default_rng(2).standard_normal(A.shape[1])
    rows = Rows.of(A)
    kaczmarz = SketchAndProject(sketch=Kaczmarz(sampling="norm"), rtol=1e-6)
    return compare(
        f"consistent system to rtol 1e-6, {name}",
        ("Kaczmarz", lambda: kaczmarz.solve(rows, b)),
        ("SciPy lsmr", lambda: lsmr(A, b, atol=1e-6, btol=1e-6)),
        rounds=5,
    )


def blocks() -> Comparison:
    """What one sketch of 32 rows brings over 32 sketches of one: products of matrices instead of vectors."""
    rng = np.random.default_rng(3)
    A = rng.standard_normal((500, 500)) + 30 * np.eye(500)
    b = A @ rng.standard_normal(500)

    def work(size: int) -> Callable[[], object]:
        sketch = SketchAndProject(sketch=Gaussian(block_size=size), rtol=1e-3)
        return lambda: sketch.solve(A, b)

    return compare("500 unknowns to rtol 1e-3", ("32 Gaussian rows", work(32)), ("single ones", work(1)), rounds=5)


def sweep(entries: int) -> Callable[[], object]:
    A = np.random.default_rng(0).standard_normal((entries // 1000, 1000))
    rows, x, b = Rows.of(A), np.zeros(1000), np.ones(len(A))
    return lambda: rows.sweep(x, b)


if __name__ == "__main__":
    for line in main():
        print(line)
