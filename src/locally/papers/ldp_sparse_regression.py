"""Error rates of three locally private protocols beside their bounds, a million private reports, and real records.

Rates are read off the law of the averages, which reaches user numbers that no computer can play; the rest draws every
user's noise. Baselines get the same bounds and budgets: unthresholded moments, noise on the records themselves (with
and without debiasing), private gradient descent without thresholding, and scikit-learn's lasso without privacy.
"""

import csv
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import toeplitz
from scipy.stats import beta
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LassoCV
from threadpoolctl import threadpool_limits

from locally.evidence import Run, Scale
from locally.plots import INK, PALETTE, canvas
from locally.privacy.regression import (
    Calibration,
    Crowd,
    GradientProtocol,
    L2BallRandomizer,
    LDPIterativeHardThresholding,
    MomentProtocol,
    MomentServer,
    NLDPSparseRegression,
    NotPrivateWarning,
    Population,
    PublicFeatureProtocol,
    SimulatedNoise,
    SparseFit,
    ThresholdingServer,
    analytic_gaussian_sigma,
    simulate_gradient_aggregate,
    simulate_moment_aggregate,
)
from locally.privacy.regression.theory import (
    interactive_lower_bound,
    interactive_upper_bound,
    moment_upper_bound,
    non_interactive_lower_bound,
    public_upper_bound,
)

NLDP, PUBLIC, IHT = "NLDP-LR", "NLDP-LR with public features", "LDP-IHT"
RAW = "private moments, no threshold"
SGD = "LDP-SGD (no thresholding)"
INPUT = "noise on the records, least squares"
DEBIASED = "noise on the records, debiased"
LASSO = "lasso (scikit-learn, no privacy)"
UPPER = {NLDP: moment_upper_bound, PUBLIC: public_upper_bound, IHT: interactive_upper_bound}

ERROR = "l2 error, individual reports"
R2 = "R^2 on held-out patients"
Curves = dict[tuple[str, str], list[list[float]]]  # (sweep, method) -> a row of errors for every seed
USERS = 10**17  # where privacy noise is all that is left of the error


def experiment(run: Run) -> None:
    parts: list[Callable[[Run], None]] = [rates, individual_reports, hostile_reports, audit, patients]
    if run.scale is Scale.PAPER:
        parts += [streamed_users, housing]
    run.parallel(do, parts, "parts of the study")


def do(run: Run, part: Callable[[Run], None]) -> None:
    # Thousands of small factorisations: several BLAS threads would spend their time waiting for each other.
    with warnings.catch_warnings(), threadpool_limits(limits=1, user_api="blas"):
        warnings.simplefilter("ignore", NotPrivateWarning)  # repeatable on purpose: these are no real people's reports
        part(run)


# Rates ---------------------------------------------------------------------------------------------------------------


SWEEPS = {"users": "n", "dimension": "d", "sparsity": "k", "epsilon": "epsilon"}


def rates(run: Run) -> None:
    """Slopes of the error in n, d, k and epsilon, each point the median of independent draws of the averages."""
    repeats = {
        "users": run.pick(quick=21, default=11, paper=101),
        "dimension": run.pick(quick=21, default=21, paper=101),
        "sparsity": run.pick(quick=7, default=21, paper=201),  # lost supports make these medians the least certain
        "epsilon": run.pick(quick=7, default=21, paper=101),
    }
    dimensions = run.pick(quick=[16, 32, 64, 128], default=[16, 32, 64, 128, 256], paper=[16, 32, 64, 128, 256, 512])
    points: dict[str, list[dict[str, Any]]] = {
        "users": [{"n": 10**e} for e in (13, 15, 17)],
        "dimension": [{"d": d} for d in dimensions],
        "sparsity": [{"k": k, "d": 64} for k in (1, 2, 4, 8, 16)],
        "epsilon": [{"epsilon": e} for e in (0.25, 0.5, 1.0, 2.0)],
    }
    curves: Curves = {}
    for seed in run.track(run.seeds, "rates"):
        rng = np.random.default_rng([6, seed])
        for name, letter in SWEEPS.items():
            at = [p[letter] for p in points[name]]
            errors = [aggregate_errors(rng, repeats[name], **p) for p in points[name]]
            if name == "dimension":
                for x, e in zip(at, errors, strict=True):
                    run.record(NLDP, "error / error without threshold", e[NLDP] / e[RAW], seed=seed, dimension=x)
            for method in errors[0]:
                values = [e[method] for e in errors]
                curves.setdefault((name, method), []).append(values)
                for x, value in zip(at, values, strict=True):
                    run.record(method, f"l2 error over {name}", value, seed=seed, **{name: x})
                # A single coefficient on the unit ball is found exactly by projection: the law starts at several.
                start = 2 if name == "sparsity" and method == IHT else 0
                slope = log_slope(at[start:], values[start:])
                run.record(method, f"slope of log error over log {name}", slope, seed=seed)
    figure_rates(run, points, curves)


