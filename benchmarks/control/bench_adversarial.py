"""Episodes in batches and alone beside a plain NumPy loop of the same algorithm, what covariances cost, growth."""

from collections.abc import Callable

import numpy as np

from benchmarks.harness import Comparison, compare, growth, seconds
from locally.control.adversarial import (
    PolicyOptimizer,
    matrix_geometric_resampling,
    play_side_by_side,
    ridge_inverse,
    samples_for_resampling,
    samples_for_ridge_inverse,
)
from locally.control.environments import AdversarialMDP, random_adversarial_mdp

EPISODES = 400
TARGET = 15_000  # episodes a second on one core at H = 3, S = 4, A = 6, d = 5


def main() -> list[Comparison]:
    return [*episodes(), *throughput(), *inverses(), *growths()]


def episodes() -> list[Comparison]:
    mdp = random_adversarial_mdp(EPISODES, rng=0)
    ours, peer = ("PolicyOptimizer", lambda: ours_alone([mdp])), ("plain NumPy", lambda: plain_numpy(mdp))
    many = [random_adversarial_mdp(EPISODES, rng=seed) for seed in range(30)]

    def one_by_one() -> None:
        for process in many[:3]:
            plain_numpy(process)

    def side_by_side() -> None:
        ours_alone(many[:3])

    return [
        compare(f"{EPISODES} episodes of Algorithm 1, one run", ours, peer, rounds=5),
        compare(
            f"{EPISODES} episodes of Algorithm 1, three runs",
            ("PolicyOptimizer, runs side by side", side_by_side),
            ("plain NumPy, one run after the other", one_by_one),
            rounds=5,
        ),
    ]


def throughput() -> list[Comparison]:
    """Episodes a second over the target, for single runs and for batches of runs."""
    results = []
    for runs in (1, 3, 30):
        processes = [random_adversarial_mdp(EPISODES, rng=seed) for seed in range(runs)]
        for method in ("log_barrier", "magnitude_reduced"):
            ours_alone(processes, method)
            times = [seconds(lambda p=processes, m=method: ours_alone(p, m)) for _ in range(5)]
            rates = [runs * EPISODES / t / TARGET for t in times]
            detail = {"episodes_per_second": float(np.median(rates)) * TARGET}
            results.append(
                Comparison(
                    f"{method}, {runs} runs side by side",
                    "episodes a second",
                    float(np.median(rates)),
                    min(rates),
                    max(rates),
                    "PolicyOptimizer",
                    f"target of {TARGET}",
                    detail,
                )
            )
    return results


def inverses() -> list[Comparison]:
    """An inverse covariance as each analysis asks for it: calls of the simulator, and seconds."""
    rng = np.random.default_rng(0)
    phi = rng.dirichlet(np.full(5, 0.35), 24)
    results = []
    for gamma in (0.3, 0.1):
        n, (M, N) = samples_for_ridge_inverse(gamma, 5), samples_for_resampling(gamma)
        drawn = phi[rng.integers(24, size=(M, N))]

        def ridge(n: int = n, gamma: float = gamma) -> None:
            sample = phi[rng.integers(24, size=n)]
            ridge_inverse(sample.T @ sample / n, gamma)

        ours, peer = (
            ("ridge inverse", ridge),
            ("resampling", lambda d=drawn, g=gamma: matrix_geometric_resampling(d, g)),
        )
        results.append(compare(f"inverse covariance, gamma = {gamma}", ours, peer, rounds=3))
        ratio = n / (M * N)
        results.append(
            Comparison(f"inverse covariance, gamma = {gamma}", "simulator calls", ratio, ratio, ratio, ours[0], peer[0])
        )
    return results


def growths() -> list[Comparison]:
    def with_states(S: int) -> Callable[[], object]:
        processes = [random_adversarial_mdp(50, rng=0, n_states=S)]
        return lambda: ours_alone(processes)

    def with_actions(A: int) -> Callable[[], object]:
        processes = [random_adversarial_mdp(50, rng=0, n_actions=A)]
        return lambda: ours_alone(processes)

    def shifted(S: int) -> Callable[[], object]:
        processes = [random_adversarial_mdp(50, rng=0, n_states=S)]
        return lambda: ours_alone(processes, "magnitude_reduced")

    name = "PolicyOptimizer"
    return [
        growth("50 episodes of Algorithm 1 over states", name, [16, 64, 256], with_states),
        growth("50 episodes of Algorithm 1 over actions", name, [16, 64, 256], with_actions),
        growth("50 episodes of Algorithm 2 over states, exact shift", name, [16, 64, 256], shifted),
    ]


def ours_alone(processes: list[AdversarialMDP], method: str = "log_barrier") -> np.ndarray:
    K = processes[0].n_episodes
    learner = PolicyOptimizer(
        np.stack([p.features for p in processes]),
        np.stack([p.P for p in processes]),
        n_episodes=K,
        method=method,  # type: ignore[arg-type]
        eta_scale=48.0,
        beta_scale=5e-4,
        gamma=4 / K,
        rng=0,
    )
    return play_side_by_side(learner, processes, rng=0).final


def plain_numpy(mdp: AdversarialMDP) -> float:
    """Algorithm 1 with exact covariances and bonuses, as one writes it down in NumPy."""
    H, S, A, d = mdp.features.shape
    K, phi, P = mdp.n_episodes, mdp.features, mdp.P
    eta = 16 * np.sqrt(A * np.log(K) / (d * K)) / H
    beta, gamma = 5e-4 * 4 * eta * H**2, 4 / K
    C = np.zeros((H, S, A))
    rng = np.random.default_rng(0)
    values = np.empty(K)
    for k in range(K):
        z = eta * C - (eta * C).min(axis=-1, keepdims=True)
        nu = np.ones((H, S, 1))
        for _ in range(12):
            w = 1 / (z + nu)
            nu = nu + (w.sum(axis=-1, keepdims=True) - 1) / (w**2).sum(axis=-1, keepdims=True)
        pi = 1 / (z + nu)
        pi /= pi.sum(axis=-1, keepdims=True)
        occupancy = np.empty((H, S, A))
        here = mdp.start
        for h in range(H):
            occupancy[h] = here[:, None] * pi[h]
            here = np.einsum("sa,sat->t", occupancy[h], P[h])
        losses = phi @ mdp.thetas[k][:, None, :, None]
        values[k] = (occupancy * losses[..., 0]).sum()
        s, steps = rng.choice(S, p=mdp.start), []
        for h in range(H):
            a = rng.choice(A, p=pi[h, s])
            steps.append((s, a, float(rng.random() < losses[h, s, a, 0])))
            s = rng.choice(S, p=P[h, s, a])
        inverse = np.linalg.inv(np.einsum("hsa,hsai,hsaj->hij", occupancy, phi, phi) + gamma * np.eye(d))
        norms = np.einsum("hsai,hij,hsaj->hsa", phi, inverse, phi)
        B = beta * (norms + (pi * norms).sum(axis=-1, keepdims=True))
        for h in reversed(range(H - 1)):
            B[h] += (1 + 1 / H) * P[h] @ (pi[h + 1] * B[h + 1]).sum(axis=-1)
        to_go = 0.0
        for h in reversed(range(H)):
            s, a, loss = steps[h]
            to_go += loss
            C[h] += phi[h] @ (inverse[h] @ phi[h, s, a]) * to_go
        C -= B
    return float(values.sum() - mdp.comparator().sum())


if __name__ == "__main__":
    for line in main():
        print(line)
