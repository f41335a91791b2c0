"""The recursion on covariances, step by step on tensors: any device, any nonlinearity, differentiable.

What the compiled recursion is tested against, and what runs where that one cannot. The state of a block of pairs is
(pairs,) for vectors, (pairs, H, W) where only equal pixels meet, (pairs, H, W, H', W') where all do.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from locally.tangent.kernel.layers import Op, Program, Step

State = tuple[Tensor, Tensor]


def run(program: Program, q: Tensor, v1: list[Tensor], v2: list[Tensor]) -> State:
    """Q and T of paired examples, (pairs,) each.

    Args:
        q: inner products of the pairs, as `start` gives them.
        v1, v2: variances (pairs, pixels...) of both examples at every step that reads them, in order.
    """
    return walk(program, q, lambda index, _q: (v1[index], v2[index]))


def variances(program: Program, x: Tensor) -> tuple[list[Tensor], State]:
    """Variance of every example's own units before each step that reads them, and its own Q and T in the end.

    (examples, H, W) or (examples,) each.
    """
    seen: list[Tensor] = []

    def own(_index: int, q: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(diagonal(q).reshape(len(q), *q.shape[1:3]))
        return seen[-1], seen[-1]

    return seen, walk(program, start(program, x, x), own, same=True)


def start(program: Program, x1: Tensor, x2: Tensor) -> Tensor:
    units = x1.shape[1]
    if program.image is None:
        return torch.einsum("pi,pi->p", x1, x2) / units
    pattern = "pchw,pckl->phwkl" if program.full else "pchw,pchw->phw"
    return torch.einsum(pattern, x1, x2) / units


def walk(program: Program, q: Tensor, variance: Callable[[int, Tensor], State], same: bool = False) -> State:
    t = torch.zeros_like(q)
    kept: list[State] = []
    reads = 0
    for step in program.steps:
        match step.op:
            case Op.AFFINE:
                w2, b2, q_to_t, b_to_t = step.floats
                q, t = w2 * q + b2, w2 * t + q_to_t * q + b_to_t
            case Op.BOX:
                q, t = box_mean(q, step), box_mean(t, step)
            case Op.DUAL | Op.NORM:
                a, b = variance(reads, q)
                reads += 1
                if q.ndim == 5:
                    a, b = a[:, :, :, None, None], b[:, None, None, :, :]
                q, t = dual(step, q, t, a, b, same) if step.op is Op.DUAL else normalise(step, q, t, a, b)
            case Op.DIAGONAL_MEAN:
                q, t = diagonal_mean(q), diagonal_mean(t)
            case Op.POOL:
                q, t = pool(q, step), pool(t, step)
            case Op.PUSH:
                kept.append((q, t))
            case Op.SWAP:
                (q, t), kept[-1] = kept[-1], (q, t)
            case Op.ADD:
                other = kept.pop()
                q, t = q + other[0], t + other[1]
    return q, t


def dual(step: Step, q: Tensor, t: Tensor, a: Tensor, b: Tensor, same: bool) -> State:
    assert step.function is not None
    value, prime = step.function.dual(a, q, b)
    if same:  # an example with itself: at equal pixels u = v exactly, where the general form loses half of its digits
        own = step.function.diagonal(diagonal(q))
        value, prime = put_diagonal(value, own[0]), put_diagonal(prime, own[1])
    return value, t * prime


def normalise(step: Step, q: Tensor, t: Tensor, a: Tensor, b: Tensor) -> State:
    scale = ((a + step.floats[0]) * (b + step.floats[0])).rsqrt()
    return q * scale, t * scale


def diagonal(q: Tensor) -> Tensor:
    return q.flatten(3).flatten(1, 2).diagonal(dim1=1, dim2=2) if q.ndim == 5 else q


def put_diagonal(q: Tensor, values: Tensor) -> Tensor:
    if q.ndim < 5:
        return values
    flat = q.flatten(3).flatten(1, 2)
    return torch.diagonal_scatter(flat, values, dim1=1, dim2=2).reshape(q.shape)


def box_mean(q: Tensor, step: Step) -> Tensor:
    """Mean over the window; both images move together, zeros (or the other side) come in at the border."""
    kh, kw, sh, sw, top, left, wraps = step.ints
    h, w = step.before
    out_h, out_w = step.after
    bottom, right = (out_h - 1) * sh + kh - top - h, (out_w - 1) * sw + kw - left - w
    if wraps:
        rows = torch.arange(-top, h + max(bottom, 0), device=q.device) % h
        columns = torch.arange(-left, w + max(right, 0), device=q.device) % w
        q = q[:, rows][:, :, columns]
        q = q[:, :, :, rows][:, :, :, :, columns] if q.ndim == 5 else q
    else:
        margins = (left, max(right, 0), top, max(bottom, 0))
        q = pad(q, margins * 2 if q.ndim == 5 else margins)
    total: Tensor | None = None
    for i in range(kh):
        for j in range(kw):
            up, across = slice(i, i + (out_h - 1) * sh + 1, sh), slice(j, j + (out_w - 1) * sw + 1, sw)
            part = q[:, up, across, up, across] if q.ndim == 5 else q[:, up, across]
            total = part if total is None else total + part
    assert total is not None
    return total / (kh * kw)


def pool(q: Tensor, step: Step) -> Tensor:
    """Mean over the windows of both images."""
    kh, kw, sh, sw = step.ints
    q = q.unfold(1, kh, sh).unfold(2, kw, sw).mean((-1, -2))
    return q.unfold(3, kh, sh).unfold(4, kw, sw).mean((-1, -2))


def diagonal_mean(q: Float[Tensor, "pairs ..."]) -> Float[Tensor, " pairs"]:
    return diagonal(q).flatten(1).mean(1)
