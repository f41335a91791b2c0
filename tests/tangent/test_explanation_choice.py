"""Faithfulness, guide, perturbation tests and the no-free-lunch certificate; source: arXiv 2206.01254, sections 4-6."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locally.tangent.explanation import (
    LFA,
    BinaryMask,
    Empirical,
    Explanation,
    GaussianNoise,
    LeaveOneOut,
    Method,
    Perturbation,
    ScaleNoise,
    choose,
    expected_loss,
    explain,
    faithfulness,
    nfl_certificate,
    perturbation_test,
    recommend,
)

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bumpy(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(4 * x[:, 0]) * x[:, 1] + torch.exp(-x[:, 2]) * x[:, 3] ** 2 + x[:, 4]


POINTS = torch.rand(30, 5, dtype=F64, generator=seeded(5))


@given(seed=st.integers(0, 2**31), perturb=st.floats(1e-3, 1.0))
@settings(max_examples=20)
@pytest.mark.parametrize(
    ("method", "loss"), [(m, "gradient" if "grad" in m or m == "gradient" else "squared") for m in Method]
)
def test_every_method_beats_other_linear_models_on_its_own_perturbations(method, loss, seed, perturb):
    own = explain(bumpy, POINTS, method, n_samples=300, generator=seeded())
    w = own.attributions + perturb * torch.randn(own.attributions.shape, dtype=F64, generator=seeded(seed))
    other = Explanation.from_attributions(own.neighbourhood, POINTS, w, own.f_x0)
    table = faithfulness(
        bumpy,
        POINTS,
        {"own": own, "other": other},
        {"Z": own.neighbourhood},
        loss=loss,
        n_samples=3000,
        generator=seeded(1),
    )
    difference = (table.losses[0] - table.losses[1])[0]
    assert difference.mean() <= 3 * difference.std() / math.sqrt(len(POINTS)) + 1e-12


def test_held_out_loss_agrees_with_the_training_loss_of_a_large_sample():
    found = explain(bumpy, POINTS, "c_lime", n_samples=20_000, generator=seeded())
    fresh = expected_loss(bumpy, POINTS, found, n_samples=20_000, generator=seeded(1))
    torch.testing.assert_close(fresh, found.loss, rtol=0.1, atol=1e-6)


def test_an_explanation_in_input_slopes_and_one_in_contributions_meet_on_a_linear_function():
    w = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=F64)
    f = lambda x: x @ w
    X = POINTS + 0.1
    found = {m: explain(f, X, m, generator=seeded()) for m in Method}
    for e in found.values():
        torch.testing.assert_close(e.to_input_space(), w.expand(30, 5))
    places = {"noise": GaussianNoise(), "masks": BinaryMask(), "fading": ScaleNoise(), "one out": LeaveOneOut()}
    for loss in ("squared", "gradient"):
        assert faithfulness(f, X, found, places, loss=loss, intercept="own").losses.max() < 1e-12


def test_slopes_fade_at_the_baseline_instead_of_blowing_up():
    X = torch.tensor([[1e-9, 0.5]], dtype=F64)
    e = Explanation.from_attributions(BinaryMask(), X, torch.tensor([[1e-3, 1.0]], dtype=F64), torch.ones(1, dtype=F64))
    slopes = e.to_input_space(floor=0.01)
    assert abs(slopes[0, 0]) < 1e-6
    assert slopes[0, 1] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("neighbourhood", "winners"),
    [
        (GaussianNoise(sigma=0.3), {"c_lime", "smoothgrad"}),
        (BinaryMask(kernel="exponential"), {"lime"}),
        (LeaveOneOut(), {"occlusion"}),
    ],
)
def test_recommend_names_the_method_with_these_perturbations(neighbourhood, winners):
    found = recommend(bumpy, POINTS, neighbourhood, n_samples=2000, generator=seeded())
    assert found.best in winners
    assert found.fits
    losses = [r.loss for r in found.ranking]
    assert losses == sorted(losses)
    assert found.best in str(found)
    assert found.variance > losses[0]


def test_recommend_says_when_no_method_fits_and_an_own_lfa_does():
    # Large one-sided noise on the first feature only: none of the eight methods has such perturbations.
    shift = np.zeros((200, 5))
    shift[:, 0] = np.linspace(1.5, 3.0, 200)
    own = Empirical.additive(shift)
    found = recommend(bumpy, POINTS, own, generator=seeded())
    assert not found.fits
    assert "LFA(neighbourhood=...)" in str(found)
    named = recommend(
        bumpy, POINTS, own, {"mine": LFA(neighbourhood=own, penalty="l2", alpha=1e-9)}, generator=seeded()
    )
    assert named.best == "mine"
    assert named.fits


def test_recommend_skips_gradients_that_a_numpy_model_has_not():
    f = lambda x: np.sin(4 * x[:, 0]) * x[:, 1]
    found = recommend(f, POINTS.numpy(), GaussianNoise(sigma=0.3), generator=seeded())
    assert found.best == "c_lime"
    assert set(found.skipped) == {"smoothgrad", "gradient", "integrated_gradients", "gradient_x_input"}
    with pytest.raises(TypeError, match="gradients"):
        recommend(f, POINTS.numpy(), GaussianNoise(), ["smoothgrad"])


def test_the_table_prints_every_method_and_neighbourhood():
    found = {m: explain(bumpy, POINTS, m, generator=seeded()) for m in ("lime", "gradient")}
    table = faithfulness(bumpy, POINTS, found, {"masks": BinaryMask(), "noise": GaussianNoise()})
    assert all(word in str(table) for word in ("lime", "gradient", "masks", "noise"))
    assert table.best("masks") == "lime"
    assert bool((table.std_error() > 0).all())


@pytest.mark.parametrize("kind", list(Perturbation))
def test_every_kind_of_perturbation_has_a_ready_method(kind):
    guidance = choose(kind, n_features=5)
    found = guidance.approximation.explain(bumpy, POINTS, generator=seeded())
    torch.testing.assert_close(
        found.attributions, explain(bumpy, POINTS, guidance.method, generator=seeded()).attributions
    )
    assert guidance.method in str(guidance)


def test_the_guide_answers_for_neighbourhoods_and_warns():
    assert choose(GaussianNoise(sigma=0.0)).method is Method.GRADIENT
    assert choose(GaussianNoise(), differentiable=False).method is Method.C_LIME
    assert choose(ScaleNoise(low=0.2)).method is Method.INTEGRATED_GRADIENTS
    assert choose(ScaleNoise(low=1.0)).method is Method.GRADIENT_X_INPUT
    assert choose(BinaryMask(kernel="shapley")).method is Method.KERNEL_SHAP
    assert choose(LeaveOneOut(), n_features=7).evaluations == 8
    own = choose(Empirical.additive(np.random.default_rng(0).normal(size=(20, 5))))
    assert own.method is None
    assert own.approximation.explain(bumpy, POINTS, generator=seeded()).attributions.shape == (30, 5)
    assert any("2000" in c for c in choose("removal", n_features=2000).cautions)
    assert any("numeric" in c for c in choose("fading", differentiable=False).cautions)
    with pytest.raises(ValueError, match="wiggling"):
        choose("wiggling")


def test_changing_all_features_is_the_same_for_every_ranking():
    orders = [torch.rand(30, 5, generator=seeded(s)) for s in range(3)]
    results = [perturbation_test(bumpy, POINTS, a, generator=seeded(9), repeats=5) for a in orders]
    for r in results[1:]:
        torch.testing.assert_close(r.changes["binary"][:, -1], results[0].changes["binary"][:, -1])
        torch.testing.assert_close(r.changes["continuous"][:, -1], results[0].changes["continuous"][:, -1])
    moved = (bumpy(POINTS) - bumpy(0 * POINTS)).abs()
    torch.testing.assert_close(results[0].changes["binary"][:, -1], moved)


def test_the_order_of_a_perturbation_test_by_hand():
    X = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    scores = np.array([[-3.0, 1.0, 2.0], [5.0, 5.0, 5.0]])  # by size; ties keep the order of the features
    f = lambda x: x.sum(1)
    bottom = perturbation_test(f, X, scores, kinds=["binary"])
    np.testing.assert_array_equal(bottom.changes["binary"], [[2, 6, 7], [1, 3, 7]])
    top = perturbation_test(f, X, scores, kinds=["binary"], order="top", ks=[1, 2])
    np.testing.assert_array_equal(top.changes["binary"], [[1, 5], [1, 3]])
    noise = perturbation_test(f, X, scores, kinds=["continuous"], sigma=0.5, repeats=20_000, generator=seeded())
    half_normal = 0.5 * math.sqrt(2 / math.pi)
    np.testing.assert_allclose(noise.mean("continuous"), half_normal * np.sqrt([1, 2, 3]), rtol=0.03)


@pytest.mark.parametrize(
    ("f", "box", "bound", "slope"),
    [(lambda x: x[:, 0] ** 2, 1.0, 0.25, 0.0), (lambda x: torch.sin(3 * x[:, 0]), 2.0, 1.0, 0.0)],
)
def test_minimax_bounds_known_in_closed_form(f, box, bound, slope):
    X = torch.tensor([[0.4]], dtype=F64)
    for method in ("c_lime", "integrated_gradients", "occlusion"):
        found = nfl_certificate(f, X, explain(f, X, method, generator=seeded()), (-box, box), ascent_steps=30)
        assert found.lower_bound == pytest.approx(bound, rel=1e-4)
        assert found.lower_bound <= bound + 1e-9
        assert found.best_worst == pytest.approx(bound, rel=1e-3)
        assert found.best_slopes[0] == pytest.approx(slope, abs=1e-2)
        assert found.holds
        assert found.loss_at_adv >= bound - 1e-4


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_no_linear_explanation_escapes_the_bound(seed):
    torch.manual_seed(seed % 1000)
    f = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    X = torch.rand(2, 3, dtype=F64)
    w = torch.randn(2, 3, dtype=F64)
    anything = Explanation.from_attributions(GaussianNoise(), X, w, f(X)[:, 0].detach())
    found = nfl_certificate(f, X, anything, (0.0, 1.0), point=1, n=128, exchanges=1, ascent_steps=30, seed=seed % 1000)
    assert found.holds
    assert found.lower_bound <= found.best_worst * (1 + 1e-6) + 1e-12
    segment = found.neighbourhood.enumerate(X[1:], 0 * X[1:], 200)
    along = found.neighbourhood.perturb(X[1:], 0 * X[1:], segment.noise)
    worst = (f(along[0])[:, 0] - anything[1].predict_at(along)[0]).square().max()
    assert worst >= 0.9 * found.loss_at_adv - 1e-12  # the adversarial neighbourhood contains the failure


def test_the_bound_for_logistic_explanations_vanishes_on_logistic_functions_only():
    w = torch.tensor([2.0, -1.0], dtype=F64)
    X = torch.rand(1, 2, dtype=F64, generator=seeded())
    z = GaussianNoise(sigma=0.2)
    bounds = {}
    for name, f in {
        "logistic": lambda x: torch.sigmoid(x @ w),
        "bump": lambda x: torch.sigmoid(3 * torch.sin(5 * x[:, 0])),
    }.items():
        e = LFA(neighbourhood=z, model="logistic").explain(f, X, generator=seeded())
        bounds[name] = nfl_certificate(f, X, e, (0.0, 1.0), n=128, exchanges=1)
        assert bounds[name].holds
    assert bounds["logistic"].lower_bound < 1e-10
    assert bounds["bump"].lower_bound > 1e-3


@pytest.mark.usefixtures("without_shape_checks")
def test_bad_input_is_named():
    e = explain(bumpy, POINTS, "gradient")
    with pytest.raises(ValueError, match="not of the points"):
        faithfulness(bumpy, POINTS + 1, {"e": e}, {"Z": GaussianNoise()})
    with pytest.raises(ValueError, match="at least one entry"):
        faithfulness(bumpy, POINTS, {}, {"Z": GaussianNoise()})
    with pytest.raises(ValueError, match="intercept"):
        faithfulness(bumpy, POINTS, {"e": e}, {"Z": GaussianNoise()}, intercept="none")
    with pytest.raises(ValueError, match="attributions must have shape"):
        perturbation_test(bumpy, POINTS, torch.ones(3, 5))
    with pytest.raises(ValueError, match="ks"):
        perturbation_test(bumpy, POINTS, POINTS, ks=[6])
    with pytest.raises(ValueError, match="order"):
        perturbation_test(bumpy, POINTS, POINTS, order="middle")
    with pytest.raises(ValueError, match="bounds"):
        nfl_certificate(bumpy, POINTS, e, (1.0, 0.0))
    with pytest.raises(ValueError, match="point"):
        nfl_certificate(bumpy, POINTS, e, (0.0, 1.0), point=30)
