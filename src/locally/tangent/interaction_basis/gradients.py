"""What a section's Jacobians say on average over data: the matrix M' that turns the basis, and the edges.

With fhat' = C'^T f' the features of the next cut, J_{ti,sj}(x) = d fhat'_{ti} / d f_{sj} at positions t and s, in the
section at alpha f(x), averaged over alpha by a rule of quadrature (one point at alpha = 1 is the plain gradient):

    M'_jj' = E_x [ sum_{t,i,s} J_{ti,sj} J_{ti,sj'} ] / positions
    E_ij   = E_x [ sum_t ( sum_s Jhat_{ti,sj} fhat_sj )^2 ] / positions,  Jhat = J C+^T at alpha fhat C+

A section f -> act(f A) B has J = C'^T B^T diag(m) A^T with the slopes m of the activation, so that
M' = A ((B C' C'^T B^T) o E[m m^T]) A^T: one product of slopes instead of a backward pass for every output. A section
with one attention has a closed form of its own (`attending`). Every other section goes through `Linearization`.
Source: arXiv 2405.10928, equations of sections 2 and 3.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from locally.checks import check_choice, check_count
from locally.tangent.interaction_basis.attending import Attending
from locally.tangent.interaction_basis.folding import Factored, Section
from locally.tangent.linearization import Linearization

Rule = list[tuple[float, float]]  # alphas and weights
Batches = Callable[[], Iterator[Tensor]]  # activations at one cut, from the beginning


class Integration(StrEnum):
    """Where along alpha f the Jacobian is taken."""

    GRADIENT = "gradient"  # alpha = 1
    GAUSS_LEGENDRE = "gauss-legendre"
    TRAPEZOID = "trapezoid"


class Formula(StrEnum):
    """What is averaged: the Jacobian (the paper's), or the gradients of two older forms of the method."""

    JACOBIAN = "jacobian"
    PRODUCT = "(1-0)*alpha"  # of fhat'(alpha f) . fhat'(f), the second held
    DIFFERENCE = "(1-alpha)^2"  # of -|fhat'(f) - fhat'(alpha f)|^2, the first held


class EdgeFormula(StrEnum):
    """What an edge averages; chosen by the caller of `edges`."""

    SQUARED = "squared"  # squares of Jacobian times feature: the paper's, never negative
    FUNCTIONAL = "functional"  # gradient of -(fhat'_i(f) - fhat'_i(alpha f))^2 times fhat_j


@dataclass(frozen=True)
class Sources:
    """Random signs in place of sums over the outputs: r draws over positions, over features, or over both. Unbiased."""

    positions: int | None
    features: int | None
    generator: torch.Generator

    def draw(self, examples: int, outputs: tuple[int, int], like: Tensor) -> Float[Tensor, "r n t k"]:
        """One cotangent for each (position or draw, feature or draw), scaled so that squares average over draws."""
        t, k = outputs
        rows, columns = self.positions or t, self.features or k
        signs = torch.randint(0, 2, (rows, columns, examples, t, k), generator=self.generator).to(like) * 2 - 1
        if self.positions is None:
            signs *= torch.eye(t).to(like)[:, None, None, :, None]
        if self.features is None:
            signs *= torch.eye(k).to(like)[None, :, None, None, :]
        return signs.flatten(0, 1) / ((self.positions or 1) * (self.features or 1)) ** 0.5


class Turn(nn.Module):
    """f -> f C, to begin or end a section in the features."""

    def __init__(self, C: Float[Tensor, "a b"]) -> None:
        super().__init__()
        self.C = nn.Parameter(C, requires_grad=False)

    def forward(self, f: Tensor) -> Tensor:
        return f @ self.C


def quadrature(integration: Integration | str, n_intervals: int) -> Rule:
    """Alphas and weights on [0, 1].

    Gauss-Legendre has n_intervals + 1 points; the trapezoidal rule as many, from eps to 1 - eps with
    eps = 1e-3 / (n_intervals + 1), since the derivative at the ends may not exist, and the midpoint for 0 intervals.

    >>> quadrature("gauss-legendre", 0)
    [(0.5, 1.0)]
    """
    check_choice("integration", integration, tuple(Integration))
    check_count("n_intervals", n_intervals, at_least=0)
    match Integration(integration):
        case Integration.GRADIENT:
            return [(1.0, 1.0)]
        case Integration.GAUSS_LEGENDRE:
            x, w = np.polynomial.legendre.leggauss(n_intervals + 1)
            return [(float(a), float(b)) for a, b in zip((x + 1) / 2, w / 2)]
    if n_intervals == 0:
        return [(0.5, 1.0)]
    eps = 1e-3 / (n_intervals + 1)
    alphas = np.linspace(eps, 1 - eps, n_intervals + 1)
    weights = np.full(n_intervals + 1, 1 / n_intervals)
    weights[[0, -1]] /= 2
    return [(float(a), float(b)) for a, b in zip(alphas, weights)]


def positions(f: Tensor) -> int:
    return f.shape[1] if f.ndim == 3 else 1


def three_axes(f: Tensor) -> Float[Tensor, "n t k"]:
    return f if f.ndim == 3 else f[:, None]


# M' -------------------------------------------------------------------------------------------------------------------


def mean_squared_jacobian(
    section: Section,
    batches: Batches,
    C_next: Float[Tensor, "d k"] | None,
    rule: Rule,
    sources: Sources | None,
    memory: int,
) -> Float[Tensor, "a a"]:
    """M' of a section, in float64. C_next is None for the identity.

    O(N h^2) for a section with one layer of h activations; with one attention the products of the Jacobians, which no
    backward passes come before; otherwise one backward pass for each output and point.
    """
    first = next(iter(batches()))
    factored = section.factor(first, first.shape[-1]) if sources is None else None
    if factored is not None:
        return factored_squared_jacobian(factored, batches, C_next, rule)
    attending = section.attend(first, first.shape[-1]) if sources is None else None
    function = nn.Sequential(section, *([] if C_next is None else [Turn(C_next)]))
    total = torch.zeros(first.shape[-1], first.shape[-1], dtype=torch.float64, device=first.device)
    count = 0
    for f in batches():
        count += len(f) * positions(f)
        if sources is not None:
            rows = drawn_rows(function, f, rule, sources)
        elif attending is not None:
            rows = attending.turned(None, C_next).jacobian_blocks(f, rule, memory)
        else:
            rows = jacobian_rows(function, f, rule, memory)
        for block in rows:
            flat = block.reshape(-1, block.shape[-1]).double()
            total += flat.T @ flat
    return total / count


def factored_squared_jacobian(
    section: Factored, batches: Batches, C_next: Float[Tensor, "d k"] | None, rule: Rule
) -> Float[Tensor, "a a"]:
    A, B = section.A.double(), section.B.double()
    B = B if C_next is None else B @ C_next.double()
    if section.activation is None:
        AB = A @ B
        return AB @ AB.T
    slopes = torch.zeros(A.shape[1], A.shape[1], dtype=torch.float64, device=A.device)
    count = 0
    for f in batches():
        m = mean_slope(section, f.flatten(0, -2) @ section.A, rule).double()
        slopes += m.T @ m
        count += len(m)
    return A @ ((B @ B.T) * (slopes / count)) @ A.T


def mean_slope(section: Factored, z: Float[Tensor, "n h"], rule: Rule) -> Float[Tensor, "n h"]:
    assert section.activation is not None
    m = torch.zeros_like(z)
    for alpha, weight in rule:
        m += weight * section.activation.slope(alpha * z)  # type: ignore[operator]
    return m


def jacobian_rows(function: nn.Module, f: Tensor, rule: Rule, memory: int) -> Iterator[Float[Tensor, "n t k s d"]]:
    """Jacobians averaged over the rule, as many examples at once as `memory` holds."""
    _, t, k = three_axes(function(f[:1])).shape
    per_example = 3 * t * k * f[0].numel() * f.element_size()  # the block, what it is summed from, its transpose
    chunk = max(1, memory // per_example)
    # one linearisation a point for all blocks: making one costs as much as many examples
    points = [Linearization(function, alpha * f, memory=max(memory, 2**28), chunk=chunk) for alpha, _ in rule]
    for blocks in zip(*(J.jacobian_blocks() for J in points)):
        block = sum(weight * part for (_, weight), (_, part) in zip(rule, blocks))
        assert isinstance(block, Tensor)
        yield block.reshape(len(block), t, k, positions(f), f.shape[-1])


def drawn_rows(function: nn.Module, f: Tensor, rule: Rule, sources: Sources) -> Iterator[Float[Tensor, "r ..."]]:
    """Products of random signs with the Jacobians, the same signs for every alpha."""
    out = function(f)
    _, t, k = three_axes(out).shape
    signs = sources.draw(len(f), (t, k), f)
    signs = signs.reshape(len(signs), *out.shape)
    yield sum(w * Linearization(function, alpha * f).vjp(signs) for alpha, w in rule)  # type: ignore[misc]


def integrated_gradients(
    section: Section, batches: Batches, C_next: Float[Tensor, "d k"] | None, rule: Rule, formula: Formula
) -> tuple[Float[Tensor, "a a"], Float[Tensor, "a a"]]:
    """M' = E[g g^T] and Lambda' = E[g f^T] of the gradients g of the older formulas: one backward pass a point."""
    function = nn.Sequential(section, *([] if C_next is None else [Turn(C_next)]))
    M = scale = None
    count = 0
    for f in batches():
        out = function(f)
        g = torch.zeros_like(f)
        for alpha, weight in rule:
            J = Linearization(function, alpha * f)
            pull = out if formula is Formula.PRODUCT else 2 * (out - J.value)
            g += weight * J.vjp(pull)
        g, flat = g.flatten(0, -2).double(), f.flatten(0, -2).double()
        count += len(flat)
        M = g.T @ g + (0 if M is None else M)
        scale = g.T @ flat + (0 if scale is None else scale)
    assert M is not None
    assert scale is not None
    return M / count, scale / count


# Edges ----------------------------------------------------------------------------------------------------------------


def interaction_edges(
    section: Section,
    batches: Batches,
    C: Float[Tensor, "a k"],
    C_pinv: Float[Tensor, "k a"],
    C_next: Float[Tensor, "b k_next"] | None,
    rule: Rule,
    formula: EdgeFormula,
    memory: int,
) -> Float[Tensor, "k_next k"]:
    """Edges of a section, in float64; squared ones are not negative."""
    first = next(iter(batches()))
    factored = section.factor(first, first.shape[-1])
    if factored is not None and formula is EdgeFormula.SQUARED:
        return factored_edges(factored, batches, C, C_pinv, C_next, rule, memory)
    attending = section.attend(first, first.shape[-1])
    if attending is not None and formula is EdgeFormula.SQUARED:
        return attention_edges(attending.turned(C_pinv, C_next), batches, C, rule, memory)
    function = nn.Sequential(Turn(C_pinv), section, *([] if C_next is None else [Turn(C_next)]))
    total: Tensor | float = 0.0
    count = 0
    for f in batches():
        features = f @ C
        count += len(f) * positions(f)
        if formula is EdgeFormula.SQUARED:
            start = 0
            for block in jacobian_rows(function, features, rule, memory):
                part = three_axes(features[start : start + len(block)])
                total = total + torch.einsum("ntksj,nsj->ntkj", block, part).square().sum((0, 1)).double()
                start += len(block)
            continue
        for alpha, weight in rule:
            gap = three_axes(function(features) - function(alpha * features))
            start = 0
            for block in jacobian_rows(function, alpha * features, [(1.0, 1.0)], memory):
                stop = start + len(block)
                part = three_axes(features[start:stop])
                total = total + 2 * weight * torch.einsum("ntk,ntksj,nsj->kj", gap[start:stop], block, part).double()
                start = stop
    return total / count  # type: ignore[return-value]


def factored_edges(
    section: Factored,
    batches: Batches,
    C: Float[Tensor, "a k"],
    C_pinv: Float[Tensor, "k a"],
    C_next: Float[Tensor, "b k_next"] | None,
    rule: Rule,
    memory: int,
) -> Float[Tensor, "k_next k"]:
    A = C_pinv @ section.A
    B = section.B if C_next is None else section.B @ C_next
    rows = B.T.contiguous()  # otherwise the blocks below would be copied to be flattened
    total = torch.zeros(B.shape[1], len(A), dtype=torch.float64, device=A.device)
    squares = torch.zeros(len(A), dtype=torch.float64, device=A.device)
    count = 0
    at_once = max(1, memory // (2 * B.shape[1] * (len(A) + len(B)) * A.element_size()))
    for f in batches():
        features = f.flatten(0, -2) @ C
        count += len(features)
        if section.activation is None:  # the same Jacobian for every example
            squares += features.double().square().sum(0)
            continue
        m = mean_slope(section, features @ A, rule)
        for part, slopes in zip(features.split(at_once), m.split(at_once)):
            J = (slopes[:, None] * rows).flatten(0, 1) @ A.T
            total += J.view(len(part), B.shape[1], len(A)).mul_(part[:, None]).square_().sum(0).double()
    if section.activation is None:
        total = (A @ B).T.double().square() * squares
    return total / count


def attention_edges(
    section: Attending, batches: Batches, C: Float[Tensor, "a k"], rule: Rule, memory: int
) -> Float[Tensor, "k_next k"]:
    total: Tensor | float = 0.0
    count = 0
    for f in batches():
        count += len(f) * positions(f)
        for block in section.influences(f @ C, rule, memory):
            total = total + block.square_().sum((0, 1)).double()
    return total / count  # type: ignore[return-value]
