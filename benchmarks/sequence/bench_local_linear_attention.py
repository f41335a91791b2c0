"""Time and memory over the length: blockwise local linear attention, the definition written out, and PyTorch's SDPA.

On the CPU in one run; `gpu` times the triton kernels where there is a device.
"""

import math
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Comparison, compare, growth, seconds
from locally.sequence.local_linear_attention import KeyValueCache, lla_decode, local_linear_attention

HEADS = 8
LENGTHS = (128, 256, 512, 1024)
Inputs = tuple[Tensor, Tensor, Tensor]


def main() -> list[Comparison]:
    return [*forward_and_backward(), *over_length(), *memory(), *decoding(), *gpu()]


def inputs(n: int, d: int, heads: int = HEADS, grad: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(1, heads, n, d, generator=generator, requires_grad=grad) for _ in range(3))
    return q, k, v


def written_out(q: Tensor, k: Tensor, v: Tensor, ridge: float = 1.0) -> Tensor:
    """What one would write first: all weights, all d x d matrices, one batched solve."""
    n, d = q.shape[-2:]
    logits = (q @ k.mT * d**-0.5).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    w = (logits - logits.amax(-1, keepdim=True)).exp()
    omega = w.sum(-1, keepdim=True)
    first = w @ k
    second = torch.einsum("bhij,bhjd,bhje->bhide", w, k, k)
    outer = lambda a, b: a.unsqueeze(-1) * b.unsqueeze(-2)
    A = second - outer(first, q) - outer(q, first) + omega.unsqueeze(-1) * outer(q, q)
    A = A + (ridge * omega).unsqueeze(-1) * torch.eye(d)
    mu = first - omega * q
    rho = torch.linalg.solve(A, mu)
    factor = 1 - (rho @ k.mT - (rho * q).sum(-1, keepdim=True))
    return (w * factor) @ v / (w * factor).sum(-1, keepdim=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def conjugate_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return local_linear_attention(q, k, v, solver="cg")


def cholesky(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return local_linear_attention(q, k, v, solver="cholesky")


def with_backward(layer: Callable[..., Tensor], tensors: Inputs) -> Callable[[], object]:
    return lambda: torch.autograd.grad(layer(*tensors).square().sum(), tensors)


def forward_and_backward() -> list[Comparison]:
    """512 positions, 8 heads: our default against both peers, our two solvers against one another."""
    results = []
    for d in (16, 32, 64):
        name = f"{HEADS} heads, 512 positions, d = {d}"
        plain, graph = inputs(512, d), inputs(512, d, grad=True)
        ours = lambda plain=plain: local_linear_attention(*plain)
        for peer in (written_out, sdpa):
            label = "SDPA" if peer is sdpa else "written out"
            them = (label, lambda plain=plain, peer=peer: peer(*plain))
            results.append(compare(f"forward, {name}", ("blockwise", ours), them, rounds=3))
            pair = ("blockwise", with_backward(local_linear_attention, graph)), (label, with_backward(peer, graph))
            results.append(compare(f"forward and backward, {name}", *pair, rounds=3))
        solvers = (
            ("conjugate gradients", lambda plain=plain: conjugate_gradients(*plain)),
            ("Cholesky", lambda plain=plain: cholesky(*plain)),
        )
        results.append(compare(f"solvers, {name}", *solvers, rounds=3))
    return results


def over_length() -> list[Comparison]:
    layers = {"blockwise": local_linear_attention, "written out": written_out, "SDPA": sdpa}

    def work(layer: Callable[..., Tensor], n: int) -> Callable[[], object]:
        tensors = inputs(n, 32)
        return lambda: layer(*tensors)

    return [
        growth("forward over length, d = 32", name, LENGTHS, lambda n, layer=layer: work(layer, n))
        for name, layer in layers.items()
    ]


class Live(TorchDispatchMode):
    """Largest number of bytes that results of operations hold at one time, counted by their storages."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        import weakref

        out = function(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known:
                size = x.untyped_storage().nbytes()
                self.now += size
                weakref.finalize(x.untyped_storage(), self.release, size)
        self.peak = max(self.peak, self.now)
        return out

    def release(self, size: int) -> None:
        self.now -= size


def peak_bytes(layer: Callable[..., Tensor], n: int, d: int) -> int:
    tensors = inputs(n, d, heads=1)
    with Live() as live:
        layer(*tensors)
    return live.peak


def memory() -> list[Comparison]:
    """Beside the inputs, one head: growth of the peak, and the ratio at the largest length."""
    sizes, results, peaks = (512, 1024, 2048), [], {}
    blocked = lambda *tensors: local_linear_attention(*tensors, block_size=64, solver="cg", max_iter=32)
    for name, layer in (("blockwise", blocked), ("written out", written_out)):
        peaks[name] = [peak_bytes(layer, n, 32) for n in sizes]
        slope = float(np.polyfit(np.log(sizes), np.log(peaks[name]), 1)[0])
        detail = {"sizes": list(sizes), "bytes": peaks[name]}
        results.append(
            Comparison("memory over length, d = 32", "growth exponent", slope, slope, slope, name, detail=detail)
        )
    ratio = peaks["blockwise"][-1] / peaks["written out"][-1]
    results.append(Comparison("2048 positions, d = 32", "memory", ratio, ratio, ratio, "blockwise", "written out"))
    return results


def decoding() -> list[Comparison]:
    """One token after 2048, 8 heads, d = 64: against SDPA over the same cache, and over the length of the cache."""

    def step(n: int, solver: str = "auto") -> Callable[[], object]:
        q, k, v = inputs(n + 400, 64)
        cache = KeyValueCache(window=n)  # constant length while the clock runs
        cache.append(k[:, :, :n], v[:, :, :n])
        new = [x[:, :, n : n + 1] for x in (q, k, v)]
        return lambda: lla_decode(*new, cache, solver=solver)

    q, k, v = inputs(2048, 64)
    last = q[:, :, -1:]
    peer = ("SDPA", lambda: scaled_dot_product_attention(last, k, v))
    return [
        compare("one token after 2048", ("lla_decode", step(2048)), peer, rounds=7),
        compare(
            "one token after 2048",
            ("one product for A", step(2048)),
            ("conjugate gradients", step(2048, "cg")),
            rounds=7,
        ),
        growth("one token over the cache's length", "lla_decode", (512, 1024, 2048, 4096), step),
    ]


def gpu() -> list[Comparison]:
    """The triton kernels beside SDPA on a GPU, forward and with backward; nothing, and a word why, without one."""
    if not torch.cuda.is_available():
        print("the triton kernels are not timed: there is no GPU here")
        return []
    results = []
    for n in (1024, 2048, 4096, 8192):
        for d in (64, 128):
            q, k, v = (x.cuda().bfloat16().requires_grad_() for x in inputs(n, d))
            ours = lambda q, k, v: local_linear_attention(q, k, v, ridge=10.0, solver="cg", backend="triton")
            for label, wrap in (
                ("forward", lambda layer, t: lambda: layer(*t)),
                ("forward and backward", with_backward),
            ):
                times = [on_device(wrap(layer, (q, k, v))) for layer in (ours, sdpa)]
                ratios = [a / b for a, b in zip(*times)]
                _, info = local_linear_attention(
                    q.detach(), k.detach(), v.detach(), ridge=10.0, solver="cg", backend="triton", return_info=True
                )
                detail = {
                    "milliseconds_ours": 1e3 * statistics.median(times[0]),
                    "milliseconds_peer": 1e3 * statistics.median(times[1]),
                    "iterations": max(info.iterations),
                    "device": torch.cuda.get_device_name(),
                }
                middle = statistics.median(ratios)
                name = f"{label}, GPU, bf16, {HEADS} heads, {n} positions, d = {d}"
                results.append(
                    Comparison(name, "time", middle, min(ratios), max(ratios), "triton kernels", "SDPA", detail)
                )
    return results


def on_device(work: Callable[[], object], rounds: int = 7) -> list[float]:
    """Seconds of each round, the device's queue empty before and after."""

    def finished() -> None:
        work()
        torch.cuda.synchronize()

    finished()
    repeats = max(1, math.ceil(2e-3 / seconds(finished)))
    many = lambda: [work() for _ in range(repeats)] and torch.cuda.synchronize()
    return [seconds(many) / repeats for _ in range(rounds)]


if __name__ == "__main__":
    for line in main():
        print(line)
