"""What faulty nodes send: attacks on the vectors that honest nodes exchange.

The adversary sees every honest vector of the round before it answers, knows the defence, and may send different
vectors to different nodes. Sources beside each attack; the search for factors is that of arXiv 2209.10931.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_count, check_positive

Factor = Literal["adaptive"] | float | Sequence[float]


@dataclass(frozen=True)
class Sight:
    """What the adversary knows when it has to send.

    Attributes:
        honest: vectors that the honest nodes send in this round.
        f: how many vectors each honest node will get from the adversary.
        step: of the training, from 0.
        damage: what the defence would suffer from f copies of a vector (see `Rule.damage`).
        flipped: the honest nodes' mean step along gradients of wrong labels.
        rng: the adversary's own randomness.
    """

    honest: Float[Tensor, "H D"]
    f: int
    step: int
    damage: Callable[[Tensor], float]
    flipped: Callable[[], Tensor]
    rng: np.random.Generator


@runtime_checkable
class Attack(Protocol):
    """What the adversary sends; one that keeps anything from step to step keeps it in attributes."""

    def __call__(self, sight: Sight) -> Tensor | None:
        """Lies for everybody (f, D), for each honest node (H, f, D), or None: silence."""
        ...


def line_maximize(value: Callable[[float], float], evaluations: int = 16) -> tuple[float, list[float]]:
    """Greedy search of the x >= 0 with the largest value: steps double while they pay, then shrink by a fifth.

    Returns the best x and all that were tried, in order. Source: experiments of arXiv 2209.10931.

    >>> best, tried = line_maximize(lambda x: -((x - 2.37) ** 2))
    >>> round(best, 6), tried[:5]
    (2.280843, [0.0, 1.0, 3.0, 7.0, 3.8])
    """
    check_count("evaluations", evaluations)
    best, height, delta, tried = 0.0, value(0.0), 1.0, [0.0]
    while len(tried) < evaluations:
        tried.append(best + delta)
        reached = value(tried[-1])
        if not reached > height:
            delta *= 0.8
            break
        best, height, delta = tried[-1], reached, 2 * delta
    proposed = tried[-1]
    while len(tried) < evaluations:
        if proposed < best:
            proposed += delta
        else:
            x = proposed - delta
            while x < 0:  # halve the way back into the domain
                x = (x + proposed) / 2
            proposed = x
        tried.append(proposed)
        reached = value(proposed)
        if reached > height:
            best, height = proposed, reached
        delta *= 0.8
    return best, tried


def most_damaging(along: Callable[[float], Tensor], factor: Factor, sight: Sight, evaluations: int) -> Tensor:
    """The lie along(k) for a fixed k, the worst of several, or the worst that a line search finds."""
    if factor == "adaptive":
        return along(line_maximize(lambda k: sight.damage(along(k)), evaluations)[0])
    if isinstance(factor, Sequence) and not isinstance(factor, str):
        return along(max(factor, key=lambda k: sight.damage(along(k))))
    return along(float(factor))


def check_factor(factor: Factor) -> None:
    if factor == "adaptive":
        return
    values = list(factor) if isinstance(factor, Sequence) and not isinstance(factor, str) else [factor]
    if not values or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise ValueError(f'factor must be "adaptive", a finite number or several of them, got {factor!r}')


@dataclass(frozen=True)
class ALIE:
    """mu + k s, s the honest vectors' deviation by coordinate: a little is enough (Baruch et al., NeurIPS 2019).

    Args:
        factor: k; "adaptive" searches the worst against the defence in every round, several values are all tried.
        evaluations: of the defence in one search.
    """

    factor: Factor = "adaptive"
    evaluations: int = 16

    def __post_init__(self) -> None:
        check_factor(self.factor)
        check_count("evaluations", self.evaluations)

    def __call__(self, sight: Sight) -> Tensor:
        mean, deviation = sight.honest.mean(0), sight.honest.std(0, correction=1)
        lie = most_damaging(lambda k: mean + k * deviation, self.factor, sight, self.evaluations)
        return lie.expand(sight.f, -1)


@dataclass(frozen=True)
class FOE:
    """(1 - k) mu, inner product manipulation: fall of empires (Xie et al., UAI 2019). Arguments as for `ALIE`."""

    factor: Factor = "adaptive"
    evaluations: int = 16

    def __post_init__(self) -> None:
        check_factor(self.factor)
        check_count("evaluations", self.evaluations)

    def __call__(self, sight: Sight) -> Tensor:
        mean = sight.honest.mean(0)
        lie = most_damaging(lambda k: (1 - k) * mean, self.factor, sight, self.evaluations)
        return lie.expand(sight.f, -1)


@dataclass(frozen=True)
class SignFlip:
    """The honest mean with its sign reversed (Li et al., AAAI 2019)."""

    def __call__(self, sight: Sight) -> Tensor:
        return -sight.honest.mean(0).expand(sight.f, -1)


@dataclass(frozen=True)
class LabelFlip:
    """The honest mean, moved along the honest nodes' gradients on labels read backwards (Allen-Zhu et al., 2020)."""

    def __call__(self, sight: Sight) -> Tensor:
        return (sight.honest.mean(0) - sight.flipped()).expand(sight.f, -1)


