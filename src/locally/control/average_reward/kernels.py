"""The compiled loops: sweeps of value iteration, learning from one step, following a policy until it is due to change.

Every `follow_...` draws as `Walk.step` does (next state, then reward) and learns by the function that `add` calls too,
so that a run in one piece and a run step by step agree bit for bit. They live in one file because Numba's cache does
not notice that a function called from another file has changed.
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
@no_type_check
def sweeps(P, c, span, ceiling, V, count, damping):
    """V <- V + damping (T V - V - min), T V = min(max_a W, min + span), W = min(c + P V, ceiling + max V).

    Returns the middle and the width of T V - V before the last update: gain, and how far V is from a fixed point.
    """
    S, A = c.shape
    top = np.empty(S)
    gain, width = 0.0, np.inf
    for _ in range(count):
        bound = ceiling + V.max()
        for s in range(S):
            best = -np.inf
            for a in range(A):
                q = c[s, a]
                for k in range(S):
                    q += P[s, a, k] * V[k]
                best = max(best, q)
            top[s] = min(best, bound)
        limit = top.min() + span
        low, high = np.inf, -np.inf
        for s in range(S):
            top[s] = min(top[s], limit)
            low, high = min(low, top[s] - V[s]), max(high, top[s] - V[s])
        gain, width = (high + low) / 2, high - low
        for s in range(S):
            V[s] += damping * (top[s] - V[s])
        floor = V.min()
        for s in range(S):
            V[s] -= floor
    return gain, width


@njit(cache=True, nogil=True)
@no_type_check
def eliminate(M, x):
    """Solve M x = b in place by Gauss with partial pivoting; False if M is singular to rounding."""
    n = x.size
    largest = np.abs(M).max()
    for k in range(n):
        p = k + np.argmax(np.abs(M[k:, k]))
        if not abs(M[p, k]) > 1e-14 * largest:
            return False
        if p != k:
            for j in range(k, n):
                M[k, j], M[p, j] = M[p, j], M[k, j]
            x[k], x[p] = x[p], x[k]
        for i in range(k + 1, n):
            factor = M[i, k] / M[k, k]
            if factor != 0:
                for j in range(k + 1, n):
                    M[i, j] -= factor * M[k, j]
                x[i] -= factor * x[k]
    for k in range(n - 1, -1, -1):
        for j in range(k + 1, n):
            x[k] -= M[k, j] * x[j]
        x[k] /= M[k, k]
    return True


@njit(cache=True, nogil=True)
@no_type_check
def active_system(P, c, span, ceiling, V):
    """The equation with the maxima and minima that V picks: M (V, J) = right, linear; who acts, and where c enters."""
    S, A = c.shape
    bound = ceiling + V.max()
    action, value, capped = np.zeros(S, np.int64), np.empty(S), np.zeros(S, np.bool_)
    for s in range(S):
        best = -np.inf
        for a in range(A):
            q = c[s, a]
            for k in range(S):
                q += P[s, a, k] * V[k]
            if min(q, bound) > best:
                best, action[s], capped[s] = min(q, bound), a, q > bound
        value[s] = best
    lowest, highest = value.argmin(), V.argmax()
    M, right, free = np.zeros((S + 1, S + 1)), np.zeros(S + 1), np.zeros(S, np.bool_)
    for s in range(S):
        M[s, s] = 1
        if value[s] > value[lowest] + span:
            right[s] = span
            continue
        M[s, S] = 1
        if capped[s]:
            M[s, highest] -= 1
            right[s] = ceiling
        else:
            free[s] = True
            right[s] = c[s, action[s]]
            for k in range(S):
                M[s, k] -= P[s, action[s], k]
    M[S, lowest] = 1
    return M, right, action, free


@njit(cache=True, nogil=True)
@no_type_check
def solve_equation(P, c, span, ceiling, V, tol, damping, rounds, count):
    """Sweeps with a Newton step after every `count`, kept where it helps; leaves the best V and returns its width."""
    best, best_width = V.copy(), np.inf
    for _ in range(rounds):
        _, width = sweeps(P, c, span, ceiling, V, count, damping)
        if width < best_width:
            best[:], best_width = V, width
        if width < tol:
            break
        M, x, _, _ = active_system(P, c, span, ceiling, V)
        if eliminate(M, x):
            newton = np.minimum(x[:-1] - x[:-1].min(), span)
            trial = newton.copy()
            _, width_there = sweeps(P, c, span, ceiling, trial, 1, damping)
            if width_there < width:  # which NaN is not
                V[:] = newton
    V[:] = best
    trial = best.copy()
    return sweeps(P, c, span, ceiling, trial, 1, damping)


@njit(cache=True, nogil=True)
@no_type_check
def extended_sweeps(P, radius, r, V, damping, width, limit):
    """Sweeps where each (s, a) also picks its kernel within `radius` of P in L1, until the step is `width` wide.

    The most valuable state gets up to radius / 2 more, taken from the least valuable ones upward.
    """
    S, A = r.shape
    top = np.empty(S)
    policy = np.zeros(S, np.int64)
    p = np.empty(S)
    order = np.arange(S)
    gain = 0.0
    for _ in range(limit):
        for k in range(1, S):  # insertion: the order hardly changes from sweep to sweep
            moved, j = order[k], k
            while j > 0 and V[order[j - 1]] > V[moved]:
                order[j] = order[j - 1]
                j -= 1
            order[j] = moved
        last = order[S - 1]
        for s in range(S):
            top[s] = -np.inf
            for a in range(A):
                p[:] = P[s, a]
                p[last] = min(1.0, p[last] + radius[s, a] / 2)
                excess = p.sum() - 1
                for k in order:
                    if excess <= 0:
                        break
                    if k != last:
                        cut = min(excess, p[k])
                        p[k] -= cut
                        excess -= cut
                q = r[s, a]
                for k in range(S):
                    q += p[k] * V[k]
                if q > top[s] + 1e-12:
                    top[s], policy[s] = q, a
        low, high = (top - V).min(), (top - V).max()
        gain = (low + high) / 2
        V += damping * (top - V)
        V -= V.min()
        if high - low <= width:
            break
    return gain, policy


@njit(cache=True, nogil=True)
@no_type_check
def walk_step(cumulative, R, bernoulli, s, a, rng):
    u = rng.random()
    following = 0
    while u >= cumulative[s, a, following]:
        following += 1
    u = rng.random()
    mean = R[s, a]
    reward = (1.0 if u < mean else 0.0) if bernoulli else mean
    return following, reward


# Tables ---------------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
@no_type_check
def learn_table(s, a, r, following, visits, N, rewards, w, V, targets, lam, upsilon):
    """Upsilon = sum over cells of (n + lam) (w - targets / (n + lam))^2 changes in one cell."""
    n = visits[s, a] + lam
    gap = w[s, a] - targets[s, a] / n
    upsilon -= n * gap * gap
    visits[s, a] += 1
    N[s, a, following] += 1
    rewards[s, a] += r
    targets[s, a] += r + V[following]
    n += 1
    gap = w[s, a] - targets[s, a] / n
    return upsilon + n * gap * gap


@njit(cache=True, nogil=True)
@no_type_check
def follow_table(world, policy, s, rng, visits, N, rewards, w, V, targets, lam, upsilon, limit, out_s, out_a, out_r):
    cumulative, R, bernoulli = world
    t = 0
    while t < out_s.size:
        a = policy[s]
        following, r = walk_step(cumulative, R, bernoulli, s, a, rng)
        upsilon = learn_table(s, a, r, following, visits, N, rewards, w, V, targets, lam, upsilon)
        out_s[t], out_a[t], out_r[t] = s, a, r
        s = following
        t += 1
        if upsilon >= limit:
            break
    return t, s, upsilon


@njit(cache=True, nogil=True)
@no_type_check
def follow_counts(world, policy, s, rng, visits, N, rewards, before, length, out_s, out_a, out_r):
    """Until a count has doubled since `before`, or `length` steps."""
    cumulative, R, bernoulli = world
    t = 0
    while t < out_s.size and t < length:
        a = policy[s]
        following, r = walk_step(cumulative, R, bernoulli, s, a, rng)
        visits[s, a] += 1
        N[s, a, following] += 1
        rewards[s, a] += r
        out_s[t], out_a[t], out_r[t] = s, a, r
        t += 1
        done = visits[s, a] - before[s, a] >= max(1.0, before[s, a])
        s = following
        if done:
            break
    return t, s


# Linear features ------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
@no_type_check
def learn_linear(phi, r, following, V, w, gram, inverse, arrivals, sums, targets, gradient):
    """One more phi: Gram matrix, its inverse (Sherman-Morrison), gradient = gram w - targets.

    Returns Upsilon = gradient . inverse gradient and by how much log det gram grew.
    """
    d = phi.size
    y = r + V[following]
    error = -y
    for i in range(d):
        error += phi[i] * w[i]
    z = np.zeros(d)
    for i in range(d):
        arrivals[i, following] += phi[i]
        sums[i] += phi[i] * r
        targets[i] += phi[i] * y
        gradient[i] += phi[i] * error
        for j in range(d):
            gram[i, j] += phi[i] * phi[j]
            z[i] += inverse[i, j] * phi[j]
    scale = 1.0
    for i in range(d):
        scale += phi[i] * z[i]
    upsilon = 0.0
    for i in range(d):
        for j in range(d):
            inverse[i, j] -= z[i] * z[j] / scale
            upsilon += gradient[i] * inverse[i, j] * gradient[j]
    return upsilon, math.log(scale)


@njit(cache=True, nogil=True)
@no_type_check
def follow_linear(
    world, policy, s, rng, features, pay, V, w, gram, inverse, arrivals, sums, targets, gradient,
    upsilon, growth, limit, growth_limit, out_s, out_a, out_r,
):  # fmt: skip
    cumulative, R, bernoulli = world
    t = 0
    while t < out_s.size:
        a = policy[s]
        following, r = walk_step(cumulative, R, bernoulli, s, a, rng)
        upsilon, more = learn_linear(
            features[s, a], pay * r, following, V, w, gram, inverse, arrivals, sums, targets, gradient
        )
        growth += more
        out_s[t], out_a[t], out_r[t] = s, a, r
        s = following
        t += 1
        if upsilon >= limit or growth >= growth_limit:
            break
    return t, s, upsilon, growth


# Finite lists ---------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
@no_type_check
def learn_values(s, a, r, following, own, others, V, own_loss, other_loss, current):
    """Squared discrepancies of each hypothesis with itself and with each auxiliary one; Upsilon of the current."""
    m, k = other_loss.shape
    for f in range(m):
        y = r + V[f, following]
        own_loss[f] += (own[f, s, a] - y) ** 2
        for g in range(k):
            other_loss[f, g] += (others[f, g, s, a] - y) ** 2
    return own_loss[current] - min(own_loss[current], other_loss[current].min())


@njit(cache=True, nogil=True)
@no_type_check
def follow_values(
    world, policy, s, rng, own, others, V, own_loss, other_loss, current, upsilon, limit, out_s, out_a, out_r
):
    cumulative, R, bernoulli = world
    t = 0
    while t < out_s.size:
        a = policy[s]
        following, r = walk_step(cumulative, R, bernoulli, s, a, rng)
        upsilon = learn_values(s, a, r, following, own, others, V, own_loss, other_loss, current)
        out_s[t], out_a[t], out_r[t] = s, a, r
        s = following
        t += 1
        if upsilon >= limit:
            break
    return t, s, upsilon


@njit(cache=True, nogil=True)
@no_type_check
def learn_models(s, a, r, following, log_P, log_R, log_not_R, likelihoods, visits, distances, sums):
    """Log-likelihoods of all models, distances of all from the current one; returns that of the likeliest."""
    best = 0
    visits[s, a] += 1
    for g in range(likelihoods.size):
        gained = log_P[g, s, a, following]
        if r > 0:  # 0 * log 0 = 0
            gained += r * log_R[g, s, a]
        if r < 1:
            gained += (1 - r) * log_not_R[g, s, a]
        likelihoods[g] += gained
        sums[g] += distances[g, s, a]
        if likelihoods[g] > likelihoods[best]:
            best = g
    return sums[best]


@njit(cache=True, nogil=True)
@no_type_check
def follow_models(
    world, policy, s, rng, log_P, log_R, log_not_R, likelihoods, visits, distances, sums, distance, beta, n_seen,
    out_s, out_a, out_r,
):  # fmt: skip
    cumulative, R, bernoulli = world
    t = 0
    while t < out_s.size:
        a = policy[s]
        following, r = walk_step(cumulative, R, bernoulli, s, a, rng)
        distance = learn_models(s, a, r, following, log_P, log_R, log_not_R, likelihoods, visits, distances, sums)
        out_s[t], out_a[t], out_r[t] = s, a, r
        s = following
        t += 1
        if distance >= 3 * math.sqrt(beta * (n_seen + t)):
            break
    return t, s, distance


# Q-learning -----------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
@no_type_check
def learn_optimistic(s, a, r, following, visits, Q, Q_low, V, horizon, bonus):
    """Wei et al. (2020), Algorithm 2: learning rate (H + 1) / (H + n), bonus / sqrt(n), values only go down."""
    visits[s, a] += 1
    n = visits[s, a]
    rate = (horizon + 1) / (horizon + n)
    target = r + (1 - 1 / horizon) * V[following] + bonus / math.sqrt(n)
    Q[s, a] += rate * (target - Q[s, a])
    Q_low[s, a] = min(Q_low[s, a], Q[s, a])
    V[s] = Q_low[s].max()


@njit(cache=True, nogil=True)
@no_type_check
def follow_optimistic(world, s, rng, visits, Q, Q_low, V, horizon, bonus, out_s, out_a, out_r):
    cumulative, R, bernoulli = world
    for t in range(out_s.size):
        a = np.argmax(Q_low[s])
        following, r = walk_step(cumulative, R, bernoulli, s, a, rng)
        learn_optimistic(s, a, r, following, visits, Q, Q_low, V, horizon, bonus)
        out_s[t], out_a[t], out_r[t] = s, a, r
        s = following
    return s


@njit(cache=True, nogil=True)
@no_type_check
def choose_epsilon_greedy(q, epsilon, rng):
    u = rng.random()
    return int(u / epsilon * q.size) if u < epsilon else np.argmax(q)


@njit(cache=True, nogil=True)
@no_type_check
def learn_differential(s, a, r, following, Q, gain, step_size, eta):
    """Wan, Naik & Sutton (2021): one temporal difference moves the value and the estimated gain."""
    error = r - gain + Q[following].max() - Q[s, a]
    Q[s, a] += step_size * error
    return gain + eta * step_size * error


@njit(cache=True, nogil=True)
@no_type_check
def follow_differential(world, s, rng, chooser, Q, gain, step_size, eta, epsilon, out_s, out_a, out_r):
    cumulative, R, bernoulli = world
    for t in range(out_s.size):
        a = choose_epsilon_greedy(Q[s], epsilon, chooser)
        following, r = walk_step(cumulative, R, bernoulli, s, a, rng)
        gain = learn_differential(s, a, r, following, Q, gain, step_size, eta)
        out_s[t], out_a[t], out_r[t] = s, a, r
        s = following
    return s, gain
