"""The heat workload beside SciPy's conjugate gradients and fixed omegas, what a learner's round costs, growth in n."""

from collections.abc import Callable

import numpy as np

from benchmarks.harness import Comparison, compare, growth, seconds
from locally.papers.learning_to_relax import OMEGAS, HeatEquation, heat_run, scipy_heat_run
from locally.solvers.omega_bandit import (
    BinnedTsallisINF,
    ChebCB,
    ParameterBandit,
    SSORConjugateGradients,
    TsallisINF,
)

STEPS = 1000
BOUNDS = (0.0, 10.0)
LEARNERS: dict[str, Callable[[], ParameterBandit]] = {
    "Tsallis-INF": lambda: TsallisINF(OMEGAS, rng=0),
    "Tsallis-INF, reduced variance": lambda: TsallisINF(OMEGAS, estimator="rv", rng=0),
    "Tsallis-INF, binned": lambda: BinnedTsallisINF(OMEGAS, BOUNDS, rng=0),
    "ChebCB": lambda: ChebCB(OMEGAS, BOUNDS, rng=0),
}


def main() -> list[Comparison]:
    return [*heat_workload(), *rounds(), *growths()]


def heat_workload() -> list[Comparison]:
    learnt = ("SSOR-CG, omega by ChebCB", lambda: heat_run(25, STEPS, LEARNERS["ChebCB"]()))
    peers = {
        "SciPy cg": lambda: scipy_heat_run(25, STEPS, omega=None),
        "SciPy cg with SSOR, omega = 1": lambda: scipy_heat_run(25, STEPS, omega=1.0),
        "SciPy cg with SSOR, omega = 1.4 (best fixed)": lambda: scipy_heat_run(25, STEPS, omega=1.4),
        "our SSOR-CG, omega = 1.4 (best fixed)": lambda: heat_run(25, STEPS, TsallisINF([1.4])),
    }
    results = []
    for name, peer in peers.items():
        results.append(compare(f"heat, 25 x 25, {STEPS} steps", learnt, (name, peer), rounds=5))
        ratio = learnt[1]().iterations.sum() / peer().iterations.sum()
        results.append(Comparison(f"heat, 25 x 25, {STEPS} steps", "iterations", ratio, ratio, ratio, learnt[0], name))
    return results


def rounds() -> list[Comparison]:
    """Microseconds of one ask and tell, after 5000 rounds on 20 omegas, beside the budget of 50."""
    results = []
    for name, make in LEARNERS.items():
        bandit, rng = make(), np.random.default_rng(0)

        def play(bandit: ParameterBandit = bandit, rng: np.random.Generator = rng) -> None:
            for context in rng.uniform(*BOUNDS, 1000).tolist():
                choice = bandit.ask(context)
                bandit.tell(20 + 400 * (choice.value - 1.1 - 0.07 * context) ** 2, choice)

        for _ in range(5):
            play()
        times = [1e3 * seconds(play) for _ in range(7)]  # 1000 rounds: milliseconds in all are microseconds each
        ratios = [t / 50 for t in times]
        median, detail = float(np.median(ratios)), {"microseconds": float(np.median(times))}
        budget = "budget of 50 microseconds"
        results.append(Comparison("ask and tell", "time", median, min(ratios), max(ratios), name, budget, detail))
    return results


def growths() -> list[Comparison]:
    def iteration(n: int) -> Callable[[], object]:
        heat = HeatEquation(round(n**0.5) + 1)
        heat.step = 750  # strong diffusion
        A, b = heat.system()
        solver = SSORConjugateGradients(rtol=1e-14, max_iter=20)
        return lambda: solver.solve(A, b, omega=1.4)

    def history(n: int) -> Callable[[], object]:
        bandit = LEARNERS["ChebCB"]()
        for t in range(n):
            choice = bandit.ask(10 * (t % 97) / 97)
            bandit.tell(20 + choice.arm, choice)

        def play() -> None:
            for t in range(500):
                choice = bandit.ask(10 * (t % 97) / 97)
                bandit.tell(20 + choice.arm, choice)

        return play

    unknowns, played = [24**2, 49**2, 99**2, 199**2], [500, 2000, 8000, 32000]
    return [
        growth("20 iterations of SSOR-CG over unknowns", "SSORConjugateGradients", unknowns, iteration),
        growth("500 rounds over rounds already played", "ChebCB", played, history),
    ]


if __name__ == "__main__":
    for line in main():
        print(line)
