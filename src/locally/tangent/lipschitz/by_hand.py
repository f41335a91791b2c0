"""Normalisations that a model writes out: powers, means, roots and quotients, put together again.

A square of what depends on the input, or a quotient by it, has no node of its own among those that bounds travel
through; c / sqrt(mean(c^2) + eps) has one. So squares and what becomes of them wait here, as the formula that they are
so far, until the value that they began with is divided by their root:

    c -> c^2 -> factor mean(c^2) + shift -> its power 1/2 or -1/2 -> c / sqrt(factor mean(c^2) + shift).

What does not end that way is refused where it leaves it. Deviations from a mean, x - mean(x), are read as well, so a
layer norm in this form is the layer norm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from locally.tangent.lipschitz.layers import Builder
from locally.tangent.lipschitz.operations import Centring, Diagonal


@dataclass(frozen=True)
class Ref:
    """Index of a node that depends on the input."""

    index: int


@dataclass(frozen=True)
class Squared:
    """The squares of a node's entries; `where` they were taken."""

    index: int
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Spread:
    """(factor mean(c^2) + shift)^power over the last `dims` dimensions of node c, kept with size 1."""

    index: int
    dims: int
    factor: float
    shift: float = 0.0
    power: float = 1.0
    where: str = field(default="", compare=False)


Part = Ref | Squared | Spread


class ByHand:
    """Follows squares through the operations on them; nodes are added to `builder` when a normalisation is complete."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.means: dict[int, tuple[int, int]] = {}  # node of a mean -> of what, over how many dimensions
        self.deviations: dict[tuple[int, int], int] = {}  # the same -> node of the deviations

    def power(self, v: Part, exponent: object, where: str) -> Part:
        """v to a constant power."""
        p = number(exponent, where)
        if isinstance(v, Spread):
            return replace(v, power=v.power * p)
        if isinstance(v, Ref) and p == 2:
            return Squared(v.index, where)
        raise unknown(where)

    def reduce(self, v: Squared, axes: object, keep: bool, *, total: bool, where: str) -> Spread:
        """Mean, or sum, of squares; axes count the batch."""
        dims = self._trailing(v.index, axes)
        if dims == 0 or not keep:
            raise ValueError(f"model: {where}: squares are summed over the last dimensions only, with keepdim=True")
        return Spread(v.index, dims, float(self._count(v.index, dims)) if total else 1.0, where=v.where)

    def variance(self, x: int, axes: object, correction: float, keep: bool, power: float, where: str) -> Spread:
        """Variance (power 1) or standard deviation (1/2) of a node."""
        dims = self._trailing(x, axes)
        if dims == 0 or not keep:
            raise ValueError(f"model: {where}: variances are taken over the last dimensions only, with keepdim=True")
        d = self._count(x, dims)
        if d <= correction:
            raise ValueError(f"model: {where} of {d} values with correction {correction:g} is not defined")
        return Spread(self._deviations(x, dims, where), dims, d / (d - correction), power=power, where=where)

    def note_mean(self, mean: int, x: int, axes: object, keep: bool) -> None:
        """Node `mean` is the mean of node x."""
        if keep and (dims := self._trailing(x, axes)):
            self.means[mean] = (x, dims)

    def arithmetic(self, kind: str, left: object, right: object, where: str) -> Part | None:
        """add, sub, mul or div where a square, or a mean taken away, is involved; None where neither is."""
        if kind == "mul" and isinstance(left, Ref) and left == right:
            return Squared(left.index, where)
        if kind == "sub" and isinstance(left, Ref) and isinstance(right, Ref):
            x, dims = self.means.get(right.index, (None, 0))
            return Ref(self._deviations(left.index, dims, where)) if x == left.index else None
        if kind in ("add", "mul") and isinstance(right, Squared | Spread):
            left, right = right, left
        match left, right:
            case Spread(power=-0.5), Ref() if kind == "mul":
                return self._normalise(right.index, left, where)
            case Ref(), Spread(power=0.5) if kind == "div":
                return self._normalise(left.index, right, where)
            case Squared() | Spread(), Ref() | Squared() | Spread():
                raise unknown(where)
            case Ref(), Squared() | Spread():
                raise unknown(where)
            case Spread(power=1.0), _ if kind == "add":
                return replace(left, shift=left.shift + number(right, where))
            case Spread(power=1.0), _ if kind in ("mul", "div") and (c := number(right, where)) > 0:
                by = c if kind == "mul" else 1 / c
                return replace(left, factor=left.factor * by, shift=left.shift * by)
            case _, Spread() if kind == "div" and number(left, where) == 1:
                return replace(right, power=-right.power)
            case (Squared() | Spread(), _) | (_, Squared() | Spread()):
                raise unknown(where)
        return None

    def _normalise(self, x: int, by: Spread, where: str) -> Ref:
        b, scales = self.builder, []
        while x != by.index and isinstance(op := b.nodes[x].op, Diagonal) and op.bias is None:
            scales.append(op)  # weight * c / sigma is weight * (c / sigma)
            (x,) = b.nodes[x].inputs
        if x != by.index:
            raise ValueError(f"model: {where} divides a value by the root of another's mean square: not supported")
        centred = any(node == x and dims == by.dims for (_, dims), node in self.deviations.items())
        y = b.divide_by_spread(x, by.dims, by.shift / by.factor, centred, where)
        if by.factor != 1:
            scales.append(Diagonal(b.like.new_tensor(by.factor**-0.5), None))
        for op in reversed(scales):
            y = b.affine(op, y, where)
        return Ref(y)

    def _deviations(self, x: int, dims: int, where: str) -> int:
        if (x, dims) not in self.deviations:
            centring = Centring(dims, self.builder.nodes[x].shape)
            self.deviations[x, dims] = self.builder.affine(centring, x, where)
        return self.deviations[x, dims]

    def _trailing(self, x: int, axes: object) -> int:
        """How many of the last dimensions of (batch, *shape) the axes are; 0 if they are not the last ones."""
        rank = len(self.builder.nodes[x].shape)
        if axes is None or isinstance(axes, bool) or not isinstance(axes, int | Sequence):
            return 0
        given = {a % (rank + 1) for a in ([axes] if isinstance(axes, int) else axes)}
        return len(given) if given == set(range(rank + 1 - len(given), rank + 1)) and 0 not in given else 0

    def _count(self, x: int, dims: int) -> int:
        return math.prod(self.builder.nodes[x].shape[-dims:])


def number(value: object, where: str) -> float:
    """A constant that is one number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise unknown(where)


def unknown(where: str) -> ValueError:
    return ValueError(
        f"model: {where} is not supported: of squares only x / sqrt(mean(x^2) + eps), a root mean square or layer "
        "normalisation, is"
    )
