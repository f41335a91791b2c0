"""Regret and seconds of LOOP beside other agents, compiled stretches beside single steps, growth with the river."""

from collections.abc import Callable

import numpy as np

from benchmarks.harness import Comparison, compare, growth
from locally.control.average_reward import LOOP, PSRL, UCRL2, TabularValue, optimistic_plan, run_continuing
from locally.control.dynamic_programming import solve_average_reward
from locally.control.environments import ContinuingMDP, garnet, riverswim, worlds

STEPS = 100_000
SEEDS = range(5)


def main() -> list[Comparison]:
    return [*against_agents(), *stretches(), *solvers(), *growths()]


def loop(mdp: ContinuingMDP, seed: int = 0) -> LOOP:
    tables = TabularValue(mdp.n_states, mdp.n_actions)
    return LOOP(tables, horizon=STEPS, span=mdp.solve().span, rng=seed)


def against_agents() -> list[Comparison]:
    """Expected regret after 100000 steps and the time of one run, on rivers of 6 and of 20 states."""
    results = []
    for n in (6, 20):
        mdp = riverswim(n)
        peers: dict[str, Callable[[int], UCRL2 | PSRL]] = {
            "UCRL2": lambda seed, n=n: UCRL2(n, 2),  # type: ignore[misc]
            "PSRL": lambda seed, n=n: PSRL(n, 2, rng=seed),  # type: ignore[misc]
        }
        ours = [run_continuing(mdp, loop(mdp, seed), STEPS, seed=seed, times=[STEPS]) for seed in SEEDS]
        for name, make in peers.items():
            theirs = [run_continuing(mdp, make(seed), STEPS, seed=seed, times=[STEPS]) for seed in SEEDS]
            ratios = [a.expected[-1] / b.expected[-1] for a, b in zip(ours, theirs, strict=True)]
            title = f"RiverSwim, {n} states, {STEPS} steps"
            median = float(np.median(ratios))
            results.append(Comparison(title, "expected regret", median, min(ratios), max(ratios), "LOOP", name))
            timed = compare(
                title,
                ("LOOP", lambda mdp=mdp: run_continuing(mdp, loop(mdp), STEPS, seed=0, times=[STEPS])),
                (name, lambda mdp=mdp, make=make: run_continuing(mdp, make(0), STEPS, seed=0, times=[STEPS])),
                rounds=3,
            )
            results.append(timed)
    return results


def stretches() -> list[Comparison]:
    mdp, steps = riverswim(), 20_000
    compiled = ("LOOP, compiled stretches", lambda: run_continuing(mdp, loop(mdp), steps, seed=0, times=[steps]))
    env = worlds.ContinuingWorld(mdp)
    stepped = ("LOOP, Gymnasium step by step", lambda: run_continuing(env, loop(mdp), steps, seed=0, times=[steps]))
    return [compare(f"RiverSwim, 6 states, {steps} steps", compiled, stepped, rounds=3)]


def solvers() -> list[Comparison]:
    """Exact gains by policy iteration beside SciPy's HiGHS on the occupancies' linear programme."""
    mdp = garnet(60, 4, rng=0)
    ours = ("policy iteration", lambda: solve_average_reward(mdp.P, mdp.R))
    peer = ("linear programme (SciPy HiGHS)", lambda: solve_average_reward(mdp.P, mdp.R, method="lp"))
    return [compare("Garnet, 60 states, 4 actions", ours, peer, rounds=5)]


def growths() -> list[Comparison]:
    def walk(steps: int) -> Callable[[], object]:
        mdp = riverswim()
        return lambda: run_continuing(mdp, loop(mdp), steps, seed=0, times=[steps])

    def plan(n: int) -> Callable[[], object]:
        mdp = riverswim(n)
        visits = np.random.default_rng(0).integers(1, 1000, mdp.R.shape).astype(float)
        return lambda: optimistic_plan(mdp.P, mdp.R, 1 / visits, 4.0, span=7.0, ceiling=1.0, n_starts=1)

    return [
        growth("one run over its steps", "LOOP on RiverSwim, 6 states", [10**5, 10**6, 10**7], walk),
        growth("one plan over states", "optimistic_plan, one start", [10, 20, 40, 80], plan),
    ]


if __name__ == "__main__":
    for line in main():
        print(line)
