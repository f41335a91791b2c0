"""MoNNA under attack: the damage that momentum removes, on noisy quadratics; digits, and MNIST, learnt among liars."""

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from locally.evidence import Run
from locally.training.byzantine import (
    ALIE,
    FOE,
    Attack,
    Collaboration,
    GeometricMedian,
    LabelFlip,
    Mean,
    ModelProblem,
    NearestNeighborAverage,
    Outcome,
    Rule,
    SelfCenteredClipping,
    SignFlip,
    Simulation,
    TrimmedMean,
    run_together,
    split_dirichlet,
)

ATTACKS: dict[str, Attack] = {
    "a little is enough": ALIE(),
    "fall of empires": FOE(),
    "sign flipping": SignFlip(),
    "label flipping": LabelFlip(),
}
OURS, ABLATED, FREE = "MoNNA", "NNA, no momentum", "D-SGD, no faults"


def experiment(run: Run) -> None:
    digits_or_mnist: Callable[[Run, int], None] | None = run.pick(quick=None, default=on_digits, paper=on_mnist)
    if run.scale == "paper":
        mnist_folder(run)  # so that missing files are noticed at once
    # the longer studies first, so that no core is left alone with one
    studies = [on_quadratics] if digits_or_mnist is None else [digits_or_mnist, on_quadratics]
    run.parallel(do, [(study, seed) for study in studies for seed in run.seeds], "learning among liars")
    plot_quadratics(run)
    if digits_or_mnist is not None:
        plot_accuracies(run)


def do(run: Run, task: tuple[Callable[[Run, int], None], int]) -> None:
    study, seed = task
    study(run, seed)


# Noisy quadratics: what the attack costs, and what momentum takes away from it ----------------------------------------


@dataclass(frozen=True)
class NoisyQuadratic:
    """Every node minimises ||theta||^2 / 2 from gradients with unit noise: homogeneous data, all damage is variance."""

    nodes: int
    seed: int
    dimension: int = 50

    def start(self) -> Float[Tensor, " D"]:
        return torch.full((self.dimension,), 2.0, dtype=torch.float64)

    def gradients(
        self, parameters: Float[Tensor, "K D"], step: int, nodes: Sequence[int], *, flipped: bool = False
    ) -> Float[Tensor, "K D"]:
        noise = np.random.default_rng([self.seed, step]).standard_normal((self.nodes, self.dimension))
        return parameters + torch.from_numpy(noise[list(nodes)])

    def batch_size(self, step: int) -> int:
        return 1


FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
BETAS = (0.0, 0.5, 0.9)


