"""Own neighbourhoods, losses and models; captum's and scikit-learn's interfaces; what bad input gets."""

import sys

import numpy as np
import pytest
import torch

from locally.tangent.explanation import (
    LFA,
    AdditiveNeighbourhood,
    Attributor,
    BinaryMask,
    Draws,
    Empirical,
    GaussianNoise,
    InterpretableModel,
    LeaveOneOut,
    Method,
    MultiplicativeNeighbourhood,
    Neighbourhood,
    ScaleNoise,
    Space,
    Status,
    explain,
    local_approximation,
)

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(3 * 4, 3)
    ).double()


class UniformNoise(AdditiveNeighbourhood):
    def draw(self, x0, baseline, n, generator):
        noise = torch.rand(1, n, x0.shape[1], dtype=F64, generator=generator) - 0.5
        return Draws(noise, noise.new_zeros(1, n), noise.new_zeros(0, x0.shape[1]))


class SquareLaw(Neighbourhood):
    """x = x0 + xi^3, to see the default chain rule at work."""

    space = Space.INPUT

    def draw(self, x0, baseline, n, generator):
        noise = 1 + 0.2 * torch.randn(1, n, x0.shape[1], dtype=F64, generator=generator)
        return Draws(noise, noise.new_zeros(1, n), noise.new_zeros(0, x0.shape[1]))

    def perturb(self, x0, baseline, noise):
        return x0[:, None] + noise**3


class Sinusoid(InterpretableModel):
    """g = a sin(xi) + c with one noise coordinate."""

    def size(self, q):
        return 2

    def predict(self, theta, noise):
        return theta[:, :1] * torch.sin(noise[..., 0]) + theta[:, 1:]

    def attributions(self, theta, q):
        return theta[:, :1]


def test_a_neighbourhood_of_ones_own_recovers_a_linear_function():
    w = torch.tensor([1.0, -2.0], dtype=F64)
    X = torch.ones(2, 2, dtype=F64)
    for loss in ("squared", "gradient"):
        found = LFA(neighbourhood=UniformNoise(), loss=loss, n_samples=50).explain(lambda x: x @ w, X)
        torch.testing.assert_close(found.attributions, w.expand(2, 2))


def test_the_default_chain_rule_is_autograd_through_perturb():
    f = lambda x: x.sum(1)
    X = torch.zeros(1, 3, dtype=F64)
    z = SquareLaw()
    found = LFA(neighbourhood=z, loss="gradient", n_samples=100).explain(f, X, generator=seeded())
    noise = z.draw(X, X, 100, seeded(int(torch.randint(2**62, (1,), generator=seeded())))).noise
    torch.testing.assert_close(found.attributions, (3 * noise**2).mean(1))
    with pytest.raises(TypeError, match="noise_at"):
        found.predict_at(X[:, None])


def test_recorded_noise_and_samplers():
    w = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    X = torch.rand(2, 3, dtype=F64) + 0.5
    patterns = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=float)
    found = LFA(neighbourhood=Empirical.multiplicative(patterns)).explain(lambda x: x @ w, X)
    torch.testing.assert_close(found.attributions, w * X)
    many = LFA(neighbourhood=Empirical.additive(np.random.default_rng(0).normal(size=(500, 3))), n_samples=50)
    torch.testing.assert_close(many.explain(lambda x: x @ w, X).attributions, w.expand(2, 3))
    sampler = lambda x0, n, generator: torch.randn(x0.shape[0], n, 3, generator=generator, dtype=F64)
    own = LFA(neighbourhood=Empirical.sampler(sampler), n_samples=50).explain(lambda x: x @ w, X)
    torch.testing.assert_close(own.attributions, w.expand(2, 3))
    with pytest.raises(ValueError, match="sample must return"):
        LFA(neighbourhood=Empirical.sampler(lambda x0, n, g: torch.zeros(1, 2, 3))).explain(lambda x: x @ w, X)
    with pytest.raises(ValueError, match="weight"):
        Empirical.additive(patterns, [0.0, 0.0, 0.0, 0.0, 0.0])


