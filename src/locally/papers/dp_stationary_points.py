"""Small gradients per privacy budget: Private SpiderBoost and its companions beside noisy gradient descent and DP-SGD.

Sizes are searched on instances of their own, with a grid of powers of two around each method's theory, and judged on
fresh ones. Choosing them is not charged to the budget, for any method alike.
"""

import gzip
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor, nn

from locally.evidence import Run
from locally.evidence.drawings import lines
from locally.plots import INK, canvas
from locally.privacy.stationary import (
    SIGMOID_SQUARE,
    Adjacency,
    HardInstance,
    JohnsonLindenstrauss,
    LinearModel,
    Method,
    ModuleObjective,
    NoisyGradientDescent,
    Objective,
    Output,
    PrivateResult,
    PrivateSpiderBoost,
    PrivateTreeSpider,
    RecursiveRegularization,
    Solver,
    audit_spiderboost,
    theorem_sizes,
    worst_case_pair,
)
from locally.privacy.stationary.instances import logistic_population, low_rank_model
from locally.privacy.stationary.tables import TABLES

DELTA = 1e-5
SPIDER, DESCENT, SGD = "Private SpiderBoost", "noisy gradient descent", "DP-SGD"
TREE, RECURSIVE, PHASED = "tree-based SPIDER", "recursive regularisation", "recursive regularisation, one pass"
PROJECTED = "Private SpiderBoost on a random projection"
BUDGET: dict[str, Any] = {"epsilon": 1.0, "delta": DELTA}

Configured = PrivateSpiderBoost | NoisyGradientDescent
Norms = dict[str, list[list[float]]]  # method -> gradient norms, point by point and seed by seed
Task = Callable[[Run], Any]
Study = Generator[list[Task], list[Any], None]  # hands out its independent tasks, is sent what they return


def experiment(run: Run) -> None:
    if run.scale == "paper":
        mnist(run)  # first, so that a missing file is noticed at once
    together(run, [study(run) for study in (empirical, population, tables, low_rank, optimisation_limited, audited)])


def together(run: Run, studies: Sequence[Study]) -> None:
    """The tasks of all studies side by side, so that no core waits at the end of one."""
    asked = [next(study) for study in studies]
    found = iter(run.parallel(do, [task for tasks in asked for task in tasks], "instances"))
    for study, tasks in zip(studies, asked):
        with suppress(StopIteration):
            study.send([next(found) for _ in tasks])


