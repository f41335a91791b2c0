"""Collaborative learning among machines of which some lie, crash or fall silent (MoNNA, arXiv 2209.10931).

No server: every node follows the momentum of its own gradients, sends its parameters to all others and moves to the
mean of those nearest to its own. A `Collaboration` says how, a `Problem` on what; `Simulation` runs all nodes in one
process, `Processes` one process a node, with the same results. `MoNNA` is the same thing as a torch optimizer for a
training loop of one's own, started by torchrun or by anything else.
"""

from locally.training.byzantine.aggregation import GramRule, Mean, NearestNeighborAverage, Rule
from locally.training.byzantine.attacks import (
    ALIE,
    FOE,
    Attack,
    Constant,
    Dissensus,
    LabelFlip,
    Mimic,
    Random,
    Sight,
    SignFlip,
    Silent,
    line_maximize,
)
from locally.training.byzantine.baselines import (
    GeometricMedian,
    GeometricTrimmedSum,
    Krum,
    MinimumDiameterAverage,
    MultiKrum,
    SelfCenteredClipping,
    TrimmedMean,
)
from locally.training.byzantine.collaboration import Collaboration, Outcome, Problem, Status
from locally.training.byzantine.optimizer import MoNNA
from locally.training.byzantine.problems import ModelProblem, split_dirichlet
from locally.training.byzantine.processes import (
    CollectiveTransport,
    Crash,
    CutOff,
    Freeze,
    Garbage,
    Lie,
    Membership,
    NonFiniteModel,
    Processes,
    Slow,
    SocketTransport,
    TooFewPeers,
)
from locally.training.byzantine.simulation import Simulation, run_together
from locally.training.byzantine.tolerance import BeyondBreakdown, Reduction, TooFewVectors, reduction_bound

__all__ = [
    "ALIE",
    "FOE",
    "Attack",
    "BeyondBreakdown",
    "Collaboration",
    "CollectiveTransport",
    "Constant",
    "Crash",
    "CutOff",
    "Dissensus",
    "Freeze",
    "Garbage",
    "GeometricMedian",
    "GeometricTrimmedSum",
    "GramRule",
    "Krum",
    "LabelFlip",
    "Lie",
    "Mean",
    "Membership",
    "Mimic",
    "MinimumDiameterAverage",
    "MoNNA",
    "ModelProblem",
    "MultiKrum",
    "NearestNeighborAverage",
    "NonFiniteModel",
    "Outcome",
    "Problem",
    "Processes",
    "Random",
    "Reduction",
    "Rule",
    "SelfCenteredClipping",
    "Sight",
    "SignFlip",
    "Silent",
    "Simulation",
    "Slow",
    "SocketTransport",
    "Status",
    "TooFewPeers",
    "TooFewVectors",
    "TrimmedMean",
    "line_maximize",
    "reduction_bound",
    "run_together",
    "split_dirichlet",
]
