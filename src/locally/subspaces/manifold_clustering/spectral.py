"""Labels from a membership: normalised spectral clustering, dense or on the nearest neighbours alone."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.sparse.linalg import eigsh
from torch import Tensor

from locally.checks import check_choice, check_count, check_finite, check_nonnegative, check_positive
from locally.subspaces.manifold_clustering.coding_rate import coding_length
from locally.subspaces.manifold_clustering.sinkhorn import Projection, Status, balance

Membership: TypeAlias = Float[ndarray, "n n"] | sp.csr_array


def cosines(C: Float[Tensor, "*batch n d"], affinity: str = "inner") -> Float[Tensor, "*batch n n"]:
    """The affinity CC' that is projected; "abs" takes its absolute value, as the successor's code does."""
    check_choice("affinity", affinity, ("inner", "abs"))
    S = C @ C.mT
    return S.abs() if affinity == "abs" else S


def membership_of(
    C: Float[Tensor, "n d"], eta: float, affinity: str = "inner", tol: float = 1e-6, max_half_steps: int = 10_000
) -> Projection:
    """The converged membership of all samples, O(n^2) memory: for n up to about ten thousand."""
    with torch.no_grad():
        S = cosines(C, affinity)
        return balance(S, eta, tol=tol, max_half_steps=max_half_steps, symmetric=True, gradient="none")


@dataclass(frozen=True)
class SparseProjection:
    """A symmetric membership with entries between neighbours only; fields as in `Projection`."""

    membership: sp.csr_array
    status: Status
    steps: int
    error: float


def sparse_membership(
    C: Float[Tensor, "n d"],
    eta: float,
    affinity: str = "inner",
    neighbours: int = 100,
    *,
    tol: float = 1e-4,
    max_steps: int = 1000,
    chunk: int = 2048,
) -> SparseProjection:
    """The entropic projection with all but the `neighbours` largest affinities of each sample left out.

    The pattern is made symmetric and holds the diagonal, so that a balanced scaling exists; scalings are averaged
    geometrically between steps, which keeps the membership symmetric and converges faster.

    Args:
        C: rows of length one.
        eta: weight of the entropy, positive.
        affinity: "inner" or "abs".
        neighbours: at least 1, the sample itself among them.
        tol: on the largest distance of a row sum from one.
        max_steps: at least 1.
        chunk: rows of the affinity in memory at a time.

    Returns:
        A `SparseProjection`; O(n^2 d) time to find neighbours, O(n neighbours) memory.

    Raises:
        ValueError: C holds NaN or infinity, or a parameter is out of range.
    """
    check_positive("eta", eta)
    for name, value in (("neighbours", neighbours), ("max_steps", max_steps), ("chunk", chunk)):
        check_count(name, value)
    check_nonnegative("tol", tol)
    check_finite("C", C)
    n, count = len(C), min(neighbours, len(C))
    nearest, values = np.empty((n, count), np.int32), np.empty((n, count), np.float64)
    with torch.no_grad():
        for rows in torch.arange(n).split(chunk):
            S = C[rows] @ C.T
            best = (S.abs() if affinity == "abs" else S).topk(count)
            at = slice(int(rows[0]), int(rows[-1]) + 1)
            nearest[at], values[at] = best.indices.cpu().numpy(), best.values.double().cpu().numpy()
    pointers = np.arange(0, n * count + 1, count)
    kernel = sp.csr_array((np.exp((values.ravel() - 1) / eta), nearest.ravel(), pointers), shape=(n, n))
    kernel = kernel.maximum(kernel.T).maximum(sp.eye_array(n, format="csr")).tocsr()
    a = 1 / np.sqrt(kernel.sum(1))
    error, steps = np.inf, 0
    while True:
        sums = kernel @ a
        error = float(np.abs(a * sums - 1).max())
        if error <= tol or steps == max_steps:
            break
        a = np.sqrt(a / sums)
        steps += 1
    scale = sp.diags_array(a)
    status = Status.CONVERGED if error <= tol else Status.STEP_LIMIT
    return SparseProjection((scale @ kernel @ scale).tocsr(), status, steps, error)


def spectral_embedding(membership: Membership, k: int) -> Float[ndarray, "n k"]:
    """Unit rows of the k leading eigenvectors of the normalised, symmetrised membership."""
    check_count("k", k)
    n = membership.shape[0]
    symmetric = (membership + membership.T) / 2
    root = 1 / np.sqrt(np.maximum(np.asarray(symmetric.sum(0)).ravel(), np.finfo(np.float64).tiny))
    if sp.issparse(symmetric):
        scale = sp.diags_array(root)
        normalised = (scale @ symmetric @ scale).tocsr()
    else:
        normalised = (root[:, None] * symmetric * root).astype(np.float64)
    if k < n - 1:
        # adding the identity makes the largest eigenvalues also the largest in magnitude
        shifted = normalised + (sp.eye_array(n, format="csr") if sp.issparse(normalised) else np.eye(n))
        vectors = eigsh(shifted, k, which="LM", v0=np.sqrt(np.arange(1, n + 1) / n))[1]
    else:
        dense = normalised.toarray() if sp.issparse(normalised) else normalised
        vectors = np.linalg.eigh(dense)[1][:, -k:]
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float64).tiny)


def spectral_labels(
    membership: Membership, k: int, random_state: int | np.random.RandomState | None = None
) -> Int[ndarray, " n"]:
    """Normalised spectral clustering into k labels: eigenvectors, unit rows, k-means with ten starts.

    Args:
        membership: non-negative affinities of n samples, dense or sparse; symmetrised here.
        k: number of clusters, at most n.

    Raises:
        ValueError: k exceeds n.

    >>> spectral_labels(np.kron(np.eye(2), np.ones((3, 3))), 2, random_state=0).reshape(2, 3).std(axis=1)
    array([0., 0.])
    """
    from sklearn.cluster import KMeans

    if k > membership.shape[0]:
        raise ValueError(f"k must be at most the number of samples, {membership.shape[0]}, got {k}")
    rows = spectral_embedding(membership, k)
    return KMeans(k, n_init=10, random_state=random_state).fit_predict(rows).astype(np.int64)


def coding_lengths(
    Z: Float[Tensor, "n d"],
    membership: Membership,
    candidates: list[int],
    eps_sq: float = 0.1,
    random_state: int | None = None,
) -> dict[int, float]:
    """Coding length of the clustering for every candidate number of clusters; the smallest is the one to take."""
    lengths = {}
    for k in candidates:
        labels = torch.as_tensor(spectral_labels(membership, k, random_state), device=Z.device)
        lengths[k] = coding_length(Z, labels, eps_sq)
    return lengths


def membership_perplexity(membership: Float[ndarray, "n n"] | sp.csr_array) -> float:
    """exp(entropy) of a row, averaged over rows: with how many samples one shares its cluster.

    >>> membership_perplexity(np.full((4, 4), 0.25))
    4.0
    """
    if sp.issparse(membership):
        entries = sp.coo_array(membership)
        terms = -entries.data * np.log(np.maximum(entries.data, np.finfo(np.float64).tiny))
        entropy = np.bincount(entries.coords[0], terms, minlength=entries.shape[0])
    else:
        entropy = -(membership * np.log(np.maximum(membership, np.finfo(membership.dtype).tiny))).sum(1)
    return float(np.exp(entropy).mean())


def clustering_accuracy(labels: Int[ndarray, " n"], truth: Int[ndarray, " n"]) -> float:
    """Share of samples with the right label under the best matching of clusters to classes (Hungarian method).

    >>> clustering_accuracy(np.array([1, 1, 0, 0]), np.array([0, 0, 1, 2]))
    0.75
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    if labels.shape != truth.shape:
        raise ValueError(f"labels and truth must have one length, got {labels.shape} and {truth.shape}")
    counts = contingency_matrix(truth, labels)
    return float(counts[linear_sum_assignment(-counts)].sum() / len(truth))
