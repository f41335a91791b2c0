"""Regret under changing losses: three loss sequences on random linear processes, learners with and without a simulator.

Every learner has one scale (of its learning rate; of its bonus for LSVI-UCB) on a grid of powers of 4. The scale is
chosen at few episodes, on processes that are used for nothing else, and kept for more episodes, where the rates follow
each method's theorem. The learners of the theorems also run at one scale for all, 16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.control.adversarial import (
    LSVIUCB,
    Exp3,
    Learner,
    LinearMDPOptimizer,
    PolicyOptimizer,
    covariance,
    entropy_stability,
    log_barrier_stability,
    matrix_geometric_resampling,
    play_side_by_side,
    ridge_inverse,
    sampled_covariances,
    samples_for_resampling,
    samples_for_ridge_inverse,
)
from locally.control.dynamic_programming import occupancy_measures
from locally.control.environments import AdversarialMDP, random_adversarial_mdp
from locally.evidence import Run
from locally.plots import canvas

SCHEDULES = ("stationary", "drifting", "decoy")
GRID = (4.0, 16.0, 64.0, 256.0, 1024.0)
COMMON, TUNED = "one scale for all", "scale tuned at few episodes"
BONUS = 5e-4  # of the theorems' weight of the bonus, which is far too large at these numbers of episodes
HEDGE = "dilated-bonus Hedge"
UNIFORM = "uniform policy"
SHARE = 0.7
WORST = "regret on the worst of the loss sequences"
EXCESS = "(total regret - 0.7 of dilated-bonus Hedge's) / the uniform policy's"


@dataclass(frozen=True)
class Study:
    """Sizes of one scale of the experiment; `sizes` are the process's, as for `random_adversarial_mdp`."""

    episodes: tuple[int, ...]
    tuning_episodes: int
    tuning_processes: int
    processes: int = 1  # a seed, for the three learners that are compared; one for the others
    sampled: bool = False  # covariances from simulator samples instead of exact ones
    together: int = 10  # seeds whose runs are played side by side
    sizes: dict[str, int] = field(default_factory=dict)
    cases: int = 20_000  # of the stability lemma


def experiment(run: Run) -> None:
    large = {"horizon": 5, "n_states": 50, "n_actions": 20, "dim": 10}
    carry_out(
        run,
        run.pick(
            quick=Study(episodes=(200, 800), tuning_episodes=100, tuning_processes=2),
            default=Study(episodes=(500, 2000, 8000), tuning_episodes=500, tuning_processes=12, processes=4),
            paper=Study((1000, 10_000, 100_000), 500, 12, sampled=True, together=1, sizes=large),
        ),
    )


def carry_out(run: Run, study: Study) -> None:
    groups = [run.seeds[i : i + study.together] for i in range(0, len(run.seeds), study.together)]
    tasks = [(name, group) for group in groups for name in CONTENDERS]
    work: list[Callable[[Run], Any]] = [partial(contend, task=task, study=study) for task in tasks]
    work += [partial(check_stability, cases=study.cases), compare_inverses]
    outcomes = run.parallel(do, work, "learners and lemmas")[: len(tasks)]
    regrets: dict[str, dict[tuple[str, int, int], ndarray]] = {name: {} for name in CONTENDERS}
    curves: dict[str, list[ndarray]] = {name: [] for name in CONTENDERS}
    for (name, _), (found, paths) in zip(tasks, outcomes):
        regrets[name] |= found
        curves[name].append(paths)
    regrets[UNIFORM] = uniform_regret(run.seeds, study)
    record_regrets(run, regrets, study)
    plot_growth(run, study)
    plot_curves(run, {name: np.concatenate(paths) for name, paths in curves.items()}, study)


def do(run: Run, work: Callable[[Run], Any]) -> Any:
    return work(run)


# Learners -------------------------------------------------------------------------------------------------------------

Make = Callable[[Sequence[AdversarialMDP], float, int, bool], Learner]


