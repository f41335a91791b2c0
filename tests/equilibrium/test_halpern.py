"""Variance-reduced Halpern iteration: golden iterates, the theorems' bounds, honest counts, failures, bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, nnls

from locally.equilibrium.halpern import (
    AnchoredExtragradient,
    Ball,
    BilinearSaddle,
    Box,
    Constants,
    Extragradient,
    FunctionOperator,
    Halpern,
    InexactHalpern,
    LeastSquares,
    Logistic,
    MatrixGame,
    Product,
    QuadraticSaddle,
    SingleLoopHalpern,
    Status,
    Unconstrained,
    VarianceReducedExtragradient,
    VRFoRB,
    from_torch,
    vr_halpern,
)
from locally.equilibrium.halpern.ledger import Ledger
from locally.equilibrium.halpern.stepping import CompiledSteps, PlainSteps, bind, steps_for

ROTATION = np.array([[0.0, 1.0], [-1.0, 0.0]])
ALL_SOLVERS = [
    SingleLoopHalpern(random_state=0),
    InexactHalpern(random_state=0),
    Halpern(),
    Extragradient(),
    AnchoredExtragradient(),
    VarianceReducedExtragradient(random_state=0),
]
names = lambda value: type(value).__name__


@pytest.fixture(scope="module")
def data(request):
    return np.load(request.config.rootpath / "tests/golden/22-halpern/halpern.npz")


def replay(op, u0, eta, full, batches):
    """Algorithm 1 for given coins and batches: full[k] says whether step k evaluates all of F."""
    steps = steps_for(op, op.resolvent or Unconstrained())
    anchor = u = before = np.array(u0)
    estimate, points = None, [u]
    for k, refresh in enumerate(full):
        if refresh:
            estimate = op.full(u)
            before, (u, _) = u, steps.anchored(anchor, u, estimate, k, eta)
        else:
            u, before, estimate, _ = steps.halpern(anchor, u, before, estimate, k, eta, batches[k : k + 1])
        points.append(u)
    return np.array(points)


def plain(op):
    """The same operator without its compiled form."""
    return FunctionOperator(
        op.batch, n=op.n, dim=op.dim, full=op.full, constants=op.constants(), cocoercive=op.cocoercive,
        resolvent=op.resolvent,
    )  # fmt: skip


def test_golden_iterates_of_algorithm_1_on_a_game(data):
    game = MatrixGame(data["A"])
    found = replay(game, np.concatenate([data["x0"], data["y0"]]), float(data["eta"]), data["full"], data["batches"])
    np.testing.assert_allclose(found, data["U"], atol=1e-10)


def test_golden_iterates_of_algorithm_1_on_least_squares(data):
    op = LeastSquares(data["ls_A"], data["ls_b"])
    found = replay(op, data["ls_U"][0], float(data["ls_eta"]), data["ls_full"], data["ls_batches"])
    np.testing.assert_allclose(found, data["ls_U"], atol=1e-10)


def test_golden_vr_forb(data):
    """Every iterate of one inner run, and its distance to the exact resolvent."""
    game, u, eta, tau = MatrixGame(data["A"]), data["forb_u"], float(data["forb_c"]), float(data["forb_tau"])
    inner, limits = VRFoRB(), InexactHalpern(max_epochs=1e6)
    for steps in range(1, 81):
        ledger = Ledger(limits, game, game.resolvent, None)
        drawn, heads = data["forb_idx"][:steps, None], data["forb_toss"][:steps]
        v, _ = inner.run(ledger, game, u, game.full(u), eta, tau, drawn, heads)
        np.testing.assert_allclose(v, data["forb_V"][steps], atol=1e-10)
        assert ledger.evaluations == 2 * steps + 12 * heads[:-1].sum()  # a snapshot after the last step is not needed
    assert np.linalg.norm(v - data["resolvent"]) < 0.05 * np.linalg.norm(u - data["resolvent"])


def test_vr_forb_converges_linearly_to_the_exact_resolvent(data):
    game, u, eta = MatrixGame(data["A"]), data["forb_u"], float(data["forb_c"])
    errors = []
    for steps in (100, 400, 1600):
        v = VRFoRB().approximate(game, u, eta=eta, steps=steps, random_state=0)
        errors.append(np.linalg.norm(v - data["resolvent"]))
    assert errors[1] < errors[0] / 2
    assert errors[2] < 1e-6


def test_vr_forb_stays_at_the_exact_resolvent(data):
    """v = w = J(u) is a fixed point whatever component is drawn."""
    game, u, eta, exact = MatrixGame(data["A"]), data["forb_u"], float(data["forb_c"]), data["resolvent"]
    every = np.arange(12)[:, None]
    v, _ = steps_for(game, game.resolvent).forb(u, exact, exact, exact, game.full(exact), eta, 0.06, 11 / 12, every)
    np.testing.assert_allclose(v, exact, atol=1e-7)  # the golden resolvent is accurate to 1e-8


@pytest.mark.parametrize("sampling", ["uniform", "importance"])
@pytest.mark.parametrize("kind", ["game", "rectangular game", "quadratic", "least squares", "logistic"])
def test_compiled_steps_equal_plain_steps(kind, sampling):
    rng = np.random.default_rng(5)
    A = rng.standard_normal((8, 8))
    op = {
        "game": lambda: MatrixGame(A, sampling=sampling),
        "rectangular game": lambda: MatrixGame(A[:5], sampling=sampling),
        "quadratic": lambda: QuadraticSaddle(A.T @ A, A, A[0], A[1], sampling=sampling, resolvent=Box(-1.0, 1.0)),
        "least squares": lambda: LeastSquares(A, A[0], ridge=0.1, sampling=sampling),
        "logistic": lambda: Logistic(A, A[0] > 0, ridge=0.1, sampling=sampling),
    }[kind]()
    J = op.resolvent or Unconstrained()
    fast, slow = steps_for(op, J), PlainSteps(op, bind(J, op))
    assert isinstance(fast, CompiledSteps)
    drawn = op.draw(rng, 20, 2)
    a, b, c, d = 0.3 * rng.standard_normal((4, op.dim))
    kept = [x.copy() for x in (a, b, c, d)]
    for run in (
        lambda s: s.anchored(a, b, c, 3, 0.05),
        lambda s: s.halpern(a, b, c, d, 3, 0.05, drawn),
        lambda s: s.forb(a, b, c, d, op.full(c), 0.4, 0.05, 0.8, drawn),
        lambda s: s.extragradient(a, b, op.full(b), 0.05, 0.8, drawn),
    ):
        for ours, reference in zip(run(fast), run(slow), strict=True):
            np.testing.assert_allclose(ours, reference, atol=1e-11)
    for now, before in zip((a, b, c, d), kept):
        np.testing.assert_array_equal(now, before)


def test_full_refresh_at_every_step_is_deterministic_halpern():
    A = np.random.default_rng(0).standard_normal((40, 5))
    op, u0 = LeastSquares(A, A[:, 0]), np.ones(5)
    ours = SingleLoopHalpern(refresh=1.0, eta=0.05, tol=0.0, max_epochs=50).solve(op, u0)
    theirs = Halpern(eta=0.05, tol=0.0, max_epochs=50).solve(op, u0)
    np.testing.assert_array_equal(ours.x, theirs.x)
    assert ours.evaluations == theirs.evaluations == 50 * 40


@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 200))
def test_deterministic_halpern_falls_like_one_over_the_steps(seed, steps):
    """||F(u_k)|| <= 4 L D / (k + 1) on random symmetric operators with L = 1, at every k."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    H = (Q * rng.random(6)) @ Q.T
    op = FunctionOperator(lambda u, idx: H @ u, n=1, dim=6, constants=Constants(1.0, 1.0, 1.0), cocoercive=True)
    u0 = rng.standard_normal(6)
    found = Halpern(tol=0.0, max_epochs=math.inf, max_iterations=steps).solve(op, u0)
    assert found.iterations == steps
    assert found.residual <= 4 * np.linalg.norm(u0) / (steps + 1)


