"""Dual activations: what a nonlinearity does to the covariance of two Gaussian pre-activations.

For (u, v) ~ N(0, [[q11, q12], [q12, q22]]) every class gives A = E[s(u) s(v)] and A' = E[s'(u) s'(v)] in closed form
(or by quadrature). Sources: Cho and Saul (2009) for rectifiers, Williams (1997) for erf, Tsuchida et al., arXiv
2002.08517, for GELU; the rest are Gaussian integrals of exponentials.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_between, check_count, check_positive

Pair = tuple[Tensor, Tensor]


class Kind(IntEnum):
    """How the compiled recursion names a nonlinearity."""

    RECTIFIER = 0
    ERF = 1
    GELU = 2
    SINE = 3
    RBF = 4
    SIGN = 5
    EXPONENTIAL = 6
    GAUSSIAN = 7


class Nonlinearity(ABC):
    """An elementwise function, as it acts on tensors and on covariances."""

    kind: Kind | None = None  # None: only the reference recursion knows it

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The function itself."""

    @abstractmethod
    def dual(self, q11: Float[Tensor, "..."], q12: Float[Tensor, "..."], q22: Float[Tensor, "..."]) -> Pair:
        """(E[s(u) s(v)], E[s'(u) s'(v)]), all arguments broadcast against each other."""

    def diagonal(self, q: Float[Tensor, "..."]) -> Pair:
        """The dual at u = v, where the general form would lose half of its digits."""
        return self.dual(q, q, q)

    @property
    def constants(self) -> tuple[float, ...]:
        """What the compiled recursion needs to know beyond the kind."""
        return ()

    def features(self, q: Float[Tensor, "..."]) -> Pair:
        """Two functions of a variance from which the compiled recursion makes the dual by products."""
        return q, q


@dataclass(frozen=True)
class ABReLU(Nonlinearity):
    """a min(x, 0) + b max(x, 0): ReLU (0, 1), leaky ReLU (slope, 1), absolute value (-1, 1), identity (1, 1)."""

    a: float = 0.0
    b: float = 1.0
    kind = Kind.RECTIFIER

    def __call__(self, x: Tensor) -> Tensor:
        if self.b == 0:
            return self.a * x.clamp(max=0)
        y = torch.relu(x) if self.a == 0 else torch.nn.functional.leaky_relu(x, self.a / self.b)
        return y if self.b == 1 else self.b * y

    def dual(self, q11: Float[Tensor, "..."], q12: Float[Tensor, "..."], q22: Float[Tensor, "..."]) -> Pair:
        fold = (self.b - self.a) ** 2 / (2 * math.pi)
        sine = (q11 * q22 - q12 * q12).clamp(min=0).sqrt()
        angle = angle_between(q11, q12, q22)
        prime = (self.a**2 + self.b**2) / 2 - fold * angle
        return fold * sine + prime * q12, prime

    def diagonal(self, q: Float[Tensor, "..."]) -> Pair:
        half = (self.a**2 + self.b**2) / 2
        return half * q, torch.full_like(q, half)

    @property
    def constants(self) -> tuple[float, ...]:
        return (self.b - self.a) ** 2 / (2 * math.pi), (self.a**2 + self.b**2) / 2

    def features(self, q: Float[Tensor, "..."]) -> Pair:
        return q.sqrt(), inverse_root(q)


def relu() -> ABReLU:
    """max(x, 0)."""
    return ABReLU()


def leaky_relu(slope: float = 0.01) -> ABReLU:
    """x above 0, slope x below."""
    return ABReLU(slope, 1.0)


def absolute() -> ABReLU:
    """|x|, as `ABReLU(-1, 1)`."""
    return ABReLU(-1.0, 1.0)


def identity() -> ABReLU:
    """x itself: a layer without a nonlinearity."""
    return ABReLU(1.0, 1.0)


@dataclass(frozen=True)
class Erf(Nonlinearity):
    """erf(x)."""

    kind = Kind.ERF

    def __call__(self, x: Tensor) -> Tensor:
        return torch.erf(x)

    def dual(self, q11: Float[Tensor, "..."], q12: Float[Tensor, "..."], q22: Float[Tensor, "..."]) -> Pair:
        root = ((1 + 2 * q11) * (1 + 2 * q22) - 4 * q12 * q12).sqrt()
        return (2 / math.pi) * torch.arctan2(2 * q12, root), (4 / math.pi) / root

    def features(self, q: Float[Tensor, "..."]) -> Pair:
        return inverse_root(1 + 2 * q), q


