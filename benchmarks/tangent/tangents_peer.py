"""neural-tangents, in an environment of its own. Inputs come from a seed, so that both sides see the same numbers."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from benchmarks.peers import answer, ask_in

PACKAGES = ["neural-tangents==0.6.5", "jax[cpu]<0.4.25", "numpy<2", "scipy<1.13"]


def inputs(shape: list[int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def elsewhere() -> Callable[..., Any] | None:
    return ask_in("neural-tangents", PACKAGES, __name__, {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_ENABLE_X64": "1"})


@cache
def infinite(kind: str, depth: int) -> Any:
    import jax
    from neural_tangents import stax

    activation = stax.Erf if kind == "erf" else stax.Relu
    dense = lambda: stax.Dense(1, W_std=1.0, b_std=0.1)
    layer = dense if kind in ("relu", "erf") else lambda: stax.Conv(1, (3, 3), padding="SAME", W_std=1.0, b_std=0.1)
    head = {"flatten": [stax.Flatten()], "pooling": [stax.GlobalAvgPool()]}.get(kind, [])
    layers = [part for _ in range(depth) for part in (layer(), activation())]
    return jax.jit(stax.serial(*layers, *head, dense())[2], static_argnames=("get",))


def kernel(kind: str, depth: int, shape: list[int]) -> list[float]:
    """Seconds of both kernels of x with itself, then sums of the first by which the two sides are compared."""
    import jax

    x = inputs(shape)
    x = jax.numpy.asarray(np.moveaxis(x, 1, -1) if len(shape) == 4 else x)
    start = time.perf_counter()
    found = jax.block_until_ready(infinite(kind, depth)(x, None, get=("nngp", "ntk")))
    seconds = time.perf_counter() - start
    return [seconds, *np.asarray(found.ntk)[:3, :3].ravel().tolist()]


@cache
def finite(sizes: tuple[int, ...]) -> Any:
    import jax
    import neural_tangents as nt
    from neural_tangents import stax

    layers = [part for n in sizes[1:-1] for part in (stax.Dense(n, W_std=1.0, b_std=0.1), stax.Relu())]
    init, apply, _ = stax.serial(*layers, stax.Dense(sizes[-1], W_std=1.0, b_std=0.1))
    parameters = init(jax.random.PRNGKey(0), (-1, sizes[0]))[1]
    ways = nt.NtkImplementation
    chosen = {
        n: jax.jit(nt.empirical_ntk_fn(apply, trace_axes=(-1,), vmap_axes=0, implementation=getattr(ways, n)))
        for n in ("JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS", "STRUCTURED_DERIVATIVES")
    }
    return chosen, parameters


def empirical(way: str, sizes: list[int], n: int) -> list[float]:
    import jax

    chosen, parameters = finite(tuple(sizes))
    x = jax.numpy.asarray(inputs([n, sizes[0]]).astype(np.float32))
    parameters = jax.tree_util.tree_map(lambda p: p.astype("float32"), parameters)
    start = time.perf_counter()
    jax.block_until_ready(chosen[way](x, None, parameters))
    return [time.perf_counter() - start]


if __name__ == "__main__":
    answer(kernel, empirical)
