"""Rules against reference vectors, theorems and each other; attacks; the simulation's invariants; what is refused."""

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from locally.training.byzantine import (
    ALIE,
    FOE,
    BeyondBreakdown,
    Collaboration,
    Constant,
    Dissensus,
    GeometricMedian,
    GeometricTrimmedSum,
    Krum,
    LabelFlip,
    Mean,
    Mimic,
    MinimumDiameterAverage,
    ModelProblem,
    MultiKrum,
    NearestNeighborAverage,
    Random,
    Rule,
    SelfCenteredClipping,
    Sight,
    SignFlip,
    Silent,
    Simulation,
    Status,
    TooFewVectors,
    TrimmedMean,
    line_maximize,
    reduction_bound,
    run_together,
    split_dirichlet,
)

RULES = {
    "cva": NearestNeighborAverage(2),
    "trmean": TrimmedMean(2),
    "rfa": GeometricMedian(2),
    "centeredclip": SelfCenteredClipping(2, radius=0.7),
}
ROBUST = [NearestNeighborAverage, TrimmedMean, Krum, MultiKrum, MinimumDiameterAverage, GeometricTrimmedSum]


@pytest.fixture
def reference(golden):
    return np.load(golden / "12-monna/monna_reference.npz", allow_pickle=False)


def sight(honest, f, rule=None, step=0):
    rule = rule or Mean()
    return Sight(honest, f, step, rule.damage(honest, f), lambda: torch.ones_like(honest[0]), np.random.default_rng(0))


# Reference vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_mixing_reproduces_the_reference(reference, name):
    honest, lie = torch.from_numpy(reference["honest"]), torch.from_numpy(reference["byz_little_cva"])
    pool = torch.cat([honest, lie.expand(2, -1)])
    heard = np.zeros((9, 11), dtype=bool)
    heard[:, 9:] = True
    np.put_along_axis(heard, reference["responders"], True, axis=1)
    mixed = RULES[name].mix(pool, heard, np.arange(9))
    np.testing.assert_allclose(mixed, reference[f"mixed_{name}"], atol=1e-13)
    alone = [RULES[name](pool[torch.from_numpy(row)], vector) for row, vector in zip(heard, honest)]
    np.testing.assert_allclose(torch.stack(alone), reference[f"mixed_{name}"], atol=1e-13)


@pytest.mark.parametrize("name", RULES)
def test_adaptive_attacks_reproduce_the_reference(reference, name):
    seen = sight(torch.from_numpy(reference["honest"]), 2, RULES[name])
    for label, attack in (("little", ALIE()), ("empire", FOE())):
        np.testing.assert_allclose(attack(seen)[0], reference[f"byz_{label}_{name}"], rtol=1e-12)


def test_fixed_attacks_and_line_search_reproduce_the_reference(reference):
    seen = sight(torch.from_numpy(reference["honest"]), 2)
    np.testing.assert_allclose(SignFlip()(seen)[1], reference["byz_sf"], rtol=1e-14)
    np.testing.assert_allclose(ALIE(1.5)(seen)[0], reference["byz_alie_factor1.5"], rtol=1e-14)
    best, tried = line_maximize(lambda x: -((x - 2.37) ** 2))
    np.testing.assert_allclose(tried, reference["line_maximize_trace"], rtol=1e-14)
    assert best == pytest.approx(float(reference["line_maximize_quad"]), rel=1e-14)


# Rules ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES.values(), Mean(2), Krum(2), GeometricTrimmedSum(2)], ids=repr)
def test_damage_is_that_of_mixing(rule):
    """Every short cut of the adversary's search agrees with carrying the defence out."""
    honest = torch.from_numpy(np.random.default_rng(1).standard_normal((9, 12)))
    for k in (0.1, 1.0, 5.0, 1e3):
        lie = honest.mean(0) + k * honest.std(0)
        assert rule.damage(honest, 2)(lie) == pytest.approx(Rule.damage(rule, honest, 2)(lie), rel=1e-9, abs=1e-12)


@given(seed=st.integers(0, 2**32 - 1), f=st.integers(0, 3), extra=st.integers(2, 6))
def test_nearest_neighbour_average_moves_with_its_input(seed, f, extra):
    rng = np.random.default_rng(seed)
    m = 2 * f + extra
    z = torch.from_numpy(rng.standard_normal((m, 5)))
    rotation = torch.from_numpy(np.linalg.qr(rng.standard_normal((5, 5)))[0])
    shift, scale = torch.from_numpy(rng.standard_normal(5)), float(rng.uniform(0.1, 10))
    rule = NearestNeighborAverage(f)
    y = rule(z, z[0])
    torch.testing.assert_close(rule(z + shift, z[0] + shift), y + shift)
    torch.testing.assert_close(rule(scale * z, scale * z[0]), scale * y)
    torch.testing.assert_close(rule(z @ rotation, z[0] @ rotation), y @ rotation)
    others = torch.from_numpy(rng.permutation(m))
    torch.testing.assert_close(rule(z[others], z[0]), y)
    distances = (z - z[0]).norm(dim=1)
    kept = distances.argsort()[: m - f]
    torch.testing.assert_close(y, z[kept].mean(0))


