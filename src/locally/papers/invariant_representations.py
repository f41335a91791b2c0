"""Unseen interventions on random linear models: violations beside the bounds, risks beside other learners.

Four studies on simulated models, whose truth is known, and one on patients: how fast violations of invariance vanish
with the number of environments and whether the number of covariates matters; what strong interventions do to
predictors; what moments of interventions span; covariates that are only seen through a mixture; and age groups of the
diabetes study that scikit-learn bundles. The full-size study also reads a table of interventions on proteins.
"""

import csv
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from threadpoolctl import threadpool_limits

from locally.causal.invariance import (
    AnchorRegression,
    EnvironmentMoments,
    InterventionFamily,
    InterventionLaw,
    InvariantCausalPrediction,
    InvariantRiskMinimization,
    InvariantSubsetRegressor,
    LatentObservation,
    LinearInvariantRepresentation,
    LinearSEM,
    NoInvariantRepresentation,
    finite_class_delta,
    moment_rank,
    pac_delta,
    random_sem,
    search_subsets,
    unrestricted_lift_dimension,
    vc_dimension,
)
from locally.causal.invariance.search import class_size
from locally.evidence import Run, Scale

SUBSET, AUTOMATIC, LINEAR = "invariant subset", "invariant subset, automatic eps", "invariant linear map"
ERM, IRM, ICP = "pooled least squares (scikit-learn)", "IRMv1", "invariant causal prediction"
ANCHOR, PARENTS = "anchor regression", "true parents of the target"
EPS, ETA = 0.15, 0.05
ENVIRONMENTS = (1, 2, 4, 8, 16, 32)
MAX_SIZE = {8: 3, 24: 2, 100: 2, 500: 2}  # subsets searched among so many covariates
UNSEEN = 300
ROUNDING = 1e-9  # gaps below are zero in double precision

Predictor = Float[ndarray, " d"]


def experiment(run: Run) -> None:
    parts: list[Callable[[Run], None]] = [bounds, certificates, strong_interventions, mixtures, patients]
    if run.scale is Scale.PAPER:
        parts += [families, proteins]
    run.parallel(do, parts, "parts of the study")


def do(run: Run, part: Callable[[Run], None]) -> None:
    # Thousands of small products: several BLAS threads would spend their time waiting for each other.
    with threadpool_limits(limits=1, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NoInvariantRepresentation)  # an infeasible fit is counted, not printed
        part(run)


