"""Regret and policy switches of LOOP on processes that never reset, beside UCRL2, posterior sampling and Q-learning.

RiverSwim for tables, a random linear process for features, RiverSwims of unknown current for finite lists of models,
and mixtures of known kernels. The optimum of each is known exactly, so that regret is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.control.average_reward import (
    LOOP,
    MLELOOP,
    OLSVI,
    PSRL,
    TSDE,
    UCRL2,
    DifferentialQLearning,
    FiniteModels,
    FiniteValue,
    KernelValue,
    LinearMixture,
    LinearValue,
    OptimisticQLearning,
    Regret,
    TabularValue,
    Walk,
    agec_linear,
    agec_of_run,
    agec_of_visits,
    run_continuing,
)
from locally.control.environments import (
    ContinuingMDP,
    access_control_queue,
    garnet,
    random_linear_mdp,
    random_linear_mixture,
    riverswim,
)
from locally.evidence import Run
from locally.plots import INK, canvas

LOOP_ = "LOOP"
MAKERS = dict[str, Callable[[np.random.Generator], Any]]
UPS = np.linspace(0.05, 0.62, 20)  # candidate currents of a river where staying at the left pays WAGE
TRUE_UP, WAGE = (
    2,
    0.2,
)  # against the true current 0.135 can be had upstream; 16 of the candidates promise more than WAGE
POINTS = 60  # on a curve


@dataclass(frozen=True)
class Study:
    """Sizes of one scale.

    Attributes:
        steps: on RiverSwim with 6 states.
        others: steps of the other panels.
        replays: walks of each agent on that river for each seed; one elsewhere.
        everyone: all agents and settings, or those that claims and figures need.
        rivers: further lengths of the river.
        everywhere: steps of replanning at every step, 0 for none.
        large: access-control queue and Garnet, for `steps` steps.
    """

    steps: int
    others: int
    replays: int
    everyone: bool
    rivers: tuple[int, ...] = ()
    everywhere: int = 0
    large: bool = False


@dataclass(frozen=True)
class Curve:
    times: Float[ndarray, " n"]
    expected: Float[ndarray, " n"]
    switch_times: Float[ndarray, " k"]


Curves = dict[str, dict[str, list[Curve]]]


def experiment(run: Run) -> None:
    carry_out(
        run,
        run.pick(
            quick=Study(80_000, 20_000, replays=4, everyone=False),
            default=Study(80_000, 20_000, replays=4, everyone=True, rivers=(12,), everywhere=1000),
            paper=Study(
                10_000_000, 1_000_000, replays=1, everyone=True, rivers=(12, 20, 40), everywhere=5000, large=True
            ),
        ),
    )


def carry_out(run: Run, study: Study) -> None:
    curves: list[Curves] = run.parallel(partial(one_seed, study=study), run.seeds, "seeds")
    draw(run, curves)


def one_seed(run: Run, seed: int, study: Study) -> Curves:
    linear, mixture = random_linear_mdp(rng=seed), random_linear_mixture(rng=seed)
    river, listed = riverswim(), riverswim(up=UPS[TRUE_UP], left=WAGE)
    panels: dict[str, tuple[ContinuingMDP, int, MAKERS]] = {
        "RiverSwim, 6 states": (river, study.steps, on_tables(river, study.steps, study)),
        "linear process": (linear, study.others, on_features(linear, study.others, study)),
        "20 candidate models": (listed, study.others, on_lists(listed, study.others)),
        "mixture of 4 kernels": (mixture, study.others, on_mixture(mixture, study.others)),
    }
    for n in study.rivers:
        longer = riverswim(n)
        panels[f"RiverSwim, {n} states"] = longer, study.steps, on_tables(longer, study.steps, study)
    if study.large:
        for name, mdp in {"access-control queue": access_control_queue(), "Garnet": garnet(rng=seed)}.items():
            panels[name] = mdp, study.steps, on_tables(mdp, study.steps, study)

    curves: Curves = {}
    for panel, (mdp, steps, agents) in run.track(panels.items(), "processes", len(panels)):
        curves[panel] = {name: [] for name in agents}
        for replay in range(study.replays if mdp is river and steps == study.steps else 1):
            found = {name: learn(run, panel, mdp, name, make, steps, seed, replay) for name, make in agents.items()}
            compare(run, panel, found, steps, seed)
            for name, r in found.items():
                curve = Curve(r.times.astype(float), r.expected, r.switch_times.astype(float))
                curves[panel][name].append(curve)
    if study.everywhere:
        without_laziness(run, river, study.everywhere, seed)
    return curves


# Agents ---------------------------------------------------------------------------------------------------------------


def on_tables(mdp: ContinuingMDP, steps: int, study: Study) -> MAKERS:
    S, A, span = mdp.n_states, mdp.n_actions, mdp.solve().span

    def loop(scale: float) -> Callable[[np.random.Generator], LOOP]:
        return lambda rng: LOOP(TabularValue(S, A, lam=scale), horizon=steps, span=span, beta_scale=scale, rng=rng)

    agents: MAKERS = {
        LOOP_: loop(0.01),
        "UCRL2": lambda rng: UCRL2(S, A, rng=rng),
        "UCRL2, radii x 0.3": lambda rng: UCRL2(S, A, scale=0.3, rng=rng),
        "PSRL": lambda rng: PSRL(S, A, rng=rng),
        "optimistic Q-learning": lambda rng: OptimisticQLearning(S, A, horizon=steps, span=span),
        "differential Q-learning": lambda rng: DifferentialQLearning(S, A, rng=rng),
    }
    if study.everyone:
        agents |= {
            "LOOP, beta x 0.1": loop(0.001),
            "LOOP, beta x 10": loop(0.1),
            "LOOP, beta of the theory": loop(1.0),
            "TSDE": lambda rng: TSDE(S, A, rng=rng),
            "optimistic Q-learning, bonus x 0.01": lambda rng: OptimisticQLearning(
                S, A, horizon=steps, span=span, bonus_scale=0.01
            ),
        }
    return agents


def on_features(mdp: ContinuingMDP, steps: int, study: Study) -> MAKERS:
    S, A, span = mdp.n_states, mdp.n_actions, mdp.solve().span
    phi = mdp.features
    assert phi is not None
    agents: MAKERS = {
        "LOOP, linear": lambda rng: LOOP(LinearValue(phi), horizon=steps, span=span, rng=rng),
        "LOOP, tables": lambda rng: LOOP(TabularValue(S, A), horizon=steps, span=span, rng=rng),
        "FOPO": lambda rng: LOOP(LinearValue(phi, trigger="determinant"), horizon=steps, span=span, rng=rng),
        "PSRL": lambda rng: PSRL(S, A, rng=rng),
    }
    if study.everyone:
        flat = phi.reshape(S * A, -1)
        gaussian = np.exp(-((flat[:, None] - flat) ** 2).sum(axis=2))
        agents |= {
            "LOOP, Gaussian kernel": lambda rng: LOOP(KernelValue(gaussian, S), horizon=steps, span=span, rng=rng),
            "OLSVI.FH": lambda rng: OLSVI(phi, horizon=steps, span=span),
            "OLSVI.FH, bonus x 0.01": lambda rng: OLSVI(phi, horizon=steps, span=span, scale=0.01),
        }
    return agents


def on_lists(mdp: ContinuingMDP, steps: int) -> MAKERS:
    models = [riverswim(mdp.n_states, up=up, left=WAGE) for up in UPS]
    P, R, span = [m.P for m in models], [m.R for m in models], mdp.solve().span
    return {
        "MLE-LOOP": lambda rng: MLELOOP(FiniteModels(P, R), horizon=steps, span=span, rng=rng),
        "LOOP, list of values": lambda rng: LOOP(FiniteValue.of_models(P, R), horizon=steps, span=span, rng=rng),
        "PSRL": lambda rng: PSRL(mdp.n_states, mdp.n_actions, rng=rng),
    }


def on_mixture(mdp: ContinuingMDP, steps: int) -> MAKERS:
    S, A, span = mdp.n_states, mdp.n_actions, mdp.solve().span
    mixture = mdp.mixture
    assert mixture is not None
    return {
        "LOOP, mixture": lambda rng: LOOP(LinearMixture(mixture, rewards=mdp.R), horizon=steps, span=span, rng=rng),
        "LOOP, tables": lambda rng: LOOP(TabularValue(S, A), horizon=steps, span=span, rng=rng),
        "PSRL": lambda rng: PSRL(S, A, rng=rng),
    }


# Runs -----------------------------------------------------------------------------------------------------------------


def learn(
    run: Run,
    panel: str,
    mdp: ContinuingMDP,
    name: str,
    make: Callable[[np.random.Generator], Any],
    steps: int,
    seed: int,
    replay: int,
) -> Regret:
    """One agent's run, with what it shows by itself recorded. All agents of a replay walk with the same draws."""
    agent = make(np.random.default_rng([seed, replay, 1]))
    walk = Walk(mdp, int(np.random.SeedSequence([seed, replay]).generate_state(1)[0]))
    times = sorted({*np.geomspace(min(100, steps), steps, POINTS).astype(int).tolist(), steps // 10, steps // 4, steps})
    keep = isinstance(agent, LOOP) and steps <= 200_000
    found = run_continuing(walk, agent, steps, times=times, keep=keep)
    setting: dict[str, Any] = {"process": panel, "steps": steps}
    run.record(name, "regret", found.realised[-1], seed=seed, **setting)
    run.record(name, "expected regret", found.expected[-1], seed=seed, **setting)
    run.record(name, "policy switches", found.n_switches, seed=seed, **setting)
    if np.isfinite(found.gain_gaps[-1]):
        run.record(name, "gain gap of the last policy", found.gain_gaps[-1], seed=seed, **setting)
    if isinstance(agent, LOOP):
        best = mdp.solve().gain
        optimistic = np.mean([epoch.plan.gain >= best - 1e-3 for epoch in agent.epochs_])
        run.record(name, "share of plans with J at least J*", float(optimistic), seed=seed, **setting)
    if keep and isinstance(agent.hypotheses, TabularValue | LinearValue):
        assert found.states is not None
        assert found.actions is not None
        phi = getattr(agent.hypotheses, "features", None)
        bound = agec_of_visits(found.visits) if phi is None else agec_linear(phi[found.states, found.actions])
        estimate = agec_of_run(mdp, agent.epochs_, found.states, found.actions)
        run.record(name, "AGEC, elliptical potential", bound, seed=seed, **setting)
        run.record(name, "AGEC, dominance in the run", estimate.dominance, seed=seed, **setting)
        run.record(name, "AGEC, transferability in the run", estimate.transferability, seed=seed, **setting)
    return found


def compare(run: Run, panel: str, found: Mapping[str, Regret], steps: int, seed: int) -> None:
    """The claims' figures: ratios between agents of one panel, on the same draws."""
    quarter = steps // 4

    def ratio(metric: str, ours: str, value: float, peer: float, **setting: Any) -> None:
        run.record(ours, metric, value / peer, seed=seed, **setting)

    if panel == "RiverSwim, 6 states":
        ours, ucrl2 = found[LOOP_], found["UCRL2"]
        ratio(f"regret / UCRL2's regret, {steps} steps", LOOP_, ours.at(steps), ucrl2.at(steps))
        small = found["UCRL2, radii x 0.3"].at(quarter)
        ratio(f"regret / regret of UCRL2 with radii x 0.3, {quarter} steps", LOOP_, ours.at(quarter), small)
        ratio("policy switches / UCRL2's", LOOP_, ours.n_switches, ucrl2.n_switches)
        bound = ours.visits.size * np.log2(steps)
        ratio("policy switches / S A log2 T", LOOP_, ours.n_switches, bound)
        late = int((ours.switch_times > quarter).sum())
        run.record(LOOP_, f"switches added between {quarter} and {steps} steps", late, seed=seed)
        for name in (LOOP_, "UCRL2", "PSRL", "optimistic Q-learning", "differential Q-learning"):
            for metric, since in {
                "slope of log regret over log steps, last three quarters": quarter,
                "slope of log regret over log steps, last decade": steps // 10,
            }.items():
                growth = np.log(found[name].at(steps, "expected") / found[name].at(since, "expected"))
                run.record(name, metric, growth / np.log(steps / since), seed=seed)
        if steps == 10_000_000:
            growth = np.log(ours.at(steps, "expected") / ours.at(steps // 10, "expected"))
            run.record(LOOP_, "slope of log regret over log steps, 1e6 to 1e7", growth / np.log(10), seed=seed)
    if panel == "linear process":
        ours, tables = found["LOOP, linear"], found["LOOP, tables"]
        ratio("regret / regret with tables", "LOOP, linear", ours.expected[-1], tables.expected[-1])
        ratio("policy switches / switches with tables", "LOOP, linear", ours.n_switches, tables.n_switches)
    if panel == "20 candidate models":
        run.record("MLE-LOOP", "policy switches among 20 models", found["MLE-LOOP"].n_switches, seed=seed)


def without_laziness(run: Run, mdp: ContinuingMDP, steps: int, seed: int) -> None:
    """The ablation: a new plan before every step, and LOOP as it is on the same draws."""
    span = mdp.solve().span
    for name, lazy in {"LOOP": True, "LOOP, a new plan every step": False}.items():
        hypotheses = TabularValue(mdp.n_states, mdp.n_actions, n_starts=1)
        agent = LOOP(hypotheses, horizon=steps, span=span, lazy=lazy, rng=np.random.default_rng([seed, 1]))
        found = run_continuing(mdp, agent, steps, seed=seed, times=[steps])
        setting: dict[str, Any] = {"process": "RiverSwim, 6 states", "steps": steps}
        changed = np.diff([epoch.plan.policy for epoch in agent.epochs_], axis=0).any(axis=1).sum()
        run.record(name, "expected regret, lazy or not", found.expected[-1], seed=seed, **setting)
        run.record(name, "changes of policy, lazy or not", changed, seed=seed, **setting)


# Figures --------------------------------------------------------------------------------------------------------------

SHOWN = {
    "RiverSwim, 6 states": (
        LOOP_,
        "UCRL2",
        "UCRL2, radii x 0.3",
        "PSRL",
        "optimistic Q-learning",
        "differential Q-learning",
    ),
    "linear process": ("LOOP, linear", "LOOP, tables", "FOPO", "PSRL", "OLSVI.FH, bonus x 0.01"),
    "20 candidate models": ("MLE-LOOP", "LOOP, list of values", "PSRL"),
    "mixture of 4 kernels": ("LOOP, mixture", "LOOP, tables", "PSRL"),
}


def draw(run: Run, curves: list[Curves]) -> None:
    figure, axes = canvas(10.5, 8.0, nrows=2, ncols=2)
    for ax, (panel, names) in zip(axes.flat, SHOWN.items()):
        for name in names:
            lines = [line for c in curves for line in c[panel].get(name, ())]
            if lines:
                expected = np.array([line.expected for line in lines]) + 1
                (drawn,) = ax.plot(lines[0].times, expected.mean(axis=0), label=name)
                colour = drawn.get_color()
                ax.fill_between(
                    lines[0].times, expected.min(axis=0), expected.max(axis=0), color=colour, alpha=0.15, lw=0
                )
        ax.set(xscale="log", yscale="log", xlabel="steps", ylabel="1 + expected regret", title=panel)
        ax.legend(fontsize=8)
    run.figure(figure, "regret", REGRET_CAPTION)

    figure, ax = canvas(7.0, 4.2)
    panel = "RiverSwim, 6 states"
    first = curves[0][panel]
    times = first[LOOP_][0].times
    for name in (LOOP_, "UCRL2", "PSRL"):
        lines = [line for c in curves for line in c[panel][name]]
        counts = np.array([[(line.switch_times <= t).sum() for t in times] for line in lines])
        (drawn,) = ax.plot(times, counts.mean(axis=0), label=name)
        colour = drawn.get_color()
        ax.fill_between(times, counts.min(axis=0), counts.max(axis=0), color=colour, alpha=0.15, lw=0)
    ax.plot(times, 12 * np.log2(times), "--", color=INK, label="S A log2 t")
    ax.set(xscale="log", xlabel="steps t", ylabel="policy switches", title="Policy switches on RiverSwim, 6 states")
    ax.legend()
    run.figure(figure, "switches", SWITCHES_CAPTION)


REGRET_CAPTION = (
    "Sum over the steps of V*(s) - Q*(s, a): regret without the noise of rewards and transitions. Mean over seeds, "
    "with a band from the lowest to the highest."
)
SWITCHES_CAPTION = (
    "Changes of policy after the first plan. LOOP waits until the data contradict its hypothesis; UCRL2 and PSRL "
    "change whenever the visits of a state and action have doubled, which happens at most about S A log2 t times."
)
