"""Finite sums with bounded per-example gradients: what the private algorithms may ask of the data.

Only two questions are allowed, and both have bounded sensitivity by construction: a sum of per-example gradients, each
of norm at most L0, and a sum of per-example gradient differences, each of norm at most a public bound.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locally.checks import check_count, check_finite, check_positive

Batch = Int[Tensor, " b"] | None  # None: every example
Start = Float[Tensor, " d"] | None  # None: the objective's own initial point


class Beyond(StrEnum):
    """What happens to an example whose gradient (or feature vector) is larger than was declared."""

    CLIP = "clip"  # scaled back to the bound; which examples, and how many, is not told: that would be a release
    REFUSE = "refuse"  # ValueError: the run stops


class Objective(ABC):
    """F(w) = (1/n) sum_i f(w; x_i), seen through bounded sums.

    Attributes:
        size: number of examples n. dimension: number of parameters d.
        lipschitz: L0, the norm that no per-example gradient exceeds.
        smoothness: L1; differences of per-example gradients are held to L1 times the distance moved.
        convex: every f(.; x) is convex and L1-smooth by construction, with no clipping that could undo it.
        assumptions: what a privacy statement must say about how the bounds are kept.
    """

    size: int
    dimension: int
    lipschitz: float
    smoothness: float
    convex: bool = False
    assumptions: tuple[str, ...] = ()

    @abstractmethod
    def initial_point(self) -> Float[Tensor, " d"]:
        """A start that does not depend on the data, in the dtype and on the device of the computation."""

    @abstractmethod
    def gradient_sum(self, w: Float[Tensor, " d"], batch: Batch = None) -> Float[Tensor, " d"]:
        """Sum over the batch of per-example gradients, each of norm at most `lipschitz`."""

    @abstractmethod
    def difference_sum(
        self, w: Float[Tensor, " d"], anchor: Float[Tensor, " d"], bound: float, batch: Batch = None
    ) -> Float[Tensor, " d"]:
        """Sum over the batch of grad f(w; x_i) - grad f(anchor; x_i), each of norm at most `bound`."""

    @abstractmethod
    def exact_gradient(self, w: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """The mean gradient, neither bounded nor noised. NOT private: for experiments and tests."""

    def difference_bound(self, distance: float) -> float:
        """min(L1 ||w - v||, 2 L0): public, since it depends on released iterates only."""
        return min(self.smoothness * distance, 2 * self.lipschitz)

    def check_start(self, w0: Start) -> Float[Tensor, " d"]:
        """The start as given, or the objective's own; a wrong shape, NaN or infinity is refused."""
        start = self.initial_point() if w0 is None else w0.detach().clone()
        if start.shape != (self.dimension,):
            raise ValueError(f"w0 must have shape ({self.dimension},), got {tuple(start.shape)}")
        check_finite("w0", start)
        return start


