"""A network as a chain of sections without biases: activations carry a constant one, weights carry the biases.

The basis mixes features linearly, so whatever a section adds on its own has to come from a feature. Every activation
gets a last coordinate that is 1; an affine layer becomes the matrix [[W, 0], [b, 1]], and an activation function hands
the one through at the point c where it takes the value 1. Residual blocks carry the stream beside the branch, and a
layer norm comes in two steps with the variance as a coordinate of its own (arXiv 2405.10928, appendix on folding).
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor, fx, nn
from torch.func import vjp
from torch.nn import functional as F

from locally.tangent.interaction_basis.attending import Attending
from locally.tangent.interaction_basis.transformer import CausalSelfAttention, LastPosition, Residual

M = TypeVar("M", bound=nn.Module)

ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.ReLU6, nn.Hardswish, nn.Mish, nn.CELU),
    *(nn.Tanh, nn.Sigmoid, nn.Softsign, nn.LogSigmoid),  # known, and refused with the reason
)
FUNCTIONS: dict[object, type[nn.Module]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu"), nn.ReLU),
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), nn.Tanh),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), nn.Sigmoid),
}


class Kind(StrEnum):
    LINEAR = "linear"
    ELEMENTWISE = "elementwise"
    GENERAL = "general"


class Folded(nn.Module):
    """A layer without bias on (..., width) activations whose last coordinate is the constant."""

    kind = Kind.GENERAL


class FoldedLinear(Folded):
    """f -> f [[W, 0], [b, 1]]."""

    kind = Kind.LINEAR

    def __init__(self, weight: Float[Tensor, "inputs outputs"], bias: Float[Tensor, " outputs"] | None) -> None:
        super().__init__()
        inputs, outputs = weight.shape
        folded = weight.new_zeros(inputs + 1, outputs + 1)
        folded[:-1, :-1], folded[-1, -1] = weight, 1
        if bias is not None:
            folded[-1, :-1] = bias
        self.weight = nn.Parameter(folded, requires_grad=False)

    def forward(self, f: Tensor) -> Tensor:
        return f @ self.weight


class FoldedActivation(Folded):
    """An activation function, with the constant at the point where the function is 1."""

    kind = Kind.ELEMENTWISE

    def __init__(self, function: nn.Module, one: float) -> None:
        super().__init__()
        self.function, self.one = function, one

    def forward(self, f: Tensor) -> Tensor:
        if self.one == 1:
            return self.function(f)
        return torch.cat([self.function(f[..., :-1]), self.function(self.one * f[..., -1:])], -1)

    def slope(self, f: Tensor) -> Tensor:
        """Derivative of every coordinate by itself."""
        if isinstance(self.function, nn.ReLU):
            return (f > 0).to(f.dtype)
        return vjp(self.forward, f)[1](torch.ones_like(f))[0]


class Branch(Folded):
    """(x, 1) -> (x, x, 1): the residual stream and what the branch works on."""

    kind = Kind.LINEAR

    def forward(self, f: Tensor) -> Tensor:
        return torch.cat([f[..., :-1], f], -1)


class Merge(Folded):
    """(x, h, 1) -> (x + h, 1)."""

    kind = Kind.LINEAR

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, f: Tensor) -> Tensor:
        return torch.cat([f[..., : self.width] + f[..., self.width : -1], f[..., -1:]], -1)


class Beside(Folded):
    """A layer on all but the first `width` coordinates, which pass."""

    def __init__(self, layer: Folded, width: int) -> None:
        super().__init__()
        self.layer, self.width, self.kind = layer, width, layer.kind

    def forward(self, f: Tensor) -> Tensor:
        return torch.cat([f[..., : self.width], self.layer(f[..., self.width :])], -1)

    def slope(self, f: Tensor) -> Tensor:
        passed = torch.ones_like(f[..., : self.width])
        return torch.cat([passed, self.layer.slope(f[..., self.width :])], -1)  # type: ignore[operator]


class NormIn(Folded):
    """(x, 1) -> (variance, x - mean, 1)."""

    def forward(self, f: Tensor) -> Tensor:
        centred = f[..., :-1] - f[..., :-1].mean(-1, keepdim=True)
        return torch.cat([centred.square().mean(-1, keepdim=True), centred, f[..., -1:]], -1)


class NormOut(Folded):
    """(variance, z, 1) -> (z / sqrt(variance + eps), 1); variances that an ablation pushed below zero count as 0."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, f: Tensor) -> Tensor:
        scale = (f[..., :1].relu() + self.eps).rsqrt()
        return torch.cat([f[..., 1:-1] * scale, f[..., -1:]], -1)


