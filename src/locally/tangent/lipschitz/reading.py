"""A torch module read into a graph of affine maps, sums and activations.

The module is traced with torch.fx, copied in double precision, and compared with the graph at random points, so that
whatever the tracer did not see (state, randomness, changes in place) is refused and not bounded wrongly.
"""

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from locally.checks import check_finite
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
from locally.tangent.lipschitz.by_hand import ByHand, Ref, Spread, Squared, unknown
from locally.tangent.lipschitz.layers import Builder, add_layer, add_max_pool
from locally.tangent.lipschitz.network import Network
from locally.tangent.lipschitz.operations import (
    Dense,
    Diagonal,
)


def read_module(module: nn.Module, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Network:
    """The graph of a module for inputs (N, *shape), in double precision on `device`.

    Raises:
        TypeError: `module` is not a torch module.
        ValueError: a layer is not supported, in training mode, changes a value that is used again, or branches on
            values; the message names it by its path.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(module).__name__}")
    refuse_training(module)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            check_finite(f"model: {name}", tensor)
    twin = copy.deepcopy(module)
    settle_eps(twin, own_dtype(module))
    twin.to(device=device, dtype=torch.float64).requires_grad_(False)
    if type(twin).__module__.startswith("torch.nn.") and not isinstance(twin, nn.Sequential):
        twin = nn.Sequential(twin)  # a bare layer: the tracer would look inside
    try:
        graph = fx.Tracer().trace(twin)
    except (fx.proxy.TraceError, TypeError) as error:
        raise ValueError(
            f"model: its path depends on values (control flow), so it has no fixed graph: {error}"
        ) from error
    refuse_reuse_after_change(graph, twin)
    network = Reader(twin, graph, shape, torch.device(device)).network()
    check_agreement(network, module, shape, torch.device(device))
    return network


def refuse_training(module: nn.Module) -> None:
    for path, part in module.named_modules():
        where = f"{path or 'the module itself'} ({type(part).__name__})"
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            raise ValueError(
                f"model: {where} normalises by batch: call model.eval() first, or track running statistics"
            )
        if part.training and ((isinstance(part, _DropoutNd) and part.p > 0) or isinstance(part, nn.RReLU)):
            raise ValueError(f"model: {where} is random in training mode: call model.eval() first")


VIEWS = (nn.Flatten, nn.Unflatten, nn.Identity, _DropoutNd)
VIEW_NAMES = {"flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous"}


def refuse_reuse_after_change(graph: fx.Graph, module: nn.Module) -> None:
    """A value that a layer changes in place, and that is used again afterwards, is not what the graph says it is."""
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    parts = dict(module.named_modules())
    root: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        part = parts.get(str(node.target)) if node.op == "call_module" else None
        name = getattr(node.target, "__name__", str(node.target))
        in_place = bool(getattr(part, "inplace", False) or node.kwargs.get("inplace", False)) or (
            node.op != "call_module" and (name in ("iadd", "isub", "imul") or (name.endswith("_") and name[:1] != "_"))
        )
        is_view = isinstance(part, VIEWS) or (node.op != "call_module" and name in VIEW_NAMES)
        root[node] = root[first] if first is not None and (is_view or in_place) else node
        if in_place and first is not None:
            for other in nodes:
                if other in root and root[other] is root[first] and other is not node:
                    late = [user for user in other.users if order[user] > order[node]]
                    if late:
                        raise ValueError(
                            f"model: {node.target} changes in place what {late[0].target} uses afterwards: "
                            "switch inplace off there"
                        )


def check_agreement(network: Network, module: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(device)
    own = own_dtype(module)
    with torch.no_grad():
        expected = module(x.to(own, copy=True)).to(torch.float64).reshape(2, -1)
    found = network(x)
    size = max(1.0, float(expected.abs().max()))
    tolerance = 1e-7 if own == torch.float64 else 1e-3
    if float((found - expected).abs().max()) > tolerance * size:
        raise ValueError("model: its output differs from its traced graph: does it keep state or draw random numbers?")


def own_dtype(module: nn.Module) -> torch.dtype:
    """What the module computes in: that of its parameters."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float64)


def settle_eps(module: nn.Module, dtype: torch.dtype) -> None:
    """An RMSNorm without eps takes the precision of what it is given: write it down before the precision changes."""
    for part in module.modules():
        if isinstance(part, nn.RMSNorm) and part.eps is None:
            part.eps = torch.finfo(dtype).eps


class Reader:
    """Turns a traced graph into nodes, one fx node after the other."""

    def __init__(self, module: nn.Module, graph: fx.Graph, shape: tuple[int, ...], device: torch.device) -> None:
        self.module, self.graph = module, graph
        self.parts = dict(module.named_modules())
        self.builder = Builder(shape, device)
        self.by_hand = ByHand(self.builder)
        # a node's index (wrapped), a square on its way into a normalisation, or a plain value: a size, a parameter
        self.seen: dict[fx.Node, Any] = {}

    def network(self) -> Network:
        inputs = 0
        for node in self.graph.nodes:
            match node.op:
                case "placeholder":
                    inputs += 1
                    if inputs > 1:
                        raise ValueError(f"model: takes a second input, {node.target}; bounds need one tensor")
                    self.seen[node] = Ref(0)
                case "get_attr":
                    value: Any = self.module
                    for part in str(node.target).split("."):
                        value = getattr(value, part)
                    self.seen[node] = value.detach() if isinstance(value, Tensor) else value
                case "call_module":
                    self.seen[node] = self._module(str(node.target), self._value(node.args[0]))
                case "call_function" | "call_method":
                    self.seen[node] = self._function(node)
                case "output":
                    out = self._value(node.args[0])
                    if isinstance(out, Squared | Spread):
                        raise unknown(out.where)
                    if not isinstance(out, Ref):
                        raise ValueError("model: must return one tensor that depends on its input")
                    return self.builder.finish(out.index)
        raise ValueError("model: returns nothing")

    def _value(self, arg: Any) -> Any:
        return fx.node.map_arg(arg, lambda node: self.seen[node])

    def _module(self, path: str, x: Any) -> Any:
        part = self.parts[path]
        if not isinstance(x, Ref):
            raise ValueError(
                f"model: {path} ({type(part).__name__}) is not applied to something that depends on the input"
            )
        return Ref(add_layer(self.builder, part, x.index, path))

    def _function(self, node: fx.Node) -> Any:
        name = getattr(node.target, "__name__", str(node.target)).rstrip("_")
        args, kwargs = self._value(node.args), dict(self._value(node.kwargs))
        kwargs.pop("inplace", None)
        where = f"{name} (in {self._owner(node)})"
        refs = [a for a in args if isinstance(a, DEPENDENT)]
        if name in ("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "div", "neg"):
            return self._arithmetic(name.removeprefix("i"), args, where)
        if name in ("cat", "concat"):
            return self._concatenate(args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0), where)
        if not refs:
            return self._plain(node, args, kwargs, where)
        x, rest = args[0], args[1:]
        if name in CASTS and isinstance(x, DEPENDENT) and is_cast(name, rest, kwargs):
            return x
        if not isinstance(x, DEPENDENT) or len(refs) > 1:
            raise ValueError(f"model: {where} is not supported: it does not act on one tensor alone")
        if name in POWERS or isinstance(x, Squared | Spread):
            return self._by_hand(name, x, rest, kwargs, where)
        shape = self.builder.nodes[x.index].shape
        if name in ("size", "getattr", "shape", "dim"):
            return self._plain(node, (torch.empty(1, *shape), *rest), kwargs, where)
        if name == "linear":
            weight, bias = (*rest, kwargs.get("bias"))[:2]
            return Ref(self.builder.affine(Dense(weight, bias), x.index, where))
        if (activation := function_activation(name, rest, kwargs)) is not None:
            return Ref(self.builder.activation(activation, x.index, where))
        if name in ("layer_norm", "rms_norm"):
            return Ref(self._normalise(name, x.index, rest, kwargs, where))
        if name == "dropout":
            return x
        if name in ("max_pool2d", "boolean_dispatch"):
            pool = nn.MaxPool2d(*rest, **{k: v for k, v in kwargs.items() if k != "return_indices"})
            return Ref(add_max_pool(self.builder, pool, x.index, where))
        if name in ("view", "reshape", "flatten", "unflatten"):
            return Ref(self._reshape(name, x.index, rest, kwargs, where))
        if name in REARRANGING:
            if name == "pad" and (kwargs.get("value") or (len(rest) > 2 and rest[2])):
                raise ValueError(f"model: {where} pads with a value other than 0, which is not supported")
            call = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
            out = self.builder.rearrange(lambda v: call(v, *rest, **kwargs), x.index, where)  # type: ignore[operator]
            if name == "mean":
                self.by_hand.note_mean(out, x.index, *reduction(rest, kwargs))
            return Ref(out)
        raise ValueError(f"model: {where} is not supported")

    def _by_hand(self, name: str, x: Any, rest: tuple, kwargs: dict, where: str) -> Any:
        """Squares, variances and what becomes of them."""
        if name in ("var", "std") and isinstance(x, Ref):
            names = ("dim", "unbiased", "keepdim")
            given = {"keepdim": False, "unbiased": True} | dict(zip(names, rest)) | kwargs
            correction: Any = given.get("correction", given["unbiased"])
            power = 1.0 if name == "var" else 0.5
            return self.by_hand.variance(x.index, given.get("dim"), float(correction), given["keepdim"], power, where)
        if name in ("mean", "sum") and isinstance(x, Squared):
            return self.by_hand.reduce(x, *reduction(rest, kwargs), total=name == "sum", where=where)
        exponent = POWERS.get(name) if name != "pow" else (*rest, kwargs.get("exponent"))[0]
        if exponent is None:
            raise unknown(where)
        return self.by_hand.power(x, exponent, where)

    def _normalise(self, name: str, index: int, rest: tuple, kwargs: dict, where: str) -> int:
        names = (
            ["normalized_shape", "weight", "bias", "eps"]
            if name == "layer_norm"
            else ["normalized_shape", "weight", "eps"]
        )
        given = dict(zip(names, rest)) | kwargs
        if name == "rms_norm" and given.get("eps") is None:
            raise ValueError(f"model: {where} needs its eps given: the default depends on the input's precision")
        return self.builder.normalise(
            given["normalized_shape"], given.get("eps", 1e-5), given.get("weight"), given.get("bias"), index, where,
            centred=name == "layer_norm",
        )  # fmt: skip

    def _owner(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack)[-1] if stack else ""
        return path or "the module itself"

    def _plain(self, node: fx.Node, args: tuple, kwargs: dict, where: str) -> Any:
        """What does not depend on the input's values: sizes, and arithmetic on parameters."""
        try:
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"model: {where} is not supported: {error}") from error

    def _arithmetic(self, name: str, args: tuple, where: str) -> Any:
        b = self.builder
        if name == "neg" and isinstance(args[0], Ref):
            return Ref(b.affine(Diagonal(b.like.new_tensor(-1.0), None), args[0].index, where))
        left, right = (*args, None)[:2]
        kind = "div" if name == "truediv" else name
        if (found := self.by_hand.arithmetic(kind, left, right, where)) is not None:
            return found
        if not isinstance(left, Ref) and not isinstance(right, Ref):
            return {"add": operator.add, "sub": operator.sub, "mul": operator.mul}.get(name, operator.truediv)(
                left, right
            )
        if isinstance(left, Ref) and isinstance(right, Ref):
            if name not in ("add", "sub"):
                raise ValueError(f"model: {where} multiplies two values that depend on the input: not supported")
            if b.nodes[left.index].shape != b.nodes[right.index].shape:
                raise ValueError(f"model: {where} broadcasts one value over another, which is not supported")
            return Ref(b.sum((left.index, right.index), (1.0, 1.0 if name == "add" else -1.0), where))
        x, constant = (left, right) if isinstance(left, Ref) else (right, left)
        constant = torch.as_tensor(constant, dtype=b.like.dtype, device=b.like.device)
        shape = b.nodes[x.index].shape
        if constant.ndim > len(shape):
            if constant.shape[0] != 1:
                raise ValueError(f"model: {where} adds or multiplies a constant with a batch dimension")
            constant = constant[0]
        if torch.broadcast_shapes(constant.shape, shape) != torch.Size(shape):
            raise ValueError(f"model: {where} broadcasts its input over a constant, which is not supported")
        if name in ("truediv", "div"):
            if x is right:
                raise ValueError(f"model: {where} divides by a value that depends on the input: not supported")
            return Ref(b.affine(Diagonal(1 / constant, None), x.index, where))
        if name == "mul":
            return Ref(b.affine(Diagonal(constant, None), x.index, where))
        if name == "sub" and x is right:
            return Ref(b.affine(Diagonal(b.like.new_tensor(-1.0), constant), x.index, where))
        return Ref(b.affine(Diagonal(None, -constant if name == "sub" else constant), x.index, where))

    def _concatenate(self, parts: Any, dim: int, where: str) -> "Ref":
        if not all(isinstance(p, Ref) for p in parts):
            raise ValueError(f"model: {where} joins a constant, which is not supported")
        return Ref(self.builder.concatenate([p.index for p in parts], dim, where))

    def _reshape(self, name: str, index: int, rest: tuple, kwargs: dict, where: str) -> int:
        shape = self.builder.nodes[index].shape
        try:
            out = getattr(torch.empty(1, *shape), name)(*rest, **kwargs).shape
        except RuntimeError as error:
            raise ValueError(f"model: {where} is not supported: {error}") from error
        if len(out) < 2 or out[0] != 1:
            raise ValueError(f"model: {where} mixes the batch dimension with others")
        return self.builder.reshape(index, tuple(out[1:]), where)


