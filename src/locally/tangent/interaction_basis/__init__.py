"""The local interaction basis: features of a network that matter to the next layer and interact through few edges.

`LocalInteractionBasis` finds the bases and the `InteractionGraph` between them, `Ablation` counts what the network
needs of both. Source: arXiv 2405.10928.
"""

from locally.tangent.interaction_basis.ablation import Ablation, Metric, Required
from locally.tangent.interaction_basis.basis import Basis, LayerBasis, LocalInteractionBasis
from locally.tangent.interaction_basis.folding import FoldedChain, fold
from locally.tangent.interaction_basis.gradients import EdgeFormula, Formula, Integration
from locally.tangent.interaction_basis.graph import InteractionGraph, Modules
from locally.tangent.interaction_basis.transformer import (
    CausalSelfAttention,
    LastPosition,
    Residual,
    TokenEmbedding,
    addition_transformer,
    load_addition_transformer,
)

__all__ = [
    "Ablation",
    "Basis",
    "CausalSelfAttention",
    "EdgeFormula",
    "FoldedChain",
    "Formula",
    "Integration",
    "InteractionGraph",
    "LastPosition",
    "LayerBasis",
    "LocalInteractionBasis",
    "Metric",
    "Modules",
    "Required",
    "Residual",
    "TokenEmbedding",
    "addition_transformer",
    "fold",
    "load_addition_transformer",
]
