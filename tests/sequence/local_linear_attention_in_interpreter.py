"""The triton kernels and the torch path side by side; run in a process of its own with TRITON_INTERPRET=1.

python -m tests.sequence.local_linear_attention_in_interpreter FILE     writes the largest relative gaps as JSON
"""

import json
import sys
from pathlib import Path

import torch

from locally.sequence.local_linear_attention import local_linear_attention, reference

NAMES = ("output", "rho", "delta", "omega", "grad q", "grad k", "grad v", "grad ridge", "grad scale")
GROUPED = {"heads": 2, "padded": 4, "ridge_grad": "detached", "preconditioner": "jacobi"}
CASES = {
    "causal": {"L": 20, "S": 20, "d": 16, "dv": 16},
    "grouped heads, fewer queries, padding, detached": {"L": 10, "S": 22, "d": 8, "dv": 5} | GROUPED,
    "not causal, odd sizes": {"L": 9, "S": 21, "d": 20, "dv": 24, "is_causal": False, "padded": 3},
    "queries without keys": {"L": 20, "S": 6, "d": 4, "dv": 4},
}


def compute(call, L, S, d, dv, heads=1, padded=0, **options):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    inputs = [draw(1, heads, L, d), draw(1, 1, S, d), draw(1, 1, S, dv), torch.tensor(2.0), torch.full((L,), 0.4)]
    weights = draw(1, heads, L, dv)
    q, k, v, ridge, scale = (x.requires_grad_() for x in inputs)
    mask = torch.arange(S).unsqueeze(0) < padded if padded else None
    o, rho, delta, omega = call(q, k, v, ridge=ridge, scale=scale, key_padding_mask=mask, **options)
    (o * weights).sum().backward()
    return [x.detach().double() for x in (o, rho, delta, omega)] + [x.grad.double() for x in (q, k, v, ridge, scale)]


def by_triton(q, k, v, **options):
    o, info = local_linear_attention(
        q, k, v, backend="triton", block_size=16, tol=1e-7, max_iter=60, return_info=True, **options
    )
    return o, info.rho, info.delta, info.omega


def by_definition(q, k, v, preconditioner=None, **options):
    heads = q.shape[1]
    fit = reference(q, k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1), **options)
    return fit.output, fit.rho, fit.delta, fit.omega


def main(path: str) -> None:
    gaps = {}
    for name, case in CASES.items():
        ours, theirs = compute(by_triton, **case), compute(by_definition, **case)
        gaps[name] = {
            what: float((x - y).norm() / y.norm().clamp(min=1e-30)) for what, x, y in zip(NAMES, ours, theirs)
        }
    Path(path).write_text(json.dumps(gaps))


if __name__ == "__main__":
    main(sys.argv[1])