@pytest.mark.parametrize("far", [1e30, np.inf, np.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_far_vector_has_no_influence_at_all(far, dtype):
    z = torch.from_numpy(np.random.default_rng(2).standard_normal((7, 40))).to(dtype)
    rule = NearestNeighborAverage(2)
    shouted = torch.cat([z, torch.full((2, 40), far, dtype=dtype)])
    heard = np.ones((7, 9), dtype=bool)
    expected = torch.stack([rule(shouted, row) for row in z])
    torch.testing.assert_close(rule.mix(shouted, heard, np.arange(7)), expected)
    torch.testing.assert_close(expected, z.mean(0).expand(7, -1))


@pytest.mark.parametrize("attack", [ALIE(), FOE(), SignFlip(), Random(5.0), Constant(), Constant(1e30), Dissensus()])
@pytest.mark.parametrize("kind", [NearestNeighborAverage, TrimmedMean, MultiKrum])
def test_agreement_is_never_broken(kind, attack):
    """Honest nodes that agree on x stay at exactly x, whatever they are told."""
    x = torch.from_numpy(np.random.default_rng(3).standard_normal(30)).float()
    honest = x.repeat(9, 1)
    rule = kind(2)
    lies = attack(sight(honest, 2, rule))
    lies = lies[0] if lies.ndim == 3 else lies
    mixed = rule.mix(torch.cat([honest, lies]), np.ones((9, 11), dtype=bool), np.arange(9))
    torch.testing.assert_close(mixed, honest, rtol=0 if kind is NearestNeighborAverage else 1e-6, atol=0)


def test_nearby_models_far_from_the_origin_are_told_apart():
    """Distances of 1e-3 at norm 1e4: inner products in float32 would lose them without centring."""
    rng = np.random.default_rng(4)
    z = torch.from_numpy(100 + 1e-4 * rng.standard_normal((12, 10_000))).float()
    rule = NearestNeighborAverage(2)
    mixed = rule.mix(z, np.ones((12, 12), dtype=bool), np.arange(12))
    # a float64 computation on the same numbers decides
    exact = rule.mix(z.double(), np.ones((12, 12), dtype=bool), np.arange(12))
    torch.testing.assert_close(mixed.double() - 100, exact - 100, rtol=0, atol=2e-5)
    direct = torch.stack([rule(z, row) for row in z])
    torch.testing.assert_close(direct, mixed, rtol=0, atol=2e-5)


@given(seed=st.integers(0, 2**32 - 1))
def test_one_round_stays_within_the_papers_reduction(seed):
    """Adversaries just inside the acceptance radius, who tell every node something else and drop one honest message."""
    n, f = 16, 1
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((15, 1)) * rng.choice([1, 10], (15, 1)))
    heard = np.ones((15, 30), dtype=bool)
    heard[:, 15:] = np.eye(15, dtype=bool)
    for i in range(15):
        heard[i, rng.choice([j for j in range(15) if j != i])] = False
    reach = (x - x.T).abs().sort(dim=1).values[:, 12:13] * 0.999
    lies = x + reach * torch.from_numpy(rng.choice([-1.0, 1.0], (15, 1)))
    y = NearestNeighborAverage(f).mix(torch.cat([x, lies]), heard, np.arange(15))
    spread = float((x - x.mean(0)).square().mean())
    bound = reduction_bound(n, f)
    assert float((y - y.mean(0)).square().mean()) <= bound.contraction * spread
    assert float((y.mean(0) - x.mean(0)).square().sum()) <= bound.displacement * spread


def test_nothing_mixes_just_below_the_breakdown_point():
    """n = 3f + 1: f copies of a node's own vector take all other places. Hence the refusal."""
    f = 2
    x = torch.arange(5.0)[:, None]
    rule = NearestNeighborAverage(f)
    heard = np.concatenate([np.ones((5, 5), dtype=bool), np.eye(5, dtype=bool).repeat(2, axis=1)], axis=1)
    heard[:, :5] &= np.abs(np.subtract.outer(np.arange(5), np.arange(5))) <= 1
    received = heard.sum(1)
    mixed = rule.mix(torch.cat([x, x.repeat_interleave(2, 0)]), heard, np.arange(5))
    assert (mixed[received == 5] == x[received == 5]).all()
    with pytest.raises(BeyondBreakdown, match=r"n >= 3 f \+ 2 nodes, so at most f = 1 faulty ones of n = 7"):
        rule(torch.zeros(5, 1), torch.zeros(1))


@pytest.mark.parametrize("kind", ROBUST, ids=lambda k: k.__name__)
def test_f_wild_vectors_do_not_carry_a_robust_rule_away(kind):
    rng = np.random.default_rng(5)
    honest = torch.from_numpy(rng.standard_normal((10, 6)))
    lies = torch.from_numpy(1e6 * rng.standard_normal((2, 6)))
    result = kind(2)(torch.cat([honest, lies]), honest[0])
    assert (result.abs() <= honest.abs().max()).all()
    assert Mean(2)(torch.cat([honest, lies]), honest[0]).abs().max() > 1e3


def test_trimmed_mean_is_scipys():
    from scipy.stats import trim_mean

    z = torch.from_numpy(np.random.default_rng(6).standard_normal((10, 50)))
    np.testing.assert_allclose(TrimmedMean(2)(z, z[0]), trim_mean(z.numpy(), 0.2, axis=0), rtol=1e-12)


def test_krum_and_minimum_diameter_find_the_tight_cluster():
    z = torch.tensor([[0.0], [0.1], [0.2], [0.3], [0.15], [5.0], [9.0]], dtype=torch.float64)
    assert float(Krum(2)(z, z[0])) in (0.1, 0.15)
    assert float(MinimumDiameterAverage(2)(z, z[0])) == pytest.approx(0.15)
    assert float(MultiKrum(2)(z, z[0])) == pytest.approx(0.15)


def test_geometric_median_is_a_fixed_point_of_weiszfeld():
    z = torch.from_numpy(np.random.default_rng(7).standard_normal((9, 4)))
    v = GeometricMedian(0, iterations=200, smoothing=1e-9)(z, z[0])
    unit = (z - v) / (z - v).norm(dim=1, keepdim=True)
    assert float(unit.sum(0).norm()) < 1e-8  # the gradient of the sum of distances


def test_clipping_and_trimmed_sum_become_means_when_nothing_is_clipped_or_trimmed():
    z = torch.from_numpy(np.random.default_rng(8).standard_normal((8, 4)))
    for rule in (SelfCenteredClipping(0, radius=1e6), GeometricTrimmedSum(0), NearestNeighborAverage(0), Mean()):
        torch.testing.assert_close(rule(z, z[3]), z.mean(0))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: NearestNeighborAverage(-1), ValueError, "f must be at least 0"),
        (lambda: NearestNeighborAverage(1.5), TypeError, "f must be an integer"),
        (lambda: NearestNeighborAverage(1)(torch.zeros(6, 3), torch.zeros(4)), ValueError, "vectors must have shape"),
        (lambda: NearestNeighborAverage(1)(torch.zeros(6, 3), torch.full((3,), np.nan)), ValueError, "pivot holds NaN"),
        (lambda: TrimmedMean(1)(torch.zeros(6, 3), torch.zeros(3).double()), TypeError, "one floating dtype"),
        (lambda: Krum(3)(torch.zeros(6, 3), torch.zeros(3)), BeyondBreakdown, r"n >= 3 f \+ 3"),
        (lambda: SelfCenteredClipping(1, radius=0), ValueError, "radius"),
        (lambda: ALIE("worst"), ValueError, "factor must be"),
        (lambda: Dissensus(0.0), ValueError, "strength"),
        (lambda: reduction_bound(10, 1), BeyondBreakdown, "n >= 11 f"),
        (lambda: Collaboration(n=1, f=0, lr=0.1), ValueError, "n must be at least 2"),
        (lambda: Collaboration(n=10, f=5, lr=0.1), BeyondBreakdown, "at most 4 of n = 10"),
        (lambda: Collaboration(n=10, f=3, lr=0.1), BeyondBreakdown, "at most f = 2 faulty ones of n = 10"),
        (lambda: Collaboration(n=10, f=1, lr=-1.0), ValueError, "lr"),
        (lambda: Collaboration(n=10, f=1, lr=0.1, beta=1.0), ValueError, "beta"),
        (lambda: Simulation(Collaboration(n=10, f=1, lr=0.1), faulty=2), ValueError, "faulty must be at most"),
    ],
)
def test_bad_input_is_named(without_shape_checks, call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_too_many_broken_vectors_are_refused():
    z = torch.zeros(8, 2)
    z[:3] = np.nan
    with pytest.raises(TooFewVectors, match="at least 6 finite"):
        NearestNeighborAverage(2)(z, z[5])
    with pytest.raises(TooFewVectors):
        TrimmedMean(0)(torch.full((4, 2), np.nan), z[5])


# Simulation -----------------------------------------------------------------------------------------------------------


def small_problem(nodes, *, batch=8, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 300)
    inputs = torch.from_numpy(np.eye(3)[labels] + 0.3 * rng.standard_normal((300, 3)))
    torch.manual_seed(seed)
    parts = split_dirichlet(labels, nodes, 1.0, rng)
    model = nn.Linear(3, 3).double()
    return ModelProblem(model, inputs, torch.from_numpy(labels), parts, batch=batch, penalty=1e-3, seed=seed)


def test_without_faults_it_is_averaged_sgd_with_momentum():
    """f = 0, everybody heard: exact consensus, and torch's SGD with dampening up to its first buffer."""
    problem = small_problem(4)
    done = Simulation(Collaboration(n=4, f=0, lr=0.3, beta=0.5)).run(problem, 12)
    assert done.consensus_distance == pytest.approx(0, abs=1e-14)
    theta = problem.start().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.3, momentum=0.5, dampening=0.5)
    for step in range(12):
        theta.grad = problem.gradients(theta.detach().repeat(4, 1), step, range(4)).mean(0)
        if step == 0:  # torch starts its buffer at g, the paper's at (1 - beta) g
            optimizer.state[theta]["momentum_buffer"] = torch.zeros_like(theta)
        optimizer.step()
    torch.testing.assert_close(done.parameters[0], theta.detach())