@dataclass(frozen=True)
class World:
    """A random model, the law of its interventions on one child of the target and one other node, and moments of both
    training and unseen environments."""

    law: InterventionLaw
    rng: np.random.Generator

    @classmethod
    def draw(cls, d: int, rng: np.random.Generator, *, in_degree: int = 2, sites: int = 2) -> "World":
        sem = random_sem(d, in_degree, rng)
        child = int(rng.choice(sem.children(sem.target)))
        others = rng.choice(np.setdiff1d(sem.covariates, [child]), sites - 1, replace=False)
        return cls(InterventionLaw(sem, (child, *others.tolist())), rng)

    @property
    def sem(self) -> LinearSEM:
        return self.law.sem

    def covariances(self, n: int, *, scale: float = 1.0) -> Float[ndarray, "n p p"]:
        """Of n environments, with coefficients moved `scale` times as far as in training."""
        law = InterventionLaw(self.sem, self.law.sites, scale=scale)
        return self.sem.covariances(law.draw(n, self.rng))

    def moments(self, n: int, *, scale: float = 1.0) -> EnvironmentMoments:
        return EnvironmentMoments.from_covariances(self.covariances(n, scale=scale), self.sem.target)

    def unseen(self, n: int = UNSEEN) -> Iterator[EnvironmentMoments]:
        """n environments as in training, in batches, so that large models fit in memory."""
        batch = max(1, 20_000_000 // self.sem.nodes**2)
        for start in range(0, n, batch):
            yield self.moments(min(batch, n - start))


def violated_shares(
    pairs: Sequence[tuple[Float[ndarray, "_ d"], Float[ndarray, " _"]]], unseen: Iterator[EnvironmentMoments]
) -> list[float]:
    """Share of the unseen environments in which each (representation, head) has a gap above EPS."""
    beyond = np.concatenate([[moments.gaps(Phi, head) > EPS for Phi, head in pairs] for moments in unseen], axis=1)
    return beyond.mean(axis=1).tolist()


# How many environments ------------------------------------------------------------------------------------------------


def bounds(run: Run) -> None:
    plot_bounds(run, generalisation(run), dimensions(run))


def generalisation(run: Run) -> dict[int, list[list[float]]]:
    """Violated share of unseen interventions over the number of training ones, from exact moments."""
    few, many = run.pick(quick=(8, 24), default=(8, 24), paper=(100, 500))
    graphs = run.pick(quick=20, default=60, paper=200)
    curves: dict[int, list[list[float]]] = {few: [], many: []}
    for seed in run.track(run.seeds, "number of environments"):
        mean = {}
        for d in (few, many):
            rng = np.random.default_rng([25, d, seed])
            shares = [violations_over_environments(d, rng) for _ in run.track(range(graphs), f"{d} covariates")]
            mean[d] = np.mean(shares, axis=0)
            curves[d].append(mean[d].tolist())
            for N, share in zip(ENVIRONMENTS, mean[d]):
                metric = f"violated share of unseen interventions, {d} covariates"
                run.record(SUBSET, metric, share, seed=seed, environments=N)
            slope = log_slope(ENVIRONMENTS, mean[d])
            run.record(SUBSET, "slope of log violated share over log environments", slope, seed=seed, covariates=d)
        late = np.array(ENVIRONMENTS) >= 8
        growth = float((mean[many] - mean[few])[late].max())
        run.record(SUBSET, f"largest violated share with {many} covariates minus that with {few}", growth, seed=seed)
    return curves


def violations_over_environments(d: int, rng: np.random.Generator) -> list[float]:
    world = World.draw(d, rng)
    training = world.moments(max(ENVIRONMENTS))
    found = [search_subsets(training.select(np.arange(N)), MAX_SIZE[d], EPS) for N in ENVIRONMENTS]
    return violated_shares([(np.eye(d)[list(f.support)], f.head) for f in found], world.unseen())


def log_slope(environments: Sequence[int], shares: Float[ndarray, " k"]) -> float:
    """Of log share over log environments, as far as any violation was seen; NaN with fewer than three points."""
    seen = int(np.argmin(shares > 0)) if (shares == 0).any() else len(shares)
    if seen < 3:
        return math.nan
    return float(np.polyfit(np.log(environments[:seen]), np.log(shares[:seen]), 1)[0])


KINDS = {
    "noise of 2 sites": ("variance", 2, 2),
    "2 sites cut off or not": ("hard", 2, 2),
    "1 site, in-degree 3": ("soft", 1, 3),
    "2 sites, in-degree 2": ("soft", 2, 2),
    "2 sites, in-degree 3": ("soft", 2, 3),
    "3 sites, in-degree 2": ("soft", 3, 2),
}
SIZES = (10, 20, 40)


def dimensions(run: Run) -> dict[str, list[int]]:
    """Dimension that the moments of 100 environments span, beside its bound, as the number of covariates grows.

    Returns the largest over seeds for every number of covariates, and the bound last.
    """
    spans: dict[str, list[int]] = {}
    for name, (kind, k, q) in KINDS.items():
        largest = dict.fromkeys(SIZES, 0)
        for seed in run.seeds:
            rng = np.random.default_rng([28, seed])
            for d in SIZES:
                sem = random_sem(d, q, rng)
                full = [j for j in sem.covariates if len(sem.parents(j)) == q]
                law = InterventionLaw(sem, tuple(rng.choice(full, k, replace=False).tolist()), kind)
                rank = moment_rank(EnvironmentMoments.from_covariances(sem.covariances(law.draw(100, rng)), sem.target))
                run.record(name, "dimension of the moments", rank, seed=seed, covariates=d)
                largest[d] = max(largest[d], rank)
        spans[name] = [*largest.values(), law.family.lift_dimension]
    worst = max(max(span[:-1]) / span[-1] for span in spans.values())
    run.record("any family", "largest dimension of the moments / its bound", worst)
    return spans


def plot_bounds(run: Run, curves: dict[int, list[list[float]]], spans: dict[str, list[int]]) -> None:
    """Measured shares and bounds, over so many environments that every bound says something; dimensions."""
    from locally.plots import PALETTE, canvas

    figure, (axes, right) = canvas(11.0, 5.2, ncols=2, width_ratios=[3, 2])
    many = np.unique(np.geomspace(1, 1e7, 200).astype(int))
    for (d, rows), colour in zip(curves.items(), PALETTE):
        shares = np.array(rows)
        mean = np.where(shares.mean(0) > 0, shares.mean(0), np.nan)
        slope = log_slope(ENVIRONMENTS, shares.mean(0))
        axes.plot(ENVIRONMENTS, mean, "o-", ms=3.5, color=colour, label=f"measured, {d} covariates (slope {slope:.1f})")
        axes.fill_between(ENVIRONMENTS, np.maximum(shares.min(0), 1e-5), shares.max(0), color=colour, alpha=0.15, lw=0)
        split = [finite_class_delta(class_size(d, MAX_SIZE[d]), int(N), ETA) for N in many]
        axes.plot(many, split, "--", lw=1.2, color=colour, label=f"bound for finitely many, {d} covariates")
        everything = vc_dimension(unrestricted_lift_dimension(d))
        delta = [pac_delta(int(N), everything, ETA) for N in many]
        axes.plot(many, delta, ":", lw=1.2, color=colour, label=f"uniform bound, any site, {d} covariates")
    family = InterventionFamily(sites=2, kind="soft", in_degree=2)
    delta = [pac_delta(int(N), family.vc_dimension, ETA) for N in many]
    slope = log_slope((10**5, 10**6, 10**7), np.array([pac_delta(10**e, family.vc_dimension, ETA) for e in (5, 6, 7)]))
    run.record("uniform bound", "slope of log violated share over log environments", slope)
    axes.plot(
        many, delta, "-", lw=1.4, color=PALETTE[7], label=f"uniform bound, 2 sites of in-degree 2 (slope {slope:.2f})"
    )
    axes.set(xscale="log", yscale="log", xlim=(1, 1e7), ylim=(1e-4, 1.5), title="Violated invariance")
    axes.set_xticks(10.0 ** np.arange(8), ["1", "10", "100", "1,000", "10^4", "10^5", "10^6", "10^7"])
    axes.set_yticks([1e-4, 1e-3, 1e-2, 0.1, 1], ["0.0001", "0.001", "0.01", "0.1", "1"])
    axes.minorticks_off()
    axes.set(xlabel="training environments N", ylabel="share of unseen interventions beyond eps")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)

    for (name, span), colour in zip(spans.items(), PALETTE):
        right.plot(SIZES, span[:-1], "o-", ms=4, color=colour, label=name)
        right.axhline(span[-1], ls=":", lw=1.2, color=colour)
    right.set(xlabel="covariates", ylabel="dimension that moments span", xticks=SIZES, ylim=(0, None))
    right.set(title="Dimension that the bounds count")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)
    caption = (
        "Left: share of unseen interventions that break the invariance, mean over random models and band over seeds,"
        " beside bounds at confidence 0.95 (no mark: no violation was seen). Each bound falls like 1/N up to a"
        " logarithm once it says anything; the one that knows number and in-degree of the sites is the same for any"
        " number of covariates. Right: dimension of the moments of 100 environments, largest over the seeds; dotted, in"
        " the same colour, the bound."
    )
    run.figure(figure, "bounds", caption)


