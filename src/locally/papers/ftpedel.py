"""How many online episodes a log saves: two layers, three states, four actions, and one arm that the log leaves out.

The missing arm is the best one, in a state that is hard to reach. The learner with a log stands beside the same learner
without one, uniform exploration on top of the log, pessimistic learning from the log alone, and optimistic learning
that starts from the log; a second log holds nothing but the best policy, which pessimism then finds and cannot know.
The full-size study is about random linear processes whose log leaves out one direction of the features.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.control.environments import EpisodicMDP, missing_arm, random_episodic_linear_mdp
from locally.control.fine_tuning import (
    LSVIUCB,
    FineTuningResult,
    FTPedel,
    OfflineDataset,
    bootstrap_policies,
    collect,
    deterministic_policies,
    features_of,
    minimal_online_samples,
    offline_to_online_coefficient,
    pessimistic_policy,
    reachable,
    softmax_cover,
)
from locally.evidence import Run

OURS = "FTPedel"
UNIFORM = "uniform exploration"
PESSIMISTIC = "pessimistic offline learning"
OPTIMISTIC = "LSVI-UCB from the log"
FEWEST = "leading term, process known"
MISSING, BEST_ONLY, DIRECTION = "best arm missing", "best policy only", "one direction missing"
EPISODES = "online episodes"
WIDTH = 0.5  # beta_l = 0.5 log(4 H^2 |Pi_l| l^2 / delta), far below what the proofs want
BETA = 10.0  # of the exact need
DELTA = 0.1
CLOSE = 0.05  # the second-best policy's gap
PATIENCE = 5000  # episodes
UNKNOWN = f"online episodes until within {CLOSE}, unknown to the learner"


@dataclass(frozen=True)
class Linear:
    """Random linear processes of the full-size study."""

    horizon: int = 5
    n_states: int = 50
    n_actions: int = 10
    dims: tuple[int, ...] = (5, 10)
    policies: int = 2000
    rows: int = 1_000_000  # of the log, for each layer
    epsilons: tuple[float, ...] = (0.4, 0.2, 0.1)


@dataclass(frozen=True)
class Study:
    """Sizes of one scale. `samples`: of every covered (layer, state, action) in the log; `repeats`: for each seed."""

    samples: tuple[int, ...]
    epsilons: tuple[float, ...]
    repeats: int
    linear: Linear | None = None


def experiment(run: Run) -> None:
    carry_out(
        run,
        run.pick(
            quick=Study((0, 20_000), (0.2,), 1),
            default=Study((0, 300, 3000, 20_000), (0.2, 0.1), 4),
            paper=Study((0, 300, 3000, 20_000, 100_000), (0.2, 0.1, 0.05), 20, Linear()),
        ),
    )


def carry_out(run: Run, study: Study) -> None:
    run.parallel(partial(one_seed, study), run.seeds, "seeds")
    needs = [(epsilon, n) for epsilon in study.epsilons for n in study.samples]
    run.parallel(exact_need, needs, "exact needs")
    draw(run, study)
    if study.linear is not None:
        run.parallel(partial(one_linear_seed, study.linear), run.seeds, "linear processes")


# One arm missing ------------------------------------------------------------------------------------------------------


def visits(log: str, samples: int) -> Int[ndarray, "2 3 4"]:
    """How often the log holds each (layer, state, action)."""
    n = np.zeros((2, 3, 4), np.int64)
    if log == BEST_ONLY:
        n[0, 0, 3] = n[1, 0, 1] = n[1, 1, 2] = n[1, 2, 3] = samples
    else:
        n[0, 0], n[1] = samples, samples
        n[1, 2, 3] = 0
    return n


def draw_log(mdp: EpisodicMDP, n: Int[ndarray, "H S A"], rng: np.random.Generator) -> OfflineDataset:
    sizes = {"horizon": mdp.horizon, "n_states": mdp.n_states, "n_actions": mdp.n_actions}
    return OfflineDataset(*collect(mdp, n, rng), **sizes)


def one_seed(study: Study, run: Run, seed: int) -> None:
    mdp = missing_arm()
    policies = deterministic_policies(reachable(mdp), mdp.n_actions)
    gaps = mdp.solve().value - mdp.values(policies)
    spent: dict[tuple[str, float, int], float] = {}
    for n in study.samples:
        log = draw_log(mdp, visits(MISSING, n), np.random.default_rng([seed, n]))
        for epsilon in study.epsilons:
            for method in (OURS, UNIFORM):
                found = fine_tune(mdp, policies, log, epsilon, method, [seed, n, 1])
                spent[method, epsilon, n] = found.n_episodes
                record(run, method, found, gaps, seed, log=MISSING, epsilon=epsilon, samples=n)
        record_uncertified(run, mdp, log, seed, MISSING, n)
    most = max(study.samples)
    for epsilon in study.epsilons:
        ours = spent[OURS, epsilon, most]
        ratio = ours / spent[OURS, epsilon, 0]
        run.record(OURS, "online episodes / those without offline data", ratio, seed=seed, epsilon=epsilon)
        ratio = ours / spent[UNIFORM, epsilon, most]
        run.record(OURS, "online episodes / those of uniform exploration", ratio, seed=seed, epsilon=epsilon)

    within = []
    for repeat in range(study.repeats):  # a fresh log each
        rng = np.random.default_rng([seed, most, 2, repeat])
        log = draw_log(mdp, visits(MISSING, most), rng)
        found = fine_tune(mdp, policies, log, 0.2, OURS, [seed, most, 3, repeat])
        within.append(gaps[found.index] <= 0.2)
    run.record(OURS, "share of runs within epsilon", float(np.mean(within)), seed=seed, epsilon=0.2)

    log = draw_log(mdp, visits(BEST_ONLY, most), np.random.default_rng([seed, most, 4]))
    found = fine_tune(mdp, policies, log, 0.2, OURS, [seed, most, 5])
    record(run, OURS, found, gaps, seed, log=BEST_ONLY, epsilon=0.2, samples=most)
    record_uncertified(run, mdp, log, seed, BEST_ONLY, most)


def fine_tune(
    mdp: EpisodicMDP,
    policies: Float[ndarray, "n H S A"],
    log: OfflineDataset,
    epsilon: float,
    method: str,
    seed: list[int],
) -> FineTuningResult:
    explorer: Literal["optimistic", "uniform"] = "optimistic" if method == OURS else "uniform"
    scale, rng = WIDTH / mdp.horizon**2, np.random.default_rng(seed)
    features = features_of(mdp)
    learner = FTPedel(
        features, policies, log, epsilon=epsilon, delta=DELTA, beta_scale=scale, explorer=explorer, rng=rng
    )
    return learner.run(mdp)


def record(
    run: Run, method: str, found: FineTuningResult, gaps: Float[ndarray, " n"], seed: int, **setting: str | float | int
) -> None:
    run.record(method, EPISODES, found.n_episodes, seed=seed, **setting)
    run.record(method, "suboptimality", gaps[found.index], seed=seed, **setting)
    run.record(method, "certified suboptimality", found.certificate.suboptimality, seed=seed, **setting)
    run.record(method, "suboptimality bound with proved constants", found.certificate.proved, seed=seed, **setting)


def record_uncertified(run: Run, mdp: EpisodicMDP, log: OfflineDataset, seed: int, name: str, samples: int) -> None:
    """What learners without a certificate make of the log; how good they are is read off the process."""
    best = mdp.solve().value
    features = features_of(mdp)
    if samples > 0:  # nothing to be pessimistic about otherwise
        pessimistic = pessimistic_policy(features, log).policy
        gap = best - mdp.values(pessimistic[None])[0]
        run.record(PESSIMISTIC, "suboptimality", gap, seed=seed, log=name, samples=samples)
    agent = LSVIUCB(features, log, rng=np.random.default_rng([seed, samples, 6]))
    done = agent.advance(mdp, PATIENCE, lambda policy: bool(best - mdp.values(policy[None])[0] < CLOSE))
    episodes = agent.n_episodes if done else np.inf
    run.record(OPTIMISTIC, UNKNOWN, episodes, seed=seed, log=name, samples=samples)


def exact_need(run: Run, setting: tuple[float, int]) -> None:
    """The sum over layers of the fewest episodes, for a log with exactly these counts."""
    epsilon, n = setting
    mdp = missing_arm()
    policies = deterministic_policies(reachable(mdp), mdp.n_actions)
    covariance = np.einsum("hsa,hsai,hsaj->hij", visits(MISSING, n), features_of(mdp), features_of(mdp))
    needs = minimal_online_samples(mdp, policies, covariance, epsilon, BETA)
    run.record(FEWEST, EPISODES, needs.sum(), log=MISSING, epsilon=epsilon, samples=n)
    for h in range(mdp.horizon):
        found = offline_to_online_coefficient(mdp, policies, covariance, epsilon, 1000, h)
        metric = "offline-to-online coefficient at 1000 episodes"
        run.record(FEWEST, metric, found.value, log=MISSING, epsilon=epsilon, samples=n, layer=h)


def draw(run: Run, study: Study) -> None:
    """Online episodes over the size of the log, a panel for each epsilon."""
    from locally.plots import INK, canvas

    figure, panels = canvas(4.6 * len(study.epsilons) + 0.4, 4.2, ncols=len(study.epsilons), sharey=True, squeeze=False)
    at = sorted(study.samples)
    for axes, epsilon in zip(panels[0], study.epsilons):
        for method in (UNIFORM, OURS, FEWEST):
            found: dict[int, list[float]] = {n: [] for n in at}
            for m in run.measures:
                here = (m.method, m.metric, m.setting.get("log"), m.setting.get("epsilon"))
                if here == (method, EPISODES, MISSING, epsilon):
                    found[int(m.setting["samples"])].append(m.value)
            means = [np.mean(found[n]) for n in at]
            style = "--" if method == FEWEST else "-"
            (line,) = axes.plot(at, means, style, marker="o", markersize=4, label=method)
            low, high = ([pick(found[n]) for n in at] for pick in (min, max))
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, lw=0)
        axes.set_xscale("symlog", linthresh=100)
        axes.set_yscale("log")
        axes.set(xlabel="log: samples of each covered state and action", title=f"accuracy ε = {epsilon:g}")
        axes.set_xticks(at, [f"{n:,}" for n in at])
    panels[0, 0].set_ylabel("online episodes until certified")
    panels[0, 0].legend(labelcolor=INK, fontsize=9)
    unknown = [m.value for m in run.measures if m.metric == UNKNOWN and int(m.setting["samples"]) > 0]
    caption = (
        "Online episodes over the size of a log in which the best arm is missing: mean and range over seeds. Without a"
        " log (0) the method is Pedel. Dashed: the leading term of the theorem, T_o2o summed over layers, at"
        f" β = {BETA:g}: what a design needs that knows the process, aiming at ε at once; phases go on to ε/4 or less."
        f" Optimistic learning from a log, without a certificate, is within {CLOSE} of the optimum after"
        f" {min(unknown):.0f} to {max(unknown):.0f} episodes, and cannot tell."
    )
    run.figure(figure, "episodes over log", caption)


# One direction missing ------------------------------------------------------------------------------------------------


def one_linear_seed(linear: Linear, run: Run, seed: int) -> None:
    """Random linear processes: episodes over 1 / epsilon with and without a log that leaves a direction out."""
    for dim in linear.dims:
        rng = np.random.default_rng([seed, dim, 7])
        mdp = random_episodic_linear_mdp(linear.horizon, linear.n_states, linear.n_actions, dim, rng=rng)
        log = draw_log(mdp, visits_without_a_direction(features_of(mdp), linear.rows), rng)
        policies = np.concatenate(
            [
                softmax_cover(features_of(mdp), linear.policies, rng=rng),
                bootstrap_policies(features_of(mdp), log, 5, rng=rng),
            ]
        )
        values = mdp.values(policies)
        gaps = values.max() - values
        nothing = OfflineDataset.empty(mdp.horizon, mdp.n_states, mdp.n_actions)
        for method, data, rows in ((OURS, log, linear.rows), ("Pedel, without the log", nothing, 0)):
            episodes = []
            for epsilon in linear.epsilons:
                found = fine_tune(mdp, policies, data, epsilon, OURS, [seed, dim, 8])
                episodes.append(found.n_episodes)
                record(run, method, found, gaps, seed, log=DIRECTION, epsilon=epsilon, samples=rows, dim=dim)
            slope = np.polyfit(np.log(linear.epsilons), np.log(np.maximum(episodes, 1)), 1)[0]
            run.record(method, "slope of log online episodes over log(1 / epsilon)", -slope, seed=seed, dim=dim)
        pessimistic = pessimistic_policy(features_of(mdp), log).policy
        gap = values.max() - mdp.values(pessimistic[None])[0]  # below zero where it beats the class
        run.record(PESSIMISTIC, "suboptimality", gap, seed=seed, log=DIRECTION, samples=linear.rows, dim=dim)


def visits_without_a_direction(
    features: Float[ndarray, "H S A d"], rows: int, share: float = 0.01
) -> Int[ndarray, "H S A"]:
    """`rows` of each layer, spread evenly over the states and actions with less than `share` of the last direction."""
    kept = features[..., -1] < share
    cells = kept.sum(axis=(1, 2), keepdims=True)
    return np.where(kept, rows // np.maximum(cells, 1), 0)