def test_gradients_of_all_nodes_are_those_of_each():
    problem = small_problem(5)
    rows = problem.start() + torch.from_numpy(np.random.default_rng(1).standard_normal((5, 12)))
    together = problem.gradients(rows, 3, range(5))
    alone = torch.cat([problem.gradients(rows[k : k + 1], 3, [k]) for k in range(5)])
    torch.testing.assert_close(together, alone)
    inputs, labels = problem.inputs[problem.samples(3, [2])[0]], problem.labels[problem.samples(3, [2])[0]]
    loss = nn.functional.cross_entropy(problem.load(rows[2])(inputs), labels)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(problem.model.parameters()))])
    torch.testing.assert_close(together[2], expected + 1e-3 * rows[2] / rows[2].norm())


ALL_ATTACKS = [ALIE(), FOE(), SignFlip(), LabelFlip(), Mimic(), Dissensus(), Random(), Constant(), Silent()]


@pytest.mark.parametrize("attack", ALL_ATTACKS, ids=lambda a: type(a).__name__)
def test_honest_nodes_learn_under_every_attack(attack):
    problem = small_problem(10, batch=16)
    collaboration = Collaboration(n=12, f=2, lr=0.5, beta=0.9)
    done = Simulation(collaboration, attack).run(problem, 80)
    assert done.status is Status.FINISHED
    assert problem.accuracies(done.parameters, problem.inputs, problem.labels).min() > 0.85


