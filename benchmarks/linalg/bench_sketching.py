"""Kaczmarz sweeps beside one product with the matrix, which reads the same memory once; whole solves beside LSMR."""

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
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((20_000, 1000))  # 160 MB, far beyond any cache
    sparse = sp.random_array((400_000, 20_000), density=1e-3, format="csr", rng=rng)
    return [
        *against_a_product("dense 20000 x 1000", dense),
        *against_a_product("sparse 400000 x 20000, 20 entries a row", sparse),
        solve("dense 20000 x 1000", dense),
        blocks(),
        growth("dense sweep over entries", "Rows.sweep", [8_000_000, 16_000_000, 32_000_000], sweep),
    ]


def on_one_core(product: Callable[[], object]) -> None:
    """A sweep cannot be shared out: each row needs the step before it."""
    with threadpool_limits(1):
        product()


def against_a_product(name: str, A: Any) -> list[Comparison]:
    rng = np.random.default_rng(1)
    rows, x = Rows.of(A), np.zeros(A.shape[1])
    v = rng.standard_normal(A.shape[1])
    b = A @ v
    mixed = rng.permutation(A.shape[0])
    out = np.zeros(A.shape[0])
    products = products_sparse if rows.sparse else products_dense
    return [
        compare(
            f"one sweep in storage order, {name}",
            ("Rows.sweep", lambda: rows.sweep(x, b)),
            ("product with the matrix", lambda: A @ v),
            rounds=15,
        ),
        compare(
            f"one sweep in storage order, {name}",
            ("Rows.sweep", lambda: rows.sweep(x, b)),
            ("product with the matrix, one core", lambda: on_one_core(lambda: A @ v)),
            rounds=15,
        ),
        compare(
            f"one sweep in random order, {name}",
            ("Rows.sweep", lambda: rows.sweep(x, b, mixed)),
            ("inner products with the rows in that order", lambda: products(*rows.arrays, v, mixed, out)),
            rounds=15,
        ),
    ]


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
