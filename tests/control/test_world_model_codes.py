"""Codes: a partition of unity that is continuous and local; the reference's codes; tile coding; refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.estimator_checks import check_estimator

from locally.control.world_model import LosseEncoder, RandomReLU

GOLDEN = "26-losse-ftl/losse_rho{}.npz"


def encoder_of(reference, **changes):
    _, _, kappa, n_bins, rho, _ = (int(p) for p in reference["params"])
    return LosseEncoder(kappa, rho, n_bins, projection=reference["projection"], **changes).fit(reference["X"])


@pytest.mark.parametrize("rho", [1, 2, 3])
def test_codes_are_the_references(golden, rho):
    with np.load(golden / GOLDEN.format(rho)) as reference:
        indices, values = encoder_of(reference).encode(reference["Xq"])
        np.testing.assert_array_equal(indices, reference["enc_indices"])
        np.testing.assert_allclose(values, reference["enc_values"], atol=1e-12)


@given(
    kappa=st.integers(1, 6),
    rho=st.integers(1, 4),
    n_bins=st.integers(1, 5),
    size=st.floats(0, 100),
    seed=st.integers(0, 2**31),
)
def test_each_grid_is_a_partition_of_unity(kappa, rho, n_bins, size, seed):
    X = size * np.random.default_rng(seed).standard_normal((5, 3))
    encoder = LosseEncoder(kappa, rho, n_bins, random_state=seed % 1000).fit(X)
    indices, values = encoder.encode(X)
    assert (values >= 0).all()
    np.testing.assert_allclose(values.reshape(5, kappa, -1).sum(-1), 1, atol=1e-12)
    assert (np.diff(indices, axis=1) > 0).all()  # ascending, so distinct
    assert indices.min() >= 0
    assert indices.max() < encoder.n_codes_
    in_grid = indices.reshape(5, kappa, -1) // (n_bins + 1) ** rho
    np.testing.assert_array_equal(in_grid, np.broadcast_to(np.arange(kappa)[:, None], in_grid.shape))


@given(n_bins=st.integers(1, 9), seed=st.integers(0, 1000))
def test_codes_are_continuous_across_the_borders_of_bins(n_bins, seed):
    border = np.arange(1, n_bins) / n_bins
    at = np.concatenate([np.log(border / (1 - border)), [-40.0, 40.0, 0.3]])[:, None]  # the sigmoid's inverse
    encoder = LosseEncoder(1, 1, n_bins, projection=np.ones((1, 1))).fit(at)
    for step in (1e-9, -1e-9):
        gap = encoder.transform(at) - encoder.transform(at + step)
        assert abs(gap).sum(axis=1).max() < 1e-6
    wide = LosseEncoder(7, 3, n_bins, random_state=seed).fit(np.zeros((1, 2)))
    X = np.random.default_rng(seed).uniform(-2, 2, (20, 2))
    assert abs(wide.transform(X) - wide.transform(X + 1e-9)).sum(axis=1).max() < 1e-6


def test_the_corners_of_a_cell_are_mixed_as_multilinear_interpolation_does():
    h = np.array([1.25, 3.5])
    at = np.log(h / 4 / (1 - h / 4))[None]
    indices, values = LosseEncoder(1, 2, 4, projection=np.eye(2)).fit(at).encode(at)
    assert indices.tolist() == [[1 * 5 + 3, 1 * 5 + 4, 2 * 5 + 3, 2 * 5 + 4]]
    np.testing.assert_allclose(values, [[0.375, 0.375, 0.125, 0.125]], atol=1e-12)


def test_a_saturated_input_stays_in_the_last_cell():
    indices, values = LosseEncoder(1, 1, 4, projection=np.ones((1, 1))).fit([[0.0]]).encode([[1e4], [-1e4]])
    assert indices.tolist() == [[3, 4], [0, 1]]
    assert values.tolist() == [[0, 1], [1, 0]]


def test_hard_bins_are_the_cells_of_the_grid():
    X = np.random.default_rng(0).uniform(-2, 2, (50, 3))
    soft = LosseEncoder(4, 2, 5, random_state=0).fit(X)
    hard = LosseEncoder(4, 2, 5, binning="hard", random_state=0).fit(X)
    assert (hard.n_codes_, hard.n_active_) == (4 * 25, 4)
    lowest = soft.encode(X)[0][:, ::4] - np.arange(4) * 36  # the lower corner of each cell
    expected = np.arange(4) * 25 + lowest // 6 * 5 + lowest % 6
    np.testing.assert_array_equal(hard.encode(X)[0], expected)
    assert (hard.transform(X).sum(axis=1) == 4).all()


def test_scale_acts_on_each_input():
    X = np.random.default_rng(0).uniform(-1, 1, (5, 2))
    one = LosseEncoder(3, random_state=0, scale=(1.0, 3.0)).fit(X)
    other = LosseEncoder(3, random_state=0).fit(X)
    np.testing.assert_allclose(one.projection_, other.projection_ * [[1], [3]])
    drawn = LosseEncoder(400, random_state=0).fit(X).projection_ * np.sqrt(2)
    assert abs(drawn).max() <= 2
    assert drawn.std() == pytest.approx(0.88, abs=0.03)  # a standard normal cut at two


def test_scikit_learn_takes_them_for_its_own(without_shape_checks):
    check_estimator(LosseEncoder(n_grids=3), on_skip=None)
    check_estimator(RandomReLU(5), on_skip=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_bins": 0}, "n_bins"),
        ({"n_grids": 0}, "n_grids"),
        ({"grid_dim": 9}, "grid_dim must be at most 8"),
        ({"grid_dim": 8, "n_bins": 40}, "must be at most 2147483647, got"),
        ({"scale": -1.0}, "scale"),
        ({"scale": (1.0, 2.0, 3.0)}, r"scale must have shape \(2\)"),
        ({"projection": "uniform"}, "projection"),
        ({"projection": np.ones((3, 4))}, "projection must have shape"),
        ({"binning": "fuzzy"}, "binning"),
    ],
)
def test_grids_out_of_range_are_named(changes, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        LosseEncoder(**changes).fit(np.zeros((1, 2)))


def test_inputs_that_do_not_fit_are_refused():
    encoder = LosseEncoder(2).fit(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="3 features"):
        encoder.encode(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="NaN"):
        encoder.encode(np.array([[0.0, np.nan]]))