# Certificates ---------------------------------------------------------------------------------------------------------


def certificates(run: Run) -> None:
    """What was promised beside what came: shares with a confidence, and extrapolation without one."""
    graphs = run.pick(quick=5, default=40, paper=400)
    worst = 0.0
    for seed in run.track(run.seeds, "certificates"):
        rng = np.random.default_rng([26, seed])
        kept: dict[str, list[bool]] = {"finite-class": [], "held-out": []}
        factors: list[float] = []
        for _ in run.track(range(graphs), "models"):
            world = World.draw(8, rng)
            target = world.sem.target
            model = InvariantSubsetRegressor(EPS, max_size=3, split=True, standardize=False, alpha=ETA)
            model.fit_moments(world.covariances(40), target)
            (truth,) = violated_shares([(model.representation_, model.head_)], world.unseen(1000))
            kept["finite-class"].append(truth <= model.certificate_.finite_class)
            kept["held-out"].append(truth <= model.certify_moments(world.covariances(60), target, eta=ETA).holdout)
            # Extrapolation is promised for every representation, so that any subset may try to break it.
            strong = world.covariances(5, scale=5.0)
            found = model.extrapolation_factors(strong, target)
            unseen = model.moments_.like_covariances(strong, target)
            for _ in range(20):
                Phi, head = random_subset(model.moments_, rng)
                allowed = found * model.moments_.gaps(Phi, head).max()
                gaps = unseen.gaps(Phi, head)
                real = gaps > ROUNDING
                worst = max(worst, float((gaps[real] / allowed[real]).max(initial=0.0)))
            factors += found.tolist()
        for name, held in kept.items():
            run.record(SUBSET, f"share of {name} certificates that hold", float(np.mean(held)), seed=seed)
        run.record(
            SUBSET, "median extrapolation factor under strong interventions", float(np.median(factors)), seed=seed
        )
    run.record("any subset", "largest gap under strong interventions / its certificate", worst)


