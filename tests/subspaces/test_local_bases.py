"""Angles against SciPy and projectors, k-medoids against exhaustive search, inner products, snapshots from anywhere."""

from itertools import combinations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from locally.subspaces.local_bases import (
    KMedoids,
    SnapshotSet,
    Status,
    euclidean_dissimilarity,
    incremental_pod,
    inner_product,
    k_medoids,
    pod,
    sine_dissimilarity,
)

KINDS = ["chordal", "gap", "geodesic", "projection"]


@pytest.fixture
def vectors(golden):
    with np.load(golden / "15-rom-net" / "romnet_a.npz") as z:
        return {name: z[name] for name in z.files}


def random_bases(rng, n, n_dof, m):
    return np.stack([np.linalg.qr(rng.standard_normal((n_dof, m)))[0] for _ in range(n)])


def spd(rng, n):
    R = rng.standard_normal((n, n))
    return R @ R.T + n * np.eye(n)


# Dissimilarities


def test_dissimilarities_are_the_golden_ones(vectors):
    D = sine_dissimilarity(vectors["bases"], n_modes=None, tol=0.0)
    np.testing.assert_allclose(D, vectors["D_sub"], atol=1e-12)
    np.testing.assert_allclose(sine_dissimilarity(vectors["vectors"]), vectors["D_vec"], atol=1e-12)


@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 4), n_dof=st.integers(5, 12))
@settings(max_examples=20)
def test_every_kind_is_its_function_of_scipys_principal_angles(seed, m, n_dof):
    U = random_bases(np.random.default_rng(seed), 4, n_dof, m)
    expected = {
        "chordal": lambda theta: np.sqrt((np.sin(theta) ** 2).mean()),
        "gap": lambda theta: np.sin(theta).max(),
        "geodesic": lambda theta: np.sqrt((theta**2).sum()),
    }
    for kind, of in expected.items():
        D = sine_dissimilarity(U, kind=kind, n_modes=None, tol=0.0)
        for i, j in combinations(range(4), 2):
            assert D[i, j] == pytest.approx(of(subspace_angles(U[i], U[j])), abs=1e-9)


@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 3))
@settings(max_examples=20)
def test_they_are_blind_to_scale_sign_and_basis(seed, m):
    rng = np.random.default_rng(seed)
    U = random_bases(rng, 5, 9, m)
    mixed = np.stack([u @ rng.standard_normal((m, m)) for u in U])
    scaled = U * (10.0 ** rng.uniform(-6, 6, 5) * rng.choice([-1, 1], 5))[:, None, None]
    for kind in KINDS[:3]:
        D = sine_dissimilarity(U, kind=kind, n_modes=None, tol=0.0)
        np.testing.assert_allclose(sine_dissimilarity(mixed, kind=kind, n_modes=None, tol=0.0), D, atol=1e-7)
        np.testing.assert_allclose(sine_dissimilarity(scaled, kind=kind, n_modes=None, tol=0.0), D, atol=1e-9)
        np.testing.assert_array_equal(D, D.T)
        assert not D.diagonal().any()
        if kind != "geodesic":
            assert D.max() <= 1
        excess = D[:, :, None] - (D[:, None, :] + D.T[None, :, :])  # D_ij - D_ik - D_kj
        assert excess.transpose(0, 1, 2).max() <= 1e-9


def test_chordal_is_the_distance_of_the_projectors():
    U = random_bases(np.random.default_rng(0), 6, 15, 3)
    P = U @ U.transpose(0, 2, 1)
    expected = np.linalg.norm(P[:, None] - P[None], axis=(2, 3)) / np.sqrt(6)
    np.testing.assert_allclose(sine_dissimilarity(U, n_modes=None, tol=0.0), expected, atol=1e-12)
    gaps = np.linalg.norm(P[:, None] - P[None], ord=2, axis=(2, 3))
    np.testing.assert_allclose(sine_dissimilarity(U, kind="gap", n_modes=None, tol=0.0), gaps, atol=1e-9)


