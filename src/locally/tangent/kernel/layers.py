"""Layers of a network of infinite width, and the steps on covariances that a stack of them becomes.

A layer describes what the finite layer is; `compile_layers` checks that the composition has a limit at all and turns it
into `Step`s on (Q, T), the covariance of the units and the tangent kernel. Sources: Jacot et al., arXiv 1806.07572;
Lee et al., arXiv 1902.06720 (parametrisations); Arora et al., arXiv 1904.11955 (convolutions and pooling).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from locally.checks import check_choice, check_count, check_nonnegative, check_positive
from locally.tangent.kernel.duals import Nonlinearity, nonlinearity

Parametrization = Literal["ntk", "standard"]
Padding = Literal["same", "valid", "circular"] | int | tuple[tuple[int, int], tuple[int, int]]
Size = int | tuple[int, int]


@dataclass(frozen=True)
class Dense:
    """Fully connected: (w_std / sqrt(n)) W a + b_std b with standard normal W and b ("ntk"), or the same function with
    the factors inside the parameters ("standard"), whose tangent kernel grows with the widths.

    Args:
        width: units of this layer; needed by a "standard" layer that follows, by itself no effect on the limit.
        w_std: > 0. b_std: >= 0; 0 is no bias.
    """

    width: int | None = None
    w_std: float = 1.0
    b_std: float = 0.1
    parametrization: Parametrization = "ntk"

    def __post_init__(self) -> None:
        check_affine(self.width, self.w_std, self.b_std, self.parametrization)


@dataclass(frozen=True)
class Conv:
    """2-D convolution over images (channels, height, width); the square root of channels x kernel area divides.

    Args:
        channels: of the output, as `width` in `Dense`.
        size: of the kernel, one number or (height, width).
        stride: likewise.
        padding: "same" (output ceil(size / stride), the smaller half before), "valid", "circular" (as "same", wrapped
            around), a number of zeros on every side, or ((top, bottom), (left, right)).
    """

    channels: int | None = None
    size: Size = 3
    stride: Size = 1
    padding: Padding = "same"
    w_std: float = 1.0
    b_std: float = 0.1
    parametrization: Parametrization = "ntk"

    def __post_init__(self) -> None:
        check_affine(self.channels, self.w_std, self.b_std, self.parametrization)
        for name, value in (("size", self.size), ("stride", self.stride)):
            for v in pair(value):
                check_count(name, v)
        if isinstance(self.padding, str):
            check_choice("padding", self.padding, ("same", "valid", "circular"))


@dataclass(frozen=True)
class Activation:
    """A nonlinearity at every unit: a name such as "relu" or "erf", or a `Nonlinearity`."""

    function: Nonlinearity | str = "relu"


@dataclass(frozen=True)
class LayerNorm:
    """Over the units (at each pixel), without affine parameters."""

    eps: float = 1e-12

    def __post_init__(self) -> None:
        check_nonnegative("eps", self.eps)


@dataclass(frozen=True)
class Flatten:
    """Pixels become units; with a dense layer after it only equal pixels of the two images meet."""


@dataclass(frozen=True)
class AvgPool:
    """Mean over windows, no padding."""

    size: Size = 2
    stride: Size | None = None

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("stride", self.stride)):
            for v in pair(1 if value is None else value):
                check_count(name, v)


@dataclass(frozen=True)
class GlobalAvgPool:
    """Mean over all pixels."""


@dataclass(frozen=True)
class Sum:
    """Sum of two independent branches on the same input; an empty branch is the identity (a skip connection)."""

    first: tuple["Layer", ...]
    second: tuple["Layer", ...]

    def __post_init__(self) -> None:
        if not self.first and not self.second:
            raise ValueError("first and second are both empty: that would double the input")


def residual(*layers: "Layer") -> Sum:
    """Identity plus the layers."""
    return Sum(layers, ())


Layer = Dense | Conv | Activation | LayerNorm | Flatten | AvgPool | GlobalAvgPool | Sum


class Op(IntEnum):
    AFFINE = 0  # w2, b2, q_to_t, b_to_t:  T <- w2 T + q_to_t Q + b_to_t,  Q <- w2 Q + b2
    BOX = 1  # mean over the kernel's window, same offset for both images
    DUAL = 2
    NORM = 3  # eps
    DIAGONAL_MEAN = 4  # flatten
    POOL = 5  # mean over windows of both images
    PUSH = 6  # keep a copy of the state
    SWAP = 7  # state and kept copy change places
    ADD = 8  # add the kept copy and drop it


@dataclass(frozen=True)
class Step:
    op: Op
    floats: tuple[float, ...] = ()
    # BOX: kernel, stride, padding before (height and width each), wraps; POOL: window, stride
    ints: tuple[int, ...] = ()
    function: Nonlinearity | None = None
    before: tuple[int, int] = (1, 1)  # pixels of the state on entry and on leaving
    after: tuple[int, int] = (1, 1)

    @property
    def reads_variance(self) -> bool:
        return self.op in (Op.DUAL, Op.NORM)


@dataclass(frozen=True)
class Program:
    """The steps, and whether every pair of pixels is needed or only equal ones."""

    steps: tuple[Step, ...]
    image: tuple[int, int] | None  # of the input; None for vectors
    full: bool

    @property
    def depth(self) -> int:
        """Copies that are kept at most."""
        level = most = 0
        for step in self.steps:
            level += {Op.PUSH: 1, Op.ADD: -1}.get(step.op, 0)
            most = max(most, level)
        return most

    @property
    def pixels(self) -> int:
        # a window slides along the height first, so that its output has the new height and the old width for a while
        sizes = [h * w for s in self.steps for h, w in (s.before, s.after, (s.after[0], s.before[1]))]
        return max(sizes, default=1)

    @property
    def numbers(self) -> int:
        """In the state of one pair, at its largest."""
        return self.pixels**2 if self.full else self.pixels


@dataclass
class _State:
    """What is known of the units between two layers."""

    image: tuple[int, int] | None
    units: int | None
    gaussian: bool = False  # after an affine layer, with a variance that is the same for all units
    affine: bool = False  # ends in fresh weights, so that a sum with another branch has no cross terms
    flat_pixels: int = 1  # pixels that a flatten layer turned into units


@dataclass
class _Compiler:
    steps: list[Step] = field(default_factory=list)

    def run(self, layers: Sequence[Layer], state: _State, path: str) -> _State:
        for index, layer in enumerate(layers):
            where = f"{path}{index} ({type(layer).__name__})"
            match layer:
                case Dense():
                    state = self.dense(layer, state, where)
                case Conv():
                    state = self.conv(layer, state, where)
                case Activation():
                    state = self.activation(layer, state, where)
                case LayerNorm():
                    if not state.affine:
                        raise ValueError(f"layers: {where} must follow an affine layer, whose units have mean 0")
                    self.steps.append(Step(Op.NORM, (layer.eps,), (), None, *twice(state.image)))
                case Flatten():
                    state = self.flatten(state, where)
                case AvgPool() | GlobalAvgPool():
                    state = self.pool(layer, state, where)
                case Sum():
                    state = self.sum(layer, state, f"{path}{index}", where)
                case _:
                    raise TypeError(f"layers: {where} is not a layer of an infinite network")
        return state

    def affine(self, layer: Dense | Conv, fan_in: int | None, image: tuple[int, int] | None, where: str) -> None:
        w2, b2 = layer.w_std**2, layer.b_std**2
        if layer.parametrization == "ntk":
            floats = (w2, b2, w2, b2)
        elif fan_in is None:
            raise ValueError(f"layers: {where} has the standard parametrisation and needs the width of what feeds it")
        else:
            floats = (w2, b2, float(fan_in), float(b2 > 0))
        self.steps.append(Step(Op.AFFINE, floats, (), None, *twice(image)))

    def dense(self, layer: Dense, state: _State, where: str) -> _State:
        if state.image is not None:
            raise ValueError(f"layers: {where} meets an image: put Flatten or GlobalAvgPool before it")
        self.affine(layer, state.units and state.units * state.flat_pixels, None, where)
        return _State(None, layer.width, gaussian=True, affine=True)

    def conv(self, layer: Conv, state: _State, where: str) -> _State:
        if state.image is None:
            raise ValueError(f"layers: {where} needs images (channels, height, width), its input is flat")
        kernel, stride = pair(layer.size), pair(layer.stride)
        before, after = padding_of(layer, state.image)
        out = tuple((n + b + a - k) // s + 1 for n, b, a, k, s in zip(state.image, before, after, kernel, stride))
        if min(out) < 1:
            raise ValueError(f"layers: {where} has a kernel of {kernel} on an image of {state.image}")
        image = (out[0], out[1])
        ints = (*kernel, *stride, *before, int(layer.padding == "circular"))
        self.steps.append(Step(Op.BOX, (), ints, None, state.image, image))
        self.affine(layer, state.units and state.units * kernel[0] * kernel[1], image, where)
        return _State(image, layer.channels, gaussian=True, affine=True)

    def activation(self, layer: Activation, state: _State, where: str) -> _State:
        function = nonlinearity(layer.function)
        if not state.gaussian:
            raise ValueError(f"layers: {where} must follow an affine layer: only then are its inputs Gaussian")
        self.steps.append(Step(Op.DUAL, function.constants, (), function, *twice(state.image)))
        return _State(state.image, state.units)

    def flatten(self, state: _State, where: str) -> _State:
        if state.image is None:
            return state
        self.steps.append(Step(Op.DIAGONAL_MEAN, before=state.image))
        return _State(None, state.units, flat_pixels=state.image[0] * state.image[1])

    def pool(self, layer: AvgPool | GlobalAvgPool, state: _State, where: str) -> _State:
        if state.image is None:
            raise ValueError(f"layers: {where} needs images (channels, height, width), its input is flat")
        if isinstance(layer, GlobalAvgPool):
            self.steps.append(Step(Op.POOL, (), (*state.image, 1, 1), None, state.image, (1, 1)))
            self.steps.append(Step(Op.DIAGONAL_MEAN))
            return _State(None, state.units, state.gaussian, state.affine)
        window = pair(layer.size)
        stride = window if layer.stride is None else pair(layer.stride)
        out = [(n - k) // s + 1 for n, k, s in zip(state.image, window, stride)]
        if min(out) < 1:
            raise ValueError(f"layers: {where} has a window of {window} on an image of {state.image}")
        image = (out[0], out[1])
        self.steps.append(Step(Op.POOL, (), (*window, *stride), None, state.image, image))
        return _State(image, state.units, state.gaussian, state.affine)

    def sum(self, layer: Sum, state: _State, path: str, where: str) -> _State:
        ends = []
        for index, branch in enumerate((layer.first, layer.second)):
            # the second branch starts from the kept copy of the input while the first one's end takes its place
            self.steps.append(Step((Op.PUSH, Op.SWAP)[index], before=state.image or (1, 1)))
            end = self.run(branch, _State(**vars(state)), f"{path}.{index}.")
            if branch and not end.affine:
                raise ValueError(f"layers: {where}: a branch must end in an affine layer, or the sum has cross terms")
            ends.append(end)
        one, other = ends
        if one.image != other.image:
            raise ValueError(f"layers: {where}: the branches end in images of {one.image} and {other.image}")
        if None not in (one.units, other.units) and one.units != other.units:
            raise ValueError(f"layers: {where}: the branches end in {one.units} and {other.units} units")
        self.steps.append(Step(Op.ADD, (), (), None, *twice(one.image)))
        units = one.units if other.units is None else other.units
        return _State(one.image, units, one.gaussian and other.gaussian, one.affine and other.affine)


def compile_layers(layers: Sequence[Layer], shape: tuple[int, ...]) -> Program:
    """Steps for inputs of `shape`, (features,) or (channels, height, width).

    Raises:
        ValueError, TypeError: the composition has no closed form; the message names the layer by its path.
    """
    if len(shape) not in (1, 3):
        raise ValueError(f"inputs must be vectors or images (channels, height, width), got examples of shape {shape}")
    image = (shape[1], shape[2]) if len(shape) == 3 else None
    compiler = _Compiler()
    end = compiler.run(layers, _State(image, shape[0]), "")
    if end.image is not None:
        raise ValueError(f"layers must end flat, but end in an image of {end.image}: add Flatten or GlobalAvgPool")
    if not end.affine:
        raise ValueError("layers must end in an affine layer, the readout")
    steps = tuple(compiler.steps)
    return Program(steps, image, full=any(s.op is Op.POOL for s in steps))


def padding_of(layer: Conv, image: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels before and after, of height and width each: ((top, left), (bottom, right))."""
    if isinstance(layer.padding, str):
        if layer.padding == "valid":
            return (0, 0), (0, 0)
        totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(image, pair(layer.size), pair(layer.stride))]
        top, left = (t // 2 for t in totals)
        return (top, left), (totals[0] - top, totals[1] - left)
    if isinstance(layer.padding, int):
        return (layer.padding,) * 2, (layer.padding,) * 2
    (top, bottom), (left, right) = layer.padding
    return (top, left), (bottom, right)


def twice(image: tuple[int, int] | None) -> tuple[tuple[int, int], tuple[int, int]]:
    return (image or (1, 1),) * 2


def pair(value: Size) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def check_affine(width: int | None, w_std: float, b_std: float, parametrization: str) -> None:
    if width is not None:
        check_count("width", width)
    check_positive("w_std", w_std)
    check_nonnegative("b_std", b_std)
    check_choice("parametrization", parametrization, ("ntk", "standard"))
