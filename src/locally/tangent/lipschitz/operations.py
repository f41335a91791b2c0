"""The linear parts of a network: each as a map that can be applied, transposed, and taken in absolute value.

Forward bounds pull coefficients back through these maps, gradient bounds push them forward; both need no matrix.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp

Map = Callable[[Tensor], Tensor]


class Affine(ABC):
    """x -> M x + bias on tensors (N, *shape).

    Attributes:
        bias: the value at zero, shaped like one output, or None for zero.
        terms: no entry of `push` or `pull` sums more products than this; the float slack is computed from it.
    """

    bias: Tensor | None
    terms: int

    @abstractmethod
    def push(self, v: Tensor) -> Tensor:
        """M v."""

    @abstractmethod
    def pull(self, a: Tensor) -> Tensor:
        """M^T a."""

    @abstractmethod
    def spread(self, r: Tensor) -> Tensor:
        """|M| r, the radius that radius r grows into."""

    @abstractmethod
    def spread_back(self, r: Tensor) -> Tensor:
        """|M|^T r."""


class Dense(Affine):
    """y = x W^T + b over the last dimension."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.size = weight, weight.abs()
        self.bias = bias
        self.terms = max(weight.shape)

    def push(self, v: Tensor) -> Tensor:
        return v @ self.weight.T

    def pull(self, a: Tensor) -> Tensor:
        return a @ self.weight

    def spread(self, r: Tensor) -> Tensor:
        return r @ self.size.T

    def spread_back(self, r: Tensor) -> Tensor:
        return r @ self.size


class Convolution(Affine):
    """Convolution over one, two or three spatial dimensions, or (transposed=True) its transpose."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        shape: tuple[int, ...],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        output_padding: Sequence[int] | None = None,
    ) -> None:
        self.weight, self.size = weight, weight.abs()
        self.shape = shape  # of one input
        n = weight.ndim - 2
        self.padding = output_padding or [0] * n
        self.transposed = output_padding is not None
        self.options: tuple[Any, ...] = (list(stride), list(padding), list(dilation))
        self.groups = groups
        self.bias = None
        if bias is not None:
            out = self.push(weight.new_zeros(1, *shape)).shape[1:]
            self.bias = bias.view(-1, *[1] * n).expand(out).contiguous()
        self.terms = max(weight.numel() // weight.shape[0], weight.numel() // weight.shape[1])

    def _map(self, v: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten.convolution(v, weight, None, *self.options, self.transposed, self.padding, self.groups)

    def _transpose(self, a: Tensor, weight: Tensor) -> Tensor:
        stand_in = a.new_zeros(()).expand(len(a), *self.shape)  # only its shape is looked at
        return torch.ops.aten.convolution_backward(
            a, stand_in, weight, None, *self.options, self.transposed, self.padding, self.groups, [True, False, False]
        )[0]

    def push(self, v: Tensor) -> Tensor:
        return self._map(v, self.weight)

    def pull(self, a: Tensor) -> Tensor:
        return self._transpose(a, self.weight)

    def spread(self, r: Tensor) -> Tensor:
        return self._map(r, self.size)

    def spread_back(self, r: Tensor) -> Tensor:
        return self._transpose(r, self.size)


class Diagonal(Affine):
    """Entrywise scale and shift: batch normalisation in evaluation mode, constants that are added or multiplied."""

    terms = 1

    def __init__(self, scale: Tensor | None, bias: Tensor | None) -> None:
        self.scale, self.bias = scale, bias

    def push(self, v: Tensor) -> Tensor:
        return v if self.scale is None else v * self.scale

    def pull(self, a: Tensor) -> Tensor:
        return self.push(a)

    def spread(self, r: Tensor) -> Tensor:
        return r if self.scale is None else r * self.scale.abs()

    def spread_back(self, r: Tensor) -> Tensor:
        return self.spread(r)


class Centring(Affine):
    """Deviations from the mean over the last `dims` dimensions: a symmetric projection."""

    bias = None

    def __init__(self, dims: int, shape: tuple[int, ...]) -> None:
        self.axes = tuple(range(-dims, 0))
        self.terms = math.prod(shape[-dims:])

    def push(self, v: Tensor) -> Tensor:
        return v - v.mean(self.axes, keepdim=True)

    def pull(self, a: Tensor) -> Tensor:
        return self.push(a)

    def spread(self, r: Tensor) -> Tensor:
        return (1 - 2 / self.terms) * r + r.mean(self.axes, keepdim=True)

    def spread_back(self, r: Tensor) -> Tensor:
        return self.spread(r)


class Rearrangement(Affine):
    """A linear map with non-negative coefficients given by a function: flattening, pooling, padding, means, gathers."""

    def __init__(self, function: Map, shape: tuple[int, ...], like: Tensor) -> None:
        self.function, self.shape, self.bias = function, shape, None
        self.terms = math.prod(shape)
        self.moves_only = function(like.new_zeros(1, *shape)).numel() == self.terms and _is_reshape(
            function, shape, like
        )

    def push(self, v: Tensor) -> Tensor:
        return self.function(v)

    def pull(self, a: Tensor) -> Tensor:
        if self.moves_only:
            return a.reshape(len(a), *self.shape)
        return vjp(self.function, a.new_zeros(len(a), *self.shape))[1](a)[0]

    def spread(self, r: Tensor) -> Tensor:
        return self.function(r)

    def spread_back(self, r: Tensor) -> Tensor:
        return self.pull(r)


def _is_reshape(function: Map, shape: tuple[int, ...], like: Tensor) -> bool:
    counted = torch.arange(math.prod(shape), dtype=like.dtype, device=like.device)
    return torch.equal(function(counted.reshape(1, *shape)).reshape(-1), counted)


def normalisation(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dimensions: int
) -> Diagonal:
    """Batch normalisation with its running statistics, for inputs with `dimensions` dimensions after the batch."""
    scale = (variance + eps).rsqrt() * (1.0 if weight is None else weight)
    shift = -mean * scale + (0.0 if bias is None else bias)
    wide = (-1, *[1] * (dimensions - 1))
    return Diagonal(scale.view(wide), shift.view(wide))


def window_indices(shape: tuple[int, ...], pool: nn.MaxPool2d) -> Tensor:
    """For every output of a pooling layer, the flat inputs in its window: (*outputs, window); edges repeat an input."""
    c, h, w = shape
    flat = torch.arange(1, c * h * w + 1, dtype=torch.float64).view(1, c, h, w)
    pair = lambda value: (value, value) if isinstance(value, int) else tuple(value)
    kernel, stride, padding, dilation = map(pair, (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    out = pool(flat).shape[2:]
    # ceil mode may reach beyond the padding: pad as far as the last window goes
    far = [
        max((o - 1) * s + d * (k - 1) + 1 - p - n, p)
        for o, s, d, k, p, n in zip(out, stride, dilation, kernel, padding, (h, w))
    ]
    wide = F.pad(flat, (padding[1], far[1], padding[0], far[0]))
    windows = wide
    for axis, (k, s, d, o) in enumerate(zip(kernel, stride, dilation, out)):
        steps = torch.arange(o)[:, None] * s + torch.arange(k) * d  # (outputs, window) along this axis
        windows = windows.index_select(2 + axis, steps.reshape(-1))
    windows = windows.view(c, out[0], kernel[0], out[1], kernel[1]).permute(0, 1, 3, 2, 4).reshape(c, *out, -1)
    index = windows.long() - 1
    return torch.where(index < 0, index.amax(dim=-1, keepdim=True), index)