def test_for_single_snapshots_it_is_the_error_of_projecting_on_the_other():
    S = np.random.default_rng(1).standard_normal((7, 20)) * np.geomspace(1e-3, 1e3, 7)[:, None]
    D = sine_dissimilarity(S)
    for i, j in combinations(range(7), 2):
        v = S[j] / np.linalg.norm(S[j])
        assert D[i, j] == pytest.approx(np.linalg.norm(S[i] - v * (v @ S[i])) / np.linalg.norm(S[i]), rel=1e-12)
    for kind in ("gap", "projection"):
        np.testing.assert_allclose(sine_dissimilarity(S, kind=kind), D, atol=1e-12)


@pytest.mark.parametrize("angle", [1e-4, 1e-7, 1e-10])
@pytest.mark.parametrize("kind", KINDS)
def test_small_angles_keep_their_digits(angle, kind):
    """1 - cos^2 would be all rounding below 1e-8."""
    turned = np.array([[1.0, 0, 0, 0], [0, np.cos(angle), np.sin(angle), 0]]).T
    U = np.stack([np.eye(4)[:, :2], turned])
    factor = 1 / np.sqrt(2) if kind in ("chordal", "projection") else 1.0
    assert sine_dissimilarity(U, kind=kind, n_modes=None, tol=0.0)[0, 1] == pytest.approx(factor * angle, rel=1e-5)
    pair = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    assert sine_dissimilarity(pair, kind=kind)[0, 1] == pytest.approx(angle, rel=1e-5)


def test_missing_angles_of_smaller_subspaces_count_as_right_angles():
    plane, line = np.eye(5)[:, :2], np.eye(5)[:, :1]
    simulations = [plane, line, np.eye(5)[:, 3:4]]
    values = {kind: sine_dissimilarity(simulations, kind=kind, tol=0.0) for kind in KINDS}
    assert values["chordal"][0, 1] == pytest.approx(np.sqrt(1 / 2))
    assert values["gap"][0, 1] == 1
    assert values["geodesic"][0, 1] == pytest.approx(np.pi / 2)
    assert values["geodesic"][0, 2] == pytest.approx(np.pi / 2 * np.sqrt(2))
    assert values["projection"][0, 1] == pytest.approx(np.sqrt(1 / 2))
    mean = sine_dissimilarity(simulations, kind="projection", tol=0.0, symmetrize="mean")
    assert mean[0, 1] == pytest.approx(np.sqrt(1 / 2) / 2)  # the line lies in the plane: 0 in that direction


def test_noise_below_the_tolerance_does_not_enter_a_trajectory_s_span():
    rng = np.random.default_rng(2)
    base = rng.standard_normal((30, 2))
    noisy = [base @ rng.standard_normal((2, 6)) + 1e-6 * rng.standard_normal((30, 6)) for _ in range(2)]
    assert sine_dissimilarity(noisy, tol=1e-3)[0, 1] < 1e-4
    assert sine_dissimilarity(noisy, tol=0.0)[0, 1] > 0.5


@pytest.mark.parametrize("sparse", [False, True])
def test_a_product_is_the_euclidean_one_after_whitening(sparse):
    rng = np.random.default_rng(3)
    M = spd(rng, 12)
    M = np.where(np.abs(np.subtract.outer(range(12), range(12))) <= 2, M, 0) + 12 * np.eye(12)
    L = np.linalg.cholesky(M)
    S = rng.standard_normal((6, 12, 3))
    white = np.einsum("ji,njt->nit", L, S)
    product = sp.csr_array(M) if sparse else M
    for kind in KINDS:
        np.testing.assert_allclose(
            sine_dissimilarity(S, product=product, kind=kind), sine_dissimilarity(white, kind=kind), atol=1e-9
        )
    np.testing.assert_allclose(euclidean_dissimilarity(S, product=product), euclidean_dissimilarity(white), rtol=1e-10)


@pytest.mark.parametrize("kind", ["none", "weights", "dense", "sparse"])
def test_inner_products_whiten_and_return(kind):
    rng = np.random.default_rng(4)
    T = sp.diags_array([-1.0, 2.5, -1.0], offsets=[-1, 0, 1], shape=(6, 6))
    M = {
        "none": np.eye(36),
        "weights": np.diag(rng.uniform(0.1, 9, 36)),
        "dense": spd(rng, 36),
        "sparse": sp.kronsum(T, T).toarray(),
    }[kind]
    given_as = {"none": None, "weights": M.diagonal(), "dense": M, "sparse": sp.csr_array(M)}[kind]
    product = inner_product(given_as, 36)
    U = rng.standard_normal((5, 36))
    white = product.whiten(U)
    np.testing.assert_allclose(white @ white.T, U @ M @ U.T, rtol=1e-10)
    np.testing.assert_allclose(product.unwhiten(white), U, atol=1e-10)
    np.testing.assert_allclose(product.apply(U), U @ M, atol=1e-10)
    np.testing.assert_allclose(product.norms(U), np.linalg.norm(white, axis=1), rtol=1e-10)


