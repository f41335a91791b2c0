"""Ritz vectors and the residuals drawn from them, the loss, the network, training that stops and goes on, files."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from locally.solvers.conjugate_direction import (
    Cell,
    CheckpointError,
    ConjugateDirection,
    DirectionNetwork,
    Domain,
    GridDirection,
    NetworkConfig,
    PressureSolver,
    RitzBasis,
    Status,
    Trainer,
    TrainingConfig,
    TrainingSystem,
    direction_loss,
    load_network,
    load_pretrained,
    ritz_vectors,
    save_network,
)
from locally.solvers.conjugate_direction.checkpoint import pretrained_path, read_checkpoint
from locally.solvers.conjugate_direction.train_pretrained import RECIPES, main

SMALL = NetworkConfig(channels=2, fine_in=1, coarse=1, fine_out=1)


def small_network(seed=0, **options):
    return DirectionNetwork(SMALL, generator=torch.Generator().manual_seed(seed), **options)


def small_trainer(steps=6, seed=0, **options):
    system = TrainingSystem.from_ritz(Domain.box(6, 8), steps=20, theta=2, count=30, rng=0)
    config = TrainingConfig(steps=steps, validate_every=3, batch_size=4, **options)
    return Trainer(small_network(), [system], config, seed=seed)


# Ritz vectors ---------------------------------------------------------------------------------------------------------


def test_ritz_vectors_diagonalise_and_are_orthonormal():
    A = Domain.box(12, 10).matrix()
    basis = ritz_vectors(A, 70, rng=0)
    V = basis.vectors
    np.testing.assert_allclose(V.T @ V, np.eye(basis.values.size), atol=1e-8)
    np.testing.assert_allclose(V.T @ (A @ V), np.diag(basis.values), atol=1e-8)
    assert (np.diff(basis.values) > 0).all()


def test_as_many_steps_as_rows_give_every_eigenvalue():
    A = Domain.box(5, 6).matrix() + np.diag(np.linspace(0, 1, 30))  # no eigenvalue twice
    np.testing.assert_allclose(ritz_vectors(A, 30, rng=1).values, np.linalg.eigvalsh(A), rtol=1e-8)


def test_without_reorthogonalisation_eigenvalues_come_back_as_ghosts():
    """Why `ritz_vectors` pays for it: the plain three-term recurrence loses orthogonality on the same matrix."""
    A = np.diag(np.concatenate([np.linspace(0.1, 1, 99), [10.0]]))
    v = np.ones(100) / 10
    Q, alpha, beta = [np.zeros(100), v], [], [0.0]
    for _ in range(60):
        w = A @ Q[-1] - beta[-1] * Q[-2]
        alpha.append(w @ Q[-1])
        w -= alpha[-1] * Q[-1]
        beta.append(np.linalg.norm(w))
        Q.append(w / beta[-1])
    T = np.diag(alpha) + np.diag(beta[1:-1], 1) + np.diag(beta[1:-1], -1)
    assert (np.abs(np.linalg.eigvalsh(T) - 10) < 1e-6).sum() >= 2
    assert (np.abs(ritz_vectors(A, 60, v0=v).values - 10) < 1e-6).sum() == 1


def test_the_null_space_of_solids_and_closed_walls_is_left_out():
    domain = Domain.box(8, 8, outside=Cell.SOLID).with_ball((4, 4), 2)
    basis = ritz_vectors(domain.matrix(), 60, rng=0)
    assert basis.values.min() > 1e-3
    assert np.abs(basis.vectors[~domain.fluid.reshape(-1)]).max() <= 1e-12
    assert np.abs(basis.vectors.sum(0)).max() <= 1e-7


def test_residuals_are_unit_vectors_with_most_energy_at_low_frequencies():
    m, theta = 80, 10
    basis = RitzBasis(np.arange(1.0, m + 1), np.eye(m))
    drawn = basis.sample(4000, theta=theta, rng=0)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, rtol=1e-6)
    p = (m // 2 + theta) / m
    share = (drawn[:, : m // 2 + theta] ** 2).sum(1).mean()
    assert share == pytest.approx(81 * p / (81 * p + 1 - p), abs=1e-3)
    assert np.array_equal(drawn, basis.sample(4000, theta=theta, rng=0))


def test_impossible_ritz_requests_are_named():
    A = Domain.box(3, 3).matrix()
    for arguments, message in [((A, 10), "m must"), ((A[:5], 3), "square"), ((A, 0), "m must")]:
        with pytest.raises(ValueError, match=message):
            ritz_vectors(*arguments)
    with pytest.raises(ValueError, match="v0"):
        ritz_vectors(A, 3, v0=np.zeros(9))
    with pytest.raises(ValueError, match="v0"):
        ritz_vectors(A, 3, v0=np.ones(4))
    with pytest.raises(ValueError, match="theta"):
        ritz_vectors(A, 4, rng=0).sample(3, theta=9)


# Loss -----------------------------------------------------------------------------------------------------------------


def loss_inputs(domain, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    r, y = (torch.randn(batch, domain.n, generator=generator, dtype=torch.float64) for _ in range(2))
    return r / r.norm(dim=1, keepdim=True), y


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.01, 100), sign=st.sampled_from([-1, 1]))
def test_the_loss_does_not_see_the_scale_and_stays_below_one_for_the_residual(seed, scale, sign):
    domain = Domain.box(5, 4)
    r, y = loss_inputs(domain, 3, seed)
    A = domain.operator()
    loss, alpha = direction_loss(A, r, y)
    scaled, alpha_scaled = direction_loss(A, r, sign * scale * y)
    torch.testing.assert_close(loss, scaled)
    torch.testing.assert_close(alpha, sign * scale * alpha_scaled)


def test_the_exact_inverse_has_no_loss_and_a_useless_direction_has_all():
    domain = Domain.box(6, 5)
    r, _ = loss_inputs(domain, 4, 0)
    inverse = torch.from_numpy(np.linalg.inv(domain.matrix().toarray()))
    loss, alpha = direction_loss(domain.operator(), r, -3.7 * r @ inverse)
    assert float(loss) <= 1e-24
    torch.testing.assert_close(alpha, torch.full((4,), -1 / 3.7, dtype=torch.float64))
    y = torch.zeros_like(r).requires_grad_()
    loss, _ = direction_loss(domain.operator(), r, y)
    assert loss.item() == pytest.approx(1)
    loss.backward()
    assert not y.grad.isnan().any()


def test_a_constant_direction_on_a_closed_box_is_useless_and_harms_no_gradient():
    domain = Domain.box(6, 6, outside=Cell.SOLID)
    r, _ = loss_inputs(domain, 2, 0)
    y = torch.ones(2, domain.n).requires_grad_()
    loss, _ = direction_loss(domain.operator(dtype=torch.float32), r.float(), y)
    loss.backward()
    assert loss.item() == pytest.approx(1, rel=1e-5)
    assert y.grad.isfinite().all()


def test_alpha_is_the_first_step_of_the_solver():
    domain = Domain.box(6, 5)
    r, y = loss_inputs(domain, 3, 1)
    loss, alpha = direction_loss(domain.operator(), r, y)
    found = ConjugateDirection(direction=lambda _: y, max_iter=1, rtol=1e-9).solve(domain.operator(), r)
    torch.testing.assert_close(found.x, alpha[:, None] * y)
    torch.testing.assert_close(found.residual_norms.square().mean(), loss)


def test_the_gradient_of_the_loss_matches_finite_differences():
    domain = Domain.box(4, 3).with_ball((1.5, 1.0), 0.8)
    r, y = loss_inputs(domain, 2, 2)
    assert torch.autograd.gradcheck(lambda y: direction_loss(domain.operator(), r, y)[0], y.requires_grad_())


# Network --------------------------------------------------------------------------------------------------------------


def test_parameter_counts_are_those_of_the_authors_networks():
    count = lambda config: sum(p.numel() for p in DirectionNetwork(config).parameters())
    assert count(NetworkConfig(ndim=3)) == 97_457
    assert count(NetworkConfig(ndim=3, fine_in=2, coarse=4, fine_out=3)) == 139_025
    assert count(NetworkConfig(ndim=2, channels=8)) == 8_265


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(7, 10), (1, 3), (9, 5)])
def test_any_size_goes_and_the_scale_of_the_input_does_not_matter(shape, scale):
    net = small_network().double()
    r = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = net(r)
    assert y.shape == r.shape
    torch.testing.assert_close(net(scale * r), y)
    torch.testing.assert_close(net(r[:1]), y[:1])


def test_both_initialisations_and_input_scales():
    glorot = small_network(initialisation="glorot")
    assert not any(p.any() for name, p in glorot.named_parameters() if name.endswith("bias"))
    bound = (6 / (9 * 2 + 9 * 2)) ** 0.5
    assert glorot.enter.weight.abs().max() <= bound
    rms = small_network()
    unit = DirectionNetwork(NetworkConfig(**SMALL.to_dict() | {"input_scale": "unit"}))
    unit.load_state_dict(rms.state_dict())
    r = torch.ones(1, 4, 4)
    assert not torch.allclose(rms(r), unit(r))
    assert torch.equal(small_network(3).lift.weight, small_network(3).lift.weight)


def test_impossible_networks_are_named(without_shape_checks):
    for options in ({"ndim": 1}, {"channels": 0}, {"input_scale": "other"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            NetworkConfig(**{"ndim": 2} | options)
    with pytest.raises(ValueError, match="initialisation"):
        small_network(initialisation="zeros")
    with pytest.raises(ValueError, match="grid axes"):
        small_network()(torch.ones(1, 2, 2, 2))
    with pytest.raises(ValueError, match="axes"):
        GridDirection(small_network(), Domain.box(3, 3, 3))


# Training -------------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_reports_every_step():
    trainer = small_trainer(steps=90, learning_rate=1e-2)
    before, seen = trainer.validate(), []
    losses = trainer.run(callback=seen.append)
    assert [p.step for p in seen] == list(range(1, 91))
    assert [p.loss for p in seen] == losses
    assert [step for step, _ in trainer.validations] == list(range(3, 91, 3))
    assert trainer.validations[-1][1] == seen[-1].validation_loss == trainer.validate()
    assert trainer.validate() < before - 0.05


def test_the_learning_rate_falls_linearly_to_its_share():
    config = TrainingConfig(steps=100, learning_rate=1e-3, final_rate=0.02)
    assert config.rate(0) == 1e-3
    assert config.rate(50) == pytest.approx(0.51e-3)
    assert config.rate(100) == pytest.approx(2e-5)


def test_held_out_residuals_are_never_trained_on():
    (part,) = small_trainer().systems
    together = torch.cat([part.train, part.held_out])
    assert len(together.unique(dim=0)) == 30
    assert len(part.held_out) == 3


def test_an_interrupted_run_that_resumes_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = small_trainer()
    whole.run()
    first = small_trainer()

    def interrupt(progress):
        if progress.step == 4:
            first.save(tmp_path / "net.safetensors")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(callback=interrupt)
    second = small_trainer()
    second.resume(tmp_path / "net.safetensors")
    assert second.step == 4
    second.run()
    for ours, theirs in zip(second.network.parameters(), whole.network.parameters()):
        assert torch.equal(ours, theirs)
    assert second.validations == whole.validations


def test_several_grids_take_turns():
    systems = [
        TrainingSystem.from_ritz(Domain.box(*shape), steps=10, theta=0, count=10, rng=0) for shape in ((4, 4), (5, 7))
    ]
    trainer = Trainer(small_network(), systems, TrainingConfig(steps=4, batch_size=2))
    assert len(trainer.run()) == 4


def test_training_refuses_what_cannot_be_trained():
    system = TrainingSystem.from_ritz(Domain.box(4, 4), steps=10, theta=0, count=1, rng=0)
    for systems, message in [([], "at least one"), ([system], "too few")]:
        with pytest.raises(ValueError, match=message):
            Trainer(small_network(), systems)
    cube = TrainingSystem.from_ritz(Domain.box(3, 3, 3), steps=10, theta=0, count=10, rng=0)
    with pytest.raises(ValueError, match="axes"):
        Trainer(small_network(), [cube])
    for options in ({"steps": 0}, {"learning_rate": 0.0}, {"final_rate": 2.0}, {"validation_share": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            TrainingConfig(**options)
    trainer = small_trainer()
    with torch.no_grad():
        trainer.network.read.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.run()


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_network_comes_back_as_it_was_saved(tmp_path):
    net = small_network()
    save_network(tmp_path / "net.safetensors", net, steps=7, grid=[4, 4])
    again = load_network(tmp_path / "net.safetensors")
    assert again.config == SMALL
    for ours, theirs in zip(again.parameters(), net.parameters()):
        assert torch.equal(ours, theirs)
    assert read_checkpoint(tmp_path / "net.safetensors")[0].training == {"grid": [4, 4]}


def test_untrained_foreign_and_damaged_files_are_refused_by_name(tmp_path):
    net, path = small_network(), tmp_path / "net.safetensors"
    state = {f"network.{k}": v for k, v in net.state_dict().items()}

    def refused(reason):
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_network(path)
        assert str(path) in str(caught.value)

    refused("no such file")
    path.write_bytes(b"junk, not weights")
    refused("no safetensors file")
    save_file(state, str(path))
    refused("no conjugate-direction network")
    save_network(path, net, steps=0)
    refused("never trained")
    save_network(path, net, steps=3)
    header = read_checkpoint(path)[0].to_header()
    save_file({k: v for k, v in state.items() if "skip" not in k}, str(path), metadata=header)
    refused("skip")
    save_file(state | {"network.more": torch.ones(1)}, str(path), metadata=header)
    refused("more")
    save_file(state | {"network.read.bias": torch.full((1,), torch.nan)}, str(path), metadata=header)
    refused("NaN")
    save_file(state, str(path), metadata=header | {"network": "{}, nonsense"})
    refused("header is damaged")


def test_a_trainer_refuses_another_ones_checkpoint(tmp_path):
    path = tmp_path / "net.safetensors"
    trainer = small_trainer()
    trainer.run(2)
    trainer.save(path)
    with pytest.raises(CheckpointError, match="seed"):
        small_trainer(seed=1).resume(path)
    save_network(path, trainer.network, steps=2, **trainer._origin())
    with pytest.raises(CheckpointError, match="weights only"):
        small_trainer().resume(path)


def test_the_script_trains_and_saves(tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    numbers = {"ndim": 2, "size": 6, "steps": 4, "lanczos-steps": 12, "theta": 1, "count": 20, "channels": 2}
    main([*(f"--{name}={value}" for name, value in numbers.items()), "--output", str(path)])
    assert "held-out" in capsys.readouterr().out
    assert load_network(path).config.channels == 2
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]  # its own checkpoint is gone
    with pytest.raises(SystemExit):
        main(["--output", str(path)])


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_shipped_networks_are_those_of_their_recipes_and_small(ndim):
    metadata, _ = read_checkpoint(pretrained_path(ndim))
    recipe = RECIPES[ndim]
    assert metadata.network == recipe.network
    assert metadata.steps == recipe.steps
    assert metadata.training["grid"] == [recipe.size] * ndim
    assert metadata.training["seed"] == recipe.seed
    assert pretrained_path(ndim).stat().st_size < 500_000
    with pytest.raises(ValueError, match="ndim"):
        load_pretrained(4)


def test_the_shipped_network_has_the_loss_that_its_file_says():
    """On residuals drawn as its recipe says: network, data and file belong together."""
    metadata, _ = read_checkpoint(pretrained_path(3))
    recipe = RECIPES[3]
    domain = Domain.box(*[recipe.size] * 3)
    system = TrainingSystem.from_ritz(domain, steps=recipe.lanczos_steps, theta=recipe.theta, count=50, rng=1)
    trainer = Trainer(load_pretrained(3), [system], TrainingConfig(validation_share=0.9))
    assert trainer.validate() == pytest.approx(metadata.training["validation_loss"], rel=0.3)


# The shipped networks at work -----------------------------------------------------------------------------------------


def cg_iterations(domain, b, rtol):
    found = ConjugateDirection(direction=lambda r: r, rtol=rtol, max_iter=2000).solve(domain.operator(), b.reshape(-1))
    assert found.converged
    return int(found.iterations)


@pytest.mark.parametrize(
    ("domain", "factor"),
    [
        (Domain.box(40, 51).with_ball((25, 30), 9), 4),
        (Domain.box(32, 32, outside=Cell.SOLID).with_surface(np.full(32, 20)).with_ball((8, 14), 4), 3),
        (Domain.box(33, 20, outside=Cell.SOLID), 2),
        (Domain.box(11, 12, 10).with_ball((5, 6, 5), 2), 2.5),
        (Domain.box(8, 8, 8, outside=Cell.SOLID).with_surface(np.full((8, 8), 6)), 1.5),
    ],
)
def test_any_domain_is_solved_in_a_fraction_of_cgs_iterations(domain, factor):
    b = torch.randn(*domain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b *= torch.from_numpy(domain.fluid)
    if domain.enclosed:
        b -= b.mean()
    found = PressureSolver(rtol=1e-6).solve(domain, b)
    assert found.status is Status.CONVERGED
    x = found.x.reshape(-1).numpy()
    assert np.linalg.norm(b.reshape(-1).numpy() - domain.matrix() @ x) <= 1.01e-6 * float(b.norm())
    assert not found.x[~torch.from_numpy(domain.fluid)].any()
    assert factor * int(found.iterations) <= cg_iterations(domain, b, 1e-6)
    assert found.fallbacks == 0


def test_an_untrained_network_does_not_pass_for_an_answer():
    domain = Domain.box(24, 24)
    b = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = DirectionNetwork(NetworkConfig(channels=4), generator=torch.Generator().manual_seed(0))
    found = PressureSolver(network=network, max_iter=100).solve(domain, b)
    assert found.status in (Status.STAGNATED, Status.ITERATION_LIMIT)
    assert float(found.residual_norms) > 1e-4 * float(b.norm())


def test_variants_of_the_direction_reach_the_same_answer():
    domain = Domain.box(16, 16, outside=Cell.SOLID).with_surface(np.full(16, 11))
    b = torch.randn(2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b *= torch.from_numpy(domain.fluid)
    answers = {
        name: PressureSolver(rtol=1e-6, max_iter=500, **options).solve(domain, b)
        for name, options in {"plain": {}, "odd": {"odd": True}, "zeros": {"mirror": False}}.items()
    }
    assert all(found.converged for found in answers.values())
    for found in answers.values():
        torch.testing.assert_close(found.x, answers["plain"].x, rtol=1e-3, atol=1e-3)
    assert answers["plain"].iterations.max() < answers["zeros"].iterations.max()
    odd = PressureSolver(rtol=1e-6, odd=True).solve(domain, torch.stack([b[0], -b[0]]))
    assert odd.iterations[0] == odd.iterations[1]
    torch.testing.assert_close(odd.x[0], -odd.x[1], rtol=1e-6, atol=1e-9)