class Mix(Folded):
    """(q, k, v, 1) -> (heads' averages of v, 1), each position over itself and those before it."""

    def __init__(self, attention: CausalSelfAttention) -> None:
        super().__init__()
        self.heads, self.head_width = attention.heads, attention.head_width

    def forward(self, f: Tensor) -> Tensor:
        q, k, v = f[..., :-1].unflatten(-1, (3, self.heads, self.head_width)).unbind(-3)
        return torch.cat([CausalSelfAttention.mix(q, k, v), f[..., -1:]], -1)


class TakeLast(Folded):
    """The last position alone: (n, positions, width) -> (n, width)."""

    def forward(self, f: Tensor) -> Tensor:
        return f[:, -1]


class DropConstant(Folded):
    """The network's output has no constant."""

    kind = Kind.LINEAR

    def forward(self, f: Tensor) -> Tensor:
        return f[..., :-1]


class Section(nn.Sequential):
    """The layers between two cuts."""

    def factor(self, like: Float[Tensor, "..."], width: int) -> "Factored | None":
        """f -> act(f A) B with the matrices A and B, where the section has at most one activation function."""
        layers = list(self)
        kinds: list[Kind] = [layer.kind for layer in layers]  # type: ignore[misc]
        if Kind.GENERAL in kinds or kinds.count(Kind.ELEMENTWISE) > 1:
            return None
        at = kinds.index(Kind.ELEMENTWISE) if Kind.ELEMENTWISE in kinds else len(kinds)
        A = product(layers[:at], width, like)
        return Factored(A, layers[at] if at < len(kinds) else None, product(layers[at + 1 :], A.shape[1], like))

    def attend(self, like: Float[Tensor, "..."], width: int) -> Attending | None:
        """The section in closed form, where beside one attention it only has linear layers."""
        layers = list(self)
        at = next((i for i, layer in enumerate(layers) if isinstance(innermost(layer), Mix)), None)
        if at is None:
            return None
        behind = [layer for layer in layers[at + 1 :] if not isinstance(layer, TakeLast)]
        if any(layer.kind is not Kind.LINEAR for layer in (*layers[:at], *behind)):
            return None
        mix = innermost(layers[at])
        assert isinstance(mix, Mix)
        A = product(layers[:at], width, like)
        inside = mix.heads * mix.head_width
        beside = A.shape[1] - 3 * inside - 1
        B = product(behind, beside + inside + 1, like)
        return Attending.of(A, B, beside, mix.heads, last=len(behind) < len(layers) - at - 1)


def product(layers: Sequence[nn.Module], width: int, like: Tensor) -> Float[Tensor, "width outputs"]:
    """The matrix of linear layers."""
    matrix = torch.eye(width, dtype=like.dtype, device=like.device)
    for layer in layers:
        matrix = layer(matrix)
    return matrix


def innermost(layer: nn.Module) -> nn.Module:
    """What works, behind coordinates that pass."""
    return innermost(layer.layer) if isinstance(layer, Beside) else layer


@dataclass(frozen=True)
class Factored:
    """f -> act(f A) B; without an activation f -> f A B."""

    A: Float[Tensor, "inputs hidden"]
    activation: nn.Module | None
    B: Float[Tensor, "hidden outputs"]


@dataclass(frozen=True)
class Cut:
    """A place between layers: name, width with the constant, and which coordinate is a layer norm's variance."""

    name: str
    width: int
    has_constant: bool = True
    variance: int | None = None


class FoldedChain(nn.Module):
    """prefix, as it stands -> (f, 1) -> head -> cut 0 -> section 0 -> cut 1 -> ... -> last cut -> tail -> output.

    With the output as the last cut the tail is empty. Folded weights are copies; the caller's model stays as it is.
    """

    def __init__(self, prefix: nn.Module, head: Section, sections: Sequence[Section], tail: Section, cuts: list[Cut]):
        super().__init__()
        self.prefix, self.head, self.tail = prefix, head, tail
        self.sections = nn.ModuleList(sections)
        self.cuts = cuts

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(p.dtype for p in self.parameters())

    def start(self, x: Float[Tensor, "n ..."] | Tensor) -> Float[Tensor, "n ... width"]:
        """Activations at cut 0."""
        f = self.prefix(x.to(self.dtype) if x.is_floating_point() else x)
        return self.head(torch.cat([f, f.new_ones(*f.shape[:-1], 1)], -1))

    def advance(self, f: Float[Tensor, "n ... a"], since: int, until: int) -> Float[Tensor, "n ... b"]:
        """From one cut to another."""
        for section in list(self.sections)[since:until]:
            f = section(f)
        return f

    def finish(self, f: Float[Tensor, "n ... a"], since: int) -> Float[Tensor, "n ... out"]:
        """From a cut to the network's output."""
        return self.tail(self.advance(f, since, len(self.sections)))

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.start(x), 0)


