"""Operators and resolvents of the Halpern folder: unbiased components, true constants, exact projections, bad input."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locally.equilibrium.halpern import (
    L1,
    Ball,
    BilinearSaddle,
    Box,
    Constants,
    FunctionOperator,
    LeastSquares,
    Logistic,
    MatrixGame,
    Product,
    QuadraticSaddle,
    Simplex,
    from_torch,
)


def random_operators(rng, sampling="uniform"):
    """One of each kind, with a rectangular game among them."""
    square, wide = rng.standard_normal((6, 6)), rng.standard_normal((4, 7))
    return [
        MatrixGame(square, sampling=sampling),
        MatrixGame(wide, sampling=sampling),
        BilinearSaddle(wide, b=rng.standard_normal(4), c=rng.standard_normal(7), sampling=sampling),
        QuadraticSaddle(square.T @ square, square, np.ones(6), rng.standard_normal(6), sampling=sampling),
        QuadraticSaddle(wide.T @ wide, wide, np.ones(4), np.ones(7), sampling=sampling),
        LeastSquares(wide, np.ones(4), ridge=0.3, sampling=sampling),
        Logistic(square, rng.integers(0, 2, 6), ridge=0.1, sampling=sampling),
    ]


@pytest.mark.parametrize("kind", range(7))
def test_full_is_the_operator_of_the_problem(kind):
    rng = np.random.default_rng(kind)
    op = random_operators(rng)[kind]
    u = rng.standard_normal(op.dim)

    def saddle(x, y):
        if isinstance(op, QuadraticSaddle):
            return 0.5 * x @ op.H @ x - op.h @ x - (op.A @ x - op.b) @ y
        return (op.A @ x) @ y + op.c @ x - op.b @ y

    def loss(v):
        if isinstance(op, LeastSquares):
            return np.mean((op.A @ v - op.targets) ** 2) / 2 + 0.15 * v @ v
        return np.mean(np.log1p(np.exp(-op.targets * (op.A @ v)))) + 0.05 * v @ v

    objective = loss if op.cocoercive else lambda v: saddle(*op.players(v))
    sign = np.ones(op.dim)
    if not op.cocoercive:
        sign[op.nx :] = -1
    step = 1e-6
    slope = np.array([(objective(u + step * e) - objective(u - step * e)) / (2 * step) for e in np.eye(op.dim)])
    np.testing.assert_allclose(op.full(u), sign * slope, atol=1e-7)


@pytest.mark.parametrize("op", [random_operators(np.random.default_rng(0))[kind] for kind in (0, 3, 6)])
def test_page_difference_is_unbiased(op):
    """The mean over every batch of two out of six is F(u) - F(v) exactly."""
    rng = np.random.default_rng(1)
    u, v = rng.standard_normal((2, op.dim))
    batches = [np.array(pair) for pair in combinations(range(6), 2)]
    mean = np.mean([op.diff(u, v, batch) for batch in batches], axis=0)
    np.testing.assert_allclose(mean, op.full(u) - op.full(v), atol=1e-12)
    np.testing.assert_allclose(np.mean([op.batch(u, batch) for batch in batches], axis=0), op.full(u), atol=1e-12)


@pytest.mark.parametrize("kind", range(7))
@pytest.mark.parametrize("sampling", ["uniform", "importance"])
def test_drawn_components_are_unbiased_and_obey_the_constants(kind, sampling):
    rng = np.random.default_rng(kind)
    op = random_operators(rng, sampling)[kind]
    drawn = op.draw(rng, 30_000, 1)
    kinds, counts = np.unique(drawn.reshape(len(drawn), -1), axis=0, return_counts=True)
    known = op.constants()
    for _ in range(3):
        u, v = rng.standard_normal((2, op.dim))
        each = np.array([op.diff(u, v, k.reshape(drawn.shape[1:])) for k in kinds])
        mean = counts @ each / counts.sum()
        spread = np.sqrt(counts @ (each - mean) ** 2 / counts.sum() / counts.sum())
        gap = op.full(u) - op.full(v)
        assert (np.abs(mean - gap) <= 5 * spread + 1e-12).all()
        squares = counts @ np.sum(each**2, axis=1) / counts.sum()
        assert np.linalg.norm(gap) <= known.lipschitz * np.linalg.norm(u - v) * (1 + 1e-9)
        assert squares <= 1.05 * known.expected**2 * np.sum((u - v) ** 2)  # 5 % for the finite sample
        if known.cocoercive is not None:
            assert squares <= 1.05 * known.cocoercive * (gap @ (u - v))


def test_constants_of_games_are_the_ones_in_the_paper():
    A = np.random.default_rng(0).standard_normal((9, 9))
    longest = max(np.linalg.norm(A, axis=0).max(), np.linalg.norm(A, axis=1).max())
    uniform, importance = MatrixGame(A).constants(), MatrixGame(A, sampling="importance").constants()
    assert uniform.lipschitz == pytest.approx(np.linalg.norm(A, 2))
    assert uniform.expected == pytest.approx(3 * longest)
    assert importance.expected == pytest.approx(np.linalg.norm(A))
    rows = np.random.default_rng(1).standard_normal((9, 3))
    squares = np.sum(rows**2, axis=1)
    assert LeastSquares(rows, squares).constants().cocoercive == pytest.approx(squares.max())
    assert LeastSquares(rows, squares, sampling="importance").constants().cocoercive == pytest.approx(squares.mean())


def test_expected_lipschitz_constant_is_tight_for_paired_columns():
    """For a quadratic saddle some direction attains L_Q."""
    rng = np.random.default_rng(3)
    A = rng.standard_normal((5, 5))
    op = QuadraticSaddle(A.T @ A, A, np.zeros(5), np.zeros(5))
    best = 0.0
    for i in range(5):
        E = np.eye(10)
        columns = np.stack([op.diff(E[j], np.zeros(10), np.array([i])) for j in (i, 5 + i)], axis=1)
        best = max(best, np.linalg.norm(columns, 2) ** 2 / 5)
    assert op.constants().expected ** 2 == pytest.approx(best)


def test_batches_without_replacement_are_uniform_sets():
    op = MatrixGame(np.random.default_rng(0).standard_normal((5, 5)))
    drawn = np.sort(op.draw(np.random.default_rng(2), 20_000, 2), axis=1)
    sets, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(sets) == 10
    assert (sets[:, 0] < sets[:, 1]).all()
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


@pytest.mark.parametrize("idx", [np.array([6]), np.array([-1]), np.zeros((2, 3), int), np.zeros(0, int)])
def test_indices_out_of_range_are_refused(idx):
    for op in random_operators(np.random.default_rng(0)):
        with pytest.raises(ValueError, match="idx must h"):
            op.diff(np.zeros(op.dim), np.zeros(op.dim), idx)


def test_a_rectangular_game_needs_pairs_of_indices():
    game = MatrixGame(np.ones((2, 5)))
    with pytest.raises(ValueError, match="idx must have shape"):
        game.diff(game.uniform_start(), np.zeros(7), np.array([1]))


def test_float32_stays_float32():
    A = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    game = MatrixGame(A)
    u = game.uniform_start()
    assert game.full(u).dtype == game.diff(u, u, np.array([0])).dtype == np.float32


def test_golden_simplex_projections(golden):
    data = np.load(golden / "22-halpern/halpern.npz")
    for z, expected in zip(data["Z"], data["projZ"]):
        np.testing.assert_allclose(Simplex()(z), expected, atol=1e-10)


vectors = st.lists(st.floats(-50, 50), min_size=1, max_size=30).map(np.array)


@given(z=vectors, radius=st.floats(0.01, 20))
def test_simplex_projection_is_feasible_and_optimal(z, radius):
    """The projection p is the feasible point with (z - p).(q - p) <= 0 for every vertex q."""
    p = Simplex(radius)(z)
    assert (p >= 0).all()
    assert p.sum() == pytest.approx(radius, rel=1e-12, abs=1e-12)
    assert (radius * (z - p)).max() - (z - p) @ p <= 1e-9 * max(1.0, np.abs(z).max()) * max(1.0, radius)
    np.testing.assert_allclose(Simplex(radius)(p), p, atol=1e-12 * radius + 1e-14)  # a point of the simplex stays


RESOLVENTS = [
    Simplex(2.0),
    Box(-0.5, 1.0),
    Box(np.linspace(-1, 0, 6), np.inf),
    Ball(1.5),
    Ball(0.5, np.arange(6.0)),
    L1(0.7),
    Product([(Simplex(), 3), (Ball(), 2), (L1(0.2), 1)]),
]


@pytest.mark.parametrize("J", RESOLVENTS, ids=lambda J: type(J).__name__)
@given(seed=st.integers(0, 2**32 - 1), eta=st.floats(0.1, 3))
def test_resolvents_are_firmly_nonexpansive_and_agree_with_torch(J, seed, eta):
    a, b = 2 * np.random.default_rng(seed).standard_normal((2, 6))
    before = a.copy()
    Ja, Jb = J(a, eta), J(b, eta)
    np.testing.assert_array_equal(a, before)
    assert np.sum((Ja - Jb) ** 2) <= (Ja - Jb) @ (a - b) + 1e-10
    np.testing.assert_allclose(J(torch.from_numpy(a), eta).numpy(), Ja, atol=1e-12)


def test_l1_resolvent_solves_its_inclusion():
    z = np.array([3.0, -0.2, 0.4, -5.0])
    p = L1(0.5)(z, 2.0)
    np.testing.assert_allclose(p, [2.0, 0.0, 0.0, -4.0])


def test_torch_operator_equals_the_compiled_one():
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((12, 4)), rng.standard_normal(12)
    ours = LeastSquares(A, b)
    theirs = from_torch(
        lambda x, rows, t: ((rows @ x - t) ** 2).mean() / 2,
        data=(torch.from_numpy(A), torch.from_numpy(b)),
        dim_x=4,
    )
    u, v = rng.standard_normal((2, 4))
    idx = np.array([3, 7, 1])
    np.testing.assert_allclose(theirs.full(torch.from_numpy(u)).numpy(), ours.full(u), atol=1e-12)
    found = theirs.diff(torch.from_numpy(u), torch.from_numpy(v), idx)
    np.testing.assert_allclose(found.numpy(), ours.diff(u, v, idx), atol=1e-12)


def test_torch_game_descends_for_x_and_ascends_for_y():
    rows = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    bilinear = lambda x, y, rows: (rows @ x * y).mean()
    zero_sum = from_torch(bilinear, data=rows, dim_x=2, dim_y=1)
    general = from_torch(bilinear, lambda x, y, rows: -bilinear(x, y, rows), data=rows, dim_x=2, dim_y=1)
    u = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mean = rows.mean(0)
    expected = torch.cat([3 * mean, -(mean @ u[:2])[None]])
    torch.testing.assert_close(zero_sum.full(u), expected)
    torch.testing.assert_close(general.full(u), expected)


NOT_FINITE = np.array([[1.0, np.nan], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MatrixGame(NOT_FINITE), "A holds NaN"),
        (lambda: MatrixGame(np.zeros((2, 2))), "A must not be zero"),
        (lambda: MatrixGame(np.ones(3)), "A must have shape"),
        (lambda: MatrixGame(np.ones((0, 3))), "A must not be empty"),
        (lambda: MatrixGame(np.eye(2), sampling="best"), "sampling must be one of"),
        (lambda: BilinearSaddle(np.eye(2), b=np.ones(3)), "b must have shape"),
        (lambda: BilinearSaddle(np.eye(2), resolvent=Product([(Simplex(), 3)])), "blocks cover 3 coordinates"),
        (lambda: QuadraticSaddle(-np.eye(2), np.eye(2), np.ones(2), np.ones(2)), "positive semidefinite"),
        (lambda: QuadraticSaddle(np.triu(np.ones((2, 2))), np.eye(2), np.ones(2), np.ones(2)), "H must be symmetric"),
        (lambda: QuadraticSaddle(np.eye(2), np.eye(3), np.ones(3), np.ones(2)), "A must have shape"),
        (lambda: LeastSquares(np.eye(2), np.ones(2), ridge=-1.0), "ridge must be non-negative"),
        (lambda: LeastSquares(np.zeros((2, 2)), np.ones(2)), "must not be zero"),
        (lambda: Logistic(np.eye(3), [0, 1, 2]), "y must hold the classes"),
        (lambda: FunctionOperator(lambda u, idx: u, n=0, dim=1), "n must be at least 1"),
        (lambda: Constants(-1.0, 1.0), "lipschitz must be positive"),
        (lambda: Simplex(0.0), "radius must be positive"),
        (lambda: Ball(np.nan), "radius must be positive"),
        (lambda: Box(1.0, 0.0), "lower <= upper"),
        (lambda: Box(np.nan, 0.0), "lower <= upper"),
        (lambda: L1(-1.0), "weight must be non-negative"),
        (lambda: Product([]), "blocks must hold"),
        (lambda: Box(np.zeros(2))(np.zeros(3)), "lower must be a number or have shape"),
        (lambda: from_torch(torch.sum, data=(torch.ones(2), torch.ones(3)), dim_x=1), "equal, positive lengths"),
        (lambda: from_torch(torch.sum, data=torch.ones(2), dim_x=1, L=0.0), "L must be positive"),
        (lambda: from_torch(torch.sum, torch.sum, data=torch.ones(2), dim_x=1), "loss_y needs dim_y"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MatrixGame(np.array([["a", "b"]])), "A must hold real numbers"),
        (lambda: MatrixGame(np.eye(2) * 1j), "A must hold real numbers"),
        (lambda: FunctionOperator(None, n=1, dim=1), "batch must be callable"),
        (lambda: Product([(np.abs, 2)]), "blocks must hold Resolvents"),
        (lambda: from_torch(torch.sum, data=[np.ones(3)], dim_x=1), "data must be one or several torch tensors"),
    ],
)
def test_bad_types_are_named(make, message, without_shape_checks):
    with pytest.raises(TypeError, match=message):
        make()
