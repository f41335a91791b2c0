"""Optimal control of the Poisson equation on a grid: a large sparse linear-quadratic problem."""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.linalg import LinearOperator

from locally.checks import check_count
from locally.optimize.constrained.problem import EqualityProblem
from locally.optimize.constrained.problems.instance import Instance

CONTROL_COST = 0.1


def poisson_control(side: int, *, operators: bool = False) -> Instance:
    """min 1/2 ||w - w_d||^2 + 0.05 ||z||^2 subject to Lap w + z = 0 on a side x side grid, zero boundary.

    x = (w, z), n = 2 side^2, m = side^2; the start is all ones. The Laplacian is the five-point stencil with mesh width
    2 / (side + 1). Source: experiments of arXiv 2305.18379.

    Args:
        side: interior points along each side.
        operators: give Hessian and Jacobian as operators, which store nothing, instead of sparse matrices.

    >>> instance = poisson_control(3)
    >>> instance.problem.n, instance.problem.m
    (18, 9)
    """
    check_count("side", side)
    points = side**2
    wanted = desired_state(side)
    weights = np.repeat([1.0, CONTROL_COST], points)
    if operators:
        weigh = lambda v: (weights * v.T).T
        H = both_ways((2 * points, 2 * points), weigh, weigh)
        G = both_ways(
            (points, 2 * points),
            lambda v: laplace(v[:points], side) + v[points:],
            lambda v: np.concatenate([laplace(v, side), v]),
        )
    else:
        H = sp.diags_array(weights, format="csr")
        second = sp.diags_array([1.0, -2.0, 1.0], offsets=[-1, 0, 1], shape=(side, side)) * ((side + 1) / 2) ** 2
        G = sp.hstack([sp.kronsum(second, second), sp.eye_array(points)], format="csr")
    target = np.concatenate([wanted, np.zeros(points)])
    problem = EqualityProblem(
        n=2 * points,
        m=points,
        fun=lambda x: float(weights @ (x - target) ** 2) / 2,
        grad=lambda x: weights * (x - target),
        constr=lambda x: G @ x,
        jac=lambda x: G,
        hess=lambda x, lam: H,
    )
    return Instance(f"Poisson control, {side} x {side}", problem, np.ones(2 * points), np.ones(points))


def desired_state(side: int) -> Float[ndarray, " points"]:
    """w_d(i, j), column by column."""
    offset = 0.1 / np.sqrt(15) * (np.arange(1, side + 1) - (side + 1) / 2)
    return (np.sin(4 + offset)[:, None] + np.cos(3 + offset)).ravel(order="F")


def both_ways(
    shape: tuple[int, int], forward: Callable[[ndarray], ndarray], backward: Callable[[ndarray], ndarray]
) -> LinearOperator:
    """Products with vectors and with matrices, and those of the transpose, by one function each."""
    return LinearOperator(shape, matvec=forward, matmat=forward, rmatvec=backward, rmatmat=backward, dtype=float)


def laplace(w: Float[ndarray, "points *columns"], side: int) -> Float[ndarray, "points *columns"]:
    """The stencil without its matrix, of every column."""
    grid = np.pad(w.reshape(side, side, -1), ((1, 1), (1, 1), (0, 0)))
    around = grid[:-2, 1:-1] + grid[2:, 1:-1] + grid[1:-1, :-2] + grid[1:-1, 2:]
    return (((side + 1) / 2) ** 2 * (around - 4 * grid[1:-1, 1:-1])).reshape(w.shape)
