"""Where gradient play is certified to contract, and whether it then does, beside Rosen's Euclidean test.

The two-player linear-quadratic game has curvature 1 and couplings lambda a R and lambda b R^T with a = 10, b = 0.05 and
R orthogonal, drawn anew for each seed. Beside it: a nonlinear game certified on the whole plane, a Markov game under
natural policy gradient, random ensembles, and network games of up to a thousand players.
"""

from typing import Any

import numpy as np
import scipy.sparse as sp

from locally.equilibrium.small_gain import (
    Box,
    DifferentiableGame,
    FisherGeometry,
    GameBounds,
    GradientPlay,
    QuadraticGame,
    SGNCertificate,
    SmallGainCertifier,
    TabularMarkovGame,
    affine_contraction,
    affine_step_matrix,
    euclidean_margin,
    euler,
    optimal_signed_weights,
    rk4,
    signed_margin,
    stability_threshold,
)
from locally.evidence import Run

SGN = "Small-Gain Nash"
ROSEN = "Rosen's test (Euclidean)"
SIGNED = "optimal weights on the signed Jacobian"
STRONG, WEAK = 10.0, 0.05  # a and b: how much each player feels the other
BLOCK = 32
COUPLINGS = np.linspace(0, 2.5, 61)
ROUNDING = 1 + 1e-9


def experiment(run: Run) -> None:
    rotations = run.parallel(one_seed, run.seeds, "seeds")
    draw_coupling(run, COUPLINGS, rotations[-1])
    draw_trajectories(run)


def one_seed(run: Run, seed: int) -> np.ndarray:
    """Everything that depends on a seed; returns its rotation."""
    rng = np.random.default_rng([seed, 2027])
    R = orthogonal(rng)
    sweep_coupling(run, seed, R, COUPLINGS, rng)
    certified_range(run, seed, R)
    timescale_band(run, seed, R)
    play_to_tolerance(run, seed, R, rng)
    nonlinear_game(run, seed, rng)
    runge_kutta(run, seed, rng)
    markov_game(run, seed, rng)
    random_ensemble(run, seed, rng)
    structured_noise(run, seed, R, rng)
    network_games(run, seed, rng)
    return R


def orthogonal(rng: np.random.Generator) -> np.ndarray:
    Q, upper = np.linalg.qr(rng.standard_normal((BLOCK, BLOCK)))
    return Q * np.sign(np.diag(upper))


def coupled_game(
    coupling: float, R: np.ndarray, Q1: np.ndarray | None = None, Q2: np.ndarray | None = None
) -> QuadraticGame:
    n, m = R.shape
    Q1, Q2 = np.eye(n) if Q1 is None else Q1, np.eye(m) if Q2 is None else Q2
    return QuadraticGame(np.block([[Q1, coupling * STRONG * R], [coupling * WEAK * R.T, Q2]]), (n, m))


def sweep_coupling(run: Run, seed: int, R: np.ndarray, couplings: np.ndarray, rng: np.random.Generator) -> None:
    """Certify every game of the grid, then play each certified one at 99 % of the certified step."""
    certified = euclidean = broken = 0
    for coupling in couplings:
        game = coupled_game(coupling, R)
        certificate = SmallGainCertifier().certify(game)
        certified += certificate.feasible
        euclidean += certificate.euclidean_margin > 0
        if certificate.feasible:
            x = rng.standard_normal((16, game.dimension))
            broken += violations(game, certificate, x, 0.99 * certificate.euler_step_max, steps=200)
    run.record(SGN, "grid points certified of 61", certified, seed=seed)
    run.record(ROSEN, "grid points certified of 61", euclidean, seed=seed)
    run.record(SGN, "steps that contract less than certified", broken, seed=seed)


def violations(game: QuadraticGame, certificate: SGNCertificate, x: np.ndarray, step: float, steps: int) -> int:
    """Steps from a batch of starts towards the equilibrium 0 that shrink the weighted norm by less than q."""
    q = certificate.contraction(step)
    broken, norms = 0, certificate.norm(x)
    for _ in range(steps):
        x = euler(game.pseudo_gradient, x, step)
        reached = certificate.norm(x)
        broken += int((reached > q * norms * ROUNDING).sum())
        norms = reached
    return broken


