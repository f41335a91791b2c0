"""Spectra and top eigenvalues beside PyHessian, sweeps beside trainings one by one, and growth of the cost.

PyHessian runs on the project's own torch: it is put into a folder of its own under `benchmarks/.peers/` the first time,
without its dependencies, and left out with a reason where that fails. Its density needs `torch.eig`, which torch has
dropped; the top eigenvalue and the quadrature by its own products are what can still be compared.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import Comparison, compare, growth
from locally.linalg.curvature import Batch
from locally.linalg.lanczos import ExtremeEigenvalues
from locally.optimize.batch_curvature import BatchCurvature, LearningRateSweep
from locally.optimize.batch_curvature.networks import perceptron, train_on_all
from locally.papers.batch_learning_rates import CROSS_ENTROPY, digits

PEERS = Path(__file__).parents[1] / ".peers" / "pyhessian"


def main() -> list[Comparison]:
    torch.set_num_threads(1)
    results = [*sweeps(), *growths()]
    if pyhessian_is_here():
        results += top_eigenvalue()
    return results


def pyhessian_is_here() -> bool:
    if not PEERS.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS)]
        if subprocess.run([*command, "pyhessian==0.1"], check=False).returncode != 0:
            print("PyHessian could not be installed: left out")
            return False
    sys.path.append(str(PEERS))
    return True


def top_eigenvalue() -> list[Comparison]:
    """The largest eigenvalue to a relative 1e-4 of a trained network: Lanczos beside power iteration."""
    from pyhessian import hessian

    found = []
    for width in (32, 256):
        data = digits()
        model = perceptron(64, width, width, 10, seed=0)
        train_on_all(model, data, steps=100)

        def ours(model: nn.Module = model, data: Batch = data) -> float:
            op = BatchCurvature().operator(model, CROSS_ENTROPY, data)
            start = torch.randn(op.shape[0], generator=torch.Generator().manual_seed(0))
            return float(ExtremeEigenvalues(rtol=1e-4).solve(op, start).values[0])

        def theirs(model: nn.Module = model, data: Batch = data) -> float:
            torch.manual_seed(0)
            values, _ = hessian(model, CROSS_ENTROPY, data=data, cuda=False).eigenvalues(maxIter=500, tol=1e-4)
            return float(values[0])

        parameters = sum(p.numel() for p in model.parameters())
        detail = {"value_ours": ours(), "value_peer": theirs()}
        name = f"largest eigenvalue, {parameters} parameters"
        found.append(compare(name, ("ExtremeEigenvalues", ours), ("PyHessian", theirs), rounds=5, **detail))
    return found


def sweeps() -> list[Comparison]:
    """Twelve learning rates, three repetitions, 50 steps on batches of 16."""
    data = digits()
    rates = [2.0**-k for k in range(12)]
    model = perceptron(64, 32, 10, seed=0)

    def together() -> object:
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return LearningRateSweep(steps=50).run(model, CROSS_ENTROPY, data, rates, 16, generators=generators)

    def one_by_one() -> None:
        for seed in range(3):
            for rate in rates:
                copy = perceptron(64, 32, 10, seed=0)
                optimizer = torch.optim.SGD(copy.parameters(), lr=rate)
                generator = torch.Generator().manual_seed(seed)
                for _ in range(50):
                    rows = torch.randperm(len(data[1]), generator=generator)[:16]
                    optimizer.zero_grad()
                    CROSS_ENTROPY(copy(data[0][rows]), data[1][rows]).backward()
                    optimizer.step()

    return [compare("36 trainings", ("LearningRateSweep", together), ("torch.optim.SGD, a loop", one_by_one), rounds=5)]


def growths() -> list[Comparison]:
    data = digits()

    def report(width: int) -> Callable[[], object]:
        model = perceptron(64, width, 10, seed=0)
        curvature = BatchCurvature(steps=20, probes=1, noise_examples=100, rtol=1e-2)
        return lambda: curvature.measure(model, CROSS_ENTROPY, data)

    return [growth("report over the width of the network", "BatchCurvature", (32, 128, 512), report)]


if __name__ == "__main__":
    for line in main():
        print(line)