@dataclass(frozen=True)
class GELU(Nonlinearity):
    """x times the normal distribution function of x."""

    kind = Kind.GELU

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x)

    def dual(self, q11: Float[Tensor, "..."], q12: Float[Tensor, "..."], q22: Float[Tensor, "..."]) -> Pair:
        both, outer = q11 * q22, (1 + q11) * (1 + q22)
        square = outer - q12 * q12
        root = square.sqrt()
        angle = torch.arctan2(q12, root)
        value = ((q12 * q12 + both * square) / (outer * root) + q12 * angle) / (2 * math.pi) + q12 / 4
        bracket = 1 / square + (1 - both) / outer + 1
        return value, 0.25 + angle / (2 * math.pi) + q12 / (2 * math.pi * root) * bracket

    def features(self, q: Float[Tensor, "..."]) -> Pair:
        return q, inverse_root(1 + q)


@dataclass(frozen=True)
class Sine(Nonlinearity):
    """a sin(b x + c); the cosine is c = pi / 2."""

    a: float = 1.0
    b: float = 1.0
    c: float = 0.0
    kind = Kind.SINE

    def __call__(self, x: Tensor) -> Tensor:
        return self.a * torch.sin(self.b * x + self.c)

    def dual(self, q11: Float[Tensor, "..."], q12: Float[Tensor, "..."], q22: Float[Tensor, "..."]) -> Pair:
        mean = (q11 + q22) / 2
        near = torch.exp(self.b**2 * (q12 - mean))
        far = torch.exp(-(self.b**2) * (q12 + mean)) * math.cos(2 * self.c)
        return self.a**2 / 2 * (near - far), (self.a * self.b) ** 2 / 2 * (near + far)

    @property
    def constants(self) -> tuple[float, ...]:
        return self.a**2 / 2, self.b**2, math.cos(2 * self.c)


def cosine(a: float = 1.0, b: float = 1.0) -> Sine:
    """a cos(b x), as a `Sine` with phase pi / 2."""
    return Sine(a, b, math.pi / 2)