def certified_range(run: Run, seed: int, R: np.ndarray) -> None:
    """Largest coupling that each test certifies, by bisection on the tests themselves."""
    certifies = {
        SGN: lambda coupling: SmallGainCertifier().certify(coupled_game(coupling, R)).feasible,
        ROSEN: lambda coupling: euclidean_margin(coupled_game(coupling, R).H[None]) > 0,
    }
    reach = {}
    for method, test in certifies.items():
        low, high = 0.0, 4.0
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if test(middle) else (low, middle)
        reach[method] = low
        run.record(method, "largest coupling certified", low, seed=seed)
    run.record(SGN, "largest coupling certified / Rosen's", reach[SGN] / reach[ROSEN], seed=seed)


def timescale_band(run: Run, seed: int, R: np.ndarray) -> None:
    """The closed-form band of w_2 / w_1 against where the margin of the real Jacobian changes sign."""
    game = coupled_game(1.0, R)
    certificate = SmallGainCertifier().certify(game)
    band = certificate.timescale_band()
    assert band is not None
    positive = lambda z: signed_margin(game.H[None], game.block_sizes, np.exp([0.0, z])) > 0
    optimum = float(np.log(certificate.weights[1] / certificate.weights[0]))
    worst = 0.0
    for end, outside in zip(band, (optimum - 8, optimum + 8), strict=True):
        inside = optimum
        for _ in range(30):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if positive(middle) else (inside, middle)
        worst = max(worst, abs(end / np.exp(inside) - 1))
    run.record(SGN, "relative error of the timescale band", worst, seed=seed)


def play_to_tolerance(run: Run, seed: int, R: np.ndarray, rng: np.random.Generator) -> None:
    """Gradients until the weighted residual is 1e-8: certified steps, and what people run without a certificate."""
    game = coupled_game(1.0, R)
    certificate = SmallGainCertifier().certify(game)
    customary = float(1 / (2 * np.linalg.norm(game.H, 2)))
    x0 = rng.standard_normal(game.dimension)
    runs: dict[str, tuple[str, float | str, int]] = {
        f"{SGN}, Euler": ("euler", "certified", 1),
        f"{SGN}, Runge-Kutta": ("rk4", "certified", 4),
        f"{SGN}, extragradient": ("extragradient", "certified", 2),
        "gradient play, step 1/(2 ||J||)": ("euler", customary, 1),
        "extragradient, step 1/(2 ||J||)": ("extragradient", customary, 2),
        "optimistic gradient, step 1/(2 ||J||)": ("optimistic", customary, 1),
    }
    for name, (method, step, cost) in runs.items():
        found = GradientPlay(method=method, step=step, max_steps=5000).run(game, x0, certificate)
        run.record(name, "gradients to a residual of 1e-8", found.steps * cost, seed=seed)


def nonlinear_game(run: Run, seed: int, rng: np.random.Generator) -> None:
    """F_1 = x + 0.3 sin x + 8 tanh y - 0.5, F_2 = y + 0.3 sin y + 0.05 tanh x + 0.2, certified on the whole plane."""
    import torch

    def field(z: torch.Tensor) -> torch.Tensor:
        x, y = z
        first = x + 0.3 * torch.sin(x) + 8 * torch.tanh(y) - 0.5
        second = y + 0.3 * torch.sin(y) + 0.05 * torch.tanh(x) + 0.2
        return torch.stack([first, second])

    game = DifferentiableGame(field, (1, 1), device=run.device)
    bounds = GameBounds(np.array([0.7, 0.7]), np.array([[0.0, 8.0], [0.05, 0.0]]), np.array([1.3, 1.3]))
    certificate = SmallGainCertifier().certify_bounds(bounds)
    step = certificate.euler_step_opt
    q = certificate.contraction(step)
    x, y = rng.uniform(-5, 5, (2, 500, 2))
    broken, worst = 0, 0.0
    distance = certificate.norm(x - y)
    for _ in range(50):
        x, y = euler(game.pseudo_gradient, x, step), euler(game.pseudo_gradient, y, step)
        reached = certificate.norm(x - y)
        broken += int((reached > q * distance * ROUNDING).sum())
        worst = max(worst, float((reached / distance).max()))
        distance = reached
    run.record(SGN, "pairs of the nonlinear game that contract less than certified", broken, seed=seed)
    run.record(SGN, "worst contraction of the nonlinear game / certified", worst / q, seed=seed)
    run.record(SGN, "margin bound of the nonlinear game", certificate.margin, seed=seed)
    run.record(ROSEN, "margin bound of the nonlinear game", certificate.euclidean_margin, seed=seed)


