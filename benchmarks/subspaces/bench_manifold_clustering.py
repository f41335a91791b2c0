"""Projection beside POT and beside an unrolled log-domain loop, R_c beside LU determinants; growth; the user's images.

POT is installed without its dependencies, which the project has, into `.peers/pot` and left out where that fails.
LOCALLY_DATA names the folder that holds mnist/ (IDX, gzip) and cifar10/cifar10.zip.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Comparison, compare, growth
from locally.papers.manifold_linearizing import read_cifar, read_mnist
from locally.subspaces.manifold_clustering import (
    ManifoldLinearizingClustering,
    MLCNet,
    RandomAffine,
    RateReduction,
    ResNet18,
    balance,
    clustering_accuracy,
    coding_rate_membership,
    sinkhorn_projection,
    sinkhorn_projection_,
)

PEERS = Path(__file__).parents[1] / ".peers" / "pot"
POT = "pot==0.9.7.post1"
ETA = 0.175


def main() -> list[Comparison]:
    return [*against_pot(), against_unrolled(), *against_lu(), *growths(), *on_images()]


def against_pot() -> list[Comparison]:
    """Ten half-steps of a batch without gradient, and a whole data set to a tolerance; float32 on both sides."""
    ot = pot()
    if ot is None:
        return []
    results = []
    n = 1024
    S = cosines(n, 128)
    buffer, workspace = torch.empty_like(S), torch.empty(2, n)
    uniform = (torch.ones(n) / n).numpy()
    costs = -S.numpy()

    def ours() -> Tensor:
        return sinkhorn_projection_(buffer.copy_(S), ETA, 10, workspace)

    def theirs(method: str = "sinkhorn") -> Any:
        return n * ot.sinkhorn(uniform, uniform, costs, ETA, method=method, numItermax=5, stopThr=0.0, warn=False)

    # POT starts from the other side, so converged plans are compared
    exact = n * ot.sinkhorn(uniform, uniform, costs, ETA, numItermax=2000, stopThr=1e-9, warn=False)
    gap = float((balance(S, ETA, symmetric=True).membership - torch.from_numpy(exact)).abs().max())
    results.append(Comparison("membership of 1024", "largest difference", gap, gap, gap, "locally", "POT"))
    for method in ("sinkhorn", "sinkhorn_log"):
        peer = (f"POT, {method}", lambda method=method: theirs(method))
        results.append(compare(f"batch of {n}, ten half-steps", ("in place", ours), peer, rounds=9))
    n, tol = 1797, 1e-5
    whole = cosines(n, 32)
    plan, marginal = -whole.numpy(), (torch.ones(n) / n).numpy()
    # POT measures the 2-norm of the error of one marginal, 1/n each; we the largest error of a sum of one
    options: dict[str, Any] = {"numItermax": 100_000, "stopThr": tol / n**0.5, "warn": False}
    report = ot.sinkhorn(marginal, marginal, plan, ETA, log=True, **options)[1]
    results.append(
        compare(
            f"whole set of {n} to {tol:g}",
            ("symmetric scaling", lambda: balance(whole, ETA, tol=tol, symmetric=True)),
            ("POT, sinkhorn", lambda: ot.sinkhorn(marginal, marginal, plan, ETA, **options)),
            rounds=5,
            steps_ours=balance(whole, ETA, tol=tol, symmetric=True).steps,
            steps_peer=int(report["niter"]),
        )
    )
    return results


def pot() -> Any:
    if not (PEERS / "ot").exists():
        print(f"installing {POT} into {PEERS}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(PEERS), POT]
        installed = subprocess.run(command, capture_output=True, text=True)
        if installed.returncode:
            print(f"POT is left out: {installed.stderr.strip().splitlines()[-1]}")
            return None
    sys.path.append(str(PEERS))
    return importlib.import_module("ot")


def against_unrolled() -> Comparison:
    """Forward and backward, two views of a batch, as a training step takes them."""
    C = F.normalize(torch.randn(2, 1024, 128, generator=torch.Generator().manual_seed(0)), dim=-1)
    S = (C @ C.mT).requires_grad_()
    cotangent = torch.randn(S.shape, generator=torch.Generator().manual_seed(1))

    def run(spread: float) -> Callable[[], object]:
        return lambda: torch.autograd.grad(sinkhorn_projection(S, ETA, 10, spread=spread), S, cotangent)

    return compare(
        "two views of 1024, ten half-steps and their gradient",
        ("products with the kernel", run(2.0)),
        ("log-domain loop under autograd", run(1e9)),
        rounds=5,
    )


def against_lu() -> list[Comparison]:
    """R_c and its gradients in Z and G: the batch of determinants of public coding-rate code against ours."""
    results = []
    for n, d in ((400, 32), (1024, 128)):
        Z = F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
        G = sinkhorn_projection((Z @ Z.T).detach(), ETA, 10).requires_grad_()

        def ours(Z: Tensor = Z, G: Tensor = G) -> tuple[Tensor, ...]:
            return torch.autograd.grad(coding_rate_membership(Z, G, 0.2), (Z, G))

        def theirs(Z: Tensor = Z, G: Tensor = G, n: int = n, d: int = d) -> tuple[Tensor, ...]:
            covariances = torch.einsum("ij,ia,ib->jab", G, Z, Z)
            sizes = G.sum(0)
            inside = torch.eye(d) + d / 0.2 / sizes[:, None, None] * covariances
            return torch.autograd.grad((sizes * torch.logdet(inside)).sum() / n, (Z, G))

        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours(), theirs()))
        name = f"R_c and gradients, batch {n}, d = {d}"
        labels = "packed products and Cholesky", "einsum and LU determinants"
        results.append(Comparison(name, "largest relative difference", worst, worst, worst, *labels))
        results.append(compare(name, (labels[0], ours), (labels[1], theirs), rounds=5))
    return results


def growths() -> list[Comparison]:
    def step(n: int, d: int) -> Callable[[], object]:
        z = F.normalize(torch.randn(2, n, d, generator=torch.Generator().manual_seed(0)), dim=-1).requires_grad_()
        objective = RateReduction()
        return lambda: torch.autograd.grad(objective(z, z)[0], z)

    return [
        growth("objective over the batch, d = 64", "MLC", [128, 256, 512, 1024], lambda n: step(n, 64)),
        growth("objective over the dimension, batch 512", "MLC", [32, 64, 128], lambda d: step(512, d)),
    ]


def on_images() -> list[Comparison]:
    folder = Path(os.environ.get("LOCALLY_DATA", "."))
    results = []
    if "LOCALLY_DATA" in os.environ and (folder / "mnist").exists():
        results.append(on_mnist(folder / "mnist"))
    else:
        print("  (MNIST skipped: LOCALLY_DATA names no folder with mnist/)")
    if "LOCALLY_DATA" in os.environ and (folder / "cifar10" / "cifar10.zip").exists():
        results.append(on_cifar(folder / "cifar10" / "cifar10.zip"))
    else:
        print("  (CIFAR-10 skipped: LOCALLY_DATA names no folder with cifar10/cifar10.zip)")
    return results


def on_mnist(folder: Path) -> Comparison:
    """A short training on a CPU, not the full study: errors left against those of k-means on the pixels."""
    mnist = read_mnist(folder)
    mlc = ManifoldLinearizingClustering(
        10,
        z_dim=32,
        hidden_dim=256,
        lam=10.0,
        batch_size=400,
        augment=RandomAffine(mnist.shape, shift=2.0),
        tcr_steps=300,
        mlc_steps=300,
        random_state=0,
    ).fit(mnist.pixels)
    ours = 1 - clustering_accuracy(mlc.labels_, mnist.labels)
    theirs = 1 - clustering_accuracy(KMeans(10, n_init=3, random_state=0).fit_predict(mnist.pixels), mnist.labels)
    ratio = ours / theirs
    detail = {"ours": ours, "peer": theirs, "images": len(mnist.labels)}
    name = f"MNIST, {len(mnist.labels)} images, 600 steps"
    return Comparison(name, "clustering error", ratio, ratio, ratio, "MLC", "k-means on pixels", detail)


def on_cifar(path: Path) -> Comparison:
    """What the objective adds to a step of a quarter-width ResNet-18 on real images."""
    images = read_cifar(path, "test")
    x = torch.from_numpy(images.pixels[:256])
    net = MLCNet(128, 256, 64, ResNet18(images.shape, width=16)).copy_feature_head_()
    objective = RateReduction()

    def network() -> None:
        z, c = net(torch.cat([x, x]))
        (z.sum() + c.sum()).backward()

    z, c = (t.detach().unflatten(0, (2, -1)).requires_grad_() for t in net(torch.cat([x, x])))
    return compare(
        "CIFAR-10, batch 256, two views",
        ("objective and its gradient", lambda: torch.autograd.grad(objective(z, c)[0], (z, c))),
        ("ResNet-18 of width 16 and its gradient", network),
        rounds=3,
    )


def cosines(n: int, d: int) -> Tensor:
    C = F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)), dim=1)
    return C @ C.T


if __name__ == "__main__":
    for line in main():
        print(line)
