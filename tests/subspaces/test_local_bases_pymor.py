"""pyMOR: VectorArrays in and out, POD against pyMOR's own, local reduced models of a thermal block."""

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from locally.errors import MissingExtra
from locally.subspaces.local_bases import LocalReducedBases, LocalReductor, fit_vector_arrays, pod, sine_dissimilarity

few_members = pytest.mark.filterwarnings("ignore:clusters .* have at most twice:UserWarning")


@pytest.fixture(scope="module")
def pymor():
    package = pytest.importorskip("pymor", reason="pyMOR is not installed")
    from pymor.core.logger import set_log_levels

    set_log_levels({"pymor": "ERROR"})
    return package


@pytest.fixture(scope="module")
def block(pymor):
    """A thermal block of two by two materials: model, parameter values, solutions."""
    from pymor.models.examples import thermal_block_example

    model = thermal_block_example(diameter=1 / 12)
    values = [model.parameters.parse(row.tolist()) for row in np.random.default_rng(0).uniform(0.1, 1, (30, 4))]
    U = model.solution_space.empty()
    for mu in values:
        U.append(model.solve(mu))
    return model, values, U


def test_vector_arrays_are_snapshots_by_themselves(block):
    model, _, U = block
    columns = U.to_numpy()
    np.testing.assert_allclose(sine_dissimilarity(U), sine_dissimilarity(columns.T))
    M = model.h1_0_product
    np.testing.assert_allclose(sine_dissimilarity(U, product=M), sine_dissimilarity(columns.T, product=M.matrix))
    np.testing.assert_allclose(
        sine_dissimilarity([U[:3], U[3:7]]), sine_dissimilarity([columns[:, :3], columns[:, 3:7]]), atol=1e-9
    )


def test_modes_are_pymors_own(block):
    from pymor.algorithms.pod import pod as theirs

    _, _, U = block
    modes, s = theirs(U, modes=3, method="qr_svd")
    ours, found = pod(U.to_numpy().T, 3)
    np.testing.assert_allclose(found, s, rtol=1e-10)
    assert subspace_angles(ours.T, modes.to_numpy()).max() < 1e-6


@few_members
def test_bases_come_back_as_vector_arrays_orthonormal_in_the_product(block):
    model, values, U = block
    product = model.h1_0_product
    dictionary = fit_vector_arrays(LocalReducedBases(2, 3, random_state=0), U, values, product)
    plain = LocalReducedBases(2, 3, product=product, random_state=0).fit(U, [mu.to_numpy() for mu in values])
    np.testing.assert_array_equal(dictionary.estimator.labels_, plain.labels_)
    for V, theirs in zip(dictionary.bases, plain.bases_):
        assert V in model.solution_space
        np.testing.assert_allclose(V.gramian(product), np.eye(3), atol=1e-9)
        # the projections agree; the modes might differ in sign
        P, Q = (B @ B.T @ product.matrix for B in (V.to_numpy(), theirs))
        np.testing.assert_allclose(P @ U.to_numpy(), Q @ U.to_numpy(), atol=1e-6)
    np.testing.assert_allclose(dictionary.errors(U), plain.errors(U), atol=1e-7)
    np.testing.assert_array_equal(dictionary.assign(U), plain.labels_)


@few_members
def test_trajectories_are_lists_of_vector_arrays(block):
    _, _, U = block
    pieces = [U[:5], U[5:12], U[12:20], U[20:]]
    dictionary = fit_vector_arrays(LocalReducedBases(2, 2, random_state=0), pieces)
    plain = LocalReducedBases(2, 2, random_state=0).fit([p.to_numpy() for p in pieces])
    np.testing.assert_array_equal(dictionary.estimator.labels_, plain.labels_)


@few_members
def test_reduced_models_solve_with_the_basis_that_the_classifier_picks(block):
    from pymor.reductors.coercive import CoerciveRBReductor

    model, values, U = block
    product = model.h1_0_product
    dictionary = fit_vector_arrays(LocalReducedBases(3, 3, random_state=0), U[:25], values[:25], product)
    for reductor in (None, CoerciveRBReductor):
        reduced = LocalReductor(model, dictionary, reductor).reduce()
        for mu, u in zip(values[25:], U[25:]):
            k = reduced.choose(mu)
            assert reduced.roms[k].solution_space.dim == 3
            error = (reduced.solve(mu) - u).norm(product)[0] / u.norm(product)[0]
            best = dictionary.errors(u)[0, k]
            # Cea: Galerkin is at most sqrt(1 / 0.1) from the best in the space, in this norm
            assert best * (1 - 1e-9) <= error <= np.sqrt(10) * best + 1e-9


def test_what_does_not_fit_is_named(block):
    model, _, U = block
    estimator = LocalReducedBases(2, 2)
    with pytest.raises(TypeError, match="VectorArray"):
        fit_vector_arrays(estimator, [np.ones((3, 2))])
    with pytest.raises(ValueError, match="product must be given to fit_vector_arrays"):
        fit_vector_arrays(LocalReducedBases(2, 2, product=np.ones(3)), U)
    with pytest.raises(ValueError, match="zero norm"):
        fit_vector_arrays(estimator, model.solution_space.zeros(3))
    with pytest.raises(ValueError, match="fitted with parameters"):
        LocalReductor(model, fit_vector_arrays(estimator, U))


def test_without_pymor_the_extra_is_named(monkeypatch):
    import sys

    for name in [m for m in sys.modules if m.split(".")[0] == "pymor"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pymor", None)
    with pytest.raises(MissingExtra, match=r"locally\[pymor\]"):
        fit_vector_arrays(LocalReducedBases(2, 2), [])
