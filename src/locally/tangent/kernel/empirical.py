"""The tangent kernel of a concrete network: J J^T, in whichever of three ways is cheapest.

By layers ("structured"): the Gram of a linear layer's gradients is the product of the Grams of what comes in and of
what is propagated back, so no gradient is ever formed. By Jacobians: any module. By products with vectors: any module,
O(P) memory. Sources: Jacot et al., arXiv 1806.07572, Section 4; Novak et al., arXiv 2206.08720, for the three ways.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F

from locally.checks import check_choice, check_count
from locally.tangent.kernel.finite import NTKConv2d, NTKLinear, scales
from locally.tangent.kernel.layers import pair
from locally.tangent.linearization import (
    Linearization,
    call_with,
    check_inputs,
    refuse_random_modules,
    select_parameters,
)

Mode = Literal["full", "trace", "diagonal"]
Method = Literal["auto", "jacobian", "vector_product", "structured"]
CONVOLUTIONS = (nn.Conv2d, NTKConv2d)
STRUCTURED = (nn.Linear, NTKLinear, *CONVOLUTIONS)


def empirical_ntk(
    module: nn.Module,
    x1: Float[Tensor, "n1 *shape"],
    x2: Float[Tensor, "n2 *shape"] | None = None,
    *,
    mode: Mode = "trace",
    method: Method = "auto",
    parameters: Sequence[str] | None = None,
    memory: int = 2**30,
) -> Float[Tensor, "n1 n2 *outputs"]:
    """Theta(x, x')_kk' = sum over parameters of d f_k(x) d f_k'(x'), f flattened to K outputs.

    Args:
        module: one row of output for each example; training dropout or batch norm is refused.
        x1, x2: examples; x2 defaults to x1.
        mode: "full" (N1, N2, K, K); "diagonal" (N1, N2, K), equal outputs only; "trace" (N1, N2), their mean.
        method: "structured" needs all parameters in linear and convolution layers that are called once each;
            "jacobian" forms J in blocks, O(N^2 K^2 P); "vector_product" takes one backward and one forward pass for
            each of N2 K unit vectors; "auto" takes the first where it can, else the second.
        parameters: names; default all that require a gradient.
        memory: bytes for intermediate values.

    Raises:
        ValueError, TypeError: an argument is unfit, or the module has no derivative of its own (its path is named).

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> x = torch.eye(3)
    >>> ways = [empirical_ntk(net, x, method=m) for m in ("structured", "jacobian", "vector_product")]
    >>> [bool(torch.allclose(ways[0], w, atol=1e-5)) for w in ways], ways[0].shape
    ([True, True, True], torch.Size([3, 3]))
    """
    check_choice("mode", mode, ("full", "trace", "diagonal"))
    check_choice("method", method, ("auto", "jacobian", "vector_product", "structured"))
    if method in ("auto", "structured"):
        for x in (x1, x2):
            check_inputs(x1 if x is None else x)
        found = layout(module, select_parameters(module, parameters), x1)
        if isinstance(found, Layout):
            check_count("memory", memory)
            return by_layers(module, found, x1, x1 if x2 is None else x2, mode, memory)
        if method == "structured":
            raise ValueError(f"method: structured contraction is not possible: {found}")
    J1 = Linearization(module, x1, wrt="parameters", parameters=parameters, memory=memory)
    J2 = J1 if x2 is None else Linearization(module, x2, wrt="parameters", parameters=parameters, memory=memory)
    return by_products(J1, J2, mode) if method == "vector_product" else by_jacobians(J1, J2, mode)


def by_jacobians(J1: Linearization, J2: Linearization, mode: Mode) -> Tensor:
    rows = []
    for _, left in J1.jacobian_blocks():
        left = left.flatten(1, -2) if left.ndim > 2 else left[:, None]
        row = []
        for _, right in J2.jacobian_blocks():
            right = right.flatten(1, -2) if right.ndim > 2 else right[:, None]
            row.append(contract(left, right, mode))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def contract(left: Tensor, right: Tensor, mode: Mode) -> Tensor:
    """(N1, K, P) and (N2, K, P) over P."""
    n, k, _ = left.shape
    if mode == "trace":
        return left.flatten(1) @ right.flatten(1).T / k
    if mode == "diagonal":
        return torch.einsum("nkp,mkp->nmk", left, right)
    return (left.flatten(0, 1) @ right.flatten(0, 1).T).reshape(n, k, len(right), k).transpose(1, 2)


def by_products(J1: Linearization, J2: Linearization, mode: Mode) -> Tensor:
    """Columns J1 (J2^T e), a block of unit vectors e at a time."""
    n1, n2, k = len(J1.value), len(J2.value), math.prod(J2.outputs)
    block = max(1, J2.memory // (4 * J2.point.numel() * J2.point.element_size()))
    eye = torch.eye(n2 * k, dtype=J2.point.dtype, device=J2.point.device)
    columns = [J1.jvp(J2.vjp(e.reshape(-1, *J2.value.shape))).reshape(-1, n1, k) for e in eye.split(block)]
    full = torch.cat(columns).reshape(n2, k, n1, k).permute(2, 0, 3, 1)
    if mode == "full":
        return full
    diagonal = full.diagonal(dim1=2, dim2=3)
    return diagonal if mode == "diagonal" else diagonal.mean(2)


# By layers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What one example says about the layers that own the parameters."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    first: Tensor  # output of the first example by itself
    bytes_per_example: int


def layout(module: nn.Module, names: Sequence[str], x: Tensor) -> Layout | str:
    """The layers, or why not: every parameter must belong to a plain layer that is called once."""
    refuse_random_modules(module)
    paths = tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))
    if len({id(p) for p in module.parameters()}) < sum(1 for _ in module.named_parameters(remove_duplicate=False)):
        return "some parameters are shared between layers"
    handles, calls = [], dict.fromkeys(paths, 0)
    incoming = outgoing = gradients = 0
    for path in paths:
        part = module.get_submodule(path)
        if type(part) not in STRUCTURED or (isinstance(part, nn.Conv2d) and part.groups != 1):
            return f"{path or 'the module'} ({type(part).__name__}) is no plain linear or convolution layer"

        def count(part: nn.Module, inputs: Any, out: Tensor, path: str = path) -> None:
            nonlocal incoming, outgoing, gradients
            calls[path] += 1
            a = unfolded(part, inputs[0])
            incoming, outgoing = incoming + a.numel(), outgoing + out.numel()
            gradients += dict(part.named_parameters())["weight"].numel() if a.shape[1] > 1 else 0

        handles.append(part.register_forward_hook(count))
    try:
        with torch.no_grad():
            first = module(x[:1].clone())
    finally:
        for handle in handles:
            handle.remove()
    often = [path for path, n in calls.items() if n != 1]
    if often:
        return f"{often[0]} is called {calls[often[0]]} times in one pass"
    if not isinstance(first, Tensor) or first.ndim == 0 or len(first) != 1:
        return "the module does not return one row for each example"
    k = first.numel()
    numbers = 2 * incoming + (2 + 2 * k) * outgoing + k * gradients
    return Layout(tuple(names), paths, first, numbers * first.element_size())


def by_layers(module: nn.Module, found: Layout, x1: Tensor, x2: Tensor, mode: Mode, memory: int) -> Tensor:
    """Chunks of x1 against chunks of x2; where x2 takes several chunks its factors are made again for each of x1."""
    if found.bytes_per_example > memory:
        raise ValueError(f"memory: {memory} bytes do not hold one example, which needs about {found.bytes_per_example}")
    size = memory // found.bytes_per_example
    pieces = x2.split(size)
    kept = [factors(module, found, x2)] if len(pieces) == 1 else None
    rows = []
    for left in x1.split(size):
        a = kept[0] if kept is not None and x2 is x1 else factors(module, found, left)
        right = kept if kept is not None else (factors(module, found, piece) for piece in pieces)
        rows.append(torch.cat([grams(a, b, mode) for b in right], 1))
        if len(rows) == 1 and not torch.allclose(a[0].output[:1], found.first.flatten(1), rtol=1e-3, atol=1e-5):
            Linearization(module, x1[:2])  # which finds the submodule that ties examples together, or is random
            raise ValueError("module: the examples of a batch depend on each other")
    return torch.cat(rows)


@dataclass(frozen=True)
class Factor:
    """One layer: its gradients are products of what comes in and what is propagated back to it."""

    incoming: Tensor | None  # (N, positions, fan-in), scaled; None where the weight is not differentiated
    back: Tensor  # (N, K, positions, out): the derivative of every output with respect to the layer's own
    bias: float  # factor of the bias; 0 where there is none, or it is not differentiated
    output: Tensor  # (N, K), of the whole module


def factors(module: nn.Module, found: Layout, x: Tensor) -> list[Factor]:
    chosen = set(found.names)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for path in found.paths:

        def keep(part: nn.Module, inputs: Any, out: Tensor, path: str = path) -> Tensor:
            leaf = out if out.requires_grad else out.requires_grad_()
            seen[path] = (unfolded(part, inputs[0].detach()), leaf)
            return leaf + 0  # a layer that works in place must not touch the leaf

        handles.append(module.get_submodule(path).register_forward_hook(keep))
    try:
        with torch.enable_grad():
            out = call_with(module, {n: b.clone() for n, b in module.named_buffers()}, (x.clone(),)).flatten(1)
    finally:
        for handle in handles:
            handle.remove()
    derivatives = backward(out, [seen[path][1] for path in found.paths])
    result = []
    for path, d in zip(found.paths, derivatives):
        part = module.get_submodule(path)
        d = d.flatten(3).transpose(2, 3) if isinstance(part, CONVOLUTIONS) else d.reshape(*d.shape[:2], -1, d.shape[-1])
        w, b = factors_of(part)
        prefix = path + "." if path else ""
        incoming = w * seen[path][0] if prefix + "weight" in chosen else None
        result.append(Factor(incoming, d, b if prefix + "bias" in chosen else 0.0, out.detach()))
    return result


def backward(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Derivative (N, K, ...) of each of K outputs with respect to each leaf, for all examples at once."""
    k = out.shape[1]
    units = torch.eye(k, dtype=out.dtype, device=out.device)[:, None].expand(k, *out.shape)
    try:
        found = torch.autograd.grad(out, leaves, units, retain_graph=True, is_grads_batched=True)
    except RuntimeError:  # an operation that cannot be batched: one output after the other
        each = [torch.autograd.grad(out, leaves, u, retain_graph=True) for u in units]
        found = tuple(torch.stack(d) for d in zip(*each))
    return [d.transpose(0, 1) for d in found]


