"""Optimised lower slopes of the forward bounds (alpha-CROWN, Xu et al., arXiv 2011.13824).

Every row of coefficients gets its own slopes, one for each piecewise linear unit that it passes, and minimises its own
bound; rows do not interact, so each keeps the best it has seen and is never worse than with the default slopes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locally.tangent.lipschitz.activations import PiecewiseLinear
from locally.tangent.lipschitz.propagation import Forward, Slopes, concretise


@dataclass(frozen=True)
class SlopeOptimiser:
    """Projected Adam on the slopes.

    Args:
        iterations: at most this many, >= 1.
        lr, decay: step size and its factor per iteration.
        patience: stop after so many iterations without an improvement.
    """

    iterations: int = 20
    lr: float = 0.5
    decay: float = 0.98
    patience: int = 10

    def __call__(self, forward: Forward, u: int, units: Int[Tensor, " t"]) -> Float[Tensor, "b rows"]:
        net, box, gamma = forward.net, forward.box, forward.net.gamma
        floors: dict[int, float] = {}
        slopes: Slopes = {}
        for v in net.activations:
            op = net.nodes[v].op
            if v < u and isinstance(op, PiecewiseLinear):
                floors[v] = op.negative_slope
                start = forward.bounds.lines[v].lower_slope[:, None]
                slopes[v] = start.repeat(1, 2 * len(units), *[1] * (start.ndim - 2)).requires_grad_()
        best = concretise(*forward.forms(u, units), box, gamma)
        if not slopes:
            return best
        with torch.enable_grad():
            optimiser = torch.optim.Adam(list(slopes.values()), lr=self.lr)
            since = 0
            for _ in range(self.iterations):
                values = concretise(*forward.forms(u, units, self._admissible(forward, slopes)), box, gamma)
                better = torch.minimum(best, values.detach())
                since = 0 if bool((better < best - 1e-9 * best.abs()).any()) else since + 1
                best = better
                if since >= self.patience or not values.requires_grad:  # no unit on the way is open
                    break
                optimiser.zero_grad()
                values.sum().backward()
                optimiser.step()
                for group in optimiser.param_groups:
                    group["lr"] *= self.decay
                with torch.no_grad():
                    for v, slope in slopes.items():
                        slope.clamp_(floors[v], 1.0)
        return best

    @staticmethod
    def _admissible(forward: Forward, slopes: Slopes) -> Slopes:
        """Stable units keep their one slope."""
        lines = forward.bounds.lines
        return {
            v: torch.where(
                (lines[v].upper_intercept > 0)[:, None],
                slope,
                lines[v].lower_slope[:, None],
            )
            for v, slope in slopes.items()
        }