def aggregate_errors(
    rng: np.random.Generator, repeats: int, n: int = USERS, d: int = 32, k: int = 4, epsilon: float = 1.0
) -> dict[str, float]:
    """Median l2 error of each protocol for ||theta|| = 1 with k equal entries and noise 0.5 in y."""
    population = Population(np.eye(d), flat_theta(d, k), 0.5)
    # Bounds and rounds are those for the largest n throughout: their logarithms are not what is measured.
    moments = MomentProtocol.for_users(USERS, d, epsilon, delta=1e-12)
    public = PublicFeatureProtocol.for_users(USERS, d, epsilon, delta=1e-12)
    gradients = GradientProtocol.for_users(USERS, d, epsilon, k)
    server = MomentServer(moments)
    public_server = MomentServer(public, math.sqrt(d) * np.eye(d))  # so many public features that their law is known
    errors: dict[str, list[float]] = {method: [] for method in (NLDP, RAW, PUBLIC, IHT)}
    for _ in range(repeats):
        found = simulate_moment_aggregate(server, population, n, rng)
        errors[NLDP].append(error(found.coef, population.theta))
        errors[RAW].append(error(found.raw, population.theta))
        found = simulate_moment_aggregate(public_server, population, n, rng)
        errors[PUBLIC].append(error(found.coef, population.theta))
        found = simulate_gradient_aggregate(ThresholdingServer(gradients), population, n, rng)
        errors[IHT].append(error(found.coef, population.theta))
    return {method: float(np.median(values)) for method, values in errors.items()}


def figure_rates(run: Run, points: dict[str, list[dict[str, Any]]], curves: Curves) -> None:
    figure, axes = canvas(10.0, 7.4, nrows=2, ncols=2)
    base: dict[str, Any] = {"n": USERS, "d": 32, "k": 4, "epsilon": 1.0}
    labels = ("users n", "dimension d", "nonzero coefficients k", "epsilon")
    for axis, label, (name, letter) in zip(axes.flat, labels, SWEEPS.items(), strict=True):
        settings = [base | p for p in points[name]]
        at = [s[letter] for s in settings]
        for colour, method in zip(PALETTE, (NLDP, PUBLIC, IHT, RAW), strict=False):
            values = np.array(curves[name, method])
            values[values == 0] = np.nan
            mean = values.mean(0)
            axis.plot(at, mean, "o-", ms=3.5, color=colour, label=method)
            axis.fill_between(at, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
            if method in UPPER:
                rate = np.array([UPPER[method](**s) for s in settings])
                axis.plot(at, rate * mean[-1] / rate[-1], ":", lw=1.2, color=colour)
        for bound, style, bound_name in (
            (non_interactive_lower_bound, "--", "lower bound, one-shot (constant 1)"),
            (interactive_lower_bound, "-.", "lower bound, interactive (constant 1)"),
        ):
            axis.plot(at, [bound(**s) for s in settings], style, lw=1.2, color=PALETTE[7], label=bound_name)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="l2 error")
        if name != "users":
            axis.set_xticks(at, [f"{x:g}" for x in at], minor=False)
            axis.minorticks_off()
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, labelcolor=INK)
    run.figure(
        figure,
        "error rates",
        "Error over users, dimension, sparsity and epsilon (line: mean over seeds; band: all seeds). Dotted: the upper "
        "bounds, moved to each curve's last point, so that slopes can be compared. Grey: the lower bounds with their "
        "unstated constant set to 1; the gap to them is that constant and logarithms of n, d and delta.",
    )