def unfolded(part: nn.Module, x: Tensor) -> Tensor:
    """(N, positions, fan-in): what each output position multiplies with the weights."""
    if isinstance(part, NTKConv2d):
        return F.unfold(part.padded(x), pair(part.layer.size), stride=pair(part.layer.stride)).transpose(1, 2)
    if isinstance(part, nn.Conv2d):
        mode = "constant" if part.padding_mode == "zeros" else part.padding_mode
        x = F.pad(x, part._reversed_padding_repeated_twice, mode=mode)
        return F.unfold(x, part.kernel_size, part.dilation, stride=part.stride).transpose(1, 2)
    return x.reshape(len(x), -1, x.shape[-1])


def factors_of(part: nn.Module) -> tuple[float, float]:
    if isinstance(part, NTKConv2d):
        return part.factors
    if isinstance(part, NTKLinear):
        return scales(part.layer, part.weight[0].numel())
    return 1.0, 1.0


def grams(left: list[Factor], right: list[Factor], mode: Mode) -> Tensor:
    total = gram(left[0], right[0], mode)
    for a, b in zip(left[1:], right[1:]):
        total = total + gram(a, b, mode)
    return total


def gram(a: Factor, b: Factor, mode: Mode) -> Tensor:
    """The layer's part of the kernel between two chunks."""
    total = (
        a.bias * b.bias * contract(a.back.sum(2), b.back.sum(2), mode)
        if a.bias
        else torch.zeros((), device=a.back.device)
    )
    if a.incoming is None or b.incoming is None:
        return total
    if a.back.shape[2] == 1:
        inner = a.incoming[:, 0] @ b.incoming[:, 0].T
        outer = contract(a.back[:, :, 0], b.back[:, :, 0], mode)
        return total + inner.reshape(*inner.shape, *[1] * (outer.ndim - 2)) * outer
    # several positions share the weights: their gradients add up, (N, K, out * in)
    g, h = (torch.einsum("npi,nkpo->nkoi", f.incoming, f.back).flatten(2) for f in (a, b))
    return total + contract(g, h, mode)