def do(run: Run, task: Task) -> Any:
    """Thousands of small products in a row: on a busy machine threads spend more in waiting than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return task(run)
    finally:
        torch.set_num_threads(before)


def mean_gradient_norm(objective: Objective, found: PrivateResult) -> float:
    """||grad F|| averaged over the points that the output is drawn from (every k-th of long runs): its expectation."""
    if found.trace is None:
        return float(objective.exact_gradient(found.w).norm())
    drawn_from_all = len(found.trace.iterates) == len(found.trace.estimates)  # leaves of trees; else w_1 ... w_T
    iterates = found.trace.iterates if drawn_from_all else found.trace.iterates[1:]
    return float(np.mean([float(objective.exact_gradient(w).norm()) for w in iterates[:: 1 + len(iterates) // 128]]))


def record_exponents(run: Run, metric: str, sizes: list[float], norms: Norms) -> dict[str, list[float]]:
    """Per method and seed, the slope of log gradient norm over log size."""
    slopes = {name: np.polyfit(np.log(sizes), np.log(table), 1)[0].tolist() for name, table in norms.items()}
    for name, values in slopes.items():
        for seed, slope in zip(run.seeds, values):
            run.record(name, metric, slope, seed=seed)
    return slopes


# Empirical risk on the hard instance: slopes in epsilon, n and d ------------------------------------------------------

THEORY = {DESCENT: 1 / 2, SPIDER: 2 / 3}  # exponents of the rates in sqrt(d log(1/delta)) / (n epsilon)
TUNING_SEED = 1_000_000  # no run has it, so that no instance is both chosen and judged on


class Problem(NamedTuple):
    n: int = 10_000
    d: int = 200
    epsilon: float = 1.0

    @property
    def abar(self) -> float:
        return math.sqrt(self.d * math.log(1 / DELTA)) / (self.n * self.epsilon)


class Sweep(NamedTuple):
    axis: str
    power: float  # of the axis in Problem.abar
    values: list[float]
    points: list[Problem]


def empirical(run: Run) -> Study:
    budgets = run.pick(quick=[0.5, 4.0], default=[0.25, 0.5, 1.0, 2.0, 4.0], paper=[0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
    sizes = run.pick(quick=[], default=[4000, 10_000, 25_000], paper=[4000, 10_000, 25_000, 60_000, 150_000])
    dimensions = run.pick(quick=[], default=[50, 200, 800], paper=[50, 100, 200, 400, 800])
    sweeps = [
        Sweep("epsilon", -1.0, budgets, [Problem(epsilon=epsilon) for epsilon in budgets]),
        Sweep("n", -1.0, [float(n) for n in sizes], [Problem(n=n) for n in sizes]),
        Sweep("d", 0.5, [float(d) for d in dimensions], [Problem(d=d) for d in dimensions]),
    ]
    sweeps = [sweep for sweep in sweeps if sweep.points]
    # sweeps meet in a point; the large ones first, so that no core is left alone with one
    points = sorted({at for sweep in sweeps for at in sweep.points}, key=lambda at: -at.n * at.d)
    found = dict(zip(points, (yield [partial(compare_at, at=at) for at in points])))
    norms = [record_sweep(run, sweep, found) for sweep in sweeps]
    compare_budgets(run, sweeps[0], norms[0])
    plot_rates(run, sweeps, norms)


Compared = dict[str, tuple[int, list[float]]]  # method -> its steps, and the gradient norm of each seed


def compare_at(run: Run, at: Problem) -> Compared:
    """Both methods at one point, each with sizes of its own."""
    chosen = {DESCENT: tuned(at, descent_grid(at)), SPIDER: tuned(at, spider_grid(at))}
    norms: dict[str, list[float]] = {name: [] for name in chosen}
    for seed in run.seeds:
        objective = HardInstance(at.n, at.d, seed)
        for name, method in chosen.items():
            norms[name].append(mean_gradient_norm(objective, method.minimize(objective, rng=seed)))
    return {name: (method.steps, norms[name]) for name, method in chosen.items()}


def record_sweep(run: Run, sweep: Sweep, found: Mapping[Problem, Compared]) -> Norms:
    """What was found along a sweep; measured exponents beside the theory's."""
    norms: Norms = {name: [] for name in THEORY}
    for value, at in zip(sweep.values, sweep.points):
        setting: dict[str, Any] = {sweep.axis: value}
        for name, (steps, by_seed) in found[at].items():
            run.record(name, "steps", steps, **setting)
            norms[name].append(by_seed)
            for seed, norm in zip(run.seeds, by_seed):
                run.record(name, "gradient norm", norm, seed=seed, **setting)
    metric = f"exponent of the gradient norm in {sweep.axis}"
    record_exponents(run, metric, sweep.values, norms)
    for name, exponent in THEORY.items():
        run.record(f"{name}, theory", metric, sweep.power * exponent)
    return norms


def tuned(at: Problem, grid: list[Configured]) -> Configured:
    """The configuration with the smallest mean gradient norm on an instance that no seed of the run sees."""
    objective = HardInstance(at.n, at.d, TUNING_SEED)
    return min(grid, key=lambda method: mean_gradient_norm(objective, method.minimize(objective, rng=TUNING_SEED)))


def descent_grid(at: Problem) -> list[Configured]:
    """T = 1 / abar, the theory's number of steps, and powers of two below it."""
    steps = sorted({max(2, round(2.0**-k / at.abar)) for k in range(5)})
    return [NoisyGradientDescent(epsilon=at.epsilon, delta=DELTA, steps=T, keep_trace=True) for T in steps]


def spider_grid(at: Problem) -> list[Configured]:
    """Theorem B.3 with T scaled down and q up by powers of two: its constants are not tuned."""
    L0 = math.sqrt(1 + HardInstance.slope**2)
    sizes = theorem_sizes(at.n, at.d, at.epsilon, DELTA, L0, 1.0, HardInstance.initial_gap)
    steps = [max(2, round(2.0**-k * sizes.steps)) for k in (2, 3)]
    grid = sorted({(T, min(T, up * sizes.phase)) for T in steps for up in (1, 2)})
    return [PrivateSpiderBoost(epsilon=at.epsilon, delta=DELTA, steps=T, phase=q, keep_trace=True) for T, q in grid]


