"""BDI, the predecessor: both mappings under the tangent kernel of an infinitely wide network, designs as plain logits.

The kernel is that of `locally.tangent.kernel.InfiniteNetwork` with rectifiers and without biases; here as a recursion
on cosines that batches over designs and has a gradient where a design coincides with a row of the table, the cusp of
the kernel at which every design starts. Source: Chen, Zhang, Fu, Liu and Coates, Bidirectional Learning for Offline
Infinite-width Model-based Optimization, NeurIPS 2022, arXiv 2209.07507.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from locally.checks import check_between, check_count, check_nonnegative, check_positive
from locally.design.bidirectional.ascent import Ascent, Callback, Status
from locally.design.bidirectional.heads import KernelHead
from locally.design.bidirectional.scores import Standardisation, check_table
from locally.design.bidirectional.sequences import Sequences, SequenceSpace

TINY = 1e-300
NEAREST = 1 - 1e-12  # a cosine beyond it is that of a point with itself: constant, as on both sides of the cusp


@dataclass(frozen=True)
class ReluTangentKernel:
    """Tangent kernel of a ReLU network without biases and with weights of variance 1 / fan-in.

    Args:
        hidden: layers between input and readout, at least 1.

    >>> x = torch.eye(3, dtype=torch.float64)
    >>> ReluTangentKernel(1)(x, x).round(decimals=4).tolist()[0]
    [0.3333, 0.0531, 0.0531]
    """

    hidden: int = 5

    def __post_init__(self) -> None:
        check_count("hidden", self.hidden)

    def __call__(self, x1: Float[Tensor, "n p"], x2: Float[Tensor, "m p"]) -> Float[Tensor, "n m"]:
        # degree one in both arguments: a function of the cosine, times both lengths
        length = x1.norm(dim=1)[:, None] * x2.norm(dim=1)[None]
        cosine = (x1 @ x2.T) / length.clamp(min=TINY)
        return Angular.apply(cosine, self.hidden) * length / x1.shape[1]

    def diagonal(self, x: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """Each layer halves the variance and adds as much again as is left of what came before."""
        return x.square().sum(1) / x.shape[1] * (self.hidden + 1) / 2**self.hidden


class Angular(torch.autograd.Function):
    """The kernel between unit vectors, with its slope by the same recursion: 4 times as fast as differentiating it."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, hidden: int) -> Tensor:
        covariance, d_covariance = cosine, torch.ones_like(cosine)
        tangent, d_tangent = covariance, d_covariance
        for layer in range(hidden):
            inside = (covariance * 2**layer).clamp(-NEAREST, NEAREST)
            sine = (1 - inside.square()).sqrt()
            slope = 0.5 - inside.arccos() / (2 * math.pi)  # E[s'(u) s'(v)]
            covariance = sine / (2 * math.pi * 2**layer) + slope * inside / 2**layer
            d_slope = 2**layer * d_covariance / (2 * math.pi * sine)
            d_covariance = slope * d_covariance
            d_tangent = d_covariance + d_tangent * slope + tangent * d_slope
            tangent = covariance + tangent * slope
        ctx.save_for_backward(torch.where(cosine.abs() < NEAREST, d_tangent, 0.0))
        return tangent

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


@dataclass(frozen=True)
class Logits:
    """One-hot sequences as points that a gradient can move freely: log-probabilities against the first letter.

    `mixing` of the probability lies on the letter, the rest is spread evenly; every coordinate is standardised over the
    table.
    """

    space: SequenceSpace
    mean: Float[ndarray, " coordinates"]
    std: Float[ndarray, " coordinates"]
    mixing: float

    @classmethod
    def fit(cls, space: SequenceSpace, table: Int[ndarray, "n length"], mixing: float) -> "Logits":
        raw = cls(space, np.zeros(1), np.ones(1), mixing).forth(table)
        std = raw.std(0)
        return cls(space, raw.mean(0), np.where(std > 0, std, 1.0), mixing)

    def forth(self, table: Int[ndarray, "n length"]) -> Float[ndarray, "n coordinates"]:
        soft = self.mixing * self.space.one_hot(table) + (1 - self.mixing) / self.space.letters
        logits = np.log(soft[:, :, 1:]) - np.log(soft[:, :, :1])
        return (logits.reshape(len(table), -1) - self.mean) / self.std

    def back(self, points: Float[ndarray, "n coordinates"]) -> Int[ndarray, "n length"]:
        logits = (points * self.std + self.mean).reshape(len(points), self.space.length, -1)
        return np.pad(logits, ((0, 0), (0, 0), (1, 0))).argmax(2)


