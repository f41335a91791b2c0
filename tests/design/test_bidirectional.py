"""Both mappings against their matrix forms, the design loop against reference traces, and what bad input gets."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.kernel_ridge import KernelRidge
from torch import nn

from locally.design.bidirectional import (
    BDIDesigner,
    BIBDesigner,
    KernelHead,
    LinearizedHead,
    Losses,
    OneHotFeatures,
    ReluTangentKernel,
    SequenceSpace,
    Status,
    TangentFeatures,
)
from locally.design.bidirectional.infinite_width import Logits
from locally.design.bidirectional.language_model import MaskedLM
from locally.design.bidirectional.relaxation import swap_in
from locally.tangent.kernel import InfiniteNetwork, empirical_ntk


def table(n, p, seed=0):
    rng = np.random.default_rng(seed)
    F, y = rng.standard_normal((n, p)), rng.standard_normal(n)
    y = (y - y.mean()) / y.std(ddof=1)
    return torch.as_tensor(F), torch.as_tensor(y), torch.as_tensor(rng.standard_normal((4, p)))


def explicit_losses(F, y, h, target=10.0, ridge=1e-6):
    """The two mappings with the n x n kernel of the table and the 1 x 1 kernel of the design."""
    K = F @ F.T
    beta = ridge * K.diagonal().mean()
    alpha = torch.linalg.solve(K + beta * torch.eye(len(K), dtype=K.dtype), y)
    own = h.square().sum(1)
    c = target / (own + ridge * own)
    return ((h @ F.T) @ alpha - target).square(), (c[:, None] * (h @ F.T) - y).square().mean(1)


@pytest.mark.parametrize(("n", "p"), [(40, 7), (12, 30)])
def test_closed_losses_equal_the_matrix_forms_and_kernel_ridge(n, p):
    F, y, h = table(n, p)
    found = LinearizedHead(F, y).losses(h)
    forward, backward = explicit_losses(F, y, h)
    torch.testing.assert_close(found.forward, forward, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.backward, backward, rtol=1e-10, atol=1e-12)
    beta = 1e-6 * float(F.square().sum()) / n
    peer = KernelRidge(kernel="linear", alpha=beta).fit(F.numpy(), y.numpy())
    np.testing.assert_allclose(LinearizedHead(F, y).predict(h), peer.predict(h.numpy()), rtol=1e-6, atol=1e-8)


@given(n=st.integers(2, 15), p=st.integers(1, 12), seed=st.integers(0, 99), tilt=st.sampled_from([0.0, 0.7]))
def test_closed_gradients_are_those_of_autograd(n, p, seed, tilt):
    F, y, h = table(n, p, seed)
    closed = LinearizedHead(F, y, tilt=tilt).losses(h)
    by_kernel = KernelHead(lambda a, b: a @ b.T, F, y, tilt=tilt).losses(h)
    for name in ("backward", "backward_gradient"):
        a, b = getattr(closed, name), getattr(by_kernel, name)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))
    for name in ("forward", "forward_gradient"):  # alpha = residual / beta loses digits that the primal form keeps
        a, b = getattr(closed, name), getattr(by_kernel, name)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_both_losses_meet_where_the_design_is_the_head():
    F, y, _ = table(60, 5)
    head = LinearizedHead(F, y, ridge=1e-12)
    w = torch.linalg.lstsq(F, y).solution
    losses = head.losses((10 * w / w.square().sum())[None])
    residual = (F @ w - y).square().mean()
    assert losses.forward.item() < 1e-12
    assert losses.backward.item() == pytest.approx(residual.item(), rel=1e-9)
    assert losses.backward_gradient.abs().max() < 1e-8


def test_an_infinitely_long_design_predicts_nothing():
    F, y, h = table(50, 6)
    far = LinearizedHead(F, y).losses(1e9 * h).backward
    torch.testing.assert_close(far, torch.full_like(far, 49 / 50))


def test_the_ntk_is_that_of_the_infinite_network_and_has_gradients_on_its_cusp():
    x = table(20, 12)[0]
    h = x[:4] + torch.tensor([0.0, 0.1, 1.0, -2.0], dtype=x.dtype)[:, None]
    network = InfiniteNetwork.mlp(5, w_std=1.0, b_std=0.0)
    kernel = ReluTangentKernel(5)
    torch.testing.assert_close(kernel(h[1:], x), network.ntk(h[1:], x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kernel.diagonal(x), network.diagonal(x).ntk)
    torch.testing.assert_close(kernel(x, x).diagonal(), kernel.diagonal(x), rtol=1e-4, atol=0)
    gradients = []
    for K in (kernel, lambda a, b: network.ntk(a, b, backend="reference")):
        z = h[1:].clone().requires_grad_()
        gradients.append(torch.autograd.grad(K(z, x).square().sum(), z)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    z = h.clone().requires_grad_()
    assert torch.autograd.grad(kernel(z, x).sum(), z)[0].isfinite().all()
    assert torch.linalg.eigvalsh(kernel(x, x)).min() > 0


def test_tangent_features_give_the_empirical_kernel_and_guide_a_design():
    torch.manual_seed(0)
    model = MaskedLM(4, width=6, hidden=5).eval().double()
    w0 = torch.randn(6, dtype=torch.float64)
    x = torch.eye(4, dtype=torch.float64)[torch.randint(0, 4, (5, 7))]
    names = ["blocks.1.out.weight", "blocks.1.out.bias"]

    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = model, nn.Linear(6, 1, bias=False).double()
            self.head.weight.data = w0[None].clone()

        def forward(self, x):
            return self.head(self.body(x))

    kernel = empirical_ntk(WithHead(), x, parameters=["head.weight", *(f"body.{n}" for n in names)])
    exact = TangentFeatures(model, names, w0, None)(x)
    torch.testing.assert_close(exact @ exact.T, kernel)
    generator = torch.Generator().manual_seed(0)
    projected = TangentFeatures(model, names, w0, 4000, generator=generator)(x)
    torch.testing.assert_close(projected @ projected.T, kernel, rtol=0.15, atol=0.05 * float(kernel.max()))

    space, sequences, scores = gc_table()
    tangent = TangentFeatures(MaskedLM(4, width=6, hidden=5).eval(), names, w0, 16, generator=generator)
    found = BIBDesigner(tangent, space, n_designs=3, steps=3, random_state=0).fit(sequences, scores).design()
    assert found.status is Status.FINISHED


# Reference traces: computed in float64 from the published update rules, with a toy feature map of 3-mers


class ToyFeatures(nn.Module):
    kmer = 3

    def __init__(self, W, V):
        super().__init__()
        self.W, self.V = nn.Parameter(W, requires_grad=False), nn.Parameter(V, requires_grad=False)

    def forward(self, tokens):
        return torch.tanh(tokens @ self.W).mean(1) @ self.V


class LinearAuxiliary:
    def __init__(self, a, c):
        self.a, self.c = a, c

    def predict(self, h):
        return h @ self.a + self.c

    def gradient(self, h):
        return self.a.expand(len(h), -1)


@pytest.mark.parametrize(("name", "center", "eta"), [
    ("trace_gamma", False, "fixed"), ("trace_gamma_eta_centered", True, "adaptive"),
])  # fmt: skip
def test_trajectories_follow_the_reference(golden, name, center, eta):
    ref = {k: torch.as_tensor(v) for k, v in np.load(golden / "29-bib" / f"{name}.npz").items()}
    model = ToyFeatures(ref["W"], ref["V"]).eval()
    space = SequenceSpace("dna", ref["X"].shape[1])
    aux = LinearAuxiliary(ref["wa"], ref["ba"])
    designer = BIBDesigner(model, space, center=center, aux=aux, steps=12, eta=eta)
    designer.fit(ref["X"].numpy(), ref["y"].numpy())
    torch.testing.assert_close(designer.feature_mean_, ref["feature_mean"])
    torch.testing.assert_close(swap_in(ref["base"], ref["cand"][None])[0], ref["theta0"], rtol=0, atol=0)
    thetas = [ref["theta0"]]
    run = designer.ascent.run(designer.embedding(), designer.head_, designer.aux_, ref["theta0"][None])
    for steps in range(1, 12):
        shorter = BIBDesigner(model, space, center=center, aux=aux, steps=steps, eta=eta)
        part = shorter.ascent.run(designer.embedding(), designer.head_, designer.aux_, ref["theta0"][None])
        thetas.append(part.state.theta[0])
    for key, attribute in (
        ("lf", "forward"),
        ("lb", "backward"),
        ("aux", "auxiliary"),
        ("gamma", "gamma"),
        ("eta", "eta"),
    ):
        found = torch.stack([getattr(step, attribute)[0] for step in run.trace])
        torch.testing.assert_close(found, ref[f"trace_{key}"], rtol=1e-8, atol=1e-8, msg=key)
    torch.testing.assert_close(torch.stack(thetas), ref["trace_theta"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(run.state.theta[0], ref["theta_final"], rtol=1e-8, atol=1e-8)


# The designer


def gc_table(n=150, length=6, limit=4):
    """Scores are the GC content; the table knows sequences with little of it."""
    space = SequenceSpace("dna", length)
    sequences = space.random(n, np.random.default_rng(0))
    gc = ((sequences == 1) | (sequences == 2)).sum(1)
    return space, sequences[gc < limit], gc[gc < limit].astype(float)


def designer(**options):
    space, sequences, scores = gc_table()
    return BIBDesigner(OneHotFeatures(), space, **{"n_designs": 5, "random_state": 0, "steps": 20} | options).fit(
        sequences, scores
    )


def test_designs_leave_the_table_behind():
    found = designer(steps=100).design()
    assert min(s.count("G") + s.count("C") for s in found.sequences) == 6
    assert (found.distance > 0).all()
    assert len(found.trace) == 100
    np.testing.assert_allclose(found.proxy, 6, atol=1e-3)
    np.testing.assert_allclose(designer().predict(found.sequences), found.proxy)


def test_first_step_of_gamma_is_the_rate_and_gamma_stays_a_weight():
    trace = designer().design().trace
    gammas = torch.stack([step.gamma for step in trace])
    torch.testing.assert_close((gammas[0] - 0.5).abs(), torch.full((5,), 0.1), atol=1e-4, rtol=0)
    assert gammas.min() >= 0
    assert gammas.max() <= 1


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_fixed_weight_at_its_end_is_one_direction_bit_for_bit(gamma):
    model = designer(gamma=gamma)
    found = model.design()

    class OneDirection:
        predict = staticmethod(model.head_.predict)

        def losses(self, h):
            both = model.head_.losses(h)
            chosen = both.forward_gradient if gamma else both.backward_gradient
            return Losses(both.forward, both.backward, chosen, torch.zeros_like(chosen))

    alone = designer(gamma=1.0)
    start = designer(steps=0).design().state.theta
    run = alone.ascent.run(model.embedding(), OneDirection(), model.aux_, start)
    assert torch.equal(run.state.theta, found.state.theta)


def test_a_batch_of_designs_is_each_by_itself():
    model = designer(eta="adaptive")
    together = model.design()
    start = together.start
    for row in range(5):
        alone = model.design(start=start[row : row + 1])
        torch.testing.assert_close(alone.state.theta[0], together.state.theta[row], atol=1e-4, rtol=1e-4)


def test_stopped_by_the_callback_and_resumed_ends_where_a_whole_run_does():
    model = designer(eta="adaptive")
    whole = model.design()
    half = model.design(callback=lambda step, seen: step == 7)
    assert half.status is Status.STOPPED
    assert len(half.trace) == 7
    rest = model.design(resume=half)
    assert torch.equal(rest.state.theta, whole.state.theta)
    assert torch.equal(rest.state.gamma, whole.state.gamma)
    assert len(rest.trace) == 20
    with pytest.raises(ValueError, match="resume"):
        model.design(3, resume=half)


def test_the_same_random_state_gives_the_same_designs():
    assert torch.equal(designer().design().state.theta, designer().design().state.theta)
    assert not torch.equal(designer().design().state.theta, designer(random_state=1).design().state.theta)


def test_a_loop_that_leaves_the_finite_numbers_says_so():
    class Broken:
        calls = 0

        def predict(self, h):
            return h.sum(1)

        def gradient(self, h):
            self.calls += 1
            return h * (float("nan") if self.calls > 3 else 1)

    found = designer(aux=Broken()).design()
    assert found.status is Status.NOT_FINITE
    assert len(found.trace) == 3
    assert found.state.theta.isfinite().all()


def test_centring_is_an_intercept_without_penalty():
    space, sequences, scores = gc_table()
    model = BIBDesigner(OneHotFeatures(), space, random_state=0, ridge=1e-9).fit(sequences, scores)
    np.testing.assert_allclose(model.predict(sequences), scores, atol=1e-5)
    shifted = BIBDesigner(OneHotFeatures(), space, random_state=0, ridge=1e-9).fit(sequences, scores + 100)
    np.testing.assert_allclose(shifted.predict(sequences), scores + 100, atol=1e-5)


def test_the_offline_table_is_not_changed():
    space, sequences, scores = gc_table()
    before = sequences.copy(), scores.copy()
    BIBDesigner(OneHotFeatures(), space, n_designs=3, steps=2).fit(sequences, scores).design()
    np.testing.assert_array_equal(sequences, before[0])
    np.testing.assert_array_equal(scores, before[1])


def test_a_deep_kernel_on_features_is_a_designer_too():
    found = designer(kernel="ntk", gamma=0.5).design()
    assert found.status is Status.FINISHED
    assert np.mean([s.count("G") + s.count("C") for s in found.sequences]) > 3
    linear = designer(kernel=lambda a, b: a @ b.T, gamma=0.5).design()
    assert linear.sequences == designer(gamma=0.5).design().sequences


def test_bdi_moves_logits_and_reads_letters_back():
    space, sequences, scores = gc_table()
    logits = Logits.fit(space, sequences, 0.6)
    np.testing.assert_array_equal(logits.back(logits.forth(sequences)), sequences)
    np.testing.assert_allclose(logits.forth(sequences).std(0), 1)
    model = BDIDesigner(space, n_designs=4).fit(sequences, scores)
    np.testing.assert_allclose(model.predict(sequences[:20]), scores[:20], atol=0.1)
    found = model.design()
    assert found.status is Status.FINISHED
    assert np.mean([s.count("G") + s.count("C") for s in found.sequences]) > 4


# Refusals


@pytest.mark.parametrize(
    ("sequences", "scores", "message"),
    [
        ([], [], r"sequences must hold at least one"),
        (["ACGTAC"] * 5, np.arange(5.0), "at least 10"),
        (["ACGTAC"] * 11 + ["ACGTNC"], np.arange(12.0), r"sequences\[11\] has the letter 'N' at position 4"),
        (["ACGTAC"] * 11 + ["ACGTA"], np.arange(12.0), r"sequences\[11\] must have 6 letters, got 5"),
        (["ACGTAC"] * 12, np.ones(12), "scores must not be constant"),
        (["ACGTAC"] * 12, np.arange(11.0), "scores must have shape"),
        (["ACGTAC"] * 12, np.r_[np.arange(11.0), np.nan], "scores holds NaN"),
        (np.full((12, 6), 4), np.arange(12.0), r"indices in \[0, 4\)"),
        (np.zeros((12, 5), int), np.arange(12.0), r"shape \(any, 6\)"),
    ],
)
@pytest.mark.parametrize("kind", ["bib", "bdi"])
def test_unfit_tables_are_named(sequences, scores, message, kind, without_shape_checks):
    space = SequenceSpace("dna", 6)
    model = BIBDesigner(OneHotFeatures(), space) if kind == "bib" else BDIDesigner(space)
    with pytest.raises(ValueError, match=message):
        model.fit(sequences, np.asarray(scores, float))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"target": 0}, "target"),
        ({"ridge": -1.0}, "ridge"),
        ({"gamma": 1.5}, "gamma"),
        ({"gamma": "learned"}, "gamma"),
        ({"eta": "fast"}, "eta"),
        ({"kernel": "rbf"}, "kernel"),
        ({"aux": "forest"}, "aux"),
        ({"steps": -1}, "steps"),
        ({"n_designs": 0}, "n_designs"),
        ({"lr": float("nan")}, "lr"),
    ],
)
def test_impossible_settings_are_named(option, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        BIBDesigner(OneHotFeatures(), SequenceSpace("dna", 6), **option)


def test_a_designer_is_fitted_first_and_asked_for_what_it_has(without_shape_checks):
    space = SequenceSpace("dna", 6)
    with pytest.raises(ValueError, match="not fitted"):
        BIBDesigner(OneHotFeatures(), space).design()
    with pytest.raises(ValueError, match="n must be at most"):
        designer().design(10_000)
    with pytest.raises(TypeError, match="kmer"):
        BIBDesigner(lambda x: x, space)
    with pytest.raises(ValueError, match="training mode"):
        BIBDesigner(MaskedLM(4), space).fit(*gc_table()[1:])
    with pytest.raises(ValueError, match="do not fit"):
        BIBDesigner(ToyFeatures(torch.zeros(64, 2), torch.zeros(2, 2)), SequenceSpace("dna", 2))
    for head in (LinearizedHead, lambda F, y: KernelHead(lambda a, b: a @ b.T, F, y)):
        with pytest.raises(ValueError, match="features must not all be zero"):
            head(torch.zeros(4, 3, dtype=torch.float64), torch.arange(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="features must not all be zero"):
        BIBDesigner(ToyFeatures(torch.zeros(64, 2), torch.zeros(2, 2)).eval(), space).fit(*gc_table()[1:])
