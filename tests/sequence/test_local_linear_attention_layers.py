"""Decoding, the layer, the baselines against plain recurrences, the estimator, Transformers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.estimator_checks import check_estimator
from torch.nn.functional import normalize

from locally.errors import MissingExtra
from locally.sequence.local_linear_attention import (
    KeyValueCache,
    LocalLinearAttention,
    LocalLinearRegressor,
    delta_rule,
    linear_attention,
    lla_decode,
    local_linear_attention,
    mesa,
    nadaraya_watson,
    register_with_transformers,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Decoding -----------------------------------------------------------------------------------------------------------


@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=5), d=st.integers(1, 5), padded=st.booleans())
def test_decoding_in_any_chunks_equals_the_whole(chunks, d, padded):
    n = sum(chunks)
    q, k, v = draw(2, 4, n, d), draw(2, 2, n, d, seed=1), draw(2, 2, n, 3, seed=2)
    hidden = draw(2, n, seed=3) > 0.7 if padded else None
    ridge = 0.1 + draw(4, 1, seed=4).square()
    whole = local_linear_attention(q, k, v, ridge=ridge, key_padding_mask=hidden, solver="cholesky")
    cache, start, parts = KeyValueCache(), 0, []
    for size in chunks:
        part = slice(start, start + size)
        start += size
        new = None if hidden is None else hidden[:, part]
        parts.append(lla_decode(q[:, :, part], k[:, :, part], v[:, :, part], cache, hidden=new, ridge=ridge))
    torch.testing.assert_close(torch.cat(parts, -2), whole, rtol=1e-6, atol=1e-6)
    assert len(cache) == cache.seen == n


@pytest.mark.parametrize("window", [None, 5])
def test_a_cache_goes_on_from_its_state(window):
    q, k, v = draw(1, 2, 16, 4), draw(1, 2, 16, 4, seed=1), draw(1, 2, 16, 3, seed=2)
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 6] = True
    cache = KeyValueCache(window)
    lla_decode(q[:, :, :8], k[:, :, :8], v[:, :, :8], cache, hidden=hidden[:, :8])
    copy = KeyValueCache(window)
    copy.load_state_dict(cache.state_dict())
    for t in range(8, 16):
        new = [x[:, :, t : t + 1] for x in (q, k, v)]
        torch.testing.assert_close(lla_decode(*new, copy), lla_decode(*new, cache), rtol=0, atol=0)
    with pytest.raises(ValueError, match="window"):
        KeyValueCache(3).load_state_dict(cache.state_dict())
    empty = KeyValueCache()
    empty.load_state_dict(KeyValueCache().state_dict())
    assert len(empty) == 0


def test_a_window_keeps_the_last_pairs_and_no_more():
    q, k, v = draw(1, 2, 20, 3), draw(1, 2, 20, 3, seed=1), draw(1, 2, 20, 3, seed=2)
    ridge = 0.1 + draw(20, seed=3).square()
    cache = KeyValueCache(window=6)
    o = lla_decode(q, k, v, cache, ridge=ridge)
    for t in range(20):
        last = slice(max(0, t - 5), t + 1)
        options = {"ridge": ridge[t], "is_causal": False}
        expected = local_linear_attention(q[:, :, t : t + 1], k[:, :, last], v[:, :, last], **options)
        torch.testing.assert_close(o[:, :, t : t + 1], expected, rtol=0, atol=1e-9)
    assert cache.keys.shape[-2] == len(cache) == 6
    assert cache.seen == 20


def test_what_does_not_fit_a_cache_is_named(without_shape_checks):
    cache = KeyValueCache()
    with pytest.raises(ValueError, match="empty"):
        _ = cache.keys
    k, v = draw(1, 2, 3, 4), draw(1, 2, 3, 5)
    cache.append(k, v)
    refused = [
        ((k[..., :2], v), "k must continue"),
        ((k.float(), v.float()), "k must continue"),
        ((k, v[:, :1]), "v must have"),
    ]
    for bad, message in refused:
        with pytest.raises(ValueError, match=message):
            cache.append(*bad)
    with pytest.raises(ValueError, match="hidden"):
        cache.append(k, v, torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="one row a new token"):
        lla_decode(k[:, :, :2], k, v, cache)
    assert len(cache) == 3
    with pytest.raises(ValueError, match="window"):
        KeyValueCache(window=0)


# The layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope_theta", [None, 10000.0])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_layer_decodes_as_it_attends(qk_norm, rope_theta):
    torch.manual_seed(0)
    layer = LocalLinearAttention(24, 4, 2, qk_norm=qk_norm, rope_theta=rope_theta, bias=True, ridge=0.5).double()
    x = draw(2, 9, 24)
    whole = layer(x)
    out, cache = layer(x[:, :5], use_cache=True)
    for t in range(5, 9):
        step, cache = layer(x[:, t : t + 1], past=cache, use_cache=True)
        out = torch.cat([out, step], 1)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-8)


def test_the_layer_learns_every_parameter_and_keeps_its_state():
    torch.manual_seed(0)
    layer = LocalLinearAttention(16, 2, ridge=0.3)
    assert layer.ridge.flatten().tolist() == pytest.approx([0.3, 0.3], rel=1e-5)
    layer(draw(2, 6, 16, dtype=torch.float32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    other = LocalLinearAttention(16, 2)
    other.load_state_dict(layer.state_dict())
    x = draw(1, 5, 16, dtype=torch.float32)
    assert torch.equal(other(x), layer(x))
    assert not LocalLinearAttention(16, 2, learnable_ridge=False).raw_ridge.requires_grad


def test_padding_does_not_leak_through_the_layer():
    layer = LocalLinearAttention(8, 2).double()
    x = draw(1, 7, 8)
    hidden = torch.tensor([[True, True, False, False, False, False, False]])
    torch.testing.assert_close(layer(x, key_padding_mask=hidden)[:, 2:], layer(x[:, 2:]), rtol=0, atol=1e-8)


def test_impossible_layers_are_named(without_shape_checks):
    for args, options, message in (
        ((10, 3), {}, "num_heads"),
        ((12, 4, 3), {}, "num_kv_heads"),
        ((12, 4), {"ridge": 0.0}, "ridge"),
        ((12, 4), {"rope_theta": 1e4}, "rope_theta"),
        ((0, 1), {}, "embed_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalLinearAttention(*args, **options)
    layer = LocalLinearAttention(8, 2)
    with pytest.raises(ValueError, match="x must have shape"):
        layer(torch.zeros(2, 3, 7))
    with pytest.raises(ValueError, match="NaN"):
        layer(torch.full((2, 3, 8), math.nan))


# Baselines ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def long():
    """Longer than two chunks."""
    q, k, v = (draw(2, 1, 150, size, seed=size) for size in (4, 5, 6))
    q, k = draw(2, 1, 150, 5), normalize(k, dim=-1)
    return q, k, v


@pytest.mark.parametrize("shape", [(), (2, 1, 150, 1), (2, 1, 150, 5)])
def test_linear_attention_is_its_recurrence(long, shape):
    q, k, v = long
    decay = 0.9 + 0.1 * torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    steps = decay.expand(2, 1, 150, 5) if shape else decay.expand(2, 1, 150, 1)
    S, expected = torch.zeros(2, 1, 6, 5, dtype=q.dtype), []
    for t in range(150):
        S = S * steps[:, :, t].unsqueeze(-2) + v[:, :, t].unsqueeze(-1) * k[:, :, t].unsqueeze(-2)
        expected.append((S @ q[:, :, t].unsqueeze(-1)).squeeze(-1))
    given_decay = float(decay) if not shape else decay
    torch.testing.assert_close(
        linear_attention(q, k, v, decay=given_decay), torch.stack(expected, -2), rtol=0, atol=1e-10
    )


def test_delta_rule_is_its_recurrence(long):
    q, k, v = long
    rate = 2 * torch.rand(2, 1, 150, generator=torch.Generator().manual_seed(2), dtype=q.dtype)
    decay = 0.8 + 0.2 * torch.rand(2, 1, 150, 1, generator=torch.Generator().manual_seed(3), dtype=q.dtype)
    S, expected = torch.zeros(2, 1, 6, 5, dtype=q.dtype), []
    for t in range(150):
        key, b = k[:, :, t].unsqueeze(-1), rate[:, :, t, None, None]
        S = decay[:, :, t].unsqueeze(-1) * (S - b * S @ key @ key.mT) + b * v[:, :, t].unsqueeze(-1) @ key.mT
        expected.append((S @ q[:, :, t].unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(
        delta_rule(q, k, v, beta=rate, decay=decay), torch.stack(expected, -2), rtol=0, atol=1e-9
    )


def test_mesa_is_ridge_regression_without_intercept(long):
    q, k, v = long
    o = mesa(q, k, v, ridge=0.3)
    for t in (0, 3, 63, 64, 149):
        K, V = k[1, 0, : t + 1], v[1, 0, : t + 1]
        W = torch.linalg.solve(K.T @ K + 0.3 * torch.eye(5, dtype=q.dtype), K.T @ V)
        torch.testing.assert_close(o[1, 0, t], q[1, 0, t] @ W, rtol=0, atol=1e-10)


def test_baselines_name_bad_input(long, without_shape_checks):
    q, k, v = long
    for call, message in (
        (lambda: nadaraya_watson(q, k, v, scale=0.0), "scale"),
        (lambda: linear_attention(q[:, :, 1:], k, v), "k must have q's shape"),
        (lambda: linear_attention(q, k, v, decay=0.0), "decay"),
        (lambda: mesa(q, k, v, ridge=-1.0), "ridge"),
        (lambda: mesa(q, k, v * torch.nan), "v holds NaN"),
        (lambda: delta_rule(q, k, v, beta=2.5), "beta"),
        (lambda: delta_rule(q, k, v, decay=torch.full((5,), 0.5)), "decay"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# The estimator --------------------------------------------------------------------------------------------------------


def test_regressor_is_a_scikit_learn_estimator(without_shape_checks):
    check_estimator(LocalLinearRegressor())


def test_regressor_is_weighted_least_squares():
    rng = np.random.default_rng(0)
    X, y = 100 + rng.standard_normal((80, 2)), rng.standard_normal((80, 3))
    at = 100 + rng.standard_normal((300, 2))
    found = LocalLinearRegressor(0.7, ridge=1e-10).fit(X, y).predict(at)
    for i in (0, 150, 299):
        w = np.exp(-np.square(X - at[i]).sum(1) / (2 * 0.7**2))
        A = np.column_stack([np.ones(80), X - at[i]])
        coefficients = np.linalg.lstsq(np.sqrt(w)[:, None] * A, np.sqrt(w)[:, None] * y, rcond=None)[0]
        np.testing.assert_allclose(found[i], coefficients[0], atol=1e-5)
    for bad in ({"bandwidth": 0.0}, {"ridge": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LocalLinearRegressor(**bad).fit(X, y)


def test_regressor_agrees_with_statsmodels():
    nonparametric = pytest.importorskip("statsmodels.nonparametric.kernel_regression")
    rng = np.random.default_rng(1)
    x, at = rng.uniform(size=60), np.linspace(0, 1, 21)
    y = np.sin(6 * x) + 0.1 * rng.standard_normal(60)
    peer = nonparametric.KernelReg(y, x, "c", reg_type="ll", bw=[0.1]).fit(at)[0]
    ours = LocalLinearRegressor(0.1, ridge=1e-12).fit(x[:, None], y).predict(at[:, None])
    np.testing.assert_allclose(ours, peer, atol=1e-6)


# Transformers -------------------------------------------------------------------------------------------------------


def test_registration_says_what_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match="llm"):
        register_with_transformers()


def test_a_llama_runs_on_it_with_padding_and_cache():
    transformers = pytest.importorskip("transformers")
    name = register_with_transformers(ridge=1e9)  # as good as softmax attention
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 40, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    outputs = {}
    for implementation in ("sdpa", name):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask).logits
        generated = model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        outputs[implementation] = logits[mask.bool()], generated
    torch.testing.assert_close(outputs[name][0], outputs["sdpa"][0], rtol=0, atol=1e-4)
    assert torch.equal(outputs[name][1], outputs["sdpa"][1])
    register_with_transformers(ridge=0.1)
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