@pytest.mark.parametrize(("eta", "inner_length"), [(0.3, 100.0), (3.0, 200.0)])
def test_inexact_halpern_meets_the_last_iterate_bound(eta, inner_length):
    """With accurate inner solves ||u_k - J(u_k)|| <= 2 D / (k + 1), J the resolvent of a rotation, at every k."""
    op = BilinearSaddle([[1.0]])  # F(x, y) = (y, -x)
    J = np.linalg.inv(np.eye(2) + eta * ROTATION)
    seen = []
    solver = InexactHalpern(
        eta=eta, inner_length=inner_length, tol=0.0, max_epochs=math.inf, max_iterations=25, random_state=0
    )
    solver.solve(op, np.array([1.0, 0.0]), callback=seen.append)
    u = u0 = np.array([1.0, 0.0])
    for k, progress in enumerate(seen[1:]):
        np.testing.assert_allclose(progress.x, J @ u, atol=1e-3 / (k + 1))
        assert np.linalg.norm(u - J @ u) <= 2 / (k + 1)
        u = u0 / (k + 2) + (1 - 1 / (k + 2)) * progress.x
    assert k == 24


def test_mean_residual_stays_under_the_theorems_bound():
    """E ||F(u_k) + g_k|| <= 16 L ||u0 - u*|| / k with G the normal cone of the non-negative orthant."""
    rng = np.random.default_rng(0)
    A, solution = rng.standard_normal((100, 8)), np.maximum(rng.standard_normal(8), 0)
    op = LeastSquares(A, A @ solution)
    L, distance = op.constants().cocoercive, np.linalg.norm(solution)
    for k in (5, 20, 80, 300):
        solver = SingleLoopHalpern(tol=0.0, max_epochs=1e9, max_iterations=k, random_state=rng)
        found = [solver.solve(op, np.zeros(8), resolvent=Box(0.0)) for _ in range(10)]
        assert {f.iterations for f in found} == {k}
        assert np.mean([f.inclusion_residual for f in found]) <= 16 * L * distance / k
        assert all(f.residual <= f.inclusion_residual * (1 + 1e-12) for f in found)


