"""Normalisations where floats are at their worst, against extended precision and without any slack."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locally.tangent.lipschitz.intervals import EPS
from locally.tangent.lipschitz.layers import TINY
from locally.tangent.lipschitz.normalisation import Normalisation
from locally.tangent.lipschitz.normalised_gradients import length, mean_product, normalised_product, projection
from locally.tangent.lipschitz.relaxations import Relaxation

LONG = np.longdouble
pytestmark = pytest.mark.skipif(np.finfo(LONG).eps > 1e-18, reason="no extended precision on this machine")


def wide(t):
    return t.numpy().astype(LONG)


def power(r, low, high):
    return 10.0 ** r.uniform(low, high)


BOXES = {
    "plain": lambda r, v: (v * power(r, -3, 3), power(r, -6, 3)),
    "large mean, tiny variance": lambda r, v: (power(r, 3, 9) + v * power(r, -8, 0), power(r, -8, 0)),
    "constant and degenerate": lambda r, v: (np.full_like(v, power(r, -9, 6)), 0.0),
    "around 0, squares underflow": lambda r, v: (0 * v, power(r, -150, -5)),
    "squares underflow": lambda r, v: (v * power(r, -170, -100), power(r, -170, -100)),
    "huge": lambda r, v: (v * power(r, 3, 140), power(r, -3, 145)),
    "few entries vary": lambda r, v: (v, power(r, -3, 2) * (r.random(v.shape) < 0.3)),
}


def drawn(seed, kind):
    """A normalisation, boxes of inputs and 60 points in each, ends included; in extended precision."""
    r = np.random.default_rng(seed)
    d = int(r.choice([1, 2, 3, 5, 8, 33]))
    eps = power(r, -12, 1) if r.random() < 0.6 else power(r, -289, -12)
    op = Normalisation(1, eps, bool(r.random() < 0.5), "norm")
    middle, size = BOXES[kind](r, r.standard_normal((8, 1, d)))
    radius = size * r.random((8, 1, d))
    points = between(r, middle - radius, middle + radius)
    lower, upper = middle - radius, middle + radius
    if op.centred:  # twice, since the first mean is rounded
        for _ in range(2):
            points = points - points.mean(-1, keepdims=True)
        lower = np.nextafter(points.min(0).astype(float), -np.inf)
        upper = np.nextafter(points.max(0).astype(float), np.inf)
    return r, op, points, torch.tensor(lower), torch.tensor(upper)


def between(r, lower, upper, n=60):
    share = r.random((n, *lower.shape))
    share[: n // 2] = np.where(r.random(share[: n // 2].shape) < 0.6, share[: n // 2].round(), share[: n // 2])
    return np.clip(LONG(1) * lower + (LONG(1) * upper - lower) * share, lower, upper)


@pytest.mark.parametrize("kind", BOXES)
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31))
def test_values_scales_and_lines(kind, seed):
    _, op, points, lower, upper = drawn(seed, kind)
    with np.errstate(all="ignore"):
        q = (points * points).mean(-1, keepdims=True)
        scale = 1 / np.sqrt(q + LONG(op.eps))
        y = points * scale
        ends = np.nextafter(q.min(0).astype(float), -1).clip(0), np.nextafter(q.max(0).astype(float), np.inf)
        for mean_square in (None, tuple(torch.tensor(end) for end in ends)):
            known = op.within(lower, upper, mean_square)
            assert (wide(known.values[0]) <= y).all()
            assert (wide(known.values[1]) >= y).all()
            assert (wide(known.scale[0]) <= scale).all()
            assert (wide(known.scale[1]) >= scale).all()
            for lines in (
                known.lines(),
                known._coupled(),
            ):  # those taken, and the coupled ones wherever they are finite
                along = (wide(lines.direction) * points).sum(-1, keepdims=True)
                for sign, *parts in (
                    (-1, lines.lower_slope, lines.lower_cross, lines.lower_intercept),
                    (1, lines.upper_slope, lines.upper_cross, lines.upper_intercept),
                ):
                    slope, cross, intercept = map(wide, parts)
                    value = slope * points + cross * along + intercept
                    finite = np.isfinite((slope + cross + intercept).astype(float)) & np.isfinite(value.astype(float))
                    assert (sign * (value - y) >= 0)[finite].all()


@pytest.mark.parametrize("kind", BOXES)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1.0, 1e-3, 1e3, 1e-80, 1e-165, 1e30]))
def test_the_backward_pass(kind, seed, size):
    r, op, points, lower, upper = drawn(seed, kind)
    d = points.shape[-1]
    gamma = (3 * d + 16) * EPS
    middle = r.standard_normal(lower.shape) * size
    radius = r.random(lower.shape) * size * power(r, -4, 1) * (r.random(lower.shape) < 0.8)
    gradients = between(r, middle - radius, middle + radius)
    g = torch.tensor(middle - radius), torch.tensor(middle + radius)
    known = op.within(lower, upper)
    with np.errstate(all="ignore"):
        scale = 1 / np.sqrt((points * points).mean(-1, keepdims=True) + LONG(op.eps))
        y = points * scale
        t = (y * gradients).mean(-1, keepdims=True)
        z = gradients - y * t
        rates = tuple(s.expand_as(lower) for s in known.scale)
        for relaxation in Relaxation:
            mean, *t_box = mean_product(op, g, known.values, gamma, relaxation)
            inner, *z_box = projection(mean, g, tuple(t_box), known.values, gamma, relaxation)
            product, *h_box = normalised_product(inner, g, tuple(t_box), tuple(z_box), known.values, rates, relaxation)
            for (low, high), true in ((t_box, t), (z_box, z), (h_box, scale * z)):
                assert (wide(low) <= true).all()
                assert (wide(high) >= true).all()
            for push, true in ((mean.push, t), (inner.push, z), (product.push, scale * z)):
                A = r.standard_normal((len(lower), 2, *true.shape[2:]))
                rows, shift = push(torch.tensor(A), gamma)
                bound = (wide(rows)[None] * gradients[:, :, None]).sum((-1, -2)) + wide(shift)
                exact = (A * true[:, :, None]).sum((-1, -2))
                assert (bound >= exact)[np.isfinite(bound.astype(float))].all()


def test_lengths_of_gradients_whose_squares_are_no_floats():
    op = Normalisation(1, 1e-5, False, "norm")
    size = torch.tensor([[3e-170, 4e-170], [3e170, 4e170], [0.0, 0.0]], dtype=torch.float64)
    found = length(op, -size, size / 2)[:, 0]
    assert (found >= torch.tensor([5e-170, 5e170, 0.0], dtype=torch.float64)).all()
    assert (found <= torch.tensor([5e-170, 5e170, 0.0], dtype=torch.float64) * (1 + 1e-13)).all()


def test_the_smallest_eps_is_far_above_what_squares_lose():
    """Less than 5e-324 for each entry, of up to 2^40 of them."""
    assert 1e-3 * EPS * TINY > 2**40 * 5e-324


def test_ends_whose_sum_is_no_float():
    op = Normalisation(1, 1e-5, False, "norm")
    end = torch.full((1, 1, 2), 1.7e308, dtype=torch.float64)
    for l, u in ((end, end), (-end, end), (end / 2, end)):
        lines = op.within(l, u).lines()
        for part in (lines.lower_slope, lines.lower_intercept, lines.upper_slope, lines.upper_intercept):
            assert part.isfinite().all()
        assert (lines.upper_slope * end + lines.upper_intercept >= 1).all()
