"""The algorithms of arXiv 2206.00846: golden runs, what they reduce to without noise, ledgers, refusals."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize as scipy_minimize
from scipy.stats import chisquare

from locally.privacy.stationary import (
    LOGISTIC,
    SIGMOID_SQUARE,
    Adjacency,
    Beyond,
    HardInstance,
    LinearModel,
    NoisyGradientDescent,
    Output,
    PerExampleObjective,
    PrivateSpiderBoost,
    PrivateTreeSpider,
    Randomness,
    RecursiveRegularization,
    SecureRandomness,
    Solver,
    Status,
    VariationNoise,
    theorem_sizes,
)
from locally.privacy.stationary.convex import phase_sizes


class Replayed(Randomness):
    """Prescribed normals, batches and permutations; the output index is drawn from a seed."""

    def __init__(self, normals, subsets=(), permutation=None):
        super().__init__(torch.Generator().manual_seed(0))
        self.normals, self.subsets, self.order = iter(normals), iter(subsets), permutation

    def normal(self, like):
        return torch.as_tensor(next(self.normals)).to(like)

    def subset(self, n, size):
        return torch.as_tensor(next(self.subsets))

    def permutation(self, n):
        return torch.as_tensor(self.order)


class Counted(LinearModel):
    """Keeps the indices of every batch that it was asked about."""

    def gradient_sum(self, w, batch=None):
        self.asked.append(batch)
        return super().gradient_sum(w, batch)

    def difference_sum(self, w, anchor, bound, batch=None):
        self.asked.append(batch)
        return super().difference_sum(w, anchor, bound, batch)


@pytest.fixture(scope="module")
def vectors(request):
    with np.load(request.path.parents[1] / "golden/17-dp-stationary-points/spider.npz") as found:
        return dict(found)


@pytest.fixture(scope="module")
def model(vectors):
    longest = float(np.linalg.norm(vectors["X"], axis=1).max())
    assert longest <= 1 + 1e-9
    return LinearModel(vectors["X"], vectors["y"], data_norm=max(1.0, longest), loss=SIGMOID_SQUARE)


def logistic(n=300, d=4, seed=0, cls=LinearModel):
    generator = torch.Generator().manual_seed(seed)
    X = torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64))
    y = (torch.rand(n, generator=generator) < torch.sigmoid(3 * X[:, 0])).double()
    return cls(X, y, data_norm=1 + 1e-12)


# Golden runs ----------------------------------------------------------------------------------------------------------


def test_spiderboost_golden(vectors, model):
    """Same loss, batches and noise vectors give the same iterates and estimates."""
    T, q, b2, eta = (vectors[k].item() for k in ("sb_T", "sb_q", "sb_b2", "sb_eta"))
    s1, s2, s2hat = vectors["sb_sig"]
    assert model.lipschitz == pytest.approx(vectors["L0"])
    assert model.smoothness == pytest.approx(vectors["L1"], rel=1e-8)
    n, normals, subsets = model.size, [], []
    for t in range(T + 1):
        # Undo our scale and put the vectors' in its place: they were made with other constants.
        if t % q == 0:
            golden, ours = s1, 2 * model.lipschitz / n
        else:
            moved = float(np.linalg.norm(vectors["sb_W"][t] - vectors["sb_W"][t - 1]))
            golden, ours = min(s2 * moved, s2hat), 2 * model.difference_bound(moved) / b2
            subsets.append(vectors["sb_S"][t])
        normals.append(vectors["sb_z"][t] * golden / ours)
    assert 1 / (2 * model.smoothness) == pytest.approx(eta, rel=1e-8)
    sizes = {"steps": T + 1, "phase": q, "variation_batch": b2, "learning_rate": eta}
    method = PrivateSpiderBoost(delta=1e-5, noise_multipliers=(1.0, 1.0), **sizes, keep_trace=True)
    found = method.minimize(model, rng=Replayed(normals, subsets))
    np.testing.assert_allclose(found.trace.iterates.numpy(), vectors["sb_W"], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.trace.estimates.numpy(), vectors["sb_est"], rtol=1e-10, atol=1e-10)


def test_tree_golden(vectors, model):
    D, T, b, beta = (vectors[k].item() for k in ("tr_D", "tr_T", "tr_b", "tr_beta"))
    root, child = vectors["tr_sig"]
    leaves, points = 2**D, vectors["tr_leaf"][:, : model.dimension]
    normals = []
    for leaf in range(T * leaves):
        at = leaf % leaves
        if at == 0:
            golden, ours = root, 2 * model.lipschitz / b
        else:
            zeros = (at & -at).bit_length() - 1
            parent = points[leaf - 2**zeros]  # the parent's own left-most leaf stands where the parent does
            moved = float(np.linalg.norm(points[leaf] - parent))
            golden, ours = child, 2 * model.difference_bound(moved) / (b // 2 ** (D - zeros))
        normals.append(vectors["tr_z"][leaf] * golden / ours)
    step = beta * model.smoothness / vectors["L1"].item()  # their L1 has two digits less
    sizes = {"depth": D, "batch": b, "step": step, "rounds": T}
    method = PrivateTreeSpider(delta=1e-5, noise_multipliers=(1.0, 1.0), **sizes, keep_trace=True)
    found = method.minimize(model, rng=Replayed(normals, permutation=vectors["tr_perm"]))
    ours = torch.cat([found.trace.iterates, found.trace.estimates], dim=1).numpy()
    np.testing.assert_allclose(ours, vectors["tr_leaf"], rtol=1e-10, atol=1e-10)


# What is left without noise -------------------------------------------------------------------------------------------


def test_without_noise_and_on_all_examples_spiderboost_is_gradient_descent():
    model = logistic()
    method = PrivateSpiderBoost(delta=1e-5, noise_multipliers=(0.0, 0.0), steps=40, phase=7, keep_trace=True)
    found = method.minimize(model, rng=0)
    w = model.initial_point()
    for t in range(40):
        w = w - model.exact_gradient(w) / (2 * model.smoothness)
        torch.testing.assert_close(found.trace.iterates[t + 1], w, rtol=1e-10, atol=1e-12)
    assert found.privacy.epsilon == math.inf


def test_an_anchor_at_every_step_is_noisy_gradient_descent():
    model, shared = logistic(), {"epsilon": 1.0, "delta": 1e-5, "steps": 20}
    spider = PrivateSpiderBoost(**shared, phase=1).minimize(model, rng=3)
    descent = NoisyGradientDescent(**shared).minimize(model, rng=3)
    assert torch.equal(spider.w, descent.w)
    assert spider.privacy == descent.privacy


def test_tree_of_depth_zero_is_normalised_minibatch_descent():
    model = logistic(n=100)
    method = PrivateTreeSpider(delta=1e-5, noise_multipliers=(0.0, 0.0), depth=0, batch=10, step=0.1, keep_trace=True)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(5))
    found = method.minimize(model, rng=Replayed([torch.zeros(4)] * 10, permutation=order))
    # Ten trees of one leaf: the step after a tree's last leaf has no successor, so every root stands at the start.
    assert torch.equal(found.trace.iterates, torch.zeros(10, 4, dtype=torch.float64))
    expected = torch.stack([model.gradient_sum(torch.zeros(4, dtype=torch.float64), b) / 10 for b in order.split(10)])
    torch.testing.assert_close(found.trace.estimates, expected)


def test_every_step_within_a_tree_has_the_same_length():
    model = logistic(n=400)
    method = PrivateTreeSpider(epsilon=1.0, delta=1e-5, depth=3, batch=64, step=0.3, keep_trace=True)
    w = method.minimize(model, rng=0).trace.iterates
    moved = (w[1:] - w[:-1]).norm(dim=1)
    between_trees = torch.arange(1, len(w)) % 8 == 0
    torch.testing.assert_close(
        moved[~between_trees], torch.full((7,), 0.3 / (2**1.5 * 0.25)).double().repeat(len(w) // 8)
    )
    assert (moved[between_trees] == 0).all()


def test_tree_without_noise_tracks_the_gradient_on_all_data():
    """With every batch the whole data set, telescoping makes each leaf's estimate exact."""
    model = logistic(n=64)
    whole = torch.arange(64)

    class Whole(LinearModel):
        def gradient_sum(self, w, batch=None):
            return super().gradient_sum(w) * len(batch) / 64

        def difference_sum(self, w, anchor, bound, batch=None):
            return super().difference_sum(w, anchor, bound) * len(batch) / 64

    repeated = Whole(model.X, model.y, data_norm=model.data_norm)
    method = PrivateTreeSpider(delta=1e-5, noise_multipliers=(0.0, 0.0), depth=3, batch=16, step=0.5, keep_trace=True)
    found = method.minimize(repeated, rng=Replayed([torch.zeros(4)] * 64, permutation=whole))
    for w, estimate in zip(found.trace.iterates, found.trace.estimates):
        torch.testing.assert_close(estimate, model.exact_gradient(w), rtol=1e-10, atol=1e-12)