def test_evaluations_grow_like_the_root_of_the_components():
    """Evaluations per step in the tail: n p + 2 b (1 - p) for p = 4 / (sqrt(n) + 5), counted as they are made."""
    n, made = 400, 0
    A = np.random.default_rng(0).standard_normal((n, 3))
    op = LeastSquares(A, A[:, 0])

    def count(size):
        nonlocal made
        made += size

    counted = FunctionOperator(
        lambda u, idx: (count(len(idx)), op.batch(u, idx))[1], n=n, dim=3, constants=op.constants(), cocoercive=True
    )
    found = SingleLoopHalpern(tol=0.0, max_epochs=600, random_state=0).solve(counted, np.ones(3))
    assert found.evaluations == made <= 600 * n
    compiled = SingleLoopHalpern(tol=0.0, max_epochs=600, random_state=0).solve(op, np.ones(3))
    assert (compiled.evaluations, compiled.iterations) == (found.evaluations, found.iterations)
    np.testing.assert_allclose(compiled.x, found.x, atol=1e-10)
    p, b = 4 / (math.sqrt(n) + 5), 20
    tail = [r for r in compiled.history if r[0] > 100 * n]
    steps = (found.evaluations - n * len(compiled.history)) / (2 * b)  # corrected steps, all told
    assert steps / found.iterations == pytest.approx(1 - p, abs=0.03)
    assert len(tail) > 300


@pytest.mark.parametrize("solver", ALL_SOLVERS, ids=names)
def test_every_solver_counts_what_it_evaluates_and_keeps_its_budget(solver):
    A = np.random.default_rng(1).standard_normal((12, 4))
    op, made = LeastSquares(A, A[:, 0], ridge=0.1), 0

    def batch(u, idx):
        nonlocal made
        made += len(idx)
        return op.batch(u, idx)

    counted = FunctionOperator(batch, n=12, dim=4, constants=op.constants(), cocoercive=True)
    for max_epochs in (2, 3.5, 40, 200):
        made = 0
        found = type(solver)(**vars(solver) | {"max_epochs": max_epochs, "tol": 0.0}).solve(counted, np.ones(4))
        assert found.evaluations == made <= max_epochs * 12
        assert found.status is Status.BUDGET_SPENT