DEPENDENT = (Ref, Squared, Spread)
POWERS = {"pow": None, "square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "var": None, "std": None}
CASTS = {"float", "double", "to", "type_as"}


def is_cast(name: str, rest: tuple, kwargs: dict) -> bool:
    """Whether only the precision changes, and not below single: bounds are for exact arithmetic anyway."""
    wide = (torch.float32, torch.float64)
    return name != "to" or all(a in wide for a in (*rest, *kwargs.values()))


def reduction(rest: tuple, kwargs: dict) -> tuple[Any, bool]:
    """Dimensions, and whether they are kept, of a mean or a sum."""
    given = {"keepdim": False} | dict(zip(("dim", "keepdim"), rest)) | kwargs
    return given.get("dim"), given["keepdim"]


REARRANGING = {
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "pad", "mean", "sum",
    "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "getitem",
}  # fmt: skip


def function_activation(name: str, rest: tuple, kwargs: dict) -> Activation | None:
    """Of torch.nn.functional, torch, or Tensor."""
    if name == "relu":
        return relu()
    if name in ("tanh", "sigmoid"):
        return tanh() if name == "tanh" else sigmoid()
    if name == "leaky_relu":
        return leaky_relu(rest[0] if rest else kwargs.get("negative_slope", 0.01))
    if name == "softplus":
        return softplus(rest[0] if rest else kwargs.get("beta", 1.0))
    if name == "gelu":
        return gelu_tanh() if (rest[0] if rest else kwargs.get("approximate", "none")) == "tanh" else gelu()
    return None