def compare_budgets(run: Run, sweep: Sweep, norms: Norms) -> None:
    """What the card claims of the sweep over epsilon."""
    ratios = np.array(norms[SPIDER]) / np.array(norms[DESCENT])  # budgets x seeds
    slopes = record_exponents(
        run, "exponent of the gradient norm in sqrt(d) / (n epsilon)", [at.abar for at in sweep.points], norms
    )
    for i, seed in enumerate(run.seeds):
        claimed = {
            "gradient norm / that of noisy gradient descent, epsilon 4": ratios[sweep.values.index(4.0), i],
            "largest gradient norm / that of noisy gradient descent, over epsilon": ratios[:, i].max(),
            "exponent of the gradient norm in sqrt(d) / (n epsilon), minus noisy gradient descent's": slopes[SPIDER][i]
            - slopes[DESCENT][i],
        }
        for metric, value in claimed.items():
            run.record(SPIDER, metric, value, seed=seed)


def plot_rates(run: Run, sweeps: list[Sweep], norms: list[Norms]) -> None:
    """Gradient norm along each sweep, with the theory's slopes through the middle of either line."""
    figure, axes = canvas(width=3.2 + 3.2 * len(sweeps), ncols=len(sweeps), squeeze=False, sharey=True)
    for panel, sweep, found in zip(axes[0], sweeps, norms):
        x = np.array(sweep.values)
        for name, exponent in THEORY.items():
            y = np.mean(found[name], axis=1)
            (line,) = panel.loglog(x, y, "o-", markersize=4, label=name)
            guide = np.exp(np.log(y).mean()) * (x / np.exp(np.log(x).mean())) ** (sweep.power * exponent)
            panel.loglog(x, guide, "--", lw=1, color=line.get_color(), label="slope of its theory")
        panel.set_xlabel(sweep.axis)
        label_points(panel, sweep.values)
    axes[0, 0].set_ylabel("mean gradient norm of the iterates")
    axes[0, 0].legend(labelcolor=INK)
    caption = "Hard instance; n = 10 000, d = 200 and epsilon = 1 but for what varies. Each size tuned on its own."
    run.figure(figure, "gradient norm over budget, examples and dimension", caption)


def label_points(axes: Any, values: list[float]) -> None:
    """Tick a logarithmic x-axis at the points themselves, in plain figures, and thin out the other axis."""
    axes.set_xticks(values, [f"{v:g}" for v in values])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "25" else ""))


# Population risk: one pass and convex losses --------------------------------------------------------------------------


def population(run: Run) -> Study:
    """Gradient norm of the population risk over n, at epsilon 1: every seed averages over samples of its own."""
    sizes = run.pick(quick=[500, 2000], default=[1000, 4000, 16_000], paper=[1000, 4000, 16_000, 64_000, 256_000])
    samples = run.pick(quick=1, default=2, paper=20)
    points = [(n, seed) for n in reversed(sizes) for seed in run.seeds]
    tasks: list[Task] = [partial(judge_population, n=n, seed=seed, samples=samples) for n, seed in points]
    found = dict(zip(points, (yield tasks)))
    norms: Norms = {
        name: [[found[n, seed].norms[name] for seed in run.seeds] for n in sizes] for name in POPULATION_METHODS
    }
    # Theorem 3.2 holds up to sqrt(2 D) (D / 2 + 1), which still grows at these sizes.
    depths = [found[n, run.seeds[0]].depth for n in sizes]
    leading = [[norm / (math.sqrt(2 * D) * (D / 2 + 1)) for norm in row] for D, row in zip(depths, norms[TREE])]
    for i, n in enumerate(sizes):
        for j, seed in enumerate(run.seeds):
            for name, table in norms.items():
                run.record(name, "population gradient norm", table[i][j], seed=seed, n=n)
    values, metric = [float(n) for n in sizes], "exponent of the population gradient norm in n"
    record_exponents(run, metric, values, norms)
    record_exponents(run, f"{metric}, theorem's logarithms divided out", values, {TREE: leading})
    for name, exponent in ((TREE, -1 / 3), (RECURSIVE, -1 / 2), (PHASED, -1 / 2)):
        run.record(f"{name}, theory", metric, exponent)
    caption = (
        "Logistic regression in 5 dimensions, epsilon 1, gradient of the population risk. Theory, up to logarithms: "
        "n^(-1/3) or faster for the tree, n^(-1/2) or faster for the recursion."
    )
    plot_sweep(run, "n", "population gradient norm", "population gradient norm over n", caption)