def random_subset(
    moments: EnvironmentMoments, rng: np.random.Generator
) -> tuple[Float[ndarray, "r d"], Float[ndarray, " r"]]:
    """Some covariates with their pooled least squares, invariant or not."""
    d = moments.features
    Phi = np.eye(d)[rng.choice(d, rng.integers(1, 4), replace=False)]
    S, s, _ = moments.pooled()
    return Phi, np.linalg.solve(Phi @ S @ Phi.T, Phi @ s)


# Strong interventions -------------------------------------------------------------------------------------------------


def strong_interventions(run: Run) -> None:
    """Risks on unseen interventions, as strong as in training and five times as strong; 12 training environments."""
    graphs = run.pick(quick=2, default=24, paper=200)
    table: dict[str, list[list[float]]] = {}
    for seed in run.track(run.seeds, "strong interventions"):
        rng = np.random.default_rng([27, seed])
        risks: dict[str, list[list[float]]] = {}
        for _ in run.track(range(graphs), "models"):
            world = World.draw(8, rng)
            unseen = world.moments(UNSEEN), world.moments(UNSEEN, scale=5.0)
            for method, coef in predictors(world).items():
                same, strong = (moments.risks(coef) for moments in unseen)
                row = [same.mean(), same.max(), strong.mean(), np.quantile(strong, 0.95)]
                risks.setdefault(method, []).append(row)
        medians = {method: np.median(rows, axis=0) for method, rows in risks.items()}
        for method, (mean, largest, strong_mean, tail) in medians.items():
            values = {
                "mean risk": mean,
                "largest risk": largest,
                "mean risk, strong interventions": strong_mean,
                "95 % quantile of risk, strong interventions": tail,
                "95 % quantile of risk / that of pooled least squares, strong interventions": tail / medians[ERM][3],
                "95 % quantile of risk, strong interventions / mean risk": tail / mean,
                "mean risk / that of the true parents": mean / medians[PARENTS][0],
            }
            for metric, value in values.items():
                run.record(method, metric, value, seed=seed)
            table.setdefault(method, []).append([mean, tail])
    plot_risks(run, table)


