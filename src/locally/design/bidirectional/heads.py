"""Both mappings in closed form: what the offline table says of a design, and what the design says of the table.

The proxy is linear in frozen features, so that its tangent kernel is K(x, x') = phi(x).phi(x') and ridge regression has
a closed form in both directions. Forward: fit the table, predict the design, ask for the target. Backward: fit the
design alone with the target as its score, predict the table, ask for its scores. Source: arXiv 2301.02931, Section 4;
with another kernel in place of the linear one, arXiv 2209.07507.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_finite, check_nonnegative, check_positive

Kernel = Callable[[Tensor, Tensor], Tensor]
TINY = 1e-300  # a design whose features are all zero says nothing: its backward prediction is 0, not NaN


@dataclass(frozen=True)
class Losses:
    """Of each design, with their gradients in its features.

    Attributes:
        forward: (f(x_h) - target)^2.
        backward: weighted mean over the table of (prediction from the design alone - score)^2.
    """

    forward: Float[Tensor, " designs"]
    backward: Float[Tensor, " designs"]
    forward_gradient: Float[Tensor, "designs p"]
    backward_gradient: Float[Tensor, "designs p"]


@runtime_checkable
class Head(Protocol):
    """What the designer needs to know about a fitted proxy."""

    def predict(self, features: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """Standardised scores."""

    def losses(self, features: Float[Tensor, "n p"]) -> Losses:
        """Both losses of each row taken as a design, with their gradients in the features."""


def offline_weights(scores: Float[Tensor, " n"], tilt: float) -> Float[Tensor, " n"]:
    """Weight of each row of the table in the backward loss, softmax(tilt * score); 0 weighs all alike."""
    return (tilt * scores).softmax(0)


class LinearizedHead:
    """Linear head on frozen features, both losses in O(p^2) a design whatever the size of the table.

    The table enters the design loop through four moments only: with w = (F^T F + beta I)^-1 F^T y, G = F^T D F,
    q = F^T D y and s = y^T D y for the weights D (1/n where tilt = 0),

        L_f(h) = (h.w - target)^2,   L_b(h) = s - 2 c h.q + c^2 h.G h,   c = target / (h.h (1 + ridge)).

    With more features than rows the products with F replace G: O(n p).

    Args:
        features: of the table, float64.
        scores: standardised.
        target: score asked of the designs, in standard deviations above the mean, > 0.
        ridge: beta over the mean of the kernel's diagonal, > 0.
        tilt: of `offline_weights`, >= 0.

    Raises:
        ValueError: an argument is out of range, holds NaN, or all features are zero.

    >>> F = torch.eye(3, dtype=torch.float64)
    >>> head = LinearizedHead(F, torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    >>> [round(v, 4) for v in head.predict(F).tolist()]
    [1.0, -1.0, 0.0]
    """

    def __init__(
        self,
        features: Float[Tensor, "n p"],
        scores: Float[Tensor, " n"],
        *,
        target: float = 10.0,
        ridge: float = 1e-6,
        tilt: float = 0.0,
    ) -> None:
        check_positive("target", target)
        check_positive("ridge", ridge)
        check_nonnegative("tilt", tilt)
        check_finite("features", features)
        check_finite("scores", scores)
        F, y = features.double(), scores.double()
        n, p = F.shape
        beta = ridge * float(F.square().sum()) / n
        if beta == 0:
            raise ValueError("features must not all be zero: the proxy would be constant")
        self.target, self.ridge = target, ridge
        weights = offline_weights(y, tilt)
        if p <= n:
            gram = F.T @ F
            self.w = torch.linalg.solve(gram + beta * torch.eye(p, dtype=F.dtype, device=F.device), F.T @ y)
        else:
            gram = F @ F.T
            self.w = F.T @ torch.linalg.solve(gram + beta * torch.eye(n, dtype=F.dtype, device=F.device), y)
        root = weights.sqrt()[:, None] * F
        self.quadratic = root.T @ root if p <= n else root  # G, or its root where that is the smaller one
        self.q = F.T @ (weights * y)
        self.s = float(weights @ y.square())

    def predict(self, features: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """Standardised scores, one product a row."""
        return features @ self.w

    def losses(self, features: Float[Tensor, "n p"]) -> Losses:
        """Both losses and their gradients in closed form; arXiv 2301.02931, Section 4."""
        h = features
        gap = h @ self.w - self.target
        norm = h.square().sum(1).clamp(min=TINY)
        c = self.target / (norm * (1 + self.ridge))
        hq = h @ self.q
        Gh = self.times_moments(h)
        hGh = (h * Gh).sum(1)
        backward = self.s - 2 * c * hq + c.square() * hGh
        # c depends on h as well: the design is its own training point, dc/dh = -2 c h / h.h
        through_c = 2 * (c * hGh - hq) * (-2 * c / norm)
        backward_gradient = through_c[:, None] * h - 2 * c[:, None] * self.q + 2 * c.square()[:, None] * Gh
        return Losses(gap.square(), backward, 2 * gap[:, None] * self.w, backward_gradient)

    def times_moments(self, h: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """h G for the table's second moments G."""
        square = len(self.quadratic) == self.quadratic.shape[1]
        return h @ self.quadratic if square else (h @ self.quadratic.T) @ self.quadratic


class KernelHead:
    """Both losses under any kernel, by differentiating it: O(n) kernel values a design and step.

    Args:
        kernel: (n, p), (m, p) to (n, m), positive semidefinite and differentiable in its first argument.
        features, scores, target, ridge, tilt: as for `LinearizedHead`.
        diagonal: kernel of each row with itself, (n, p) to (n,); default by `kernel`.

    Raises:
        ValueError: an argument is out of range or holds NaN, or the kernel of every row with itself is zero.

    >>> F = torch.eye(3, dtype=torch.float64)
    >>> y = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    >>> linear, closed = KernelHead(lambda a, b: a @ b.T, F, y), LinearizedHead(F, y)
    >>> h = torch.tensor([[0.3, 0.2, -0.1]], dtype=torch.float64)
    >>> torch.allclose(linear.losses(h).backward_gradient, closed.losses(h).backward_gradient)
    True
    """

    def __init__(
        self,
        kernel: Kernel,
        features: Float[Tensor, "n p"],
        scores: Float[Tensor, " n"],
        *,
        target: float = 10.0,
        ridge: float = 1e-6,
        tilt: float = 0.0,
        diagonal: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_positive("target", target)
        check_positive("ridge", ridge)
        check_nonnegative("tilt", tilt)
        check_finite("features", features)
        check_finite("scores", scores)
        self.diagonal = diagonal or (lambda h: kernel(h, h).diagonal())
        self.kernel, self.target, self.ridge = kernel, target, ridge
        self.X, self.y = features.double(), scores.double()
        self.weights = offline_weights(self.y, tilt)
        K = kernel(self.X, self.X)
        check_finite("kernel of the table", K)
        beta = ridge * K.diagonal().mean()
        if not beta > 0:
            raise ValueError("features must not all be zero under the kernel: the proxy would be constant")
        self.alpha = torch.linalg.solve(K + beta * torch.eye(len(K), dtype=K.dtype, device=K.device), self.y)

    def predict(self, features: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """Standardised scores by kernel regression on the table: n kernel values a row."""
        return self.kernel(features, self.X) @ self.alpha

    def losses(self, features: Float[Tensor, "n p"]) -> Losses:
        """Both losses and their gradients, by one differentiated pass; arXiv 2209.07507."""
        h = features.detach().requires_grad_()
        with torch.enable_grad():
            K = self.kernel(h, self.X)
            c = self.target / ((1 + self.ridge) * self.diagonal(h).clamp(min=TINY))
            backward = (c[:, None] * K - self.y).square() @ self.weights
            forward = (K @ self.alpha - self.target).square()
            (forward_gradient,) = torch.autograd.grad(forward.sum(), h, retain_graph=True)
            (backward_gradient,) = torch.autograd.grad(backward.sum(), h)
        return Losses(forward.detach(), backward.detach(), forward_gradient, backward_gradient)
