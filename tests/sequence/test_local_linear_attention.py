"""The fit against scikit-learn's ridge, its limits and invariances, memory, failures, what bad input gets."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from torch.nn.functional import normalize, scaled_dot_product_attention

from locally.sequence.local_linear_attention import Status, local_linear_attention, reference
from locally.sequence.local_linear_attention.strips import tiles

TIGHT = {"tol": 1e-13, "max_iter": 300}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(heads=2, n=30, d=4, dv=3, seed=0, dtype=torch.float64):
    return tuple(draw(1, heads, n, size, seed=seed + i, dtype=dtype) for i, size in enumerate((d, d, dv)))


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_vectors(golden, case, solver):
    z = {k: torch.from_numpy(x) for k, x in np.load(golden / f"04-local-linear-attention/case_{case}.npz").items()}
    q, k, v = (z[name].unsqueeze(1) for name in "qkv")
    options = {"ridge": float(z["ridge_lambda"]), "scale": float(z["qk_scale"]), "return_info": True}
    o, info = local_linear_attention(q, k, v, solver=solver, block_size=7, **TIGHT, **options)
    torch.testing.assert_close(o.squeeze(1), z["o"], rtol=0, atol=1e-9)
    torch.testing.assert_close(info.rho.squeeze(1), z["rho"], rtol=0, atol=1e-9)
    torch.testing.assert_close(info.delta.squeeze(1), z["denom"].squeeze(-1), rtol=1e-9, atol=0)
    shift = reference(q, k, v, ridge=options["ridge"], scale=options["scale"]).shift
    torch.testing.assert_close(shift.squeeze(1), z["m"].squeeze(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["cg", "cholesky", "reference"])
def test_output_is_a_weighted_ridge_regression_read_at_the_query(solver):
    q, k, v = qkv(heads=1, n=14, d=5)
    ridge, scale = 0.3, 0.8
    if solver == "reference":
        o = reference(q, k, v, ridge=ridge, scale=scale).output
    else:
        o = local_linear_attention(q, k, v, ridge=ridge, scale=scale, solver=solver, **TIGHT)
    assert o[0, 0, 0].numpy() == pytest.approx(v[0, 0, 0].numpy(), rel=1e-10)  # one key: its value
    for i in range(1, 14):
        seen, values = k[0, 0, : i + 1].numpy(), v[0, 0, : i + 1].numpy()
        w = np.exp(scale * seen @ q[0, 0, i].numpy())
        model = Ridge(alpha=ridge * w.sum()).fit(seen, values, sample_weight=w)
        assert o[0, 0, i].numpy() == pytest.approx(model.predict(q[0, 0, i : i + 1].numpy())[0], abs=1e-8)


@given(
    L=st.integers(1, 9),
    S=st.integers(1, 9),
    d=st.integers(1, 6),
    group=st.integers(1, 2),
    causal=st.booleans(),
    padded=st.booleans(),
    solver=st.sampled_from(["cg", "cholesky"]),
    block=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_strips_compute_what_the_definition_says(L, S, d, group, causal, padded, solver, block, seed):
    q, k, v = draw(2, 2 * group, L, d, seed=seed), draw(2, 2, S, d, seed=seed + 1), draw(2, 2, S, 3, seed=seed + 2)
    mask = draw(2, S, seed=seed + 3) > 0.5 if padded else None
    ridge, scale = 0.2 + draw(2 * group, L, seed=seed + 4).square(), 0.1 + draw(2 * group, 1, seed=seed + 5).square()
    kv = torch.cat([k, v], -1).repeat_interleave(group, 1).split([d, 3], -1)
    options = {"ridge": ridge, "scale": scale, "is_causal": causal, "key_padding_mask": mask}
    expected = reference(q, *kv, **options)
    o, info = local_linear_attention(
        q, k, v, **options, solver=solver, block_size=block, return_info=True, preconditioner="jacobi", **TIGHT
    )
    torch.testing.assert_close(o, expected.output, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(info.omega, expected.omega, rtol=1e-10, atol=1e-12)
    assert info.converged
    assert info.residual < 1e-8
    none = expected.omega == 0  # a query without keys
    assert (o[none] == 0).all()


def test_a_large_ridge_is_softmax_attention():
    q, k, v = qkv()
    o = local_linear_attention(q, k, v, ridge=1e9)
    torch.testing.assert_close(o, scaled_dot_product_attention(q, k, v, is_causal=True), rtol=0, atol=1e-7)


def test_affine_values_are_exact_once_there_are_enough_keys():
    q, k, _ = qkv(heads=1, n=20, d=4)
    A, c = draw(4, 3, seed=5), draw(3, seed=6)
    o = local_linear_attention(q, k, k @ A + c, ridge=1e-10, solver="cholesky")
    torch.testing.assert_close(o[0, 0, 8:], (q @ A + c)[0, 0, 8:], rtol=0, atol=1e-6)
    softmax = scaled_dot_product_attention(q, k, k @ A + c, is_causal=True)
    assert (softmax - q @ A - c)[0, 0, 8:].abs().max() > 0.1


def test_small_scale_and_ridge_are_least_squares():
    q, k, v = qkv(heads=1, n=25, d=3)
    o = local_linear_attention(q, k, v, ridge=1e-9, scale=1e-9, is_causal=False, solver="cholesky")
    X = torch.cat([k[0, 0], torch.ones(25, 1, dtype=k.dtype)], 1)
    fit = torch.linalg.lstsq(X, v[0, 0]).solution
    torch.testing.assert_close(o[0, 0], q[0, 0] @ fit[:3] + fit[3], rtol=0, atol=1e-6)


def test_weights_sum_to_one_and_many_are_negative():
    q, k, v = qkv(n=60)
    attention = reference(q, k, v, ridge=0.1).attention
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 2, 60, dtype=q.dtype), rtol=0, atol=1e-9)
    seen = torch.ones(60, 60).tril().bool()
    assert 0.2 < float((attention[..., seen] < 0).double().mean()) < 0.7
    o = local_linear_attention(q, k, v, ridge=0.1)
    torch.testing.assert_close(local_linear_attention(q, k, v + 7, ridge=0.1), o + 7, rtol=0, atol=1e-8)


def test_no_later_pair_touches_an_earlier_output():
    q, k, v = qkv(n=40, dtype=torch.float32)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, 25:] += 3
    changed_v[:, :, 25:] = 1e6
    for solver in ("cg", "cholesky"):
        before = local_linear_attention(q, k, v, solver=solver, block_size=16)
        after = local_linear_attention(q, changed_k, changed_v, solver=solver, block_size=16)
        assert torch.equal(before[:, :, :25], after[:, :, :25])
        assert not torch.allclose(before[:, :, 25:], after[:, :, 25:])


def test_order_of_pairs_is_irrelevant_and_a_common_shift_of_gaussian_weights_too():
    q, k, v = qkv(heads=1)
    o = local_linear_attention(q, k, v, is_causal=False)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shuffled = local_linear_attention(q, k[:, :, order], v[:, :, order], is_causal=False)
    torch.testing.assert_close(shuffled, o, rtol=0, atol=1e-9)
    # on the unit circle exp(s q.k) is Gaussian: an isometry that keeps the norms keeps the fit
    q, k = normalize(q[..., :2], dim=-1), normalize(k[..., :2], dim=-1)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=q.dtype)
    turned = local_linear_attention(q @ turn, k @ turn, v, ridge=0.01)
    torch.testing.assert_close(turned, local_linear_attention(q, k, v, ridge=0.01), rtol=0, atol=1e-8)


def test_blocked_conjugate_gradients_agree_with_the_dense_solve_as_ill_conditioning_grows():
    q, k, v = qkv(heads=1, n=256, d=32, dv=8)
    steps = []
    for ridge, error in ((10.0, 1e-5), (1.0, 1e-4), (0.1, 1e-3)):
        exact = local_linear_attention(q, k, v, ridge=ridge, solver="cholesky")
        o, info = local_linear_attention(q, k, v, ridge=ridge, solver="cg", return_info=True)
        assert info.status is Status.CONVERGED
        assert (o - exact).norm() <= error * exact.norm()
        steps.append(max(info.iterations))
    assert steps == sorted(steps)
    assert steps[0] <= 10


def test_jacobi_pays_for_coordinates_of_unequal_scale():
    q, k, v = qkv(heads=1, n=96, d=24)
    stretch = torch.logspace(-1.5, 1.5, 24, dtype=q.dtype)
    steps = {}
    for preconditioner in (None, "jacobi"):
        options = {"ridge": 1e-3, "scale": 1e-4, "is_causal": False, "solver": "cg", "max_iter": 500}
        _, info = local_linear_attention(
            q * stretch, k * stretch, v, preconditioner=preconditioner, return_info=True, **options
        )
        assert info.converged
        steps[preconditioner] = max(info.iterations)
    assert steps["jacobi"] < 0.7 * steps[None]


def test_a_solve_that_does_not_converge_says_so():
    q, k, v = qkv(n=50, d=16)
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        _, info = local_linear_attention(q, k, v, ridge=1e-6, solver="cg", max_iter=3, return_info=True)
    assert info.status is Status.ITERATION_LIMIT
    assert not info.converged
    assert info.residual > 1e-6


def test_nearly_singular_local_gram_matrices():
    """Equal keys, keys in a plane, a far query: finite, sums to one, equal to the definition in float64."""
    q, k, v = qkv(heads=1, n=24, d=6)
    flat = k.clone()
    flat[..., 2:] = 0
    for keys in (k[:, :, :1].expand(-1, -1, 24, -1), flat):
        o = local_linear_attention(q, keys, v, ridge=1e-6, solver="cholesky")
        expected = reference(q, keys, v, ridge=1e-6).output
        torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)
        constant = local_linear_attention(q.float(), keys.float(), torch.ones_like(v).float(), ridge=1e-3)
        torch.testing.assert_close(constant, torch.ones_like(constant), rtol=0, atol=1e-3)


def test_a_factorisation_that_breaks_down_in_float32_is_rescued():
    q, k, v = qkv(heads=1, n=24, d=6, dtype=torch.float32)
    k = 1e4 * k[:, :, :1] + k  # rows of equal direction, far from the queries
    o = local_linear_attention(q, k, torch.ones_like(v), ridge=1e-6, scale=1e-6, solver="cholesky", max_iter=2000)
    assert o.isfinite().all()


def test_keys_with_a_large_common_offset_lose_no_digits():
    q, k, v = qkv(heads=1, n=40, d=4, dtype=torch.float32)
    c = torch.full((4,), 1000.0)
    at = (q + c, k + c)
    scale = 1e-5  # logits of the same spread as without the offset
    exact = reference(*at, v, ridge=0.1, scale=scale).output.float()
    for solver in ("cg", "cholesky"):
        o = local_linear_attention(*at, v, ridge=0.1, scale=scale, solver=solver)
        torch.testing.assert_close(o, exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    q, k, v = (x.to(dtype) for x in qkv(n=50, d=8))
    o = local_linear_attention(q, k, v)
    assert o.dtype == dtype
    expected = reference(q, k, v).output
    torch.testing.assert_close(o.double(), expected, rtol=1e-2, atol=1e-2)


def test_padding_is_as_if_the_keys_were_not_there():
    q, k, v = qkv(n=20)
    hidden = torch.zeros(1, 20, dtype=torch.bool)
    hidden[0, :6] = True
    o = local_linear_attention(q, k, v, key_padding_mask=hidden)
    rest = local_linear_attention(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:])
    torch.testing.assert_close(o[:, :, 6:], rest, rtol=0, atol=1e-10)
    assert (o[:, :, :6] == 0).all()


def test_strips_cover_every_row_once_and_stay_of_bounded_size():
    from locally.sequence.local_linear_attention.layout import arrange, pose
    from locally.sequence.local_linear_attention.strips import STRIP_ENTRIES

    for heads, n, block in ((3, 50, 7), (16, 300, None), (1, 5000, None)):
        q = torch.zeros(1, heads, n, 2)
        a = arrange(q, q, q, 1.0, None, True, None)
        problem = pose(a.q, a.k, a.v, a.ridge, a.scale, a.hidden, a.causal)
        seen = torch.zeros(heads, n)
        for head, rows in tiles(problem, block):
            seen[head, rows] += 1
            entries = (head.stop - head.start) * (rows.stop - rows.start) * n
            assert entries <= STRIP_ENTRIES
        assert (seen == 1).all()


def test_nothing_of_size_n_squared_or_n_d_squared_is_allocated():
    """Each block of memory that autograd keeps or an operation makes is at most a strip."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.entries = max(self.entries, out.untyped_storage().nbytes() // out.element_size())
            return out

    peaks = []
    for n in (256, 512):
        q, k, v = (x.requires_grad_() for x in qkv(heads=1, n=n, d=16, dtype=torch.float32))
        with Largest() as largest:
            local_linear_attention(q, k, v, block_size=16, solver="cg", ridge=100.0).sum().backward()
        peaks.append(largest.entries)
    assert peaks[1] <= 2 * peaks[0]
    assert peaks[1] < 512 * 512 / 16


