"""Local pruning: the refit is least squares, the updates are exact, and the reference's figures."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor

from locally.sequence.structured_pruning import InputStatistics, local_prune, local_prune_levels
from locally.sequence.structured_pruning.local import rows_of


def layer(seed: int = 0, d_in: int = 24, d_out: int = 6, tokens: int = 120) -> tuple[Tensor, Tensor]:
    """Correlated inputs, and weights."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64) / d_in**0.5
    X = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64) @ mix
    return X, torch.randn(d_in, d_out, generator=generator, dtype=torch.float64)


def relative_error(X: Tensor, W: Tensor, pruned: Tensor) -> float:
    return float((X @ (pruned - W)).square().sum() / (X @ W).square().sum())


@pytest.mark.parametrize(
    ("file", "score", "kept", "error"),
    [
        *((f"local_{i}", "obs+grad", "kept_channels", "rel_err") for i in range(6)),
        ("local_4", "paper", "kept_channels_abs", "rel_err_abs"),
        ("local_4", "obs", "kept_channels_obs", "rel_err_obs"),
        ("local_5", "paper", "kept_channels_paper", "rel_err_paper"),
        ("local_5", "obs", "kept_channels_obs", "rel_err_obs"),
        ("zero_group", "obs+grad", "kept_channels", "rel_err"),
    ],
)
def test_golden(golden, file, score, kept, error):
    known = np.load(golden / "14-tyr-the-pruner" / f"{file}.npz")
    X, W = torch.from_numpy(known["X"]), torch.from_numpy(known["W"])
    groups, keep, rounds = (int(known[name]) for name in ("groups", "keep", "rounds"))
    H = X.mT @ X
    found = local_prune(H, W, groups=groups, keep=keep, rounds=rounds, score=score, damping=float(known["damp"]))
    assert (found.kept.repeat_interleave(len(W) // groups).numpy() == known[kept]).all()
    assert relative_error(X, W, found.weight) == pytest.approx(float(known[error]), rel=1e-9)
    assert found.error == pytest.approx(float((X @ (found.weight - W)).square().sum()), rel=1e-8)
    if score == "obs+grad":
        np.testing.assert_allclose(found.weight, known["W_pruned"], atol=1e-11)
        if "objective" in known:
            assert found.objective == pytest.approx(float(known["objective"]), rel=1e-11)
        if "rel_err_magnitude" in known:
            assert found.error < float(known["rel_err_magnitude"]) * float((X @ W).square().sum())


@given(seed=st.integers(0, 1000), size=st.sampled_from([1, 2, 4]), share=st.floats(0.1, 0.9))
def test_kept_weights_are_ridge_regression(seed, size, share):
    X, W = layer(seed)
    groups = 24 // size
    keep = max(1, round(share * groups))
    H = X.mT @ X
    found = local_prune(H, W, groups=groups, keep=keep, rounds=3, damping=0.02)
    assert int(found.kept.sum()) == keep
    K = rows_of(found.kept.nonzero().squeeze(1), size)
    ridge = 0.02 * float(H.diagonal().mean())
    # damping pulls towards the dense weights: on augmented data that is plain least squares
    augmented = torch.cat([X, ridge**0.5 * torch.eye(24, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(augmented[:, K], augmented @ W).solution
    if keep < groups:
        torch.testing.assert_close(found.weight[K], wanted, rtol=1e-7, atol=1e-8)
    residual = augmented @ (W - found.weight)
    assert float((augmented[:, K].mT @ residual).abs().max()) < 1e-8 * float((augmented.mT @ augmented @ W).abs().max())
    gone = torch.ones(24, dtype=torch.bool)
    gone[K] = False
    assert not found.weight[gone].any()


def test_without_damping_it_is_what_scikit_learn_fits():
    X, W = layer(3)
    found = local_prune(X.mT @ X, W, groups=24, keep=10, damping=0.0)
    K = found.kept
    fitted = Ridge(alpha=0.0, fit_intercept=False, solver="svd").fit(X[:, K].numpy(), (X @ W).numpy())
    np.testing.assert_allclose(found.weight[K], fitted.coef_.T, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("size", [1, 4])
def test_running_updates_equal_the_refit(size):
    """The optimal-brain-surgeon updates, written out in full on whole matrices, end in the same weights."""
    X, W = layer(7)
    H = X.mT @ X
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    inverse, running = torch.linalg.inv(damped), W.clone()
    groups = 24 // size
    order = []
    for keep in range(groups - 1, 1, -1):
        found = local_prune(H, W, groups=groups, keep=keep, rounds=None)
        p = next(g for g in range(groups) if not found.kept[g] and g not in order)
        order.append(p)
        P = slice(p * size, (p + 1) * size)
        block = torch.linalg.inv(inverse[P, P])
        running = running - inverse[:, P] @ block @ running[P]
        inverse = inverse - inverse[:, P] @ block @ inverse[P]
        running[P], inverse[P], inverse[:, P] = 0, 0, 0
        torch.testing.assert_close(found.weight, running, rtol=1e-9, atol=1e-9)


def test_nothing_and_everything():
    X, W = layer()
    H = X.mT @ X
    whole = local_prune(H, W, groups=12, keep=12)
    assert torch.equal(whole.weight, W)
    assert whole.error == 0
    nothing = local_prune(H, W, groups=12, keep=0)
    assert not nothing.weight.any()
    assert nothing.error == pytest.approx(float((X @ W).square().sum()), rel=1e-10)


def test_pruning_again_at_the_same_sparsity_changes_nothing():
    X, W = layer()
    H = X.mT @ X
    once = local_prune(H, W, groups=12, keep=5, damping=0.0)
    again = local_prune(H, once.weight, groups=12, keep=5, damping=0.0)
    assert torch.equal(once.kept, again.kept)
    torch.testing.assert_close(again.weight, once.weight, rtol=1e-8, atol=1e-10)


def test_levels_are_nested_and_cost_more_the_more_goes():
    X, W = layer(5)
    H = X.mT @ X
    keeps = [24, 18, 12, 6, 0]
    levels = local_prune_levels(H, W, groups=24, keeps=keeps)
    assert [int(level.kept.sum()) for level in levels] == keeps
    for more, less in itertools.pairwise(levels):
        assert bool((more.kept | ~less.kept).all())
        assert more.error <= less.error + 1e-9


def test_levels_with_rounds_of_their_own_are_separate_calls():
    X, W = layer(6)
    H = X.mT @ X
    together = local_prune_levels(H, W, groups=24, keeps=[5, 17], rounds=4, shared=False)
    for keep, level in zip([5, 17], together):
        alone = local_prune(H, W, groups=24, keep=keep, rounds=4)
        assert torch.equal(alone.weight, level.weight)


def test_orthogonal_inputs_need_no_compensation():
    _, W = layer(8)
    found = local_prune(3.0 * torch.eye(24, dtype=torch.float64), W, groups=24, keep=10)
    torch.testing.assert_close(found.weight[found.kept], W[found.kept])
    smallest = W.square().sum(1).argsort()[:14]
    assert not found.kept[smallest].any()


def test_of_duplicates_one_goes_and_the_other_takes_over():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(2))
    X = torch.stack([a, a, b], 1)
    H = X.mT @ X
    found = local_prune(H, torch.tensor([[1.0], [1.0], [4.0]], dtype=torch.float64), groups=3, keep=2, damping=1e-9)
    assert found.kept[2]
    assert float(found.weight[found.kept][0]) == pytest.approx(2.0, abs=1e-6)
    # with a small third weight the two scores part: pure surgeon keeps it, the published score takes it away
    W = torch.tensor([[1.0], [1.0], [0.5]], dtype=torch.float64)
    surgeon = local_prune(H, W, groups=3, keep=2, damping=1e-9, score="obs")
    published = local_prune(H, W, groups=3, keep=2, damping=1e-9)
    assert surgeon.kept[2]
    assert not published.kept[2]
    assert relative_error(X, W, surgeon.weight) < 1e-6


def test_silent_inputs_and_singular_matrices():
    X, W = layer(9)
    X[:, 3] = 0
    found = local_prune(X.mT @ X, W, groups=24, keep=12)
    assert not found.kept[3]
    few = X[:5]  # fewer tokens than inputs: singular without damping
    with pytest.warns(UserWarning, match="singular"):
        undamped = local_prune(few.mT @ few, W, groups=24, keep=12, damping=0.0)
    assert undamped.damping > 0
    assert torch.isfinite(undamped.weight).all()


def test_input_is_left_alone_and_dtype_kept():
    X, W = layer(10)
    H = X.mT @ X
    before, weights = H.clone(), W.clone()
    local_prune(H, W, groups=6, keep=2)
    assert torch.equal(H, before)
    assert torch.equal(W, weights)
    assert local_prune(H.float(), W.bfloat16(), groups=6, keep=2).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"groups": 7}, "groups"),
        ({"keep": 25}, "keep"),
        ({"keep": -1}, "keep"),
        ({"rounds": 0}, "rounds"),
        ({"score": "best"}, "score"),
        ({"damping": -1.0}, "damping"),
        ({"H": torch.full((24, 24), torch.nan)}, "H holds NaN"),
        ({"H": torch.ones(24, 23)}, "H must be a square"),
        ({"W": torch.ones(23, 4)}, "W must have shape"),
        ({"H": -torch.eye(24)}, "positive semi-definite"),
    ],
)
def test_bad_input_is_named(change, names, without_shape_checks):
    X, W = layer()
    given = {"H": X.mT @ X, "W": W, "groups": 24, "keep": 5} | change
    with pytest.raises(ValueError, match=names):
        local_prune(given.pop("H"), given.pop("W"), **given)


def test_statistics_do_not_depend_on_the_batches():
    X, _ = layer(11)
    whole, parts, thin = InputStatistics(24), InputStatistics(24), InputStatistics(24, gram=False)
    whole.add(X)
    for i in range(0, 120, 40):
        parts.add(X[i : i + 40].reshape(4, 10, 24))
        thin.add(X[i : i + 40])
    torch.testing.assert_close(whole.gram, (X.mT @ X).float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(thin.squared_norms, X.square().sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(thin.variances, X.var(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(thin.means, X.mean(0), rtol=1e-5, atol=1e-6)
