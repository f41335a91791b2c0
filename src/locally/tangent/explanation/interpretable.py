"""The simple models g that stand in for f: linear, logistic, or the user's own.

All parameters of one point are one vector theta; a batch of points is a matrix of them. Source: Han, Srinivas,
Lakkaraju, arXiv 2206.01254, section 3 (the class G).
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor


class InterpretableModel(ABC):
    """What to subclass for a class G of one's own: torch operations throughout, so that it can be fitted by descent."""

    @abstractmethod
    def size(self, q: int) -> int:
        """Number of parameters for noise with q coordinates."""

    @abstractmethod
    def predict(self, theta: Float[Tensor, "batch p"], noise: Float[Tensor, "shared n q"]) -> Float[Tensor, "batch n"]:
        """g(xi)."""

    @abstractmethod
    def attributions(self, theta: Float[Tensor, "batch p"], q: int) -> Float[Tensor, "batch q"]:
        """The weights that are shown to the reader."""

    def start(self, batch: int, q: int) -> Float[Tensor, "batch p"]:
        """Where the fit starts."""
        return torch.zeros(batch, self.size(q), dtype=torch.float64)

    def gradient(
        self, theta: Float[Tensor, "batch p"], noise: Float[Tensor, "shared n q"]
    ) -> Float[Tensor, "batch n q"]:
        """Gradient of g over the noise, by autograd and differentiable in theta."""
        with torch.enable_grad():
            free = noise.detach().expand(theta.shape[0], -1, -1).clone().requires_grad_(True)
            (slopes,) = torch.autograd.grad(self.predict(theta, free).sum(), free, create_graph=True)
        return slopes


class LinearModel(InterpretableModel):
    """g(xi) = w.xi + b, theta = (w, b)."""

    def size(self, q: int) -> int:
        return q + 1

    def predict(self, theta, noise):
        return project(noise, theta[:, :-1]) + theta[:, -1:]

    def attributions(self, theta, q):
        return theta[:, :q]

    def gradient(self, theta, noise):
        return theta[:, None, :-1]

    def link(self, f: Tensor) -> Tensor:
        """What w.xi + b has to be where g equals f."""
        return f


class LogisticModel(LinearModel):
    """g(xi) = sigmoid(w.xi + b) for probabilities; the weights are changes of log-odds."""

    def predict(self, theta, noise):
        return torch.sigmoid(super().predict(theta, noise))

    def gradient(self, theta, noise):
        s = self.predict(theta, noise)
        return (s * (1 - s))[..., None] * theta[:, None, :-1]

    def link(self, f: Tensor) -> Tensor:
        return torch.logit(f)


def project(noise: Float[Tensor, "shared n q"], w: Float[Tensor, "batch q"]) -> Float[Tensor, "batch n"]:
    """w.xi for every point, as one matrix product where the noise is shared."""
    if noise.shape[0] == 1:
        return w @ noise[0].T
    return (noise @ w[..., None])[..., 0]
