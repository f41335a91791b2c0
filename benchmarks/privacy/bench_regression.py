"""Cost and accuracy of locally private sparse regression: server, client, and the closed form beside its peers.

OpenDP and diffprivlib run in an environment of their own (`private_peers`), which the first run installs.
"""

import itertools
import math
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LassoCV

from benchmarks.harness import Comparison, compare, growth, seconds
from benchmarks.privacy.private_peers import elsewhere
from locally.papers.ldp_sparse_regression import INPUT, noisy_records
from locally.privacy.regression import (
    Client,
    Crowd,
    ElementarySparseRegression,
    LDPIterativeHardThresholding,
    MomentProtocol,
    NLDPSparseRegression,
    NotPrivateWarning,
    Population,
    Protocol,
    PublicFeatureProtocol,
    SecureNoise,
    SimulatedNoise,
    Tally,
)
from locally.privacy.regression.reports import CHECKSUM, HEADER

D = 100
USERS = 1_000_000
DELTA = 1e-6


def main() -> list[Comparison]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotPrivateWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        return [*servers(), *clients(), *beside_other_libraries(), *closed_form(), *accuracy()]


def servers() -> Iterator[Comparison]:
    """A million reports of dimension 100 in one pass: time, peak memory, growth, and a plain NumPy loop as peer."""
    for name, protocol in protocols().items():
        pool = report_pool(protocol)
        yield compare(
            f"server, {name}, d = {D}, 20,000 reports",
            ("locally", lambda pool=pool, protocol=protocol: ingest(protocol, pool, 20_000)),
            ("plain NumPy loop without validation", lambda pool=pool: plain_loop(pool, 20_000)),
        )
        yield growth(
            f"server, {name}: time over reports",
            "locally",
            [10_000, 20_000, 40_000, 80_000],
            lambda n, pool=pool, protocol=protocol: lambda: ingest(protocol, pool, n),
        )
        took = seconds(lambda pool=pool, protocol=protocol: ingest(protocol, pool, USERS))
        yield plain(f"server, {name}, d = {D}", f"seconds for {USERS:,} reports", took)
        few, many = (
            peak_mib(lambda n=n, pool=pool, protocol=protocol: ingest(protocol, pool, n)) for n in (5_000, 50_000)
        )
        detail = {"mib_5000": few, "mib_50000": many}
        yield plain(f"server, {name}", "peak memory, 50,000 reports / 5,000", many / few, **detail)


def protocols() -> dict[str, Protocol]:
    return {
        "second moments": MomentProtocol.for_users(USERS, D, 1.0),
        "public features": PublicFeatureProtocol.for_users(USERS, D, 1.0),
    }


def report_pool(protocol: Protocol, n: int = 1_000) -> list[bytes]:
    """Reports to cycle through: more than a cache holds, and the work does not depend on what they say."""
    X = np.random.default_rng(0).standard_normal((n, D))
    return list(Crowd(protocol, SimulatedNoise(0)).reports(X, X[:, 0]))


def ingest(protocol: Protocol, pool: list[bytes], n: int) -> Tally:
    tally = Tally(protocol)
    tally.extend(itertools.islice(itertools.cycle(pool), n))
    assert tally.accepted == n
    return tally


def plain_loop(pool: list[bytes], n: int) -> np.ndarray:
    width = (len(pool[0]) - HEADER.size - CHECKSUM.size) // 4
    total = np.zeros(width, np.int64)
    for report in itertools.islice(itertools.cycle(pool), n):
        total += np.frombuffer(report, "<i4", count=width, offset=HEADER.size)
    return total


def clients() -> Iterator[Comparison]:
    """What exact noise costs a device, and how a report's cost grows with the dimension."""
    n = 20_000
    secure, rng = SecureNoise(), np.random.default_rng(0)
    yield compare(
        f"{n:,} noise draws",
        ("exact discrete Gaussian from system entropy", lambda: secure.gaussian((n,), 24)),
        ("floating-point NumPy normals (unsafe)", lambda: rng.standard_normal(n)),
    )
    yield growth("one report of second moments: time over dimension", "locally", [32, 64, 128, 256], one_report)


