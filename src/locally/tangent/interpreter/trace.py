"""From a module to the straight list of tensor operations that one example goes through.

The list is what the rest of the room works on: it holds functional calls (`F.relu`, `x * gate`, `x += y`) as well as
modules, a unit that is used twice stands in it twice, and changes in place have become values of their own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from locally.tangent.linearization import first_line, hazard, tapped


@dataclass(frozen=True)
class Call:
    """One operation. Nodes of the graph stand in `args` and `kwargs` for the tensors that they will be."""

    node: fx.Node
    op: Callable[..., Any]
    name: str  # of the operation without overload and without the underscore of in-place variants: "add", "relu"
    path: str  # of the innermost submodule that called it, "" for the module itself
    where: str  # the same for people, with the type

    @property
    def args(self) -> tuple[Any, ...]:
        return self.node.args

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.node.kwargs


@dataclass(frozen=True)
class Trace:
    """Inputs, parameters and calls in order; `single` lists the submodules that take one tensor and return one."""

    inputs: tuple[fx.Node, ...]
    tensors: dict[fx.Node, Tensor]
    calls: tuple[Call, ...]
    output: fx.Node
    single: frozenset[str]


@dataclass
class Watch:
    """Which submodule is at work from which node of the graph on."""

    inside: list[str] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    single: dict[str, bool] = field(default_factory=dict)

    def mark(self) -> None:
        mode = get_proxy_mode()
        assert mode is not None
        self.marks.append((len(mode.tracer.graph.nodes), self.inside[-1] if self.inside else ""))


def trace(module: nn.Module, inputs: tuple[Tensor, ...], target: str | None = None) -> Trace:
    """Follow `module` on one example, tensors (1, ...), up to the output of submodule `target` (default its own).

    Raises:
        ValueError: the pass depends on values, or cannot be followed; names the submodule.
    """
    own = {n: p.detach() for n, p in module.named_parameters()}
    own |= {n: b.clone() for n, b in module.named_buffers()}

    def function(*given: Tensor) -> Tensor:
        with tapped(module, None, None, target) as seen:
            out = functional_call(module, own, given)
        return seen[0] if target is not None else out

    with watching(module) as watch, plain_kernels(), torch.no_grad():
        try:
            graph = make_fx(functionalize(function, remove="mutations"))(*(x.clone() for x in inputs))
        except RuntimeError as error:
            where = describe(module, watch.inside[-1] if watch.inside else "")
            raise ValueError(f"module: {hazard(error)} at {where}: {first_line(error)}") from error
    return read(module, graph, watch)


def read(module: nn.Module, graph: fx.GraphModule, watch: Watch) -> Trace:
    inputs, tensors, calls = [], {}, []
    paths = iter([*watch.marks, (10**9, "")])
    path, (until, following) = "", next(paths)
    renamed: dict[fx.Node, fx.Node] = {}
    placed = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.copy.default:  # of what is written over only the shape counts
            node.args = (node.args[1], node.args[0].meta["tensor_meta"].shape)
    graph.graph.eliminate_dead_code()
    output = None
    for node in graph.graph.nodes:
        while placed[node] >= until:
            path, (until, following) = following, next(paths)
        for old, new in renamed.items():
            node.replace_input_with(old, new)
        match node.op:
            case "placeholder":
                inputs.append(node)
            case "get_attr":
                tensors[node] = getattr(graph, node.target).detach()
            case "call_function":
                name, op = functional(node.target)
                if (
                    name not in REWRITTEN and op is not node.target
                ):  # what a composite operation changes in place is used as changed from here on
                    renamed[node.args[0]] = node
                calls.append(Call(node, op, name, path, describe(module, path)))
            case "output":
                output = node.args[0][0] if isinstance(node.args[0], tuple | list) else node.args[0]
    assert isinstance(output, fx.Node)
    single = frozenset(p for p, alone in watch.single.items() if alone)
    return Trace(tuple(inputs), tensors, tuple(calls), output, single)


def functional(op: Any) -> tuple[str, Any]:
    """Name of an operation, and the variant of it that changes nothing in place."""
    if not isinstance(op, torch._ops.OpOverload):
        return op.__name__, op
    name = op.overloadpacket.__name__
    if name in REWRITTEN:
        return name, REWRITTEN[name]
    if not op._schema.is_mutable or not name.endswith("_"):
        return name, op
    return name[:-1], getattr(getattr(torch.ops.aten, name[:-1]), op._overloadname)


def put_slice(x: Tensor, new: Tensor, dim: int, index: int) -> Tensor:
    """`select_scatter`, whose derivative is wrong under vmap in torch 2.13."""
    index %= x.shape[dim]
    return torch.slice_scatter(x, new.unsqueeze(dim), dim, index, index + 1)


REWRITTEN = {"copy": Tensor.expand, "select_scatter": put_slice}


def describe(module: nn.Module, path: str) -> str:
    return f"{path or 'the module'} ({type(module.get_submodule(path)).__name__})"


@contextmanager
def watching(module: nn.Module) -> Iterator[Watch]:
    watch = Watch()
    handles = []
    for path, part in module.named_modules():

        def enter(_module: nn.Module, given: Any, named: Any, path: str = path) -> None:
            watch.inside.append(path)
            alone = len(given) == 1 and not named and isinstance(given[0], Tensor)
            watch.single[path] = watch.single.get(path, True) and alone
            watch.mark()

        def leave(_module: nn.Module, _inputs: Any, out: Any, path: str = path) -> None:
            watch.inside.pop()
            watch.single[path] &= isinstance(out, Tensor)
            watch.mark()

        handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(part.register_forward_hook(leave))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention as products and a softmax, not as one fused operation."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
