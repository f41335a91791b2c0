"""The matrices of the pressure projection: stencil, solids, surfaces, null spaces, right-hand sides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locally.solvers.conjugate_direction import Cell, Domain, PressureSolver


def random_domain(shape, seed, outside):
    rng = np.random.default_rng(seed)
    cells = rng.choice([Cell.FLUID, Cell.SOLID, Cell.AIR], size=shape, p=[0.7, 0.2, 0.1])
    cells[(0,) * len(shape)] = Cell.FLUID
    return Domain(cells, outside)


@pytest.mark.parametrize("ndim", [2, 3])
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), outside=st.sampled_from([Cell.AIR, Cell.SOLID]))
def test_matrix_and_operator_are_the_stencil_cell_by_cell(ndim, data, seed, outside):
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * ndim))
    domain = random_domain(shape, seed, outside)
    A = np.zeros((domain.n, domain.n))
    number = np.arange(domain.n).reshape(shape)
    for cell in np.ndindex(*shape):
        if domain.cells[cell] != Cell.FLUID:
            continue
        for axis in range(ndim):
            for side in (-1, 1):
                other = list(cell)
                other[axis] += side
                inside = 0 <= other[axis] < shape[axis]
                kind = domain.cells[tuple(other)] if inside else outside
                A[number[cell], number[cell]] += kind != Cell.SOLID
                if kind == Cell.FLUID:
                    A[number[cell], number[tuple(other)]] -= 1
    np.testing.assert_array_equal(domain.matrix().toarray(), A)
    v = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, domain.n)))
    torch.testing.assert_close(domain.operator() @ v, v @ torch.from_numpy(A))


@given(seed=st.integers(0, 2**32 - 1), outside=st.sampled_from([Cell.AIR, Cell.SOLID]))
def test_the_null_space_is_that_of_the_matrix(seed, outside):
    domain = random_domain((5, 6), seed, outside)
    A = domain.matrix().toarray()
    fluid = domain.fluid.reshape(-1)
    dimension = int(fluid.sum()) - np.linalg.matrix_rank(A)
    Z = domain.null_space()
    assert (0 if Z is None else len(Z)) == dimension
    if Z is not None:
        torch.testing.assert_close(Z @ Z.mT, torch.eye(dimension, dtype=torch.float64))
        assert np.abs(A @ Z.numpy().T).max() <= 1e-12
        assert not Z[:, torch.from_numpy(~fluid)].any()


def test_the_pressure_makes_a_velocity_free_of_divergence():
    domain = Domain.box(14, 12, outside=Cell.SOLID).with_surface(np.full(12, 9)).with_ball((4, 5), 2)
    rng = np.random.default_rng(0)
    u = [rng.standard_normal((15, 12)), rng.standard_normal((14, 13))]
    b = domain.divergence(*u)
    p = PressureSolver(rtol=1e-10).solve(domain, torch.from_numpy(b)).x.numpy()
    solid = np.pad(domain.cells, 1, constant_values=domain.outside) == Cell.SOLID
    padded = np.pad(p, 1)
    u[0] = np.where(solid[:-1, 1:-1] | solid[1:, 1:-1], 0, u[0] - np.diff(padded[:, 1:-1], axis=0))
    u[1] = np.where(solid[1:-1, :-1] | solid[1:-1, 1:], 0, u[1] - np.diff(padded[1:-1], axis=1))
    assert np.abs(domain.divergence(*u)).max() <= 1e-8


def test_balls_and_surfaces_are_where_they_should_be():
    domain = Domain.box(6, 5).with_ball((2, 2), 1.5).with_surface(np.array([4, 4, 3, 5, 6]))
    assert domain.cells.tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 1, 1, 0],
        [2, 2, 2, 0, 0],
        [2, 2, 2, 2, 0],
    ]
    assert Domain.box(4, 3).with_surface(np.array([1, 2, 3, 0]), axis=1).cells.tolist() == [
        [0, 2, 2],
        [0, 0, 2],
        [0, 0, 0],
        [2, 2, 2],
    ]


def test_domains_keep_their_cells():
    cells = np.zeros((3, 3), int)
    domain = Domain(cells)
    cells[0] = 1
    assert domain.fluid.all()
    with pytest.raises(ValueError, match="read-only"):
        domain.cells[0, 0] = 1


def test_what_does_not_fit_is_named(without_shape_checks):
    for cells, message in [
        (np.zeros(3, int), "two or three axes"),
        (np.full((2, 2), 3), "cells must hold"),
        (np.ones((2, 2), int), "no fluid"),
    ]:
        with pytest.raises(ValueError, match=message):
            Domain(cells)
    box = Domain.box(4, 4)
    solver = PressureSolver()
    b = torch.zeros(4, 4, dtype=torch.float64)
    for refused, message in [
        (lambda: Domain(np.zeros((2, 2), int), Cell.FLUID), "outside"),
        (lambda: box.with_ball((1, 2, 3), 1), "coordinates"),
        (lambda: box.with_ball((1, 2), 0), "radius"),
        (lambda: box.divergence(np.zeros((5, 4))), "components"),
        (lambda: box.divergence(np.zeros((4, 4)), np.zeros((4, 5))), r"velocity\[0\]"),
        (lambda: solver.solve(box, b[:3]), "b must have shape"),
        (lambda: solver.solve(box, b + torch.nan), "NaN"),
        (lambda: solver.solve(box.with_ball((2, 2), 1), b + 1), "zero on solid"),
        (lambda: solver.solve(Domain.box(2, 2), b[:2, :2], b[:3, :3]), "x0"),
        (lambda: PressureSolver(rtol=-1.0), "rtol"),
        (lambda: PressureSolver(window=-1), "window"),
    ]:
        with pytest.raises(ValueError, match=message):
            refused()
