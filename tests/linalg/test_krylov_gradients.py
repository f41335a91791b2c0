"""Gradients by the implicit function theorem: finite differences, second derivatives, and when they are refused."""

import pytest
import torch

from locally.linalg.krylov import CG, MINRES, Diagonal

METHODS = [CG, MINRES]


def spd(*batch, n=5, seed=0):
    B = torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return B @ B.mT + n * torch.eye(n, dtype=torch.float64)


def vectors(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(B):
    return (B + B.mT) / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_first_and_second_derivatives_match_finite_differences(method, batch):
    A, b = spd(*batch).requires_grad_(), vectors(*batch, 5).requires_grad_()
    solve = lambda A, b: method(rtol=1e-13).solve(symmetric(A), b).x
    assert torch.autograd.gradcheck(solve, (A, b))
    assert torch.autograd.gradgradcheck(solve, (A, b), atol=1e-4)


def test_an_indefinite_matrix_has_gradients_too():
    A = (spd() - 6 * torch.eye(5, dtype=torch.float64)).requires_grad_()
    assert (torch.linalg.eigvalsh(A.detach()) < 0).any()
    b = vectors(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda A, b: MINRES(rtol=1e-13, shift=0.1).solve(symmetric(A), b).x, (A, b))


@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_a_callable_get_gradients(method):
    d, b = torch.linspace(1, 3, 5, dtype=torch.float64).requires_grad_(), vectors(2, 5).requires_grad_()

    def solve(d, b):
        A = lambda v, d: d * v + v.sum(1, keepdim=True)
        return method(rtol=1e-13).solve(A, b, parameters=(d,)).x

    assert torch.autograd.gradcheck(solve, (d, b))
    assert torch.autograd.gradgradcheck(solve, (d, b), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_entries_of_a_sparse_matrix_get_gradients(method):
    dense = torch.diag(torch.full((6,), 3.0, dtype=torch.float64))
    dense += torch.diag(-torch.ones(5, dtype=torch.float64), 1) + torch.diag(-torch.ones(5, dtype=torch.float64), -1)
    index = dense.nonzero().T
    b = vectors(2, 6)
    values = dense[tuple(index)].requires_grad_()
    sparse = torch.sparse_coo_tensor(index, values, (6, 6), is_coalesced=True)
    method(rtol=1e-13).solve(sparse, b).x.square().sum().backward()
    reference = dense.clone().requires_grad_()
    torch.linalg.solve(reference, b.mT).square().sum().backward()
    torch.testing.assert_close(values.grad, reference.grad[tuple(index)], rtol=1e-8, atol=1e-10)


def test_a_preconditioner_changes_no_gradient():
    A, b = spd(n=8).requires_grad_(), vectors(8)
    plain, better = (
        torch.autograd.grad(CG(rtol=1e-13).solve(A, b, preconditioner=M).x.square().sum(), A)[0]
        for M in (None, Diagonal.jacobi(A.detach()))
    )
    torch.testing.assert_close(plain, better, rtol=1e-8, atol=1e-10)


def test_no_gradient_flows_to_the_start():
    A, b, x0 = spd(), vectors(5).requires_grad_(), vectors(5, seed=2).requires_grad_()
    CG().solve(A, b, x0).x.sum().backward()
    assert b.grad is not None
    assert x0.grad is None


def test_without_need_for_gradients_there_is_no_graph():
    A, b = spd(), vectors(5)
    assert not CG().solve(A, b).x.requires_grad
    with torch.no_grad():
        assert not CG().solve(A.requires_grad_(), b).x.requires_grad


def test_a_dependence_that_would_be_lost_is_refused():
    d = torch.ones(5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="parameters="):
        CG().solve(lambda v: 2 * d * v, vectors(5))
    with torch.no_grad():
        CG().solve(lambda v: 2 * d * v, vectors(5))


def test_a_backward_solve_that_fails_warns():
    A = torch.diag(torch.logspace(0, 6, 30, dtype=torch.float64))
    b = torch.zeros(30, dtype=torch.float64)
    b[0] = 1  # one step
    b.requires_grad_()
    x = CG(rtol=1e-10, max_steps=2).solve(A, b).x
    with pytest.warns(RuntimeWarning, match="backward solve failed"):
        (x * vectors(30)).sum().backward()


def test_wrong_gradients_of_an_unsymmetric_matrix_are_refused():
    A = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)  # an eigenvector: one step, and converged
    x = MINRES(rtol=1e-10).solve(A, b).x
    with pytest.raises(RuntimeError, match="not symmetric"):
        (x * torch.tensor([1.0, 2.0], dtype=torch.float64)).sum().backward()


def test_the_graph_does_not_grow_with_the_steps():
    def nodes(top):
        b = vectors(50).requires_grad_()
        found = CG(rtol=1e-10).solve(torch.diag(torch.linspace(1, top, 50, dtype=torch.float64)), b)
        seen, todo = set(), [found.x.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [parent for parent, _ in node.next_functions]
        return len(seen), int(found.iterations)

    (few_nodes, few_steps), (many_nodes, many_steps) = nodes(1.5), nodes(1e4)
    assert few_nodes == many_nodes
    assert many_steps > 3 * few_steps