def test_plain_averaging_does_not_survive():
    problem = small_problem(10)
    collaboration = Collaboration(n=12, f=2, lr=0.5, beta=0.9, rule=Mean(2))
    done = Simulation(collaboration, FOE(50.0)).run(problem, 60)
    assert problem.accuracies(done.parameters, problem.inputs, problem.labels).max() < 0.6


def test_a_diverging_run_says_so():
    class Exploding:
        def start(self):
            return torch.ones(3, dtype=torch.float64)

        def gradients(self, parameters, step, nodes, *, flipped=False):
            return -1e90 * parameters * torch.arange(1.0, 1 + len(parameters))[:, None]

        def batch_size(self, step):
            return 1

    for rule in (Mean(2), TrimmedMean(2)):
        collaboration = Collaboration(n=12, f=2, lr=1.0, beta=0.0, rule=rule)
        done = Simulation(collaboration, SignFlip()).run(Exploding(), 60)
        assert done.status is Status.DIVERGED
        assert done.steps < 60


@pytest.mark.parametrize("attack", [ALIE(), Mimic(), Random()], ids=lambda a: type(a).__name__)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(attack):
    problem = small_problem(6)
    simulation = Simulation(Collaboration(n=7, f=1, lr=0.3, beta=0.8, rounds=2), attack)
    whole = simulation.run(problem, 9)
    part = simulation.run(problem, 9, callback=lambda step, _: step == 4)
    assert part.status is Status.STOPPED
    assert part.steps == 4
    rest = simulation.run(problem, 9, resume=part)
    torch.testing.assert_close(rest.parameters, whole.parameters, rtol=0, atol=0)
    np.testing.assert_array_equal(rest.spread, whole.spread)


