"""A problem on which the rates can be seen: every constant is known exactly, and noise decides how far one gets.

The first coordinate runs down a slope that never ends, the others estimate a mean under the Huber loss, the hard part
of the lower bound for empirical risks. Source of the lower bound: arXiv 2206.00846.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from locally.checks import check_count
from locally.privacy.stationary.glm import SIGMOID_SQUARE, LinearModel
from locally.privacy.stationary.objectives import Batch, Objective


class HardInstance(Objective):
    """f(w; x) = r(w_1) + huber(||w_2.. - x||), examples uniform on a sphere of radius 1/4.

    r'(t) = -(1 + max(t, 0))^(-5/4) / 8, and the Huber loss is quadratic up to 1 and linear beyond, so that L1 = 1,
    L0 = sqrt(1 + 1/64) and F(0) - inf F <= 1/2 + 1/32.

    Args:
        n: number of examples, at least 1.
        d: number of parameters, at least 2.
        seed: of the examples.

    >>> problem = HardInstance(n=100, d=5, seed=0)
    >>> w = torch.cat([torch.zeros(1), problem.centre])
    >>> problem.exact_gradient(w)  # at the mean only the slope is left
    tensor([-0.1250, ...], dtype=torch.float64)
    """

    radius, slope, initial_gap = 0.25, 0.125, 0.53125

    def __init__(self, n: int, d: int, seed: int) -> None:
        check_count("n", n)
        check_count("d", d, at_least=2)
        x = torch.randn(n, d - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.x = self.radius * normalize(x)
        self.centre = self.x.mean(0)
        self._target = torch.cat([self.x.new_zeros(1), self.centre])
        self.size, self.dimension = n, d
        self.lipschitz, self.smoothness = math.sqrt(1 + self.slope**2), 1.0

    def initial_point(self) -> Float[Tensor, " d"]:
        return self.x.new_zeros(self.dimension)

    def gradient_sum(self, w: Float[Tensor, " d"], batch: Batch = None) -> Float[Tensor, " d"]:
        v = w[1:]
        if batch is None and float(torch.linalg.vector_norm(v)) <= 1 - self.radius:
            total = self.size * (w - self._target)  # every example is in its quadratic part: no need to visit them
        else:
            x = self.x if batch is None else self.x[batch]
            weights = (v.square().sum() - 2 * (x @ v) + self.radius**2).clamp_min(1).rsqrt()
            total = torch.cat([w[:1], weights.sum() * v - weights @ x])
        total[0] = -self.slope * (1 + max(float(w[0]), 0.0)) ** -1.25 * (self.size if batch is None else len(batch))
        return total

    def difference_sum(
        self, w: Float[Tensor, " d"], anchor: Float[Tensor, " d"], bound: float, batch: Batch = None
    ) -> Float[Tensor, " d"]:
        return self.gradient_sum(w, batch) - self.gradient_sum(anchor, batch)  # within the bound: L0, L1 are exact

    def exact_gradient(self, w: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        return self.gradient_sum(w) / self.size


def logistic_population(n: int, d: int, seed: int, samples: int) -> tuple[LinearModel, list[LinearModel]]:
    """Rows uniform on the unit sphere, labels from a logistic model of norm 5: the population, and samples of it.

    The population is 5 000 rows with the chance of either label in place of a label.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = 5 * normalize(torch.randn(d, generator=generator, dtype=torch.float64), dim=0)

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        X = normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64))
        return X, torch.sigmoid(X @ direction)

    X, chance = draw(5_000)
    population, models = LinearModel(X, chance, data_norm=1 + 1e-12), []
    for _ in range(samples):
        X, chance = draw(n)
        y = (torch.rand(n, generator=generator, dtype=torch.float64) < chance).double()
        models.append(LinearModel(X, y, data_norm=1 + 1e-12))
    return population, models


def low_rank_model(n: int, d: int, rank: int, seed: int) -> LinearModel:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q
    codes = normalize(torch.randn(n, rank, generator=generator))
    y = (torch.rand(n, generator=generator) < torch.sigmoid(5 * codes[:, 0])).float()
    return LinearModel(codes @ basis.T, y, data_norm=1 + 1e-5, loss=SIGMOID_SQUARE)