class Judged(NamedTuple):
    norms: dict[str, float]  # method -> mean gradient norm over the samples
    depth: int  # of the tree


def judge_population(run: Run, n: int, seed: int, samples: int) -> Judged:
    judge, models = logistic_population(n, 5, seed, samples)
    norms = {}
    for name, configured in POPULATION_METHODS.items():
        drawn = models[:1] if name == PHASED else models  # one step an example: the slowest by far
        norms[name] = float(
            np.mean([mean_gradient_norm(judge, configured(m).minimize(m, rng=seed + k)) for k, m in enumerate(drawn)])
        )
    return Judged(norms, PrivateTreeSpider.for_problem(models[0], **BUDGET).depth)


def spider_for(model: LinearModel) -> PrivateSpiderBoost:
    """Theorem B.3 with a quarter of its steps and twice its phase, as the search on the hard instance suggests."""
    sizes = theorem_sizes(model.size, model.dimension, 1.0, DELTA, model.lipschitz, model.smoothness, math.log(2))
    steps = min(max(8, sizes.steps // 4), 400)
    return PrivateSpiderBoost(**BUDGET, steps=steps, phase=min(steps, 2 * sizes.phase), keep_trace=True)


def descent_for(model: LinearModel) -> NoisyGradientDescent:
    """A quarter of the theory's 1 / abar steps, for the same reason."""
    steps = round(0.25 / Problem(model.size, model.dimension).abar)
    return NoisyGradientDescent(**BUDGET, steps=min(max(8, steps), 400), keep_trace=True)


def recursion_for(model: LinearModel, solver: Solver = Solver.NOISY_GD) -> RecursiveRegularization:
    return RecursiveRegularization(**BUDGET, radius=10.0, solver=solver, max_steps=200)


POPULATION_METHODS: Mapping[str, Callable[[LinearModel], Method]] = {
    TREE: lambda model: PrivateTreeSpider.for_problem(model, **BUDGET, keep_trace=True),
    RECURSIVE: recursion_for,
    PHASED: lambda model: recursion_for(model, Solver.PHASED_SGD),
    SPIDER: spider_for,
    DESCENT: descent_for,
}


def plot_sweep(run: Run, x: str, y: str, name: str, caption: str) -> None:
    figure = lines(run.measures, x, y, log=True)
    (axes,) = figure.axes
    label_points(axes, sorted({float(m.setting[x]) for m in run.measures if m.metric == y and x in m.setting}))
    run.figure(figure, name, caption)


# Generalised linear models --------------------------------------------------------------------------------------------


def low_rank(run: Run) -> Study:
    """Private SpiderBoost with and without a random projection on rank-20 data in growing dimension, epsilon 4."""
    dimensions = run.pick(quick=[100, 400], default=[250, 1000, 4000], paper=[500, 2000, 8000, 32_000])
    points = [(d, seed) for d in reversed(dimensions) for seed in run.seeds]
    found = dict(zip(points, (yield [partial(compare_at_low_rank, d=d, seed=seed) for d, seed in points])))
    norms: Norms = {
        name: [[found[d, seed][name] for seed in run.seeds] for d in dimensions]
        for name in (PROJECTED, SPIDER, DESCENT)
    }
    for i, d in enumerate(dimensions):
        for j, seed in enumerate(run.seeds):
            for name, table in norms.items():
                run.record(name, "gradient norm, rank 20", table[i][j], seed=seed, dimension=d)
    record_exponents(run, "exponent of the gradient norm in d at rank 20", [float(d) for d in dimensions], norms)
    caption = (
        "Sigmoid-square regression on rank-20 rows, epsilon 4, projection to 100 dimensions. Noisy gradient descent "
        "on a linear model depends on the rank only, too: noise outside the span of the rows moves no prediction."
    )
    plot_sweep(run, "dimension", "gradient norm, rank 20", "gradient norm over dimension at rank 20", caption)


def compare_at_low_rank(run: Run, d: int, seed: int) -> dict[str, float]:
    n, rank, k = run.pick(quick=1000, default=1000, paper=5000), 20, 100
    sizes: dict[str, Any] = {"epsilon": 4.0, "delta": DELTA, "steps": 64, "keep_trace": True}
    spider = PrivateSpiderBoost(**sizes, phase=16)
    methods: dict[str, Method | JohnsonLindenstrauss] = {
        PROJECTED: JohnsonLindenstrauss(spider, k),
        SPIDER: spider,
        DESCENT: NoisyGradientDescent(**sizes),
    }
    model = low_rank_model(n, d, rank, seed)
    return {name: mean_gradient_norm(model, method.minimize(model, rng=seed)) for name, method in methods.items()}


def optimisation_limited(run: Run) -> Study:
    """Where noise is small beside the way still to go, there is nothing to win: both methods make the same steps."""
    yield [partial(make_same_steps, seed=seed) for seed in run.seeds]


def make_same_steps(run: Run, seed: int) -> None:
    n, d, steps = run.pick(quick=(4000, 20, 50), default=(20_000, 100, 100), paper=(20_000, 100, 800))
    sizes: dict[str, Any] = {"epsilon": 4.0, "delta": DELTA, "steps": steps, "keep_trace": True}
    spider, descent = PrivateSpiderBoost(**sizes, phase=max(4, steps // 8)), NoisyGradientDescent(**sizes)
    generator = torch.Generator().manual_seed(seed)
    X = nn.functional.normalize(torch.randn(n, d, generator=generator))
    y = (torch.rand(n, generator=generator) < torch.sigmoid(20 * X[:, 0])).float()
    model = LinearModel(X, y, data_norm=1 + 1e-5, loss=SIGMOID_SQUARE)
    ours, theirs = (mean_gradient_norm(model, method.minimize(model, rng=seed)) for method in (spider, descent))
    run.record(SPIDER, "gradient norm / that of noisy gradient descent, optimisation-limited", ours / theirs, seed=seed)


def tables(run: Run) -> Study:
    """Logistic regression on half of a table that ships with scikit-learn, judged on the other half."""
    names = list(TABLES)[: run.pick(quick=1, default=2, paper=2)]
    budgets = run.pick(quick=[4.0], default=[1.0, 4.0], paper=[1.0, 2.0, 4.0, 8.0])
    yield [partial(judge_on_table, table=table, epsilon=epsilon) for table in names for epsilon in budgets]


def judge_on_table(run: Run, table: str, epsilon: float) -> None:
    """All seeds in one task: the noise of the sampled method takes longer to calibrate than to run, once a process."""
    X, y = TABLES[table]()
    budget: dict[str, Any] = {"epsilon": epsilon, "delta": DELTA}
    methods: dict[str, Method] = {
        SPIDER: PrivateSpiderBoost(**budget, steps=64, phase=16),
        DESCENT: NoisyGradientDescent(**budget, steps=64),
        SGD: NoisyGradientDescent(**budget, steps=64, batch=128, adjacency=Adjacency.ADD_REMOVE),
        RECURSIVE: RecursiveRegularization(**budget, radius=10.0, max_steps=64),
        PHASED: RecursiveRegularization(**budget, radius=10.0, solver=Solver.PHASED_SGD),
    }
    for seed in run.seeds:
        order = np.random.default_rng(seed).permutation(len(X))
        train, test = (LinearModel(X[h], y[h], data_norm=1 + 1e-12) for h in np.array_split(order, 2))
        every = methods | {TREE: PrivateTreeSpider.for_problem(train, **budget)}
        for name, method in every.items():
            w = method.minimize(train, rng=seed).w
            right = float(((test.X @ w > 0) == (test.y > 0.5)).double().mean())
            judged = {"held-out gradient norm": float(test.exact_gradient(w).norm()), "held-out accuracy": right}
            for metric, value in judged.items():
                run.record(name, metric, value, seed=seed, table=table, epsilon=epsilon)


def audited(run: Run) -> Study:
    """Full runs on the pair of inputs that is easiest to tell apart; the shown epsilon must stay under the claimed."""
    yield [partial(audit, seed=seed) for seed in run.seeds]


def audit(run: Run, seed: int) -> None:
    """The claim is small enough that a fifth of the noise is found out with this many runs."""
    method = PrivateSpiderBoost(epsilon=1.0, delta=0.01, steps=4, phase=2, output=Output.LAST)
    first, _ = worst_case_pair(method.adjacency)
    anchor, variation = (m.noise_multiplier / 5 for m in method.privacy_statement(first).mechanisms)
    cheating = replace(method, epsilon=None, noise_multipliers=(anchor, variation))
    runs = run.pick(quick=200, default=500, paper=20_000)
    shown = audit_spiderboost(method, runs=runs, confidence=0.999, rng=seed).epsilon
    run.record(SPIDER, "epsilon that an audit shows", shown, seed=seed)
    run.record(SPIDER, "epsilon that an audit shows beyond the claimed", max(0.0, shown - 1.0), seed=seed)
    shown = audit_spiderboost(cheating, runs=runs, confidence=0.999, rng=seed).epsilon
    run.record("Private SpiderBoost with a fifth of its noise", "epsilon that an audit shows", shown, seed=seed)


# Full size: networks on MNIST -----------------------------------------------------------------------------------------


def mnist(run: Run, cycles: int = 30) -> None:
    """Private SpiderBoost and DP-SGD at equal budget and equal number of per-example gradients."""
    images = read_idx(run.data("mnist/train-images-idx3-ubyte.gz", "MNIST training images in IDX format"))
    labels = read_idx(run.data("mnist/train-labels-idx1-ubyte.gz", "MNIST training labels in IDX format"))
    x = torch.as_tensor(images, device=run.device).unsqueeze(1).float() / 255
    y = torch.as_tensor(labels, device=run.device).long()
    n, phase = len(x), 10
    batch = max(1, n // 60)
    worst = dict.fromkeys(run.seeds, 0.0)
    for epsilon in run.track([1.0, 3.0, 8.0], "MNIST budgets"):
        shared: dict[str, Any] = {
            "epsilon": epsilon,
            "delta": DELTA,
            "learning_rate": 0.25,
            "adjacency": Adjacency.ADD_REMOVE,
            "keep_trace": True,
        }
        # A phase costs one anchor on 10 batches and 9 variations at two gradients each: 28 batches of gradients.
        batches: dict[str, Any] = {"anchor_batch": min(n, 10 * batch), "variation_batch": batch}
        methods: dict[str, Configured] = {
            SPIDER: PrivateSpiderBoost(**shared, **batches, steps=phase * cycles, phase=phase),
            SGD: NoisyGradientDescent(**shared, steps=28 * cycles, batch=batch),
        }
        for seed in run.seeds:
            norms = {}
            for name, method in methods.items():
                torch.manual_seed(seed)
                net = convolutional().to(run.device)
                objective = ModuleObjective(net, nn.functional.cross_entropy, x, y, lipschitz=1.0, smoothness=1.0)
                found = method.minimize(objective, rng=torch.Generator().manual_seed(seed))
                assert found.trace is not None
                picked = found.trace.iterates[1:][:: max(1, method.steps // 10)]
                norms[name] = float(np.mean([float(objective.exact_gradient(w).norm()) for w in picked]))
                objective.load(found.trace.iterates[-1])
                run.record(name, "gradient norm, MNIST", norms[name], seed=seed, epsilon=epsilon)
                run.record(name, "training accuracy, MNIST", accuracy(net, x, y), seed=seed, epsilon=epsilon)
            worst[seed] = max(worst[seed], norms[SPIDER] / norms[SGD])
    for seed, ratio in worst.items():
        run.record(SPIDER, "largest gradient norm / DP-SGD's, MNIST, epsilon 1, 3 and 8", ratio, seed=seed)


def convolutional() -> nn.Sequential:
    """About 26 000 parameters, tanh as is usual under clipping."""
    features = nn.Sequential(nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1))
    features.extend([nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1), nn.Flatten()])
    return nn.Sequential(features, nn.Linear(32 * 4 * 4, 32), nn.Tanh(), nn.Linear(32, 10))


def accuracy(net: nn.Module, x: Float[Tensor, "n 1 h w"], y: Int[Tensor, " n"]) -> float:
    with torch.no_grad():
        right = sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(4096), y.split(4096)))
    return right / len(y)


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes in IDX format, gzipped: magic 0 0 8 ndim, big-endian sizes, then the entries."""
    raw = gzip.decompress(path.read_bytes())
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    ndim = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=ndim, offset=4).astype(int)
    entries = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * ndim)
    if entries.size != shape.prod():
        raise ValueError(f"{path} announces {shape.prod()} entries and holds {entries.size}")
    return entries.reshape(shape).copy()
