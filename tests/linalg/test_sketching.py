"""Projections against their definition, contraction in expectation, every sketch against a direct solve, refusals."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from locally.linalg.sketching import (
    CountSketch,
    Gaussian,
    Kaczmarz,
    Rows,
    Sampling,
    SketchAndProject,
    SparseSketch,
    Status,
)

SKETCHES = {
    "kaczmarz, uniform": Kaczmarz(),
    "kaczmarz, norm": Kaczmarz(sampling="norm"),
    "kaczmarz, normalised": Kaczmarz(sampling="normalised"),
    "kaczmarz, cyclic": Kaczmarz(sampling="cyclic"),
    "kaczmarz, blocks": Kaczmarz(block_size=4),
    "gaussian": Gaussian(),
    "gaussian, blocks": Gaussian(block_size=8),
    "count": CountSketch(block_size=5),
    "sparse": SparseSketch(block_size=5, nonzeros=3),
}
RANDOM = {name: sketch for name, sketch in SKETCHES.items() if name != "kaczmarz, cyclic"}


def system(n: int, d: int, seed: int, condition: float = 5.0):
    """A with the given condition number, b and the solution."""
    rng = np.random.default_rng(seed)
    k = min(n, d)
    U, _ = np.linalg.qr(rng.standard_normal((n, k)))
    V, _ = np.linalg.qr(rng.standard_normal((d, k)))
    A = (U * np.geomspace(1, condition, k)) @ V.T
    x = rng.standard_normal(d)
    return A, A @ x, x


def forms(A):
    return {"array": A, "csr": sp.csr_array(A), "csc": sp.csc_array(A), "operator": aslinearoperator(A)}


def projected(A, b, x, S):
    """The step as the definition has it; S holds the rows of S^T."""
    V = S @ A
    return x - A.T @ S.T @ np.linalg.pinv(V @ V.T) @ (V @ x - S @ b)


class Fixed:
    """A sketch that is not random."""

    def __init__(self, S):
        self.S, self.block_size = S, len(S)

    def draw(self, blocks, n, rng):
        return np.tile(self.S, (blocks, 1))


@given(
    n=st.integers(1, 9),
    d=st.integers(1, 9),
    rows=st.integers(1, 12),
    rank=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(["array", "csr", "operator"]),
)
def test_a_step_is_the_projection_of_the_definition(n, d, rows, rank, seed, form):
    """Also for sketches of deficient rank and with more rows than unknowns."""
    A, b, _ = system(n, d, seed)
    rng = np.random.default_rng(seed)
    S = rng.standard_normal((rows, min(rank, rows))) @ rng.standard_normal((min(rank, rows), n))
    x0 = rng.standard_normal(d)
    found = SketchAndProject(sketch=Fixed(S), max_sketches=1, rtol=0.0, rounding=0.0).solve(forms(A)[form], b, x0)
    np.testing.assert_allclose(found.x, projected(A, b, x0, S), atol=1e-9)
    np.testing.assert_allclose(S @ (A @ found.x - b), 0, atol=1e-11 * (1 + np.abs(S).max()))


@given(n=st.integers(2, 12), d=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), sparse=st.booleans())
def test_a_sweep_projects_onto_one_row_after_the_other(n, d, seed, sparse):
    A, b, _ = system(n, d, seed)
    A[n // 2] = b[n // 2] = 0.0  # a row of zeros must do nothing
    rng = np.random.default_rng(seed)
    x, order = rng.standard_normal(d), rng.integers(n, size=3 * n)
    expected = x.copy()
    for i in order:
        if A[i].any():
            expected -= (A[i] @ expected - b[i]) / (A[i] @ A[i]) * A[i]
    rows = Rows.of(sp.csr_array(A) if sparse else A)
    assert rows.sweep(x, b, order) is x
    np.testing.assert_allclose(x, expected, atol=1e-10)


def with_long_indices(A):
    found = sp.csr_array(A)
    found.indices, found.indptr = found.indices.astype(np.int64), found.indptr.astype(np.int64)
    return found


@pytest.mark.parametrize(
    ("n", "d", "form"), [(5, 9000, np.asarray), (60, 50, sp.csr_array), (60, 50, with_long_indices)]
)
def test_a_sweep_reads_rows_of_every_length(n, d, form):
    """Sparse rows of none to 40 entries, and dense ones longer than what is asked for ahead."""
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((n, d)), rng.standard_normal(n)
    if d == 50:
        for i, row in enumerate(A):
            row[rng.permutation(d)[i % 41 :]] = 0.0
    squares = (A**2).sum(axis=1)
    rows = Rows.of(form(A))
    for order in (None, rng.permutation(n)):
        expected = np.zeros(d)
        for i in range(n) if order is None else order:
            if squares[i]:
                expected -= (A[i] @ expected - b[i]) / squares[i] * A[i]
        np.testing.assert_allclose(rows.sweep(np.zeros(d), b, order), expected, atol=1e-11)


@pytest.mark.parametrize("name", SKETCHES)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 15), d=st.integers(1, 15))
def test_the_error_never_grows(name, seed, n, d):
    """Every step is an orthogonal projection onto a set that holds the solution."""
    A, b, x_star = system(n, d, seed)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(d)
    one = SketchAndProject(sketch=SKETCHES[name], max_sketches=1, rtol=0.0, rounding=0.0, random_state=rng)
    before = np.linalg.norm(x - x_star)
    for _ in range(5):
        x = one.solve(A, b, x).x
        after = np.linalg.norm(x - x_star)
        assert after <= before + 1e-9
        before = after


@pytest.mark.parametrize("name", RANDOM)
def test_one_step_contracts_in_expectation_as_the_theory_says(name):
    """Mean of ||x_1 - x*||^2 over draws against e0 . (I - E[P]) e0, E[P] by its own formula or its own draws."""
    A, b, x_star = system(7, 7, 3)
    sketch = RANDOM[name]
    n, draws = 7, 2000
    e0 = np.random.default_rng(1).standard_normal(7)
    squares = (A**2).sum(axis=1)
    if isinstance(sketch, Kaczmarz) and sketch.block_size == 1:
        weights = squares / squares.sum() if sketch.sampling == Sampling.NORM else np.full(n, 1 / n)
        expected_P = (A * (weights / squares)[:, None]).T @ A
        if sketch.sampling == Sampling.NORM:
            np.testing.assert_allclose(expected_P, A.T @ A / squares.sum())  # Strohmer and Vershynin
    else:
        rng = np.random.default_rng(2)
        expected_P = np.zeros((n, n))
        for _ in range(draws):
            if isinstance(sketch, Kaczmarz):
                V = A[rng.integers(n, size=sketch.block_size)]
            else:
                V = sketch.draw(1, n, rng) @ A
            expected_P += np.linalg.pinv(V) @ V / draws
    errors = np.empty(draws)
    one = SketchAndProject(sketch=sketch, max_sketches=1, rtol=0.0, rounding=0.0, random_state=np.random.default_rng(5))
    for t in range(draws):
        errors[t] = np.sum((one.solve(A, b, x_star + e0).x - x_star) ** 2)
    expected = e0 @ (np.eye(n) - expected_P) @ e0
    assert errors.mean() == pytest.approx(expected, abs=6 * errors.std() / np.sqrt(draws) + 1e-12)


def test_kaczmarz_converges_at_the_rate_of_strohmer_and_vershynin():
    """E||x_t - x*||^2 <= (1 - sigma_min^2 / ||A||_F^2)^t ||x_0 - x*||^2, over 200 runs."""
    A, b, x_star = system(30, 10, 0)
    rate = 1 - 1 / np.sum(A**2)  # the smallest singular value is 1
    rng = np.random.default_rng(0)
    run = SketchAndProject(sketch=Kaczmarz(sampling="norm"), max_sketches=400, rtol=0.0, rounding=0.0, random_state=rng)
    errors = [np.sum((run.solve(A, b).x - x_star) ** 2) for _ in range(200)]
    assert np.mean(errors) <= rate**400 * (x_star @ x_star)


FITTING = [
    (name, form)
    for name, sketch in SKETCHES.items()
    for form in ("array", "csr", "csc", "operator")
    if form != "operator" or not isinstance(sketch, Kaczmarz)  # an operator has no rows
]


@pytest.mark.parametrize(("name", "form"), FITTING)
@pytest.mark.parametrize("shape", [(12, 12), (40, 12)])
def test_every_sketch_solves(name, form, shape):
    sketch = SKETCHES[name]
    A, b, x = system(*shape, seed=4)
    found = SketchAndProject(sketch=sketch, rtol=1e-9).solve(forms(A)[form], b)
    assert found.status is Status.CONVERGED
    assert found.residual_norm <= 1e-9 * np.linalg.norm(b) * (2 if name.endswith("normalised") else 1)
    np.testing.assert_allclose(found.x, x, atol=1e-7)


def test_many_solutions_give_the_one_nearest_to_the_start():
    A, b, _ = system(6, 15, 8)
    x0 = np.random.default_rng(0).standard_normal(15)
    for sketch in SKETCHES.values():
        found = SketchAndProject(sketch=sketch, rtol=1e-11).solve(A, b, x0)
        np.testing.assert_allclose(found.x, x0 + np.linalg.pinv(A) @ (b - A @ x0), atol=1e-8)


def test_normalised_sampling_does_not_depend_on_the_lengths_of_the_rows():
    A, b, _ = system(20, 8, 0)
    scale = np.geomspace(1e-6, 1e6, 20)
    solver = SketchAndProject(sketch=Kaczmarz(sampling="normalised"), rtol=1e-8)
    for matrix in (lambda M: M, sp.csr_array):
        plain = solver.solve(matrix(A), b)
        scaled = solver.solve(matrix(scale[:, None] * A), scale * b)
        assert plain.sketches == scaled.sketches
        np.testing.assert_allclose(plain.x, scaled.x, rtol=1e-9)


def test_norm_sampling_draws_rows_by_their_squared_length():
    squares = np.array([1.0, 0.0, 3.0, 4.0])
    rows = Kaczmarz(sampling="norm").rows(40_000, squares, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(rows, minlength=4) / 40_000, squares / 8, atol=0.01)
    assert (rows != 1).all()


@pytest.mark.parametrize("sketch", [CountSketch(block_size=3), SparseSketch(block_size=3, nonzeros=4)])
def test_sparse_sketches_have_the_entries_that_they_promise(sketch):
    S = sketch.draw(2, 50, np.random.default_rng(0))
    assert S.shape == (6, 50)
    if isinstance(sketch, CountSketch):  # in every block each row of A goes to one bucket with a sign
        for block in (S[:3], S[3:]):
            np.testing.assert_array_equal(abs(block).sum(axis=0), 1)
    else:
        np.testing.assert_array_equal(np.diff(S.indptr), 4)
        assert set(np.abs(S.data)) == {1.0}


def test_same_seed_same_iterate_and_a_generator_moves_on():
    A, b, _ = system(20, 20, 0)
    solver = lambda state: SketchAndProject(max_sketches=50, rtol=0.0, random_state=state)
    np.testing.assert_array_equal(solver(3).solve(A, b).x, solver(3).solve(A, b).x)
    rng = np.random.default_rng(3)
    first = solver(rng).solve(A, b).x
    np.testing.assert_array_equal(first, solver(3).solve(A, b).x)
    assert not np.array_equal(first, solver(rng).solve(A, b).x)


def test_multiplications_are_counted_by_entries_read():
    A, b, _ = system(10, 6, 0)
    sparse = sp.csr_array(np.where(np.arange(6) < 2, A, 0.0))
    b_sparse = sparse @ np.ones(6)
    run = lambda sketch, M, rhs: SketchAndProject(sketch=sketch, max_sketches=7, rtol=0.0, rounding=0.0).solve(M, rhs)
    assert run(Kaczmarz(), A, b).multiplications == 7 * 2 * 6
    assert run(Kaczmarz(), sparse, b_sparse).multiplications == 7 * 2 * 2
    assert run(Gaussian(block_size=3), A, b).multiplications == 7 * 3 * 60
    assert run(CountSketch(block_size=3), A, b).multiplications == 7 * 60
    assert run(SparseSketch(block_size=3, nonzeros=2), sparse, b_sparse).multiplications == 7 * 6 * 2


def test_an_inconsistent_system_ends_at_the_limit():
    A, b, _ = system(30, 5, 0)
    found = SketchAndProject(max_sketches=5000).solve(A, b + np.random.default_rng(0).standard_normal(30))
    assert found.status is Status.SKETCH_LIMIT
    assert found.sketches == 5000


def test_a_tolerance_below_rounding_ends_there():
    A, b, _ = system(12, 12, 0)
    found = SketchAndProject(rtol=0.0, max_sketches=10**7).solve(A, b)
    assert found.status is Status.ROUNDING
    assert found.residual_norm <= 1e-14 * np.linalg.norm(A) * np.linalg.norm(found.x)


def test_the_norm_of_an_operator_makes_rounding_known():
    A, b, _ = system(12, 12, 0)
    solver = SketchAndProject(sketch=Gaussian(block_size=6), rtol=0.0, max_sketches=5000)
    operator = aslinearoperator(A)
    assert solver.solve(operator, b).status is Status.SKETCH_LIMIT
    assert solver.solve(operator, b, norm=float(np.linalg.norm(A))).status is Status.ROUNDING


def test_overflow_ends_the_solve():
    A = np.full((3, 3), 1e200) + np.diag([1e200, 2e200, 3e200])
    assert SketchAndProject(sketch=Kaczmarz()).solve(A, np.full(3, 1e200)).status is Status.NOT_FINITE
    bad = LinearOperator((3, 3), matvec=lambda v: v * np.nan, rmatvec=lambda v: v * np.nan, dtype=float)
    assert SketchAndProject(sketch=Gaussian()).solve(bad, np.ones(3)).status is Status.NOT_FINITE


def test_nothing_to_do():
    A, b, x = system(5, 5, 0)
    found = SketchAndProject().solve(A, b, x)
    assert (found.status, found.sketches) == (Status.CONVERGED, 0)
    zero = SketchAndProject().solve(A, np.zeros(5))
    assert zero.status is Status.CONVERGED
    assert not zero.x.any()


def test_callers_arrays_stay_as_they_were_and_the_callback_may_stop():
    A, b, x = system(30, 30, 0)
    start = x + 1
    kept = [a.copy() for a in (A, b, start)]
    seen = []

    def callback(sketches, residual):
        seen.append((sketches, residual))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SketchAndProject(sketch=Gaussian(), rtol=1e-12).solve(A, b, start, callback)
    assert [s for s, _ in seen] == sorted({s for s, _ in seen})
    for before, after in zip(kept, (A, b, start)):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"sketch": "gaussian"}, TypeError, "sketch"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"atol": np.nan}, ValueError, "atol"),
        ({"max_sketches": 0}, ValueError, "max_sketches"),
        ({"rounding": -1.0}, ValueError, "rounding"),
    ],
)
def test_a_bad_hyper_parameter_is_named(change, error, named):
    with pytest.raises(error, match=named):
        SketchAndProject(**change)


@pytest.mark.parametrize("make", [Kaczmarz, Gaussian, CountSketch, SparseSketch])
def test_a_sketch_has_at_least_one_row(make):
    with pytest.raises(ValueError, match="block_size"):
        make(block_size=0)
    with pytest.raises(TypeError, match="block_size"):
        make(block_size=1.5)


def test_an_unknown_sampling_is_named():
    with pytest.raises(ValueError, match="sampling must be one of 'uniform', 'norm'"):
        Kaczmarz(sampling="rows")


@pytest.mark.parametrize(
    ("A", "b", "x0", "error", "named"),
    [
        (np.ones((3, 2)), np.ones(2), None, ValueError, "b must have shape"),
        (np.ones((3, 2)), np.ones(3), np.ones(3), ValueError, "x0 must have shape"),
        (np.ones(3), np.ones(3), None, ValueError, "A must have shape"),
        (np.full((2, 2), np.nan), np.ones(2), None, ValueError, "A holds NaN"),
        (sp.csr_array(np.diag([1.0, np.inf])), np.ones(2), None, ValueError, "A holds NaN"),
        (np.eye(2), np.array([1.0, np.nan]), None, ValueError, "b holds NaN"),
        (np.eye(2), np.ones(2), np.array([np.inf, 0]), ValueError, "x0 holds NaN"),
        (np.eye(2) * 1j, np.ones(2), None, TypeError, "real"),
        (aslinearoperator(np.eye(2)), np.ones(2), None, TypeError, "rows can be read"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_a_bad_system_is_named(A, b, x0, error, named):
    with pytest.raises(error, match=named):
        SketchAndProject(sketch=Kaczmarz()).solve(A, b, x0)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_sweep_refuses_rows_that_are_not_there():
    rows = Rows.of(np.eye(3))
    with pytest.raises(ValueError, match="order must hold row numbers from 0 to 2"):
        rows.sweep(np.zeros(3), np.ones(3), np.array([0, 3]))
    with pytest.raises(ValueError, match="x must have shape"):
        rows.sweep(np.zeros(2), np.ones(3))
