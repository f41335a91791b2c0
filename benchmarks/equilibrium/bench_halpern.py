"""Halpern iteration beside its baselines and SciPy: time to equal accuracy, time outside the kernels, growth of cost.

There is no kept Python library for finite-sum monotone inclusions, so the peers are the package's own baselines,
SciPy's linear programming for games, the same steps taken one by one, and a simplex projection by sorting.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np

from benchmarks.harness import Comparison, compare, growth, seconds
from locally.equilibrium.halpern import (
    Extragradient,
    FunctionOperator,
    Halpern,
    LeastSquares,
    MatrixGame,
    SingleLoopHalpern,
    Solver,
    VarianceReducedExtragradient,
    kernels,
)
from locally.papers.halpern import policeman_and_burglar, regression, solve_by_linear_programming


def main() -> list[Comparison]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not known to be cocoercive")
        return [
            *to_equal_norm_on_least_squares(6400),
            *to_equal_norm_on_a_game(500),
            against_linear_programming(200),
            outside_the_kernels(500),
            compiled_steps(500),
            simplex_projection(500),
            growth("least squares to 1 %, over components", "SingleLoopHalpern", [400, 1600, 6400, 25_600], saving),
            growth("one epoch of a game, over strategies", "SingleLoopHalpern", [125, 250, 500, 1000], epoch),
        ]


def street(n: int) -> MatrixGame:
    return MatrixGame(policeman_and_burglar(np.abs(np.random.default_rng(1).standard_normal(n))))


def single_loop(game: MatrixGame, **limits: float) -> SingleLoopHalpern:
    return SingleLoopHalpern(eta=float(5 / np.linalg.norm(game.A)), random_state=0, **limits)


def to_equal_norm_on_least_squares(n: int) -> Iterator[Comparison]:
    op, _ = regression(n, np.random.default_rng(0))
    u0 = np.zeros(op.dim)
    limits = {"tol": 1e-2 * float(np.linalg.norm(op.full(u0))), "max_epochs": 20_000}
    ours = SingleLoopHalpern(multiplier=4.0, random_state=0, **limits)
    peers: dict[str, Solver] = {
        "deterministic Halpern": Halpern(**limits),
        "extragradient": Extragradient(**limits),
        "variance-reduced extragradient": VarianceReducedExtragradient(random_state=0, **limits),
    }
    for name, peer in peers.items():
        yield compare(
            f"least squares, {n} components, to 1 % of the first operator norm",
            ("SingleLoopHalpern", lambda: ours.solve(op, u0)),
            (name, lambda peer=peer: peer.solve(op, u0)),
            rounds=3,
            evaluations_ours=ours.solve(op, u0).evaluations,
            evaluations_peer=peer.solve(op, u0).evaluations,
        )


def to_equal_norm_on_a_game(n: int) -> Iterator[Comparison]:
    """All to the norm that extragradient has after 400 epochs."""
    game = street(n)
    u0 = game.uniform_start()
    extragradient = Extragradient(eta=float(5 / np.linalg.norm(game.A, 2)), tol=0.0, max_epochs=400)
    limits = {"tol": extragradient.solve(game, u0).residual, "max_epochs": 2000}
    ours = single_loop(game, **limits)
    eta = float(3 / np.sqrt(n) / np.linalg.norm(game.A))
    peers: dict[str, Solver] = {
        "extragradient": extragradient,
        "variance-reduced extragradient": VarianceReducedExtragradient(eta=eta, random_state=0, **limits),
    }
    for name, peer in peers.items():
        yield compare(
            f"game of size {n}, to extragradient's operator norm after 400 epochs",
            ("SingleLoopHalpern", lambda: ours.solve(game, u0)),
            (name, lambda peer=peer: peer.solve(game, u0)),
            rounds=5,
            evaluations_ours=ours.solve(game, u0).evaluations,
            evaluations_peer=peer.solve(game, u0).evaluations,
        )


def against_linear_programming(n: int) -> Comparison:
    """The peer is exact to rounding, ours stops at the gap in the detail: above 1, linear programming wins outright."""
    game = street(n)
    u0 = game.uniform_start()
    ours = single_loop(game, tol=0.0, max_epochs=1000)
    return compare(
        f"game of size {n}, 1000 epochs against the exact solution",
        ("SingleLoopHalpern", lambda: ours.solve(game, u0)),
        ("scipy.optimize.linprog (HiGHS)", lambda: solve_by_linear_programming(game)),
        rounds=3,
        gap_ours=game.gap(ours.solve(game, u0).x),
        gap_peer=game.gap(solve_by_linear_programming(game)),
    )


def outside_the_kernels(n: int) -> Comparison:
    """Share of a solve that is spent neither in a kernel nor in a full evaluation (BLAS)."""
    game = street(n)
    solver = single_loop(game, tol=0.0, max_epochs=200)
    u0 = game.uniform_start()
    solver.solve(game, u0)
    shares = []
    for _ in range(7):
        with inside() as clock, mock.patch.object(game, "full", clock.watch(game.full)):
            total = seconds(lambda: solver.solve(game, u0))
        shares.append(1 - clock.total / total)
    return Comparison(
        f"game of size {n}, time in Python between the kernels",
        "share of the time",
        float(np.median(shares)),
        min(shares),
        max(shares),
        "SingleLoopHalpern",
    )


class Clock:
    total = 0.0

    def watch(self, work: Callable[..., object]) -> Callable[..., object]:
        def timed(*arguments: object) -> object:
            start = time.perf_counter()
            result = work(*arguments)
            self.total += time.perf_counter() - start
            return result

        return timed


@contextmanager
def inside() -> Iterator[Clock]:
    """A clock that runs while one of the kernels does."""
    clock = Clock()
    watched = {name: clock.watch(getattr(kernels, name)) for name in ("halpern_steps", "anchored_step", "resolve")}
    with mock.patch.multiple(kernels, **watched):
        yield clock


def compiled_steps(n: int) -> Comparison:
    game = street(n)
    plain = FunctionOperator(game.batch, n=n, dim=2 * n, full=game.full, resolvent=game.resolvent)
    solver = single_loop(game, tol=0.0, max_epochs=40)
    u0 = game.uniform_start()
    return compare(
        f"game of size {n}, 40 epochs",
        ("compiled steps", lambda: solver.solve(game, u0)),
        ("the same steps one by one", lambda: solver.solve(plain, u0)),
        rounds=5,
    )


def simplex_projection(n: int) -> Comparison:
    points = np.random.default_rng(0).standard_normal((200, n)) / np.sqrt(n)

    def by_sorting(z: np.ndarray) -> np.ndarray:
        ordered = np.sort(z)[::-1]
        levels = (np.cumsum(ordered) - 1) / np.arange(1, n + 1)
        return np.maximum(z - levels[np.flatnonzero(ordered > levels)[-1]], 0)

    return compare(
        f"200 projections onto the simplex in {n} dimensions",
        ("project_simplex", lambda: [kernels.project_simplex(z.copy(), 1.0) for z in points]),
        ("NumPy by sorting", lambda: [by_sorting(z) for z in points]),
    )


def saving(n: int) -> Callable[[], object]:
    op: LeastSquares = regression(n, np.random.default_rng(0))[0]
    u0 = np.zeros(op.dim)
    solver = SingleLoopHalpern(
        multiplier=4.0, tol=1e-2 * float(np.linalg.norm(op.full(u0))), max_epochs=20_000, random_state=0
    )
    return lambda: solver.solve(op, u0)


def epoch(n: int) -> Callable[[], object]:
    game = street(n)
    solver = single_loop(game, tol=0.0, max_epochs=100)
    return lambda: solver.solve(game, game.uniform_start())


if __name__ == "__main__":
    for comparison in main():
        print(comparison, comparison.detail or "")
