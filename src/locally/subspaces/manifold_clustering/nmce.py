"""Neural manifold clustering and embedding: the same objective with a table of n x k memberships.

The baseline that the doubly stochastic membership replaces: a randomly drawn cluster head with one output a cluster,
trained through Gumbel-softmax, first alone and then with the rest. Source: arXiv 2201.10000.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

from locally.checks import check_count, check_positive
from locally.subspaces.manifold_clustering.augmentation import Augmentation
from locally.subspaces.manifold_clustering.coding_rate import coding_rate, coding_rate_membership
from locally.subspaces.manifold_clustering.network import MLCNet, draw_weights_
from locally.subspaces.manifold_clustering.training import Schedule, Training


class NMCENet(nn.Module):
    """x -> (z, logits): an `MLCNet` whose cluster head has one output a cluster."""

    def __init__(self, start: MLCNet, n_clusters: int, generator: torch.Generator) -> None:
        super().__init__()
        self.backbone = start.backbone
        self.pre_feature = start.pre_feature
        self.feature_head = start.feature_head
        self.cluster_head = nn.Linear(start.feature_head.in_features, n_clusters)
        draw_weights_(self.cluster_head, generator)

    def forward(self, x: Float[Tensor, "n features"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k"]]:
        h = self.pre_feature(self.backbone(x))
        return F.normalize(self.feature_head(h).float(), dim=1), self.cluster_head(h).float()


@dataclass(frozen=True)
class HardRateReduction:
    """-(R(Z) - R_c(Z, Pi)) with Pi = softmax of logits plus Gumbel noise, averaged over views."""

    eps_sq: float
    temperature: float
    generator: torch.Generator
    name: str = field(default="nmce", init=False)

    def __call__(
        self, z: Float[Tensor, "views n d"], c: Float[Tensor, "views n k"]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        Z = F.normalize(z.mean(0), dim=1)
        uniform = torch.rand(c.shape, generator=self.generator, device=c.device).clamp(1e-10, 1 - 1e-7)
        membership = F.softmax((c - (-uniform.log()).log()) / self.temperature, dim=-1).mean(0)
        whole, parts = coding_rate(Z, self.eps_sq), coding_rate_membership(Z, membership, self.eps_sq)
        return parts - whole, {"rate": whole.detach(), "rate of clusters": parts.detach()}


class NeuralManifoldClustering(TransformerMixin, ClusterMixin, BaseEstimator):
    """NMCE from an embedding that is trained already.

    Args:
        n_clusters: at most the number of samples.
        network: the start, as `ManifoldLinearizingClustering(mlc_steps=0).fit(X).network_` gives it; it is copied.
        augment: (x, generator) -> a view, or None.
        n_views: views a sample.
        eps_sq: squared distortion, positive.
        temperature: of the Gumbel-softmax, positive.
        head_steps: of the cluster head alone.
        tune_steps: of all parameters.
        batch_size: samples a step.
        lr_head, lr_tune: learning rates (Adam).
        head_weight_decay, weight_decay: of the two stages.
        device: where to train.
        random_state: of the head, order, views and noise.

    Attributes:
        labels_: the largest logit of every sample.
        embedding_: (n, d), rows of length one.
        history_: rates at every step of the two stages, "head" and "tune".
        network_: the trained network, in evaluation mode.
        n_features_in_: features of X.
    """

    def __init__(
        self,
        n_clusters: int,
        network: MLCNet,
        *,
        augment: Augmentation | None = None,
        n_views: int = 2,
        eps_sq: float = 0.2,
        temperature: float = 1.0,
        head_steps: int = 100,
        tune_steps: int = 100,
        batch_size: int = 1024,
        lr_head: float = 1e-2,
        lr_tune: float = 3e-4,
        head_weight_decay: float = 5e-3,
        weight_decay: float = 1e-4,
        device: str | torch.device = "cpu",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.network = network
        self.augment = augment
        self.n_views = n_views
        self.eps_sq = eps_sq
        self.temperature = temperature
        self.head_steps = head_steps
        self.tune_steps = tune_steps
        self.batch_size = batch_size
        self.lr_head = lr_head
        self.lr_tune = lr_tune
        self.head_weight_decay = head_weight_decay
        self.weight_decay = weight_decay
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "NeuralManifoldClustering":
        """Train head, then everything; y is ignored.

        Raises:
            ValueError: X holds NaN or infinity, has fewer samples than clusters, or a parameter is out of range.
            FloatingPointError: training diverged.
        """
        from copy import deepcopy

        X = validate_data(self, X, dtype=np.float32, ensure_min_samples=2)
        check_count("n_clusters", self.n_clusters)
        check_positive("eps_sq", self.eps_sq)
        check_positive("temperature", self.temperature)
        if self.n_clusters > len(X):
            raise ValueError(f"n_clusters must be at most n_samples={len(X)}, got {self.n_clusters}")
        seed = int(check_random_state(self.random_state).randint(2**31 - 4))
        device = torch.device(self.device)
        net = NMCENet(deepcopy(self.network), self.n_clusters, torch.Generator().manual_seed(seed)).to(device)
        noise = torch.Generator(device).manual_seed(seed)
        objective = HardRateReduction(self.eps_sq, self.temperature, noise)
        data = torch.from_numpy(X)
        self.history_ = {}
        head = Schedule(self.head_steps, self.lr_head, weight_decay=self.head_weight_decay)
        tune = Schedule(self.tune_steps, self.lr_tune, weight_decay=self.weight_decay)
        for number, (stage, schedule, all_of_it) in enumerate((("head", head, False), ("tune", tune, True))):
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(all_of_it or name.startswith("cluster_head."))
            training = Training(
                net, data, objective, schedule, self.batch_size, self.n_views, self.augment, seed + 2 * number
            )
            self.history_[stage] = training.run()
        self.network_ = net.eval()
        z, logits = self._forward(data)
        self.embedding_, self.labels_ = z.numpy(), logits.argmax(1).numpy()
        return self

    def transform(self, X: Any) -> Float[ndarray, "n d"]:
        """The embedding: rows of length one."""
        return self._forward(self._samples(X))[0].numpy()

    def predict(self, X: Any) -> Int[ndarray, " n"]:
        """The largest logit of each sample."""
        return self._forward(self._samples(X))[1].argmax(1).numpy()

    def _samples(self, X: Any) -> Float[Tensor, "n features"]:
        check_is_fitted(self)
        return torch.from_numpy(validate_data(self, X, reset=False, dtype=np.float32))

    @torch.no_grad()
    def _forward(self, X: Float[Tensor, "n features"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k"]]:
        device = next(self.network_.parameters()).device
        parts = [self.network_(part.to(device)) for part in X.split(4096)]
        return torch.cat([z for z, _ in parts]).cpu(), torch.cat([c for _, c in parts]).cpu()
