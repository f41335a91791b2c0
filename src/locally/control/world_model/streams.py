"""Losse-FTL for many independent streams at once, on any device, as a PyTorch module."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from locally.checks import check_choice, check_count, check_finite, check_positive, check_shape
from locally.control.world_model.encoding import LosseEncoder
from locally.control.world_model.regression import LosseFTLRegressor


class LosseStreams(nn.Module):
    """E copies of the sparse follow-the-leader update in lockstep: one encoder, a Gram matrix and weights for each.

    The same arithmetic as `LosseFTLRegressor` with dense storage and soft bins; everything is a buffer, so that
    `.to(device)` and `state_dict` do what they do for any module.

    Args:
        encoder: fitted, with soft bins.
        n_targets: width of y.
        n_streams: E.
        eps: ridge, positive; multiplied by the number of samples where `ridge` is "relative".
        ridge: "relative" or "absolute".
        dtype: torch.float64, or torch.float32 for devices without.

    Raises:
        ValueError, TypeError: an argument is out of range, the encoder is not fitted or has hard bins.

    Complexity: O(E (K D n_targets + K^3)) an update, E D^2 numbers of memory.

    References: arXiv 2401.13034, algorithm 2.

    >>> encoder = LosseEncoder(n_grids=4, random_state=0).fit(np.zeros((1, 2)))
    >>> model = LosseStreams(encoder, n_targets=1, n_streams=3)
    >>> model.update(torch.zeros(3, 2), torch.tensor([[1.0], [2.0], [3.0]]))
    >>> model(torch.zeros(3, 1, 2)).flatten().round(decimals=2)
    tensor([1., 2., 3.], dtype=torch.float64)
    """

    projection: Tensor
    corners: Tensor
    strides: Tensor
    offsets: Tensor
    A: Tensor
    B: Tensor
    W: Tensor
    n_seen: Tensor

    def __init__(
        self,
        encoder: LosseEncoder,
        n_targets: int,
        n_streams: int = 1,
        *,
        eps: float = 1e-5,
        ridge: str = "relative",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if not hasattr(encoder, "projection_") or encoder.binning != "soft":
            raise ValueError("encoder must be a fitted LosseEncoder with soft bins")
        check_count("n_targets", n_targets)
        check_count("n_streams", n_streams)
        check_positive("eps", eps)
        check_choice("ridge", ridge, ("relative", "absolute"))
        self.n_grids, self.grid_dim, self.n_bins = encoder.n_grids, encoder.grid_dim, encoder.n_bins
        self.eps, self.ridge = eps, ridge
        D, nodes, rho = encoder.n_codes_, encoder.n_bins + 1, encoder.grid_dim
        corners = torch.cartesian_prod(*[torch.arange(2)] * rho).reshape(-1, rho)
        strides = nodes ** torch.arange(rho - 1, -1, -1)
        self.register_buffer("projection", torch.tensor(encoder.projection_, dtype=dtype))
        self.register_buffer("corners", corners)
        self.register_buffer("strides", strides)
        self.register_buffer("offsets", torch.arange(self.n_grids) * nodes**rho)
        self.register_buffer("A", torch.zeros(n_streams, D, D, dtype=dtype))
        self.register_buffer("B", torch.zeros(n_streams, D, n_targets, dtype=dtype))
        self.register_buffer("W", torch.zeros(n_streams, D, n_targets, dtype=dtype))
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.int64))

    @classmethod
    def of(cls, models: Sequence[LosseFTLRegressor]) -> "LosseStreams":
        """The streams of regressors that share one projection, taken over where they are."""
        first = models[0]
        for model in models:
            if model.solver != "sparse" or not np.array_equal(model.encoder_.projection_, first.encoder_.projection_):
                raise ValueError("models must be sparse and share one projection")
            if model.n_seen_ != first.n_seen_:
                raise ValueError("models must have seen equally many samples")
        streams = cls(first.encoder_, first.n_targets_, len(models), eps=first.eps, ridge=first.ridge or "relative")
        for e, model in enumerate(models):
            streams.A[e] = torch.from_numpy(model.gram_.toarray())
            streams.B[e] = torch.from_numpy(model.xty_)
            streams.W[e] = torch.from_numpy(model.coef_)
        streams.n_seen.fill_(first.n_seen_)
        return streams

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Int[Tensor, "*batch K"], Float[Tensor, "*batch K"]]:
        """Indices and values of the active nodes, in the order of `LosseEncoder.encode`."""
        h = torch.sigmoid(x.to(self.projection.dtype) @ self.projection) * self.n_bins
        h = h.unflatten(-1, (self.grid_dim, self.n_grids)).transpose(-1, -2)[..., None, :]  # ... grid, corner, dim
        cell = h.floor().clamp(max=self.n_bins - 1)
        offset = h - cell
        values = torch.where(self.corners == 1, offset, 1 - offset).prod(-1)
        indices = ((cell.long() + self.corners) * self.strides).sum(-1) + self.offsets[:, None]
        return indices.flatten(-2), values.flatten(-2)

    def forward(self, x: Float[Tensor, "E n d_in"]) -> Float[Tensor, "E n n_targets"]:
        """Predictions of every stream's model for its own inputs."""
        indices, values = self.encode(x)
        streams = torch.arange(len(x), device=x.device)[:, None, None]
        return torch.einsum("enk,enko->eno", values, self.W[streams, indices])

    @torch.no_grad()
    def update(self, x: Float[Tensor, "E d_in"], y: Float[Tensor, "E n_targets"]) -> None:
        """Take in one sample of each stream.

        Raises:
            ValueError: a shape is wrong, or a sample holds NaN or infinity.
        """
        E, _, n_targets = self.W.shape
        check_shape("x", x, (E, self.projection.shape[0]))
        check_shape("y", y, (E, n_targets))
        check_finite("x", x)
        check_finite("y", y)
        S, v = self.encode(x)
        e = torch.arange(E, device=x.device)[:, None]
        rows, columns = S[:, :, None], S[:, None, :]
        self.A[e[:, None], rows, columns] += v[:, :, None] * v[:, None, :]
        self.B[e, S] += v[:, :, None] * y[:, None].to(v.dtype)
        self.n_seen += 1

        A_SS, W_S = self.A[e[:, None], rows, columns], self.W[e, S]
        right = self.B[e, S] - self.A[e, S] @ self.W + A_SS @ W_S
        ridge = self.eps * self.n_seen if self.ridge == "relative" else self.eps
        identity = torch.eye(S.shape[1], dtype=v.dtype, device=x.device)
        self.W[e, S] = torch.cholesky_solve(right, torch.linalg.cholesky(A_SS + ridge * identity))
