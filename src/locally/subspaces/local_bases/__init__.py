"""Local reduced-order bases: simulations clustered by the directions they span, one small POD basis for each cluster.

For engineers whose solution sets - moving sources, fronts, turning loads - need many modes in one global basis.
`LocalReducedBases` builds the dictionary and the classifier that picks a basis (a ROM-net), `efficiency_criterion` says
beforehand whether that beats a global basis and with which K and N. Source: arXiv 2103.13683.
"""

from locally.subspaces.local_bases.criterion import (
    Budget,
    Efficiency,
    EfficiencyTable,
    efficiency_criterion,
    required_accuracy,
)
from locally.subspaces.local_bases.dictionary import LocalReducedBases
from locally.subspaces.local_bases.dissimilarity import euclidean_dissimilarity, sine_dissimilarity
from locally.subspaces.local_bases.hyper_reduction import Cubature, EmpiricalInterpolation, empirical_cubature, q_deim
from locally.subspaces.local_bases.medoids import KMedoids, Medoids, Status, k_medoids
from locally.subspaces.local_bases.partitions import Partition, projection_error_clusters
from locally.subspaces.local_bases.pod import incremental_pod, pod
from locally.subspaces.local_bases.products import InnerProduct, inner_product
from locally.subspaces.local_bases.pymor_reduction import (
    LocalModel,
    LocalReductor,
    VectorArrayBases,
    fit_vector_arrays,
)
from locally.subspaces.local_bases.snapshots import SnapshotSet

__all__ = [
    "Budget",
    "Cubature",
    "Efficiency",
    "EfficiencyTable",
    "EmpiricalInterpolation",
    "InnerProduct",
    "KMedoids",
    "LocalModel",
    "LocalReducedBases",
    "LocalReductor",
    "Medoids",
    "Partition",
    "SnapshotSet",
    "Status",
    "VectorArrayBases",
    "efficiency_criterion",
    "empirical_cubature",
    "euclidean_dissimilarity",
    "fit_vector_arrays",
    "incremental_pod",
    "inner_product",
    "k_medoids",
    "pod",
    "projection_error_clusters",
    "q_deim",
    "required_accuracy",
    "sine_dissimilarity",
]
