"""The product of layer norms: a global constant, no box, no propagation."""

import math

import torch
from torch import Tensor

from locally.tangent.lipschitz.activations import Activation, PiecewiseLinear
from locally.tangent.lipschitz.intervals import EPS
from locally.tangent.lipschitz.network import Network, Node, Sum
from locally.tangent.lipschitz.normalisation import Normalisation
from locally.tangent.lipschitz.norms import INF, largest_singular

DENSE = 2**24  # entries of a layer's matrix that are formed for its l_2 norm


def product_of_norms(net: Network, spec: Tensor, ord: float) -> Tensor:
    """Global constant l_ord -> l_ord of spec @ network, from above: sums add up, everything else multiplies."""
    constants = [spec.new_ones(())]
    for node in net.nodes[1:]:
        inputs = [constants[u] for u in node.inputs]
        if isinstance(node.op, Sum):
            total = torch.stack(inputs).sum()
        elif isinstance(node.op, Normalisation):
            total = inputs[0] * steepest_normalisation(node.op, node.shape, ord)
        elif isinstance(node.op, Activation):
            total = inputs[0] * steepest(node.op)
        else:
            total = inputs[0] * layer_norm(node, net.nodes[node.inputs[0]].shape, ord, spec)
        constants.append(total * (1 + net.gamma))
    size = spec.abs()
    last = {INF: size.sum(1).amax(), 1: size.sum(0).amax()}.get(ord)
    return constants[-1] * (largest_singular(spec) if last is None else last) * (1 + net.gamma)


def steepest_normalisation(op: Normalisation, shape: tuple[int, ...], ord: float) -> float:
    """Largest norm of (I - y y^T / d) / sigma. It is symmetric with eigenvalues in [0, 1 / sqrt(eps)].

    A row's l_1 norm, with a = |y_i|, is at most 1 - a^2 / d + a sqrt((d - 1) (d - a^2)) / d (Cauchy-Schwarz, as
    |y|^2 <= d), whose largest value is (1 + sqrt(d)) / 2.
    """
    rows = 1.0 if ord == 2 else (1 + math.sqrt(op.count(shape))) / 2
    return rows / math.sqrt(op.eps) * (1 + 8 * EPS)


def steepest(op: Activation) -> float:
    if isinstance(op, PiecewiseLinear):
        return max(1.0, abs(op.negative_slope))
    everywhere = torch.tensor(-50.0, dtype=torch.float64), torch.tensor(50.0, dtype=torch.float64)
    low, high = op.slopes(*everywhere)  # beyond, the slopes lie between those at the ends and their limits, 0 and 1
    limits = 1.0 if op.name in ("GELU", "GELU (tanh)", "Softplus") else 0.0
    return max(abs(low.item()), abs(high.item()), limits)


def layer_norm(node: Node, shape: tuple[int, ...], ord: float, like: Tensor) -> Tensor:
    row_sums = node.op.spread(like.new_ones(1, *shape)).max()
    column_sums = node.op.spread_back(like.new_ones(1, *node.shape)).max()
    if ord == INF:
        return row_sums
    if ord == 1:
        return column_sums
    entries = node.size * int(torch.Size(shape).numel())
    mixed = (row_sums * column_sums).sqrt() * (1 + 4 * EPS)
    if entries > DENSE:
        return mixed
    units = torch.eye(node.size, dtype=like.dtype, device=like.device).view(node.size, *node.shape)
    return torch.minimum(mixed, largest_singular(node.op.pull(units).flatten(1)))
