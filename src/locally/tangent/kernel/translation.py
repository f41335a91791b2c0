"""From a torch module to the layers of its limit, naming by its path whatever has none."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from locally.tangent.kernel.duals import GELU, ABReLU, Nonlinearity, Quadrature
from locally.tangent.kernel.finite import Elementwise, NTKConv2d, NTKLinear, Residual, UnitNorm
from locally.tangent.kernel.layers import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    Layer,
    LayerNorm,
    Padding,
    Parametrization,
    Sum,
)

Stds = float | dict[str, float]
SMOOTH: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Tanh: torch.tanh,
    nn.Sigmoid: torch.sigmoid,
    nn.SiLU: nn.functional.silu,
    nn.Mish: nn.functional.mish,
    nn.Tanhshrink: nn.functional.tanhshrink,
    nn.LogSigmoid: nn.functional.logsigmoid,
}


def translate(module: nn.Module, w_std: Stds, b_std: Stds, parametrization: Parametrization) -> tuple[Layer, ...]:
    return tuple(_layers(module, "", w_std, b_std, parametrization))


def _layers(module: nn.Module, path: str, w: Stds, b: Stds, parametrization: Parametrization) -> Iterator[Layer]:
    where = f"module: {path or 'the module'} ({type(module).__name__})"
    match module:
        case nn.Sequential():
            for name, child in module.named_children():
                yield from _layers(child, f"{path}.{name}" if path else name, w, b, parametrization)
        case Residual():
            first, second = (
                tuple(_layers(getattr(module, n), f"{path}.{n}" if path else n, w, b, parametrization))
                for n in ("first", "second")
            )
            yield Sum(first, second)
        case NTKLinear() | NTKConv2d():
            yield module.layer
        case nn.Linear():
            bias = 0.0 if module.bias is None else of_path(b, path, "b_std")
            yield Dense(module.out_features, of_path(w, path, "w_std"), bias, parametrization)
        case nn.Conv2d():
            bias = 0.0 if module.bias is None else of_path(b, path, "b_std")
            yield convolution(module, where, of_path(w, path, "w_std"), bias, parametrization)
        case nn.Identity() | nn.Dropout(p=0.0):
            pass
        case nn.Flatten():
            if module.start_dim != 1 or module.end_dim != -1:
                raise ValueError(f"{where} must flatten everything but the batch")
            yield Flatten()
        case nn.AvgPool2d():
            if module.padding not in (0, (0, 0)) or module.ceil_mode or module.divisor_override:
                raise ValueError(f"{where} has padding, ceil_mode or a divisor, for which there is no rule")
            yield AvgPool(_size(module.kernel_size), _size(module.stride))
        case nn.AdaptiveAvgPool2d():
            if module.output_size not in (1, (1, 1)):
                raise ValueError(f"{where} must pool to one pixel, or be an AvgPool2d")
            yield GlobalAvgPool()
        case UnitNorm():
            yield LayerNorm(module.eps)
        case nn.LayerNorm():
            if module.elementwise_affine or len(module.normalized_shape) != 1:
                raise ValueError(f"{where} must normalise vectors and have elementwise_affine=False")
            yield LayerNorm(module.eps)
        case _:
            function = activation(module)
            if function is None:
                raise ValueError(f"{where} has no infinite-width limit in closed form here")
            yield Activation(function)


def activation(module: nn.Module) -> Nonlinearity | None:
    match module:
        case Elementwise():
            return module.function
        case nn.ReLU():
            return ABReLU()
        case nn.LeakyReLU():
            return ABReLU(module.negative_slope, 1.0)
        case nn.GELU(approximate="none"):
            return GELU()
        case nn.GELU():
            return Quadrature(lambda x: nn.functional.gelu(x, approximate="tanh"))
        case nn.Softplus():
            beta, threshold = module.beta, module.threshold
            return Quadrature(lambda x: nn.functional.softplus(x, beta, threshold))
    smooth = SMOOTH.get(type(module))
    return None if smooth is None else Quadrature(smooth)


def convolution(module: nn.Conv2d, where: str, w_std: float, b_std: float, parametrization: Parametrization) -> Conv:
    if module.groups != 1 or module.dilation not in (1, (1, 1)) or module.padding_mode not in ("zeros", "circular"):
        raise ValueError(f"{where} has groups, dilation or padding_mode={module.padding_mode!r}, which have no rule")
    kernel, stride = _size(module.kernel_size), _size(module.stride)
    padding: Padding
    if module.padding_mode == "circular":
        amount = module.padding if isinstance(module.padding, str) else _size(module.padding)
        if amount not in ("same", tuple((k - 1) // 2 for k in kernel)) or stride != (1, 1):
            raise ValueError(f"{where}: circular padding must keep the image's size")
        padding = "circular"
    elif isinstance(module.padding, str):
        padding = "valid" if module.padding == "valid" else "same"
    else:
        rows, columns = _size(module.padding)
        padding = ((rows, rows), (columns, columns))
    return Conv(module.out_channels, kernel, stride, padding, w_std, b_std, parametrization)


def of_path(value: Stds, path: str, name: str) -> float:
    if not isinstance(value, dict):
        return value
    if path not in value:
        raise ValueError(f"{name} has no entry for {path!r}")
    return value[path]


def _size(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