def on_quadratics(run: Run, seed: int) -> None:
    """Squared error of the honest mean, averaged over the second half of the run, less that without an attack."""
    n, f, steps = 16, 3, 600
    problem = NoisyQuadratic(n - f, seed)
    excess = {}
    for beta in BETAS:
        method = f"MoNNA, momentum {beta:g}"
        errors = {}
        for name, attack in (("attacked", ALIE(FACTORS)), ("silent", None)):
            path: list[float] = []
            collaboration = Collaboration(n=n, f=f, lr=0.05, beta=beta, seed=seed)
            follow = lambda _, parameters, path=path: path.append(float(parameters.mean(0).square().sum()))
            Simulation(collaboration, attack).run(problem, steps, callback=follow)
            errors[name] = float(np.mean(path[steps // 2 :]))
            run.record(method, "squared error of the mean", errors[name], seed=seed, faulty=name, beta=beta)
        excess[beta] = errors["attacked"] - errors["silent"]
    for beta in BETAS:
        method = f"MoNNA, momentum {beta:g}"
        run.record(method, "excess error / that without momentum", excess[beta] / excess[0.0], seed=seed, beta=beta)


# Classification -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One line of the comparison; `batch` replaces the study's where the method needs its own."""

    rule: Rule
    beta: float
    gradient_rule: Rule | None = None
    batch: Callable[[int], int] | None = None


@dataclass(frozen=True)
class Study:
    """One data set and how long, by what learning rate and against whom it is learnt."""

    n: int
    f: int
    lr: float | Callable[[int], float]
    steps: int
    contenders: dict[str, Contender]
    suffix: str = ""


def digits_contenders(f: int) -> dict[str, Contender]:
    return {
        OURS: Contender(NearestNeighborAverage(f), 0.95),
        ABLATED: Contender(NearestNeighborAverage(f), 0.0),
        "BRIDGE (trimmed mean)": Contender(TrimmedMean(f), 0.0),
        "D-SGD": Contender(Mean(f), 0.95),
    }


def on_digits(run: Run, seed: int, steps: int = 400) -> None:
    n, f = 16, 3
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(classes))
    inputs, labels = torch.from_numpy(images[order] / 16).float(), torch.from_numpy(classes[order])
    parts = split_dirichlet(classes[order[360:]], n - f, 5.0, np.random.default_rng(seed))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    problem = ModelProblem(model, inputs[360:], labels[360:], parts, batch=8, penalty=1e-4, seed=seed)
    compare(run, seed, Study(n, f, 0.5, steps, digits_contenders(f)), problem, inputs[:360], labels[:360])


def on_mnist(run: Run, seed: int) -> None:
    """Eight methods, four attacks, two splits of MNIST among 26 nodes of which 5 lie: the paper's table."""
    train, test = (read_images(mnist_folder(run), part) for part in ("train", "t10k"))
    for alpha in (1.0, 5.0):
        compare_on_images(run, seed, paper_study(), alpha, train, test)


def paper_study() -> Study:
    f = 5
    grow = lambda step: step + 1
    contenders = {
        OURS: Contender(NearestNeighborAverage(f), 0.99),
        ABLATED: Contender(NearestNeighborAverage(f), 0.0),
        "BRIDGE (trimmed mean)": Contender(TrimmedMean(f), 0.0),
        "trimmed mean with momentum": Contender(TrimmedMean(f), 0.99),
        "geometric median": Contender(GeometricMedian(f), 0.0),
        "geometric median with momentum": Contender(GeometricMedian(f), 0.99),
        "self-centred clipping": Contender(SelfCenteredClipping(f, radius=2.0), 0.9),
        "LEARN": Contender(TrimmedMean(f), 0.0, TrimmedMean(f), grow),
    }
    return Study(26, f, lambda step: 0.75 / (step // 50 + 1), 600, contenders, ", MNIST")


Images = tuple[Float[Tensor, "N 1 28 28"], Int[Tensor, " N"]]


def compare_on_images(run: Run, seed: int, study: Study, alpha: float, train: Images, test: Images) -> None:
    device = run.device
    parts = split_dirichlet(train[1].numpy(), study.n - study.f, alpha, np.random.default_rng(seed))
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    ).to(device)  # fmt: skip
    inputs, labels = (tensor.to(device) for tensor in train)
    problem = ModelProblem(model, inputs, labels, parts, batch=25, penalty=1e-4, seed=seed)
    compare(run, seed, study, problem, test[0].to(device), test[1].to(device), alpha=alpha)


def compare(
    run: Run, seed: int, study: Study, problem: ModelProblem, inputs: Tensor, labels: Tensor, **setting: float
) -> None:
    """Every contender under every attack; accuracies are means over the honest nodes, after the last step."""
    n, f = study.n, study.f
    runs: dict[tuple[str, str], Simulation] = {
        (FREE, "none"): Simulation(
            Collaboration(n=n - f, f=0, lr=study.lr, beta=study.contenders[OURS].beta, rule=Mean(), seed=seed)
        )
    }
    for name, c in study.contenders.items():
        for attack, liar in ATTACKS.items():
            runs[name, attack] = Simulation(
                Collaboration(
                    n=n, f=f, lr=study.lr, beta=c.beta, rule=c.rule, gradient_rule=c.gradient_rule, seed=seed
                ),
                liar,
            )
    outcomes: dict[tuple[str, str], Outcome] = {}
    batches = {name: c.batch for name, c in study.contenders.items()} | {FREE: None}
    for batch in dict.fromkeys(batches.values()):
        chosen = [key for key in runs if batches[key[0]] is batch]
        shared = problem if batch is None else problem.with_batch(batch)
        outcomes |= dict(zip(chosen, run_together([runs[key] for key in chosen], shared, study.steps)))

    worst = dict.fromkeys(study.contenders, 1.0)
    for (name, attack), outcome in outcomes.items():
        accuracies = problem.accuracies(outcome.parameters, inputs, labels)
        mean = float(accuracies.mean())
        run.record(name, f"accuracy{study.suffix}", mean, seed=seed, attack=attack, **setting)
        run.record(name, "accuracy of the worst honest node", accuracies.min(), seed=seed, attack=attack, **setting)
        run.record(name, "stochastic gradients a node", outcome.gradients_used, seed=seed, attack=attack, **setting)
        if name in worst:
            worst[name] = min(worst[name], mean)
    for name, accuracy in worst.items():
        run.record(name, f"worst-attack accuracy{study.suffix}", accuracy, seed=seed, **setting)
    gain = worst[OURS] - worst[ABLATED]
    run.record(OURS, f"worst-attack accuracy minus that without momentum{study.suffix}", gain, seed=seed, **setting)
    others = max(accuracy for name, accuracy in worst.items() if name not in (OURS, ABLATED, "D-SGD"))
    metric = f"worst-attack accuracy minus the best robust baseline's{study.suffix}"
    run.record(OURS, metric, worst[OURS] - others, seed=seed, **setting)


def mnist_folder(run: Run) -> Path:
    return run.data("mnist", "the four gzipped IDX files of MNIST")


def read_images(folder: Path, part: str) -> Images:
    """Images, normalised as in the paper's experiments, and labels of one part ("train", "t10k")."""
    pixels = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
    if len(pixels) != len(labels):
        raise ValueError(f"{folder}: {len(pixels)} images but {len(labels)} labels in part {part}")
    inputs = (torch.from_numpy(pixels).float()[:, None] / 255 - 0.1307) / 0.3081
    return inputs, torch.from_numpy(labels.astype(np.int64))


def read_idx(path: Path, dimensions: int) -> ndarray:
    """Unsigned bytes in the IDX format: two zeros, 8, the number of dimensions, big-endian sizes, entries."""
    with gzip.open(path) as file:
        content = file.read()
    sizes = np.frombuffer(content, ">u4", dimensions, offset=4) if len(content) >= 4 + 4 * dimensions else np.zeros(0)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != 4 + 4 * dimensions + int(np.prod(sizes)):
        raise ValueError(f"{path} is no complete IDX file of unsigned bytes with {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes.astype(int)).copy()


# Figures --------------------------------------------------------------------------------------------------------------


def plot_quadratics(run: Run) -> None:
    from locally.plots import INK, PALETTE, canvas

    figure, axes = canvas(6.4, 3.8)
    metric = "excess error / that without momentum"
    points = [(m.setting["beta"], m.value) for m in run.measures if m.metric == metric]
    grid = np.linspace(0, 0.97, 200)
    axes.plot(grid, (1 - grid) / (1 + grid), "--", color=INK, label="variance of the momentum, (1 - β) / (1 + β)")
    axes.plot(*zip(*points), "o", color=PALETTE[0], markersize=5, label="measured, a dot for each seed")
    axes.set(xlabel="momentum β", ylabel="excess error / that without momentum", ylim=(0, None))
    axes.set_title("What momentum leaves of an attack's damage")
    axes.legend()
    caption = (
        "Noisy quadratics, 3 of 16 nodes lying by the worst of eight factors: squared error of the honest mean beyond"
        " that without liars, relative to the same without momentum."
    )
    run.figure(figure, "damage-over-momentum", caption)


def plot_accuracies(run: Run) -> None:
    from locally.plots import PALETTE, canvas

    metric = next(m.metric for m in run.measures if m.metric.startswith("accuracy") and "worst" not in m.metric)
    table: dict[str, dict[str, list[float]]] = {}
    for m in run.measures:
        if m.metric == metric:
            table.setdefault(m.method, {}).setdefault(str(m.setting["attack"]), []).append(m.value)
    free = float(np.mean(table.pop(FREE)["none"]))
    figure, axes = canvas(8.4, 4.2)
    width = 0.8 / len(table)
    for k, (name, by_attack) in enumerate(table.items()):
        at = np.arange(len(ATTACKS)) + (k - (len(table) - 1) / 2) * width
        colour = PALETTE[k % len(PALETTE)]
        axes.bar(at, [np.mean(by_attack[a]) for a in ATTACKS], 0.92 * width, alpha=0.6, color=colour, label=name)
        for x, attack in zip(at, ATTACKS):
            axes.plot([x] * len(by_attack[attack]), by_attack[attack], "o", markersize=3, color=colour)
    axes.axhline(free, ls="--", color=PALETTE[-1], label=FREE)
    axes.set_xticks(range(len(ATTACKS)), list(ATTACKS))
    axes.set(ylabel="test accuracy, mean of the honest nodes", ylim=(0, 1), title="Learning among liars")
    axes.grid(False, axis="x")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
    run.figure(figure, "accuracy-under-attack", "Test accuracy after the last step; a dot for each seed.")
