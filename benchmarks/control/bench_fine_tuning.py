"""FTPedel beside optimistic exploration and uniform exploration, its episodes beside the fewest possible, its growth.

No maintained package does certified learning from a log and online episodes; the peers are the learners of this
project's own room that people would otherwise use, and SciPy's general solver for the design.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from benchmarks.harness import Comparison, compare, growth
from locally.control.environments import missing_arm, random_episodic_linear_mdp
from locally.control.fine_tuning import (
    FineTuningResult,
    FTPedel,
    OfflineDataset,
    deterministic_policies,
    features_of,
    play_episodes,
    reachable,
    softmax_cover,
    xy_design,
)
from locally.papers.ftpedel import MISSING, draw_log, visits

MDP = missing_arm()
POLICIES = deterministic_policies(reachable(MDP), MDP.n_actions)


def main() -> list[Comparison]:
    return [*episodes(), batches(), designs(), *growths()]


def learn(samples: int, **options: object) -> FineTuningResult:
    log = draw_log(MDP, visits(MISSING, samples), np.random.default_rng(0)) if samples else None
    arguments = {"epsilon": 0.1, "beta_scale": 0.125, "rng": 0} | options
    return FTPedel(features_of(MDP), POLICIES, log, **arguments).run(MDP)  # type: ignore[arg-type]


def episodes() -> list[Comparison]:
    """Online episodes until certified, over five seeds, at a log of 20,000 samples a cell."""
    results = []
    ours = [learn(20_000, rng=seed).n_episodes for seed in range(5)]
    peers = {
        "no log (Pedel)": [learn(0, rng=seed).n_episodes for seed in range(5)],
        "uniform exploration, same log": [learn(20_000, rng=seed, explorer="uniform").n_episodes for seed in range(5)],
        "the same with known dynamics": [
            learn(20_000, rng=seed, explorer="exact", dynamics=MDP.P).n_episodes for seed in range(5)
        ],
    }
    for name, theirs in peers.items():
        ratios = [a / b for a, b in zip(ours, theirs)]
        detail = {"episodes_ours": ours, "episodes_peer": theirs}
        middle = float(np.median(ratios))
        results.append(
            Comparison(
                "missing arm, epsilon 0.1", "episodes", middle, min(ratios), max(ratios), "FTPedel", name, detail
            )
        )
    return results


def batches() -> Comparison:
    """Long batches late on (the default) beside twenty episodes each, which is how the method is usually stated."""
    few = ("batches of at least 2 %", lambda: learn(0, epsilon=0.2))
    many = ("batches of 20", lambda: learn(0, epsilon=0.2, batch_growth=0.0))
    detail = {"episodes_ours": few[1]().n_episodes, "episodes_peer": many[1]().n_episodes}
    return compare("Pedel, 256 policies, epsilon 0.2", few, many, rounds=5, **detail)


def designs() -> Comparison:
    """The XY design of 60 directions over 60 vertices in six dimensions, to a certified gap of 0.1 %."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((60, 6))
    points = directions[:, :, None] * directions[:, None, :]
    found = xy_design(directions, points)
    theirs = by_epigraph(directions, points)
    return compare(
        "XY design, 60 directions, d = 6",
        ("xy_design", lambda: xy_design(directions, points)),
        ("SciPy SLSQP on the epigraph", lambda: by_epigraph(directions, points)),
        rounds=3,
        value_ours=found.value,
        value_peer=theirs,
        optimum=6.0,
    )


def by_epigraph(directions: np.ndarray, points: np.ndarray) -> float:
    """min t subject to every width <= t, over the weights of the vertices."""
    n = len(points)

    def widths(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        Z = np.linalg.solve(np.tensordot(p, points, 1) + 1e-9 * np.eye(6), directions.T).T
        slopes = -np.einsum("vi,kij,vj->vk", Z, points, Z, optimize=True)
        return (Z * directions).sum(axis=1), slopes

    constraints = [
        {
            "type": "ineq",
            "fun": lambda x: x[-1] - widths(x[:-1])[0],
            "jac": lambda x: np.column_stack([-widths(x[:-1])[1], np.ones(n)]),
        },
        {"type": "eq", "fun": lambda x: x[:-1].sum() - 1, "jac": lambda x: np.append(np.ones(n), 0.0)},
    ]
    start = np.append(np.full(n, 1 / n), widths(np.full(n, 1 / n))[0].max())
    found = minimize(
        lambda x: x[-1],
        start,
        jac=lambda x: np.append(np.zeros(n), 1.0),
        method="SLSQP",
        bounds=[(0, 1)] * n + [(0, None)],
        constraints=constraints,
        options={"ftol": 1e-6, "maxiter": 200},
    )
    p = np.clip(found.x[:-1], 0, None)
    return float(widths(p / p.sum())[0].max())


def growths() -> list[Comparison]:
    def over_policies(n: int) -> Callable[[], object]:
        mdp = random_episodic_linear_mdp(5, 50, 10, 8, rng=0)
        policies = softmax_cover(features_of(mdp), n, rng=0)
        options = {"epsilon": 2.0, "beta_scale": 0.02, "max_episodes": 2000, "batch_size": 100}
        return lambda: FTPedel(features_of(mdp), policies, rng=0, **options).run(mdp)  # type: ignore[arg-type]

    def over_episodes(n: int) -> Callable[[], object]:
        policy = np.full(MDP.R.shape, 0.25)
        return lambda: [play_episodes(MDP, policy, n, np.random.default_rng(0)) for _ in range(200)]

    def over_rows(n: int) -> Callable[[], object]:
        log: OfflineDataset = draw_log(MDP, visits(MISSING, n // 11), np.random.default_rng(0))
        return lambda: FTPedel(features_of(MDP), POLICIES[:16], log, epsilon=0.4, rng=0)

    return [
        growth("20 batches over policies", "FTPedel", [250, 500, 1000, 2000], over_policies),
        growth("200 batches over episodes in a batch", "play_episodes", [100, 1000, 10_000, 100_000], over_episodes),
        growth("taking in a log over its rows", "FTPedel", [50_000, 200_000, 800_000], over_rows),
    ]


if __name__ == "__main__":
    for line in main():
        print(line)