@pytest.mark.parametrize("solver", ALL_SOLVERS, ids=names)
def test_reported_residual_is_the_true_one(solver):
    rng = np.random.default_rng(2)
    A = rng.standard_normal((30, 6))
    op = LeastSquares(A, rng.standard_normal(30))
    solver = type(solver)(**vars(solver) | {"max_epochs": 60, "residual_step": 0.5})
    seen = []
    found = solver.solve(op, np.ones(6), resolvent=Box(0.0, 0.3), callback=seen.append)
    again = lambda x: np.linalg.norm(x - np.clip(x - 0.5 * op.full(x), 0.0, 0.3)) / 0.5
    assert found.residual == pytest.approx(again(found.x), rel=1e-10)
    assert len(seen) == len(found.history) > 2
    for progress, (evaluations, residual) in zip(seen, found.history):
        assert (progress.evaluations, progress.residual) == (evaluations, residual)
        assert residual == pytest.approx(again(progress.x), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize(
    "solver",
    [
        SingleLoopHalpern(restart=True, multiplier=4.0, random_state=0, tol=1e-7),
        InexactHalpern(restart=True, random_state=0, tol=1e-4, max_epochs=4000),
        Extragradient(tol=1e-7),
        VarianceReducedExtragradient(random_state=0, tol=1e-7),
    ],
    ids=names,
)
def test_non_negative_least_squares_agrees_with_scipy(solver):
    rng = np.random.default_rng(3)
    A, b = rng.standard_normal((60, 4)), rng.standard_normal(60)
    found = solver.solve(LeastSquares(A, b), np.zeros(4), resolvent=Box(0.0))
    assert found.success
    np.testing.assert_allclose(found.x, nnls(A, b)[0], atol=10 * solver.tol)


@pytest.mark.parametrize("shape", [(15, 15), (8, 20)])
def test_games_agree_with_linear_programming(shape):
    A = np.random.default_rng(4).random(shape)
    rows, columns = shape
    value = linprog(
        np.append(np.zeros(columns), 1.0),
        A_ub=np.column_stack([A, -np.ones(rows)]),
        b_ub=np.zeros(rows),
        A_eq=np.append(np.ones(columns), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * columns + [(None, None)],
    ).fun
    game = MatrixGame(A, sampling="importance")
    found = vr_halpern(game, game.uniform_start(), tol=5e-3, restart=True, max_epochs=20_000, random_state=0)
    assert found.success
    x, y = game.players(found.x)
    assert min(x.min(), y.min()) >= 0
    assert x.sum() == pytest.approx(1, abs=1e-12)
    assert y.sum() == pytest.approx(1, abs=1e-12)
    low, high = game.value_bounds(found.x)
    assert low - 1e-9 <= value <= high + 1e-9
    assert game.gap(found.x) <= found.residual * (2 + 2 * math.sqrt(2))  # residual times the players' diameters
    assert abs(y @ A @ x - value) <= found.residual * (2 + 2 * math.sqrt(2))


def test_rotation_diverges_without_cocoercivity_and_converges_inexactly():
    """On the pure rotation a step of Algorithm 1 with eta = 1/2 stretches by sqrt(5/4)."""
    op = FunctionOperator(lambda u, idx: ROTATION @ u, n=1, dim=2, constants=Constants(1.0, 1.0))
    with pytest.warns(UserWarning, match="not known to be cocoercive"):
        failed = SingleLoopHalpern(eta=0.5).solve(op, np.array([1.0, 0.0]))
    assert failed.status is Status.DIVERGING
    assert not failed.success
    growth = failed.history[-1, 1] / failed.history[-2, 1]
    assert growth == pytest.approx(math.sqrt(1.25), rel=0.05)
    solved = InexactHalpern(tol=4e-2, random_state=0).solve(op, np.array([1.0, 0.0]))
    assert solved.success
    assert np.linalg.norm(solved.x) <= 4e-2 * (1 + 1e-9)


def test_a_long_step_on_a_cocoercive_problem_ends_as_diverging():
    A = np.random.default_rng(0).standard_normal((50, 5))
    found = SingleLoopHalpern(eta=5.0, random_state=0).solve(LeastSquares(A, A[:, 0]), np.zeros(5))
    assert found.status is Status.DIVERGING


def test_inexact_halpern_covers_a_weakly_nonmonotone_operator():
    """F = R - I / 10 is co-hypomonotone: a forward method drifts away from 0, the resolvent does not."""
    M = ROTATION - 0.1 * np.eye(2)
    op = FunctionOperator(lambda u, idx: M @ u, n=1, dim=2, constants=Constants(np.linalg.norm(M, 2), 1.01))
    u0 = np.array([1.0, 0.0])
    away = Extragradient(eta=0.05, max_epochs=4000).solve(op, u0)
    assert away.residual > away.history[0, 1]
    assert InexactHalpern(random_state=0, inner_length=10.0, tol=4e-2, max_epochs=4000).solve(op, u0).success


@pytest.mark.parametrize(
    "make", [lambda r: SingleLoopHalpern(restart=r, multiplier=4.0, tol=1e-8, random_state=0, max_epochs=3000)]
)
def test_restarts_make_convergence_linear_on_a_sharp_problem(make):
    A = np.random.default_rng(6).standard_normal((300, 5))
    op, u0 = LeastSquares(A, A @ np.arange(5.0)), np.zeros(5)
    restarted, once = make(True).solve(op, u0), make(False).solve(op, u0)
    assert restarted.success
    assert not once.success
    assert restarted.restarts >= 20  # one for each halving on the way from about 1 to 1e-8
    assert once.restarts == 0
    halfway = restarted.evaluations_to(math.sqrt(1e-8 * restarted.history[0, 1]))
    assert restarted.evaluations <= 3 * halfway  # twice the digits at about twice the cost


def test_inexact_restarts_help_on_a_sharp_saddle():
    A = np.array([[2.0, 0.3], [0.1, 1.5]])
    saddle = BilinearSaddle(A, b=[1.0, 2.0], c=[-1.0, 1.0])
    options = {"inner": VRFoRB(step=1.0), "tol": 0.0, "max_epochs": 2500, "random_state": 0}
    restarted = InexactHalpern(restart=True, **options).solve(saddle, np.zeros(4))
    once = InexactHalpern(**options).solve(saddle, np.zeros(4))
    assert restarted.residual < once.residual / 100
    np.testing.assert_allclose(restarted.x[:2], np.linalg.solve(A, [1.0, 2.0]), atol=0.01)


def test_same_seed_same_result_and_another_seed_another():
    game = MatrixGame(np.random.default_rng(0).standard_normal((20, 20)))
    run = lambda seed: vr_halpern(game, game.uniform_start(), max_epochs=50, random_state=seed).x
    np.testing.assert_array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))


