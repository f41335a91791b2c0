"""A dictionary of local bases: cluster the simulations by the directions they point in, one small POD basis for each.

Online, a classifier picks the basis from the parameters alone, before anything is simulated. Source: arXiv 2103.13683
(clustering, projection errors), arXiv 2001.00220 (ROM-net: dictionary and classifier).
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.base import BaseEstimator, ClusterMixin, clone
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from locally.checks import check_between, check_choice, check_count, check_finite
from locally.subspaces.local_bases.dissimilarity import (
    DISSIMILARITIES,
    Spans,
    dissimilarities,
    projection_errors,
    spans_of,
    subspace_distances,
)
from locally.subspaces.local_bases.medoids import KMedoids, RandomState, check_clusters, k_medoids
from locally.subspaces.local_bases.pod import METHODS, check_truncation, incremental_pod, pod
from locally.subspaces.local_bases.products import Product
from locally.subspaces.local_bases.snapshots import MEMORY_LIMIT, Snapshots, SnapshotSet, is_vector_array, snapshot_set

Basis = Float[ndarray, "n_dof modes"]
Labels = Int[ndarray, " n"]


class LocalReducedBases(ClusterMixin, BaseEstimator):
    """Cluster-specific POD bases and the classifier that chooses among them.

    Parameters
    ----------
    n_clusters : at most the number of simulations.
    n_modes : dimension of every local basis; None for as many as `tol` asks for.
    tol : relative l2 error of a basis over the (unit) snapshots of its cluster, in [0, 1].
    dissimilarity : "sine" (of principal angles, chordal), "gap", "geodesic", "projection" (see `sine_dissimilarity`),
        "euclidean" (classic), or "precomputed": `fit` is handed the matrix.
    product : inner product of the solution space, see `SnapshotSet`.
    normalize : scale every simulation to unit norm before the POD; otherwise large amplitudes dominate a basis.
    overlap : let each basis see this share of the other clusters' simulations too, those nearest to its medoid; [0, 1].
    classifier : scikit-learn classifier from parameters to clusters, default 5 nearest neighbours on standardised
        parameters.
    svd : how bases are computed, see `pod`; "auto" also goes block by block through clusters larger than memory.
    simulation_modes, simulation_tol : POD of each trajectory, by which it is compared with the others.
    n_init : random starts of k-medoids besides BUILD.
    hyper_reduction : called as hyper_reduction(basis, rows, k) for each cluster, with its basis (n_dof, N) and its
        snapshots (t, n_dof) of unit norm; what it returns is kept, e.g. `lambda basis, rows, k: q_deim(basis)`.
    memory_limit : bytes for blocks and caches, see `SnapshotSet`.
    random_state : of k-medoids, the randomised SVD.
    callback : called as callback(stage, fraction) with a fraction done in [0, 1]; an exception from it interrupts.

    Attributes
    ----------
    labels_ : (n,) cluster of each simulation.
    medoid_indices_ : (n_clusters,) the simulation at the centre of each cluster.
    bases_, singular_values_ : per cluster (n_dof, N), orthonormal in the product, and (N,).
    classifier_, classes_ : fitted classifier (None without parameters).
    dissimilarity_matrix_, inertia_ : what was clustered, and the cost.
    hyper_reductions_ : per cluster, where `hyper_reduction` is given.

    Warns where a cluster has at most twice as many simulations as its basis has modes: such a basis reproduces its
    training set and says little about new simulations.

    Examples
    --------
    Two families, each a line, with amplitudes of either sign over decades:

    >>> S = np.array([[1.0, 0, 0], [-100, 0, 0], [10, 0, 0], [0, 1, 1], [0, -50, -50], [0, 9, 9]])
    >>> angle = np.array([[0.0], [0.1], [0.2], [1.0], [1.1], [1.2]])
    >>> dictionary = LocalReducedBases(n_clusters=2, n_modes=1, random_state=0).fit(S, angle)
    >>> dictionary.labels_.tolist(), dictionary.predict([[0.05], [1.3]]).tolist()
    ([0, 0, 0, 1, 1, 1], [0, 1])
    >>> dictionary.projection_error(np.array([[0, 7.0, 7.0]])).round(12)
    array([0.])
    """

    def __init__(
        self,
        n_clusters: int = 6,
        n_modes: int | None = 10,
        tol: float = 0.0,
        dissimilarity: str = "sine",
        product: Product = None,
        normalize: bool = True,
        overlap: float = 0.0,
        classifier: Any = None,
        svd: str = "auto",
        simulation_modes: int | None = 10,
        simulation_tol: float = 1e-3,
        n_init: int = 10,
        hyper_reduction: Callable[[Basis, ndarray, int], Any] | None = None,
        memory_limit: int = MEMORY_LIMIT,
        random_state: RandomState = None,
        callback: Callable[[str, float], None] | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_modes = n_modes
        self.tol = tol
        self.dissimilarity = dissimilarity
        self.product = product
        self.normalize = normalize
        self.overlap = overlap
        self.classifier = classifier
        self.svd = svd
        self.simulation_modes = simulation_modes
        self.simulation_tol = simulation_tol
        self.n_init = n_init
        self.hyper_reduction = hyper_reduction
        self.memory_limit = memory_limit
        self.random_state = random_state
        self.callback = callback

    def fit(
        self, X: Snapshots, y: Any = None, *, labels: Labels | None = None, D: Float[ndarray, "n n"] | None = None
    ) -> "LocalReducedBases":
        """Build the dictionary.

        Args:
            X: snapshots of n simulations, see `SnapshotSet`.
            y: (n, parameters) of the simulations, or (n,) for one parameter; None for a dictionary without classifier.
            labels: a partition of the simulations to use instead of clustering, 0 .. n_clusters - 1, none empty.
            D: dissimilarities, for dissimilarity="precomputed".

        Raises:
            ValueError: bad hyper-parameters or snapshots, more clusters than simulations.
        """
        self._check()
        simulations = snapshot_set(X, self.product, self.memory_limit)
        check_clusters(self.n_clusters, simulations.n)
        parameters = None if y is None else _table(y, simulations.n)
        self._progress("dissimilarities", 0.0)
        self.dissimilarity_matrix_ = self._dissimilarities(simulations, D)
        self._progress("clusters", 0.4)
        self._partition(simulations.n, labels)
        self.bases_: list[Basis] = []
        self.singular_values_: list[ndarray] = []
        self.hyper_reductions_: list[Any] = []
        for k in range(self.n_clusters):
            self._progress("bases", 0.5 + 0.4 * k / self.n_clusters)
            self._add_basis(simulations, self.members(k), k)
        self._warn_of_small_clusters()
        self._progress("classifier", 0.9)
        self.product_ = simulations.product
        self.n_features_in_ = simulations.n_dof
        self._medoids = SnapshotSet(self._raw_simulations(simulations, self.medoid_indices_), self.product_)
        self._medoid_spans = spans_of(self._medoids, self.simulation_modes, self.simulation_tol)
        self.classifier_ = None if parameters is None else self.train(parameters, self.labels_)
        self._progress("done", 1.0)
        return self

    def members(self, k: int) -> Int[ndarray, " members"]:
        """Simulations that basis k is made of: its cluster, and its neighbours where clusters overlap."""
        inside = self.labels_ == k
        extra = round(self.overlap * int((~inside).sum()))
        nearest = np.argsort(np.where(inside, np.inf, self.dissimilarity_matrix_[:, self.medoid_indices_[k]]))[:extra]
        return np.sort(np.concatenate([np.flatnonzero(inside), nearest]))

    def train(self, parameters: Any, labels: Labels) -> Any:
        """Fit a fresh classifier, for instance on more points whose labels come from `assign` of cheap simulations."""
        parameters, labels = _table(parameters, len(labels)), np.asarray(labels)
        if np.unique(labels).size == 1:  # many classifiers refuse a single class
            from sklearn.dummy import DummyClassifier

            return DummyClassifier().fit(parameters, labels)
        return make_classifier(self.classifier, len(labels)).fit(parameters, labels)

    def predict(self, parameters: Any) -> Labels:
        """The cluster for new parameters, before anything is simulated.

        Raises:
            ValueError: the dictionary was fitted without parameters.
        """
        check_is_fitted(self)
        if self.classifier_ is None:
            raise ValueError("y was None at fit: without parameters there is no classifier; use assign on snapshots")
        return self.classifier_.predict(_table(parameters, None))

    def assign(self, X: Snapshots) -> Labels:
        """The cluster whose medoid is nearest: the label that the clustering itself would give."""
        simulations = self._new(X)
        if self.dissimilarity == "precomputed":
            raise ValueError("dissimilarity is precomputed: no distance of new snapshots to the medoids is known")
        return self._to_medoids(simulations).argmin(axis=1)

    def oracle(self, X: Snapshots) -> Labels:
        """The cluster with the least projection error, which no classifier can beat."""
        return self.errors(X).argmin(axis=1)

    def errors(self, X: Snapshots, n_modes: int | None = None) -> Float[ndarray, "n clusters"]:
        """Relative projection error of each simulation on each basis (its first n_modes): ||S - P_k S|| / ||S||."""
        simulations = self._new(X)
        check_truncation(n_modes, 0.0)
        whitened = [self.product_.whiten(basis[:, :n_modes].T) for basis in self.bases_]
        modes = max(map(len, whitened))
        padded = np.zeros((len(whitened), modes, simulations.n_dof))
        for target, basis in zip(padded, whitened):
            target[: len(basis)] = basis
        return projection_errors(simulations, Spans(padded, np.array([len(b) for b in whitened])))

    def projection_error(
        self, X: Snapshots, labels: Literal["best", "assigned", "predicted"] | Labels = "best", parameters: Any = None
    ) -> Float[ndarray, " n"]:
        """Relative projection error of each simulation on one basis.

        Args:
            X: snapshots.
            labels: "best" of all bases, the one that `assign` names, the one that the classifier predicts from
                `parameters`, or given labels.
        """
        errors = self.errors(X)
        if isinstance(labels, str):
            check_choice("labels", labels, ("best", "assigned", "predicted"))
            if labels == "best":
                return errors.min(axis=1)
            labels = self.assign(X) if labels == "assigned" else self.predict(parameters)
        chosen = np.asarray(labels)
        if chosen.shape != (len(errors),):
            raise ValueError(f"labels must have shape ({len(errors)},), got {chosen.shape}")
        return errors[np.arange(len(errors)), chosen]

    def reduce(self, U: Any, k: int) -> Any:
        """Coordinates V_k^T M u of snapshots as columns, (n_dof, t) or (n_dof,), or of a pyMOR VectorArray."""
        basis = self._basis(k)
        columns = np.asarray(U.to_numpy() if is_vector_array(U) else U, dtype=np.float64)
        if columns.shape[:1] != (len(basis),):
            raise ValueError(f"U must have {len(basis)} rows, got shape {columns.shape}")
        return self.product_.apply(basis.T) @ columns

    def reconstruct(self, coordinates: Any, k: int) -> Float[ndarray, "n_dof *t"]:
        """V_k times coordinates, (N_k, t) or (N_k,)."""
        basis, coordinates = self._basis(k), np.asarray(coordinates, dtype=np.float64)
        if coordinates.shape[:1] != (basis.shape[1],):
            raise ValueError(f"coordinates must have {basis.shape[1]} rows, got shape {coordinates.shape}")
        return basis @ coordinates

    def _check(self) -> None:
        check_count("n_clusters", self.n_clusters)
        check_truncation(self.n_modes, self.tol)
        check_truncation(self.simulation_modes, self.simulation_tol)
        check_choice("dissimilarity", self.dissimilarity, (*DISSIMILARITIES, "precomputed"))
        check_choice("svd", self.svd, METHODS)
        check_between("overlap", self.overlap, 0, 1)
        check_count("n_init", self.n_init, at_least=0)

    def _dissimilarities(self, simulations: SnapshotSet, D: ndarray | None) -> Float[ndarray, "n n"]:
        if (D is not None) != (self.dissimilarity == "precomputed"):
            raise ValueError('D must be given for dissimilarity="precomputed" and for no other')
        if D is not None:
            if np.shape(D) != (simulations.n, simulations.n):
                raise ValueError(f"D must have shape ({simulations.n}, {simulations.n}), got {np.shape(D)}")
            return np.asarray(D, dtype=np.float64)
        return dissimilarities(self.dissimilarity, simulations, self.simulation_modes, self.simulation_tol)

    def _partition(self, n: int, labels: Labels | None) -> None:
        D = self.dissimilarity_matrix_
        if labels is None:
            found = KMedoids(self.n_clusters, n_init=self.n_init, random_state=self.random_state).fit(D)
            self.labels_, self.medoid_indices_ = found.labels_, found.medoid_indices_
        else:
            self.labels_ = np.asarray(labels)
            present = np.unique(self.labels_)
            if self.labels_.shape != (n,) or not np.array_equal(present, np.arange(self.n_clusters)):
                raise ValueError(
                    f"labels must be {n} integers that use each of 0 .. {self.n_clusters - 1}, got shape"
                    f" {self.labels_.shape} with values {present[:10]}"
                )
            groups = [np.flatnonzero(self.labels_ == k) for k in range(self.n_clusters)]
            self.medoid_indices_ = np.array([g[k_medoids(D[np.ix_(g, g)], 1).indices[0]] for g in groups])
        self.inertia_ = float(D[np.arange(n), self.medoid_indices_[self.labels_]].sum())

    def _add_basis(self, simulations: SnapshotSet, members: Int[ndarray, " members"], k: int) -> None:
        size = 8 * simulations.n_dof * int(simulations.widths[members].sum())
        by_blocks = self.svd == "incremental" or (self.svd == "auto" and size > simulations.memory_limit)
        if by_blocks:
            blocks = (self._scaled(simulations, b) for b in simulations.blocks(members))
            modes, s = incremental_pod(blocks, self.n_modes, self.tol)
        else:
            seed = None if isinstance(self.random_state, np.random.RandomState) else self.random_state
            modes, s = pod(self._scaled(simulations, members), self.n_modes, self.tol, method=self.svd, rng=seed)  # type: ignore[arg-type]
        basis = np.ascontiguousarray(simulations.product.unwhiten(modes).T)
        self.bases_.append(basis)
        self.singular_values_.append(s)
        if self.hyper_reduction is not None:
            rows = simulations.product.unwhiten(simulations.unit(members))
            self.hyper_reductions_.append(self.hyper_reduction(basis, rows, k))

    def _scaled(self, simulations: SnapshotSet, chosen: Int[ndarray, " k"]) -> Float[ndarray, "rows n_dof"]:
        rows = simulations.unit(chosen)
        if self.normalize:
            return rows
        return rows * np.repeat(simulations.norms[chosen], simulations.widths[chosen])[:, None]

    def _warn_of_small_clusters(self) -> None:
        small = [k for k, b in enumerate(self.bases_) if self.members(k).size <= 2 * b.shape[1]]
        if small and self.n_modes is not None:
            warnings.warn(
                f"clusters {small} have at most twice as many simulations as modes; their bases fit the training set"
                " far better than new simulations: use fewer clusters or modes, or more simulations",
                UserWarning,
                stacklevel=3,
            )

    def _raw_simulations(self, simulations: SnapshotSet, chosen: Int[ndarray, " k"]) -> Any:
        if simulations.steady:
            return simulations.raw(chosen)
        return [simulations.raw(np.array([i])).T for i in chosen]

    def _new(self, X: Snapshots) -> SnapshotSet:
        check_is_fitted(self)
        simulations = snapshot_set(X, self.product_, self.memory_limit)
        if simulations.n_dof != self.n_features_in_:
            raise ValueError(f"snapshots have {simulations.n_dof} unknowns, but the bases have {self.n_features_in_}")
        return simulations

    def _to_medoids(self, simulations: SnapshotSet) -> Float[ndarray, "n clusters"]:
        if self.dissimilarity == "euclidean":
            both = [(s.unit().reshape(s.n, -1).T * s.norms).T for s in (simulations, self._medoids)]
            return np.linalg.norm(both[0][:, None] - both[1][None], axis=2)
        if self.dissimilarity == "projection":
            return projection_errors(simulations, self._medoid_spans)
        spans = spans_of(simulations, self.simulation_modes, self.simulation_tol)
        kind: Any = "chordal" if self.dissimilarity == "sine" else self.dissimilarity
        return subspace_distances(spans, self._medoid_spans, kind)

    def _basis(self, k: int) -> Basis:
        check_is_fitted(self)
        if not 0 <= k < len(self.bases_):
            raise ValueError(f"k must be a cluster, 0 to {len(self.bases_) - 1}, got {k}")
        return self.bases_[k]

    def _progress(self, stage: str, fraction: float) -> None:
        if self.callback is not None:
            self.callback(stage, fraction)


def make_classifier(classifier: Any, n: int) -> Any:
    """A fresh copy of what the caller gave, or 5 nearest neighbours on standardised parameters."""
    if classifier is not None:
        return clone(classifier)
    return make_pipeline(StandardScaler(), KNeighborsClassifier(min(5, n)))


def _table(parameters: Any, n: int | None) -> Float[ndarray, "n d"]:
    table = np.asarray(parameters, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or (n is not None and len(table) != n):
        wanted = "any" if n is None else n
        raise ValueError(f"parameters must have shape ({wanted}, d), got {np.shape(parameters)}")
    check_finite("parameters", table)
    return table
