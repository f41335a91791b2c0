"""Which masked positions a model call settles: LocalLeap, and the rules that it is compared with.

Every rule is a pure function of the confidences of one block and commits the most confident masked position whatever
its confidence, so that a block of n tokens never takes more than n calls. Source: arXiv 2510.07081; `Threshold` is the
rule of Fast-dLLM (arXiv 2505.22618), `Schedule` low-confidence remasking of LLaDA (arXiv 2502.09992).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import max_pool1d

from locally.checks import check_count, check_positive

Confidence = Float[Tensor, "rows n"]
Positions = Bool[Tensor, "rows n"]


@runtime_checkable
class CommitRule(Protocol):
    """Anything that is called like the rules below; `step` counts the calls on this block from 0."""

    def __call__(self, confidence: Confidence, masked: Positions, step: int = 0) -> Positions: ...


@dataclass(frozen=True)
class LocalLeap:
    """Anchors commit their surroundings: a lower threshold within `radius` positions of a confident prediction.

    A masked position is an anchor when its confidence reaches `anchor_threshold`. It is committed together with every
    masked position within `radius` of an anchor whose confidence reaches `relaxed_threshold`. Tokens settled by earlier
    calls are no anchors, and what is committed under the relaxed threshold makes no anchor in the same call.

    Args:
        anchor_threshold: tau_a in (0, 1).
        relaxed_threshold: tau_r in (0, anchor_threshold]. At anchor_threshold the rule is `Threshold`.
        radius: W >= 0, in tokens. Zero makes it `Threshold` as well.

    Raises:
        ValueError: a threshold outside its range; the rule is not defined for relaxed_threshold > anchor_threshold,
            where anchors would fail the threshold of their own neighbourhood.

    Costs one max-pooling over the block, O(n) a row, with nothing read back from the device. arXiv 2510.07081.

    >>> confidence = torch.tensor([[0.5, 0.8, 0.7, 0.95, 0.6, 0.8]])
    >>> masked = torch.ones(1, 6, dtype=torch.bool)
    >>> LocalLeap(anchor_threshold=0.9, relaxed_threshold=0.75, radius=2)(confidence, masked).nonzero()[:, 1].tolist()
    [1, 3, 5]
    >>> Threshold(0.9)(confidence, masked).nonzero()[:, 1].tolist()
    [3]
    """

    anchor_threshold: float = 0.9
    relaxed_threshold: float = 0.75
    radius: int = 4

    def __post_init__(self) -> None:
        check_positive("anchor_threshold", self.anchor_threshold, below=1)
        check_positive("relaxed_threshold", self.relaxed_threshold, below=1)
        if self.relaxed_threshold > self.anchor_threshold:
            raise ValueError(
                f"relaxed_threshold must be at most anchor_threshold = {self.anchor_threshold:g}, "
                f"got {self.relaxed_threshold:g}"
            )
        check_count("radius", self.radius, at_least=0)

    def __call__(self, confidence: Confidence, masked: Positions, step: int = 0) -> Positions:
        anchors = masked & (confidence >= self.anchor_threshold)
        relaxed = near(anchors, self.radius) & (confidence >= self.relaxed_threshold)
        return masked & (most_confident(confidence, masked) | anchors | relaxed)


@dataclass(frozen=True)
class Threshold:
    """Commit every position whose confidence reaches `threshold` in (0, 1): Fast-dLLM's confidence-parallel rule."""

    threshold: float = 0.9

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold, below=1)

    def __call__(self, confidence: Confidence, masked: Positions, step: int = 0) -> Positions:
        return masked & (most_confident(confidence, masked) | (confidence >= self.threshold))


@dataclass(frozen=True)
class FixedCount:
    """Commit the `tokens` >= 1 most confident positions; 1 is sequential decoding, the reference for quality."""

    tokens: int = 1

    def __post_init__(self) -> None:
        check_count("tokens", self.tokens)

    def __call__(self, confidence: Confidence, masked: Positions, step: int = 0) -> Positions:
        return most_confident(confidence, masked, self.tokens)


@dataclass(frozen=True)
class Schedule:
    """Spread a block over `steps_per_block` >= 1 calls of nearly equal size, the larger ones first (LLaDA)."""

    steps_per_block: int

    def __post_init__(self) -> None:
        check_count("steps_per_block", self.steps_per_block)

    @classmethod
    def of(cls, steps: int, gen_length: int, block_length: int) -> "Schedule":
        """The schedule with `steps` calls in all, a multiple of the number of blocks; ValueError otherwise."""
        check_count("steps", steps)
        blocks, rest = divmod(gen_length, block_length)
        if rest:
            raise ValueError(f"block_length must divide gen_length = {gen_length}, got {block_length}")
        if steps % blocks:
            raise ValueError(f"steps must be a multiple of the {blocks} blocks, got {steps}")
        return cls(steps // blocks)

    def __call__(self, confidence: Confidence, masked: Positions, step: int = 0) -> Positions:
        left = max(self.steps_per_block - step, 1)
        # floor(n / S) + 1 for the first n mod S calls is what remains over the calls that remain, rounded up
        counts = (masked.sum(1, keepdim=True) + left - 1) // left
        return most_confident(confidence, masked, counts)


def near(anchors: Positions, radius: int) -> Positions:
    """Positions at most `radius` from an anchor of the same row."""
    n = anchors.shape[1]
    if radius >= n:
        return anchors.any(1, keepdim=True).expand_as(anchors)
    if radius == 0:
        return anchors
    return max_pool1d(anchors[:, None].float(), 2 * radius + 1, stride=1, padding=radius)[:, 0] > 0


def most_confident(confidence: Confidence, masked: Positions, counts: int | Tensor = 1) -> Positions:
    """The `counts` masked positions of each row with the highest confidence, the leftmost of equals."""
    hidden = confidence.masked_fill(~masked, -torch.inf)
    if isinstance(counts, int) and counts == 1:
        best = torch.zeros_like(masked).scatter_(1, hidden.argmax(1, keepdim=True), True)
    else:
        order = hidden.argsort(dim=1, descending=True, stable=True)
        rank = torch.arange(hidden.shape[1], device=hidden.device).expand_as(order)
        best = torch.zeros_like(masked).scatter_(1, order, rank < counts)
    return best & masked