class PerExampleObjective(Objective):
    """A loss given by a function that returns one gradient per example.

    Args:
        gradients: `gradients(w, *rows)` gives the (b, d) per-example gradients for rows of `data`.
        data: tensors that share their first dimension n.
        dimension: d. lipschitz, smoothness: L0 and L1 > 0, for every example and every w.
        beyond: whether gradients and differences beyond their bounds are clipped or refused. Under "clip" an example
            whose gradient is not finite counts as zero, so that its influence stays bounded.
        convex: the caller's word that every f(.; x) is convex; only believed together with "refuse".
        chunk: examples whose gradients are held at the same time.

    Raises:
        ValueError: a bound is not positive, or the tensors disagree in length or hold NaN.

    >>> data = torch.tensor([[0.1, 0.2], [0.3, -0.2]], dtype=torch.float64)
    >>> mean = PerExampleObjective(lambda w, x: w - x, data, dimension=2, lipschitz=1.0, smoothness=1.0)
    >>> mean.gradient_sum(torch.zeros(2, dtype=torch.float64))
    tensor([-0.4000,  0.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        gradients: Callable[..., Float[Tensor, "b d"]],
        *data: Tensor,
        dimension: int,
        lipschitz: float,
        smoothness: float,
        beyond: Beyond = Beyond.CLIP,
        convex: bool = False,
        chunk: int = 4096,
    ) -> None:
        check_positive("lipschitz", lipschitz)
        check_positive("smoothness", smoothness)
        check_count("dimension", dimension)
        check_count("chunk", chunk)
        if not data or len({len(rows) for rows in data}) != 1 or len(data[0]) == 0:
            raise ValueError(f"data must be tensors of one positive length, got lengths {[len(rows) for rows in data]}")
        for rows in data:
            check_finite("data", rows)
        self.gradients, self.data = gradients, data
        self.size, self.dimension = len(data[0]), dimension
        self.lipschitz, self.smoothness = float(lipschitz), float(smoothness)
        self.beyond = Beyond(beyond)
        self.convex = convex and self.beyond is Beyond.REFUSE
        self.chunk = chunk
        kept = "clipped to" if self.beyond is Beyond.CLIP else "refused beyond"
        self.assumptions = (
            f"per-example gradients {kept} {self.lipschitz:.4g}, differences {kept} "
            f"min({self.smoothness:.4g} x distance moved, {2 * self.lipschitz:.4g})",
        )

    def initial_point(self) -> Float[Tensor, " d"]:
        first = self.data[0]
        dtype = first.dtype if first.is_floating_point() else torch.get_default_dtype()
        return torch.zeros(self.dimension, dtype=dtype, device=first.device)

    def gradient_sum(self, w: Float[Tensor, " d"], batch: Batch = None) -> Float[Tensor, " d"]:
        total = torch.zeros_like(w)
        for rows in self._chunks(batch):
            total += self._bounded_sum(self.gradients(w, *rows), self.lipschitz)
        return total

    def difference_sum(
        self, w: Float[Tensor, " d"], anchor: Float[Tensor, " d"], bound: float, batch: Batch = None
    ) -> Float[Tensor, " d"]:
        total = torch.zeros_like(w)
        for rows in self._chunks(batch):
            difference = self.gradients(w, *rows) - self.gradients(anchor, *rows)
            total += self._bounded_sum(difference, bound)
        return total

    def exact_gradient(self, w: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        total = torch.zeros_like(w)
        for rows in self._chunks(None):
            total += self.gradients(w, *rows).sum(0)
        return total / self.size

    def _chunks(self, batch: Batch) -> Iterator[list[Tensor]]:
        count = self.size if batch is None else len(batch)
        for start in range(0, count, self.chunk):
            part = slice(start, start + self.chunk)
            yield [rows[part] if batch is None else rows[batch[part].to(rows.device)] for rows in self.data]

    def _bounded_sum(self, rows: Float[Tensor, "b d"], bound: float) -> Float[Tensor, " d"]:
        norms = torch.linalg.vector_norm(rows, dim=1)
        if self.beyond is Beyond.REFUSE:
            slack = 1e-6 if rows.dtype == torch.float64 else 1e-3  # rounding in the caller's own gradient
            if not bool((norms <= bound * (1 + slack) + slack * self.lipschitz).all()):
                worst = float(norms.nan_to_num(torch.inf).max())
                raise ValueError(f"a per-example gradient must have norm at most {bound:.6g}, got {worst:.6g}")
        return clipped_sum(rows, norms, bound)


def clipped_sum(rows: Float[Tensor, "b d"], norms: Float[Tensor, " b"], bound: float) -> Float[Tensor, " d"]:
    """Sum of rows scaled to norm at most `bound`, in one pass over them; a row that is not finite counts as zero."""
    finite = norms.isfinite()
    if not bool(finite.all()):
        rows, norms = torch.where(finite[:, None], rows, 0), torch.where(finite, norms, 0)
    tiny = torch.finfo(norms.dtype).tiny
    return (bound / norms.clamp_min(tiny)).clamp_max(1) @ rows
