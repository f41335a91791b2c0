"""Is a dictionary worth it? An answer from the training simulations alone, before a classifier or a local ROM is built.

With mean relative errors e_in on the own basis, e_out on a wrong one and e_global on one global basis of the same
dimension, a classifier of accuracy a gives the expected error e(a) = a e_in + (1 - a) e_out, and the dictionary beats
the global basis once a exceeds

    a* = (e_out - e_global) / (e_out - e_in).

Errors on the own and on the global basis are measured on simulations that were left out of it. Source: arXiv
2103.13683, a priori efficiency criterion; the formula above is our statement of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.utils import check_random_state

from locally.checks import check_choice, check_count, check_nonnegative, check_positive
from locally.subspaces.local_bases.dictionary import make_classifier
from locally.subspaces.local_bases.dissimilarity import dissimilarities
from locally.subspaces.local_bases.medoids import KMedoids, RandomState, check_clusters
from locally.subspaces.local_bases.pod import pod
from locally.subspaces.local_bases.products import Product
from locally.subspaces.local_bases.snapshots import MEMORY_LIMIT, Snapshots, SnapshotSet, snapshot_set

CONFUSIONS = ("uniform", "nearest", "classifier")


def required_accuracy(e_in: float, e_out: float, e_global: float) -> float:
    """a*, the accuracy at which the dictionary's expected error equals that of the global basis.

    Below 0 even a classifier that is always wrong will do, above 1 none is good enough; NaN where the basis makes no
    difference (e_in = e_out, or a single cluster).

    >>> round(required_accuracy(0.1, 0.7, 0.4), 12)
    0.5
    """
    for name, value in {"e_in": e_in, "e_out": e_out, "e_global": e_global}.items():
        if not math.isnan(value):
            check_nonnegative(name, value)
    return math.nan if math.isnan(e_out) or e_out == e_in else (e_out - e_global) / (e_out - e_in)


@dataclass(frozen=True)
class Efficiency:
    """The criterion for one dictionary: n_clusters bases of n_modes modes from n_simulations simulations.

    Attributes:
        e_in, e_global: mean relative errors on the own and on the global basis.
        e_out_by: mean relative error on a wrong basis, for each way to say which: "uniform" the mean over all others,
            "nearest" that of the nearest other medoid, with which a classifier is likeliest to confuse the own,
            "classifier" as the cross-validated classifier confuses them, uniform where it never does.
        confusion: which of them `e_out` is.
        accuracy: cross-validated accuracy of the classifier; NaN without parameters.
        smallest_cluster: simulations in it; at most 2 n_modes is too few to trust.
        offline_cost: of the budget, NaN without one.
    """

    n_clusters: int
    n_modes: int
    n_simulations: int
    e_in: float
    e_out_by: Mapping[str, float]
    e_global: float
    accuracy: float
    smallest_cluster: int
    offline_cost: float = math.nan
    confusion: str = "uniform"

    @property
    def e_out(self) -> float:
        """Mean relative error on a wrong basis, as `confusion` says which."""
        return self.e_out_by[self.confusion]

    @property
    def required_accuracy(self) -> float:
        """The accuracy from which local bases beat the global one; see `required_accuracy`."""
        return required_accuracy(self.e_in, self.e_out, self.e_global)

    def expected_error(self, accuracy: float | None = None) -> float:
        """e(a) at this accuracy, by default the classifier's."""
        a = self.accuracy if accuracy is None else accuracy
        return self.e_in if math.isnan(self.e_out) else a * self.e_in + (1 - a) * self.e_out

    @property
    def gain(self) -> float:
        """1 - e(accuracy) / e_global: the share of the global basis' error that is saved."""
        return 1 - self.expected_error() / self.e_global if self.e_global > 0 else math.nan

    @property
    def relevant(self) -> bool:
        """Whether the dictionary is expected to beat the global basis."""
        return self.e_in < self.e_global and self.required_accuracy < self.accuracy

    def to_dict(self) -> dict[str, Any]:
        """Its fields and what follows from them, as plain numbers."""
        return asdict(self) | {
            "e_out": self.e_out,
            "required_accuracy": self.required_accuracy,
            "expected_error": self.expected_error(),
            "gain": self.gain,
            "relevant": self.relevant,
        }


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the offline stage may cost: n simulations, K reduced models of N modes, labels of extra cheap simulations.

    Attributes:
        total: in the unit of the costs, such as core hours.
        simulation: of one full simulation.
        reduced_model: of building one local ROM of N modes.
        label, n_labels: of one label for the classifier beyond the simulations, and how many are bought.
    """

    total: float
    simulation: float
    reduced_model: Callable[[int], float]
    label: float = 0.0
    n_labels: int = 0

    def __post_init__(self) -> None:
        check_positive("total", self.total)
        check_nonnegative("simulation", self.simulation)
        check_nonnegative("label", self.label)
        check_count("n_labels", self.n_labels, at_least=0)

    def cost(self, n_clusters: int, n_modes: int, n_simulations: int) -> float:
        """Cost of that many clusters of that many modes from that many simulations, in the unit of `total`."""
        models = n_clusters * float(self.reduced_model(n_modes))
        return n_simulations * self.simulation + models + self.n_labels * self.label


@dataclass(frozen=True)
class EfficiencyTable:
    """Every dictionary that was asked about; `best` is one row of it, never the only answer."""

    rows: tuple[Efficiency, ...]
    budget: Budget | None = None

    def best(self, *, trusted: bool = True) -> Efficiency | None:
        """The row of least expected error within the budget, None where nothing is affordable.

        trusted: only rows whose smallest cluster has more than twice as many simulations as modes.
        """
        affordable = [r for r in self.rows if self.budget is None or r.offline_cost <= self.budget.total]
        if trusted:
            affordable = [r for r in affordable if r.smallest_cluster > 2 * r.n_modes]
        known = [r for r in affordable if not math.isnan(r.expected_error())]
        return min(known, key=Efficiency.expected_error, default=None)

    def under(self, confusion: str) -> "EfficiencyTable":
        """The same table with another kind of wrong basis as e_out."""
        check_choice("confusion", confusion, CONFUSIONS)
        return replace(self, rows=tuple(replace(row, confusion=confusion) for row in self.rows))

    def dimensions(self, error: float) -> dict[int, tuple[int | None, int | None]]:
        """K -> (N of the local bases, N of the global basis): the least in the table whose mean error is at most
        `error`, with the right basis; None where none is. Online solves are faster by about (N_global/N_local)^p,
        p from 1 to 3.
        """
        check_positive("error", error)
        found = {}
        for K in sorted({r.n_clusters for r in self.rows}):
            rows = sorted((r for r in self.rows if r.n_clusters == K), key=lambda r: r.n_modes)
            local = next((r.n_modes for r in rows if r.e_in <= error), None)
            found[K] = local, next((r.n_modes for r in rows if r.e_global <= error), None)
        return found

    def __str__(self) -> str:
        head = (
            f"{'K':>3} {'N':>3} {'n':>5} {'e_in':>9} {'e_out':>9} {'e_global':>9} {'a*':>7} {'accuracy':>8} {'gain':>6}"
        )
        line = "{:>3} {:>3} {:>5} {:>9.3g} {:>9.3g} {:>9.3g} {:>7.3f} {:>8.3f} {:>6.3f}".format
        return "\n".join([head] + [
            line(r.n_clusters, r.n_modes, r.n_simulations, r.e_in, r.e_out, r.e_global, r.required_accuracy,
                 r.accuracy, r.gain)
            for r in self.rows
        ])  # fmt: skip


def efficiency_criterion(
    snapshots: Snapshots,
    n_clusters: Sequence[int],
    n_modes: Sequence[int],
    parameters: Any = None,
    *,
    n_simulations: Sequence[int] | None = None,
    classifier: Any = None,
    confusion: Literal["uniform", "nearest", "classifier"] = "uniform",
    dissimilarity: str = "sine",
    product: Product = None,
    folds: int = 50,
    cv: int = 5,
    budget: Budget | None = None,
    memory_limit: int = MEMORY_LIMIT,
    random_state: RandomState = None,
    callback: Callable[[str, float], None] | None = None,
) -> EfficiencyTable:
    """The criterion for a grid of dictionaries.

    Args:
        snapshots, product, memory_limit: see `SnapshotSet`.
        n_clusters, n_modes: the grid of K and N.
        parameters: (n, d) for the cross-validated accuracy; without them it is NaN.
        n_simulations: sizes of the training set to compare, random nested subsets; default all.
        classifier, dissimilarity: see `LocalReducedBases`.
        confusion: which wrong basis stands for e_out, "uniform", "nearest" or "classifier": see `Efficiency`.
        folds: simulations are left out one by one where a group has at most so many, else in so many parts.
        cv: folds of the classifier's cross-validation.
        callback: called as callback(stage, fraction).

    After one reduction to coordinates of dimension r <= number of snapshots (O(n_dof r^2)), the whole grid costs
    O(folds r^3) and does not depend on n_dof. Left-out bases come from Gram matrices: errors below 1e-7 are rounding.

    >>> rng = np.random.default_rng(0)
    >>> angle = rng.uniform(0, 2 * np.pi, 60)
    >>> grid = np.linspace(0, 2 * np.pi, 100)
    >>> S = rng.choice([-5, 1], (60, 1)) * np.exp(8 * np.cos(grid - angle[:, None]))
    >>> where = np.column_stack([np.cos(angle), np.sin(angle)])
    >>> row = efficiency_criterion(S, [4], [2], where, random_state=0).rows[0]
    >>> row.relevant, bool(row.e_in < 0.5 * row.e_global)
    (True, True)
    """
    check_choice("confusion", confusion, CONFUSIONS)
    check_count("folds", folds, at_least=2)
    check_count("cv", cv, at_least=2)
    if confusion == "classifier" and parameters is None:
        raise ValueError('parameters must be given for confusion="classifier"')
    full = snapshot_set(snapshots, product, memory_limit)
    sizes = [full.n] if n_simulations is None else list(n_simulations)
    for K in n_clusters:
        check_clusters(K, min(sizes))
    for N in n_modes:
        check_count("n_modes", N)
    if max(sizes) > full.n:
        raise ValueError(f"n_simulations must not exceed the {full.n} simulations given, got {max(sizes)}")
    table = None if parameters is None else np.asarray(parameters, dtype=np.float64).reshape(full.n, -1)
    rng = check_random_state(random_state)
    order = rng.permutation(full.n)
    coordinates = coordinates_of(full)
    rows = []
    for s, size in enumerate(sizes):
        chosen = np.sort(order[:size])
        study = _Study(full, coordinates, chosen, table, np.asarray(n_modes), folds, cv, classifier, rng)
        if callback is not None:
            callback("global basis", s / len(sizes))
        D = study.dissimilarities(dissimilarity)
        e_global = study.left_out(np.arange(size)).mean(axis=0)
        for c, K in enumerate(n_clusters):
            if callback is not None:
                callback(f"{K} clusters", (s + (c + 1) / (len(n_clusters) + 1)) / len(sizes))
            e_in, e_out, accuracy, smallest = study.errors(int(K), D)
            for i, N in enumerate(n_modes):
                cost = math.nan if budget is None else budget.cost(K, N, size)
                wrong = {kind: float(e.mean(axis=0)[i]) for kind, e in e_out.items()}
                means = float(e_in[:, i].mean()), wrong, float(e_global[i])
                rows.append(Efficiency(int(K), int(N), size, *means, accuracy, smallest, cost, confusion))
    return EfficiencyTable(tuple(rows), budget)


def coordinates_of(simulations: SnapshotSet) -> Float[ndarray, "snapshots r"]:
    """Coordinates of all (unit) snapshots in an orthonormal basis of their span: same angles, same errors, no n_dof."""
    if simulations.fits_in_memory:
        rows = simulations.unit()
        return (
            rows
            if rows.shape[1] <= rows.shape[0]
            else scipy.linalg.qr(rows.T, mode="r", check_finite=False)[0][: len(rows)].T
        )
    G = np.empty((simulations.columns, simulations.columns))
    for i in simulations.blocks():
        left, a = simulations.unit(i), simulations.rows_of(i)
        for j in simulations.blocks(np.arange(i[0], simulations.n)):
            b = simulations.rows_of(j)
            G[np.ix_(a, b)] = left @ simulations.unit(j).T
            G[np.ix_(b, a)] = G[np.ix_(a, b)].T
    values, vectors = np.linalg.eigh(G)
    kept = values > 1e-14 * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


@dataclass(frozen=True)
class _Study:
    """One training set in coordinates."""

    full: SnapshotSet
    coordinates: Float[ndarray, "snapshots r"]
    chosen: Int[ndarray, " n"]
    parameters: Float[ndarray, "all d"] | None
    n_modes: Int[ndarray, " grid"]
    folds: int
    cv: int
    classifier: Any
    rng: np.random.RandomState

    def rows(self, group: Int[ndarray, " g"]) -> Float[ndarray, "rows r"]:
        return self.coordinates[self.full.rows_of(self.chosen[group])]

    def left_out(self, group: Int[ndarray, " g"]) -> Float[ndarray, "g grid"]:
        """Errors of the simulations of a group on bases of the others in it; 1 where there is no other."""
        errors = np.ones((group.size, self.n_modes.size))
        if group.size == 1:
            return errors
        rows = self.rows(group)
        if rows.shape[1] > rows.shape[0]:
            rows = scipy.linalg.qr(rows.T, mode="r", check_finite=False)[0][: len(rows)].T
        of = np.repeat(np.arange(group.size), self.full.widths[self.chosen[group]])
        G = rows.T @ rows
        last = len(G) - 1
        most = min(int(self.n_modes.max()), last + 1)
        parts = min(self.folds, group.size)
        fold = np.arange(group.size) if parts == group.size else self.rng.permutation(group.size) % parts
        for part in range(parts):
            out = rows[fold[of] == part]
            left = G - out.T @ out  # the Gram matrix of the others
            values, modes = scipy.linalg.eigh(left, subset_by_index=[last - most + 1, last], check_finite=False)
            modes = modes[:, values > 1e-14 * values[-1]][:, ::-1]
            errors[fold == part] = self.left(out, modes, self.full.widths[self.chosen[group[fold == part]]])
        return errors

    def on_basis(self, train: Int[ndarray, " g"], test: Int[ndarray, " t"]) -> Float[ndarray, "t grid"]:
        """Errors of simulations on the POD bases of others, for every N of the grid by one SVD."""
        modes = pod(self.rows(train), int(self.n_modes.max()))[0].T
        return self.left(self.rows(test), modes, self.full.widths[self.chosen[test]])

    def left(
        self, rows: Float[ndarray, "rows r"], modes: Float[ndarray, "r most"], widths: Int[ndarray, " t"]
    ) -> Float[ndarray, "t grid"]:
        """What the first N modes leave of simulations with so many rows each, for every N of the grid."""
        coefficients = rows @ modes
        outside = ((rows - coefficients @ modes.T) ** 2).sum(axis=1)
        tails = np.cumsum((coefficients**2)[:, ::-1], axis=1)[:, ::-1]
        tails = np.column_stack([tails, np.zeros(len(rows))]) + outside[:, None]
        kept = tails[:, np.minimum(self.n_modes, modes.shape[1])]
        return np.sqrt(np.add.reduceat(kept, np.cumsum(widths) - widths, axis=0))

    def errors(self, K: int, D: Float[ndarray, "n n"]) -> tuple[ndarray, dict[str, ndarray], float, int]:
        """(e_in, e_out by confusion) of each simulation and N; accuracy of the classifier; the smallest cluster."""
        n = self.chosen.size
        found = KMedoids(K, random_state=self.rng).fit(D)
        labels, medoids = found.labels_, found.medoid_indices_
        groups = [np.flatnonzero(labels == k) for k in range(K)]
        on = np.empty((n, K, self.n_modes.size))
        for k, group in enumerate(groups):
            on[:, k] = self.on_basis(group, np.arange(n))
            on[group, k] = self.left_out(group)
        predicted = self.cross_validated(labels)
        accuracy = math.nan if predicted is None else float((predicted == labels).mean())
        e_in = on[np.arange(n), labels]
        if K == 1:
            return e_in, dict.fromkeys(CONFUSIONS, np.full_like(e_in, np.nan)), accuracy, n
        weights = confusions(labels, D[:, medoids], predicted)
        e_out = {kind: np.einsum("nk,nkm->nm", w, on) for kind, w in weights.items()}
        return e_in, e_out, accuracy, min(g.size for g in groups)

    def dissimilarities(self, name: str) -> Float[ndarray, "n n"]:
        """Of the simulations with their own amplitudes, which Euclidean distances see."""
        pieces = (self.rows(np.array([i])).T * self.full.norms[self.chosen[i]] for i in range(self.chosen.size))
        return dissimilarities(name, SnapshotSet(list(pieces)))

    def cross_validated(self, labels: Int[ndarray, " n"]) -> Int[ndarray, " n"] | None:
        if self.parameters is None:
            return None
        if np.unique(labels).size == 1:
            return labels
        folds = KFold(min(self.cv, labels.size), shuffle=True, random_state=self.rng)
        smallest_training_set = labels.size - -(-labels.size // folds.n_splits)
        model = make_classifier(self.classifier, smallest_training_set)
        return cross_val_predict(model, self.parameters[self.chosen], labels, cv=folds)


def confusions(
    labels: Int[ndarray, " n"], to_medoids: Float[ndarray, "n k"], predicted: Int[ndarray, " n"] | None
) -> dict[str, Float[ndarray, "n k"]]:
    """Weights of the wrong bases for each simulation: zero on its own, sum 1."""
    K = to_medoids.shape[1]
    own = labels[:, None] == np.arange(K)
    uniform = np.where(own, 0, 1 / (K - 1))
    nearest = np.eye(K)[np.where(own, np.inf, to_medoids).argmin(axis=1)]
    weights = {"uniform": uniform, "nearest": nearest, "classifier": np.full_like(uniform, np.nan)}
    if predicted is not None:
        counts = np.zeros((K, K))
        np.add.at(counts, (labels, predicted), 1)
        np.fill_diagonal(counts, 0)
        total = counts.sum(axis=1, keepdims=True)
        weights["classifier"] = np.where(total[labels] > 0, counts[labels] / np.maximum(total[labels], 1), uniform)
    return weights