def test_blocks_from_disk_give_what_memory_gives(tmp_path):
    """With room for a few rows only, everything is read again and again, from a memory-mapped file."""
    rng = np.random.default_rng(5)
    S = rng.standard_normal((30, 40)) * 10.0 ** rng.uniform(-2, 2, (30, 1))
    np.save(tmp_path / "snapshots.npy", S)
    little = 8 * 40 * 20
    for product in (None, rng.uniform(1, 2, 40)):
        stored = SnapshotSet(tmp_path / "snapshots.npy", product, memory_limit=little)
        assert not stored.fits_in_memory
        assert max(len(b) for b in stored.blocks()) == 5
        for of in (sine_dissimilarity, euclidean_dissimilarity):
            np.testing.assert_allclose(of(stored), of(S, product=product), atol=1e-9)
    assert isinstance(stored._source, np.memmap)
    trajectories = rng.standard_normal((10, 40, 3))
    stored = SnapshotSet(trajectories, memory_limit=8 * 40 * 20)
    np.testing.assert_allclose(
        sine_dissimilarity(stored, kind="projection", n_modes=1),
        sine_dissimilarity(trajectories, kind="projection", n_modes=1),
        atol=1e-9,
    )


def test_arrays_that_only_slice_are_enough():
    """As zarr arrays and HDF5 data sets offer."""

    class Sliced:
        def __init__(self, array):
            self.array, self.shape, self.ndim, self.dtype = array, array.shape, array.ndim, array.dtype

        def __getitem__(self, key):
            assert isinstance(key, slice)
            return self.array[key]

    S = np.random.default_rng(6).standard_normal((9, 7))
    np.testing.assert_array_equal(SnapshotSet(Sliced(S), memory_limit=200).raw([7, 2, 3]), S[[7, 2, 3]])
    np.testing.assert_allclose(sine_dissimilarity(Sliced(S)), sine_dissimilarity(S))


@pytest.mark.parametrize(
    ("snapshots", "error", "message"),
    [
        (np.array([[1.0, np.nan], [1.0, 2.0]]), ValueError, "NaN or infinity in simulation 0"),
        (np.array([[1.0, 2.0], [0.0, 0.0]]), ValueError, "simulation 1 have zero norm"),
        (np.zeros((0, 4)), ValueError, "empty"),
        (np.ones((2, 3)) * 1j, TypeError, "real numbers"),
        ([np.ones((3, 2)), np.ones((4, 2))], ValueError, r"same number of unknowns, got \[3, 4\]"),
        ([np.ones(3), np.ones(4)], ValueError, "same number of unknowns"),
        ([np.ones((3, 2)), np.ones(3)], ValueError, "not a mixture"),
        (np.ones((2, 2, 2, 2)), ValueError, "must have shape"),
    ],
)
def test_bad_snapshots_are_named(snapshots, error, message):
    with pytest.raises(error, match=message):
        sine_dissimilarity(snapshots)


@pytest.mark.parametrize(
    ("product", "message"),
    [
        (np.ones(4), "shape"),
        (np.array([1.0, -1.0, 1.0]), "positive weights"),
        (np.diag([1.0, -1.0, 1.0]), "positive definite"),
        (np.array([[1.0, 2, 0], [0, 1, 0], [0, 0, 1]]), "symmetric"),
        (sp.csr_array(np.array([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]])), "positive definite"),
        (sp.csr_array(np.diag([1.0, 0, 1])), "positive definite"),
    ],
)
def test_bad_products_are_named(product, message):
    with pytest.raises(ValueError, match=f"product must .*{message}"):
        sine_dissimilarity(np.eye(3), product=product)


# Proper orthogonal decomposition


