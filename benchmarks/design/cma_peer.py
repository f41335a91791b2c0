"""pycma on logits of sequences, in an environment of its own, a generation at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers import answer, ask_in

PACKAGES = ("cma==4.5.0", "numpy")


def search() -> Callable[..., np.ndarray] | None:
    """`search(score, start, letters, n, rounds)` as the searches of `baselines`; None where it cannot be installed."""
    ask = ask_in("cma", PACKAGES, "benchmarks.design.cma_peer")
    if ask is None:
        return None

    def run(score: Callable[[np.ndarray], np.ndarray], start: np.ndarray, letters: int, n: int, rounds: int) -> Any:
        first = start[score(start).argmax()]
        ask("begin", mean=np.eye(letters)[first].ravel().tolist(), sigma=0.5, population=n)
        seen: dict[bytes, tuple[float, np.ndarray]] = {}
        for _ in range(rounds):
            points = np.array(ask("sample"))
            sequences = points.reshape(len(points), -1, letters).argmax(2)
            values = score(sequences)
            seen |= {row.tobytes(): (value, row) for value, row in zip(values.tolist(), sequences)}
            ask("learn", costs=(-values).tolist())
        ranked = sorted(seen.values(), key=lambda pair: -pair[0])[:n]
        return np.array([row for _, row in ranked])

    return run


strategy: Any = None
points: Any = None


def begin(mean: list[float], sigma: float, population: int) -> None:
    import cma

    global strategy
    strategy = cma.CMAEvolutionStrategy(mean, sigma, {"popsize": population, "verbose": -9, "seed": 1})


def sample() -> list[list[float]]:
    global points
    points = strategy.ask()
    return [list(map(float, point)) for point in points]


def learn(costs: list[float]) -> None:
    strategy.tell(points, costs)


if __name__ == "__main__":
    answer(begin, sample, learn)