def predictors(world: World, environments: int = 12, rows: int = 5000) -> dict[str, Predictor]:
    """Coefficients of every method from the same rows, no intercept: all variables have mean zero."""
    d = world.sem.nodes - 1
    factors = np.linalg.cholesky(world.covariances(environments))
    table = np.concatenate([world.rng.standard_normal((rows, d + 1)) @ L.T for L in factors])
    X, y = np.delete(table, world.sem.target, axis=1), table[:, world.sem.target]
    labels = np.repeat(np.arange(environments), rows)
    models = {
        SUBSET: InvariantSubsetRegressor(EPS, max_size=4, standardize=False),
        AUTOMATIC: InvariantSubsetRegressor(max_size=4),
        IRM: InvariantRiskMinimization(1e3),
        ICP: InvariantCausalPrediction(max_size=4),
        ANCHOR: AnchorRegression(10.0),
    }
    found = {ERM: LinearRegression().fit(X, y).coef_}
    found |= {method: model.fit(X, y, labels).coef_ for method, model in models.items()}
    parents = np.searchsorted(world.sem.covariates, world.sem.parents(world.sem.target))
    found[PARENTS] = np.zeros(d)
    found[PARENTS][parents] = LinearRegression().fit(X[:, parents], y).coef_
    return found


def plot_risks(run: Run, table: dict[str, list[list[float]]]) -> None:
    from locally.plots import PALETTE, canvas

    figure, axes = canvas(8.4, 1.6 + 0.42 * len(table))
    for row, rows in enumerate(table.values()):
        for which, (shift, label) in enumerate([(-0.18, "mean, as strong as in training"), (0.18, STRONG)]):
            values = [r[which] for r in rows]
            colour = PALETTE[which]
            axes.barh(row + shift, np.mean(values), height=0.32, color=colour, alpha=0.6, label=None if row else label)
            axes.plot(values, [row + shift] * len(values), "o", ms=3, color=colour)
    axes.set_yticks(range(len(table)), list(table))
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="risk on unseen interventions (squared units of the target)")
    axes.set(title="Risk, median over models", xlim=(0.1, None))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8.5)
    caption = (
        "A dot for each seed. Pooled least squares has the least mean risk on interventions like those it saw and the"
        " largest on stronger ones; the invariant subset keeps its risk, and uses more than the causal parents do."
        " Anchor regression guards against shifts of means, of which there are none here."
    )
    run.figure(figure, "risks", caption)


STRONG = "95 % quantile, five times as strong"


# Indirect observation -------------------------------------------------------------------------------------------------


def mixtures(run: Run) -> None:
    """Eight latent covariates, seen as eight mixtures of them: no subset is invariant, a linear map is."""
    graphs = run.pick(quick=1, default=6, paper=100)
    for seed in run.track(run.seeds, "mixtures"):
        rng = np.random.default_rng([29, seed])
        rows: dict[str, list[list[float]]] = {}
        for _ in run.track(range(graphs), "models"):
            world = World.draw(8, rng)
            seen = LatentObservation(world.sem, rng.standard_normal((8, 8)))
            training = seen.observe(world.covariances(16))
            strong = seen.observe(world.covariances(UNSEEN, scale=5.0))
            same = seen.observe(world.covariances(UNSEEN))
            for method, model in {
                LINEAR: LinearInvariantRepresentation(rank=2, eps=1e-3, restarts=2, random_state=seed),
                "invariant subset of the mixtures": InvariantSubsetRegressor(EPS, max_size=4),
                ERM: InvariantRiskMinimization(penalty=0.0),
            }.items():
                model.fit_moments(training, seen.target)
                risks = [EnvironmentMoments.from_covariances(c, seen.target).risks(model.coef_) for c in (same, strong)]
                rows.setdefault(method, []).append([risks[0].mean(), np.quantile(risks[1], 0.95)])
        medians = {method: np.median(values, axis=0) for method, values in rows.items()}
        for method, (mean, tail) in medians.items():
            run.record(method, "mixed covariates: mean risk", mean, seed=seed)
            run.record(method, "mixed covariates: 95 % quantile of risk, strong interventions", tail, seed=seed)
            ratio = tail / medians[ERM][1]
            run.record(
                method, "mixed covariates: 95 % quantile of risk / that of pooled least squares", ratio, seed=seed
            )