@dataclass(frozen=True)
class RBFFeature(Nonlinearity):
    """sqrt(2) sin(sqrt(2 gamma) x + pi / 4), whose covariance is the Gaussian kernel with gamma > 0."""

    gamma: float = 1.0
    kind = Kind.RBF

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma)

    def __call__(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * torch.sin(math.sqrt(2 * self.gamma) * x + math.pi / 4)

    def dual(self, q11: Float[Tensor, "..."], q12: Float[Tensor, "..."], q22: Float[Tensor, "..."]) -> Pair:
        value = torch.exp(self.gamma * (2 * q12 - q11 - q22))
        return value, 2 * self.gamma * value

    @property
    def constants(self) -> tuple[float, ...]:
        return (self.gamma,)


@dataclass(frozen=True)
class Sign(Nonlinearity):
    """The sign; its derivative is 0 almost everywhere, so the tangent kernel of earlier layers vanishes."""

    kind = Kind.SIGN

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sign(x)

    def dual(self, q11: Float[Tensor, "..."], q12: Float[Tensor, "..."], q22: Float[Tensor, "..."]) -> Pair:
        value = 1 - (2 / math.pi) * angle_between(q11, q12, q22)
        return value, torch.zeros_like(value)

    def diagonal(self, q: Float[Tensor, "..."]) -> Pair:
        return (q > 0).to(q), torch.zeros_like(q)

    def features(self, q: Float[Tensor, "..."]) -> Pair:
        return q, inverse_root(q)


@dataclass(frozen=True)
class Exponential(Nonlinearity):
    """a exp(b x)."""

    a: float = 1.0
    b: float = 1.0
    kind = Kind.EXPONENTIAL

    def __call__(self, x: Tensor) -> Tensor:
        return self.a * torch.exp(self.b * x)

    def dual(self, q11: Float[Tensor, "..."], q12: Float[Tensor, "..."], q22: Float[Tensor, "..."]) -> Pair:
        value = self.a**2 * torch.exp(self.b**2 * ((q11 + q22) / 2 + q12))
        return value, self.b**2 * value

    @property
    def constants(self) -> tuple[float, ...]:
        return self.a**2, self.b**2


@dataclass(frozen=True)
class Gaussian(Nonlinearity):
    """a exp(b x^2) with b < 0."""

    a: float = 1.0
    b: float = -1.0
    kind = Kind.GAUSSIAN

    def __post_init__(self) -> None:
        check_positive("-b", -self.b)

    def __call__(self, x: Tensor) -> Tensor:
        return self.a * torch.exp(self.b * x * x)

    def dual(self, q11: Float[Tensor, "..."], q12: Float[Tensor, "..."], q22: Float[Tensor, "..."]) -> Pair:
        square = (1 - 2 * self.b * q11) * (1 - 2 * self.b * q22) - 4 * self.b**2 * q12 * q12
        value = self.a**2 / square.sqrt()
        return value, 4 * self.b**2 * q12 * value / square

    @property
    def constants(self) -> tuple[float, ...]:
        return self.a**2, self.b


class Quadrature(Nonlinearity):
    """Any smooth function, its duals by Gauss-Hermite quadrature in two dimensions.

    Args:
        function: elementwise, from tensor to tensor, differentiable by torch.
        nodes: in each direction, 2 to 256. Error falls geometrically for analytic functions, but only
            like 1 / nodes across a kink, so rectifiers have their closed forms.

    >>> q = torch.tensor(1.0, dtype=torch.float64)
    >>> torch.allclose(Quadrature(torch.erf).dual(q, q / 2, q)[0], Erf().dual(q, q / 2, q)[0], atol=1e-8)
    True
    """

    def __init__(self, function: Callable[[Tensor], Tensor], nodes: int = 64) -> None:
        check_count("nodes", nodes, at_least=2)
        check_between("nodes", nodes, 2, 256)  # beyond, the weights leave the floating-point numbers
        self.function, self.nodes = function, nodes
        at, weights = np.polynomial.hermite_e.hermegauss(nodes)
        self._at = torch.as_tensor(at)
        self._weights = torch.as_tensor(weights / weights.sum())

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def dual(self, q11: Float[Tensor, "..."], q12: Float[Tensor, "..."], q22: Float[Tensor, "..."]) -> Pair:
        q11, q12, q22 = torch.broadcast_tensors(q11, q12, q22)
        shape, at, weights = q12.shape, self._at.to(q12), self._weights.to(q12)
        found = [torch.empty(q12.numel(), dtype=q12.dtype, device=q12.device) for _ in range(2)]
        step = max(1, 2**22 // self.nodes**2)  # values of the function at once
        for start in range(0, q12.numel(), step):
            part = slice(start, start + step)
            r1, r2 = q11.reshape(-1)[part].sqrt(), q22.reshape(-1)[part].sqrt()
            rho = (q12.reshape(-1)[part] * inverse_root(r1 * r1 * r2 * r2)).clamp(-1, 1)[:, None, None]
            u = r1[:, None] * at
            v = r2[:, None, None] * (rho * at[:, None] + (1 - rho * rho).sqrt() * at)  # (pairs, u's node, other node)
            for out, s in zip(found, (self._value, self._slope)):
                out[part] = torch.einsum("pi,pij,i,j->p", s(u), s(v), weights, weights)
        return found[0].reshape(shape), found[1].reshape(shape)

    def _value(self, x: Tensor) -> Tensor:
        return self.function(x).detach()

    def _slope(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.function(x).sum(), x)[0]


def angle_between(q11: Tensor, q12: Tensor, q22: Tensor) -> Tensor:
    """Angle of the two pre-activations in [0, pi]; pi / 2 where one of them is 0."""
    sine = (q11 * q22 - q12 * q12).clamp(min=0).sqrt()
    sine = torch.where((sine == 0) & (q12 == 0), torch.ones_like(sine), sine)
    return torch.arctan2(sine, q12)


def inverse_root(q: Tensor) -> Tensor:
    """1 / sqrt(q), and 0 where q is 0."""
    return torch.where(q > 0, q, torch.ones_like(q)).rsqrt() * (q > 0)


NAMES: dict[str, Callable[[], Nonlinearity]] = {
    "relu": relu,
    "leaky_relu": leaky_relu,
    "abs": absolute,
    "identity": identity,
    "erf": Erf,
    "gelu": GELU,
    "sin": Sine,
    "cos": cosine,
    "rbf": RBFFeature,
    "sign": Sign,
    "exp": Exponential,
    "gaussian": Gaussian,
    "tanh": lambda: Quadrature(torch.tanh),
    "sigmoid": lambda: Quadrature(torch.sigmoid),
    "softplus": lambda: Quadrature(torch.nn.functional.softplus),
    "silu": lambda: Quadrature(torch.nn.functional.silu),
}


def nonlinearity(name: "str | Nonlinearity") -> Nonlinearity:
    """By name, with its default constants; a `Nonlinearity` passes through."""
    if isinstance(name, Nonlinearity):
        return name
    if name not in NAMES:
        raise ValueError(f"activation must be a Nonlinearity or one of {', '.join(NAMES)}, got {name!r}")
    return NAMES[name]()
