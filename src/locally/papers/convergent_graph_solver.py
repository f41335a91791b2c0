"""Contraction and gradients of the layer; then networks trained on small systems and asked about larger ones.

Pore networks are diffusion through a porous medium; every network sees the same graphs in the same order. At paper
scale also graph value iteration, shortest paths, and percolation and PROTEINS as classifications of graphs.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from locally.evidence import Run
from locally.solvers.convergent_graph import (
    APPNP,
    CGS,
    GIN,
    IGNN,
    SSE,
    Activation,
    ContractingFixedPoint,
    FixedPointSolver,
    Graph,
    StackedGNN,
    disjoint_union,
    make_percolating_network,
    make_pore_network,
    make_shortest_path_graph,
    make_value_iteration_graph,
    policy_accuracy,
    read_tu_dataset,
    train,
)

Generator = np.random.Generator
Sample = tuple[Graph, Tensor]
Models = Mapping[str, Callable[[], nn.Module]]
OURS = "CGS, contraction 0.9"


@dataclass(frozen=True)
class Training:
    """How all networks of a task are trained: Adam under a cosine schedule that restarts every `cycle` updates."""

    updates: int
    graphs: int  # in each update
    fresh: int  # updates between new graphs
    lr: float
    cycle: int


@dataclass(frozen=True)
class Study:
    pores: Training
    values: Training | None  # None: not at this scale
    paths: Training | None
    percolation: Training | None
    baselines: bool  # all of them, or only the ones that the claims of this scale speak of
    tests: int  # graphs of each size
    proteins: bool = False


PUBLISHED_PORES = Training(updates=1000, graphs=32, fresh=32, lr=1e-3, cycle=32)
PUBLISHED_VALUES = Training(updates=5000, graphs=64, fresh=32, lr=1e-3, cycle=32)


def experiment(run: Run) -> None:
    short = Training(updates=16, graphs=2, fresh=8, lr=3e-3, cycle=16)
    brief = Training(updates=160, graphs=4, fresh=8, lr=3e-3, cycle=160)
    carry_out(
        run,
        run.pick(
            quick=Study(short, None, None, None, baselines=False, tests=2),
            default=Study(brief, None, None, None, baselines=False, tests=5),
            paper=Study(
                PUBLISHED_PORES,
                PUBLISHED_VALUES,
                PUBLISHED_PORES,
                PUBLISHED_PORES,
                baselines=True,
                tests=50,
                proteins=True,
            ),
        ),
    )


def carry_out(run: Run, study: Study) -> None:
    folder = (
        run.data("PROTEINS", "the folder of TU Dortmund's PROTEINS with its text files") if study.proteins else None
    )
    for seed in run.track(run.seeds, "contraction and gradients"):
        check_contraction(run, seed)
        check_gradient(run, seed)
    compare_methods(run)
    tasks = {
        make(study): training
        for make, training in (
            (pore_networks, study.pores),
            (value_iteration_graphs, study.values),
            (shortest_paths, study.paths),
            (percolation, study.percolation),
        )
        if training is not None
    }
    compare_networks(run, tasks, study.tests)
    record_ratios(run)
    plot_growth(run)
    if folder is not None:
        classify_proteins(run, folder)


# The layer by itself --------------------------------------------------------------------------------------------------


def check_contraction(run: Run, seed: int, maps: int = 24) -> None:
    """Sweeps of random maps, of every kind that the layer makes, whose change exceeds gamma times the last one."""
    rng, g = np.random.default_rng([seed, 0]), torch.Generator().manual_seed(seed)
    broken, largest = 0, 0.0
    for k in range(maps):
        gamma = float(rng.uniform(0.3, 0.99))
        layer = ContractingFixedPoint(
            gamma, list(Activation)[k % 4], normalize=("degree", "sigmoid", "softmax")[k % 3], solver="picard"
        )
        edges = torch.randint(40, (2, 160), generator=g)
        logit = 10.0 ** rng.uniform(-1, 2) * torch.randn(160, 4, generator=g, dtype=torch.float64)
        bias = torch.randn(40, 4, generator=g, dtype=torch.float64)
        changes: list[Tensor] = []
        layer.solver.solve(layer.maps(edges, logit, bias), callback=lambda _, change: changes.append(change))  # noqa: B023
        steps = torch.stack(changes)[:, 0]
        allowed = gamma * steps[:-1]
        broken += int((steps[1:] > allowed + 1e-14 / (1 - gamma)).any(1).sum())
        seen = allowed > 1e-9
        largest = max(largest, float((steps[1:][seen] / allowed[seen]).max()))
    run.record("CGS", "sweeps that break the contraction bound", broken, seed=seed)
    run.record("CGS", "largest change / change allowed by the contraction factor", largest, seed=seed)


def check_gradient(run: Run, seed: int) -> None:
    """The implicit gradient in a random direction beside central differences, in double precision."""
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(30, (2, 120), generator=g)
    logit = torch.rand(120, 4, generator=g, dtype=torch.float64)
    bias, cotangent = torch.randn(2, 30, 4, generator=g, dtype=torch.float64)
    along = torch.randn(logit.shape, generator=g, dtype=torch.float64), torch.randn(bias.shape, generator=g).double()
    layer = ContractingFixedPoint(0.9, "tanh", normalize="sigmoid", tol=1e-14)

    def value(t: float) -> Tensor:
        return (layer(edges, logit + t * along[0], bias + t * along[1]) * cotangent).sum()

    leaves = logit.clone().requires_grad_(), bias.clone().requires_grad_()
    gradient = torch.autograd.grad((layer(edges, *leaves) * cotangent).sum(), leaves)
    slope = sum(float((a * b).sum()) for a, b in zip(gradient, along))
    h = 1e-5
    differences = float(value(h) - value(-h)) / (2 * h)
    run.record("CGS", "gradient / central differences - 1", abs(slope / differences - 1), seed=seed)


def compare_methods(run: Run) -> None:
    """Products with A until the fixed point is known to 1e-6, by every method, on a network of 200 pores."""
    graph, _ = make_pore_network(200, np.random.default_rng(0))
    bias = graph.x[:, 1:].double()
    logit = torch.ones(graph.edge_index.shape[1], 1, dtype=torch.float64)
    names = {"picard": "sweeps", "anderson": "Anderson mixing", "bicgstab": "BiCGSTAB", "cg": "conjugate gradients"}
    for room in (0.5, 0.1, 0.03, 0.01, 0.003):
        maps = ContractingFixedPoint(1 - room).maps(graph.edge_index, logit, bias)
        for method, name in names.items():
            found = FixedPointSolver(method=method, tol=1e-6).solve(maps)
            run.record(name, "products with A", int(found.iterations.max()), one_minus_gamma=room)
    run.plot_lines("one_minus_gamma", "products with A", log=True, name="products", caption=PRODUCTS_CAPTION)


# Tasks ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Task:
    """What to learn, from which graphs, and how an answer is judged on graphs of each size."""

    name: str
    models: Models
    draw: Callable[[Generator], Sample]
    draw_test: Callable[[int, Generator], Sample]
    sizes: tuple[int, ...]
    loss: Callable[[Tensor, Tensor], Tensor]
    judge: Callable[[Graph, Tensor, Tensor], dict[str, float]]  # graph, outputs, targets
    constant: Callable[[Graph, Tensor], Tensor]  # the answer of a network that has learnt nothing from the graph


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs[:, 0], targets)


def judge_squared(graph: Graph, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    return {"test error": float(squared_error(outputs, targets))}


def mean_of_targets(graph: Graph, targets: Tensor) -> Tensor:
    return targets.mean().expand(targets.shape[0], 1)


def chosen(models: Models, study: Study, always: tuple[str, ...]) -> Models:
    return {name: make for name, make in models.items() if study.baselines or name in always}


def pore_networks(study: Study) -> Task:
    models: Models = {
        OURS: partial(CGS, 2, 3, 1, gamma=0.9),
        "CGS": partial(CGS, 2, 3, 1, gamma=0.5),
        "five-layer stack": partial(StackedGNN, 2, 3, 1, num_layers=5),
        "encoder alone": partial(StackedGNN, 2, 3, 1, num_layers=1),
        "IGNN": partial(IGNN, 2, 3, 1),
        "SSE": partial(SSE, 2, 3, 1),
        "APPNP": partial(APPNP, 2, 3, 1),
    }
    return Task(
        "pore network",
        chosen(models, study, (OURS, "five-layer stack", "encoder alone", "SSE")),
        draw=lambda rng: make_pore_network(int(rng.integers(50, 101)), rng),
        draw_test=make_pore_network,
        sizes=(100, 200, 400),
        loss=squared_error,
        judge=judge_squared,
        constant=mean_of_targets,
    )


def value_iteration_graphs(study: Study) -> Task:
    published = {"hidden": 64, "mlp_hidden": (128,), "num_layers": 4}
    small = {"hidden": 32, "mlp_hidden": (64,), "num_layers": 3}
    size: dict[str, Any] = published if study.baselines else small
    heads = 64 if study.baselines else 16
    models: Models = {
        "CGS": partial(CGS, 1, 1, 1, heads=heads, gamma=0.5, **size),
        "five-layer stack": partial(StackedGNN, 1, 1, 1, **size | {"num_layers": 5}),
        "encoder alone": partial(StackedGNN, 1, 1, 1, **size),
        "IGNN": partial(IGNN, 1, 1, 1, heads=heads, **size),
        "SSE": partial(SSE, 1, 1, 1, hidden=size["hidden"], mlp_hidden=size["mlp_hidden"]),
    }

    def judge(graph: Graph, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        relative = ((outputs[:, 0] - targets) / targets).abs().mean()
        return {
            "policy accuracy": policy_accuracy(graph, outputs[:, 0], targets),
            "mean absolute relative error": float(relative),
        }

    return Task(
        "value iteration",
        chosen(models, study, ("CGS", "five-layer stack")),
        draw=lambda rng: make_value_iteration_graph(int(rng.integers(20, 50)), int(rng.integers(5, 10)), rng),
        draw_test=lambda n, rng: make_value_iteration_graph(n, 10, rng),
        sizes=(20, 50, 75, 100, 200) if study.baselines else (50, 100),
        loss=squared_error,
        judge=judge,
        constant=mean_of_targets,
    )


def shortest_paths(study: Study) -> Task:
    models: Models = {
        OURS: partial(CGS, 1, 1, 1, gamma=0.9),
        "five-layer stack": partial(StackedGNN, 1, 1, 1, num_layers=5),
        "encoder alone": partial(StackedGNN, 1, 1, 1, num_layers=1),
        "IGNN": partial(IGNN, 1, 1, 1),
        "SSE": partial(SSE, 1, 1, 1),
    }
    return Task(
        "shortest paths",
        chosen(models, study, (OURS, "encoder alone")),
        draw=lambda rng: make_shortest_path_graph(int(rng.integers(50, 101)), rng),
        draw_test=make_shortest_path_graph,
        sizes=(100, 200, 400),
        loss=squared_error,
        judge=judge_squared,
        constant=mean_of_targets,
    )


def percolation(study: Study) -> Task:
    models: Models = {
        OURS: partial(CGS, 2, 0, 2, gamma=0.9, num_layers=2, task="graph"),
        "GIN": partial(GIN, 2, 0, 2),
        "five-layer stack": partial(StackedGNN, 2, 0, 2, num_layers=5, task="graph"),
        "IGNN": partial(IGNN, 2, 0, 2, task="graph"),
        "SSE": partial(SSE, 2, 0, 2, task="graph"),
    }

    def draw(n: int, rng: Generator) -> Sample:
        graph, spans = make_percolating_network(n, rng, spans=bool(rng.integers(2)))
        return graph, torch.tensor([int(spans)])

    return Task(
        "percolation",
        chosen(models, study, (OURS, "GIN")),
        draw=lambda rng: draw(int(rng.integers(40, 81)), rng),
        draw_test=draw,
        sizes=(60, 120, 240),
        loss=nn.functional.cross_entropy,
        judge=lambda graph, outputs, labels: {"accuracy": float((outputs.argmax(1) == labels).double().mean())},
        constant=lambda graph, labels: torch.tensor([[1.0, 0.0]]),
    )


# Training and judging -------------------------------------------------------------------------------------------------


def compare_networks(run: Run, tasks: Mapping[Task, Training], tests: int) -> None:
    """Train every network of every task on every seed, in two threads, and judge them on graphs of each size."""
    jobs = []
    for seed in run.seeds:
        for number, (task, training) in enumerate(tasks.items()):
            rng = np.random.default_rng([seed, 1, number])
            held_out = {n: [task.draw_test(n, rng) for _ in range(tests)] for n in task.sizes}
            judge(run, task, "constant", seed, held_out, task.constant)
            for name, make in task.models.items():
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = make().to(run.device)
                jobs.append((task, training, name, model, np.random.default_rng([seed, 2, number]), seed, held_out))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operations are small: two networks at a time do better than two threads for one
    try:
        with ThreadPoolExecutor(2) as pool:
            trained = pool.map(lambda job: fit(job[0], job[1], job[3], job[4], run.device), jobs)
            for (task, _, name, model, _, seed, held_out), _ in zip(jobs, run.track(trained, "training", len(jobs))):
                judge(run, task, name, seed, held_out, partial(answer, model, run.device))
    finally:
        torch.set_num_threads(threads)


def fit(task: Task, training: Training, model: nn.Module, rng: Generator, device: str) -> None:
    batch: Sample | None = None

    def sample(step: int) -> Sample:
        nonlocal batch
        if batch is None or step % training.fresh == 0:
            graphs, targets = zip(*(task.draw(rng) for _ in range(training.graphs)))
            batch = disjoint_union(graphs).to(device), torch.cat(targets).to(device)
        return batch

    train(model, sample, steps=training.updates, loss=task.loss, lr=training.lr, cycle=training.cycle)


@torch.no_grad()
def answer(model: nn.Module, device: str, graph: Graph, targets: Tensor) -> Tensor:
    """The outputs; the targets are for answers that need no graph."""
    return model(graph.to(device)).cpu()


def judge(
    run: Run,
    task: Task,
    method: str,
    seed: int,
    held_out: Mapping[int, list[Sample]],
    outputs: Callable[[Graph, Tensor], Tensor],
) -> None:
    """Record the mean over graphs of each measure at each size."""
    for n, samples in held_out.items():
        marks = [task.judge(graph, outputs(graph, targets), targets) for graph, targets in samples]
        for metric in marks[0]:
            value = float(np.mean([mark[metric] for mark in marks]))
            run.record(method, metric, value, seed=seed, task=task.name, nodes=n)


def record_ratios(run: Run) -> None:
    """What the claims speak of: errors over those of the others, policy accuracies minus those of the others."""
    by = {(m.method, m.metric, m.seed, m.setting.get("task"), m.setting.get("nodes")): m.value for m in run.measures}
    words = {"five-layer stack": "a five-layer stack", "encoder alone": "the encoder alone", "constant": "a constant"}
    for (method, metric, seed, task, nodes), value in by.items():
        for other in ("five-layer stack", "encoder alone", "IGNN", "SSE", "constant"):
            theirs = by.get((other, metric, seed, task, nodes))
            if theirs is None or not method.startswith("CGS"):
                continue
            against = f"that of {words.get(other, other)}, {nodes}"
            if metric == "test error" and task == "pore network":
                run.record(method, f"test error / {against} nodes", value / theirs, seed=seed)
            if metric == "policy accuracy":
                run.record(method, f"policy accuracy minus {against} states", value - theirs, seed=seed)


def classify_proteins(run: Run, folder: Any) -> None:
    """Ten stratified folds, 500 epochs of batches of 128, accuracy after the last epoch; the published sizes."""
    graphs, labels = read_tu_dataset(folder)
    features = graphs[0].x.shape[1], graphs[0].edge_attr.shape[1], int(labels.max()) + 1
    size: dict[str, Any] = {"hidden": 64, "mlp_hidden": (128,), "task": "graph"}
    models: Models = {
        "CGS": partial(CGS, *features, heads=32, num_layers=3, activation="silu", aggregation="mean", **size),
        "GIN": partial(GIN, *features, **size),
    }
    classify(run, folder.name, graphs, labels, models, epochs=500, batch=128)


def classify(
    run: Run, name: str, graphs: list[Graph], labels: np.ndarray, models: Models, epochs: int, batch: int
) -> None:
    targets = torch.from_numpy(labels)
    for seed in run.track(run.seeds, name):
        folds = StratifiedKFold(10, shuffle=True, random_state=seed).split(labels, labels)
        for train_at, test_at in run.track(folds, "folds", 10):
            batches = -(-len(train_at) // batch)
            held_out = disjoint_union([graphs[i] for i in test_at])
            for method, make in models.items():
                rng = np.random.default_rng([seed, int(test_at[0])])
                torch.manual_seed(seed)
                model = make().to(run.device)
                order = train_at

                def sample(step: int) -> Sample:
                    nonlocal order
                    if step % batches == 0:  # noqa: B023
                        order = rng.permutation(train_at)  # noqa: B023
                    part = order[step % batches :: batches]  # noqa: B023
                    return disjoint_union([graphs[i] for i in part]).to(run.device), targets[part].to(run.device)

                train(model, sample, steps=epochs * batches, loss=nn.functional.cross_entropy, cycle=32 * batches)
                right = (
                    (answer(model, run.device, held_out, targets[test_at]).argmax(1) == targets[test_at])
                    .double()
                    .mean()
                )
                run.record(method, f"test accuracy, {name}, ten folds", float(right), seed=seed)


# Figures --------------------------------------------------------------------------------------------------------------

PRODUCTS_CAPTION = (
    "Products with A until the fixed point is known to a millionth, on a network of 200 pores, as the contraction"
    " factor approaches 1: sweeps need about 1 / (1 - gamma) of them, Krylov methods far fewer."
)
GROWTH_CAPTION = (
    "Error on held-out graphs of each size (accuracy for value iteration and percolation), mean and range over seeds."
    " All networks were trained on the smallest size or below; constant answers ignore the graph."
)


def plot_growth(run: Run) -> None:
    from locally.plots import INK, PALETTE, canvas

    shown = {"value iteration": "policy accuracy", "percolation": "accuracy"}
    panels = {
        str(m.setting["task"]): shown.get(str(m.setting["task"]), "test error")
        for m in run.measures
        if "task" in m.setting
    }
    rows = -(-len(panels) // 2)
    figure, axes = canvas(9.6, 3.2 * rows + 0.8, nrows=rows, ncols=min(len(panels), 2), squeeze=False)
    methods = list(dict.fromkeys(m.method for m in run.measures if "task" in m.setting))
    colours = {m: INK if m == "constant" else PALETTE[i % len(PALETTE)] for i, m in enumerate(methods[::-1])}
    handles, at = {}, list[int]()
    for ax, (task, metric) in zip(axes.flat, panels.items()):
        for method in methods:
            points: dict[int, list[float]] = {}
            for m in run.measures:
                if (m.method, m.metric, m.setting.get("task")) == (method, metric, task):
                    points.setdefault(int(m.setting["nodes"]), []).append(m.value)
            if not points:
                continue
            at = sorted(points)
            style = "--" if method == "constant" else "-"
            (handles[method],) = ax.plot(at, [np.mean(points[n]) for n in at], style, marker="o", color=colours[method])
            ax.fill_between(
                at,
                [min(points[n]) for n in at],
                [max(points[n]) for n in at],
                color=colours[method],
                alpha=0.12,
                lw=0,
            )
        ax.set(title=task, xlabel="nodes", ylabel=metric, xscale="log")
        ax.set_xticks(at, [str(n) for n in at])
        ax.minorticks_off()
        if metric == "test error":
            ax.set_yscale("log")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, labelcolor=INK, fontsize=8.5)
    run.figure(figure, "growth", GROWTH_CAPTION)
