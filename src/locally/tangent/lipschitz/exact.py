"""The exact local constant of a small ReLU network as a mixed-integer linear programme (arXiv 2003.01219).

Forward values, gradients and which side each open unit is on are variables of one programme, solved by HiGHS. Exact up
to the solver's tolerances, so it is an oracle for tests and small networks and not a rigorous bound.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from locally.tangent.lipschitz.activations import Activation, PiecewiseLinear
from locally.tangent.lipschitz.budget import Budget
from locally.tangent.lipschitz.gradients import gradient_bounds
from locally.tangent.lipschitz.network import Network, Node, Sum
from locally.tangent.lipschitz.propagation import Box, ForwardBounds


@dataclass(frozen=True)
class ExactRow:
    """Largest l_1 norm of one output's gradient: attained value, the solver's upper bound, whether it finished."""

    value: float
    bound: float
    optimal: bool


class Programme:
    """Variables with bounds, and rows low <= a . v <= high, gathered as triplets."""

    def __init__(self) -> None:
        self.low: list[np.ndarray] = []
        self.high: list[np.ndarray] = []
        self.whole: list[np.ndarray] = []
        self.size = 0
        self.rows: list[tuple[sp.coo_array, np.ndarray, np.ndarray]] = []

    def variables(self, low: np.ndarray, high: np.ndarray, whole: bool = False) -> np.ndarray:
        # narrower ranges than the solver's tolerance have made HiGHS cut off the optimum
        slack = np.where(low < high, 1e-6 * (1 + np.maximum(abs(low), abs(high))), 0.0)
        start = self.size
        self.size += low.size
        self.low.append(low - (0 if whole else slack))
        self.high.append(high + (0 if whole else slack))
        self.whole.append(np.full(low.size, int(whole)))
        return np.arange(start, self.size)

    def add(self, terms: list[tuple[Any, np.ndarray]], low: object, high: object) -> None:
        """low <= sum of M_k v[index_k] <= high; a scalar or vector M is a diagonal."""
        blocks = []
        for matrix, index in terms:
            M = sp.coo_array(np.diag(np.broadcast_to(matrix, index.shape)) if np.ndim(matrix) < 2 else matrix)
            blocks.append((M.data, M.row, index[M.col]))
            n = M.shape[0]
        data, row, column = (np.concatenate(part) for part in zip(*blocks))
        spread = lambda side: np.broadcast_to(np.asarray(side, float), n)
        self.rows.append((sp.coo_array((data, (row, column)), shape=(n, 10**9)), spread(low), spread(high)))

    def maximise(self, index: np.ndarray, time_limit: float) -> tuple[float, float, bool]:
        data, row, column, start = [], [], [], 0
        for block, *_ in self.rows:
            data.append(block.data)
            row.append(block.row + start)
            column.append(block.col)
            start += block.shape[0]
        matrix = sp.csr_array(
            (np.concatenate(data), (np.concatenate(row), np.concatenate(column))), shape=(start, self.size)
        )
        cost = np.zeros(self.size)
        cost[index] = -1
        solved = milp(
            cost,
            integrality=np.concatenate(self.whole),
            bounds=Bounds(np.concatenate(self.low), np.concatenate(self.high)),
            constraints=LinearConstraint(
                matrix, np.concatenate([r[1] for r in self.rows]), np.concatenate([r[2] for r in self.rows])
            ),
            options={"time_limit": time_limit},
        )
        value = -np.inf if solved.x is None else -solved.fun
        bound = solved.mip_dual_bound
        return value, np.inf if bound is None else -bound, solved.status == 0


def exact_row_norm(
    net: Network, box: Box, forward: ForwardBounds, spec: Tensor, budget: Budget, time_limit: float
) -> ExactRow:
    """max over the box of the l_1 norm of spec . J, for one box (a batch of one) and one row `spec` (outputs,)."""
    for v in net.activations:
        if not isinstance(net.nodes[v].op, PiecewiseLinear):
            raise ValueError(f'method="exact" needs piecewise linear activations, got {net.nodes[v].path}')
    flat = lambda t: t[0].flatten().cpu().numpy()
    gradients = gradient_bounds(net, forward.slopes, spec[None], budget)
    p = Programme()
    x = {0: p.variables(flat(box.lower), flat(box.upper))}
    sides: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for v, node in enumerate(net.nodes[1:], start=1):
        lower, upper = flat(forward.lower[v]), flat(forward.upper[v])
        x[v] = p.variables(lower, upper)
        if isinstance(node.op, Activation):
            sides[v] = forward_activation(
                p, node, x, x[v], *(flat(t[node.inputs[0]]) for t in (forward.lower, forward.upper))
            )
        else:
            bias = getattr(node.op, "bias", None)
            shift = 0.0 if bias is None else bias.flatten().cpu().numpy()
            terms = [(-1.0, x[v]), *((M, x[u]) for u, M in matrices(net, node, spec))]
            p.add(terms, -shift, -shift)

    last = len(net.nodes) - 1
    row = spec.cpu().numpy()
    g = {
        v: p.variables(flat(gradients.lower[v]), flat(gradients.upper[v])) for v in range(last) if v in gradients.lower
    }
    g[last] = p.variables(row, row)
    incoming: dict[int, list[tuple[Any, np.ndarray]]] = {u: [] for u in g}
    for v, node in enumerate(net.nodes[1:], start=1):
        if v not in g:
            continue
        if isinstance(node.op, Activation):
            incoming[node.inputs[0]].append(
                (
                    1.0,
                    backward_activation(p, g[v], *sides[v], *(flat(t[v]) for t in (gradients.lower, gradients.upper))),
                )
            )
        else:
            for u, M in matrices(net, node, spec):
                incoming[u].append((np.transpose(M) if np.ndim(M) == 2 else M, g[v]))
    for u, terms in incoming.items():
        if terms:
            p.add([(-1.0, g[u]), *terms], 0.0, 0.0)

    low, high = flat(gradients.lower[0]), flat(gradients.upper[0])
    size = np.maximum(abs(low), abs(high))
    t, q = p.variables(np.zeros(size.size), size), p.variables(0 * size, 0 * size + 1, whole=True)
    p.add([(1.0, t), (-1.0, g[0]), (-2 * size, q)], -np.inf, 0.0)  # t <= g + 2 |g| q
    p.add([(1.0, t), (1.0, g[0]), (2 * size, q)], -np.inf, 2 * size)  # t <= -g + 2 |g| (1 - q)
    return ExactRow(*p.maximise(t, time_limit))


def matrices(net: Network, node: Node, like: Tensor) -> list[tuple[int, Any]]:
    """Per input of an affine node or a sum, its matrix (a number for a sum)."""
    if isinstance(node.op, Sum):
        return list(zip(node.inputs, node.op.signs))
    units = torch.eye(node.size, dtype=like.dtype, device=like.device).view(node.size, *node.shape)
    return [(node.inputs[0], node.op.pull(units).flatten(1).cpu().numpy())]


def forward_activation(
    p: Programme, node: Node, x: dict[int, np.ndarray], y: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """y = max(a z, z) with a binary per unit (fixed where the unit is stable); returns it and the slope a."""
    a, z = node.op.negative_slope, x[node.inputs[0]]
    on = p.variables((low > 0).astype(float), (high >= 0).astype(float), whole=True)
    wide = np.maximum(abs(low), abs(high)) + 1e-6
    p.add([(1.0, y), (-1.0, z)], 0.0, np.inf)
    p.add([(1.0, y), (-a, z)], 0.0, np.inf)
    p.add([(1.0, y), (-a, z), (-2 * wide, on)], -np.inf, 0.0)  # off: y = a z
    p.add([(1.0, y), (-1.0, z), (2 * wide, on)], -np.inf, 2 * wide)  # on: y = z
    p.add([(1.0, z), (-wide, on)], -np.inf, 0.0)
    p.add([(1.0, z), (-wide, on)], -wide, np.inf)
    return on, np.full(low.size, a)


def backward_activation(
    p: Programme, g: np.ndarray, on: np.ndarray, a: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """J = a g + (1 - a) s g, the product s g linearised."""
    wide = np.maximum(abs(low), abs(high)) + 1e-6
    product = p.variables(np.minimum(low, 0), np.maximum(high, 0))
    p.add([(1.0, product), (-wide, on)], -np.inf, 0.0)
    p.add([(1.0, product), (wide, on)], 0.0, np.inf)
    p.add([(1.0, product), (-1.0, g), (wide, on)], -np.inf, wide)
    p.add([(1.0, product), (-1.0, g), (-wide, on)], -wide, np.inf)
    size = np.maximum(abs(low), abs(high))
    J = p.variables(-size * np.maximum(1, abs(a)), size * np.maximum(1, abs(a)))
    p.add([(1.0, J), (-a, g), (-(1 - a), product)], 0.0, 0.0)
    return J
