"""The layers of torch.nn as nodes of a network: affine maps, sums, activations and normalisations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from locally.tangent.lipschitz.activations import (
    Activation,
    gelu,
    gelu_tanh,
    leaky_relu,
    relu,
    sigmoid,
    softplus,
    tanh,
)
from locally.tangent.lipschitz.network import Network, Node, Sum
from locally.tangent.lipschitz.normalisation import Normalisation
from locally.tangent.lipschitz.operations import (
    Affine,
    Centring,
    Convolution,
    Dense,
    Diagonal,
    Rearrangement,
    normalisation,
    window_indices,
)

TINY = 1e-290  # what squares lose when they underflow is far below an ulp of this, for any number of entries


class Builder:
    """Appends nodes and keeps their shapes."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.nodes = [Node(None, (), tuple(shape), "input")]
        self.like = torch.zeros((), dtype=torch.float64, device=device)

    def affine(self, op: Affine, x: int, path: str) -> int:
        shape = self.nodes[x].shape
        try:
            out = op.push(self.like.new_zeros(1, *shape)).shape[1:]
        except RuntimeError as error:
            raise ValueError(f"model: {path} does not take an input of shape {shape}: {error}") from error
        if op.bias is not None and tuple(op.bias.shape) != tuple(out):
            op.bias = op.bias.expand(out).contiguous()
        return self._append(Node(op, (x,), tuple(out), path))

    def rearrange(self, function: Callable[[Tensor], Tensor], x: int, path: str) -> int:
        shape = self.nodes[x].shape
        trial = torch.stack([self.like.new_zeros(shape), self.like.new_ones(shape)])
        try:
            out = function(trial)
        except RuntimeError as error:
            raise ValueError(f"model: {path} is not supported: {error}") from error
        if out.shape[:1] != (2,) or not torch.equal(out[1:], function(trial[1:])):
            raise ValueError(f"model: {path} mixes the batch dimension with others")
        return self.affine(Rearrangement(function, shape, self.like), x, path)

    def reshape(self, x: int, shape: tuple[int, ...], path: str) -> int:
        if shape == self.nodes[x].shape:
            return x
        return self.rearrange(lambda v: v.reshape(len(v), *shape), x, path)

    def sum(self, inputs: tuple[int, ...], signs: tuple[float, ...], path: str) -> int:
        return self._append(Node(Sum(signs), inputs, self.nodes[inputs[0]].shape, path))

    def normalise(
        self,
        over: Sequence[int],
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
        x: int,
        path: str,
        *,
        centred: bool,
    ) -> int:
        """Layer normalisation over the last dimensions, of sizes `over`; root mean square if not centred."""
        shape, over = self.nodes[x].shape, tuple(over)
        if not over or shape[-len(over) :] != over:
            raise ValueError(f"model: {path} does not take an input of shape {shape}: it normalises {over}")
        check_eps(eps, path)
        if centred:
            x = self.affine(Centring(len(over), shape), x, path)
        x = self.divide_by_spread(x, len(over), eps, centred, path)
        return x if weight is None and bias is None else self.affine(Diagonal(weight, bias), x, path)

    def divide_by_spread(self, c: int, dims: int, eps: float, centred: bool, path: str) -> int:
        """c / sqrt(mean(c^2) + eps) over the last `dims` dimensions; `centred` says that c sums to 0 there."""
        check_eps(eps, path)
        op = Normalisation(dims, eps, centred, "LayerNorm" if centred else "RMSNorm")
        return self._append(Node(op, (c,), self.nodes[c].shape, path))

    def activation(self, op: Activation, x: int, path: str) -> int:
        return self._append(Node(op, (x,), self.nodes[x].shape, path))

    def concatenate(self, parts: list[int], dim: int, path: str) -> int:
        """As a sum of parts that are padded with zeros."""
        shapes = [self.nodes[p].shape for p in parts]
        axis = dim - 1 if dim > 0 else dim % len(shapes[0]) if dim < 0 else -1
        if axis < 0:
            raise ValueError(f"model: {path} joins along the batch dimension")
        total, start, padded = sum(s[axis] for s in shapes), 0, []
        for part, shape in zip(parts, shapes):
            behind = len(shape) - 1 - axis
            pads = [0, 0] * behind + [start, total - start - shape[axis]]
            padded.append(self.rearrange(partial(F.pad, pad=pads), part, path))
            start += shape[axis]
        return self.sum(tuple(padded), (1.0,) * len(padded), path)

    def finish(self, out: int) -> Network:
        out = self.reshape(out, (self.nodes[out].size,), "output")
        if out == 0:
            out = self.affine(Diagonal(None, None), out, "output")
        return Network(reachable(self.nodes, out))

    def _append(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1


def reachable(nodes: list[Node], out: int) -> list[Node]:
    """The input, and what the output is computed from, numbered anew."""
    used = {0, out}
    for v in range(out, 0, -1):
        if v in used:
            used.update(nodes[v].inputs)
    number = {v: i for i, v in enumerate(sorted(used))}
    return [replace(nodes[v], inputs=tuple(number[u] for u in nodes[v].inputs)) for v in number]


def check_eps(eps: float, path: str) -> None:
    if eps <= 0:
        raise ValueError(f"model: {path} has eps {eps:g}: its slope has no bound where the input is constant")
    if eps < TINY:
        raise ValueError(f"model: {path} has eps {eps:g}, below {TINY:g}: rounding of smaller squares has no bound")


def add_layer(b: Builder, part: nn.Module, x: int, path: str) -> int:
    """Nodes of one torch.nn layer applied to node x."""
    where = f"{path} ({type(part).__name__})"
    shape = b.nodes[x].shape
    try:
        return _add_layer(b, part, x, where, shape)
    except RuntimeError as error:
        raise ValueError(f"model: {where} does not take an input of shape {shape}: {error}") from error


def _add_layer(b: Builder, part: nn.Module, x: int, where: str, shape: tuple[int, ...]) -> int:
    match part:
        case nn.Linear():
            return b.affine(Dense(part.weight, part.bias), x, where)
        case _ConvNd():
            return add_convolution(b, part, x, where)
        case _BatchNorm():
            mean, variance, scale, shift = (part.running_mean, part.running_var, part.weight, part.bias)
            assert mean is not None
            assert variance is not None
            return b.affine(normalisation(mean, variance, scale, shift, part.eps, len(shape)), x, where)
        case nn.LayerNorm():
            return b.normalise(part.normalized_shape, part.eps, part.weight, part.bias, x, where, centred=True)
        case nn.RMSNorm():
            assert part.eps is not None
            return b.normalise(part.normalized_shape, part.eps, part.weight, None, x, where, centred=False)
        case nn.GroupNorm() | _InstanceNorm():
            return add_group_norm(b, part, x, where)
        case nn.ReLU():
            return b.activation(relu(), x, where)
        case nn.LeakyReLU():
            if part.negative_slope > 1:
                raise ValueError(f"model: {where} has negative_slope {part.negative_slope:g} > 1: not supported")
            return b.activation(leaky_relu(part.negative_slope), x, where)
        case nn.Tanh():
            return b.activation(tanh(), x, where)
        case nn.Sigmoid():
            return b.activation(sigmoid(), x, where)
        case nn.Softplus():
            return b.activation(softplus(part.beta), x, where)
        case nn.GELU():
            return b.activation(gelu_tanh() if part.approximate == "tanh" else gelu(), x, where)
        case nn.Flatten() | nn.Unflatten():
            return b.reshape(x, tuple(part(torch.empty(1, *shape)).shape[1:]), where)
        case nn.AvgPool1d() | nn.AvgPool2d() | nn.AvgPool3d() | nn.AdaptiveAvgPool1d() | nn.AdaptiveAvgPool2d():
            return b.rearrange(part, x, where)
        case nn.ZeroPad1d() | nn.ZeroPad2d() | nn.PixelShuffle() | nn.Upsample(mode="nearest"):
            return b.rearrange(part, x, where)
        case nn.MaxPool2d():
            return add_max_pool(b, part, x, where)
        case nn.Identity() | _DropoutNd():
            return x
    raise ValueError(f"model: {where} is not supported")


def add_group_norm(b: Builder, part: nn.GroupNorm | _InstanceNorm, x: int, where: str) -> int:
    """Layer normalisation of groups of channels (single ones for an instance norm) in a row of their own."""
    shape = b.nodes[x].shape
    if isinstance(part, _InstanceNorm) and part.running_mean is not None and part.running_var is not None:
        return b.affine(
            normalisation(part.running_mean, part.running_var, part.weight, part.bias, part.eps, len(shape)), x, where
        )
    channels = part.num_channels if isinstance(part, nn.GroupNorm) else part.num_features
    groups = part.num_groups if isinstance(part, nn.GroupNorm) else channels
    if shape[0] != channels:
        raise ValueError(f"model: {where} does not take an input of shape {shape}: it has {channels} channels")
    rows = b.reshape(x, (groups, math.prod(shape) // groups), where)
    y = b.normalise(b.nodes[rows].shape[1:], part.eps, None, None, rows, where, centred=True)
    y = b.reshape(y, shape, where)
    if part.weight is None:
        return y
    wide = (-1, *[1] * (len(shape) - 1))
    return b.affine(Diagonal(part.weight.view(wide), part.bias.view(wide)), y, where)


def add_convolution(b: Builder, part: _ConvNd, x: int, where: str) -> int:
    if part.padding_mode != "zeros":
        raise ValueError(f"model: {where} pads by {part.padding_mode}: only zeros are supported")
    padding: Any = part.padding
    if padding == "valid":
        padding = [0] * len(part.kernel_size)
    elif padding == "same":  # pads more on the right where the kernel is even
        total = [d * (k - 1) for d, k in zip(part.dilation, part.kernel_size)]
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        x = b.rearrange(lambda v: F.pad(v, sides), x, where)
        padding = [0] * len(total)
    extra = list(part.output_padding) if part.transposed else None
    op = Convolution(part.weight, part.bias, b.nodes[x].shape, part.stride, padding, part.dilation, part.groups, extra)
    return b.affine(op, x, where)


def add_max_pool(b: Builder, pool: nn.MaxPool2d, x: int, where: str) -> int:
    """max(a, b) = a + ReLU(b - a), pairwise: the Clarke set of the tree contains that of the maximum."""
    shape = b.nodes[x].shape
    if len(shape) != 3:
        raise ValueError(f"model: {where} needs inputs (N, C, H, W)")
    index = window_indices(shape, pool).to(b.like.device)
    candidates = [index[..., k] for k in range(index.shape[-1])]
    pick = lambda which: b.rearrange(lambda v: v.flatten(1)[:, which], x, where)
    level = [pick(which) for which in candidates]
    while len(level) > 1:
        paired = [
            b.sum((one, b.activation(relu(), b.sum((other, one), (1.0, -1.0), where), where)), (1.0, 1.0), where)
            for one, other in zip(level[::2], level[1::2])
        ]
        level = paired + level[len(paired) * 2 :]
    return level[0]
