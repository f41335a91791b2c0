"""Convergent graph solvers: contracting maps on graphs, their fixed points, and implicit gradients.

`ContractingFixedPoint` is the layer, `CGS` the network around it, `CGSRegressor` and `CGSClassifier` the estimators;
`FixedPointSolver` solves maps of one's own. Graphs are PyTorch Geometric data objects or plain tensors.
Source: Park, Choo and Park, Convergent Graph Solvers, ICLR 2022 (arXiv 2106.01680).
"""

from locally.solvers.convergent_graph.baselines import APPNP, GIN, IGNN, SSE, StackedGNN
from locally.solvers.convergent_graph.estimators import CGSClassifier, CGSRegressor, train
from locally.solvers.convergent_graph.fixed_points import FixedPoint, FixedPointSolver, Method, Status
from locally.solvers.convergent_graph.graphs import Graph, as_graph, disjoint_union
from locally.solvers.convergent_graph.implicit import ConvergenceWarning, attach
from locally.solvers.convergent_graph.layer import ContractingFixedPoint, contracting_weights
from locally.solvers.convergent_graph.maps import Activation, ContractingMaps, Sparsity
from locally.solvers.convergent_graph.networks import CGS, AttentionMPNN
from locally.solvers.convergent_graph.systems import (
    make_percolating_network,
    make_pore_network,
    make_shortest_path_graph,
    make_value_iteration_graph,
    policy_accuracy,
    read_tu_dataset,
    value_iteration,
)

__all__ = [
    "APPNP",
    "CGS",
    "GIN",
    "IGNN",
    "SSE",
    "Activation",
    "AttentionMPNN",
    "CGSClassifier",
    "CGSRegressor",
    "ContractingFixedPoint",
    "ContractingMaps",
    "ConvergenceWarning",
    "FixedPoint",
    "FixedPointSolver",
    "Graph",
    "Method",
    "Sparsity",
    "StackedGNN",
    "Status",
    "as_graph",
    "attach",
    "contracting_weights",
    "disjoint_union",
    "make_percolating_network",
    "make_pore_network",
    "make_shortest_path_graph",
    "make_value_iteration_graph",
    "policy_accuracy",
    "read_tu_dataset",
    "train",
    "value_iteration",
]