def runge_kutta(run: Run, seed: int, rng: np.random.Generator) -> None:
    """One Runge-Kutta step on games sought out to be hard for it: the rule h = 2.5 / beta, and the rigorous step."""
    worst, broken = 0.0, 0
    for margin in (0.02, 0.05, 0.1):
        H, factor = hard_game(margin, rng, restarts=run.pick(quick=1, default=3, paper=20))
        worst = max(worst, factor)
        certificate = SmallGainCertifier(mode="jacobian").certify(QuadraticGame(H, (3,)))
        step = 0.999 * certificate.rk4_step_rigorous
        exact = affine_contraction(H, (3,), certificate.weights, step, "rk4")
        broken += exact > certificate.contraction(step, "rk4") * ROUNDING
    run.record("Runge-Kutta, rule h = 2.5 / beta", "largest one-step factor", worst, seed=seed)
    run.record(SGN, "rigorous Runge-Kutta steps that contract less than certified", broken, seed=seed)


def hard_game(margin: float, rng: np.random.Generator, restarts: int) -> tuple[np.ndarray, float]:
    """Search 3 x 3 Jacobians of norm 1 and the given margin for the largest one-step factor at h = 2.5."""
    best, worst = np.eye(3), 0.0
    for _ in range(restarts):
        H, factor, spread = rng.standard_normal((3, 3)), 0.0, 0.5
        for _ in range(200):
            trial = with_margin(H + spread * rng.standard_normal((3, 3)), margin)
            reached = float(np.linalg.norm(affine_step_matrix(trial, 2.5, "rk4"), 2))
            if reached > factor:
                H, factor = trial, reached
            else:
                spread = max(0.97 * spread, 1e-3)
        if factor > worst:
            best, worst = H, factor
    return best, worst


def with_margin(H: np.ndarray, margin: float) -> np.ndarray:
    """Shift by a multiple of I and scale, so that the norm is 1 and the symmetric part at least margin I."""
    curvature = np.linalg.eigvalsh((H + H.T) / 2)[0]
    shift = -curvature
    for _ in range(8):  # a contraction with factor `margin`
        shift = margin * np.linalg.norm(H + shift * np.eye(3), 2) - curvature
    H = H + shift * np.eye(3)
    return H / np.linalg.norm(H, 2)


def coordination_game() -> TabularMarkovGame:
    """Two states, two actions each; matching pays 1, and both first (second) actions lead to state 0 (1)."""
    row = [[[0.9, 0.1], [0.5, 0.5]], [[0.5, 0.5], [0.1, 0.9]]]
    match = [[1.0, -1.0], [-1.0, 1.0]]
    return TabularMarkovGame(np.array([row, row]), np.array([match, match]), gamma=0.9, tau=1.0)


def markov_game(run: Run, seed: int, rng: np.random.Generator) -> None:
    """Natural policy gradient at half the certified step, from starts in the certified box; then a sweep of steps."""
    game = coordination_game()
    geometry = FisherGeometry(game)
    centre = np.zeros(game.dimension)
    certificate = SmallGainCertifier().certify(geometry, Box(centre, 0.1))
    step = certificate.euler_step_max / 2
    certified = certificate.contraction(step) ** 2  # the divergence is half the squared norm near the equilibrium
    theta = rng.uniform(-0.1, 0.1, (8, game.dimension))
    first = divergence = game.kl_to(centre, theta, certificate.weights)
    broken = 0
    for _ in range(50):
        theta = euler(geometry.pseudo_gradient, theta, step)
        reached = game.kl_to(centre, theta, certificate.weights)
        broken += int((reached > certified * divergence * (1 + 1e-6)).sum())
        divergence = reached
    run.record(SGN, "policy-gradient steps that contract less than certified", broken, seed=seed)
    rate = float(np.max(divergence / first) ** (1 / 50))
    run.record("natural policy gradient", "divergence factor per step", rate, seed=seed, certified=certified)
    plain = rng.uniform(-0.1, 0.1, (8, game.dimension))
    before = game.kl_to(centre, plain, certificate.weights)
    for _ in range(50):
        plain = euler(game.pseudo_gradient, plain, step)
    rate = float(np.max(game.kl_to(centre, plain, certificate.weights) / before) ** (1 / 50))
    run.record("Euclidean policy gradient", "divergence factor per step", rate, seed=seed)

    multiples = run.pick(
        quick=[1.0, 6.0], default=[1.0, 2.0, 4.0, 6.0, 8.0, 10.0], paper=list(np.geomspace(0.1, 10, 20))
    )
    for multiple in sorted({1.0, 6.0, *multiples}):
        for name, field in (
            ("natural policy gradient", geometry.pseudo_gradient),
            ("Euclidean policy gradient", game.pseudo_gradient),
        ):
            theta = rng.uniform(-0.1, 0.1, (4, game.dimension))
            before = game.kl_to(centre, theta, certificate.weights)
            for _ in range(30):
                theta = euler(field, theta, multiple * certificate.euler_step_max)
            stable = bool((game.kl_to(centre, theta, certificate.weights) < before).all())
            run.record(name, "stable", stable, seed=seed, multiple=float(multiple))
    ratios: list[float] = run.pick(quick=[], default=[], paper=list(np.geomspace(0.01, 100, 20)))
    for ratio in ratios:
        weights = np.array([1.0, ratio])
        at = SmallGainCertifier(weights=weights).certify(geometry, Box(centre, 0.1))
        run.record(SGN, "margin of the Markov game", at.margin, seed=seed, ratio=float(ratio))