# Individual reports --------------------------------------------------------------------------------------------------


def individual_reports(run: Run) -> None:
    """n users with 10 features, 2 of them active, epsilon 4: each randomises their own record."""
    n = run.pick(quick=100_000, default=1_000_000, paper=1_000_000)
    d, k = 10, 2
    theta = flat_theta(d, k)
    population = Population(np.eye(d), theta, 0.5)
    bounds: dict[str, Any] = {"epsilon": 4.0, "clip_x": 3.0, "clip_y": 3.0}
    for seed in run.track(run.seeds, f"{n} users"):
        rng = np.random.default_rng([60, seed])
        X, y = population.sample(n, rng)
        public_X, _ = population.sample(5_000, rng)
        errors = {method: error(coef, theta) for method, coef in noisy_records(X, y, 4.0, 1e-6, 3.0, rng).items()}
        errors[LASSO] = error(lasso(X[:20_000], y[:20_000]), theta)

        model = one_shot(X, y, None, rng, radius=2 * math.sqrt(d), threshold_constant=0.5, **bounds)
        errors[NLDP], errors[RAW] = error(model.coef_, theta), error(model.fit_result_.raw, theta)
        run.record(NLDP, "error / error without threshold", errors[NLDP] / errors[RAW], seed=seed, n=n)
        run.record(NLDP, "smallest eigenvalue of the covariance", model.min_eigenvalue_, seed=seed, n=n)
        run.record(NLDP, "share of records clipped", model.n_clipped_ / n, seed=seed, n=n)

        errors[SGD] = error(interactive(X, y, d, 0.5, rng, **bounds).coef_, theta)
        draws: dict[str, list[float]] = {PUBLIC: [], IHT: []}
        for _ in range(run.pick(quick=1, default=3, paper=5)):
            coef = one_shot(X, y, public_X, rng, threshold_constant=0.5, **bounds).coef_
            draws[PUBLIC].append(error(coef, theta))
            draws[IHT].append(error(interactive(X, y, k, 0.5, rng, **bounds).coef_, theta))
        errors |= {method: float(np.median(values)) for method, values in draws.items()}
        for method in (NLDP, PUBLIC, IHT, RAW, SGD, INPUT, DEBIASED, LASSO):
            run.record(method, ERROR, errors[method], seed=seed, n=n)
    classical, joint = (
        MomentProtocol(n_features=d, delta=1e-6, radius=2 * math.sqrt(d), calibration=c, **bounds).releases[0]
        for c in (Calibration.CLASSICAL, Calibration.JOINT)
    )
    run.record(NLDP, "noise / noise of the paper's constants", joint.noise_scale / classical.noise_scale)
    run.plot_bars(
        ERROR,
        log=True,
        name="individual reports",
        caption=f"{n:,} users, 10 features, 2 active, ||theta|| = 1, epsilon 4, delta 1e-6. An error of 1 is the error "
        "of knowing nothing.",
    )


def one_shot(
    X: Float[ndarray, "n d"],
    y: Float[ndarray, " n"],
    public_X: Float[ndarray, "m d"] | None,
    rng: np.random.Generator,
    floor: float = 0.1,
    **options: float,
) -> NLDPSparseRegression:
    """NLDP-LR, with public features where there are some; eigenvalues that noise made small are raised to `floor`."""
    model = NLDPSparseRegression(
        public_X=public_X, on_indefinite="clip", floor=floor, random_state=rng, **cast(Any, options)
    )
    return model.fit(X, y)


