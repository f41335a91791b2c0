"""Inverse covariances of the features under a policy: exact, from samples, and by matrix geometric resampling.

Source: arXiv 2301.12942. The inverse of a regularised sample covariance needs O~(1 / gamma) samples where the
resampling of Neu and Olkhovskaya (2020) needs O~(1 / gamma^2) or more, and is symmetric besides.
"""

import math

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_between, check_count, check_finite, check_positive, check_shape, check_symmetric
from locally.control.adversarial import kernels
from locally.control.validity import check_unit_ball


def covariance(features: Float[ndarray, "*layers S A d"], weights: Float[ndarray, "*layers S A"]) -> ndarray:
    """Sigma = sum over (s, a) of weights phi phi^T: with occupancies for weights E_pi[phi phi^T].

    Args:
        features: phi[..., s, a], norm at most 1.
        weights: non-negative, for each layer.

    Returns: symmetric positive semidefinite matrices (*layers, d, d).

    Raises:
        ValueError: shapes differ, a feature is longer than 1, or a weight is negative or not finite.

    Complexity: O(S A d^2) a layer.

    >>> covariance(np.eye(2)[None], np.array([[0.25, 0.75]]))
    array([[0.25, 0.  ], [0.  , 0.75]])
    """
    check_unit_ball("features", features)
    check_finite("weights", weights)
    if weights.min(initial=0.0) < 0:
        raise ValueError(f"weights must be non-negative, got {weights.min():.3g}")
    *layers, _, _, d = features.shape
    return kernels.second_moments(*_by_layer(features, weights)).reshape(*layers, d, d)


def ridge_inverse(
    covariances: Float[ndarray, "*layers d d"], gamma: float | Float[ndarray, "*#layers"]
) -> Float[ndarray, "*layers d d"]:
    """(Sigma + gamma I)^(-1): symmetric, positive definite, and at most 1 / gamma in norm.

    Raises:
        ValueError: a matrix is not symmetric or not finite, or gamma is not positive.

    Complexity: O(d^3).

    >>> ridge_inverse(np.ones((2, 2)), 1.0).round(3)
    array([[ 0.667, -0.333], [-0.333,  0.667]])
    """
    check_finite("covariances", covariances)
    *layers, d, _ = covariances.shape
    for matrix in covariances.reshape(-1, d, d):
        check_symmetric("covariances", matrix)
    ridge = np.broadcast_to(np.asarray(gamma, np.float64), tuple(layers)).reshape(-1)
    check_finite("gamma", ridge)
    if ridge.min(initial=np.inf) <= 0:
        raise ValueError(f"gamma must be positive, got {ridge.min():.3g}")
    matrices = np.ascontiguousarray(covariances, np.float64).reshape(-1, d, d)
    return kernels.inverses(matrices, ridge).reshape(covariances.shape)


def samples_for_ridge_inverse(gamma: float, dim: int, failure: float = 0.05) -> int:
    """How many samples make (Sigma + gamma I) / 2 <= Sigma^ + gamma I <= 3 (Sigma + gamma I) / 2 but for `failure`.

    (28 / 3) ln(2 d / failure) / gamma, by the matrix Bernstein inequality for features in the unit ball.

    Raises:
        TypeError, ValueError: an argument is out of range.

    >>> samples_for_ridge_inverse(0.1, 5)
    495
    """
    check_positive("gamma", gamma)
    check_count("dim", dim)
    check_positive("failure", failure, below=1.0)
    return math.ceil(28 / 3 * math.log(2 * dim / failure) / gamma)


def sampled_covariances(
    features: Float[ndarray, "*layers S A d"],
    occupancy: Float[ndarray, "*layers S A"],
    n_samples: int,
    rng: np.random.Generator,
) -> ndarray:
    """The mean of phi phi^T over `n_samples` draws of (s, a) from the occupancy of each layer, (*layers, d, d).

    The counts of n independent draws are multinomial, so that n costs nothing: O(S A (d^2 + 1)) a layer.

    Raises:
        TypeError, ValueError: n_samples is no positive integer.

    >>> sampled_covariances(np.eye(2)[None], np.array([[1.0, 0.0]]), 10, np.random.default_rng(0))
    array([[1., 0.], [0., 0.]])
    """
    check_count("n_samples", n_samples)
    *layers, _, _, d = features.shape
    weights = empirical(occupancy, n_samples, rng)
    return kernels.second_moments(*_by_layer(features, weights)).reshape(*layers, d, d)


def empirical(
    occupancy: Float[ndarray, "*layers S A"], n_samples: int, rng: np.random.Generator
) -> Float[ndarray, "*layers S A"]:
    """Frequencies of the pairs among `n_samples` independent draws from each layer's occupancy.

    >>> empirical(np.array([[0.0, 1.0]]), 7, np.random.default_rng(0))
    array([[0., 1.]])
    """
    flat = occupancy.reshape(*occupancy.shape[:-2], -1)
    total = flat.sum(axis=-1, keepdims=True)
    return (rng.multinomial(n_samples, flat / total) / n_samples).reshape(occupancy.shape)


def matrix_geometric_resampling(
    samples: Float[ndarray, "*layers M N d"], gamma: float, *, step: float = 0.5
) -> Float[ndarray, "*layers d d"]:
    """The mean over M copies of step (I + sum_(i <= N) Y_i), Y_i = Y_(i-1) (I - step (gamma I + phi_i phi_i^T)).

    Its expectation is G^(-1) (I - (I - step G)^(N+1)) with G = Sigma + gamma I. Not symmetric.

    Args:
        samples: independent features, N for each of M copies.
        gamma: ridge, positive.
        step: in (0, 1], with step (1 + gamma) <= 1, or the powers could grow.

    Raises:
        ValueError: an argument is out of range, or a feature is longer than 1.

    Complexity: O(M N d^2).

    >>> matrix_geometric_resampling(np.ones((1, 60, 1)), 1.0).round(6)
    array([[0.5]])
    """
    check_unit_ball("samples", samples)
    check_positive("gamma", gamma)
    check_between("step", step, np.finfo(float).tiny, 1 / (1 + gamma))
    *batch, N, d = samples.shape
    Y = np.broadcast_to(np.eye(d), (*batch, d, d)).copy()
    total = Y.copy()
    for i in range(N):
        phi = samples[..., i, :]
        image = (Y @ phi[..., None])[..., 0]
        Y = (1 - step * gamma) * Y - step * image[..., :, None] * phi[..., None, :]
        total += Y
    return step * total.mean(axis=-3)


def samples_for_resampling(gamma: float, tolerance: float = 0.5, *, step: float = 0.5) -> tuple[int, int]:
    """(M, N) for `matrix_geometric_resampling`, of order 1 / (tolerance gamma)^2 and 1 / (step gamma), times a log.

    Raises:
        ValueError: an argument is out of range.

    >>> samples_for_resampling(0.1)
    (1199, 60)
    """
    check_positive("gamma", gamma, below=1.0)
    check_positive("tolerance", tolerance, below=1.0)
    check_positive("step", step)
    log = math.log(1 / (tolerance * gamma))
    return math.ceil(log / (tolerance * gamma) ** 2), math.ceil(log / (step * gamma))


def _by_layer(features: ndarray, weights: ndarray) -> tuple[ndarray, ndarray]:
    *_, S, A, d = features.shape
    check_shape("weights", weights, features.shape[:-1])
    return (
        np.ascontiguousarray(features, np.float64).reshape(-1, S * A, d),
        np.ascontiguousarray(weights, np.float64).reshape(-1, S * A),
    )