def test_recursion_without_noise_solves_the_regularised_problem():
    model = logistic(n=200)
    method = RecursiveRegularization(
        delta=1e-5, noise_multiplier=0.0, radius=50.0, strength=0.05, rounds=1, max_steps=4000, keep_trace=True
    )
    found = method.minimize(model, rng=0)

    def regularised(w):
        w = torch.as_tensor(w)
        gradient = model.exact_gradient(w) + 0.05 * w
        return model.mean_loss(w) + 0.025 * float(w @ w), gradient.numpy()

    expected = scipy_minimize(regularised, np.zeros(4), jac=True, tol=1e-12).x
    # K = kappa log kappa steps of the analysis: the weighted average is within a few per cent
    assert np.linalg.norm(found.w.numpy() - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("solver", Solver)
def test_recursion_stays_in_its_balls_and_counts_its_rounds(solver):
    model = logistic(n=600)
    method = RecursiveRegularization(
        epsilon=2.0, delta=1e-5, radius=0.5, solver=solver, rounds=3, max_steps=30, keep_trace=True
    )
    rounds = []
    found = method.minimize(model, rng=1, callback=lambda t, w, moved: rounds.append((t, moved)))
    assert [t for t, _ in rounds] == [1, 2, 3]
    assert found.trace.iterates.shape == (4, 4)
    if solver == Solver.NOISY_GD:
        norms = found.trace.iterates.norm(dim=1)
        assert (norms <= torch.tensor([0.0, 0.5 * 2**0.5, 1.0, 0.5 * 2**1.5]).double() * (1 + 1e-12)).all()
        assert found.status is Status.STEP_LIMIT
        assert found.gradient_evaluations == 30 * 600
    else:
        assert found.gradient_evaluations == sum(sum(phase_sizes(200)) for _ in range(3))


@given(m=st.integers(1, 5000))
def test_phases_are_disjoint_and_fit(m):
    sizes = phase_sizes(m)
    assert sum(sizes) <= m
    assert min(sizes) >= 1
    assert all(a >= b for a, b in itertools.pairwise(sizes))


# Ledgers and outputs --------------------------------------------------------------------------------------------------


def test_tree_touches_every_example_at_most_once():
    model = logistic(n=1000, cls=Counted)
    model.asked = []
    method = PrivateTreeSpider(epsilon=1.0, delta=1e-5, depth=2, batch=64, step=0.2)
    found = method.minimize(model, rng=0)
    used = torch.cat(model.asked)
    assert len(used) == len(used.unique())
    assert method.examples_per_round == 64 * (1 + 2 / 2)
    assert len(used) == method.examples_per_round * (1000 // 128)
    assert found.steps == len(model.asked) == 4 * (1000 // 128)


def test_gradient_evaluations_are_counted():
    model = logistic(n=100)
    method = PrivateSpiderBoost(epsilon=1.0, delta=1e-5, steps=10, phase=5, variation_batch=20)
    assert method.minimize(model, rng=0).gradient_evaluations == 2 * 100 + 8 * 2 * 20


def test_output_is_uniform_over_the_iterates():
    model = logistic(n=4, d=1)
    method = PrivateSpiderBoost(epsilon=1.0, delta=1e-5, steps=5, phase=2, keep_trace=True)
    generator = torch.Generator().manual_seed(0)
    runs = [method.minimize(model, rng=generator) for _ in range(500)]
    counts = np.bincount([found.chosen for found in runs], minlength=6)
    assert counts[0] == 0
    assert chisquare(counts[1:]).pvalue > 1e-3
    assert all(torch.equal(found.w, found.trace.iterates[found.chosen]) for found in runs[:50])


def test_the_last_iterate_can_be_asked_for():
    method = PrivateSpiderBoost(
        epsilon=1.0, delta=1e-5, steps=9, phase=4, output=Output.LAST, keep_trace=True, weight_decay=0.1
    )
    found = method.minimize(logistic(), rng=0)
    assert torch.equal(found.w, found.trace.iterates[-1])


def test_seeds_repeat_and_the_secure_source_does_not():
    model = logistic()
    for method in (
        PrivateSpiderBoost(epsilon=1.0, delta=1e-5, steps=8, phase=4, variation_batch=50),
        PrivateTreeSpider(epsilon=1.0, delta=1e-5, depth=1, batch=20, step=0.1),
        RecursiveRegularization(epsilon=1.0, delta=1e-5, radius=5.0, max_steps=5),
    ):
        assert torch.equal(method.minimize(model, rng=7).w, method.minimize(model, rng=7).w)
        assert not torch.equal(method.minimize(model).w, method.minimize(model).w)


def test_secure_normals_are_standard():
    drawn = SecureRandomness().normal(torch.zeros(40_001, dtype=torch.float64))
    assert drawn.shape == (40_001,)
    assert abs(float(drawn.mean())) < 0.03
    assert abs(float(drawn.std()) - 1) < 0.03
    assert float((drawn.abs() > 1.959964).double().mean()) == pytest.approx(0.05, abs=0.01)


def test_stopping_level_returns_the_first_leaf_below_it():
    method = PrivateTreeSpider(epsilon=5.0, delta=1e-5, depth=1, batch=20, step=0.1, stopping_level=1e9)
    found = method.minimize(logistic(), rng=0)
    assert found.status is Status.STATIONARY
    assert found.chosen == 0
    assert torch.equal(found.w, torch.zeros(4, dtype=torch.float64))


def test_a_run_that_blows_up_says_so_and_stays_finite():
    flat = PerExampleObjective(lambda w, x: w - x, torch.ones(4, 2), dimension=2, lipschitz=1e30, smoothness=1.0)
    method = PrivateSpiderBoost(epsilon=1.0, delta=1e-5, steps=50, phase=1, learning_rate=1e20)
    found = method.minimize(flat, rng=0)
    assert found.status is Status.DIVERGED
    assert found.w.isfinite().all()
    assert found.steps < 50


# The problem with known constants -------------------------------------------------------------------------------------


def test_hard_instance_agrees_with_a_per_example_sum():
    problem = HardInstance(50, 6, seed=1)

    def gradients(w, x):
        residual = w[1:] - x
        huber = residual / residual.norm(dim=1, keepdim=True).clamp_min(1)
        slope = -0.125 * (1 + w[0].clamp_min(0)) ** -1.25
        return torch.cat([slope.expand(len(x), 1), huber], dim=1)

    plain = PerExampleObjective(gradients, problem.x, dimension=6, lipschitz=problem.lipschitz, smoothness=1.0)
    for scale in (0.0, 0.1, 1.0, 10.0):
        w = scale * torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for batch in (None, torch.tensor([3, 4, 40])):
            torch.testing.assert_close(problem.gradient_sum(w, batch), plain.gradient_sum(w, batch))


def test_huber_part_is_stationary_at_the_mean_and_grows_away_from_it():
    problem = HardInstance(200, 8, seed=0)
    at_mean = torch.cat([torch.zeros(1, dtype=torch.float64), problem.centre])
    assert problem.exact_gradient(at_mean)[1:].norm() < 1e-12
    away = at_mean + torch.cat([torch.zeros(1), torch.full((7,), 0.1)]).double()
    assert problem.exact_gradient(away)[1:].norm() >= (away - at_mean).norm() * (1 - 1e-12)


def test_spiderboost_beats_noisy_descent_where_noise_decides():
    problem = HardInstance(4000, 100, seed=0)
    shared = {"epsilon": 4.0, "delta": 1e-5, "steps": 256, "keep_trace": True}

    def mean_norm(method):
        return np.mean(
            [float(problem.exact_gradient(w).norm()) for w in method.minimize(problem, rng=0).trace.iterates]
        )

    best_descent = min(mean_norm(NoisyGradientDescent(**shared | {"steps": steps})) for steps in (32, 64, 128, 256))
    assert mean_norm(PrivateSpiderBoost(**shared, phase=64)) < 0.85 * best_descent


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_sizes_follow_the_theorems_powers():
    n = 10**6
    few, many = (theorem_sizes(k * n, 500, 1.0, 1e-6, 1.0, 1.0, 1.0) for k in (1, 8))
    assert many.steps / few.steps == pytest.approx(8 ** (4 / 3), rel=1e-2)
    assert many.phase / few.phase == pytest.approx(8 ** (2 / 3), rel=1e-2)
    assert few.variation_batch == pytest.approx(n / math.sqrt(few.steps), rel=1e-2)


def test_too_few_examples_for_the_theorem_are_remarked():
    with pytest.warns(UserWarning, match="Theorem B.3 asks for"):
        sizes = theorem_sizes(10, 1000, 0.1, 1e-5, 1.0, 1.0, 1.0)
    assert 1 <= sizes.phase <= sizes.steps
    assert sizes.variation_batch <= 10


def test_sizes_for_a_problem_run():
    problem = HardInstance(2000, 20, seed=0)
    spider = PrivateSpiderBoost.for_problem(problem, epsilon=1.0, delta=1e-5, initial_gap=1.0, steps=20)
    assert spider.learning_rate == 0.5
    assert spider.variation_batch == theorem_sizes(2000, 20, 1.0, 1e-5, problem.lipschitz, 1.0, 1.0).variation_batch
    tree = PrivateTreeSpider.for_problem(problem, epsilon=1.0, delta=1e-5)
    assert tree.depth >= 1
    assert 0.9 * 2000 <= tree.rounds * tree.examples_per_round <= 2000
    found = tree.minimize(problem, rng=0)
    assert found.status is Status.FINISHED
    assert found.privacy.epsilon <= 1.0


# Refusals -------------------------------------------------------------------------------------------------------------

SPIDER = {"epsilon": 1.0, "delta": 1e-5, "steps": 4, "phase": 2}
TREE = {"epsilon": 1.0, "delta": 1e-5, "depth": 1, "batch": 8, "step": 0.1}
RECURSIVE = {"epsilon": 1.0, "delta": 1e-5, "radius": 1.0}
DESCENT = {"epsilon": 1.0, "delta": 1e-5, "steps": 4}


@pytest.mark.parametrize(
    "make",
    [
        (PrivateSpiderBoost, SPIDER),
        (PrivateTreeSpider, TREE),
        (RecursiveRegularization, RECURSIVE),
        (NoisyGradientDescent, DESCENT),
    ],
)
@pytest.mark.parametrize(
    "bad",
    [{"epsilon": e} for e in (0.0, -1.0, math.nan, math.inf)] + [{"delta": d} for d in (0.0, 1.0, -0.1, 2.0, math.nan)],
)
def test_impossible_budgets_are_named(make, bad, without_shape_checks):
    kind, good = make
    with pytest.raises(ValueError, match=next(iter(bad))):
        kind(**good | bad)


@pytest.mark.parametrize(
    ("kind", "good", "bad", "named"),
    [
        (PrivateSpiderBoost, SPIDER, {"steps": 0}, "steps"),
        (PrivateSpiderBoost, SPIDER, {"phase": 0}, "phase"),
        (PrivateSpiderBoost, SPIDER, {"split": 1.0}, "split"),
        (PrivateSpiderBoost, SPIDER, {"learning_rate": -1.0}, "learning_rate"),
        (PrivateSpiderBoost, SPIDER, {"variation_batch": 0}, "variation_batch"),
        (PrivateSpiderBoost, SPIDER, {"weight_decay": math.nan}, "weight_decay"),
        (PrivateSpiderBoost, SPIDER, {"adjacency": "swap"}, "adjacency"),
        (PrivateSpiderBoost, SPIDER, {"noise_multipliers": (1.0, 1.0)}, "either epsilon or noise"),
        (PrivateSpiderBoost, SPIDER, {"epsilon": None, "noise_multipliers": (-1.0, 1.0)}, "noise_multipliers"),
        (NoisyGradientDescent, DESCENT, {"batch": 0}, "^batch"),
        (NoisyGradientDescent, DESCENT, {"epsilon": None, "noise_multiplier": -1.0}, "^noise_multiplier "),
        (PrivateTreeSpider, TREE, {"batch": 1}, "batch"),
        (PrivateTreeSpider, TREE, {"depth": -1}, "depth"),
        (PrivateTreeSpider, TREE, {"step": 0.0}, "step"),
        (PrivateTreeSpider, TREE, {"stopping_level": -1.0}, "stopping_level"),
        (RecursiveRegularization, RECURSIVE, {"radius": 0.0}, "radius"),
        (RecursiveRegularization, RECURSIVE, {"strength": -1.0}, "strength"),
        (RecursiveRegularization, RECURSIVE, {"epsilon": None, "noise_multiplier": 1.0}, "strength"),
    ],
)
def test_parameters_out_of_range_are_named(kind, good, bad, named, without_shape_checks):
    with pytest.raises(ValueError, match=named):
        kind(**good | bad)


def test_starts_and_batches_that_do_not_fit_are_refused(without_shape_checks):
    model = logistic(n=20)
    method = PrivateSpiderBoost(**SPIDER)
    with pytest.raises(ValueError, match="w0 must have shape"):
        method.minimize(model, torch.zeros(3))
    with pytest.raises(ValueError, match="w0 holds NaN"):
        method.minimize(model, torch.full((4,), torch.nan).double())
    with pytest.raises(ValueError, match="variation_batch must be at most"):
        PrivateSpiderBoost(**SPIDER, variation_batch=21).minimize(model)
    with pytest.raises(ValueError, match="use 24 examples, got 20"):
        PrivateTreeSpider(**TREE | {"rounds": 2}).minimize(model)
    with pytest.raises(ValueError, match="rounds must be at most"):
        RecursiveRegularization(**RECURSIVE, rounds=21).minimize(model)


def test_recursion_refuses_losses_that_are_not_convex():
    base = logistic(n=20)
    nonconvex = LinearModel(base.X, base.y, data_norm=base.data_norm, loss=SIGMOID_SQUARE)
    clipped = PerExampleObjective(lambda w, x: w - x, base.X, dimension=4, lipschitz=5.0, smoothness=1.0, convex=True)
    refused = PerExampleObjective(
        lambda w, x: w - x, base.X, dimension=4, lipschitz=5.0, smoothness=1.0, convex=True, beyond=Beyond.REFUSE
    )
    method = RecursiveRegularization(**RECURSIVE, solver=Solver.PHASED_SGD)
    for objective in (nonconvex, clipped):
        with pytest.raises(ValueError, match="convex by construction"):
            method.minimize(objective, rng=0)
    assert method.minimize(refused, rng=0).status is Status.FINISHED
    assert LOGISTIC.convex


@pytest.mark.parametrize("adjacency", Adjacency)
def test_statement_of_a_plan_is_that_of_its_run(adjacency):
    model = logistic(n=60)
    methods = [
        PrivateSpiderBoost(**SPIDER, adjacency=adjacency, variation_batch=20),
        NoisyGradientDescent(**DESCENT, adjacency=adjacency, batch=20),
        PrivateTreeSpider(**TREE, variation_noise=VariationNoise.PATH),
        *(RecursiveRegularization(**RECURSIVE, solver=solver, max_steps=5) for solver in Solver),
    ]
    for method in methods:
        found = method.minimize(model, rng=0)
        assert found.privacy == method.privacy_statement(model)
        assert 0.98 < found.privacy.epsilon <= 1.0
        assert "norm 1" in found.privacy.assumptions[0]
        assert str(found.privacy).count("noise multiplier") == len(found.privacy.mechanisms)