def interactive(
    X: Float[ndarray, "n d"],
    y: Float[ndarray, " n"],
    sparsity: int,
    step: float,
    rng: np.random.Generator,
    **options: float,
) -> LDPIterativeHardThresholding:
    """LDP-IHT in eight rounds; with all coefficients kept it is private gradient descent."""
    model = LDPIterativeHardThresholding(
        sparsity=sparsity, step=step, n_rounds=8, random_state=rng, **cast(Any, options)
    )
    return model.fit(X, y)


def noisy_records(
    X: Float[ndarray, "n d"],
    y: Float[ndarray, " n"],
    epsilon: float,
    delta: float,
    clip: float,
    rng: np.random.Generator,
) -> dict[str, Float[ndarray, " d"]]:
    """What users do today: add noise to the clipped record itself; least squares, and with the noise taken off X'X."""
    n, d = X.shape
    sigma = analytic_gaussian_sigma(epsilon, delta, 2 * clip * math.sqrt(d + 1))
    noisy = np.clip(np.column_stack([X, y]), -clip, clip)
    noisy += sigma * rng.standard_normal((n, d + 1), dtype=np.float32)
    gram = noisy.T @ noisy / n
    covariance, cross = gram[:d, :d], gram[:d, d]
    eigenvalues, vectors = np.linalg.eigh(covariance - sigma**2 * np.eye(d))
    inverse = 1 / np.maximum(eigenvalues, 0.1)
    return {INPUT: np.linalg.solve(covariance, cross), DEBIASED: vectors @ (inverse * (vectors.T @ cross))}


def lasso(X: Float[ndarray, "n d"], y: Float[ndarray, " n"]) -> Float[ndarray, " d"]:
    return LassoCV(cv=5, fit_intercept=False, alphas=30).fit(X, y).coef_


# Reports that nobody honest sent -------------------------------------------------------------------------------------