def beside_other_libraries() -> Iterator[Comparison]:
    """Exact noise as fast, and what not trusting the server costs in accuracy."""
    ask = elsewhere()
    if ask is None:
        return
    secure = SecureNoise()
    yield compare(
        "2,000 exact noise draws for one vector",
        ("locally", lambda: secure.gaussian((2_000,), 24)),
        ("OpenDP make_gaussian", lambda: ask("opendp_noise", n=2_000, scale=2.0**24)),
    )
    yield compare(
        "100 exact noise draws one by one, small scale",
        ("locally", lambda: [secure.gaussian((1,), 2) for _ in range(100)]),
        ("diffprivlib GaussianDiscrete", lambda: ask("diffprivlib_noise", n=100)),
    )
    n, epsilon, clip = 500_000, 4.0, 3.0
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(3):
            people, X, y = sparse_table(n, seed)
            table = Path(folder) / f"{seed}.npy"
            np.save(table, np.column_stack([X, y]))
            theirs = ask("diffprivlib_regression", table=str(table), epsilon=epsilon, clip=clip, seed=seed)
            ours = public_features(X, y, epsilon, clip, seed)
            ratios.append(distance(ours, people.theta) / distance(np.array(theirs), people.theta))
    yield spread(
        f"public features, {n:,} users", "l2 error", ratios, "locally, no trust", "diffprivlib, trusted server"
    )


def one_report(d: int) -> Callable[[], object]:
    device = Client(MomentProtocol.for_users(USERS, d, 1.0), reports_allowed=10**6)
    x = np.zeros(d)
    return lambda: [device.report(x, 0.0) for _ in range(5)]


def closed_form() -> Iterator[Comparison]:
    """The estimator behind NLDP-LR, without privacy, beside the lasso path that it replaces."""
    n, k = 4_000, 5
    correlation = 0.3 ** np.abs(np.subtract.outer(np.arange(D), np.arange(D)))
    theta = np.where(np.arange(D) < k, 1 / math.sqrt(k), 0.0)
    errors = []
    for seed in range(7):
        X, y = Population(correlation, theta, 0.5).sample(n, np.random.default_rng(seed))
        ours = ElementarySparseRegression().fit(X, y).coef_
        theirs = LassoCV(cv=5, fit_intercept=False).fit(X, y).coef_
        errors.append(float(np.linalg.norm(ours - theta) / np.linalg.norm(theirs - theta)))
    yield compare(
        f"closed form without privacy, n = {n}, d = {D}",
        ("locally", lambda: ElementarySparseRegression().fit(X, y)),
        ("scikit-learn LassoCV", lambda: LassoCV(cv=5, fit_intercept=False).fit(X, y)),
    )
    yield spread("closed form without privacy", "l2 error", errors, "locally", "scikit-learn LassoCV")


def accuracy() -> Iterator[Comparison]:
    """l2 error at equal epsilon, delta and users, over noise on the records themselves."""
    n, epsilon, clip = 500_000, 4.0, 3.0
    ratios: dict[str, list[float]] = {"public features": [], "hard thresholding": []}
    for seed in range(3):
        people, X, y = sparse_table(n, seed)
        rng = np.random.default_rng([1, seed])
        peer = distance(noisy_records(X, y, epsilon, DELTA, clip, rng)[INPUT], people.theta)
        iht = LDPIterativeHardThresholding(
            epsilon, sparsity=2, n_rounds=8, clip_x=clip, clip_y=clip, random_state=seed
        ).fit(X, y)
        found = {"public features": public_features(X, y, epsilon, clip, seed), "hard thresholding": iht.coef_}
        for name, coef in found.items():
            ratios[name].append(distance(coef, people.theta) / peer)
    for name, values in ratios.items():
        yield spread(f"{name}, {n:,} users", "l2 error", values, "locally", "noise on the records, least squares")


def sparse_table(n: int, seed: int) -> tuple[Population, np.ndarray, np.ndarray]:
    """n users with ten features, two of them active."""
    people = Population(np.eye(10), np.where(np.arange(10) < 2, math.sqrt(0.5), 0.0), 0.5)
    return people, *people.sample(n, np.random.default_rng(seed))


def public_features(X: np.ndarray, y: np.ndarray, epsilon: float, clip: float, seed: int) -> np.ndarray:
    public_X = np.random.default_rng([2, seed]).standard_normal((5_000, X.shape[1]))
    model = NLDPSparseRegression(
        epsilon, DELTA, clip_x=clip, clip_y=clip, public_X=public_X, threshold_constant=0.5, random_state=seed
    )
    return model.fit(X, y).coef_


def distance(coef: np.ndarray, theta: np.ndarray) -> float:
    return float(np.linalg.norm(coef - theta))


def peak_mib(work: Callable[[], object]) -> float:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def plain(name: str, quantity: str, value: float, **detail: float) -> Comparison:
    return Comparison(name, quantity, value, value, value, "locally", detail=dict(detail))


def spread(name: str, quantity: str, values: list[float], ours: str, peer: str) -> Comparison:
    return Comparison(name, quantity, float(np.median(values)), min(values), max(values), ours, peer)


if __name__ == "__main__":
    for comparison in main():
        print(comparison)