def simulator_learner(
    processes: Sequence[AdversarialMDP], scale: float, seed: int, sampled: bool, *, method: str, **options: object
) -> PolicyOptimizer:
    """Ridge 4 / K for Algorithms 1 and 2, K^(-1/3) / 2 for the earlier method, unless `options` say otherwise."""
    K = processes[0].n_episodes
    earlier = method == "dilated_hedge"
    defaults = {
        "eta_scale": scale if earlier else scale * processes[0].horizon,
        "beta_scale": BONUS,
        "gamma": None if earlier else 4 / K,
        "covariance": "sample" if sampled else "exact",
        "n_estimate_samples": 64 if sampled else None,
    }
    if sampled and not earlier:
        defaults["n_covariance_samples"] = int(np.ceil(10 * np.log(2 * processes[0].features.shape[-1] * K) * K / 4))
    features, P = np.stack([p.features for p in processes]), np.stack([p.P for p in processes])
    return PolicyOptimizer(features, P, n_episodes=K, method=method, rng=seed, **(defaults | options))  # type: ignore[arg-type]


def earlier_ridge(processes: Sequence[AdversarialMDP], scale: float, seed: int, sampled: bool) -> PolicyOptimizer:
    gamma = 0.5 * processes[0].n_episodes ** (-1 / 3)
    return simulator_learner(processes, scale, seed, sampled, method="log_barrier", gamma=gamma)


def small_ridge_hedge(processes: Sequence[AdversarialMDP], scale: float, seed: int, sampled: bool) -> PolicyOptimizer:
    """Algorithm 2 without the one thing that is new in it."""
    return simulator_learner(processes, scale, seed, sampled, method="magnitude_reduced", estimator="standard")


def no_simulator(processes: Sequence[AdversarialMDP], scale: float, seed: int, sampled: bool) -> LinearMDPOptimizer:
    K, (H, *_, d) = processes[0].n_episodes, processes[0].features.shape
    epoch = int(np.ceil(round(K ** (1 / 3), 9)))
    return LinearMDPOptimizer(
        np.stack([p.features for p in processes]),
        n_episodes=K,
        epoch=epoch,
        cover_episodes=max(50, int(np.ceil(0.02 * K))),
        explore=0.3 * min(0.5, K ** (-1 / 9)),
        known_up_to=12.0 * d,
        eta_scale=scale * H,
        beta_scale=BONUS,
        gamma=0.3 * d / epoch,
        rng=seed,
    )


def exp3(processes: Sequence[AdversarialMDP], scale: float, seed: int, sampled: bool) -> Exp3:
    p = processes[0]
    sizes = (p.horizon, p.n_states, p.n_actions)
    return Exp3(*sizes, n_episodes=p.n_episodes, n_runs=len(processes), eta_scale=scale)


def lsvi_ucb(processes: Sequence[AdversarialMDP], scale: float, seed: int, sampled: bool) -> LSVIUCB:
    features = np.stack([p.features for p in processes])
    return LSVIUCB(features, n_episodes=processes[0].n_episodes, bonus_scale=scale / 1000)


CONTENDERS: dict[str, Make] = {
    "log-barrier": partial(simulator_learner, method="log_barrier"),
    "magnitude-reduced": partial(simulator_learner, method="magnitude_reduced"),
    HEDGE: partial(simulator_learner, method="dilated_hedge"),
    "log-barrier, no simulator": no_simulator,
    "LSVI-UCB": lsvi_ucb,
    "EXP3 at every state": exp3,
    "Hedge without bonus": partial(simulator_learner, method="dilated_hedge", beta_scale=0.0),
    "Hedge, standard estimate, ridge 4 / K": small_ridge_hedge,
    "log-barrier, ridge K^(-1/3) / 2": earlier_ridge,
}
AT_COMMON_SCALE = ("log-barrier", "magnitude-reduced", HEDGE)
SHOWN = ("log-barrier", "magnitude-reduced", HEDGE, "log-barrier, no simulator", "LSVI-UCB", "EXP3 at every state")


# Regret ---------------------------------------------------------------------------------------------------------------


def draw_processes(seeds: Sequence[int], K: int, study: Study, each: int = 1) -> list[AdversarialMDP]:
    """Every loss sequence on `each` processes of every seed, whose transitions and features do not depend on K."""
    return [
        random_adversarial_mdp(K, schedule, rng=np.random.default_rng([seed, copy]), **study.sizes)
        for seed in seeds
        for copy in range(each)
        for schedule in SCHEDULES
    ]


