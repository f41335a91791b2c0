"""Projection errors of dictionaries on five physics problems, and the criterion's forecast beside what came of it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.cluster import KMeans
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from locally.evidence import Run
from locally.subspaces.local_bases import KMedoids, LocalReducedBases, SnapshotSet, efficiency_criterion
from locally.subspaces.local_bases.criterion import CONFUSIONS, coordinates_of
from locally.subspaces.local_bases.dissimilarity import dissimilarities
from locally.subspaces.local_bases.finite_elements import heated_plate
from locally.subspaces.local_bases.partitions import projection_error_clusters
from locally.subspaces.local_bases.problems import PROBLEMS, simulate

OURS = "sine k-medoids"
CLASSIC = ("global POD", "k-means on parameters", "k-means on snapshots", "L2 k-medoids")
INFORMED = "k-means on parameters, amplitude left out"
PEBL = "projection-error clustering"
CRITERION = "a priori efficiency criterion"
SCALED = ("Poisson", "advection-diffusion", "Helmholtz")  # amplitudes over decades, and sources, winds, waves that turn


@dataclass(frozen=True)
class Setting:
    """How many bases, and the two numbers of modes at which errors are compared."""

    n_clusters: int
    few: int
    many: int


SETTINGS = {name: Setting(6, 3, 6) for name in PROBLEMS} | {
    "Burgers": Setting(4, 5, 10),
    "nonlinear diffusion": Setting(6, 2, 4),
}
PLATE = Setting(6, 3, 6)


@dataclass(frozen=True)
class Study:
    """train, test: simulations; clusters, modes: grid of the criterion; rings: sizes of the finite-element meshes."""

    train: int
    test: int
    clusters: tuple[int, ...] = (2, 4, 8, 20)
    modes: int = 4
    rings: tuple[int, ...] = ()


def experiment(run: Run) -> None:
    study = run.pick(
        quick=Study(train=200, test=100),
        default=Study(train=200, test=100),
        paper=Study(train=1000, test=500, rings=(16, 50, 158)),  # 1024 to about 100,000 unknowns
    )
    # five problems take longer than a quick run may; the criterion is studied on the first
    problems = run.pick(quick=("Poisson",), default=tuple(PROBLEMS), paper=tuple(PROBLEMS))
    carry_out(run, study, problems)


def carry_out(run: Run, study: Study, problems: tuple[str, ...]) -> None:
    found = run.parallel(partial(one_seed, study=study, problems=problems), run.seeds, "seeds")
    if len(problems) > 1:
        plot_errors(run, {name: [errors[name] for errors in found] for name in problems})
    plot_criterion(run, study)


def one_seed(run: Run, seed: int, study: Study, problems: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Errors of every method on every problem."""
    # thousands of factorisations of small matrices: a second thread would mostly wait for the first
    with threadpool_limits(limits=run.pick(quick=1, default=1, paper=None)):
        errors = {}
        for name in run.track(problems, "problems"):
            case = draw(name, study, seed)
            errors[name] = compare(run, case, SETTINGS[name], seed)
            if name == "Poisson":
                study_criterion(run, case, study, seed)
        if set(problems) == set(PROBLEMS):
            summarise(run, errors, seed)
        for case in finite_element_cases(run, study, seed):
            error = compare(run, case, PLATE, seed)
            ratio = error[OURS] / error["k-means on snapshots"]
            metric = "error / that of k-means on snapshots, finite-element data"
            run.record(OURS, metric, ratio, seed=seed, unknowns=case.train.n_dof)
    return errors


# Cases ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    train: SnapshotSet
    test: SnapshotSet
    train_parameters: Float[ndarray, "train d"]  # that change the shape of the solution
    test_parameters: Float[ndarray, "test d"]
    train_amplitude: Float[ndarray, " train"] | None = None  # that only scales it
    test_amplitude: Float[ndarray, " test"] | None = None

    def every_parameter(self) -> tuple[Float[ndarray, "train e"], Float[ndarray, "test e"]]:
        if self.train_amplitude is None or self.test_amplitude is None:
            return self.train_parameters, self.test_parameters
        return (
            np.column_stack([self.train_parameters, self.train_amplitude]),
            np.column_stack([self.test_parameters, self.test_amplitude]),
        )


