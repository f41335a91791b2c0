"""Small-gain certificates against a semidefinite program and a bare eigenvalue test, and how their cost grows.

Peers: CVXPY with Clarabel, which maximises the margin over block-diagonal metrics by bisection on a linear matrix
inequality (`pip install cvxpy`; without it those lines are left out), and `numpy.linalg.eigvalsh` for Rosen's test.
"""

import importlib.util
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from benchmarks.harness import Comparison, compare, growth
from locally.equilibrium.small_gain import (
    GradientPlay,
    QuadraticGame,
    SmallGainCertifier,
    margin,
    optimal_signed_weights,
    optimal_weights,
)
from locally.equilibrium.small_gain.perron import perron_pair


def random_game(players: int, size: int, seed: int = 0) -> QuadraticGame:
    """Symmetric own blocks of curvature at least 1, couplings on timescales of their own, small gain 0.9."""
    rng = np.random.default_rng(seed)
    d = players * size
    H = rng.standard_normal((d, d)) * np.exp(np.repeat(rng.normal(0, 1, players), size))[:, None]
    owner = np.repeat(np.arange(players), size)
    inside = owner[:, None] == owner
    gain = SmallGainCertifier().certify(QuadraticGame(np.where(inside, np.eye(d), H), (size,) * players)).small_gain
    return QuadraticGame(np.where(inside, np.eye(d), 0.9 * H / gain), (size,) * players)


def network(players: int, degree: int, seed: int = 0) -> tuple[np.ndarray, sp.csr_array]:
    """Curvatures and a strongly connected sparse coupling with about `degree` neighbours a player."""
    rng = np.random.default_rng(seed)
    coupling = sp.random_array((players, players), density=degree / players, rng=rng, format="csr")
    cycle = (np.ones(players), (np.arange(players), (np.arange(players) + 1) % players))
    coupling = sp.csr_array(coupling + sp.csr_array(cycle, shape=(players, players)))
    return rng.uniform(0.5, 1.5, players), sp.csr_array(coupling - sp.diags_array(coupling.diagonal()))


def semidefinite_margin(H: np.ndarray, size: int, width: float = 1e-4) -> float:
    """Largest alpha with M H + H^T M >= 2 alpha M for some block-diagonal M, by bisection."""
    import cvxpy as cp

    d = len(H)
    w = cp.Variable(d // size)
    alpha = cp.Parameter()
    metric = cp.diag(np.kron(np.eye(d // size), np.ones((size, 1))) @ w)
    slack = cp.Variable()
    inequality = metric @ H + H.T @ metric - 2 * alpha * metric - slack * np.eye(d) >> 0
    problem = cp.Problem(cp.Maximize(slack), [inequality, cp.sum(w) == d // size, w >= 1e-6])
    low, high = float(np.linalg.eigvalsh((H + H.T) / 2)[0]), float(np.linalg.eigvalsh((H + H.T) / 2)[-1])
    while high - low > width:
        alpha.value = (low + high) / 2
        problem.solve(solver=cp.CLARABEL)
        low, high = (alpha.value, high) if slack.value is not None and slack.value >= 0 else (low, alpha.value)
    return float(low)


def against_semidefinite(players: int) -> list[Comparison]:
    game = random_game(players, 2)
    J, sizes = game.H[None], game.block_sizes
    certify = SmallGainCertifier().certify
    detail = {
        "margin_signed": optimal_signed_weights(J, sizes, tol=1e-5).margin,
        "margin_blocks": certify(game).margin,
        "margin_peer": semidefinite_margin(game.H, 2),
    }
    peer = ("CVXPY + Clarabel", lambda: semidefinite_margin(game.H, 2))
    name = f"{players} players of 2 dimensions"
    signed = ("optimal_signed_weights", lambda: optimal_signed_weights(J, sizes, tol=1e-5))
    return [
        compare(f"signed margin, {name}", signed, peer, rounds=3, **detail),
        compare(f"block certificate, {name}", ("SmallGainCertifier", lambda: certify(game)), peer, rounds=3, **detail),
    ]


def against_rosen() -> Comparison:
    game = random_game(2, 32)
    rosen = lambda: np.linalg.eigvalsh((game.H + game.H.T) / 2)[0] > 0
    ours = lambda: SmallGainCertifier().certify(game)
    return compare(
        "64-dimensional game", ("SmallGainCertifier", ours), ("numpy eigvalsh (Rosen's test)", rosen), rounds=15
    )


def against_extragradient() -> Comparison:
    """Gradients to a residual of 1e-8, averaged over games; the peer's step is the customary 1 / (2 ||J||)."""
    ratios, ours, theirs = [], [], []
    for seed in range(7):
        game = random_game(4, 5, seed)
        certificate = SmallGainCertifier(objective="euler").certify(game)
        x0 = np.random.default_rng(seed).standard_normal(game.dimension)
        customary = float(1 / (2 * np.linalg.norm(game.H, 2)))
        runs = [
            GradientPlay(method="extragradient", step=step, max_steps=200_000).run(game, x0, certificate).steps
            for step in ("certified", customary)
        ]
        ours.append(2 * runs[0])
        theirs.append(2 * runs[1])
        ratios.append(runs[0] / runs[1])
    detail = {"gradients_ours": float(np.median(ours)), "gradients_peer": float(np.median(theirs))}
    name, peer = "extragradient at the certified step", "extragradient at 1/(2 ||J||)"
    spread = (float(np.median(ratios)), min(ratios), max(ratios))
    return Comparison("4 players of 5 dimensions", "gradients to 1e-8", *spread, name, peer, detail)


def perron_growth() -> list[Comparison]:
    def sparse_in_players(players: int) -> Callable[[], object]:
        mu, coupling = network(players, 8)
        return lambda: perron_pair(coupling, mu)

    def sparse_in_entries(degree: int) -> Callable[[], object]:
        mu, coupling = network(1000, degree)
        return lambda: perron_pair(coupling, mu)

    def dense_in_players(players: int) -> Callable[[], object]:
        mu, coupling = network(players, 8)
        dense = coupling.toarray()
        return lambda: perron_pair(dense, mu)

    def margin_in_players(players: int) -> Callable[[], object]:
        mu, coupling = network(players, 8)
        weights = optimal_weights(mu, coupling).weights
        return lambda: margin(mu, coupling, weights)

    return [
        growth(
            "Perron weights, sparse, over players at 8 neighbours",
            "perron_pair",
            (1000, 4000, 16000, 64000),
            sparse_in_players,
        ),
        growth(
            "Perron weights, sparse, over neighbours at 1000 players",
            "perron_pair",
            (8, 32, 128, 512),
            sparse_in_entries,
        ),
        growth("Perron weights, dense, over players", "perron_pair", (125, 250, 500, 1000), dense_in_players),
        growth("margin at given weights, sparse, over players", "margin", (250, 500, 1000, 2000), margin_in_players),
    ]


def signed_growth() -> Comparison:
    def make(players: int) -> Callable[[], object]:
        game = random_game(players, 2)
        return lambda: optimal_signed_weights(game.H[None], game.block_sizes, tol=1e-5)

    return growth("signed optimum over players of 2 dimensions", "optimal_signed_weights", (10, 20, 40, 80), make)


def main() -> list[Comparison]:
    results = []
    if importlib.util.find_spec("cvxpy") is not None:
        for players in (2, 5, 10, 20):
            results.extend(against_semidefinite(players))
    results.extend([against_rosen(), against_extragradient(), *perron_growth(), signed_growth()])
    for result in results:
        print(result)
    return results


if __name__ == "__main__":
    main()