def test_a_model_and_a_loss_of_ones_own():
    f = lambda x: 2.5 * torch.sin(x[:, 0]) + 1
    X = torch.zeros(2, 1, dtype=F64)
    fitted = LFA(neighbourhood=GaussianNoise(sigma=1.0), model=Sinusoid()).explain(f, X)
    torch.testing.assert_close(fitted.attributions, torch.full((2, 1), 2.5, dtype=F64))
    matched = LFA(neighbourhood=GaussianNoise(sigma=1.0), model=Sinusoid(), loss="gradient").explain(f, X)
    torch.testing.assert_close(matched.attributions, torch.full((2, 1), 2.5, dtype=F64))
    quartic = lambda f, g, x0, noise: (f - g) ** 4 + (f - g) ** 2
    w = torch.tensor([1.0, -2.0], dtype=F64)
    robust = LFA(neighbourhood=GaussianNoise(sigma=1.0), loss=quartic).explain(
        lambda x: x @ w, torch.ones(1, 2).double()
    )
    torch.testing.assert_close(robust.attributions, w[None], atol=1e-6, rtol=0)
    assert robust.status == (Status.FITTED,)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "gradient"])
def test_a_logistic_function_is_recovered_by_a_logistic_model(loss):
    w = torch.tensor([3.0, -2.0, 0.5, 0.0], dtype=F64)
    f = lambda x: torch.sigmoid(x @ w - 0.3)
    X = torch.rand(5, 4, dtype=F64, generator=seeded())
    lfa = LFA(neighbourhood=GaussianNoise(sigma=0.5), loss=loss, model="logistic", n_samples=200)
    found = lfa.explain(f, X, generator=seeded())
    torch.testing.assert_close(found.attributions, w.expand(5, 4), atol=1e-6, rtol=0)
    assert set(found.status) == {Status.FITTED}
    shap = LFA(neighbourhood=BinaryMask(kernel="shapley"), model="logistic").explain(f, X)
    torch.testing.assert_close(shap.attributions, w * X, atol=1e-6, rtol=0)


def test_logistic_fits_are_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    f = lambda x: torch.sigmoid(torch.sin(3 * x[:, 0]) + x[:, 1] ** 2)
    X = torch.tensor([[0.3, 0.7]], dtype=F64)
    z = Empirical.additive(np.random.default_rng(0).normal(size=(80, 2)))
    found = LFA(neighbourhood=z, loss="cross_entropy", model="logistic").explain(f, X)
    p = f(X + z.noise).numpy()
    peer = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000)
    peer.fit(np.tile(z.noise.numpy(), (2, 1)), np.repeat([1, 0], 80), sample_weight=np.r_[p, 1 - p])
    np.testing.assert_allclose(found.values, peer.coef_, atol=1e-5)


def test_standard_errors_of_a_logistic_fit_are_of_the_right_size():
    f = lambda x: torch.sigmoid(torch.sin(2 * x[:, 0]) + x[:, 1] ** 2)
    X = torch.tensor([[0.3, 0.7]], dtype=F64)
    lfa = LFA(neighbourhood=GaussianNoise(sigma=0.7, antithetic=False), model="logistic", n_samples=400, exact=False)
    runs = [lfa.explain(f, X, generator=seeded(s)) for s in range(25)]
    spread = torch.stack([r.attributions for r in runs]).std(0)
    claimed = torch.stack([r.std_error for r in runs]).mean(0)
    assert bool((claimed / spread > 0.6).all() and (claimed / spread < 1.6).all())


@pytest.mark.parametrize("gradient_weight", [0.0, 0.7])
def test_standard_errors_of_linear_fits_are_of_the_right_size(gradient_weight):
    f, X = lambda x: torch.sin(4 * x[:, 0]) * x[:, 1] ** 2, torch.tensor([[0.3, 0.7]], dtype=F64)
    for z in (GaussianNoise(sigma=0.7), GaussianNoise(sigma=0.7, antithetic=False)):
        lfa = LFA(neighbourhood=z, n_samples=300, exact=False, gradient_weight=gradient_weight)
        runs = [lfa.explain(f, X, generator=seeded(s)) for s in range(60)]
        spread = torch.stack([r.attributions for r in runs]).std(0)
        claimed = torch.stack([r.std_error for r in runs]).mean(0)
        assert bool((claimed / spread > 0.7).all() and (claimed / spread < 1.4).all())


