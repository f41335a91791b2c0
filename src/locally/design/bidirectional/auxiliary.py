"""The auxiliary model: weak supervision by regressors that see the same table differently.

Fitted like the proxy it would only repeat the forward loss; with a stronger ridge, an intercept and resampled rows it
has an opinion of its own. Source: arXiv 2301.02931, Section 4.3 (an average over five seeds).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_count, check_positive


class RidgeEnsemble:
    """Mean of ridge regressors with intercepts, each on a bootstrap sample of the table.

    Its gradient in the features is one vector, the same everywhere.

    Args:
        members: at least 1; with one member the table is taken as it is.
        ridge: penalty over the number of rows, > 0.

    Attributes:
        coefficients: (p,), in the units of the scores that it was fitted to.
        intercept: float.

    >>> F = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> aux = RidgeEnsemble(5, 1e-6).fit(F, F[:, 0] + 2, generator=torch.Generator().manual_seed(0))
    >>> [round(v, 3) for v in aux.coefficients.abs().tolist()], round(aux.intercept, 3)
    ([1.0, 0.0, 0.0], 2.0)
    """

    def __init__(self, members: int = 5, ridge: float = 1e-2) -> None:
        check_count("members", members)
        check_positive("ridge", ridge)
        self.members, self.ridge = members, ridge

    def fit(
        self, features: Float[Tensor, "n p"], scores: Float[Tensor, " n"], *, generator: torch.Generator
    ) -> "RidgeEnsemble":
        """O(members n p min(n, p))."""
        n = len(features)
        fits = []
        for _ in range(self.members):
            rows = torch.arange(n) if self.members == 1 else torch.randint(n, (n,), generator=generator)
            fits.append(ridge_with_intercept(features[rows], scores[rows], self.ridge))
        self.coefficients = torch.stack([a for a, _ in fits]).mean(0)
        self.intercept = sum(c for _, c in fits) / self.members
        return self

    def predict(self, features: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """Scores in the units of those it was fitted to; needs `fit`."""
        return features @ self.coefficients + self.intercept

    def gradient(self, features: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """The coefficients, once for each row, without a copy; needs `fit`."""
        return self.coefficients.expand(len(features), -1)


def ridge_with_intercept(
    features: Float[Tensor, "n p"], scores: Float[Tensor, " n"], ridge: float
) -> tuple[Float[Tensor, " p"], float]:
    """argmin |F a + c - y|^2 + ridge n |a|^2, the intercept c free."""
    n, p = features.shape
    mean, level = features.mean(0), scores.mean()
    F, y = features - mean, scores - level
    if p <= n:
        eye = torch.eye(p, dtype=F.dtype, device=F.device)
        a = torch.linalg.solve(F.T @ F + ridge * n * eye, F.T @ y)
    else:
        a = F.T @ torch.linalg.solve(F @ F.T + ridge * n * torch.eye(n, dtype=F.dtype, device=F.device), y)
    return a, float(level - mean @ a)