def test_the_start_is_left_alone():
    game = MatrixGame(np.random.default_rng(0).standard_normal((20, 20)))
    for solver in ALL_SOLVERS[1:2] + ALL_SOLVERS[3:]:
        u0 = game.uniform_start()
        solver.solve(game, u0)
        np.testing.assert_array_equal(u0, game.uniform_start())


def test_a_callback_can_stop_a_run():
    A = np.random.default_rng(0).standard_normal((50, 5))
    found = SingleLoopHalpern(random_state=0).solve(
        LeastSquares(A, A[:, 0]), np.zeros(5), callback=lambda progress: progress.iteration >= 10
    )
    assert found.status is Status.STOPPED
    assert 10 <= found.iterations < 60


def test_auto_chooses_by_cocoercivity(recwarn):
    A = np.random.default_rng(0).standard_normal((16, 4))
    smooth, game = LeastSquares(A, A[:, 0]), MatrixGame(A)
    for op, u0, solver in (
        (smooth, np.zeros(4), SingleLoopHalpern(max_epochs=20, random_state=0)),
        (game, game.uniform_start(), InexactHalpern(max_epochs=20, random_state=0)),
    ):
        found = vr_halpern(op, u0, max_epochs=20, random_state=0)
        np.testing.assert_array_equal(found.x, solver.solve(op, u0).x)
    assert not recwarn.list