BAD = {
    "q: TypeError": (lambda q, k, v: (q.long(), k, v), {}, TypeError, "q must be of a floating-point"),
    "q: numpy": (lambda q, k, v: (q.numpy(), k, v), {}, TypeError, "q must be a torch.Tensor"),
    "two dimensions": (lambda q, k, v: (q[0, 0], k, v), {}, ValueError, "q must have shape"),
    "d = 0": (lambda q, k, v: (q[..., :0], k[..., :0], v), {}, ValueError, "positive last dimension"),
    "dv = 0": (lambda q, k, v: (q, k, v[..., :0]), {}, ValueError, "v must have a positive last dimension"),
    "d differs": (lambda q, k, v: (q, k[..., :2], v), {}, ValueError, "k must have q's last"),
    "length differs": (lambda q, k, v: (q, k[:, :, 1:], v), {}, ValueError, "v must have k's heads and length"),
    "batch differs": (lambda q, k, v: (q, *(x.repeat(2, 1, 1, 1) for x in (k, v))), {}, ValueError, "k must have q's"),
    "heads do not divide": (lambda q, k, v: (q[:, :1], k, v), {}, ValueError, "heads must divide"),
    "dtype differs": (lambda q, k, v: (q, k.float(), v), {}, TypeError, "k must be torch.float64"),
    "NaN": (lambda q, k, v: (q, k, v * torch.nan), {}, ValueError, "v holds NaN"),
    "infinity": (lambda q, k, v: (q / 0, k, v), {}, ValueError, "q holds NaN or infinity"),
    "ridge 0": (None, {"ridge": 0.0}, ValueError, "ridge must be positive"),
    "ridge < 0": (None, {"ridge": -1.0}, ValueError, "ridge must be positive.*-1"),
    "ridge NaN": (None, {"ridge": torch.tensor(torch.nan)}, ValueError, "ridge must be positive"),
    "ridge shape": (None, {"ridge": torch.ones(7)}, ValueError, "ridge must broadcast"),
    "scale": (None, {"scale": 0.0}, ValueError, "scale must be positive"),
    "mask dtype": (None, {"key_padding_mask": torch.zeros(1, 30)}, TypeError, "key_padding_mask must be boolean"),
    "mask shape": (None, {"key_padding_mask": torch.zeros(30, dtype=torch.bool)}, ValueError, "key_padding_mask"),
    "solver": (None, {"solver": "lu"}, ValueError, "solver must be one of"),
    "preconditioner": (None, {"preconditioner": "ilu"}, ValueError, "preconditioner must be one of"),
    "ridge_grad": (None, {"ridge_grad": "none"}, ValueError, "ridge_grad must be one of"),
    "backend": (None, {"backend": "cuda"}, ValueError, "backend must be one of"),
    "tol": (None, {"tol": 0.0}, ValueError, "tol must be"),
    "max_iter": (None, {"max_iter": 0}, ValueError, "max_iter must be at least 1"),
    "block_size": (None, {"block_size": 1.5}, TypeError, "block_size must be an integer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, without_shape_checks):
    change, options, error, message = BAD[name]
    inputs = qkv() if change is None else change(*qkv())
    with pytest.raises(error, match=message):
        local_linear_attention(*inputs, **options)


def test_empty_sequences_give_empty_or_zero_outputs():
    q, k, v = qkv()
    assert local_linear_attention(q[:, :, :0], k, v, is_causal=False).shape == (1, 2, 0, 3)
    assert (local_linear_attention(q, k[:, :, :0], v[:, :, :0], is_causal=False) == 0).all()
    assert local_linear_attention(q[:0], k[:0], v[:0]).shape == (0, 2, 30, 3)
