"""The backward pass against finite differences, autograd of the definition, the golden vectors, and at its edges."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning

from locally.sequence.local_linear_attention import local_linear_attention, reference

TIGHT = {"tol": 1e-13, "max_iter": 300}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
@pytest.mark.parametrize(("mode", "suffix"), [("exact", "exact"), ("detached", "detached_ridge")])
@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_gradients(golden, case, mode, suffix, solver):
    z = {k: torch.from_numpy(x) for k, x in np.load(golden / f"04-local-linear-attention/case_{case}.npz").items()}
    q, k, v = (z[name].unsqueeze(1).requires_grad_() for name in "qkv")
    options = {"ridge": float(z["ridge_lambda"]), "scale": float(z["qk_scale"]), "ridge_grad": mode}
    local_linear_attention(q, k, v, solver=solver, block_size=9, **options, **TIGHT).backward(z["grad_o"].unsqueeze(1))
    torch.testing.assert_close(q.grad.squeeze(1), z[f"gq_{suffix}"], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(k.grad.squeeze(1), z[f"gk_{suffix}"], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(v.grad.squeeze(1), z["gv"], rtol=1e-7, atol=1e-8)


def test_gradcheck():
    q, k, v = draw(1, 2, 6, 3, seed=1), draw(1, 1, 6, 3, seed=2), draw(1, 1, 6, 2, seed=3)
    ridge, scale = 0.5 + draw(2, 6, seed=4).square(), torch.tensor(0.7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, ridge, scale)]

    def call(q, k, v, ridge, scale):
        return local_linear_attention(q, k, v, ridge=ridge, scale=scale, solver="cholesky", block_size=4)

    assert torch.autograd.gradcheck(call, inputs)


@given(
    L=st.integers(1, 8),
    S=st.integers(1, 8),
    d=st.integers(1, 5),
    causal=st.booleans(),
    padded=st.booleans(),
    mode=st.sampled_from(["exact", "detached"]),
    solver=st.sampled_from(["cg", "cholesky"]),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_the_definition(L, S, d, causal, padded, mode, solver, seed):
    given_mask = draw(2, S, seed=seed + 9) > 0.3 if padded else None

    def gradients(call):
        q, k, v = draw(2, 2, L, d, seed=seed), draw(2, 2, S, d, seed=seed + 1), draw(2, 2, S, 2, seed=seed + 2)
        inputs = [q, k, v, 0.3 + draw(2, 1, seed=seed + 3).square(), 0.2 + draw(2, L, seed=seed + 4).square()]
        q, k, v, ridge, scale = (x.requires_grad_() for x in inputs)
        o = call(q, k, v, ridge=ridge, scale=scale, is_causal=causal, key_padding_mask=given_mask, ridge_grad=mode)
        (o * draw(*o.shape, seed=seed + 5)).sum().backward()
        return [x.grad for x in (q, k, v, ridge, scale)]

    ours = gradients(
        lambda *args, **options: local_linear_attention(*args, solver=solver, block_size=3, **options, **TIGHT)
    )
    theirs = gradients(lambda *args, **options: reference(*args, **options).output)
    size = max(float(x.abs().max()) for x in theirs)
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8 * max(size, 1))


def test_the_published_gradient_is_not_the_gradient():
    """Holding ridge omega constant moves the gradient by several per cent; the values agree."""
    grads = {}
    for mode in ("exact", "detached"):
        q, k, v = (draw(1, 1, 40, 8, seed=s).requires_grad_() for s in (1, 2, 3))
        local_linear_attention(q, k, v, ridge=0.1, ridge_grad=mode).square().sum().backward()
        grads[mode] = torch.cat([q.grad, k.grad])
    gap = (grads["exact"] - grads["detached"]).norm() / grads["exact"].norm()
    assert 0.01 < gap < 0.5


def test_the_only_key_gives_no_gradient_to_its_query_and_padding_gives_none():
    q, k, v = (draw(1, 1, 8, 3, seed=s).requires_grad_() for s in (1, 2, 3))
    hidden = torch.tensor([[True, True, False, False, False, False, False, True]])
    local_linear_attention(q, k, v, key_padding_mask=hidden).sum().backward()
    assert (q.grad[0, 0, :2] == 0).all()
    torch.testing.assert_close(q.grad[0, 0, 2], torch.zeros(3, dtype=q.dtype), rtol=0, atol=1e-9)
    assert (k.grad[0, 0, hidden[0]] == 0).all()
    assert (v.grad[0, 0, hidden[0]] == 0).all()
    assert q.grad.isfinite().all()


def test_single_precision_and_half_precision_gradients():
    def gradients(dtype, call):
        q, k, v = (draw(1, 2, 40, 8, seed=s).bfloat16().to(dtype).requires_grad_() for s in (1, 2, 3))
        call(q, k, v).square().sum().backward()
        return [x.grad.double() for x in (q, k, v)]

    exact = gradients(torch.float64, lambda *x: reference(*x).output)
    for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for found, wanted in zip(gradients(dtype, local_linear_attention), exact):
            assert (found - wanted).norm() <= error * wanted.norm()


def test_a_second_derivative_is_refused():
    q, k, v = (draw(1, 1, 5, 2, seed=s).requires_grad_() for s in (1, 2, 3))
    (grad,) = torch.autograd.grad(local_linear_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_backward_solve_that_does_not_converge_says_so():
    q, k, v = (draw(1, 1, 40, 16, seed=s).requires_grad_() for s in (1, 2, 3))
    with pytest.warns(ConvergenceWarning):
        o = local_linear_attention(q, k, v, ridge=1e-4, solver="cg", max_iter=2)
    with pytest.warns(ConvergenceWarning, match="backward"):
        o.square().sum().backward()
