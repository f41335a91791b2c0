"""MLC: cluster samples near a union of curved manifolds and map each manifold to a linear subspace of its own.

`ManifoldLinearizingClustering` is the method as an estimator. Its parts are public: coding rates, projections onto
doubly stochastic matrices, the network and its training, spectral clustering of memberships, and what it is compared
with: sparse subspace clustering and NMCE. Source: arXiv 2301.01805 (Ding, Tong, Chan, Dai, Ma, Haeffele; ICCV 2023).
"""

from locally.subspaces.manifold_clustering.augmentation import CropAndColour, Jitter, RandomAffine
from locally.subspaces.manifold_clustering.coding_rate import (
    class_spectra,
    coding_length,
    coding_rate,
    coding_rate_membership,
    ideal_rate_reduction,
    mean_cosine_between,
    numerical_rank,
)
from locally.subspaces.manifold_clustering.estimator import ManifoldLinearizingClustering, leading_subspace
from locally.subspaces.manifold_clustering.network import MLCNet, ResNet18
from locally.subspaces.manifold_clustering.nmce import NeuralManifoldClustering
from locally.subspaces.manifold_clustering.self_expression import (
    SparseSubspaceClustering,
    elastic_net_coefficients,
    matching_pursuit_coefficients,
)
from locally.subspaces.manifold_clustering.sinkhorn import (
    Projection,
    Status,
    balance,
    euclidean_projection,
    sinkhorn_projection,
    sinkhorn_projection_,
)
from locally.subspaces.manifold_clustering.spectral import (
    SparseProjection,
    clustering_accuracy,
    coding_lengths,
    membership_of,
    membership_perplexity,
    sparse_membership,
    spectral_labels,
)
from locally.subspaces.manifold_clustering.training import RateReduction, Schedule, TotalCodingRate, Training

__all__ = [
    "CropAndColour",
    "Jitter",
    "MLCNet",
    "ManifoldLinearizingClustering",
    "NeuralManifoldClustering",
    "Projection",
    "RandomAffine",
    "RateReduction",
    "ResNet18",
    "Schedule",
    "SparseProjection",
    "SparseSubspaceClustering",
    "Status",
    "TotalCodingRate",
    "Training",
    "balance",
    "class_spectra",
    "clustering_accuracy",
    "coding_length",
    "coding_lengths",
    "coding_rate",
    "coding_rate_membership",
    "elastic_net_coefficients",
    "euclidean_projection",
    "ideal_rate_reduction",
    "leading_subspace",
    "matching_pursuit_coefficients",
    "mean_cosine_between",
    "membership_of",
    "membership_perplexity",
    "numerical_rank",
    "sinkhorn_projection",
    "sinkhorn_projection_",
    "sparse_membership",
    "spectral_labels",
]
