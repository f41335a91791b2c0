"""Everything that has device code, checked against the processor and timed on a CUDA card, in under ten minutes.

python -m benchmarks.gpu [--device cuda:0]

Each check first compares what the device computes with float64 on the processor and ends with an error where they
differ; then it times. Results go to `benchmarks/results/gpu.json`. Without a card it says so and ends well: the tests
run the same kernels in Triton's interpreter. `--device cpu --small` tries the checks themselves.
"""

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Comparison, seconds

RESULT = Path(__file__).parent / "results" / "gpu.json"


def main(device: str, small: bool) -> list[Comparison]:
    found: list[Comparison] = []
    for check in (attention, krylov, bounds, local_learning, mixing, decoding):
        print(f"\n{check.__name__}", flush=True)
        for comparison in check(torch.device(device), small):
            print(f"  {comparison}", flush=True)
            found.append(comparison)
    return found


def attention(device: torch.device, small: bool) -> Iterator[Comparison]:
    """Local linear attention: triton's forward and backward pass against the written-out form, then beside SDPA."""
    from benchmarks.sequence import bench_local_linear_attention as bench
    from locally.sequence.local_linear_attention import local_linear_attention
    from locally.sequence.local_linear_attention.reference import reference

    n = 64 if small else 512
    drawn = [torch.randn(1, 2, n, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    exact = [x.double().requires_grad_() for x in drawn]
    wanted = reference(*exact, ridge=10.0).output
    wanted.square().sum().backward()
    ours = [x.to(device).requires_grad_() for x in drawn]
    backend = "triton" if device.type == "cuda" else "torch"
    output = local_linear_attention(*ours, ridge=10.0, solver="cg", backend=backend)
    output.square().sum().backward()
    agree("output", output, wanted, 1e-3)
    for name, a, b in zip(("query", "key", "value"), ours, exact):
        agree(f"gradient of the {name}", grad(a), grad(b), 1e-2)
    if device.type == "cuda":
        yield from bench.gpu()


def krylov(device: torch.device, small: bool) -> Iterator[Comparison]:
    """Batched CG on a Poisson matrix: the same solutions, and time beside a plain loop over cuSPARSE products."""
    from benchmarks.linalg.bench_krylov import as_torch, poisson, right_hand_sides
    from locally.linalg.krylov import CG, Sparse

    side, batch = (16, 4) if small else (256, 64)
    A = as_torch(poisson(side))
    b = torch.as_tensor(right_hand_sides(batch, side * side))
    wanted = CG(rtol=1e-10).solve(Sparse(A), b).x if small else None
    there, rhs = A.to(device), b.to(device)
    solve = lambda: CG(rtol=1e-8).solve(Sparse(there), rhs)
    found = solve()
    residual = (rhs.mT - there @ found.x.mT).norm(dim=0) / rhs.norm(dim=1)
    if float(residual.max()) > 1e-6:
        raise AssertionError(f"CG left a relative residual of {float(residual.max()):.2g}")
    if wanted is not None:
        agree("solution", found.x, wanted, 1e-6)
    steps = int(found.iterations.max())
    yield side_by_side(
        f"{batch} systems of {side * side} unknowns, {steps} steps", device, ("CG", solve),
        ("torch, written out", lambda: plain_cg(there, rhs, steps)),
    )  # fmt: skip


def plain_cg(A: Tensor, b: Tensor, steps: int) -> Tensor:
    """What a reader writes: one sparse product for all systems a step, no test of convergence."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r.square().sum(1, keepdim=True)
    for _ in range(steps):
        q = (A @ p.mT).mT
        alpha = rr / (p * q).sum(1, keepdim=True)
        x, r = x + alpha * p, r - alpha * q
        rr, last = r.square().sum(1, keepdim=True), rr
        p = r + rr / last * p
    return x


def bounds(device: torch.device, small: bool) -> Iterator[Comparison]:
    """Certified constants of all outputs: the processor's value, and one batch beside a loop over outputs."""
    from locally.papers.local_lipschitz import perceptron
    from locally.tangent.lipschitz import LocalLipschitz

    width = 32 if small else 512
    net = perceptron(16, width, 4, 10, 0).double()
    x = torch.full((1, 16), 0.5, dtype=torch.float64)
    estimator = LocalLipschitz(samples=1)
    wanted = estimator.certify(net, x, 0.1).per_output
    net, x = net.to(device), x.to(device)
    certify = lambda: estimator.certify(net, x, 0.1).per_output
    agree("certified constants", certify(), wanted, 1e-9)
    rows = torch.eye(10, dtype=torch.float64, device=device)
    yield side_by_side(
        f"10 outputs, three hidden layers of {width}", device, ("one batch", certify),
        ("loop over outputs", lambda: [estimator.certify(net, x, 0.1, spec=row[None]) for row in rows]),
    )  # fmt: skip


def local_learning(device: torch.device, small: bool) -> Iterator[Comparison]:
    """A step whose backward passes run beside the next forward ones: the same gradients, and time beside two peers."""
    from torch.nn import functional as F

    from locally.training.local_learning import DGL, LocalLearner, cifar_resnet

    batch = 8 if small else 256
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    y = (torch.arange(batch) % 10).to(device)

    def learner() -> LocalLearner:
        net = cifar_resnet(8 if small else 32, generator=torch.Generator().manual_seed(0)).to(device)
        made = LocalLearner(net, DGL(), example=x[:2], classes=10, cuts=4, generator=torch.Generator().manual_seed(1))
        return made.to(device)

    one, other = learner(), learner()
    agree("losses", other.local_step(x, y, overlap=True), one.local_step(x, y), 1e-4)
    for a, b in zip(one.parameters(), other.parameters()):
        agree("gradients", grad(b), grad(a), 1e-2)
    net = learner().chain
    overlapped = ("overlapped", lambda: other.local_step(x, y, overlap=True))
    name = f"DGL, 4 blocks, batch {batch}"
    yield side_by_side(name, device, overlapped, ("in sequence", lambda: one.local_step(x, y)))
    yield side_by_side(name, device, overlapped, ("backpropagation", lambda: F.cross_entropy(net(x), y).backward()))


def mixing(device: torch.device, small: bool) -> Iterator[Comparison]:
    """Nearest-neighbour averages of all nodes: the processor's, and time beside the product that distances cost."""
    from locally.training.byzantine import NearestNeighborAverage

    n, f, D = (20, 2, 1000) if small else (100, 9, 1_000_000)
    pool = torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    seen, who = np.ones((n, n), dtype=bool), np.arange(n)
    rule, there = NearestNeighborAverage(f), pool.to(device)
    agree("averages", rule.mix(there, seen, who), rule.mix(pool.double(), seen, who), 1e-4)
    yield side_by_side(
        f"{n} nodes, D = {D:,}", device, ("NNA at all nodes", lambda: rule.mix(there, seen, who)),
        ("X X^T", lambda: there @ there.mT),
    )  # fmt: skip


def decoding(device: torch.device, small: bool) -> Iterator[Comparison]:
    """Masked diffusion: with caches beside without, on the device."""
    from benchmarks.sequence import bench_diffusion_decoding as bench

    if not small:
        yield from bench.caches(str(device))


def agree(name: str, found: Tensor, wanted: Tensor, rtol: float) -> None:
    """Relative to the largest entry."""
    gap = float((found.detach().double().cpu() - wanted.detach().double().cpu()).abs().max())
    scale = float(wanted.detach().abs().max())
    if not gap <= rtol * scale:
        raise AssertionError(f"{name}: apart by {gap:.3g}, where {rtol:g} of {scale:.3g} is allowed")


def grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def side_by_side(
    name: str,
    device: torch.device,
    ours: tuple[str, Callable[[], object]],
    peer: tuple[str, Callable[[], object]],
    rounds: int = 7,
) -> Comparison:
    """Alternating rounds, the device's queue empty before and after each."""

    def timed(work: Callable[[], object]) -> float:
        def finished() -> None:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return seconds(finished)

    timed(ours[1]), timed(peer[1])
    times = [(timed(ours[1]), timed(peer[1])) for _ in range(rounds)]
    ratios = [a / b for a, b in times]
    detail: dict[str, Any] = {
        "seconds_ours": statistics.median(a for a, _ in times),
        "seconds_peer": statistics.median(b for _, b in times),
        "peak_memory_mib": peak_memory(device, ours[1]),
    }
    return Comparison(
        f"{name}, {device}", "time", statistics.median(ratios), min(ratios), max(ratios), ours[0], peer[0], detail
    )


def peak_memory(device: torch.device, work: Callable[[], object]) -> float:
    if device.type != "cuda":
        return math.nan
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 2**20


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cuda", help="a torch device, such as cuda:0")
    parser.add_argument("--small", action="store_true", help="tiny sizes, nothing stored: tries the checks themselves")
    return parser.parse_args(words)


if __name__ == "__main__":
    options = _arguments(sys.argv[1:])
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("no CUDA card here: nothing is timed; the tests run the kernels in Triton's interpreter")
        sys.exit(0)
    comparisons = main(options.device, options.small)
    if not options.small:
        card = torch.cuda.get_device_name(options.device) if options.device != "cpu" else "cpu"
        result = {
            "benchmark": "gpu",
            "python": platform.python_version(),
            "card": card,
            "versions": {"torch": torch.__version__},
            "comparisons": [c.to_dict() for c in comparisons],
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{RESULT}")