# As an operator, and the linearised network ---------------------------------------------------------------------------


class NTKOperator(LinearOperator):
    """The full kernel of a network over examples, (N K) x (N K), as products J (J^T v) for SciPy's solvers.

    Rows run over outputs within examples. A product costs about three passes; nothing is stored but J's chunk.

    Args:
        module, x, parameters, memory: as for `empirical_ntk`.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    >>> NTKOperator(net, torch.eye(3).double()).matvec(np.ones(6)).shape
    (6,)
    """

    def __init__(
        self,
        module: nn.Module,
        x: Float[Tensor, "n *shape"],
        *,
        parameters: Sequence[str] | None = None,
        memory: int = 2**30,
    ) -> None:
        self.jacobian = Linearization(module, x, wrt="parameters", parameters=parameters, memory=memory)
        size = self.jacobian.value.numel()
        super().__init__(dtype=np.dtype(str(self.jacobian.value.dtype).rpartition(".")[2]), shape=(size, size))

    def _matmat(self, X: Any) -> Any:
        J = self.jacobian
        v = torch.as_tensor(X.T.copy(), dtype=J.point.dtype, device=J.point.device)
        return J.jvp(J.vjp(v.reshape(-1, *J.value.shape))).flatten(1).T.cpu().numpy()

    def _matvec(self, x: Any) -> Any:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _adjoint(self) -> LinearOperator:
        return self


