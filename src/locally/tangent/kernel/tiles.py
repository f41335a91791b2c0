"""Programs and examples as numbers, cut into the tiles that the compiled recursion in `fused` passes over."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from locally.tangent.kernel.fused import strip
from locally.tangent.kernel.layers import Program

LANES = 512  # second examples in a tile, fewer for large images: a tile and its copies stay in the L2 cache
TILE = 32768


def is_compiled(program: Program) -> bool:
    """Whether every nonlinearity of the program is one that the compiled recursion knows."""
    return all(s.function is None or s.function.kind is not None for s in program.steps)


def encode(program: Program) -> tuple[ndarray, ndarray]:
    """Steps as numbers: (op, kind, 7 integers of the window, h, w before, h, w after) and up to four constants."""
    code = np.zeros((len(program.steps), 13), np.int64)
    constants = np.zeros((len(program.steps), 4))
    for row, numbers, step in zip(code, constants, program.steps):
        row[0] = step.op
        row[1] = -1 if step.function is None or step.function.kind is None else step.function.kind
        row[2 : 2 + len(step.ints)] = step.ints
        row[9:13] = (*step.before, *step.after)
        numbers[: len(step.floats)] = step.floats
    return code, constants


def features(program: Program, variances: list[Tensor], n: int) -> tuple[ndarray, ndarray]:
    """Of each of n examples at every step that reads its variances, (n, reads, pixels), zeros beyond small images."""
    steps = [s for s in program.steps if s.reads_variance]
    most = max((v[0].numel() for v in variances), default=1)
    found = np.zeros((2, n, len(steps), most))
    for at, (step, v) in enumerate(zip(steps, variances)):
        v = v.reshape(n, -1)
        a, b = ((v + step.floats[0]).rsqrt(), v) if step.function is None else step.function.features(v)
        found[0, :, at, : v.shape[1]], found[1, :, at, : v.shape[1]] = a.numpy(), b.numpy()
    return found[0], found[1]


def tiled(columns: Float[ndarray, "n2 k pixels"], wide: int, full: bool) -> Float[ndarray, "tiles k rows lanes"]:
    """What belongs to the second examples, in the order in which tiles read it; zeros fill the last one."""
    if full:
        return np.ascontiguousarray(columns[:, :, None, :])
    n, k, pixels = columns.shape
    padded = np.zeros((-(-n // wide) * wide, k, pixels))
    padded[:n] = columns
    return np.ascontiguousarray(padded.reshape(-1, wide, k, pixels).transpose(0, 2, 3, 1))


def kernels(
    program: Program,
    x1: Float[Tensor, "n1 *shape"],
    x2: Float[Tensor, "n2 *shape"] | None,
    v1: list[Tensor],
    v2: list[Tensor],
    threads: int,
    progress: Callable[[float], None] | None,
) -> tuple[Float[ndarray, "n1 n2"], Float[ndarray, "n1 n2"]]:
    """Q and T of all pairs, float64 on the CPU. With x2 None only the entries right of the diagonal count."""
    same = x2 is None
    x2 = x1 if x2 is None else x2
    n1, n2 = len(x1), len(x2)
    code, constants = encode(program)
    pixels = max(program.pixels, 1 if program.image is None else x1[0, 0].numel())
    wide = 1 if program.full else max(1, min(LANES, TILE // pixels))
    size = pixels * pixels if program.full else pixels * wide
    one, other = features(program, v1, n1), features(program, v2, n2)
    ntk = np.empty((n1, n2))
    if program.image is None:
        nngp = (x1 @ x2.T / x1.shape[1]).numpy()
        left, right = np.empty((n1, 0, 1)), np.empty((0, 0, 1, wide))
    else:
        nngp = np.empty((n1, n2))
        left, right = x1.flatten(2).contiguous().numpy(), tiled(x2.flatten(2).numpy(), wide, program.full)
    columns = [tiled(f, wide, program.full) for f in other]
    pieces = min(n1, 8 * threads if progress is None else max(8 * threads, 100))

    def work(first: int) -> None:  # interleaved, since the rows of a triangle shrink
        strip(
            code, constants, program.depth, program.full, size, left, right, nngp, ntk, first, pieces, same,
            *one, *columns,
        )  # fmt: skip

    with ThreadPoolExecutor(threads) as pool:
        for done, _ in enumerate(pool.map(work, range(pieces)), 1):
            if progress is not None:
                progress(done / pieces)
    return nngp, ntk