def random_ensemble(run: Run, seed: int, rng: np.random.Generator) -> None:
    """Random curvatures R_i^T R_i + I and a random coupling of norm 1, at seven strengths."""
    games = run.pick(quick=2, default=5, paper=30)
    strengths = [float(c) for c in np.linspace(0, 2.5, 61)[np.linspace(0, 60, 7).astype(int)]]
    drawn = []
    for _ in range(games):
        first, second, R = rng.standard_normal((3, BLOCK, BLOCK))
        R /= np.linalg.norm(R, 2)
        drawn.append((first.T @ first + np.eye(BLOCK), second.T @ second + np.eye(BLOCK), R))
    for strength in strengths:
        certified, rosen, conservatism, steps = [], [], [], []
        for Q1, Q2, R in drawn:
            game = coupled_game(strength, R, Q1, Q2)
            certificate = SmallGainCertifier().certify(game)
            certified.append(certificate.feasible)
            rosen.append(certificate.euclidean_margin > 0)
            if certificate.feasible:
                conservatism.append(
                    certificate.margin / signed_margin(game.H[None], game.block_sizes, certificate.weights)
                )
                if run.scale == "paper":
                    steps.append(certificate.rk4_step_rigorous / stability_threshold(game.H, "rk4"))
        where: dict[str, Any] = {"seed": seed, "coupling": strength}
        run.record(SGN, "certified fraction of the ensemble", float(np.mean(certified)), **where)
        run.record(ROSEN, "certified fraction of the ensemble", float(np.mean(rosen)), **where)
        if conservatism:
            run.record(
                SGN, "median margin / signed margin in the same weights", float(np.median(conservatism)), **where
            )
        if steps:
            run.record(SGN, "median rigorous Runge-Kutta step / stability threshold", float(np.median(steps)), **where)


def structured_noise(run: Run, seed: int, R: np.ndarray, rng: np.random.Generator) -> None:
    """Mix the coupling with Gaussian noise, drawn apart for each direction, until norms no longer tell the whole."""
    trials = run.pick(quick=1, default=1, paper=12)
    shares: list[float] = run.pick(quick=[], default=[0.0, 0.5, 1.0], paper=[k / 10 for k in range(11)])
    for share in shares:
        for trial in range(trials):
            there, back = (
                (1 - share) * R + share * E / np.linalg.norm(E, 2) for E in rng.standard_normal((2, *R.shape))
            )
            identity = np.eye(BLOCK)
            game = QuadraticGame(np.block([[identity, STRONG * there], [WEAK * back.T, identity]]), (BLOCK, BLOCK))
            certificate = SmallGainCertifier().certify(game)
            best = optimal_signed_weights(game.H[None], game.block_sizes, start=certificate.weights)
            where: dict[str, Any] = {"seed": seed, "noise": share, "trial": trial}
            run.record(SGN, "margin under noise", certificate.margin, **where)
            run.record(SIGNED, "margin under noise", best.margin, **where)
            run.record(ROSEN, "margin under noise", certificate.euclidean_margin, **where)


