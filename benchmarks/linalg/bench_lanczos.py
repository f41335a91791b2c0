"""Extreme eigenvalues beside SciPy's ARPACK, quadrature with probes together and one by one, and growth of the cost."""

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.harness import Comparison, compare, growth
from locally.linalg.curvature import Hessian
from locally.linalg.lanczos import ExtremeEigenvalues, lanczos, spectral_measure


def hessian(width: int, examples: int = 512) -> Hessian:
    torch.manual_seed(0)
    X, y = load_digits(return_X_y=True)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    data = torch.tensor(X[:examples] / 16, dtype=torch.float32), torch.tensor(y[:examples])
    return Hessian(model, nn.functional.cross_entropy, data)


def main() -> list[Comparison]:
    torch.set_num_threads(1)
    return [*extremes(), *stacks(), *growths()]


def extremes() -> list[Comparison]:
    """Three largest eigenpairs to a relative 1e-5, by the same products."""
    found = []
    for width in (32, 256):
        op = hessian(width)
        products = {"ours": 0, "ARPACK": 0}
        start = torch.randn(op.shape[0], generator=torch.Generator().manual_seed(0))

        def ours(op: Hessian = op, start: Tensor = start, count: dict[str, int] = products) -> Tensor:
            pairs = ExtremeEigenvalues(largest=3, rtol=1e-5).solve(op, start)
            count["ours"] = pairs.products
            return pairs.values

        def theirs(op: Hessian = op, start: Tensor = start, count: dict[str, int] = products) -> np.ndarray:
            count["ARPACK"] = 0

            def product(v: np.ndarray) -> np.ndarray:
                count["ARPACK"] += 1
                return op(torch.from_numpy(v.ravel())).numpy()

            operator = LinearOperator(op.shape, matvec=product, dtype=np.float32)
            values, _ = eigsh(operator, k=3, which="LA", tol=1e-5, v0=start.numpy())
            return values

        np.testing.assert_allclose(np.sort(ours().numpy()), np.sort(theirs()), rtol=1e-3)
        name = f"3 largest eigenvalues, {op.shape[0]} parameters"
        found.append(compare(name, ("ExtremeEigenvalues", ours), ("SciPy eigsh (ARPACK)", theirs)))
        ratio = products["ours"] / products["ARPACK"]
        detail = dict(products)
        ours_, peer = "ExtremeEigenvalues", "SciPy eigsh (ARPACK)"
        found.append(Comparison(name, "products", ratio, ratio, ratio, ours_, peer, detail))
    return found


def stacks() -> list[Comparison]:
    """Eight probes of 30 steps in one stack beside one after the other."""
    found = []
    for width in (16, 64, 256):
        op = hessian(width)

        def quadrature(at_once: int, op: Hessian = op) -> object:
            generator = torch.Generator().manual_seed(0)
            return spectral_measure(op, steps=30, probes=8, at_once=at_once, generator=generator)

        ours = ("8 probes together", lambda run=quadrature: run(8))
        peer = ("8 probes one by one", lambda run=quadrature: run(1))
        found.append(compare(f"quadrature, {op.shape[0]} parameters", ours, peer, rounds=5))
    return found


def growths() -> list[Comparison]:
    def over_size(p: int):
        d = torch.linspace(-1, 1, p)
        start = torch.ones(1, p)
        return lambda: lanczos(lambda v: d * v, start, 30)

    def over_steps(m: int):
        d = torch.linspace(-1, 1, 200_000)
        start = torch.ones(1, 200_000)
        return lambda: lanczos(lambda v: d * v, start, m)

    return [
        growth("30 steps over the size of the matrix", "lanczos", (50_000, 100_000, 200_000, 400_000), over_size),
        growth("200 000 rows over the steps", "lanczos", (10, 20, 40, 80), over_steps),
    ]


if __name__ == "__main__":
    for comparison in main():
        print(comparison)
