"""A network as the graph that bounds travel through: affine maps, sums, activations, normalisations."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locally.tangent.lipschitz.activations import Activation
from locally.tangent.lipschitz.normalisation import Normalisation
from locally.tangent.lipschitz.operations import Affine

NONLINEAR = Activation | Normalisation


@dataclass(frozen=True)
class Sum:
    """Of the node's inputs, each with its sign."""

    signs: tuple[float, ...]


@dataclass(frozen=True)
class Node:
    """One value in the graph. `op` is None for the input; `path` names the module it came from."""

    op: Any  # Affine | Sum | Activation | Normalisation | None
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    path: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass
class Network:
    """Nodes in topological order; the first is the input, the last the output, of shape (outputs,).

    >>> from locally.tangent.lipschitz.reading import read_module
    >>> net = read_module(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)), (2,))
    >>> [type(node.op).__name__ for node in net.nodes], net.hidden
    (['NoneType', 'Dense', 'PiecewiseLinear', 'Dense'], 3)
    """

    nodes: list[Node] = field(default_factory=list)

    @property
    def activations(self) -> list[int]:
        """Nodes that are not linear, normalisations among them."""
        return [v for v, node in enumerate(self.nodes) if isinstance(node.op, NONLINEAR)]

    @property
    def hidden(self) -> int:
        """Number of activation units."""
        return sum(self.nodes[v].size for v in self.activations)

    @property
    def widest(self) -> int:
        """Entries of the largest node."""
        return max(node.size for node in self.nodes)

    @property
    def outputs(self) -> int:
        """Entries of the output."""
        return self.nodes[-1].size

    @cached_property
    def gamma(self) -> float:
        """More than twice the relative error of any one sum in the propagation (Higham, 2002, section 3.1)."""
        terms = max((node.op.terms for node in self.nodes if is_affine(node.op)), default=0)
        return (terms + 2 * self.widest + 16) * torch.finfo(torch.float64).eps

    def __call__(self, x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n outputs"]:
        return self.values(x)[-1]

    def values(self, x: Float[Tensor, "n *shape"]) -> list[Tensor]:
        """Of every node, at the points x."""
        values: list[Tensor] = [x]
        for node in self.nodes[1:]:
            first = values[node.inputs[0]]
            match node.op:
                case Sum(signs):
                    values.append(sum(s * values[u] for s, u in zip(signs, node.inputs)))  # type: ignore[arg-type]
                case op if is_affine(op):
                    out = op.push(first)
                    values.append(out if op.bias is None else out + op.bias)
                case op:
                    values.append(op(first))
        return values

    def jacobian(self, x: Float[Tensor, "n *shape"], spec: Float[Tensor, "s outputs"]) -> Float[Tensor, "n s d"]:
        """Of spec @ network at the points x, with ReLU's derivative at 0 taken as 0."""
        values = self.values(x)
        n, s = len(x), len(spec)
        grads: dict[int, Tensor] = {len(self.nodes) - 1: spec.expand(n, s, -1)}
        for v in range(len(self.nodes) - 1, 0, -1):
            if v not in grads:
                continue
            g, node = grads.pop(v), self.nodes[v]
            match node.op:
                case Sum(signs):
                    for sign, u in zip(signs, node.inputs):
                        gather(grads, u, sign * g)
                case op if is_affine(op):
                    back = op.pull(g.reshape(n * s, *node.shape))
                    gather(grads, node.inputs[0], back.reshape(n, s, *back.shape[1:]))
                case op:
                    u = node.inputs[0]
                    gather(grads, u, op.backward(g, values[u]))
        zero = x.new_zeros(n, s, self.nodes[0].size)
        return grads[0].reshape(n, s, -1) if 0 in grads else zero


def gather(coefficients: dict[int, Tensor], at: int, more: Tensor) -> None:
    coefficients[at] = coefficients[at] + more if at in coefficients else more


def is_affine(op: object) -> bool:
    return isinstance(op, Affine)
