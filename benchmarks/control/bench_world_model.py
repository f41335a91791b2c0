"""Error and time of one pass beside networks with replay, random Fourier features by SGD and recursive least squares;
how the cost of an update grows with the code's length and with time; memory of a million nodes."""

from collections.abc import Callable

import numpy as np
from sklearn.kernel_approximation import RBFSampler
from sklearn.linear_model import SGDRegressor

from benchmarks.harness import Comparison, compare, growth, seconds
from locally.control.world_model import LosseEncoder, LosseFTLRegressor, NetworkRegressor, piecewise_random_walk

STEPS = 1000


def main() -> list[Comparison]:
    return [*one_pass(), full_solvers(), *predictions(), *growths(), memory()]


def one_pass() -> list[Comparison]:
    """The drifting stream at d = 0.9, a sample at a time."""
    x, y = piecewise_random_walk(STEPS, 0.9, hold=STEPS // 50, rng=0)
    test_x = np.random.default_rng(1).normal(0, 0.5, (1000, 1))
    test_y = np.sin(2 * np.pi * test_x[:, 0] ** 2)
    fitted = {}

    def stream(name: str, make: Callable[[], object]) -> tuple[str, Callable[[], object]]:
        def run() -> None:
            model = make()
            for t in range(STEPS):
                model.partial_fit(x[t : t + 1], y[t])
            fitted[name] = model

        return name, run

    class FourierSGD:
        def __init__(self) -> None:
            self.code = RBFSampler(gamma=10.0, n_components=1800, random_state=0).fit(x[:1])
            self.regressor = SGDRegressor(alpha=1e-6, eta0=0.1, learning_rate="constant")

        def partial_fit(self, X: np.ndarray, y: np.ndarray) -> None:
            self.regressor.partial_fit(self.code.transform(X), y)

        def predict(self, X: np.ndarray) -> np.ndarray:
            return self.regressor.predict(self.code.transform(X))

    ours = stream("Losse-FTL, 50 grids", lambda: LosseFTLRegressor(random_state=0))
    few = stream(
        "Losse-FTL, 10 grids", lambda: LosseFTLRegressor(10, 2, 10, projection="normal", scale=4.0, random_state=0)
    )
    replayed = {"memory": "replay", "lr": 3e-3, "batch_size": 50, "random_state": 0}
    network = stream("network (50, 50) with replay", lambda: NetworkRegressor((50, 50), **replayed))
    fourier = stream("RBFSampler + SGDRegressor", FourierSGD)
    results = []
    for one in (ours, few):
        for peer in (network, fourier):
            results.append(compare(f"one pass over {STEPS} samples", one, peer, rounds=3))
            ratio = error(fitted[one[0]], test_x, test_y) / error(fitted[peer[0]], test_x, test_y)
            results.append(Comparison("error after it", "squared error", ratio, ratio, ratio, one[0], peer[0]))
    return results


def error(model: object, X: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean((np.ravel(model.predict(X)) - y) ** 2))


def full_solvers() -> Comparison:
    """The exact leader by rotations beside textbook recursive least squares on the inverse, 360 features."""
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (300, 2))
    y = X[:, 0] * X[:, 1]
    Phi = LosseEncoder(10, random_state=0).fit(X).transform(X).toarray()

    def textbook() -> None:
        M, w = np.eye(Phi.shape[1]) / 1e-3, np.zeros(Phi.shape[1])
        for phi, target in zip(Phi, y):
            gain = M @ phi
            gain /= 1 + phi @ gain
            w += gain * (target - w @ phi)
            M -= np.outer(gain, phi @ M)

    def rotations() -> None:
        LosseFTLRegressor(10, solver="full", eps=1e-3, random_state=0).fit(X, y)

    return compare(
        "exact leader, 300 samples", ("rotations", rotations), ("recursive least squares", textbook), rounds=5
    )


def predictions() -> list[Comparison]:
    """Predictions of 100,000 inputs, beside a budget of a microsecond each."""
    X = np.random.default_rng(0).uniform(-1, 1, (100_000, 4))
    results = []
    for grids in (10, 50):
        model = LosseFTLRegressor(grids, random_state=0).fit(X[:200], X[:200, 0])
        model.predict(X)
        ratios = [1e6 * seconds(lambda model=model: model.predict(X)) / len(X) for _ in range(5)]
        name = f"Losse-FTL, {grids} grids"
        results.append(
            Comparison("prediction", "time", float(np.median(ratios)), min(ratios), max(ratios), name, "1 microsecond")
        )
    return results


def growths() -> list[Comparison]:
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (4000, 2))
    y = np.sin(3 * X[:, :1]) * X[:, 1:]

    def updates_at_length(length: int) -> Callable[[], object]:
        """200 updates of a model that has seen 500 samples, on 8 grids of `length` nodes in all."""
        bins = round((length / 8) ** 0.5) - 1
        model = LosseFTLRegressor(8, 2, bins, storage="rows", random_state=0).fit(X[:500], y[:500])
        return lambda: model.partial_fit(X[500:700], y[500:700])

    def updates_at_time(seen: int) -> Callable[[], object]:
        """200 updates after `seen` samples, on 20 grids of 36 nodes: all pairs are soon there."""
        model = LosseFTLRegressor(20, storage="rows", random_state=0).fit(X[:seen], y[:seen])
        return lambda: model.partial_fit(X[:200], y[:200])

    return [
        growth(
            "200 updates over the length of the code",
            "Losse-FTL",
            [10_000, 100_000, 1_000_000, 10_000_000],
            updates_at_length,
        ),
        growth("200 updates over the samples seen before", "Losse-FTL", [250, 500, 1000, 2000, 4000], updates_at_time),
    ]


def memory() -> Comparison:
    """Bytes of the Gram matrix at a million nodes after 2000 samples, beside 12 bytes for each pair ever active."""
    X = np.random.default_rng(0).uniform(-1, 1, (2000, 2))
    model = LosseFTLRegressor(8, 2, 353, random_state=0).fit(X, X[:, 0])
    gram = model.leader_.gram
    pool = gram.columns.nbytes + gram.values.nbytes
    detail = {
        "nodes": model.encoder_.n_codes_,
        "pairs": gram.n_pairs,
        "pool_mib": pool / 2**20,
        "dense_mib": 8 * model.encoder_.n_codes_**2 / 2**20,
    }
    ratio = pool / (12 * gram.n_pairs)
    return Comparison("a million nodes", "memory", ratio, ratio, ratio, "pool of rows", "12 bytes a pair", detail)


if __name__ == "__main__":
    for line in main():
        print(line)