def draw(name: str, study: Study, seed: int) -> Case:
    rng = np.random.default_rng([seed, list(PROBLEMS).index(name)])
    found = simulate(name, study.train + study.test, rng)
    return split(name, found.snapshots, found.parameters, found.amplitude, study.train)


def split(
    name: str,
    snapshots: Any,
    parameters: Float[ndarray, "n d"],
    amplitude: Float[ndarray, " n"] | None,
    train: int,
    product: Any = None,
) -> Case:
    first = SnapshotSet(snapshots[:train], product)
    both = first, SnapshotSet(snapshots[train:], first.product)
    amplitudes = (None, None) if amplitude is None else (amplitude[:train], amplitude[train:])
    return Case(name, *both, parameters[:train], parameters[train:], *amplitudes)


def finite_element_cases(run: Run, study: Study, seed: int) -> Iterator[Case]:
    """The heated plate at every size, and whatever simulations the user's data folder holds."""
    for rings in run.track(study.rings, "finite elements"):
        path = run.scratch / f"plate-{rings}-{seed}.npy"
        stored = heated_plate(study.train + study.test, rings, np.random.default_rng([seed, rings]), path)
        snapshots = np.load(stored.snapshots, mmap_mode="r", allow_pickle=False)
        name = f"plate, {snapshots.shape[1]} unknowns"
        yield split(name, snapshots, stored.parameters, stored.amplitude, study.train, stored.product)
        del snapshots
        path.unlink()
    if study.rings and run.data_folder is not None:
        yield stored_case(run, seed)


def stored_case(run: Run, seed: int) -> Case:
    """rom-net/snapshots.npy (n, n_dof) or (n, n_dof, t), parameters.npy (n, d), mass.npz where the product is not 1.

    A third of the simulations, drawn by the seed, is the test set.
    """
    path = run.data("rom-net/snapshots.npy", "solutions of n simulations, shape (n, n_dof) or (n, n_dof, t)")
    parameters = np.load(run.data("rom-net/parameters.npy", "their parameters, shape (n, d)"), allow_pickle=False)
    mass: Path = path.with_name("mass.npz")
    snapshots = np.load(path, mmap_mode="r", allow_pickle=False)
    order = np.random.default_rng(seed).permutation(len(snapshots))
    cut = 2 * len(order) // 3
    product = sp.load_npz(mass) if mass.exists() else None
    train, test = np.sort(order[:cut]), np.sort(order[cut:])
    first = SnapshotSet(snapshots[train], product)
    return Case("own data", first, SnapshotSet(snapshots[test], first.product), parameters[train], parameters[test])


# Dictionaries ---------------------------------------------------------------------------------------------------------


def compare(run: Run, case: Case, setting: Setting, seed: int) -> dict[str, float]:
    """Mean test error of every dictionary at the larger number of modes, with the best basis for each simulation."""
    angles = dissimilarities("sine", case.train)
    means: dict[str, float] = {}
    for method, labels in partitions(case, setting, angles, seed).items():
        K = int(labels.max()) + 1
        dictionary = LocalReducedBases(K, setting.many, dissimilarity="precomputed")
        # a classifier sees what the clusters depend on: not the amplitude, where they are blind to it
        blind = method in (OURS, PEBL, INFORMED)
        seen, new = (case.train_parameters, case.test_parameters) if blind else case.every_parameter()
        with few_members():
            dictionary.fit(case.train, seen, labels=labels, D=angles)
        for modes in (setting.few, setting.many):
            errors = dictionary.errors(case.test, modes)
            record = partial(run.record, method, seed=seed, problem=case.name, modes=modes)
            best = errors.min(axis=1)
            record("mean projection error", best.mean())
            record("median projection error", np.median(best))
            if K > 1:
                predicted = dictionary.predict(new)
                chosen = errors[np.arange(len(errors)), predicted]
                others = (errors.sum(axis=1) - best) / (K - 1)
                record("mean projection error, basis by classifier", chosen.mean())
                record("mean projection error, wrong basis", others.mean())
        means[method] = float(best.mean())
    return means


