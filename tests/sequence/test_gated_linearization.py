"""The recurrence's forms against one another and against what is known: closed forms, reference vectors, SDPA."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from locally.sequence.gated_linearization import (
    LigerConfig,
    gated_linear_attention,
    gated_recurrence,
    gated_slot_attention,
    sliding_window_attention,
)
from locally.sequence.gated_linearization.attention import rotate
from locally.sequence.gated_linearization.gates import pool

DTYPES = {torch.float64: 1e-11, torch.float32: 2e-5}
VARIANTS = ("gla", "hgrn2", "gsa", "mamba2", "mlstm", "rwkv6", "linear")


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(T, *, heads=4, kv_heads=2, D=8, Dv=6, gates=8, scale=1.0, dtype=torch.float64, seed=0):
    q, k, v = (normal(2, h, T, d, dtype=dtype, seed=seed + i) for i, (h, d) in enumerate(
        ((heads, D), (kv_heads, D), (kv_heads, Dv))
    ))  # fmt: skip
    return q, k, v, scale * logsigmoid(normal(2, kv_heads, T, gates, dtype=dtype, seed=seed + 3))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(
    T=st.integers(1, 90),
    chunk=st.sampled_from([1, 2, 8, 16, 64]),
    gates=st.sampled_from([1, 8]),
    scale=st.sampled_from([1 / 16, 1.0, 30.0]),
    seed=st.integers(0, 2**20),
)
def test_three_forms_of_gated_linear_attention_agree(dtype, T, chunk, gates, scale, seed):
    q, k, v, g = inputs(T, gates=gates, scale=scale, dtype=dtype, seed=seed)
    S = normal(2, 2, 8, 6, dtype=dtype, seed=seed + 9)
    wanted, last = gated_linear_attention(q, k, v, g, initial_state=S, mode="recurrent")
    for mode in ("chunk", "parallel"):
        o, state = gated_linear_attention(q, k, v, g, initial_state=S, mode=mode, chunk_size=chunk)
        torch.testing.assert_close(o, wanted, rtol=DTYPES[dtype], atol=8 * DTYPES[dtype])
        torch.testing.assert_close(state, last, rtol=DTYPES[dtype], atol=8 * DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(
    T=st.integers(1, 90),
    chunk=st.sampled_from([1, 2, 8, 16, 64]),
    slots=st.integers(1, 9),
    scale=st.sampled_from([1 / 16, 1.0, 30.0]),
    seed=st.integers(0, 2**20),
)
def test_three_forms_of_gated_slot_attention_agree(dtype, T, chunk, slots, scale, seed):
    q, k, v, g = inputs(T, gates=slots, scale=scale, dtype=dtype, seed=seed)
    q = q / 3  # logits of a few units
    S = normal(2, 2, slots, 8, dtype=dtype, seed=seed + 8), normal(2, 2, slots, 6, dtype=dtype, seed=seed + 9)
    wanted, last = gated_slot_attention(q, k, v, g, initial_state=S, mode="recurrent")
    for mode in ("chunk", "parallel"):
        o, state = gated_slot_attention(q, k, v, g, initial_state=S, mode=mode, chunk_size=chunk)
        torch.testing.assert_close(o, wanted, rtol=10 * DTYPES[dtype], atol=20 * DTYPES[dtype])
        for ours, theirs in zip(state, last):
            torch.testing.assert_close(ours, theirs, rtol=DTYPES[dtype], atol=8 * DTYPES[dtype])


@pytest.mark.parametrize("attention", [gated_linear_attention, gated_slot_attention])
@pytest.mark.parametrize("scale", [1 / 16, 40.0])
def test_gradients_of_the_forms_agree(attention, scale):
    def gradients(mode):
        q, k, v, g = (x.requires_grad_() for x in inputs(37, scale=scale))
        o, state = attention(q / 3, k, v, g, mode=mode, chunk_size=16)
        states = state if isinstance(state, tuple) else (state,)
        return torch.autograd.grad(o.square().sum() + sum(s.sum() for s in states), (q, k, v, g))

    wanted = gradients("recurrent")
    for mode in ("chunk", "parallel"):
        for ours, theirs in zip(gradients(mode), wanted):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", [gated_linear_attention, gated_slot_attention])
@pytest.mark.parametrize("gate", [-20.0, -200.0])
def test_strong_gates_stay_finite_in_single_precision(attention, gate):
    q, k, v, _ = inputs(70, dtype=torch.float32)
    g = torch.full((2, 2, 70, 8), gate, requires_grad=True)
    v.requires_grad_()
    o, _ = attention(q, k, v, g)
    gradients = torch.autograd.grad(o.square().sum(), (v, g))
    assert all(bool(x.isfinite().all()) for x in (o, *gradients))
    wanted, _ = attention(q.double(), k.double(), v.double(), g.double(), mode="recurrent")
    torch.testing.assert_close(o.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", [gated_linear_attention, gated_slot_attention])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shut_gates_forget_exactly_and_cost_no_precision(attention, dtype):
    q, k, v, g = inputs(64, dtype=dtype)
    g[:, :, 5:40] = -torch.inf
    q = q / 3
    wanted, last = attention(q.double(), k.double(), v.double(), g.double(), mode="recurrent")
    for mode in ("chunk", "parallel", "recurrent"):
        o, state = attention(q, k, v, g, mode=mode)
        torch.testing.assert_close(o.double(), wanted, rtol=10 * DTYPES[dtype], atol=10 * DTYPES[dtype])
        for ours, theirs in zip(*((x if isinstance(x, tuple) else (x,)) for x in (state, last))):
            torch.testing.assert_close(ours.double(), theirs, rtol=10 * DTYPES[dtype], atol=10 * DTYPES[dtype])


def test_a_sequence_in_pieces_is_the_sequence():
    q, k, v, g = inputs(50)
    whole, last = gated_linear_attention(q, k, v, g)
    state, pieces = None, []
    for part in (slice(0, 13), slice(13, 14), slice(14, 50)):
        o, state = gated_linear_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], g[:, :, part], initial_state=state
        )
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 2), whole)
    torch.testing.assert_close(state, last)


def test_open_gates_give_linear_attention_and_shut_gates_the_present():
    q, k, v, _ = inputs(30)
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    summed = (q @ repeated[0].mT).tril() @ repeated[1]
    for gate in (None, torch.zeros(2, 2, 30, 8, dtype=q.dtype)):
        torch.testing.assert_close(gated_linear_attention(q, k, v, gate)[0], summed)
    shut = torch.full((2, 2, 30, 1), -torch.inf, dtype=q.dtype)
    present = (q * repeated[0]).sum(-1, keepdim=True) * repeated[1]
    for mode in ("chunk", "parallel", "recurrent"):
        torch.testing.assert_close(gated_linear_attention(q, k, v, shut, mode=mode)[0], present)


def test_one_slot_that_forgets_everything_returns_the_value():
    q, k, v, _ = inputs(9, heads=2)
    shut = torch.full((2, 2, 9, 1), -torch.inf, dtype=q.dtype)
    torch.testing.assert_close(gated_slot_attention(q, k, v, shut)[0], v)


def test_a_constant_forget_gate_sums_geometrically():
    config = LigerConfig(variant="hgrn2")
    T, D = 40, 8
    q, v = normal(1, 2, T, D), normal(1, 1, T, D, seed=1)
    f = normal(1, 1, 1, D, seed=2)
    o, _ = gated_recurrence(config, q, f.expand(1, 1, T, D), v)
    alpha = f.sigmoid()[0, 0, 0]
    age = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    weight = alpha ** age[..., None] * (1 - alpha)
    weight = weight * (torch.arange(T)[:, None] >= torch.arange(T))[..., None]
    wanted = torch.einsum("bhtd,tsd,bse->bhte", q.softmax(-1), weight, v[:, 0])
    torch.testing.assert_close(o, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("source", ["k", "q", "v"])
def test_every_gate_is_the_written_out_recurrence(variant, source):
    config = LigerConfig(variant=variant, gate_source=source, slots=4, chunk_size=8)
    T, D = 21, 8
    q, k, v = normal(1, 4, T, D), normal(1, 2, T, D, seed=1), normal(1, 2, T, D, seed=2)
    o, state = gated_recurrence(config, q, k, v)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    s = {"k": k, "q": q, "v": v}[source]
    averaged = s.unflatten(-1, (4, 2)).mean(-1)
    mean = s.mean(-1, keepdim=True)
    alpha = {
        "gla": torch.sigmoid(s) ** (1 / 16),
        "hgrn2": torch.sigmoid(s),
        "gsa": torch.sigmoid(averaged) ** (1 / 16),
        "mamba2": 1 / (1 + torch.exp(mean)),
        "mlstm": torch.sigmoid(mean),
        "rwkv6": torch.exp(-torch.exp(s)),
        "linear": torch.ones_like(s),
    }[variant]
    wanted = torch.zeros(1, 4, T, D, dtype=q.dtype)
    for h in range(4):
        S, K, V = torch.zeros(D, D), torch.zeros(4, D), torch.zeros(4, D)
        S, K, V = (x.double() for x in (S, K, V))
        for t in range(T):
            qt, kt, vt, at = q[0, h, t], k[0, h, t], v[0, h, t], alpha[0, h, t]
            if variant == "gsa":
                K = at[:, None] * K + (1 - at)[:, None] * kt
                V = at[:, None] * V + (1 - at)[:, None] * vt
                wanted[0, h, t] = (K @ qt).softmax(0) @ V
            else:
                key = 1 - at if variant == "hgrn2" else kt.softmax(0)
                S = at[:, None] * S + key[:, None] * vt
                wanted[0, h, t] = qt.softmax(0) @ S
    torch.testing.assert_close(o, wanted)
    assert len(state) == (2 if variant == "gsa" else 1)


def test_a_lower_bound_keeps_gates_above_it():
    k = torch.full((1, 1, 2, 4), -1e3, dtype=torch.float64)
    v = torch.ones(1, 1, 2, 4, dtype=torch.float64)
    o, _ = gated_recurrence(LigerConfig(variant="hgrn2", lower_bound=0.25), k, k, v)
    # gate 1/4, key 3/4: the second token reads 3/4 + 1/4 * 3/4
    torch.testing.assert_close(o[0, 0, :, 0], torch.tensor([0.75, 0.9375], dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_leaves_the_state_alone(variant):
    config = LigerConfig(variant=variant, slots=4)
    q, k, v = normal(2, 4, 20, 8), normal(2, 2, 20, 8, seed=1), normal(2, 2, 20, 8, seed=2)
    wanted, last = gated_recurrence(config, q[:, :, 5:15], k[:, :, 5:15], v[:, :, 5:15])
    visible = torch.zeros(2, 20, dtype=torch.bool)
    visible[:, 5:15] = True
    o, state = gated_recurrence(config, q, k, v, visible=visible)
    torch.testing.assert_close(o[:, :, 5:15], wanted)
    for ours, theirs in zip(state, last):
        torch.testing.assert_close(ours, theirs)


def test_pooling_averages_within_heads_where_it_can():
    x = normal(2, 3, 5, 12)
    flat = x.transpose(1, 2).reshape(10, 1, 36)
    for width in (1, 4, 8, 12):
        wanted = torch.nn.functional.adaptive_avg_pool1d(flat, 3 * width).view(2, 5, 3, width).transpose(1, 2)
        torch.testing.assert_close(pool(x, width), wanted)
    assert pool(x, 12) is x


@settings(max_examples=60)
@given(
    T=st.integers(1, 200),
    past=st.integers(0, 80),
    window=st.integers(1, 260),
    padded=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_window_is_banded_attention(T, past, window, padded, seed):
    S = T + past
    q, k, v = normal(2, 4, T, 4, seed=seed), normal(2, 2, S, 4, seed=seed + 1), normal(2, 2, S, 3, seed=seed + 2)
    visible = None
    at = torch.arange(S)
    age = at[past:, None] - at
    mask = ((age >= 0) & (age < window)).expand(2, 1, T, S)
    if padded:
        visible = torch.rand(2, S, generator=torch.Generator().manual_seed(seed)) > 0.3
        mask = (mask & visible[:, None, None]) | (age == 0)
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    wanted = scaled_dot_product_attention(q, *repeated, attn_mask=mask, scale=0.7)
    o = sliding_window_attention(q, k, v, window=window, scale=0.7, visible=visible)
    torch.testing.assert_close(o, wanted)


def test_reference_vectors(golden):
    with np.load(golden / "11-liger" / "layer_a.npz", allow_pickle=False) as file:
        z = {name: torch.from_numpy(file[name]) for name in file.files}
    D, window, slots, theta = (z[name].item() for name in ("head_dim", "window", "slots", "rope_theta"))
    x = z["x"]
    q, k, v = ((x @ z[w].T).unflatten(-1, (-1, D)).transpose(1, 2) for w in ("Wq", "Wk", "Wv"))
    T = x.shape[1]
    frequencies = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.outer(torch.arange(T, dtype=torch.float64), frequencies).repeat(1, 2).unsqueeze(0)
    turned = [rotate(y, angles.cos(), angles.sin()) for y in (q, k)]
    near = sliding_window_attention(*turned, v, window=window)
    torch.testing.assert_close(near, z["swa"], rtol=0, atol=1e-12)
    for variant in ("gla", "hgrn2", "gsa"):
        config = LigerConfig(variant=variant, slots=slots, chunk_size=16)
        o, state = gated_recurrence(config, q, k, v)
        torch.testing.assert_close(o, z[f"grm_{variant}"], rtol=0, atol=1e-12)
        names = ("state_gsa_k", "state_gsa_v") if variant == "gsa" else (f"state_{variant}",)
        for ours, name in zip(state, names):
            torch.testing.assert_close(ours.repeat_interleave(2, 1), z[name], rtol=0, atol=1e-12)
        out = (0.5 * (o + near)).transpose(1, 2).flatten(2) @ z["Wo"].T
        torch.testing.assert_close(out, z[f"out_{variant}"], rtol=0, atol=1e-12)


def test_states_are_single_precision_at_least():
    q, k, v, g = inputs(10, dtype=torch.bfloat16)
    o, state = gated_linear_attention(q, k, v, g)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": normal(2, 4, 5, 7)}, "k must have shape"),
        ({"k": normal(2, 3, 5, 8)}, "heads that divides"),
        ({"v": normal(2, 2, 4, 6)}, "v must have shape"),
        ({"q": normal(4, 5, 8)}, "q must have shape"),
        ({"log_gate": torch.zeros(2, 2, 5, 3).double()}, "1 or 8 channels"),
        ({"log_gate": torch.full((2, 2, 5, 1), 0.1).double()}, "at most 0"),
        ({"log_gate": torch.full((2, 2, 5, 1), torch.nan).double()}, "at most 0"),
        ({"initial_state": normal(2, 2, 8, 5)}, "initial_state"),
        ({"mode": "fast"}, "mode must be one of"),
        ({"chunk_size": 12}, "power of two"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_bad_input_is_named(change, message, without_shape_checks):
    q, k, v, g = inputs(5)
    given = {"q": q, "k": k, "v": v, "log_gate": g} | change
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**given)


def test_bad_windows_and_slots_are_named(without_shape_checks):
    q, k, v, g = inputs(5)
    with pytest.raises(ValueError, match="window"):
        sliding_window_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="at least q's 5 positions"):
        sliding_window_attention(q, k[:, :, :3], v[:, :, :3], window=2)
    with pytest.raises(ValueError, match="visible"):
        sliding_window_attention(q, k, v, window=2, visible=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="scale"):
        sliding_window_attention(q, k, v, window=2, scale=-1.0)
    with pytest.raises(ValueError, match=r"initial_state \(V\)"):
        gated_slot_attention(q, k, v, g, initial_state=(normal(2, 2, 8, 8), normal(2, 2, 8, 8)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"variant": "mamba"}, "variant"),
        ({"window": 0}, "window"),
        ({"alpha": 0.7}, "alpha \\+ beta"),
        ({"alpha": -0.5, "beta": 1.5}, "alpha"),
        ({"gate_normalizer": 0.0}, "gate_normalizer"),
        ({"gate_source": "o"}, "gate_source"),
        ({"slots": 0}, "slots"),
        ({"lower_bound": 1.0}, "lower_bound"),
        ({"softmax_layers": (-1,)}, "softmax_layers"),
        ({"chunk_size": 48}, "chunk_size"),
    ],
)
def test_settings_out_of_range_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        LigerConfig(**setting)


def test_settings_survive_their_dictionary():
    config = LigerConfig(variant="gsa", slots=16, softmax_layers=(3, 7), window=32)
    assert LigerConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="depth"):
        LigerConfig.from_dict({"depth": 3})