def test_the_mixed_loss_lies_between_its_two_parts():
    f, X = lambda x: torch.sin(3 * x[:, 0]) + x[:, 1] ** 3, torch.tensor([[0.3, 0.7]], dtype=F64)
    z = GaussianNoise(sigma=1.0)
    fit = lambda **o: LFA(neighbourhood=z, n_samples=400, exact=False, **o).explain(f, X, generator=seeded())
    squared, gradient = fit().attributions, fit(loss="gradient").attributions
    torch.testing.assert_close(fit(gradient_weight=1e9).attributions, gradient, atol=1e-6, rtol=0)
    torch.testing.assert_close(fit(gradient_weight=1e-9).attributions, squared, atol=1e-6, rtol=0)
    shrunk = fit(loss="gradient", penalty="l2", alpha=1.0).attributions
    torch.testing.assert_close(shrunk, gradient / 2)
    soft = fit(loss="gradient", penalty="l1", alpha=0.1).attributions
    torch.testing.assert_close(soft, gradient.sign() * (gradient.abs() - 0.1).clamp_min(0))


def test_lasso_keeps_the_pinned_points_of_kernel_shap():
    torch.manual_seed(0)
    f = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()
    X = torch.randn(4, 8, dtype=F64)
    found = explain(f, X, "kernel_shap", penalty="l1", alpha=0.05)
    torch.testing.assert_close(found.attributions.sum(1) + found.intercept, f(X)[:, 0].detach())
    plain = explain(f, X, "kernel_shap")
    assert found.attributions.abs().sum() < plain.attributions.abs().sum()
    assert (found.attributions == 0).sum() + (found.attributions.abs() < 1e-12).sum() > 0


def test_groups_are_explained_as_one_feature():
    f = lambda x: x[:, 0] * x[:, 1] + 3 * x[:, 2]
    X, groups = torch.tensor([[2.0, 3.0, 1.0]], dtype=F64), np.array([0, 0, 1])
    for method in ("kernel_shap", "occlusion", "lime"):
        found = explain(f, X, method, groups=groups)
        torch.testing.assert_close(found.attributions, torch.tensor([[6.0, 3.0]], dtype=F64))
        torch.testing.assert_close(found.predict_at(X[:, None]), torch.tensor([[9.0]], dtype=F64))


def test_scikit_learn_models_and_numeric_gradients():
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    X, y = load_iris(return_X_y=True)
    model = LogisticRegression(max_iter=500).fit(X, y)
    by_lime = explain(model.predict_proba, X[::40], "lime", target=2)
    assert by_lime.values.shape == (4, 4)
    predicted = model.predict(X[::40])
    own_class = explain(model.predict_proba, X[::40], "occlusion", target="predicted")
    by_hand = [
        model.predict_proba(x[None])[0, c] - model.predict_proba((x * (np.arange(4) != 1))[None])[0, c]
        for x, c in zip(X[::40], predicted, strict=True)
    ]
    np.testing.assert_allclose(own_class.values[:, 1], by_hand)
    slopes = explain(model.decision_function, X[::40], "gradient", target=1, grad="numeric")
    np.testing.assert_allclose(slopes.values, np.tile(model.coef_[1], (4, 1)), atol=1e-8)
    given = explain(model.decision_function, X[::40], "smoothgrad", target=1, grad=lambda x: model.coef_[1] + 0 * x)
    np.testing.assert_allclose(given.values, np.tile(model.coef_[1], (4, 1)), atol=1e-12)
    jobs = explain(model.predict_proba, X[::40], "lime", target=2, n_jobs=2, batch_size=7)
    np.testing.assert_allclose(jobs.values, by_lime.values, atol=1e-12)