def contend(
    run: Run, task: tuple[str, Sequence[int]], *, study: Study
) -> tuple[dict[tuple[str, int, int], ndarray], Float[ndarray, "seeds schedules K"]]:
    """Tune a learner and play it: its regrets (processes, schedules) by (protocol, K, seed), and curves."""
    name, seeds = task
    best = tune(CONTENDERS[name], study)
    run.record(name, "scale", best)
    scales = {TUNED: best} | ({COMMON: 16.0} if name in AT_COMMON_SCALE else {})
    each = study.processes if name in AT_COMMON_SCALE else 1
    regrets: dict[tuple[str, int, int], ndarray] = {}
    for scale in sorted(set(scales.values())):
        protocols = [protocol for protocol, its in scales.items() if its == scale]
        for K in study.episodes:
            processes = draw_processes(seeds, K, study, each)
            learner = CONTENDERS[name](processes, scale, seeds[0], study.sampled)
            played = play_side_by_side(learner, processes, rng=seeds[0] + 1)
            final = played.final.reshape(len(seeds), each, len(SCHEDULES))
            for protocol in protocols:
                regrets |= {(protocol, K, seed): regret for seed, regret in zip(seeds, final)}
                if isinstance(learner, PolicyOptimizer):
                    record_extremes(run, name, learner, seeds, protocol, K)
        if TUNED in protocols:
            paths = played.expected[:, :: max(1, K // 200)]
            curves = paths.reshape(len(seeds), each, len(SCHEDULES), -1).mean(axis=1)
    return regrets, curves


def tune(make: Make, study: Study) -> float:
    """The scale of least regret at few episodes, over all loss sequences, on processes of their own."""
    seeds = [10**6 + i for i in range(study.tuning_processes)]
    processes = draw_processes(seeds, study.tuning_episodes, study)
    totals = [
        play_side_by_side(make(processes, scale, 0, study.sampled), processes, rng=1).final.mean() for scale in GRID
    ]
    return GRID[int(np.argmin(totals))]


def record_extremes(run: Run, name: str, learner: PolicyOptimizer, seeds: Sequence[int], protocol: str, K: int) -> None:
    by_seed = learner.below_bound.reshape(len(seeds), -1).sum(axis=1)
    lowest = learner.lowest_scaled_estimate.reshape(len(seeds), -1).min(axis=1)
    for seed, below, least in zip(seeds, by_seed, lowest):
        run.record(name, "estimates below the bound", below, seed=seed, scales=protocol, episodes=K)
        run.record(name, "smallest eta times estimate", least, seed=seed, scales=protocol, episodes=K)


def uniform_regret(seeds: Sequence[int], study: Study) -> dict[tuple[str, int, int], ndarray]:
    regrets = {}
    for K in study.episodes:
        for seed in seeds:
            processes = draw_processes([seed], K, study, study.processes)
            policies = [np.full((1, p.horizon, p.n_states, p.n_actions), 1 / p.n_actions) for p in processes]
            losses = [K * (p.features * p.thetas.mean(axis=0)[:, None, None]) for p in processes]
            values = [
                (occupancies(p, policy)[0][..., None] * loss).sum()
                for p, policy, loss in zip(processes, policies, losses)
            ]
            best = [-K * p.best_fixed().value for p in processes]
            regrets[TUNED, K, seed] = np.subtract(values, best).reshape(study.processes, len(SCHEDULES))
    return regrets


def occupancies(process: AdversarialMDP, policy: Float[ndarray, "n H S A"]) -> Float[ndarray, "n H S A"]:
    return occupancy_measures(process.P, policy, process.start)


def record_regrets(run: Run, regrets: dict[str, dict[tuple[str, int, int], ndarray]], study: Study) -> None:
    for name, found in regrets.items():
        for (protocol, K, seed), values in found.items():
            setting: dict[str, str | int] = {"scales": protocol, "episodes": K}
            for schedule, regret in zip(SCHEDULES, values.mean(axis=0)):
                run.record(name, "regret", regret, seed=seed, losses=schedule, **setting)
            total = values.mean(axis=0).sum()
            run.record(name, "total regret", total, seed=seed, **setting)
            uniform = regrets[UNIFORM][TUNED, K, seed][: len(values)].mean(axis=0).sum()  # on the same processes
            run.record(name, "total regret / that of the uniform policy", total / uniform, seed=seed, **setting)
            if (protocol, K, seed) in regrets[HEDGE]:
                # a difference, since Hedge's regret can be near zero or below, where a ratio means nothing
                hedge = regrets[HEDGE][protocol, K, seed][: len(values)].mean(axis=0).sum()
                excess = (total - SHARE * hedge) / uniform
                run.record(name, EXCESS, excess, seed=seed, **setting)
            # what the theorems bound: at least the regret on stationary losses, which no policy can make negative
            run.record(name, WORST, values.mean(axis=0).max(), seed=seed, **setting)
        for protocol, seed in sorted({(protocol, seed) for protocol, _, seed in found}):
            worst = [found[protocol, K, seed].mean(axis=0).max() for K in study.episodes]
            slope = np.polyfit(np.log(study.episodes), np.log(worst), 1)[0]
            run.record(name, "slope of log regret over log episodes", slope, seed=seed, scales=protocol)


# The two lemmas -------------------------------------------------------------------------------------------------------


def check_stability(run: Run, cases: int) -> None:
    """The largest stability term / (eta sum p c^2) over random distributions, costs up to +-1000, rates up to 10."""
    worst: dict[str, list[ndarray]] = {"log-barrier": [], "negative entropy": []}
    for seed in run.seeds:
        rng = np.random.default_rng([seed, 19])
        p = 10 ** rng.uniform(-6, 0, (cases, 5))  # into the corners, where unlikely actions have large estimates
        p /= p.sum(axis=1, keepdims=True)
        cost = rng.uniform(-1, 1, (cases, 5)) * 10 ** rng.uniform(-2, 3, (cases, 1))
        eta = 10 ** rng.uniform(-3, 1, cases)
        variance = eta * (p * cost**2).sum(axis=1)
        ratios = {
            "log-barrier": log_barrier_stability(p, cost, eta) / variance,
            "negative entropy": entropy_stability(p, cost, eta) / variance,
        }
        for method, ratio in ratios.items():
            run.record(method, "largest stability term / (eta sum p c^2)", ratio.max(), seed=seed)
            run.record(
                method, "share of cases whose stability term is above eta sum p c^2", (ratio > 1).mean(), seed=seed
            )
            worst[method].append(np.stack([eta * np.abs(cost).max(axis=1), ratio]))
    figure, axes = canvas()
    edges = np.geomspace(1e-4, 1e4, 25)
    for method, points in worst.items():
        size, ratio = np.concatenate(points, axis=1)
        place = np.digitize(size, edges)
        highest = [ratio[place == i].max(initial=0) for i in range(1, edges.size)]
        axes.plot(np.sqrt(edges[1:] * edges[:-1]), highest, marker="o", markersize=3.5, label=method)
    axes.axhline(1, color="#888888", lw=1, ls="--", label="what the analysis allows")
    axes.set(xscale="log", yscale="log", xlabel="largest eta |c|", ylabel="largest stability term / (eta sum p c^2)")
    axes.set_title("Stability for costs of any size")
    axes.legend()
    run.figure(figure, "stability", STABILITY_CAPTION)


def compare_inverses(run: Run, trials: int = 50) -> None:
    """(Sigma + gamma I)^(-1) from samples and by matrix geometric resampling, at equal numbers of simulator calls."""
    for seed in run.track(run.seeds, "inverse covariances"):
        rng = np.random.default_rng([seed, 191])
        features = rng.dirichlet(np.full(5, 0.35), (4, 6))
        occupancy = rng.dirichlet(np.ones(24)).reshape(4, 6)
        exact = covariance(features, occupancy)
        phi = features.reshape(24, 5)
        for gamma in (0.1, 0.03, 0.01):
            n = samples_for_ridge_inverse(gamma, 5)
            _, N = samples_for_resampling(gamma)  # factors, as its analysis asks for
            M = max(1, round(n / N))  # copies, for as many calls
            eigenvalues, vectors = np.linalg.eigh(exact + gamma * np.eye(5))
            root = (vectors * np.sqrt(eigenvalues)) @ vectors.T
            errors: dict[str, list[float]] = {"ridge inverse": [], "matrix geometric resampling": []}
            far = 0
            for _ in range(trials):
                sample = sampled_covariances(features, occupancy, n, rng)
                inverse = ridge_inverse(sample, gamma)
                relative = np.linalg.solve(root, np.linalg.solve(root, sample - exact).T)
                far += bool(np.linalg.norm(relative, 2) > 0.5)
                drawn = phi[rng.choice(24, (M, N), p=occupancy.ravel())]
                resampled = matrix_geometric_resampling(drawn, gamma)
                for name, X in (("ridge inverse", inverse), ("matrix geometric resampling", resampled)):
                    errors[name].append(float(np.linalg.norm(root @ X @ root - np.eye(5), 2)))
            setting = {"gamma": gamma, "calls": n}
            for name, values in errors.items():
                run.record(name, "median relative error of the inverse", np.median(values), seed=seed, **setting)
            ratio = np.median(errors["ridge inverse"]) / np.median(errors["matrix geometric resampling"])
            run.record("ridge inverse", "error / that of resampling", ratio, seed=seed, **setting)
            run.record("ridge inverse", "share of trials off by more than half", far / trials, seed=seed, **setting)


# Figures --------------------------------------------------------------------------------------------------------------

STABILITY_CAPTION = (
    "Largest ratio among random distributions, costs and rates, by the size of the costs. FTRL's analysis needs it "
    "below the dashed line: the log-barrier stays there whatever the costs, the negative entropy only up to eta |c| of "
    "about 1."
)
GROWTH_CAPTION = (
    "Exact regret on the worst of the three loss sequences, scales tuned at few episodes; mean over seeds, band from "
    "the lowest to the highest. Dashed: the rates of the theorems, K^(1/2) with a simulator and K^(8/9) without, and "
    "the earlier K^(2/3)."
)
CURVES_CAPTION = "Exact regret against the best fixed policy as the episodes go by, tuned scales, mean over seeds."


def plot_growth(run: Run, study: Study) -> None:
    figure, axes = canvas(7.2, 4.4)
    K = np.array(study.episodes)
    for name in (*SHOWN, UNIFORM):
        records = [m for m in run.measures if (m.method, m.metric, m.setting.get("scales")) == (name, WORST, TUNED)]
        points = np.array([[m.value for m in records if m.setting["episodes"] == k] for k in study.episodes])
        (line,) = axes.plot(K, points.mean(axis=1), marker="o", markersize=3.5, label=name)
        axes.fill_between(K, points.min(axis=1), points.max(axis=1), color=line.get_color(), alpha=0.1, lw=0)
        if name == "log-barrier":
            anchor = points[0].mean()
    for rate, label in ((1 / 2, "K^(1/2)"), (2 / 3, "K^(2/3)"), (8 / 9, "K^(8/9)")):
        axes.plot(K, anchor * (K / K[0]) ** rate, ls="--", lw=1, color="#888888")
        axes.annotate(label, (K[-1], anchor * (K[-1] / K[0]) ** rate), fontsize=8, va="center")
    axes.set(xscale="log", yscale="log", xlabel="episodes K", ylabel="regret, worst of three loss sequences")
    axes.set_xticks(K, [f"{k:,}" for k in study.episodes])
    axes.minorticks_off()
    axes.set_title("Growth of regret with the number of episodes")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.04, 1))
    run.figure(figure, "growth", GROWTH_CAPTION)


def plot_curves(run: Run, curves: dict[str, Float[ndarray, "seeds schedules points"]], study: Study) -> None:
    figure, panels = canvas(10.5, 3.8, ncols=3)
    for i, (schedule, axes) in enumerate(zip(SCHEDULES, panels)):
        for name in SHOWN:
            mean = curves[name][:, i].mean(axis=0)
            episodes = 1 + np.arange(mean.size) * max(1, study.episodes[-1] // 200)
            axes.plot(episodes, mean, lw=1.4, label=name)
        axes.set(title=f"{schedule} losses", xlabel="episode")
    panels[0].set_ylabel("cumulative regret")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    run.figure(figure, "regret", CURVES_CAPTION)