def partitions(
    case: Case, setting: Setting, angles: Float[ndarray, "n n"], seed: int
) -> dict[str, Int[ndarray, " train"]]:
    """Labels of the training simulations by every method."""
    K, train = setting.n_clusters, case.train
    medoids = lambda D: KMedoids(K, random_state=seed).fit(D).labels_
    means = lambda X: KMeans(K, n_init=10, random_state=seed).fit(X).labels_
    # isometric to the snapshots in their inner product, with their amplitudes
    rows = coordinates_of(train) * np.repeat(train.norms, train.widths)[:, None]
    by_snapshots = means(rows.reshape(train.n, -1))
    standardised = lambda parameters: StandardScaler().fit_transform(parameters)
    informed = {} if case.train_amplitude is None else {INFORMED: means(standardised(case.train_parameters))}
    return informed | {
        "global POD": np.zeros(train.n, dtype=np.int64),
        "k-means on parameters": means(standardised(case.every_parameter()[0])),
        "k-means on snapshots": by_snapshots,
        "L2 k-medoids": medoids(dissimilarities("euclidean", train)),
        PEBL: compact(
            projection_error_clusters(
                train, K, setting.many, start=by_snapshots, n_init=2, random_state=seed
            ).labels
        ),
        OURS: medoids(angles),
    }  # fmt: skip


def compact(labels: Int[ndarray, " n"]) -> Int[ndarray, " n"]:
    return np.unique(labels, return_inverse=True)[1]