@pytest.mark.parametrize("method", ["svd", "snapshots", "randomized", "incremental", "auto"])
@pytest.mark.parametrize("shape", [(200, 40), (40, 200)])
def test_every_way_to_the_basis_spans_the_leading_singular_vectors(method, shape):
    rng = np.random.default_rng(7)
    A = rng.standard_normal((shape[0], 30)) * np.geomspace(1, 1e-5, 30) @ rng.standard_normal((30, shape[1]))
    _, s, Vt = np.linalg.svd(A, full_matrices=False)
    modes, found = pod(A, 8, method=method)
    np.testing.assert_allclose(found, s[:8], rtol=1e-5)
    np.testing.assert_allclose(modes @ modes.T, np.eye(8), atol=1e-8)
    assert np.sin(subspace_angles(modes.T, Vt[:8].T)).max() < 1e-2
    # Eckart-Young: no other space of this dimension leaves less
    left = np.linalg.norm(A - A @ modes.T @ modes)
    assert left == pytest.approx(np.sqrt((s[8:] ** 2).sum()), rel=1e-3)


@pytest.mark.parametrize("method", ["svd", "snapshots", "randomized", "incremental"])
def test_the_tolerance_is_met_by_the_fewest_modes(method):
    rng = np.random.default_rng(8)
    A = rng.standard_normal((60, 60)) * np.geomspace(1, 1e-4, 60)
    s = np.linalg.svd(A, compute_uv=False)
    modes, _ = pod(A, tol=0.01, method=method)
    relative = np.sqrt(np.append(np.cumsum((s**2)[::-1])[::-1], 0) / (s**2).sum())
    assert len(modes) == int(np.flatnonzero(relative <= 0.01)[0])


def test_blocks_of_any_size_merge_to_the_same_basis():
    A = np.random.default_rng(9).standard_normal((50, 5)) @ np.random.default_rng(10).standard_normal((5, 80))
    whole, s = pod(A)
    for width in (1, 7, 50):
        modes, found = incremental_pod(A[i : i + width] for i in range(0, 50, width))
        np.testing.assert_allclose(found, s, rtol=1e-10)
        assert np.sin(subspace_angles(modes.T, whole.T)).max() < 1e-9


# k-medoids


def exhaustive(D, k):
    return min(D[:, list(c)].min(axis=1).sum() for c in combinations(range(len(D)), k))


def same_partition(a, b):
    return len(set(zip(a, b))) == len(set(a)) == len(set(b))


def test_medoids_are_the_golden_optimum(vectors):
    found = KMedoids(3, random_state=0).fit(vectors["D_sub"])
    assert found.inertia_ == pytest.approx(float(vectors["optimal_cost_sub_K3"]), rel=1e-12)
    assert same_partition(found.labels_, vectors["pam_labels_sub"])
    found = KMedoids(4, random_state=0).fit(vectors["D_vec"])
    assert found.inertia_ == pytest.approx(float(vectors["optimal_cost_vec_K4"]), rel=1e-12)
    assert sorted(found.medoid_indices_) == sorted(vectors["pam_medoids_vec"])


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 4), rule=st.sampled_from(["eager", "best"]))
@settings(max_examples=30)
def test_a_single_start_ends_where_no_exchange_helps(seed, k, rule):
    rng = np.random.default_rng(seed)
    D = rng.uniform(0, 1, (9, 9))  # neither symmetric nor a metric: k-medoids needs neither
    np.fill_diagonal(D, 0)
    start = rng.choice(9, k, replace=False)
    found = k_medoids(D, start, rule=rule)
    assert found.status is Status.CONVERGED
    assert found.cost == pytest.approx(D[np.arange(9), found.indices[found.labels]].sum())
    assert found.cost == pytest.approx(D[:, found.indices].min(axis=1).sum())
    assert found.cost <= D[:, start].min(axis=1).sum() + 1e-12
    for out, new in [(o, j) for o in range(k) for j in range(9)]:
        other = found.indices.copy()
        other[out] = new
        assert D[:, other].min(axis=1).sum() >= found.cost - 1e-9


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 4))
@settings(max_examples=15)
def test_many_starts_find_the_optimum_of_small_problems(seed, k):
    X = np.random.default_rng(seed).standard_normal((10, 2))
    D = np.linalg.norm(X[:, None] - X[None], axis=2)
    assert KMedoids(k, n_init=20, random_state=0).fit(D).inertia_ == pytest.approx(exhaustive(D, k), rel=1e-9)