def test_simulations_run_together_are_those_run_alone():
    problem = small_problem(6)
    simulations = [
        Simulation(Collaboration(n=7, f=1, lr=0.3, beta=beta, rule=rule, seed=3), attack)
        for beta, rule, attack in [(0.9, None, ALIE()), (0.0, TrimmedMean(1), LabelFlip()), (0.5, Mean(1), Constant())]
    ]
    for together, alone in zip(run_together(simulations, problem, 7), simulations):
        expected = alone.run(problem, 7)
        assert together.status is expected.status
        torch.testing.assert_close(together.parameters, expected.parameters, equal_nan=True)


def test_learn_exchanges_gradients_and_counts_them():
    problem = small_problem(10).with_batch(lambda step: step + 1)
    collaboration = Collaboration(n=12, f=2, lr=0.3, beta=0.0, rule=TrimmedMean(2), gradient_rule=TrimmedMean(2))
    done = Simulation(collaboration, SignFlip()).run(problem, 30)
    assert done.gradients_used == 30 * 31 // 2
    assert problem.accuracies(done.parameters, problem.inputs, problem.labels).min() > 0.8


@pytest.mark.parametrize("responders", ["worst case", "sampled"])
def test_every_node_hears_itself_and_n_minus_f_in_all(responders):
    collaboration = Collaboration(n=11, f=2, lr=0.1, responders=responders, seed=5)
    heard = collaboration.heard(9, (3, 0))
    assert heard.shape == (9, 11)
    assert (heard.sum(1) == 9).all()
    assert heard.diagonal().all()
    assert heard[:, 9:].all() == (responders == "worst case")
    np.testing.assert_array_equal(heard, collaboration.heard(9, (3, 0)))


def test_momentum_narrows_what_the_attack_sees():
    """Stationary variance of the momentum over that of the gradient: (1 - beta) / (1 + beta)."""
    rng = np.random.default_rng(0)
    collaboration = Collaboration(n=4, f=0, lr=0.1, beta=0.9)
    m = torch.zeros(4000, 1, dtype=torch.float64)
    for _ in range(120):
        m = collaboration.momentum(m, torch.from_numpy(rng.standard_normal((4000, 1))))
    assert float(m.var()) == pytest.approx(0.1 / 1.9, rel=0.08)


def test_bias_correction_makes_the_first_step_a_full_one():
    problem = small_problem(4)
    corrected = Simulation(Collaboration(n=4, f=0, lr=0.3, beta=0.9, correct_bias=True)).run(problem, 1)
    plain = Simulation(Collaboration(n=4, f=0, lr=0.3, beta=0.0)).run(problem, 1)
    torch.testing.assert_close(corrected.parameters, plain.parameters)


def test_dirichlet_split_is_heterogeneous_and_within_bounds():
    labels = np.arange(1000) % 10
    mixed = split_dirichlet(labels, 10, 100.0, np.random.default_rng(0))
    skewed = split_dirichlet(labels, 10, 0.1, np.random.default_rng(0))
    share = lambda parts: np.mean([np.bincount(labels[p], minlength=10).max() / len(p) for p in parts])
    assert share(mixed) < 0.2 < 0.5 < share(skewed)
    for part in mixed + skewed:
        assert len(set(part.tolist())) == len(part) <= 100
    with pytest.raises(ValueError, match="labels must hold"):
        split_dirichlet(labels[:15], 10, 1.0, np.random.default_rng(0))


def test_models_with_running_statistics_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="running statistics"):
        ModelProblem(model, torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), [np.arange(4)])


def test_mimic_copies_an_honest_vector_that_stands_out():
    rng = np.random.default_rng(9)
    attack = Mimic(warm_up=20)
    for step in range(30):
        honest = torch.from_numpy(0.1 * rng.standard_normal((8, 5)))
        honest[3, 0] += 5.0
        lies = attack(sight(honest, 2, step=step))
    torch.testing.assert_close(lies, honest[3].expand(2, -1))


def test_dissensus_drives_nodes_apart():
    honest = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    lies = Dissensus()(sight(honest, 1))
    assert lies.shape == (3, 1, 1)
    torch.testing.assert_close(lies[:, 0, 0], torch.tensor([-6.0, -2.0, 14.0], dtype=torch.float64))


def test_shapes_are_part_of_the_signature():
    with pytest.raises(jaxtyping.TypeCheckError):
        NearestNeighborAverage(0)(torch.zeros(3, 2), torch.zeros(3, 2))
