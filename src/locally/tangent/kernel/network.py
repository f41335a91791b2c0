"""Networks of infinite width: the covariance of their outputs at initialisation and their tangent kernel.

As its layers widen, a random network becomes a Gaussian process (covariance "NNGP") and gradient descent on it becomes
kernel gradient descent with a fixed kernel ("NTK"). Source: Jacot et al., arXiv 1806.07572, Theorems 1 and 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from locally.checks import check_choice, check_count, check_finite
from locally.tangent.kernel import fused, reference, tiles
from locally.tangent.kernel.duals import Nonlinearity
from locally.tangent.kernel.layers import (
    Activation,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    Layer,
    Padding,
    Parametrization,
    Program,
    compile_layers,
)

Array = ndarray | Tensor
Backend = Literal["auto", "compiled", "reference"]
Progress = Callable[[float], None]
NUMBERS = 2**22  # of a state in one block of the reference recursion
SMALL = 2**18  # numbers in all states together, below which compiled code is not worth loading


@dataclass(frozen=True)
class Kernels:
    """Two kernels on the same pairs, in the type of the inputs.

    Attributes:
        nngp: covariance of one output at initialisation.
        ntk: sum over parameters of the products of one output's derivatives.
    """

    nngp: Any
    ntk: Any


class InfiniteNetwork:
    """A stack of layers in the limit of infinite width.

    Called with the same arrays as the network itself would be; several outputs share both kernels and are independent.

    Args:
        layers: from `locally.tangent.kernel`, in the order of the network, the last one affine.

    Raises:
        ValueError, TypeError: on use, if the composition has no closed form; the message names the layer.

    >>> net = InfiniteNetwork(Dense(w_std=1.0, b_std=0.1), Activation("relu"), Dense(b_std=0.1))
    >>> K = net.kernel(np.eye(3))
    >>> K.ntk.shape, float(K.nngp[0, 0].round(4)), float(K.ntk[0, 1].round(4))
    ((3, 3), 0.1817, 0.0697)
    """

    def __init__(self, *layers: Layer) -> None:
        if not layers:
            raise ValueError("layers must be at least one")
        self.layers = layers

    def __repr__(self) -> str:
        return f"InfiniteNetwork({', '.join(map(repr, self.layers))})"

    @classmethod
    def mlp(
        cls,
        depth: int = 1,
        activation: str | Nonlinearity = "relu",
        *,
        w_std: float = 1.0,
        b_std: float = 0.1,
        width: int | None = None,
        parametrization: Parametrization = "ntk",
    ) -> "InfiniteNetwork":
        """`depth` hidden layers and a readout, all with the same constants."""
        check_count("depth", depth, at_least=0)
        dense = Dense(width, w_std, b_std, parametrization)
        hidden: list[Layer] = [dense, Activation(activation)]
        return cls(*hidden * depth, Dense(None, w_std, b_std, parametrization))

    @classmethod
    def cnn(
        cls,
        depth: int = 1,
        activation: str | Nonlinearity = "relu",
        *,
        size: int = 3,
        padding: Padding = "same",
        pooling: bool = False,
        w_std: float = 1.0,
        b_std: float = 0.1,
    ) -> "InfiniteNetwork":
        """`depth` convolutions, then all pixels as units or, with `pooling`, their mean, and a readout."""
        check_count("depth", depth)
        hidden: list[Layer] = [Conv(None, size, 1, padding, w_std, b_std), Activation(activation)]
        head = GlobalAvgPool() if pooling else Flatten()
        return cls(*hidden * depth, head, Dense(None, w_std, b_std))

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        w_std: float | dict[str, float] = 1.0,
        b_std: float | dict[str, float] = 0.1,
        parametrization: Parametrization = "ntk",
    ) -> "InfiniteNetwork":
        """The limit of a torch `Sequential`, or of a network from `finite`, whatever its present weights.

        Args:
            module: of linear, convolution, activation, layer norm, average pooling, flatten and nested `Sequential`
                layers, with skip connections as `Residual` from `locally.tangent.kernel`.
            w_std, b_std: of plain torch layers, one number or one for each path; a layer without bias has b_std 0.
            parametrization: of plain torch layers.

        Raises:
            ValueError: a layer has no limit in closed form; the message names its path in the module.
        """
        from locally.tangent.kernel.translation import translate

        return cls(*translate(module, w_std, b_std, parametrization))

    def finite(
        self,
        shape: int | Sequence[int],
        width: int,
        outputs: int = 1,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> nn.Sequential:
        """A network of this architecture with `width` units (channels) in each hidden layer, freshly drawn.

        Args:
            shape: of one example, features or (channels, height, width).
        """
        from locally.tangent.kernel.finite import build

        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        compile_layers(self.layers, shape)
        return build(self.layers, shape, width, outputs, generator, dtype)

    def kernel(
        self,
        x1: Array,
        x2: Array | None = None,
        *,
        backend: Backend = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Kernels:
        """Both kernels between all examples of x1 and of x2 (default x1 itself).

        O(N1 N2 (d + depth)) for vectors; for images N1 N2 depth times the pixels, or their square once there is
        pooling. Nothing of that size is stored beyond the results. The compiled recursion works in float64.

        Args:
            x1, x2: (N, features) or (N, channels, height, width), NumPy or torch.
            backend: "compiled" on the CPU, "reference" on tensors of any device and dtype and with gradients; "auto"
                takes the first where it can.
            threads: of the compiled recursion; default as many as torch uses.
            progress: sees the share done, in (0, 1].

        Raises:
            ValueError, TypeError: an argument is unfit, or the layers have no closed form for this shape.
        """
        check_choice("backend", backend, ("auto", "compiled", "reference"))
        a, b = tensor("x1", x1), None if x2 is None else tensor("x2", x2)
        if b is not None and (a.shape[1:] != b.shape[1:] or a.device != b.device):
            raise ValueError(f"x1 and x2 differ: {tuple(a.shape)} on {a.device} and {tuple(b.shape)} on {b.device}")
        program = compile_layers(self.layers, tuple(a.shape[1:]))
        plain = a.device.type == "cpu" and not a.requires_grad and not (b is not None and b.requires_grad)
        can = plain and tiles.is_compiled(program)
        if backend == "compiled" and not can:
            raise ValueError('backend "compiled" needs the CPU, no gradients and nonlinearities with a closed form')
        small = len(a) * len(a if b is None else b) * program.numbers <= SMALL and progress is None
        if can and (backend == "compiled" or (backend == "auto" and not small)):
            threads = torch.get_num_threads() if threads is None else threads
            check_count("threads", threads)
            found = compiled(program, a.double(), None if b is None else b.double(), threads, progress)
            return Kernels(*(like(x1, K) for K in found))
        if can:
            a, b = a.double(), None if b is None else b.double()
        nngp, ntk = by_reference(program, a, b, progress)
        return Kernels(like(x1, nngp), like(x1, ntk))

    def nngp(self, x1: Array, x2: Array | None = None, **options: Any) -> Any:
        """The covariance kernel alone; arguments and errors as for `kernel`."""
        return self.kernel(x1, x2, **options).nngp

    def ntk(self, x1: Array, x2: Array | None = None, **options: Any) -> Any:
        """The tangent kernel alone; arguments and errors as for `kernel`."""
        return self.kernel(x1, x2, **options).ntk

    def diagonal(self, x: Array) -> Kernels:
        """Both kernels of each example with itself, (N,)."""
        a = tensor("x", x)
        program = compile_layers(self.layers, tuple(a.shape[1:]))
        nngp, ntk = own_kernels(program, a.double() if isinstance(x, ndarray) else a)[1]
        return Kernels(like(x, nngp), like(x, ntk))

    def __call__(self, x1: Array, x2: Array | None = None) -> Any:
        """The NTK; of two single vectors one number, as `sklearn.kernel_ridge.KernelRidge(kernel=...)` asks for."""
        if x1.ndim == 1 and x2 is not None:
            return self.ntk(x1[None], x2[None])[0, 0]
        return self.ntk(x1, x2)


def compiled(
    program: Program, x1: Tensor, x2: Tensor | None, threads: int, progress: Progress | None
) -> tuple[ndarray, ndarray]:
    v1, own = own_kernels(program, x1)
    v2 = v1 if x2 is None else own_kernels(program, x2)[0]
    nngp, ntk = tiles.kernels(program, x1, x2, v1, v2, threads, progress)
    if x2 is None:
        for K, diagonal in zip((nngp, ntk), own):
            fused.mirror(K, diagonal.numpy())
    return nngp, ntk


def own_kernels(program: Program, x: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """`reference.variances` in blocks."""
    block = max(1, NUMBERS // program.numbers)
    parts = [reference.variances(program, part) for part in x.split(block)]
    seen = [torch.cat(v) for v in zip(*(p[0] for p in parts))]
    return seen, (torch.cat([p[1][0] for p in parts]), torch.cat([p[1][1] for p in parts]))


def by_reference(program: Program, x1: Tensor, x2: Tensor | None, progress: Progress | None) -> tuple[Tensor, Tensor]:
    v1, own = own_kernels(program, x1)
    v2 = v1 if x2 is None else own_kernels(program, x2)[0]
    other = x1 if x2 is None else x2
    n1, n2 = len(x1), len(other)
    gram = x1 @ other.T / x1.shape[1] if program.image is None else None
    if x2 is None:
        i, j = torch.triu_indices(n1, n1, offset=1, device=x1.device)
    else:
        i, j = torch.cartesian_prod(torch.arange(n1), torch.arange(n2)).to(x1.device).unbind(1)
    block = max(1, NUMBERS // program.numbers)
    parts = []
    for start in range(0, len(i), block):
        a, b = i[start : start + block], j[start : start + block]
        q = reference.start(program, x1[a], other[b]) if gram is None else gram[a, b]
        parts.append(reference.run(program, q, [v[a] for v in v1], [v[b] for v in v2]))
        if progress is not None:
            progress(min(1.0, (start + block) / len(i)))
    found = []
    for index, diagonal in enumerate(own):
        flat = torch.cat([p[index] for p in parts]) if parts else diagonal[:0]
        K = torch.zeros(n1, n2, dtype=flat.dtype, device=flat.device).index_put((i, j), flat)
        found.append(K if x2 is not None else K + K.T + torch.diag(diagonal))
    return found[0], found[1]


def tensor(name: str, x: Array) -> Tensor:
    if not isinstance(x, ndarray | Tensor):
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {type(x).__name__}")
    t = torch.as_tensor(np.require(x, np.float64, "W")) if isinstance(x, ndarray) else x
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {t.dtype}")
    if t.ndim not in (2, 4) or 0 in t.shape:
        raise ValueError(f"{name} must have shape (N, features) or (N, channels, height, width), got {tuple(t.shape)}")
    check_finite(name, t)
    return t


def like(x: Array, K: ndarray | Tensor) -> Any:
    if isinstance(x, ndarray):
        return K.detach().numpy() if isinstance(K, Tensor) else K
    return torch.as_tensor(K).to(x.dtype)
