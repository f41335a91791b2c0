"""Stochastic Lanczos quadrature. Source: Ubaru, Chen and Saad, SIAM J. Matrix Anal. 38 (2017)."""

from collections.abc import Callable

import torch
from torch import Generator

from locally.checks import check_choice, check_count
from locally.linalg.lanczos.measure import SpectralMeasure
from locally.linalg.lanczos.recurrence import Operator, describe, lanczos


def spectral_measure(
    op: Operator,
    *,
    steps: int = 60,
    probes: int = 8,
    distribution: str = "rademacher",
    at_once: int | None = None,
    memory: int = 2**29,
    size: int | None = None,
    generator: Generator | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> SpectralMeasure:
    """Stochastic Lanczos quadrature of the spectrum of a symmetric operator.

    Each probe costs `steps` products and 4 steps^2 p flops. Probes go through Lanczos together, which divides the fixed
    cost of a product among them; the bases of those under way are held in memory.

    Args:
        op: a symmetric matrix (p, p), or a function as for `lanczos`.
        steps: nodes a probe, >= 1.
        probes: independent starting vectors, >= 1.
        distribution: "rademacher" or "gaussian", both scaled to length 1.
        at_once: probes in one stack, >= 1; default as many as `memory` bytes allow. With 1 the operator sees vectors.
        size: p, for functions without `shape`; such run in single precision on the CPU.
        callback: called with (products done, products in all).

    Raises:
        ValueError, ArithmeticError: as `lanczos`.
    """
    check_count("steps", steps)
    check_count("probes", probes)
    check_count("memory", memory)
    check_choice("distribution", distribution, ("rademacher", "gaussian"))
    if size is None:
        p, dtype, device = describe(op)
    else:
        check_count("size", size)
        p, dtype, device = (
            size,
            getattr(op, "dtype", torch.get_default_dtype()),
            getattr(op, "device", torch.device("cpu")),
        )
    if at_once is None:
        at_once = max(1, memory // (min(steps, p) * p * dtype.itemsize))
    check_count("at_once", at_once)
    found = []
    for first in range(0, probes, at_once):
        k = min(at_once, probes - first)
        # one by one: the same seed gives the same probes, however many run together
        start = torch.stack([torch.randn(p, dtype=dtype, device=device, generator=generator) for _ in range(k)])
        if distribution == "rademacher":
            start = torch.where(start < 0, -1.0, 1.0).to(dtype)

        def tell(done: int, total: int, first: int = first, k: int = k) -> None:
            if callback is not None:
                callback(first * total + k * done, probes * total)

        found.append(lanczos(op, start, steps, callback=tell).quadrature())
    nodes, weights, taken = (torch.cat([getattr(f, name) for f in found]) for name in ("nodes", "weights", "steps"))
    return SpectralMeasure(nodes, weights, taken, p)


# Products and orthogonality -------------------------------------------------------------------------------------------