def network_games(run: Run, seed: int, rng: np.random.Generator) -> None:
    """Players on a random sparse network, each with its own timescale, coupled up to a small gain of 0.9."""
    for players in run.pick(quick=[100], default=[100, 300], paper=[100, 300, 1000]):
        coupling = sp.random_array((players, players), density=8 / players, rng=rng, format="csr")
        coupling = sp.csr_array(
            coupling + sp.diags_array(np.ones(players - 1), offsets=1)
        )  # a cycle: strongly connected
        coupling = sp.csr_array(coupling + sp.coo_array(([1.0], ([players - 1], [0])), shape=coupling.shape))
        timescale = np.exp(rng.normal(0, 1.5, players))
        coupling = sp.csr_array(sp.diags_array(timescale) @ coupling @ sp.diags_array(1 / timescale))
        mu = rng.uniform(0.5, 1.5, players)
        gain = SmallGainCertifier().certify_bounds(GameBounds(mu, coupling, mu)).small_gain
        certificate = SmallGainCertifier().certify_bounds(GameBounds(mu, coupling * (0.9 / gain), mu))
        where: dict[str, Any] = {"seed": seed, "players": players}
        gap = 1 - certificate.margin / certificate.supremum
        run.record(SGN, "relative gap of the margin to its supremum", gap, **where)
        run.record(SGN, "margin of the network game", certificate.margin, **where)
        run.record(ROSEN, "margin of the network game", certificate.euclidean_margin, **where)


def draw_coupling(run: Run, couplings: np.ndarray, R: np.ndarray) -> None:
    from locally.plots import INK, canvas

    games = [coupled_game(coupling, R) for coupling in couplings]
    certificates = [SmallGainCertifier().certify(game) for game in games]
    figure, (left, right) = canvas(9.0, 3.8, ncols=2)
    left.axhline(0, color=INK, lw=0.8)
    left.plot(couplings, [c.margin for c in certificates], label=SGN)
    left.plot(couplings, [c.euclidean_margin for c in certificates], label=ROSEN)
    left.set(xlabel="coupling λ", ylabel="margin", ylim=(-3, 2), title="Where each test certifies (margin > 0)")
    left.legend(labelcolor=INK, loc="upper right")
    certified = [
        (coupling, c.euler_step_max) for coupling, c in zip(couplings, certificates, strict=True) if c.feasible
    ]
    right.plot(*zip(*certified, strict=True), label="certified step 2α/β²")
    thresholds = np.array([stability_threshold(game.H) for game in games])
    right.plot(couplings, np.where(thresholds > 0, thresholds, np.nan), label="stability threshold")
    right.set(
        xlabel="coupling λ",
        ylabel="Euler step",
        yscale="log",
        xlim=left.get_xlim(),
        title="Steps that keep Euler play stable",
    )
    right.legend(labelcolor=INK, loc="lower left")
    caption = "The 64-dimensional game: margins of both tests, and certified and stable steps, over the coupling."
    run.figure(figure, "margins and steps", caption)


def draw_trajectories(run: Run) -> None:
    from locally.plots import INK, canvas

    game = QuadraticGame(np.array([[1.0, STRONG], [WEAK, 1.0]]), (1, 1))
    certificate = SmallGainCertifier().certify(game)
    x = np.array([0.15, -0.15])
    points = [x]
    for _ in range(60):
        for _ in range(50):
            x = rk4(game.pseudo_gradient, x, 1e-3)
        points.append(x)
    time, path = np.arange(len(points)) * 0.05, np.array(points)
    figure, (left, right) = canvas(9.0, 3.8, ncols=2)
    left.plot(time, np.linalg.norm(path, axis=1) / np.linalg.norm(path[0]), label="Euclidean norm")
    left.plot(time, certificate.norm(path) / certificate.norm(path[0]), label="weighted norm")
    left.plot(time, np.exp(-certificate.margin * time), "--", color=INK, lw=1, label="certified")
    left.set(xlabel="time", ylabel="distance / start", title="Flow of the two-dimensional game")
    left.legend(labelcolor=INK)

    markov = coordination_game()
    geometry = FisherGeometry(markov)
    centre = np.zeros(markov.dimension)
    local = SmallGainCertifier().certify(geometry, Box(centre, 0.1))
    step, start = local.euler_step_max / 2, np.random.default_rng(0).uniform(-0.1, 0.1, markov.dimension)
    for name, field in (("natural", geometry.pseudo_gradient), ("Euclidean", markov.pseudo_gradient)):
        theta, values = start, []
        for _ in range(61):
            values.append(float(markov.kl_to(centre, theta, local.weights)))
            theta = euler(field, theta, step)
        right.plot(values, label=f"{name} policy gradient")
    rate = local.contraction(step) ** 2
    right.plot(values[0] * rate ** np.arange(61), "--", color=INK, lw=1, label="certified (natural)")
    right.set(xlabel="step", ylabel="divergence to equilibrium", yscale="log", title="Markov game")
    right.legend(labelcolor=INK)
    caption = "Left: the Euclidean distance grows before it falls, the weighted one falls. Right: two policy gradients."
    run.figure(figure, "contraction", caption)