def fold(
    model: nn.Module, node_layers: Sequence[str], example: Tensor, *, output: bool, dtype: torch.dtype
) -> FoldedChain:
    """Cut a model in front of each of `node_layers`, and after its output.

    Args:
        model: an `nn.Sequential`, nested as you like, or a module that `torch.fx` traces to a chain of modules. Behind
            the first cut it may hold Linear, BatchNorm1d and LayerNorm over the last axis, activation functions that
            take the value 1, Dropout and BatchNorm in evaluation mode, `Residual`, `CausalSelfAttention`,
            `LastPosition`. In front of the first cut it may hold anything that returns (n, d) or (n, positions, d).
        node_layers: dotted paths in the order of the forward pass. "norm.out" is inside the layer norm "norm", between
            variance and division; "attention.mix" and "attention.out" are inside an attention; "block.add" is before
            the addition of a residual block.
        example: a few inputs, to see widths by.
        output: whether the network's output is the last cut.

    Raises:
        ValueError: a layer cannot be folded (named by its path), a cut is unknown or out of order.
    """
    chain = copied(as_sequential(model), dtype)
    first = next((i for i, (name, _) in enumerate(chain.named_children()) if within(node_layers[0], name)), None)
    if first is None:
        raise ValueError(f"node_layers: the model has no layer {node_layers[0]!r}")
    children = list(chain.named_children())
    prefix = nn.Sequential(*(module for _, module in children[:first]))
    with torch.no_grad():
        f = prefix(example.to(dtype) if example.is_floating_point() else example)
    if not isinstance(f, Tensor) or f.ndim not in (2, 3) or not f.is_floating_point():
        came = f"{f.dtype} of shape {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
        raise ValueError(f"activations at {children[first][0]} must be (n, d) or (n, positions, d), got {came}")

    steps: list[Step] = []
    width = f.shape[-1]
    for name, module in children[first:]:
        for step in fold_module(name, module, width):
            steps.append(step)
            width = step.width_after
    names = [step.name for step in steps]
    cuts, at = [], []
    for name in node_layers:
        if any(within(name, child) for child, _ in children[:first]):
            raise ValueError(f"node_layers must be in the order of the forward pass, got {list(node_layers)}")
        if name not in names:
            raise ValueError(f"node_layers: no cut {name!r}; there are {', '.join(dict.fromkeys(names))}")
        i = names.index(name)
        before = steps[i - 1] if i else None
        variance = None if before is None else variance_at(before.layer)
        cuts.append(Cut(name, (before.width_after if before else f.shape[-1]) + 1, variance=variance))
        at.append(i)
    if at != sorted(set(at)):
        raise ValueError(f"node_layers must be distinct and in the order of the forward pass, got {list(node_layers)}")
    layers = [*(step.layer for step in steps), DropConstant()]
    if output:
        at.append(len(layers))
        cuts.append(Cut("output", width, has_constant=False))
    sections = [Section(*layers[a:b]) for a, b in pairwise(at)]
    return FoldedChain(prefix, Section(*layers[: at[0]]), sections, Section(*layers[at[-1] :]), cuts).requires_grad_(
        False
    )


@dataclass(frozen=True)
class Step:
    name: str  # of the cut in front
    layer: Folded
    width_after: int  # without the constant