def test_a_medoid_for_each_point_costs_nothing_and_one_is_the_least_row_sum():
    D = sine_dissimilarity(np.random.default_rng(11).standard_normal((12, 5)))
    assert KMedoids(12).fit(D).inertia_ == 0
    assert KMedoids(1).fit(D).medoid_indices_ == [D.sum(axis=1).argmin()]


def test_agrees_with_the_kmedoids_package():
    kmedoids = pytest.importorskip("kmedoids", reason="the kmedoids package is not installed")
    X = np.random.default_rng(12).standard_normal((300, 4))
    D = np.linalg.norm(X[:, None] - X[None], axis=2)
    start = np.random.default_rng(13).choice(300, 7, replace=False)
    theirs = kmedoids.fasterpam(D, start.astype(np.uint64), n_cpu=1)
    ours = k_medoids(D, start)
    assert ours.cost == pytest.approx(theirs.loss, rel=1e-9)
    assert ours.swaps == theirs.n_swap


def test_euclidean_clusters_follow_amplitudes_and_sine_clusters_directions():
    """Multiples of two directions: the example that k-means gets wrong whatever its start."""
    S = np.array([[1.0, 0], [-1, 0], [100, 0], [-100, 0], [0, 1], [0, -1], [0, 100], [0, -100]])
    truth = [0, 0, 0, 0, 1, 1, 1, 1]
    ours = KMedoids(2, metric="sine", random_state=0).fit(S)
    assert ours.inertia_ == 0
    assert same_partition(ours.labels_, truth)
    assert not same_partition(KMeans(2, n_init=10, random_state=0).fit(S).labels_, truth)
    assert not same_partition(KMedoids(2, metric="euclidean", random_state=0).fit(S).labels_, truth)


def test_new_points_go_to_the_nearest_medoid():
    rng = np.random.default_rng(14)
    X, new = rng.standard_normal((20, 3)), rng.standard_normal((5, 3))
    for metric in ("sine", "euclidean"):
        model = KMedoids(3, metric=metric, random_state=0).fit(X)
        np.testing.assert_array_equal(model.predict(X), model.labels_)
        assert set(model.predict(new)) <= {0, 1, 2}
    D = sine_dissimilarity(X)
    model = KMedoids(3, random_state=0).fit(D)
    np.testing.assert_array_equal(model.predict(D), model.labels_)


def test_too_few_sweeps_are_admitted_and_callbacks_see_every_start():
    D = euclidean_dissimilarity(np.random.default_rng(15).standard_normal((80, 3)))
    assert k_medoids(D, np.arange(6), max_iter=1, rule="best").status is Status.ITERATION_LIMIT
    seen = []
    model = KMedoids(6, n_init=4, random_state=0, callback=lambda start, cost: seen.append((start, cost))).fit(D)
    assert [s for s, _ in seen] == [0, 1, 2, 3, 4]
    assert model.inertia_ == pytest.approx(min(cost for _, cost in seen))
    with pytest.warns(ConvergenceWarning, match="max_iter=1"):
        KMedoids(6, n_init=0, max_iter=1, rule="best").fit(D)


@pytest.mark.parametrize(
    ("D", "start", "message"),
    [
        (np.ones((3, 4)), 1, "square"),
        (np.array([[0.0, np.nan], [1, 0]]), 1, "NaN"),
        (np.array([[0.0, -1], [1, 0]]), 1, "negative"),
        (np.zeros((3, 3)), 4, "n_clusters=4 must not exceed the number of points, but n_samples=3"),
        (np.zeros((3, 3)), np.array([0, 0]), "distinct"),
        (np.zeros((3, 3)), np.array([0, 3]), "indices of 3 points"),
    ],
)
def test_bad_matrices_and_starts_are_named(D, start, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        k_medoids(D, start)


@parametrize_with_checks([KMedoids(3, metric="euclidean", n_init=2)])  # angles refuse the checks' zero rows
def test_medoids_are_a_scikit_learn_estimator(estimator, check, without_shape_checks):
    check(estimator)
