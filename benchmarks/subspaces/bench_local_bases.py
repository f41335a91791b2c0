"""k-medoids beside the kmedoids package, dissimilarities beside a loop over pairs, POD beside pyMOR's, growth in n."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
from scipy.linalg import subspace_angles

from benchmarks.harness import Comparison, compare, growth, seconds
from locally.subspaces.local_bases import LocalReducedBases, efficiency_criterion, k_medoids, pod, sine_dissimilarity
from locally.subspaces.local_bases.problems import simulate


def main() -> list[Comparison]:
    return [*medoids(), *dissimilarities(), *bases(), *dictionary(), *growths()]


def distances(n: int) -> np.ndarray:
    X = np.random.default_rng(0).standard_normal((n, 10))
    return np.sqrt(np.maximum((X**2).sum(1)[:, None] + (X**2).sum(1) - 2 * X @ X.T, 0))


def medoids() -> list[Comparison]:
    """FasterPAM from the same random start: the same exchanges, so the costs must agree."""
    if find_spec("kmedoids") is None:
        print("kmedoids is left out: the package is not installed")
        return []
    import kmedoids

    results = []
    for n, k in ((1000, 10), (4000, 20), (4000, 100)):
        D = distances(n)
        start = np.random.default_rng(1).choice(n, k, replace=False)
        ours = lambda D=D, start=start: k_medoids(D, start)
        theirs = lambda D=D, start=start: kmedoids.fasterpam(D, start.astype(np.uint64), n_cpu=1)
        name = f"k-medoids, {n} points, {k} clusters"
        results.append(compare(name, ("k_medoids", ours), ("kmedoids.fasterpam", theirs)))
        ratio = ours().cost / theirs().loss
        results.append(Comparison(name, "cost", ratio, ratio, ratio, "k_medoids", "kmedoids.fasterpam"))
    return results


def dissimilarities() -> list[Comparison]:
    """Chordal distances of trajectories' spans; the loop is what one writes with SciPy, on a sample of its pairs."""
    n, m, n_dof = 200, 4, 20_000
    U = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n_dof, m)))[0]
    pairs = [(i, j) for i in range(0, n, 20) for j in range(i)]

    def loop() -> None:
        for i, j in pairs:
            np.sqrt((np.sin(subspace_angles(U[i], U[j])) ** 2).mean())

    name = f"dissimilarities, {n} spans of {m} modes, {n_dof} unknowns"
    whole = n * (n - 1) / 2 / len(pairs)
    ratios = [seconds(lambda: sine_dissimilarity(U, n_modes=None, tol=0.0)) / (whole * seconds(loop)) for _ in range(3)]
    spread = float(np.median(ratios)), min(ratios), max(ratios)
    peer = "loop over scipy.linalg.subspace_angles"
    return [Comparison(name, "time, PODs of all simulations included", *spread, "sine_dissimilarity", peer)]


def bases() -> list[Comparison]:
    rng = np.random.default_rng(0)
    n, n_dof, N = 200, 50_000, 10
    A = (rng.standard_normal((n, 60)) * np.geomspace(1, 1e-6, 60)) @ rng.standard_normal((60, n_dof))
    name = f"POD, {n} snapshots of {n_dof} unknowns, {N} modes"
    ours = {method: lambda method=method: pod(A, N, method=method) for method in ("svd", "snapshots", "auto")}
    if find_spec("pymor") is None:
        print("pyMOR is left out: the package is not installed")
        return []
    from pymor.algorithms.pod import pod as theirs
    from pymor.core.logger import set_log_levels
    from pymor.vectorarrays.numpy import NumpyVectorSpace

    set_log_levels({"pymor": "ERROR"})
    U = NumpyVectorSpace(n_dof).from_numpy(A.T)
    peers = {"qr_svd": ("svd", "auto"), "method_of_snapshots": ("snapshots", "auto")}
    results = []
    for peer, methods in peers.items():
        work = lambda peer=peer: theirs(U, modes=N, method=peer)
        results += [compare(name, (f"pod, {m}", ours[m]), (f"pyMOR pod, {peer}", work), rounds=5) for m in methods]
    return results


def dictionary() -> list[Comparison]:
    """What the dictionary costs offline and buys in error, beside one basis of the same dimension."""
    found = simulate("Poisson", 300, 0)
    train, test = found.snapshots[:200], found.snapshots[200:]
    local = lambda: LocalReducedBases(6, 6, random_state=0).fit(train, found.parameters[:200])
    whole = lambda: LocalReducedBases(1, 6, random_state=0).fit(train)
    time = compare("Poisson, 900 unknowns, 6 modes", ("6 local bases", local), ("global POD", whole))
    error = local().projection_error(test, "predicted", found.parameters[200:]).mean() / whole().errors(test).mean()
    return [time, Comparison(time.name, "test error, basis by classifier", error, error, error, time.ours, time.peer)]


def growths() -> list[Comparison]:
    def clusters(n: int) -> Callable[[], object]:
        D = distances(n)
        return lambda: k_medoids(D, np.arange(10))

    def angles(n_dof: int) -> Callable[[], object]:
        S = np.random.default_rng(0).standard_normal((200, n_dof))
        return lambda: sine_dissimilarity(S)

    def criterion(n: int) -> Callable[[], object]:
        found = simulate("Poisson", n, 0)
        return lambda: efficiency_criterion(found.snapshots, [2, 4, 8], [4], found.parameters, random_state=0)

    return [
        growth("k-medoids over points, 10 clusters", "k_medoids", [500, 1000, 2000, 4000], clusters),
        growth("dissimilarities of 200 snapshots over unknowns", "sine_dissimilarity", [5_000, 20_000, 80_000], angles),
        growth("criterion over simulations", "efficiency_criterion", [100, 200, 400], criterion),
    ]


if __name__ == "__main__":
    for line in main():
        print(line)