def test_equality_with_captum_where_nothing_is_sampled():
    attr = pytest.importorskip("captum.attr")
    model, x = image_network(), torch.randn(3, 2, 4, 4, dtype=F64, generator=seeded())
    target, baselines = torch.tensor([0, 2, 1]), torch.randn(3, 2, 4, 4, dtype=F64, generator=seeded(1))
    pairs = [
        ("gradient", attr.Saliency(model).attribute(x.clone().requires_grad_(), target=target, abs=False), None),
        ("gradient_x_input", attr.InputXGradient(model).attribute(x.clone().requires_grad_(), target=target), None),
        ("occlusion", attr.FeatureAblation(model).attribute(x, baselines, target=target), baselines),
        ("occlusion", attr.Occlusion(model).attribute(x, (1, 1, 1), target=target), None),
        (
            "integrated_gradients",
            attr.IntegratedGradients(model).attribute(x, baselines, target=target, n_steps=100),
            baselines,
        ),
    ]
    for method, theirs, base in pairs:
        ours = Attributor(model, method, n_samples=100).attribute(x, base, target)
        same = {"atol": 1e-6, "rtol": 1e-6} if theirs.dtype == torch.float32 else {}  # captum's Occlusion rounds
        torch.testing.assert_close(ours, theirs.detach().double(), msg=method, **same)
    mask = (torch.arange(32) // 8).reshape(2, 4, 4)
    ours = Attributor(model, "occlusion").attribute(x, target=target, feature_mask=mask)
    torch.testing.assert_close(
        ours,
        attr.FeatureAblation(model).attribute(x, target=target, feature_mask=mask[None]).double(),
        atol=1e-6,
        rtol=1e-6,
    )


def test_equality_with_captums_lime_and_kernel_shap_on_the_same_masks():
    attr = pytest.importorskip("captum.attr")
    from captum._utils.models.linear_model import SkLearnLinearRegression
    from captum.attr._core.lime import get_exp_kernel_similarity_function

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    x = torch.randn(1, 6, generator=seeded())
    every_mask = ((torch.arange(64)[:, None] >> torch.arange(6)) & 1).long()
    in_turn = lambda masks: (lambda feed: lambda *a, **k: next(feed))(iter(masks[:, None]))
    lime = attr.Lime(
        model,
        interpretable_model=SkLearnLinearRegression(),
        similarity_func=get_exp_kernel_similarity_function("euclidean", kernel_width=1.0),
        perturb_func=in_turn(every_mask),
    ).attribute(x, target=0, n_samples=64)
    ours = Attributor(model, "lime", convention="captum", exact=True).attribute(x, target=0)
    torch.testing.assert_close(ours, lime, atol=1e-5, rtol=0)

    k = every_mask.sum(1)
    inner = every_mask[(k > 0) & (k < 6)]
    size = inner.sum(1).double()
    kernel = 5 / (torch.tensor([6.0, 15.0, 20.0, 15.0, 6.0])[size.long() - 1] * size * (6 - size))
    weight = {tuple(m.tolist()): float(w) for m, w in zip(inner, kernel, strict=True)}
    shapley = attr.Lime(
        model,
        interpretable_model=SkLearnLinearRegression(),
        # As in captum's KernelShap: 1e6 stands for the infinite weight of no and of all features.
        similarity_func=lambda a, b, z, **_: weight.get(tuple(z[0].tolist()), 1e6),
        perturb_func=in_turn(every_mask),
    ).attribute(x, target=0, n_samples=64)
    torch.testing.assert_close(Attributor(model, "kernel_shap").attribute(x, target=0), shapley, atol=1e-4, rtol=0)
    exact = attr.ShapleyValues(model).attribute(x, target=0)
    torch.testing.assert_close(Attributor(model, "kernel_shap").attribute(x, target=0), exact, atol=1e-5, rtol=0)


def test_dropout_is_off_while_explaining_and_back_afterwards():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    model[0].eval()
    X = torch.ones(2, 3)
    first, second = (explain(model, X, "gradient").attributions for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
    assert model[1].training
    assert not model[0].training


def test_the_same_generator_gives_the_same_answer_and_the_caller_keeps_their_data():
    X = torch.rand(3, 12, dtype=F64, generator=seeded())
    before = X.clone()
    f = lambda x: torch.sin(x).sum(1)
    one, two = (explain(f, X, "lime", n_samples=40, generator=seeded(4)).attributions for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, explain(f, X, "lime", n_samples=40, generator=seeded(5)).attributions)
    assert torch.equal(X, before)
    seen = []
    explain(f, X, "lime", n_samples=40, batch_size=40, callback=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_too_few_draws_are_refused_and_collinear_ones_reported():
    f, X = lambda x: x.sum(1), torch.ones(1, 20, dtype=F64)
    for method, needed in (("c_lime", 21), ("lime", 21), ("kernel_shap", 19)):
        with pytest.raises(ValueError, match=f"at least {needed}"):
            explain(f, X, method, n_samples=needed - 1)
        explain(f, X, method, n_samples=needed - 1, penalty="l2", alpha=1e-3)
    with pytest.warns(UserWarning, match="least norm"):
        found = LFA(neighbourhood=ScaleNoise()).explain(f, X)
    assert found.status == (Status.RANK_DEFICIENT,)
    torch.testing.assert_close(found.attributions, torch.ones(1, 20, dtype=F64))


class Nowhere(MultiplicativeNeighbourhood):
    def draw(self, x0, baseline, n, generator):
        noise = torch.rand(1, n, x0.shape[1], dtype=F64)
        return Draws(noise, torch.full((1, n), -torch.inf, dtype=F64), noise.new_zeros(0, x0.shape[1]))


def test_far_perturbations_do_not_underflow_but_zero_weights_are_refused():
    X = torch.full((1, 3), 100.0, dtype=F64)  # exp(-10^4) is zero in float64
    with pytest.warns(UserWarning, match="least norm"):  # one mask outweighs all others together
        found = explain(lambda x: x.sum(1), X, "lime", n_samples=100, generator=seeded(), importance=False, exact=False)
    assert bool(found.attributions.isfinite().all())
    with pytest.raises(ValueError, match="weights"):
        LFA(neighbourhood=Nowhere()).explain(lambda x: x.sum(1), X)


@pytest.mark.usefixtures("without_shape_checks")
def test_bad_input_is_named_before_any_work():
    f, X = lambda x: x.sum(1), torch.ones(2, 3)
    calls = []

    def watched(x):
        calls.append(len(x))
        return x.sum(1)

    for bad, word in [(torch.ones(2, 3, 4), "input_shape"), (torch.full((2, 3), torch.nan), "NaN"), (X[:0], "shape")]:
        with pytest.raises(ValueError, match=word):
            explain(watched, bad, "lime")
    assert not calls
    with pytest.raises(ValueError, match="method"):
        explain(f, X, "magic")
    with pytest.raises(ValueError, match="target must lie"):
        explain(lambda x: x, X, "lime", target=3)
    with pytest.raises(ValueError, match="3 outputs"):
        explain(lambda x: x, X, "lime")
    with pytest.raises(ValueError, match="f must map"):
        explain(lambda x: x.sum(), X, "lime")
    with pytest.raises(ValueError, match="baseline"):
        explain(f, X, "lime", baseline=torch.ones(5))
    with pytest.raises(ValueError, match="exact=True"):
        explain(f, torch.ones(1, 20), "lime", exact=True)
    with pytest.raises(ValueError, match="NaN or infinity"):
        explain(lambda x: x.sum(1) / 0, X, "c_lime")
    with pytest.raises(ValueError, match="no logit"):
        explain(lambda x: (x.sum(1) > 2).double(), X, "c_lime", output="logit")
    with pytest.raises(TypeError, match="c_lime"):
        explain(lambda x: x.sum(1), X.numpy(), "smoothgrad")
    with pytest.raises(TypeError, match="detached"):
        explain(lambda x: x.detach().sum(1), X, "gradient")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        LFA(neighbourhood=GaussianNoise(), model="logistic").explain(f, X)
    with pytest.raises(ValueError, match="fit_intercept"):
        LFA(neighbourhood=BinaryMask(kernel="shapley"), fit_intercept=False).explain(lambda x: x.sum(1) + 1, X)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: GaussianNoise(sigma=-1.0), "sigma"),
        (lambda: ScaleNoise(low=2.0), "low"),
        (lambda: BinaryMask(kernel="box"), "kernel"),
        (lambda: BinaryMask(width=0.0), "width"),
        (lambda: BinaryMask(convention="mine"), "convention"),
        (lambda: LeaveOneOut(groups=np.array([0, 2])), "groups"),
        (lambda: LFA(neighbourhood=GaussianNoise(), loss="absolute"), "loss"),
        (lambda: LFA(neighbourhood=GaussianNoise(), model="tree"), "model"),
        (lambda: LFA(neighbourhood=GaussianNoise(), penalty="l1"), "alpha"),
        (lambda: LFA(neighbourhood=GaussianNoise(), penalty="l1", alpha=1.0, model="logistic"), "linear"),
        (lambda: LFA(neighbourhood=GaussianNoise(), loss="cross_entropy"), "logistic"),
        (lambda: LFA(neighbourhood=GaussianNoise(), loss="gradient", gradient_weight=1.0), "gradient_weight"),
        (lambda: LFA(neighbourhood=GaussianNoise(), n_samples=0), "n_samples"),
        (lambda: local_approximation("lime", convention="none"), "convention"),
        (lambda: Attributor(lambda x: x, "lime", groups=np.zeros(2, int)), "feature_mask"),
        (
            lambda: Attributor(lambda x: x, Method.GRADIENT).attribute(torch.ones(1, 2), feature_mask=torch.zeros(2)),
            "None",
        ),
    ],
)
def test_bad_settings_are_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_captum_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    from locally.papers.local_function_approximation import captum_attributions

    assert captum_attributions(torch.nn.Linear(2, 1), torch.ones(1, 2)) == {}
