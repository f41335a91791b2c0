"""Manifold linearizing and clustering as a scikit-learn estimator."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from locally.checks import check_choice, check_count, check_positive
from locally.subspaces.manifold_clustering.augmentation import Augmentation, Jitter
from locally.subspaces.manifold_clustering.coding_rate import numerical_rank
from locally.subspaces.manifold_clustering.network import MLCNet
from locally.subspaces.manifold_clustering.sinkhorn import Status
from locally.subspaces.manifold_clustering.spectral import (
    Membership,
    membership_of,
    membership_perplexity,
    sparse_membership,
    spectral_labels,
)
from locally.subspaces.manifold_clustering.training import Callback, RateReduction, Schedule, TotalCodingRate, Training


class ManifoldLinearizingClustering(TransformerMixin, ClusterMixin, BaseEstimator):
    """Cluster samples near curved manifolds, and map each cluster to a linear subspace of its own.

    Trains an embedding Z and a doubly stochastic membership G by maximising R(Z) - R_c(Z, G) on batches, after a
    self-supervised start that maximises the coding rate of all samples while two views of one agree. Spectral
    clustering of the membership of all samples gives the labels. No label is looked at anywhere.

    Args:
        n_clusters: number of clusters, at most the number of samples.
        z_dim: dimension of the embedding; subspaces can be orthogonal only from n_clusters on.
        hidden_dim: width of the pre-feature layer.
        backbone: module from rows of X to features, such as `ResNet18`; it is copied, not changed. It must have an
            attribute `out_dim`. None for features that are computed already.
        network: a whole `MLCNet` to start from in place of a new one, such as one trained by other self-supervision;
            it is copied, not changed, and `z_dim`, `hidden_dim` and `backbone` do not count.
        augment: (x, generator) -> a view of the rows x; "jitter" adds noise of half the distance between neighbours,
            None trains on the samples as they are.
        n_views: views a sample, at least 1.
        eps_sq: squared distortion of all rates, positive.
        eta: weight of the entropy of the membership, positive: what matters most. Too small and clusters split, too
            large and everything is one; `membership_perplexity_` should be a sizeable part of a cluster.
        lam: weight of agreement between views in the first stage.
        tcr_form: "views" or "mean", see `TotalCodingRate`.
        half_steps: of Sinkhorn in training.
        affinity: "inner" or "abs".
        detach_v: see `sinkhorn_projection`.
        penalty: weight of |G|_F^2 / 2.
        tcr_steps, mlc_steps: batches of the two stages; 0 leaves a stage out.
        batch_size: samples a step, more than n_clusters. Every cluster needs more samples of a batch than its subspace
            has dimensions.
        lr_tcr, lr_mlc: learning rates.
        optimizer: "adam", "sgd" or "lars".
        weight_decay, cluster_weight_decay: see `Schedule`.
        warmup: steps of linear increase of the learning rate in the first stage.
        cosine: let learning rates fall along a cosine.
        energy: share of a cluster's energy that its subspace holds.
        dense_limit: with more samples than this the membership of all keeps 100 neighbours a sample.
        amp: bfloat16 autocast of the network.
        device: where to train; the CPU by default.
        checkpoint: path stem; the stages are saved beside it and taken up again by the same call.
        callback: `callback(stage, step, logged)` after every step.
        random_state: of weights, order, views and k-means.

    Attributes:
        labels_: cluster of every sample.
        embedding_: (n, z_dim), rows of length one.
        membership_: doubly stochastic matrix of all samples, an array, or CSR beyond `dense_limit`.
        membership_status_: whether its projection converged.
        membership_perplexity_: with how many samples one shares its cluster, on average.
        subspaces_: a basis (z_dim, r_k) for each cluster.
        history_: what each stage logged: "tcr" rate and agreement, "mlc" rate and rate of clusters.
        network_: the trained network, in evaluation mode.
        n_features_in_: features of X.

    Constant features do no harm and a row of zeros is a sample like others. Where more clusters are asked for than
    there are distinct samples, identical ones are parted at will.

    Source: arXiv 2301.01805, Algorithm 1.

    >>> rng = np.random.default_rng(0)
    >>> t = rng.uniform(0, 3, 150)
    >>> arcs = np.r_[np.c_[np.cos(t), np.sin(t)], np.c_[np.cos(t), np.sin(t)] * 3]
    >>> mlc = ManifoldLinearizingClustering(
    ...     2, z_dim=8, hidden_dim=64, batch_size=150, tcr_steps=50, mlc_steps=50, random_state=0
    ... )
    >>> len(set(mlc.fit_predict(arcs)))
    2
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        z_dim: int = 128,
        hidden_dim: int = 1024,
        backbone: nn.Module | None = None,
        network: MLCNet | None = None,
        augment: Augmentation | str | None = "jitter",
        n_views: int = 2,
        eps_sq: float = 0.2,
        eta: float = 0.175,
        lam: float = 30.0,
        tcr_form: str = "views",
        half_steps: int = 10,
        affinity: str = "inner",
        detach_v: bool = False,
        penalty: float = 0.0,
        tcr_steps: int = 400,
        mlc_steps: int = 500,
        batch_size: int = 1024,
        lr_tcr: float = 1e-3,
        lr_mlc: float = 3e-4,
        optimizer: str = "adam",
        weight_decay: float = 1e-4,
        cluster_weight_decay: float | None = None,
        warmup: int = 0,
        cosine: bool = False,
        energy: float = 0.95,
        dense_limit: int = 10_000,
        amp: bool = False,
        device: str | torch.device = "cpu",
        checkpoint: str | Path | None = None,
        callback: Callback | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.z_dim = z_dim
        self.hidden_dim = hidden_dim
        self.backbone = backbone
        self.network = network
        self.augment = augment
        self.n_views = n_views
        self.eps_sq = eps_sq
        self.eta = eta
        self.lam = lam
        self.tcr_form = tcr_form
        self.half_steps = half_steps
        self.affinity = affinity
        self.detach_v = detach_v
        self.penalty = penalty
        self.tcr_steps = tcr_steps
        self.mlc_steps = mlc_steps
        self.batch_size = batch_size
        self.lr_tcr = lr_tcr
        self.lr_mlc = lr_mlc
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.cluster_weight_decay = cluster_weight_decay
        self.warmup = warmup
        self.cosine = cosine
        self.energy = energy
        self.dense_limit = dense_limit
        self.amp = amp
        self.device = device
        self.checkpoint = checkpoint
        self.callback = callback
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "ManifoldLinearizingClustering":
        """Train both stages on X (n, features), then cluster; y is ignored.

        Raises:
            ValueError: X holds NaN or infinity, has fewer samples than clusters, or a parameter is out of range.
            FloatingPointError: training diverged.
        """
        X = validate_data(self, X, dtype=np.float32, ensure_min_samples=2)
        stages = self._stages(len(X))
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 4))
        device = torch.device(self.device)
        net = self._new_network(X.shape[1], seed).to(device)
        data = torch.from_numpy(X)
        view = self._view(X)
        self.history_ = {}
        for number, (objective, schedule) in enumerate(stages):
            if isinstance(objective, RateReduction):
                net.copy_feature_head_()
            training = Training(
                net, data, objective, schedule, self.batch_size, self.n_views, view, seed + 2 * number, self.amp
            )
            path = None if self.checkpoint is None else Path(f"{self.checkpoint}.{objective.name}.safetensors")
            self.history_[objective.name] = training.run(self.callback, path)
        self.network_ = net.eval()
        z, c = self._embed(data)
        self._cluster(z, c, random)
        return self

    def fit_predict(self, X: Any, y: Any = None, **kwargs: Any) -> Int[ndarray, " n"]:
        return self.fit(X).labels_

    def transform(self, X: Any) -> Float[ndarray, "n d"]:
        """The embedding: rows of length one, each cluster in its subspace."""
        return self._embed(self._samples(X))[0].cpu().numpy()

    def membership(self, X: Any) -> Membership:
        """The doubly stochastic membership of any samples, those of a new batch among them."""
        return self._membership(self._embed(self._samples(X))[1])[0]

    def predict(self, X: Any) -> Int[ndarray, " n"]:
        """The cluster whose subspace holds most of each sample's embedding; needs no other samples."""
        z = self.transform(X)
        energy = np.stack([np.square(z @ basis).sum(1) for basis in self.subspaces_], axis=1)
        return energy.argmax(1)

    @property
    def _n_features_out(self) -> int:
        return self.embedding_.shape[1]

    def _stages(self, n: int) -> list[tuple[TotalCodingRate | RateReduction, Schedule]]:
        """Both stages, after everything that can be wrong with the parameters."""
        check_count("n_clusters", self.n_clusters)
        check_count("batch_size", self.batch_size)
        check_count("dense_limit", self.dense_limit)
        check_positive("energy", self.energy, below=1.0)
        if isinstance(self.augment, str):
            check_choice("augment", self.augment, ("jitter",))
        if self.n_clusters > n:
            raise ValueError(f"n_clusters must be at most n_samples={n}, got {self.n_clusters}")
        if self.batch_size <= self.n_clusters:
            raise ValueError(f"batch_size must exceed n_clusters={self.n_clusters}, got {self.batch_size}")
        if self.network is None and self.z_dim < self.n_clusters:
            warnings.warn(
                f"z_dim={self.z_dim} is below n_clusters={self.n_clusters}: subspaces cannot be orthogonal",
                stacklevel=3,
            )
        tcr = TotalCodingRate(self.eps_sq, self.lam, self.tcr_form)
        mlc = RateReduction(self.eps_sq, self.eta, self.half_steps, self.affinity, self.detach_v, self.penalty)
        common: dict[str, Any] = {
            "optimizer": self.optimizer,
            "weight_decay": self.weight_decay,
            "cluster_weight_decay": self.cluster_weight_decay,
            "cosine": self.cosine,
        }
        return [
            (tcr, Schedule(self.tcr_steps, self.lr_tcr, warmup=self.warmup, **common)),
            (mlc, Schedule(self.mlc_steps, self.lr_mlc, **common)),
        ]

    def _new_network(self, features: int, seed: int) -> MLCNet:
        if self.network is not None:
            return deepcopy(self.network)
        backbone = deepcopy(self.backbone)
        width = features if backbone is None else backbone.out_dim
        generator = torch.Generator().manual_seed(seed)
        return MLCNet(width, self.hidden_dim, self.z_dim, backbone, generator=generator)  # type: ignore[arg-type]

    def _view(self, X: Float[ndarray, "n features"]) -> Augmentation | None:
        return Jitter.among_neighbours(X) if self.augment == "jitter" else self.augment  # type: ignore[return-value]

    def _samples(self, X: Any) -> Float[Tensor, "n features"]:
        check_is_fitted(self)
        return torch.from_numpy(validate_data(self, X, reset=False, dtype=np.float32))

    @torch.no_grad()
    def _embed(self, X: Float[Tensor, "n features"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        device = next(self.network_.parameters()).device
        parts = [self.network_(part.to(device)) for part in X.split(4096)]
        return torch.cat([z for z, _ in parts]), torch.cat([c for _, c in parts])

    def _membership(self, c: Float[Tensor, "n d"]) -> tuple[Membership, Status]:
        if len(c) > self.dense_limit:
            sparse = sparse_membership(c, self.eta, self.affinity)
            return sparse.membership, sparse.status
        dense = membership_of(c, self.eta, self.affinity, tol=1e-5)
        return dense.membership.cpu().numpy(), dense.status

    def _cluster(self, z: Float[Tensor, "n d"], c: Float[Tensor, "n d"], random: np.random.RandomState) -> None:
        self.embedding_ = z.cpu().numpy()
        self.membership_, self.membership_status_ = self._membership(c)
        self.membership_perplexity_ = membership_perplexity(self.membership_)
        self.labels_ = spectral_labels(self.membership_, self.n_clusters, random)
        self.subspaces_ = [
            leading_subspace(self.embedding_[self.labels_ == k], self.energy) for k in range(self.n_clusters)
        ]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags


def leading_subspace(Z: Float[ndarray, "n d"], energy: float = 0.95) -> Float[ndarray, "d r"]:
    """Orthonormal basis of the leading right singular vectors that hold `energy` of the rows' energy, at least one."""
    if not len(Z):
        return np.zeros((Z.shape[1], 1), Z.dtype)
    rank = max(numerical_rank(torch.as_tensor(Z), energy), 1)
    return np.linalg.svd(Z, full_matrices=False)[2][:rank].T