# Patients -------------------------------------------------------------------------------------------------------------


def patients(run: Run) -> None:
    """Disease progression from the other nine measurements, age quartiles as environments, each held out in turn."""
    X, y = load_diabetes(return_X_y=True, scaled=False)
    quartile = np.searchsorted(np.quantile(X[:, 0], [0.25, 0.5, 0.75]), X[:, 0])
    X = X[:, 1:]
    for held in range(4):
        train, test = quartile != held, quartile == held
        labels = quartile[train]
        found = {
            ERM: LinearRegression().fit(X[train], y[train]),
            AUTOMATIC: InvariantSubsetRegressor().fit(X[train], y[train], labels),
            IRM: InvariantRiskMinimization(10.0).fit(X[train], y[train], labels),
            ICP: InvariantCausalPrediction().fit(X[train], y[train], labels),
            ANCHOR: AnchorRegression(10.0).fit(X[train], y[train], labels),
        }
        for method, model in found.items():
            error = float(np.mean((model.predict(X[test]) - y[test]) ** 2) / np.var(y[test]))
            run.record(method, "error / variance, held-out age quartile", error, quartile=held)


# The full-size study --------------------------------------------------------------------------------------------------


FAMILIES = [(k, q) for k in range(1, 5) for q in range(1, 6)]


def families(run: Run, environments: Sequence[int] = (16, 64, 256), models: int = 20) -> None:
    """Violated share over sites and in-degrees, 100 covariates."""
    for seed in run.track(run.seeds, "families"):
        for k, q in run.track(FAMILIES, "sites and in-degrees"):
            rng = np.random.default_rng([30, k, q, seed])
            for N in environments:
                shares = []
                for _ in range(models):
                    world = World.draw(100, rng, in_degree=q, sites=k)
                    found = search_subsets(world.moments(N), 2, EPS)
                    shares += violated_shares([(np.eye(100)[list(found.support)], found.head)], world.unseen())
                share, settings = float(np.mean(shares)), {"sites": k, "in_degree": q, "environments": N}
                run.record(SUBSET, "violated share, 100 covariates", share, seed=seed, **settings)


def proteins(run: Run) -> None:
    """Each protein from the others, the conditions of a flow-cytometry study as environments, each held out in turn."""
    X, conditions, names = read_conditions(run.data("cytometry.csv", "a protein a column, the last: the condition"))
    for target, name in enumerate(run.track(names, "proteins")):
        y, others = X[:, target], np.delete(X, target, axis=1)
        for held in np.unique(conditions):
            train, test = conditions != held, conditions == held
            subset = InvariantSubsetRegressor(max_size=4).fit(others[train], y[train], conditions[train])
            for method, model in {SUBSET: subset, ERM: LinearRegression().fit(others[train], y[train])}.items():
                error = float(np.mean((model.predict(others[test]) - y[test]) ** 2) / np.var(y[train]))
                run.record(method, "error / variance, held-out condition", error, protein=name, condition=str(held))


def read_conditions(path: Path) -> tuple[Float[ndarray, "n d"], ndarray, list[str]]:
    """A CSV table with a header: one numeric column a variable, the last column the label of the condition."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2 or len(rows[0]) < 3 or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"{path} must have a header and rows of the same three columns or more")
    values = np.array([[float(cell) for cell in row[:-1]] for row in rows[1:]])
    return values, np.array([row[-1] for row in rows[1:]]), rows[0][:-1]