def hostile_reports(run: Run) -> None:
    """Bytes from client to server, one report in fifty damaged or forged: none may reach the average."""
    n = run.pick(quick=20_000, default=100_000, paper=1_000_000)
    d = 10
    population = Population(np.eye(d), flat_theta(d, 2), 0.5)
    protocol = PublicFeatureProtocol.for_users(n, d, 4.0)
    for seed in run.track(run.seeds, "damaged reports"):
        rng = np.random.default_rng([61, seed])
        X, y = population.sample(n, rng)
        reports = list(Crowd(protocol, SimulatedNoise(rng)).reports(X, y))
        bad = set(rng.choice(n, n // 50, replace=False).tolist())
        mixed = (cast(bytes, damage(r, i)) if i in bad else r for i, r in enumerate(reports))
        server, honest = (MomentServer(protocol, math.sqrt(d) * np.eye(d)) for _ in range(2))
        found = server.fit(mixed)
        honest.fit(r for i, r in enumerate(reports) if i not in bad)
        let_in = found.accepted - honest.tally.accepted + int(np.abs(server.tally.total - honest.tally.total).max())
        run.record(PUBLIC, "damaged reports that were averaged in", let_in, seed=seed)
        run.record(PUBLIC, "reports rejected", sum(found.rejected.values()), seed=seed)


def damage(report: bytes, which: int) -> object:
    """A report cut short, with a flipped bit, of another version, of another protocol, out of range, or no bytes."""
    match which % 6:
        case 0:
            return report[:-1]
        case 1:
            return report[:30] + bytes([report[30] ^ 1]) + report[31:]
        case 2:
            return sealed(report[:4] + b"\x63" + report[5:-4])
        case 3:
            return sealed(report[:12] + bytes(8) + report[20:-4])
        case 4:
            return sealed(report[:24] + b"\xff\xff\xff\x7f" + report[28:-4])
        case _:
            return None


def sealed(body: bytes) -> bytes:
    """A forger gets the checksum right."""
    return body + zlib.crc32(body).to_bytes(4, "little")


# Audit ---------------------------------------------------------------------------------------------------------------


def audit(run: Run) -> None:
    """The best guess between two opposite records from one message bounds epsilon from below."""
    n, d, epsilon = run.pick(quick=50_000, default=100_000, paper=1_000_000), 10, 1.0
    randomizer = L2BallRandomizer(epsilon, 1.0, d)
    for seed in run.seeds:
        noise = SimulatedNoise(np.random.SeedSequence([62, seed]))
        v = np.eye(1, d).repeat(n, axis=0)
        hits, false_alarms = (int((randomizer.randomise(sign * v, noise)[:, 0] > 0).sum()) for sign in (1.0, -1.0))
        run.record(IHT, "audited epsilon / epsilon", audited_epsilon(hits, false_alarms, n) / epsilon, seed=seed)


def audited_epsilon(hits: int, false_alarms: int, n: int) -> float:
    """Clopper-Pearson 95 % lower bound on log(P(hit) / P(false alarm))."""
    low = beta.ppf(0.025, hits, n - hits + 1)
    high = beta.ppf(0.975, false_alarms + 1, n - false_alarms)
    return float(np.log(low / high))


# Real records --------------------------------------------------------------------------------------------------------


def patients(run: Run) -> None:
    """scikit-learn's diabetes table: users are drawn with replacement from two thirds of the patients."""
    X, y = standardised(*load_diabetes(return_X_y=True, scaled=False))
    n = run.pick(quick=50_000, default=200_000, paper=3_000_000)
    table_study(run, X, y, n, R2, epsilon=4.0, sparsity=3, step=0.25)
    run.plot_bars(
        R2,
        name="real records",
        caption=f"scikit-learn's diabetes table, {n:,} users drawn from 295 patients, epsilon 4: R^2 on the other 147. "
        "Its features are nearly collinear, which one-shot moments do not survive; below 0 is worse than the mean.",
    )


def table_study(
    run: Run, X: ndarray, y: ndarray, n: int, metric: str, *, epsilon: float, sparsity: int, step: float
) -> None:
    """R^2 on a third of the rows; n users are drawn with replacement from the others.

    Standardisation uses the table's own means and deviations, which stand for published ones.
    """
    d = X.shape[1]
    bounds = {"epsilon": epsilon, "clip_x": 3.0, "clip_y": 2.5}
    for seed in run.track(run.seeds, metric):
        rng = np.random.default_rng([63, seed])
        order = rng.permutation(len(y))
        train, test = order[len(y) // 3 :], order[: len(y) // 3]
        drawn = rng.choice(train, n)
        users_X, users_y = X[drawn], y[drawn]
        coefs = {
            NLDP: one_shot(users_X, users_y, None, rng, radius=1.6 * math.sqrt(d), floor=0.5, **bounds).coef_,
            PUBLIC: one_shot(users_X, users_y, X[test], rng, floor=0.5, **bounds).coef_,
            IHT: interactive(users_X, users_y, sparsity, step, rng, **bounds).coef_,
            INPUT: noisy_records(users_X, users_y, epsilon, 1e-6, 3.0, rng)[INPUT],
            LASSO: lasso(X[train], y[train]),
        }
        for method, coef in coefs.items():
            residual = np.sum((y[test] - X[test] @ coef) ** 2) / np.sum((y[test] - y[train].mean()) ** 2)
            run.record(method, metric, 1 - residual, seed=seed, epsilon=epsilon)


def standardised(X: ndarray, y: ndarray) -> tuple[ndarray, ndarray]:
    return (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()


# Full size -----------------------------------------------------------------------------------------------------------


def streamed_users(
    run: Run, sizes: Sequence[int] = (10**5, 10**6, 10**7), dimensions: Sequence[int] = (16, 64, 256)
) -> None:
    """Individually randomised messages of up to ten million users with correlated features, drawn as needed."""
    for seed in run.track(run.seeds, "streamed users"):
        rng = np.random.default_rng([64, seed])
        for d in dimensions:
            population = Population(toeplitz((2 / 3) ** np.arange(d)), flat_theta(d, 4), 1.0)
            step = 1 / float(np.linalg.eigvalsh(population.covariance)[-1])
            errors: dict[str, list[float]] = {PUBLIC: [], IHT: []}
            for n in sizes:
                protocol = GradientProtocol.for_users(n, d, 8.0, 4)
                found = play_interactive(ThresholdingServer(protocol, step=step), population, n, rng)
                errors[IHT].append(error(found.coef, population.theta))
                public_X, _ = population.sample(50 * d, rng)
                server = MomentServer(PublicFeatureProtocol.for_users(n, d, 8.0), public_X, inverse_bound="public")
                play_one_shot(server, population, n, rng)
                errors[PUBLIC].append(error(server.result().coef, population.theta))
            for method, values in errors.items():
                for n, value in zip(sizes, values, strict=True):
                    run.record(method, "l2 error, streamed users", value, seed=seed, n=n, d=d)
                slope = log_slope(sizes, values)
                run.record(method, "slope of log error over log users, individual messages", slope, seed=seed, d=d)


def play_one_shot(server: MomentServer, population: Population, n: int, rng: np.random.Generator) -> None:
    crowd = Crowd(server.protocol, SimulatedNoise(rng))
    for X, y in stream(population, n, rng):
        for payload in crowd.payloads(X, y):
            server.tally.add_payloads(payload)


def play_interactive(server: ThresholdingServer, population: Population, n: int, rng: np.random.Generator) -> SparseFit:
    crowd = Crowd(server.protocol, SimulatedNoise(rng))
    while not server.finished:
        request = server.request()
        for X, y in stream(population, n // server.protocol.n_rounds, rng):
            for payload in crowd.payloads(X, y, request):
                server.tally.add_payloads(payload)
        server.close_round()
    return server.result()


def stream(population: Population, n: int, rng: np.random.Generator) -> Iterator[tuple[ndarray, ndarray]]:
    for start in range(0, n, 10_000):
        yield population.sample(min(10_000, n - start), rng)


def housing(run: Run, n: int = 10_000_000) -> None:
    """The California housing table of the StatLib archive, ten million users drawn from its districts."""
    file = run.data("california_housing/cal_housing.data", "the California housing table, nine comma-separated columns")
    X, y = read_housing(file)
    for epsilon in (1.0, 2.0, 4.0, 8.0):
        table_study(run, X, y, n, "R^2 on held-out districts", epsilon=epsilon, sparsity=4, step=0.25)
    run.plot_lines("epsilon", "R^2 on held-out districts", name="housing")


def read_housing(file: Path) -> tuple[ndarray, ndarray]:
    """Longitude, latitude, age, rooms, bedrooms, population, households, income, value -> the usual eight features."""
    with file.open(newline="") as lines:
        rows = np.array([[float(cell) for cell in row] for row in csv.reader(lines) if row])
    if rows.ndim != 2 or rows.shape[1] != 9:
        raise ValueError(f"{file} must hold nine columns, got shape {rows.shape}")
    longitude, latitude, age, rooms, bedrooms, people, households, income, value = rows.T
    features = [
        income,
        age,
        rooms / households,
        bedrooms / households,
        people,
        people / households,
        latitude,
        longitude,
    ]
    return standardised(np.column_stack(features), value)


def flat_theta(d: int, k: int) -> Float[ndarray, " d"]:
    """Norm 1, the first k entries equal."""
    return np.where(np.arange(d) < k, 1 / math.sqrt(k), 0.0)


def error(coef: Float[ndarray, " d"], theta: Float[ndarray, " d"]) -> float:
    return float(np.linalg.norm(coef - theta))


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(np.array(x, dtype=float)), np.log(y), 1)[0])