def fold_module(path: str, module: nn.Module, width: int) -> Iterator[Step]:
    """The folded steps of one layer, for activations of `width` coordinates before the constant."""
    where = f"layer {path} ({type(module).__name__})"
    match module:
        case Residual():
            yield Step(path, Branch(), 2 * width)
            inside = width
            for name, child in module.named_children():
                for step in fold_module(f"{path}.{name}", child, inside):
                    inside = step.width_after
                    yield Step(step.name, Beside(step.layer, width), width + inside)
            expect(where, "must return what it is given, a width of", inside, width)
            yield Step(f"{path}.add", Merge(width), width)
        case nn.Sequential():
            for name, child in module.named_children():
                for step in fold_module(f"{path}.{name}", child, width):
                    width = step.width_after
                    yield step
        case nn.Linear():
            expect(where, "has in_features", module.in_features, width)
            yield Step(path, FoldedLinear(module.weight.detach().T, detached(module.bias)), module.out_features)
        case nn.LayerNorm():
            expect(where, "normalises a last axis of", module.normalized_shape, (width,))
            yield Step(path, NormIn(), width + 1)
            out: list[Folded] = [NormOut(module.eps)]
            if module.weight is not None:
                out.append(FoldedLinear(torch.diag(module.weight.detach()), detached(module.bias)))
            yield Step(f"{path}.out", out[0], width)
            for layer in out[1:]:
                yield Step(f"{path}.scale", layer, width)
        case nn.BatchNorm1d() if not module.training and module.running_mean is not None:
            expect(where, "has num_features", module.num_features, width)
            assert module.running_var is not None
            scale = (module.running_var + module.eps).rsqrt() * (module.weight.detach() if module.affine else 1)
            shift = (module.bias.detach() if module.affine else 0) - module.running_mean * scale
            yield Step(path, FoldedLinear(torch.diag(scale), shift), width)
        case CausalSelfAttention():
            expect(where, "has width", module.width, width)
            inside = module.heads * module.head_width
            yield from fold_module(path, module.project_in, width)
            yield Step(f"{path}.mix", Mix(module), inside)
            for step in fold_module(f"{path}.out", module.project_out, inside):
                yield step
        case LastPosition():
            yield Step(path, TakeLast(), width)
        case nn.Identity():
            return
        case nn.Dropout() if not module.training or module.p == 0:
            return
        case nn.Dropout() | nn.BatchNorm1d():
            raise ValueError(f"{where} is in training mode: call model.eval() first")
        case _ if isinstance(module, ACTIVATIONS):
            yield Step(path, FoldedActivation(module, one_of(where, module)), width)
        case _:
            raise ValueError(
                f"{where} cannot be folded; layers behind the first node layer must be Linear, BatchNorm1d, LayerNorm, "
                "Dropout, an activation function that takes the value 1, Residual, CausalSelfAttention or LastPosition"
            )


def one_of(where: str, function: nn.Module) -> float:
    """The smallest c > 0 with act(c) = 1: 1 for ReLU, 1.1445 for GELU."""
    if isinstance(function, nn.ReLU | nn.ReLU6 | nn.LeakyReLU | nn.ELU | nn.CELU):
        return 1.0
    value = lambda c: function(torch.tensor([c], dtype=torch.float64)).item() - 1
    if value(20.0) <= 0:
        raise ValueError(f"{where} never takes the value 1, so that no constant can pass through it")
    return float(brentq(value, 0.0, 20.0, xtol=1e-15, rtol=1e-14))


def as_sequential(model: nn.Module) -> nn.Sequential:
    """The chain of modules that a forward pass is, under the model's own names."""
    if isinstance(model, nn.Sequential):
        return model
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise ValueError(f"model: torch.fx cannot trace it to a chain of modules: {error}") from error
    chain = nn.Sequential()
    last: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder" and last is None:
            last = node
            continue
        if node.op == "output":
            if node.args != (last,):
                raise ValueError(f"model: it returns more than the last layer's output, {node.args}")
            continue
        if last is None or node.all_input_nodes != [last] or len(last.users) != 1:
            raise ValueError(f"model: {node.name} is not a link of a chain; write skip connections as Residual")
        if node.op == "call_module":
            # a dotted name would be a path; the chain keeps it whole in a nested Sequential
            add_nested(chain, str(node.target), model.get_submodule(str(node.target)))
        elif node.op in ("call_function", "call_method") and node.target in FUNCTIONS and len(node.args) == 1:
            options = {k: v for k, v in node.kwargs.items() if k != "inplace"}
            add_nested(chain, node.name, FUNCTIONS[node.target](**options))
        else:
            raise ValueError(f"model: {node.name} ({node.op}) is neither a module nor a known activation function")
        last = node
    return chain


def add_nested(chain: nn.Sequential, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in dict(chain.named_children()):
            chain.add_module(parent, nn.Sequential())
        chain = chain.get_submodule(parent)  # type: ignore[assignment]
    if name in dict(chain.named_children()):
        raise ValueError(f"model: {path} is called twice")
    chain.add_module(name, module)


def variance_at(layer: nn.Module) -> int | None:
    """Where a layer puts a variance, if it does."""
    if isinstance(layer, Beside):
        inside = variance_at(layer.layer)
        return None if inside is None else layer.width + inside
    return 0 if isinstance(layer, NormIn) else None


def within(cut: str, child: str) -> bool:
    return cut == child or cut.startswith(f"{child}.")


def detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def expect(where: str, what: str, came: object, wanted: object) -> None:
    if came != wanted:
        raise ValueError(f"{where} {what} {came}, but its input has {wanted}")


def copied(module: M, dtype: torch.dtype) -> M:
    """A copy in another precision whose layers leave their inputs as they are."""
    twin = deepcopy(module).to(dtype=dtype)
    for part in twin.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]
    return twin
