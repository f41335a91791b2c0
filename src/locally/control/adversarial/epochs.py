"""The estimates of one epoch of Algorithm 3: covariances from half of its episodes, Q and bonuses from the other half.

Source: arXiv 2301.12942, on the scheme of Luo, Wei and Lee (NeurIPS 2021). Axes: R runs, W episodes, H layers.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from locally.control.adversarial import kernels


def epoch_weights(exploring: Bool[ndarray, " R"], turn: Int[ndarray, " R"], horizon: int) -> Float[ndarray, "R H"]:
    """1 in every layer of an ordinary episode; H in the layer where an exploring one turns to the epoch's policy.

    The layer is drawn from H, so that H times its indicator counts every layer once in expectation.

    >>> epoch_weights(np.array([False, True]), np.array([0, 2]), 3)
    array([[1., 1., 1.], [0., 0., 3.]])
    """
    at_turn = np.arange(horizon) == turn[:, None]
    return np.where(exploring[:, None], horizon * at_turn, 1.0)


def epoch_inverses(
    weights: Float[ndarray, "R W H"], phi: Float[ndarray, "R W H d"], first: Int[ndarray, "R half"], gamma: float
) -> Float[ndarray, "R H d d"]:
    """S+ = (gamma I + the weighted mean of phi phi^T over the episodes `first`)^(-1). O(R W H d^2).

    >>> epoch_inverses(np.ones((1, 2, 1)), np.ones((1, 2, 1, 1)), np.array([[0]]), 1.0)
    array([[[[0.5]]]])
    """
    R, _, H, d = phi.shape
    chosen = np.take_along_axis(weights, first[..., None], axis=1)
    vectors = np.take_along_axis(phi, first[..., None, None], axis=1)
    moments = np.einsum("rwh,rwhi,rwhj->rhij", chosen, vectors, vectors) / first.shape[1]
    inverse = kernels.inverses(np.ascontiguousarray(moments).reshape(R * H, d, d), np.full(R * H, gamma))
    return inverse.reshape(R, H, d, d)


def epoch_coefficients(
    weights: Float[ndarray, "R W H"],
    phi: Float[ndarray, "R W H d"],
    losses: Float[ndarray, "R W H"],
    bonuses: Float[ndarray, "R W H"],
    second: Int[ndarray, "R half"],
    inverse: Float[ndarray, "R H d d"],
) -> Float[ndarray, "R H d"]:
    """theta^ - Lambda^: Q^ and the later part of B^ are both linear in phi, so one regression serves for both.

    The targets are L_h - D_h over the episodes `second`, where D_h = sum over i > h of (1 + 1/H)^(i - h) b(x_i, a_i).

    >>> one = np.ones((1, 1, 1))
    >>> epoch_coefficients(one, one[..., None], 0.5 * one, one, np.array([[0]]), one[..., None])
    array([[[0.5]]])
    """
    H = losses.shape[-1]
    target = losses[..., ::-1].cumsum(axis=-1)[..., ::-1]
    later = np.zeros_like(bonuses)
    for h in reversed(range(H - 1)):
        later[..., h] = (1 + 1 / H) * (later[..., h + 1] + bonuses[..., h + 1])
    weighted = (weights * (target - later))[..., None] * phi
    mean = np.take_along_axis(weighted, second[..., None, None], axis=1).mean(axis=1)
    return (inverse @ mean[..., None])[..., 0]