@dataclass
class Mimic:
    """Copies of the one honest vector that stands out most, so that its data count f times more (Karimireddy et al.,
    ICLR 2022). Learns the direction along which honest vectors differ for `warm_up` steps, by an online power
    iteration on their deviations from a running mean; it has a memory, so give each training a fresh one."""

    warm_up: int = 100
    _mean: Tensor | None = field(default=None, repr=False)
    _direction: Tensor | None = field(default=None, repr=False)
    _seen: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        check_count("warm_up", self.warm_up)

    def __call__(self, sight: Sight) -> Tensor:
        honest = sight.honest
        if self._mean is None or self._direction is None:
            self._mean = honest.mean(0)
            start = sight.rng.standard_normal(honest.shape[1])
            self._direction = torch.from_numpy(start / np.linalg.norm(start)).to(honest)
        elif self._seen < self.warm_up:
            old, new = self._seen / (1 + self._seen), 1 / (1 + self._seen)
            self._mean = old * self._mean + new * honest.mean(0)
        if self._seen < self.warm_up:
            deviations = honest - self._mean
            learnt = deviations.T @ (deviations @ self._direction)
            norm = learnt.norm()
            if norm > 0:
                share = self._seen / (1 + self._seen)
                mixed = share * self._direction + (1 - share) * learnt / norm
                self._direction = mixed / mixed.norm().clamp_min(torch.finfo(mixed.dtype).tiny)
            self._seen += 1
        chosen = ((honest - self._mean) @ self._direction).abs().argmax()
        return honest[chosen].expand(sight.f, -1)


@dataclass(frozen=True)
class Dissensus:
    """Pulls every node away from the others: to node i, x_i - strength / f * the sum of (x_j - x_i) over the honest
    (He et al., 2022, with equal weights); a different lie for each."""

    strength: float = 1.0

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)

    def __call__(self, sight: Sight) -> Tensor:
        honest = sight.honest
        pull = honest.sum(0) - len(honest) * honest
        lies = honest - self.strength / sight.f * pull
        return lies[:, None].expand(-1, sight.f, -1)


@dataclass(frozen=True)
class Random:
    """Gaussian noise of a given scale, another draw for every faulty node and every receiver."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)

    def __call__(self, sight: Sight) -> Tensor:
        H, D = sight.honest.shape
        return torch.from_numpy(self.scale * sight.rng.standard_normal((H, sight.f, D))).to(sight.honest)


@dataclass(frozen=True)
class Constant:
    """One and the same number everywhere; NaN and infinity are allowed, for that is what broken machines send."""

    value: float = math.nan

    def __call__(self, sight: Sight) -> Tensor:
        return torch.full_like(sight.honest[:1], self.value).expand(sight.f, -1)


@dataclass(frozen=True)
class Silent:
    """Sends nothing: crashed, or cut off."""

    def __call__(self, sight: Sight) -> None:
        return None


def tell_lies(attack: Attack | None, sight: Sight) -> Tensor | None:
    """The attack's vectors in the shape (f, D) or (H, f, D), whatever it is; None for silence."""
    if attack is None or sight.f == 0:
        return None
    lies = attack(sight)
    if lies is not None and lies.shape[-2:] != (sight.f, sight.honest.shape[1]):
        expected = f"({sight.f}, {sight.honest.shape[1]})"
        raise ValueError(f"attack must return vectors of shape (..., {expected[1:]}, got {tuple(lies.shape)}")
    return lies
