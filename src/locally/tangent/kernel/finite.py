"""Finite networks in the parametrisation in which the limit is taken: normal parameters, factors in the forward pass.

Their gradient descent with a learning rate of about 1 follows the tangent kernel as the width grows. Source: Jacot et
al., arXiv 1806.07572, Section 3.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from locally.checks import check_count
from locally.tangent.kernel.duals import Nonlinearity, nonlinearity
from locally.tangent.kernel.layers import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    Layer,
    LayerNorm,
    Sum,
    padding_of,
    pair,
)


class Elementwise(nn.Module):
    """A nonlinearity as a module."""

    def __init__(self, function: Nonlinearity | str) -> None:
        super().__init__()
        self.function = nonlinearity(function)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.function(x)


class Residual(nn.Module):
    """Sum of two branches; the second is the identity unless given."""

    def __init__(self, first: nn.Module, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = first, nn.Identity() if second is None else second

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.first(x) + self.second(x)


class UnitNorm(nn.Module):
    """Layer norm over the units (at each pixel), without parameters."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "n units ..."]) -> Float[Tensor, "n units ..."]:
        centred = x - x.mean(1, keepdim=True)
        return centred * (centred.square().mean(1, keepdim=True) + self.eps).rsqrt()


class NTKLinear(nn.Module):
    """(w_std / sqrt(n)) W a + b_std b, W and b standard normal; with "standard" the factors are in the parameters."""

    def __init__(
        self, layer: Dense, fan_in: int, outputs: int, like: Tensor, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.weight, self.bias = draw((outputs, fan_in), fan_in, layer, like, generator)

    def forward(self, x: Float[Tensor, "n units"]) -> Float[Tensor, "n outputs"]:
        w, b = scales(self.layer, self.weight[0].numel())
        return F.linear(x, self.weight) * w + (0 if self.bias is None else b * self.bias)


class NTKConv2d(nn.Module):
    """As `NTKLinear`, a convolution."""

    def __init__(
        self, layer: Conv, channels: int, outputs: int, like: Tensor, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.layer = layer
        kernel = pair(layer.size)
        shape = (outputs, channels, *kernel)
        self.weight, self.bias = draw(shape, channels * kernel[0] * kernel[1], layer, like, generator)

    def forward(self, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n outputs h2 w2"]:
        return F.conv2d(self.padded(x), self.weight, stride=pair(self.layer.stride)) * self.factors[0] + self.shift

    def padded(self, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n channels h2 w2"]:
        """The images with the border that the layer's padding asks for: zeros, or the other side for "circular"."""
        (top, left), (bottom, right) = padding_of(self.layer, (x.shape[2], x.shape[3]))
        mode = "circular" if self.layer.padding == "circular" else "constant"
        return F.pad(x, (left, right, top, bottom), mode=mode)

    @property
    def factors(self) -> tuple[float, float]:
        """What weight and bias are multiplied by: (w_std / sqrt(fan-in), b_std), or 1 and 1 for "standard"."""
        return scales(self.layer, self.weight[0].numel())

    @property
    def shift(self) -> Tensor | float:
        """The bias with its factor, ready to be added to images; 0 without one."""
        return 0.0 if self.bias is None else self.factors[1] * self.bias[:, None, None]


def scales(layer: Dense | Conv, fan_in: int) -> tuple[float, float]:
    return (layer.w_std / math.sqrt(fan_in), layer.b_std) if layer.parametrization == "ntk" else (1.0, 1.0)


def draw(
    shape: tuple[int, ...], fan_in: int, layer: Dense | Conv, like: Tensor, generator: torch.Generator | None
) -> tuple[nn.Parameter, nn.Parameter | None]:
    inner = 1.0 if layer.parametrization == "ntk" else layer.w_std / math.sqrt(fan_in)
    weight = torch.randn(shape, generator=generator, dtype=like.dtype) * inner
    if layer.b_std == 0:
        return nn.Parameter(weight), None
    inner = 1.0 if layer.parametrization == "ntk" else layer.b_std
    return nn.Parameter(weight), nn.Parameter(torch.randn(shape[0], generator=generator, dtype=like.dtype) * inner)


def build(
    layers: Sequence[Layer],
    shape: tuple[int, ...],
    width: int,
    outputs: int,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> nn.Sequential:
    """`width` units or channels where a layer names no number of its own; the last affine layer has `outputs`."""
    check_count("width", width)
    check_count("outputs", outputs)
    example = torch.zeros(1, *shape, dtype=dtype)
    return stack(layers, example, width, outputs, generator)[0]


def stack(
    layers: Sequence[Layer], example: Tensor, width: int, outputs: int | None, generator: torch.Generator | None
) -> tuple[nn.Sequential, Tensor]:
    modules: list[nn.Module] = []
    last = max((i for i, x in enumerate(layers) if isinstance(x, Dense | Conv | Sum)), default=-1)
    for index, layer in enumerate(layers):
        own = outputs if index == last else None
        match layer:
            case Dense():
                module: nn.Module = NTKLinear(layer, example.shape[1], own or layer.width or width, example, generator)
            case Conv():
                module = NTKConv2d(layer, example.shape[1], own or layer.channels or width, example, generator)
            case Activation():
                module = Elementwise(layer.function)
            case LayerNorm():
                module = UnitNorm(layer.eps)
            case Flatten():
                module = nn.Flatten()
            case AvgPool():
                module = nn.AvgPool2d(pair(layer.size), None if layer.stride is None else pair(layer.stride))
            case GlobalAvgPool():
                module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            case Sum():
                same = own or example.shape[1] if not (layer.first and layer.second) else own
                parts = [stack(b, example, width, same, generator)[0] for b in (layer.first, layer.second)]
                module = Residual(parts[0], parts[1])
        with torch.no_grad():
            example = module(example)
        modules.append(module)
    return nn.Sequential(*modules), example
