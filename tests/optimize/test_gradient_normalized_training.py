"""The torch optimizer: the NumPy solver's own path, small networks, state that survives, and parameters that do."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from locally.linalg.curvature import Categorical, EmpiricalFisher, Fisher, GaussNewton, Hessian
from locally.optimize.gradient_normalized import GNS, Logistic, Status, gns_minimize


def closure_of(model, loss, X, y, optimizer):
    def closure():
        optimizer.zero_grad()
        value = loss(model(X), y)
        value.backward()
        return value

    return closure


def network(seed=0, hidden=6, dtype=torch.float64):
    torch.manual_seed(seed)
    X = torch.linspace(-2, 2, 40, dtype=dtype)[:, None]
    model = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1)).to(dtype)
    return model, nn.MSELoss(), X, torch.sin(2 * X)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("dense_limit", [2000, 0])
def test_a_linear_model_takes_the_path_of_the_numpy_solver(dense_limit):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 4)), rng.integers(0, 2, 60)
    reference = Logistic(X, y)
    found = gns_minimize(reference.fun_and_jac, np.zeros(5), jac=True, curvature=reference.hess, tol=0.0, maxiter=5)
    model = nn.Linear(4, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    data = torch.tensor(X), torch.tensor(y).double()[:, None]
    loss = nn.BCEWithLogitsLoss()
    curvature = GaussNewton(model, loss, data)
    optimizer = GNS(model.parameters(), curvature, dense_limit=dense_limit, krylov_rtol=1e-12)
    closure = closure_of(model, loss, *data, optimizer)
    values, gammas = [], [optimizer.gamma]
    for _ in range(5):
        values.append(float(optimizer.step(closure)))
        gammas.append(optimizer.gamma)
    np.testing.assert_allclose(values, found.history["fun"][:5], rtol=1e-10)
    np.testing.assert_array_equal(gammas, found.history["gamma"])
    np.testing.assert_allclose(flat(model).numpy(), found.x, atol=1e-8)


KINDS = {
    "Gauss-Newton": lambda model, loss, data: GaussNewton(model, loss, data),
    "empirical Fisher": lambda model, loss, data: EmpiricalFisher(model, loss, data),
    "Hessian": lambda model, loss, data: Hessian(model, loss, data),
}


@pytest.mark.parametrize("dense_limit", [2000, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_network_falls_at_every_step(kind, dense_limit):
    model, loss, X, y = network()
    optimizer = GNS(model.parameters(), KINDS[kind](model, loss, (X, y)), dense_limit=dense_limit)
    closure = closure_of(model, loss, X, y, optimizer)
    values = [float(optimizer.step(closure)) for _ in range(25)]
    assert optimizer.status is None
    assert (np.diff(values) < 0).all()
    assert values[-1] < 0.5 * values[0]


def test_gauss_newton_fits_far_better_than_gradient_descent_at_the_same_evaluations():
    model, loss, X, y = network(hidden=10)
    start = copy.deepcopy(model.state_dict())
    calls = 0

    def counted(optimizer):
        plain = closure_of(model, loss, X, y, optimizer)

        def closure():
            nonlocal calls
            calls += 1
            return plain()

        return closure

    ours = GNS(model.parameters(), GaussNewton(model, loss, (X, y)))
    closure = counted(ours)
    for _ in range(60):
        ours.step(closure)
    reached, budget = loss(model(X), y).item(), calls
    assert budget == 1 + ours.state_dict()["state"][0]["trials"]  # no point is evaluated twice
    best = np.inf
    for lr in (0.01, 0.1, 0.5):
        model.load_state_dict(start)
        sgd = torch.optim.SGD(model.parameters(), lr=lr)
        closure = counted(sgd)
        for _ in range(budget):
            sgd.step(closure)
        best = min(best, loss(model(X), y).item())
    assert reached < 1e-4
    assert reached < 0.05 * best


def test_parameters_that_changed_between_steps_are_evaluated_anew():
    model, loss, X, y = network()
    optimizer = GNS(model.parameters(), GaussNewton(model, loss, (X, y)))
    closure = closure_of(model, loss, X, y, optimizer)
    optimizer.step(closure)
    with torch.no_grad():
        model[0].weight += 0.5
    moved = loss(model(X), y).item()
    assert optimizer.step(closure).item() == pytest.approx(moved)


def test_fisher_of_a_classifier_is_its_gauss_newton_path():
    torch.manual_seed(0)
    X, y = torch.randn(50, 3).double(), torch.randint(3, (50,))
    paths = []
    for make in (lambda m: GaussNewton(m, nn.CrossEntropyLoss(), (X, y)), lambda m: Fisher(m, Categorical(), (X, y))):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = GNS(model.parameters(), make(model))
        closure = closure_of(model, nn.CrossEntropyLoss(), X, y, optimizer)
        paths.append([float(optimizer.step(closure)) for _ in range(10)])
    np.testing.assert_allclose(paths[0], paths[1], rtol=1e-8)


def test_float32_trains_until_rounding_and_then_says_so():
    model, loss, X, y = network(dtype=torch.float32)
    optimizer = GNS(model.parameters(), GaussNewton(model, loss, (X, y)))
    closure = closure_of(model, loss, X, y, optimizer)
    for _ in range(60):
        value = optimizer.step(closure)
        if optimizer.status is not None:
            break
    assert value < 0.05
    assert flat(model).isfinite().all()
    assert optimizer.status in (None, Status.SEARCH_FAILED)


def test_state_goes_on_where_it_was_saved():
    model, loss, X, y = network()
    optimizer = GNS(model.parameters(), GaussNewton(model, loss, (X, y)))
    closure = closure_of(model, loss, X, y, optimizer)
    for _ in range(4):
        optimizer.step(closure)
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(4):
        optimizer.step(closure)
    whole = flat(model)

    other, *_ = network(seed=9)
    fresh = GNS(other.parameters(), GaussNewton(other, loss, (X, y)))
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    assert fresh.gamma == saved[1]["state"][0]["gamma"]
    closure = closure_of(other, loss, X, y, fresh)
    for _ in range(4):
        fresh.step(closure)
    torch.testing.assert_close(flat(other), whole, rtol=1e-12, atol=1e-12)


def test_a_diagonal_metric_changes_the_path():
    paths = []
    for scale in (1.0, 100.0):
        model, loss, X, y = network()
        metric = torch.full((19,), scale, dtype=torch.float64)
        optimizer = GNS(model.parameters(), GaussNewton(model, loss, (X, y)), metric=metric)
        closure = closure_of(model, loss, X, y, optimizer)
        paths.append([float(optimizer.step(closure)) for _ in range(3)])
    assert paths[0][0] == paths[1][0]
    assert paths[0][1] < paths[1][1]  # the same gamma is a shorter step in the larger metric


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_closure_that_is_not_finite_at_the_start_is_refused_and_nothing_moves(where):
    model, loss, X, y = network()
    optimizer = GNS(model.parameters(), GaussNewton(model, loss, (X, y)))
    plain = closure_of(model, loss, X, y, optimizer)

    def closure():
        value = plain()
        if where == "loss":
            return value * np.nan
        model[0].weight.grad[0] = np.inf
        return value

    before = flat(model)
    with pytest.raises(ArithmeticError, match="closure"):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("how", ["nan", "worse", "raises"])
def test_trials_that_go_wrong_leave_parameters_and_gradients_as_they_were(how):
    model, loss, X, y = network()
    optimizer = GNS(model.parameters(), GaussNewton(model, loss, (X, y)))
    plain = closure_of(model, loss, X, y, optimizer)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        value = plain()
        if calls == 1:
            return value
        if how == "raises":
            raise KeyboardInterrupt
        return value * np.nan if how == "nan" else value + 10

    plain()
    before, gradient = flat(model), torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    if how == "raises":
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
    else:
        optimizer.step(closure)
        assert optimizer.status is (Status.NOT_FINITE if how == "nan" else Status.SEARCH_FAILED)
        assert optimizer.message
    assert torch.equal(flat(model), before)
    assert torch.equal(torch.cat([p.grad.reshape(-1) for p in model.parameters()]), gradient)


def test_a_stationary_point_is_reported():
    model = nn.Linear(2, 1).double()
    X = torch.zeros(3, 2).double()
    y = model.bias.detach().expand(3, 1).clone()
    optimizer = GNS(model.parameters(), GaussNewton(model, nn.MSELoss(), (X, y)))
    optimizer.step(closure_of(model, nn.MSELoss(), X, y, optimizer))
    assert optimizer.status is Status.CONVERGED


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"curvature": "ggn"}, "curvature"),
        ({"gamma0": 0.0}, "gamma0"),
        ({"max_trials": 0}, "max_trials"),
        ({"metric": -torch.ones(19).double()}, "metric"),
        ({"metric": torch.ones(3).double()}, "metric"),
        ({"krylov_rtol": 2.0}, "krylov_rtol"),
        ({"precision": -1.0}, "precision"),
        ({"params": "reversed"}, "params"),
        ({"params": "some"}, "params"),
    ],
)
def test_bad_input_is_named(change, match, without_shape_checks):
    model, loss, X, y = network()
    params = list(model.parameters())
    call = {"params": params, "curvature": GaussNewton(model, loss, (X, y))} | change
    call["params"] = {"reversed": params[::-1], "some": params[:2]}.get(str(call["params"]), params)
    with pytest.raises((TypeError, ValueError), match=match):
        GNS(**call)
    with pytest.raises(TypeError, match="closure"):
        GNS(params, GaussNewton(model, loss, (X, y))).step(None)
