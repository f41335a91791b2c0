"""Estimates of Q(x, a) from one episode, and the bonuses that pay for their variance.

Source: arXiv 2301.12942, Algorithms 1 and 2; dilated bonuses from Luo, Wei and Lee (NeurIPS 2021, arXiv 2107.08346).
Layers lead: every function takes any leading axes, such as (H,) or (runs, H).
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_finite, check_nonnegative, check_positive, check_shape
from locally.control.adversarial import kernels
from locally.control.validity import check_kernel, check_unit_ball


def standard_q(
    features: Float[ndarray, "*layers S A d"],
    inverse: Float[ndarray, "*layers d d"],
    visited: Float[ndarray, "*layers d"],
    loss_to_go: Float[ndarray, "*layers"],
) -> Float[ndarray, "*layers S A"]:
    """Q^(x, a) = phi(x, a)^T S+ phi_k L_k: unbiased but for the ridge, as small as -H / gamma.

    Args:
        features: phi[..., s, a], norm at most 1.
        inverse: S+, of features that are independent of the episode given the policy.
        visited: phi_k, at the episode's own (x, a).
        loss_to_go: L_k, the episode's losses from the layer on.

    Raises:
        ValueError: shapes differ, an argument is not finite, or a feature is longer than 1.

    Complexity: O(S A d) a layer.

    >>> standard_q(np.eye(2)[None], 2 * np.eye(2), np.array([0.0, 1.0]), np.array(1.5))
    array([[0., 3.]])
    """
    return _products(features, inverse, visited, loss_to_go) * loss_to_go[..., None, None]


def magnitude_reduced_q(
    features: Float[ndarray, "*layers S A d"],
    inverse: Float[ndarray, "*layers d d"],
    visited: Float[ndarray, "*layers d"],
    loss_to_go: Float[ndarray, "*layers"],
    occupancy: Float[ndarray, "*layers S A"],
    bound: float | Float[ndarray, "*#layers"],
) -> Float[ndarray, "*layers S A"]:
    """Q^(x, a) = y L_k - bound min(y, 0) + m(x, a) with y = phi^T S+ phi_k and m = bound E[min(phi^T S+ phi', 0)].

    Both corrections cancel in expectation; together they lift the estimate to at least m >= -bound |phi|_(S+), and that
    is at least -bound / sqrt(gamma).

    Args:
        features, inverse, visited, loss_to_go: as for `standard_q`.
        occupancy: distribution of (x', a') under the policy, or frequencies of fresh samples.
        bound: on L_k; the horizon, or the number of layers left.

    Raises:
        ValueError: as for `standard_q`, or loss_to_go exceeds the bound.

    Complexity: O(S A d N) a layer for N pairs of positive occupancy.

    >>> one_hot = np.eye(2)[None]  # never a negative product: nothing to correct
    >>> magnitude_reduced_q(one_hot, np.eye(2), one_hot[0, 1], np.array(1.0), np.full((1, 2), 0.5), 3.0)
    array([[0., 1.]])
    """
    y = _products(features, inverse, visited, loss_to_go)
    check_finite("occupancy", occupancy)
    check_shape("occupancy", occupancy, y.shape)
    ceiling = np.broadcast_to(np.asarray(bound, np.float64), loss_to_go.shape)
    if (loss_to_go > ceiling + 1e-9).any():
        raise ValueError(f"loss_to_go must not exceed bound, but is larger by {(loss_to_go - ceiling).max():.3g}")
    *layers, S, A, d = features.shape
    phi = np.ascontiguousarray(features).reshape(-1, S * A, d)
    weights = np.ascontiguousarray(occupancy).reshape(-1, S * A)
    shift = kernels.negative_means(phi, inverse.reshape(-1, d, d), weights).reshape(*layers, S, A)
    return reduce_magnitude(y, shift, loss_to_go[..., None, None], ceiling[..., None, None])


def reduce_magnitude(products: ndarray, shift: ndarray, loss_to_go: ndarray, bound: ndarray | float) -> ndarray:
    """y L - bound min(y, 0) + bound E[min(y', 0)], elementwise."""
    return products * loss_to_go + bound * (shift - np.minimum(products, 0))


def local_bonus(
    features: Float[ndarray, "*layers S A d"],
    inverse: Float[ndarray, "*layers d d"],
    policy: Float[ndarray, "*layers S A"],
    beta: float,
) -> Float[ndarray, "*layers S A"]:
    """b(x, a) = beta (|phi(x, a)|^2_(S+) + E_(a' ~ pi(.|x)) |phi(x, a')|^2_(S+)).

    Raises:
        ValueError: shapes differ, policy is no distribution over actions, beta is negative, or a feature is longer than
            1.

    Complexity: O(S A d^2) a layer.

    >>> local_bonus(np.eye(2)[None], np.diag([1.0, 3.0]), np.array([[0.5, 0.5]]), 0.1)
    array([[0.3, 0.5]])
    """
    check_unit_ball("features", features)
    check_finite("inverse", inverse)
    check_kernel("policy", policy)
    check_nonnegative("beta", beta)
    *layers, S, A, d = features.shape
    check_shape("inverse", inverse, (*layers, d, d))
    check_shape("policy", policy, (*layers, S, A))
    norms = kernels.quadratic_forms(np.ascontiguousarray(features).reshape(-1, S * A, d), inverse.reshape(-1, d, d))
    norms = norms.reshape(*layers, S, A)
    return beta * (norms + (policy * norms).sum(axis=-1, keepdims=True))


def dilated_bonus(
    P: Float[ndarray, "*runs H S A S"],
    policy: Float[ndarray, "*runs H S A"],
    bonus: Float[ndarray, "*runs H S A"],
    *,
    factor: float | None = None,
) -> Float[ndarray, "*runs H S A"]:
    """B(x, a) = b(x, a) + factor E_(x' ~ P) E_(a' ~ pi(.|x')) B(x', a'), and B = b in the last layer.

    Args:
        factor: 1 + 1 / H by default; with 1, B is the Q-function of b.

    Raises:
        ValueError: shapes differ, P or policy is no distribution, bonus is not finite, or factor is not positive.

    Complexity: O(H S^2 A).

    >>> P, policy = np.ones((2, 1, 1, 1)), np.ones((2, 1, 1))
    >>> dilated_bonus(P, policy, np.ones((2, 1, 1))).ravel()
    array([2.5, 1. ])
    """
    check_kernel("P", P)
    check_kernel("policy", policy)
    check_finite("bonus", bonus)
    H, S, A = bonus.shape[-3:]
    check_shape("policy", policy, bonus.shape)
    check_shape("P", P, (*bonus.shape, S))
    factor = 1 + 1 / H if factor is None else factor
    check_positive("factor", factor)
    runs = np.ascontiguousarray(bonus).reshape(-1, H, S, A)
    kernel = np.ascontiguousarray(P).reshape(-1, H, S, A, S)
    return kernels.dilate(kernel, np.ascontiguousarray(policy).reshape(runs.shape), runs, factor).reshape(bonus.shape)


def _products(features: ndarray, inverse: ndarray, visited: ndarray, loss_to_go: ndarray) -> ndarray:
    check_unit_ball("features", features)
    for name, array in {"inverse": inverse, "visited": visited, "loss_to_go": loss_to_go}.items():
        check_finite(name, array)
    *layers, S, A, d = features.shape
    check_shape("inverse", inverse, (*layers, d, d))
    check_shape("visited", visited, (*layers, d))
    check_shape("loss_to_go", loss_to_go, tuple(layers))
    phi = np.ascontiguousarray(features).reshape(-1, S * A, d)
    return kernels.linear_forms(phi, inverse.reshape(-1, d, d), visited.reshape(-1, d)).reshape(*layers, S, A)