class LinearizedModule(nn.Module):
    """f(x; theta0) + J(x) (theta - theta0): trains like the network, but its tangent kernel stands still.

    Args:
        module: theta0 is its parameters now; it is not changed, and its buffers are copied.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> linear = LinearizedModule(net)
    >>> torch.allclose(linear(torch.eye(3)), net(torch.eye(3)))
    True
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = select_parameters(module, None)
        own = dict(module.named_parameters())
        self.theta = nn.ParameterList([own[n].detach().clone() for n in self.names])
        for i, name in enumerate(self.names):
            self.register_buffer(f"origin{i}", own[name].detach().clone())
        self._held = {n: p.detach().clone() for n, p in own.items() if n not in self.names}
        self._held |= {n: b.detach().clone() for n, b in module.named_buffers()}
        self._function = [module]  # in a list: its parameters are not ours

    def forward(self, *inputs: Any) -> Tensor:
        origin = {n: getattr(self, f"origin{i}") for i, n in enumerate(self.names)}
        shift = {n: t - origin[n] for n, t in zip(self.names, self.theta)}
        value, change = jvp(partial(self._call, inputs), (origin,), (shift,))[:2]
        return value + change

    def _call(self, inputs: tuple[Any, ...], values: dict[str, Tensor]) -> Tensor:
        return call_with(self._function[0], values | self._held, inputs)
