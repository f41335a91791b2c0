"""What a linearisation asks of its inputs, its parameters and the modules that it meets."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from locally.checks import check_finite


def check_inputs(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs as a tuple of detached tensors.

    Raises:
        TypeError: they are no tensor and no tuple of tensors.
        ValueError: they share no leading dimension of at least 1, or hold NaN or infinity.
    """
    tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {type(inputs).__name__}")
    sizes = {len(x) if x.ndim else 0 for x in tensors}
    if len(sizes) > 1 or sizes == {0}:
        raise ValueError(
            f"inputs must share a leading dimension of at least 1, got {[tuple(x.shape) for x in tensors]}"
        )
    for x in tensors:
        if x.is_floating_point():
            check_finite("inputs", x)
    return tuple(x.detach() for x in tensors)


def select_parameters(module: nn.Module, names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the parameters to differentiate by, in order; default all that require a gradient.

    Raises:
        ValueError: a name is unknown or stands there twice, none is left, or dtypes or devices differ.
    """
    own = dict(module.named_parameters())
    chosen = tuple(n for n, p in own.items() if p.requires_grad) if names is None else tuple(names)
    if unknown := [n for n in chosen if n not in own]:
        raise ValueError(f"parameters: the module has none called {', '.join(unknown)}")
    if not chosen:
        raise ValueError("parameters: the module has none that require a gradient")
    if len(set(chosen)) != len(chosen):
        raise ValueError("parameters: a name stands there twice")
    if len({(own[n].dtype, own[n].device) for n in chosen}) > 1:
        raise ValueError("parameters: need one dtype and one device")
    return chosen


def refuse_random_modules(module: nn.Module) -> None:
    """Dropout that is switched on has no derivative to speak of; training batch norm ties examples together."""
    for path, part in module.named_modules():
        where = f"{path or 'the module'} ({type(part).__name__})"
        if part.training and ((isinstance(part, _DropoutNd) and part.p > 0) or isinstance(part, nn.RReLU)):
            raise ValueError(f"module: {where} is random in training mode: call module.eval() first")
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            raise ValueError(
                f"module: {where} normalises by batch: call module.eval() first, or track running statistics"
            )
