"""The compiled loops: weights on the simplex, occupancies, small covariances, bonuses; all over a leading batch axis.

Matrices here are a few rows wide and there are thousands of episodes, so that the overhead of array calls would be most
of the time. Everything lives in one file because Numba's cache does not notice that a function called from another file
has changed; `no_type_check` keeps run-time shape checkers from wrapping a function before it is compiled. Axes: r runs,
h layers, s states, a actions, i and j features; b stands for any batch of layers, n for pairs (s, a).
"""

from typing import no_type_check

import numpy as np
from numba import njit

REORDER = {"reassoc", "contract"}  # sums may be vectorised; NaN and infinity keep their meaning


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def log_barrier_weights(z):
    """Rows of z (b, A) -> p_a = 1 / (z_a - min z + nu) with nu in [1, A] such that p sums to 1.

    The sum is convex and decreasing in nu and at least 1 at nu = 1: Newton from there climbs to the root and never
    oversteps it.
    """
    p = np.empty_like(z)
    for b in range(z.shape[0]):
        lowest = z[b].min()
        nu = 1.0
        for _ in range(100):
            excess, slope = -1.0, 0.0
            for a in range(z.shape[1]):
                w = 1.0 / (z[b, a] - lowest + nu)
                excess += w
                slope += w * w
            step = excess / slope
            nu += step
            if step <= 1e-15 * nu:
                break
        total = 0.0
        for a in range(z.shape[1]):
            p[b, a] = 1.0 / (z[b, a] - lowest + nu)
            total += p[b, a]
        for a in range(z.shape[1]):
            p[b, a] /= total
    return p


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def exponential_weights(z):
    """Rows of z (b, A) -> p_a proportional to exp(-z_a)."""
    p = np.empty_like(z)
    for b in range(z.shape[0]):
        lowest = z[b].min()
        total = 0.0
        for a in range(z.shape[1]):
            p[b, a] = np.exp(lowest - z[b, a])
            total += p[b, a]
        for a in range(z.shape[1]):
            p[b, a] /= total
    return p


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def occupancies(P, policy, start):
    """Probability of (s, a) in each layer: (r, h, s, a, s'), (r, h, s, a), (r, s) -> (r, h, s, a)."""
    R, H, S, A = policy.shape
    out = np.empty_like(policy)
    for r in range(R):
        here = start[r].copy()
        for h in range(H):
            following = np.zeros(S)
            for s in range(S):
                for a in range(A):
                    w = here[s] * policy[r, h, s, a]
                    out[r, h, s, a] = w
                    if h + 1 < H and w > 0:
                        for t in range(S):
                            following[t] += w * P[r, h, s, a, t]
            here = following
    return out


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def second_moments(phi, weights):
    """sum_n w_n phi_n phi_n^T: (b, n, i), (b, n) -> (b, i, j)."""
    B, N, d = phi.shape
    out = np.zeros((B, d, d))
    for b in range(B):
        for n in range(N):
            w = weights[b, n]
            if w != 0:
                for i in range(d):
                    x = w * phi[b, n, i]
                    for j in range(d):
                        out[b, i, j] += x * phi[b, n, j]
    return out


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def inverses(matrices, ridge):
    """(M + ridge I)^(-1) of symmetric positive definite matrices (b, i, j) by Gauss-Jordan steps in place.

    Positive definite matrices need no pivoting, and at d = 5 this is ten times as fast as a call to LAPACK.
    """
    out = matrices.copy()
    B, d, _ = out.shape
    for b in range(B):
        X = out[b]
        for i in range(d):
            X[i, i] += ridge[b]
        for k in range(d):
            pivot = 1.0 / X[k, k]
            for j in range(d):
                if j != k:
                    X[k, j] *= pivot
            for i in range(d):
                if i != k:
                    factor = X[i, k]
                    for j in range(d):
                        if j != k:
                            X[i, j] -= factor * X[k, j]
                    X[i, k] = -factor * pivot
            X[k, k] = pivot
        for i in range(d):
            for j in range(i):
                X[i, j] = X[j, i] = 0.5 * (X[i, j] + X[j, i])
    return out


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def linear_forms(phi, M, v):
    """phi_n^T M v: (b, n, i), (b, i, j), (b, j) -> (b, n)."""
    B, N, d = phi.shape
    out = np.empty((B, N))
    u = np.empty(d)
    for b in range(B):
        for i in range(d):
            total = 0.0
            for j in range(d):
                total += M[b, i, j] * v[b, j]
            u[i] = total
        for n in range(N):
            total = 0.0
            for i in range(d):
                total += phi[b, n, i] * u[i]
            out[b, n] = total
    return out


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def quadratic_forms(phi, M):
    """phi_n^T M phi_n: (b, n, i), (b, i, j) -> (b, n)."""
    B, N, d = phi.shape
    out = np.empty((B, N))
    for b in range(B):
        for n in range(N):
            total = 0.0
            for i in range(d):
                inner = 0.0
                for j in range(d):
                    inner += M[b, i, j] * phi[b, n, j]
                total += phi[b, n, i] * inner
            out[b, n] = total
    return out


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def negative_means(phi, M, weights):
    """sum_n' w_n' min(phi_n^T M phi_n', 0): (b, n, i), (b, i, j), (b, n) -> (b, n)."""
    B, N, d = phi.shape
    out = np.zeros((B, N))
    u = np.empty(d)
    for b in range(B):
        for other in range(N):
            w = weights[b, other]
            if w == 0:
                continue
            for i in range(d):
                total = 0.0
                for j in range(d):
                    total += M[b, i, j] * phi[b, other, j]
                u[i] = total
            for n in range(N):
                inner = 0.0
                for i in range(d):
                    inner += u[i] * phi[b, n, i]
                out[b, n] += w * min(inner, 0.0)
    return out


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def local_bonuses(norms, policy, beta):
    """beta (|phi(x, a)|^2 + sum_a' pi(a'|x) |phi(x, a')|^2): (r, h, s, a), (r, h, s, a), (r,) -> (r, h, s, a)."""
    R, H, S, A = norms.shape
    out = np.empty_like(norms)
    for r in range(R):
        for h in range(H):
            for s in range(S):
                mean = 0.0
                for a in range(A):
                    mean += policy[r, h, s, a] * norms[r, h, s, a]
                for a in range(A):
                    out[r, h, s, a] = beta[r] * (norms[r, h, s, a] + mean)
    return out


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def dilate(P, policy, bonus, factor):
    """B = b + factor E[B(x', a')], with x' ~ P, a' ~ pi and nothing after the last layer; axes as in `occupancies`."""
    R, H, S, A = bonus.shape
    out = bonus.copy()
    for r in range(R):
        following = np.zeros(S)
        for h in range(H - 1, -1, -1):
            for s in range(S):
                for a in range(A):
                    if h + 1 < H:
                        mean = 0.0
                        for t in range(S):
                            mean += P[r, h, s, a, t] * following[t]
                        out[r, h, s, a] += factor * mean
            for s in range(S):
                mean = 0.0
                for a in range(A):
                    mean += policy[r, h, s, a] * out[r, h, s, a]
                following[s] = mean
    return out


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def pick(p, u):
    """The first outcome whose distribution function exceeds u, among those with positive probability."""
    total, last = 0.0, 0
    for i in range(p.size):
        if p[i] > 0:
            total += p[i]
            last = i
            if u < total:
                return i
    return last


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def sampled_dilation(P, policy, bonus, factor, u):
    """One random path per (x, a) in place of the expectation in `dilate`; u (r, h, s, a, 2) are uniform numbers."""
    R, H, S, A = bonus.shape
    out = bonus.copy()
    for r in range(R):
        for h in range(H - 2, -1, -1):
            for s in range(S):
                for a in range(A):
                    t = pick(P[r, h, s, a], u[r, h, s, a, 0])
                    c = pick(policy[r, h + 1, t], u[r, h, s, a, 1])
                    out[r, h, s, a] += factor * out[r, h + 1, t, c]
    return out


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def rollouts(P, policy, start, u, states, actions):
    """One episode a run from uniform numbers u (r, h, 2): writes the states and actions (r, h)."""
    R, H = states.shape
    for r in range(R):
        s = pick(start[r], u[r, H, 0])
        for h in range(H):
            a = pick(policy[r, h, s], u[r, h, 0])
            states[r, h] = s
            actions[r, h] = a
            s = pick(P[r, h, s, a], u[r, h, 1])


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def optimistic_values(phi, inverse, targets, reward, width, ceiling):
    """Least-squares value iteration with a bonus; returns its greedy actions (r, h, s).

    Q_h = min(ceiling, phi w_h + width |phi|_(inverse)), w_h = inverse (reward_h + targets_h V_(h+1)), where
    targets (r, h, i, s') sums phi_tau over the visits that led to s', and reward (r, h, i) sums phi_tau r_tau.
    """
    R, H, S, A, d = phi.shape
    greedy = np.empty((R, H, S), np.int64)
    w, b = np.empty(d), np.empty(d)
    for r in range(R):
        following = np.zeros(S)
        for h in range(H - 1, -1, -1):
            for i in range(d):
                b[i] = reward[r, h, i]
                for t in range(S):
                    b[i] += targets[r, h, i, t] * following[t]
            for i in range(d):
                w[i] = 0.0
                for j in range(d):
                    w[i] += inverse[r, h, i, j] * b[j]
            here = np.empty(S)
            for s in range(S):
                best = -np.inf
                for a in range(A):
                    mean, norm = 0.0, 0.0
                    for i in range(d):
                        mean += phi[r, h, s, a, i] * w[i]
                        inner = 0.0
                        for j in range(d):
                            inner += inverse[r, h, i, j] * phi[r, h, s, a, j]
                        norm += phi[r, h, s, a, i] * inner
                    q = min(ceiling, mean + width * np.sqrt(max(norm, 0.0)))
                    if q > best:
                        best = q
                        greedy[r, h, s] = a
                here[s] = best
            following = here
    return greedy


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def expected_losses(phi, occupancy, theta):
    """Sum over h, s, a of occupancy phi . theta: (r, h, s, a, i), (r, h, s, a), (r, h, i) -> (r,)."""
    R, H, S, A, d = phi.shape
    out = np.zeros(R)
    for r in range(R):
        for h in range(H):
            for s in range(S):
                for a in range(A):
                    w = occupancy[r, h, s, a]
                    if w > 0:
                        inner = 0.0
                        for i in range(d):
                            inner += phi[r, h, s, a, i] * theta[r, h, i]
                        out[r] += w * inner
    return out


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def follow(phi, inverses, visited, to_go, samples, later, cumulative, eta, beta, bound, barrier):
    """FTRL at one state through k past episodes: adds Q^ - B to `cumulative`, returns the policies and B (k, a).

    phi (a, i); inverses S+ (k, i, j); visited S+ phi_k (k, i); to_go L_k (k,); samples (k, m, i) of the shift, none for
    the standard estimate; later (k, a): the part of B that comes from the layers after.
    """
    k, A = later.shape
    d, M = phi.shape[1], samples.shape[1]
    policies, bonuses = np.empty((k, A)), np.empty((k, A))
    z, norms, image = np.empty((1, A)), np.empty(A), np.empty(d)
    for e in range(k):
        for a in range(A):
            z[0, a] = eta * cumulative[a]
        p = log_barrier_weights(z) if barrier else exponential_weights(z)
        mean = 0.0
        for a in range(A):
            estimate, norms[a] = 0.0, 0.0
            for i in range(d):
                image[i] = 0.0
                for j in range(d):
                    image[i] += inverses[e, i, j] * phi[a, j]
                norms[a] += phi[a, i] * image[i]
                estimate += phi[a, i] * visited[e, i]
            mean += p[0, a] * norms[a]
            policies[e, a] = p[0, a]
            cumulative[a] += estimate * to_go[e]
            if M > 0:
                shift = 0.0
                for m in range(M):
                    inner = 0.0
                    for i in range(d):
                        inner += image[i] * samples[e, m, i]
                    shift += min(inner, 0.0)
                cumulative[a] += bound * (shift / M - min(estimate, 0.0))
        for a in range(A):
            bonuses[e, a] = beta * (norms[a] + mean) + later[e, a]
            cumulative[a] -= bonuses[e, a]
    return policies, bonuses