def test_start_at_a_solution_costs_one_evaluation():
    op = LeastSquares(np.eye(9), np.ones(9))
    found = SingleLoopHalpern(random_state=0).solve(op, np.ones(9))
    assert (found.status, found.evaluations, found.iterations) == (Status.CONVERGED, 9, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_tensors_go_in_and_come_out(dtype):
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((40, 3)), rng.standard_normal(40)
    op = from_torch(
        lambda x, rows, t: ((rows @ x - t) ** 2).mean() / 2,
        data=(torch.tensor(A, dtype=dtype), torch.tensor(b, dtype=dtype)),
        dim_x=3,
        L=float(np.max(np.sum(A**2, axis=1))),
        cocoercive=True,
    )
    solver = SingleLoopHalpern(max_epochs=40, tol=1e-5, multiplier=4.0, restart=True, random_state=0)
    found = solver.solve(op, torch.zeros(3, dtype=dtype))
    reference = solver.solve(LeastSquares(A, b), np.zeros(3))
    assert isinstance(found.x, torch.Tensor)
    assert found.x.dtype == dtype
    assert found.evaluations == reference.evaluations
    np.testing.assert_allclose(found.x.numpy(), reference.x, atol=1e-4 if dtype == torch.float32 else 1e-10)


def test_adversarial_regression_in_torch_reaches_an_equilibrium():
    """Regression against a bounded shift of the inputs: a saddle point on a product of sets, from losses alone."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    t = X @ torch.tensor([1.0, -1.0], dtype=torch.float64)

    def loss(w, shift, X, t):
        return ((X @ w - t) ** 2).mean() / 2 + w @ shift - (shift @ shift) / 2

    op = from_torch(loss, data=(X, t), dim_x=2, dim_y=2, L=12.0, resolvent=Product([(Ball(5.0), 2), (Ball(0.3), 2)]))
    found = InexactHalpern(
        restart=True, inner=VRFoRB(step=2.0), inner_length=0.2, tol=1e-3, max_epochs=3000, random_state=0
    ).solve(op, torch.zeros(4, dtype=torch.float64))
    assert found.success
    w, shift = found.x[:2], found.x[2:]
    torch.testing.assert_close(shift, 0.3 * w / w.norm(), atol=2e-3, rtol=0)  # the worst shift points along w
    gradient = X.T @ (X @ w - t) / 20 + shift
    assert gradient.norm() < 2e-3


def test_float32_problems_are_solved_in_float32():
    A = np.random.default_rng(0).standard_normal((30, 3)).astype(np.float32)
    for solver in ALL_SOLVERS:
        found = type(solver)(**vars(solver) | {"tol": 0.3}).solve(LeastSquares(A, A @ [1, 2, 3]), np.zeros(3))
        assert found.x.dtype == np.float32
        assert found.success


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "eta must be positive"),
        ({"eta": math.nan}, "eta must be positive"),
        ({"L": -1.0}, "L must be positive"),
        ({"tol": -1e-9}, "tol must be non-negative"),
        ({"max_epochs": 1.0}, "max_epochs must be at least 2"),
        ({"max_epochs": math.nan}, "max_epochs must be at least 2"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
        ({"residual_step": 0.0}, "residual_step must be positive"),
        ({"multiplier": 0.0}, "multiplier must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 17}, "batch_size must lie in"),
        ({"refresh": 0.0}, "refresh must lie in"),
        ({"refresh": 1.5}, "refresh must lie in"),
        ({"method": "best"}, "method must be one of"),
        ({"method": "inexact", "inner_length": 0.0}, "inner_length must be positive"),
        ({"method": "inexact", "check_every": 0}, "check_every must be at least 1"),
    ],
)
def test_bad_hyper_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        vr_halpern(LeastSquares(np.eye(16), np.ones(16)), np.zeros(16), **options)


@pytest.mark.parametrize("options", [{"step": 0.0}, {"snapshot": 0.0}, {"snapshot": 1.0}])
def test_bad_inner_solvers_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VRFoRB(**options)


def test_options_of_the_other_algorithm_are_named():
    with pytest.raises(TypeError, match="SingleLoopHalpern takes no inner_length"):
        vr_halpern(LeastSquares(np.eye(2), np.ones(2)), np.zeros(2), inner_length=1.0)


@pytest.mark.parametrize(
    ("u0", "error", "message"),
    [
        (np.zeros(3), ValueError, "u0 must have shape"),
        (np.array([0.0, np.inf]), ValueError, "u0 holds NaN or infinity"),
        (np.array(["a", "b"]), TypeError, "u0 must hold real numbers"),
        (torch.zeros(2), TypeError, "u0 must be an array"),
    ],
)
def test_bad_starts_are_named(u0, error, message, without_shape_checks):
    with pytest.raises(error, match=message):
        vr_halpern(LeastSquares(np.eye(2), np.ones(2)), u0)


def test_bad_problems_are_named(without_shape_checks):
    op = LeastSquares(np.eye(2), np.ones(2))
    with pytest.raises(TypeError, match="op must be a FiniteSumOperator"):
        vr_halpern(np.eye(2), np.zeros(2))
    with pytest.raises(TypeError, match="resolvent must be callable"):
        vr_halpern(op, np.zeros(2), resolvent=3.0)
    with pytest.raises(ValueError, match="lower must be a number or have shape"):
        vr_halpern(op, np.zeros(2), resolvent=Box(np.zeros(3)))
    unknown = FunctionOperator(lambda u, idx: u, n=4, dim=2, cocoercive=True)
    with pytest.raises(ValueError, match="does not know its constants"):
        vr_halpern(unknown, np.zeros(2))
    numbers = from_torch(torch.sum, data=torch.ones(2), dim_x=2, L=1.0)
    with pytest.raises(TypeError, match="u0 must be a torch tensor"):
        vr_halpern(numbers, np.zeros(2))