@contextmanager
def few_members() -> Iterator[None]:
    """Clusters may be smaller than their bases would like here: the test errors show what that costs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "clusters .* have at most twice as many simulations", UserWarning)
        yield


def summarise(run: Run, errors: dict[str, dict[str, float]], seed: int) -> None:
    """The quantities of the claims, at the larger number of modes."""
    won = sum(by[OURS] < min(by[other] for other in CLASSIC) for by in errors.values())
    run.record(OURS, "problems with the smallest error, out of 5", won, seed=seed)
    ratios = {name: by[OURS] / by["k-means on snapshots"] for name, by in errors.items()}
    metric = "largest error / that of k-means on snapshots, three scaled problems"
    run.record(OURS, metric, max(ratios[name] for name in SCALED), seed=seed)
    run.record(OURS, "error / that of k-means on snapshots, Burgers", ratios["Burgers"], seed=seed)
    for name, by in errors.items():
        run.record(OURS, f"error / that of {PEBL}", by[OURS] / by[PEBL], seed=seed, problem=name)
        if INFORMED in by:
            run.record(OURS, f"error / that of {INFORMED}", by[OURS] / by[INFORMED], seed=seed, problem=name)


# The criterion --------------------------------------------------------------------------------------------------------


def study_criterion(run: Run, case: Case, study: Study, seed: int) -> None:
    """What the criterion expects from the training simulations, and what the ROM-net then does on new ones."""
    N = study.modes
    measured, beaten = [], []
    whole = LocalReducedBases(1, N).fit(case.train)
    e_global = whole.errors(case.test).mean()
    for K in study.clusters:
        dictionary = LocalReducedBases(K, N, random_state=seed)
        with few_members():
            dictionary.fit(case.train, case.train_parameters)
        measured.append(dictionary.projection_error(case.test, "predicted", case.test_parameters).mean())
        beaten.append(measured[-1] < e_global)
        run.record("ROM-net", "error over clusters", measured[-1], seed=seed, clusters=K)
        run.record("global POD", "error over clusters", e_global, seed=seed, clusters=K)
    forecast = efficiency_criterion(case.train, study.clusters, [N], case.train_parameters, random_state=seed)
    for confusion in CONFUSIONS:
        table = forecast.under(confusion)
        expected = [row.expected_error() for row in table.rows]
        # the plain criterion takes any wrong basis for equally likely; the claims are about that one
        name = CRITERION if confusion == "uniform" else f"{CRITERION}, {confusion} confusion"
        run.record(name, "pairs in the wrong order", wrong_pairs(expected, measured), seed=seed)
        wrong = sum(row.relevant != better for row, better in zip(table.rows, beaten))
        run.record(name, "wrong forecasts of which is better, dictionary or global basis", wrong, seed=seed)
        for row in table.rows:
            record = partial(run.record, name, seed=seed, clusters=row.n_clusters)
            record("error over clusters", row.expected_error())
            record("required accuracy", row.required_accuracy)
            record("cross-validated accuracy", row.accuracy)


def wrong_pairs(expected: list[float], measured: list[float]) -> int:
    """Pairs that the expected errors put in another order than the measured ones.

    >>> wrong_pairs([3.0, 2.0, 1.0], [3.0, 1.0, 2.0])
    1
    """
    a, b = (np.sign(np.subtract.outer(v, v)) for v in (expected, measured))
    return int((a != b).sum()) // 2


# Figures --------------------------------------------------------------------------------------------------------------

ERRORS_CAPTION = (
    "Mean relative projection error on test simulations at the larger number of modes, best basis for each; a dot for"
    " each seed. Projection-error clustering lowers this very error on the training set."
)
CRITERION_CAPTION = (
    "Poisson problem, four modes: error that the criterion expects from the training simulations, with any wrong basis"
    " equally likely, as the cross-validated classifier confuses them, or that of the nearest medoid, and the error of"
    " the ROM-net on new simulations; mean over seeds, band from the lowest to the highest."
)


def plot_errors(run: Run, errors: dict[str, list[dict[str, float]]]) -> None:
    from locally.plots import INK, PALETTE, canvas

    methods = [*CLASSIC, INFORMED, PEBL, OURS]
    figure, axes = canvas(2.6 + 1.5 * len(errors), 4.2)
    width = 0.8 / len(methods)
    for m, method in enumerate(methods):
        at = np.arange(len(errors)) + (m - (len(methods) - 1) / 2) * width
        values = np.array([[by.get(method, np.nan) for by in seeds] for seeds in errors.values()])
        colour = PALETTE[0] if method == OURS else PALETTE[m + 1]
        axes.bar(at, values.mean(axis=1), width, color=colour, alpha=0.6, label=method)
        axes.plot(np.repeat(at, values.shape[1]), values.ravel(), "o", color=colour, markersize=2.5)
    axes.set(yscale="log", ylabel="mean projection error")
    axes.set_xticks(np.arange(len(errors)), [f"{n}\n{SETTINGS[n].many} modes" for n in errors])
    axes.grid(False, axis="x")
    figure.legend(loc="outside upper center", ncols=3, labelcolor=INK, fontsize=8.5)
    run.figure(figure, "projection-errors", ERRORS_CAPTION)


def plot_criterion(run: Run, study: Study) -> None:
    from locally.plots import canvas

    figure, axes = canvas(6.4, 4.0)
    shown = {
        "ROM-net": "ROM-net, measured",
        CRITERION: "expected, any confusion equally likely",
        f"{CRITERION}, classifier confusion": "expected, confusion as cross-validated",
        f"{CRITERION}, nearest confusion": "expected, confusion with the nearest medoid",
        "global POD": "global POD, measured",
    }
    for method, label in shown.items():
        values = np.array([
            [m.value for m in run.measures
             if (m.method, m.metric) == (method, "error over clusters") and m.setting["clusters"] == K]
            for K in study.clusters
        ])  # fmt: skip
        (line,) = axes.plot(study.clusters, values.mean(axis=1), "o-", markersize=3.5, label=label)
        band = values.min(axis=1), values.max(axis=1)
        axes.fill_between(study.clusters, *band, color=line.get_color(), alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="clusters", ylabel="mean projection error", title="Poisson, 4 modes")
    axes.set_xticks(study.clusters, [str(K) for K in study.clusters])
    axes.minorticks_off()
    axes.legend(fontsize=8.5)
    run.figure(figure, "criterion", CRITERION_CAPTION)