@dataclass(frozen=True)
class BDIResult:
    """Designs, their predicted scores in the table's units, and how the loop ended."""

    sequences: list[str]
    proxy: Float[ndarray, " designs"]
    status: Status


class BDIDesigner:
    """Bidirectional learning under an infinitely wide ReLU network.

    Args:
        space: alphabet and length of the sequences.
        hidden: layers of the network.
        target, ridge, tilt: as for `BIBDesigner`.
        gamma: weight of the forward loss, in [0, 1]; 1 is gradient ascent on kernel regression.
        steps, lr: of Adam on the standardised logits.
        n_designs: sequences to return.
        mixing: probability on the letter in the logits, in (0, 1).

    Complexity: O(n^3) to fit; n kernel values of O(p) for each design and step.

    >>> rng = np.random.default_rng(0)
    >>> space = SequenceSpace("dna", 6)
    >>> table = space.random(100, rng)
    >>> gc = ((table == 1) | (table == 2)).sum(1).astype(float)
    >>> found = BDIDesigner(space, n_designs=3).fit(table[gc < 4], gc[gc < 4]).design()
    >>> min(s.count("G") + s.count("C") for s in found.sequences) > 3
    True
    """

    def __init__(
        self,
        space: SequenceSpace,
        *,
        hidden: int = 5,
        target: float = 10.0,
        ridge: float = 1e-6,
        tilt: float = 0.0,
        gamma: float = 0.5,
        steps: int = 200,
        lr: float = 0.1,
        n_designs: int = 128,
        mixing: float = 0.6,
    ) -> None:
        check_positive("target", target)
        check_positive("ridge", ridge)
        check_nonnegative("tilt", tilt)
        check_between("gamma", gamma, 0, 1)
        check_count("steps", steps, at_least=0)
        check_positive("lr", lr)
        check_count("n_designs", n_designs)
        check_positive("mixing", mixing, below=1)
        self.space, self.kernel, self.n_designs, self.mixing = space, ReluTangentKernel(hidden), n_designs, mixing
        self.options = {"target": target, "ridge": ridge, "tilt": tilt}
        self.ascent = Ascent(steps=steps, weight=gamma, rate=lr)

    def fit(self, sequences: Sequences, scores: Float[ndarray, " n"]) -> "BDIDesigner":
        """Raises as `BIBDesigner.fit`."""
        table, scores = check_table(self.space, sequences, scores)
        self.logits_ = Logits.fit(self.space, table, self.mixing)
        self.scores_ = Standardisation.of(scores)
        points = torch.as_tensor(self.logits_.forth(table))
        y = self.scores_.forth(scores)
        self.head_ = KernelHead(self.kernel, points, y, diagonal=self.kernel.diagonal, **self.options)
        self._best = points[np.argsort(-scores, kind="stable")]
        return self

    def predict(self, sequences: Sequences) -> Float[ndarray, " n"]:
        """Scores by regression with the infinite network's kernel, in the units of the table; needs `fit`."""
        points = torch.as_tensor(self.logits_.forth(self.space.encode(sequences)))
        return self.scores_.back(self.head_.predict(points))

    def design(self, n: int | None = None, *, callback: Callback | None = None) -> BDIResult:
        """Ascend from the best sequences of the table and read a sequence off each end point; needs `fit`.

        Args:
            n: how many, at most the table's size; default `n_designs`.
            callback: as for `Ascent.run`.

        Raises:
            TypeError, ValueError: n is out of range.

        O(steps n m) kernel values for a table of m sequences.
        """
        n = self.n_designs if n is None else n
        check_count("n", n)
        if n > len(self._best):
            raise ValueError(f"n must be at most the {len(self._best)} sequences of the table, got {n}")
        found = self.ascent.run(lambda x: x, self.head_, None, self._best[:n], callback)
        indices = self.logits_.back(found.state.theta.numpy())
        sequences = self.space.decode(indices)
        return BDIResult(sequences, self.predict(indices), found.status)
