"""Kernels beside neural-tangents (jit, float64, the same cores), which is installed into `benchmarks/.peers/` at need.

The two agree to 1e-6 or the benchmark stops. Without neural-tangents, the step-by-step recursion on tensors, which
stores the whole state after each layer as a straightforward implementation does, stands in for it. The peer's seconds
are taken in its own process, without the exchange of messages.
"""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Comparison, growth, seconds
from benchmarks.tangent.tangents_peer import elsewhere, inputs
from locally.tangent.kernel import InfiniteNetwork, empirical_ntk

CASES = {
    "NNGP and NTK, 5 ReLU layers, 2000 x 784": ("relu", 5, [2000, 784]),
    "NNGP and NTK, 5 erf layers, 2000 x 784": ("erf", 5, [2000, 784]),
    "3 convolutions, flatten, 500 images 3 x 8 x 8": ("flatten", 3, [500, 3, 8, 8]),
    "3 convolutions, flatten, 100 images 3 x 16 x 16": ("flatten", 3, [100, 3, 16, 16]),
    "3 convolutions, pooling, 60 images 3 x 8 x 8": ("pooling", 3, [60, 3, 8, 8]),
    "3 convolutions, pooling, 12 images 3 x 16 x 16": ("pooling", 3, [12, 3, 16, 16]),
}
SIZES = [784, 512, 512, 10]


def main() -> list[Comparison]:
    ask = elsewhere()
    return [*infinite(ask), *finite(ask), *growths()]


def network(kind: str, depth: int) -> InfiniteNetwork:
    if kind in ("relu", "erf"):
        return InfiniteNetwork.mlp(depth, kind)
    return InfiniteNetwork.cnn(depth, pooling=kind == "pooling")


def infinite(ask: Callable[..., Any] | None) -> list[Comparison]:
    results = []
    for name, (kind, depth, shape) in CASES.items():
        x, net = inputs(shape), network(kind, depth)
        ours = lambda x=x, net=net: net.kernel(x, backend="compiled")
        if ask is None:
            reference = lambda x=x, net=net: net.kernel(x, backend="reference")
            results.append(in_turn(name, ours, "step by step on tensors", lambda work=reference: seconds(work)))
            continue
        theirs = lambda kind=kind, depth=depth, shape=shape: ask("kernel", kind=kind, depth=depth, shape=shape)
        error = np.abs(ours().ntk[:3, :3].ravel() / theirs()[1:] - 1).max()
        if error > 1e-6:
            raise AssertionError(f"{name}: differs from neural-tangents by {error:.2g}")
        results.append(in_turn(name, ours, "neural-tangents", lambda work=theirs: work()[0], error=float(error)))
    return results


def finite(ask: Callable[..., Any] | None) -> list[Comparison]:
    net = InfiniteNetwork.mlp(2).finite(SIZES[0], SIZES[1], SIZES[-1], generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(inputs([64, SIZES[0]])).float()
    ours = lambda: empirical_ntk(net, x)
    name = "empirical NTK, 784-512-512-10, 64 examples"
    results = [
        in_turn(name, ours, f"locally, {m}", lambda m=m: seconds(lambda: empirical_ntk(net, x, method=m)), rounds=3)
        for m in ("jacobian", "vector_product")
    ]
    for way in ("JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS", "STRUCTURED_DERIVATIVES") if ask else ():
        theirs = lambda way=way: ask("empirical", way=way, sizes=SIZES, n=64)[0]
        results.append(in_turn(name, ours, f"neural-tangents, {way}", theirs, rounds=3))
    return results


def in_turn(
    name: str, ours: Callable[[], object], peer: str, theirs: Callable[[], float], rounds: int = 5, **detail: Any
) -> Comparison:
    """As `harness.compare`, for a peer that reports its own seconds."""
    ours(), theirs()
    pairs = []
    for i in range(rounds):
        first = theirs() if i % 2 else None
        own = seconds(ours)
        pairs.append((own, theirs() if first is None else first))
    ratios = [a / b for a, b in pairs]
    detail |= {
        "seconds_ours": statistics.median(a for a, _ in pairs),
        "seconds_peer": statistics.median(b for _, b in pairs),
        "rounds": rounds,
    }
    return Comparison(name, "time", statistics.median(ratios), min(ratios), max(ratios), "locally", peer, detail)


def growths() -> list[Comparison]:
    def dense(n: int) -> Callable[[], object]:
        x, net = inputs([n, 64]), InfiniteNetwork.mlp(5)
        return lambda: net.kernel(x, backend="compiled")

    def pooled(side: int) -> Callable[[], object]:
        x, net = inputs([20, 3, side, side]), InfiniteNetwork.cnn(3, pooling=True)
        return lambda: net.kernel(x, backend="compiled")

    return [
        growth("5 ReLU layers, over examples", "InfiniteNetwork.kernel", [500, 1000, 2000, 4000], dense),
        growth(
            "3 convolutions with pooling, over the side of the image", "InfiniteNetwork.kernel", [6, 8, 12, 16], pooled
        ),
    ]


if __name__ == "__main__":
    for line in main():
        print(line)
