"""Eight explanation methods as one estimator: what each recovers, where each is faithful, and that none is everywhere.

Embedded: a linear model of scikit-learn's diabetes data (recovery) and two classifiers of its breast-cancer data
(perturbation tests, faithfulness). Full size: WHO life expectancy and HELOC from the user's CSV files, four
models each.
"""

import csv
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn

from locally.evidence import MissingData, Run
from locally.plots import INK, PALETTE, canvas
from locally.tangent.explanation import (
    BinaryMask,
    Explanation,
    Faithfulness,
    GaussianNoise,
    LeaveOneOut,
    Method,
    PerturbationTest,
    ScaleNoise,
    explain,
    faithfulness,
    nfl_certificate,
    perturbation_test,
)

ADDITIVE = [m for m in Method if m.additive]
MULTIPLICATIVE = [m for m in Method if not m.additive]
KINDS = ("binary", "continuous")
EPOCHS = (100, 300)  # of the paper's linear models and networks
# Where each neighbourhood's own method has to win; C-LIME and SmoothGrad have the same limit.
OWNERS = {
    "Gaussian noise": {Method.C_LIME, Method.SMOOTHGRAD},
    "masks, exp. kernel": {Method.LIME},
    "one feature out": {Method.OCCLUSION},
}


@dataclass(frozen=True)
class Split:
    """Features scaled to [0, 1] on the training rows (test rows are clipped), target scaled for regression."""

    train: Float[Tensor, "rows d"]
    train_target: Float[Tensor, " rows"]
    test: Float[Tensor, "test d"]
    test_target: Float[Tensor, " test"]


def experiment(run: Run) -> None:
    embedded_study(run)
    if run.scale == "paper":
        full_study(run)


def embedded_study(run: Run) -> None:
    """What needs no data beyond scikit-learn's; the theorems are tested here."""
    found = run.parallel(one_seed, run.seeds, "seeds")
    curves = {method: [tests[method] for tests, _ in found] for method in found[0][0]}
    perturbation_figure(run, curves, "breast cancer, MLP")
    faithfulness_figure(run, [table for _, table in found])


def one_seed(run: Run, seed: int) -> tuple[dict[str, PerturbationTest], Faithfulness]:
    """The perturbation test of every method, and how faithful each is to each, for the network."""
    recovery(run, diabetes(seed), seed)
    split = breast_cancer(seed)
    points = split.test[: run.pick(quick=40, default=80, paper=100)]
    for name, hidden in (("logistic", 0), ("MLP", 2)):
        epochs = run.pick(quick=100, default=200, paper=200)
        model = classifier(split, hidden, epochs=epochs, seed=seed)
        run.record(name, "test accuracy", accuracy(model, split), seed=seed, dataset="breast cancer")
        tests, found = contrast(run, model, points, seed, dataset="breast cancer", model_name=name)
    existing_methods(run, model, points, found, seed)
    table = matrix(run, model, points[:40], seed)
    certificates(run, model, points, found, seed)
    return tests, table


def full_study(run: Run) -> None:
    """The paper's study: four models of each data set, 100 test rows, 1000 perturbations, k = 1..11."""
    for dataset, classify in (("WHO", False), ("HELOC", True)):
        folder = dataset.lower()
        try:
            paths = [
                run.data(f"{folder}/{folder}-clean-{part}.csv", f"{dataset}, {what} rows, target in the last column")
                for part, what in (("train80", "training"), ("test20", "test"))
            ]
        except MissingData:
            if dataset == "WHO":
                raise
            continue  # the claims about HELOC then say that nothing was recorded
        split = load_split(paths[0], paths[1], scale_target=not classify)
        curves: dict[str, list[PerturbationTest]] = {}
        for seed in run.track(run.seeds, f"{dataset}: seeds"):
            chosen = np.random.default_rng(seed).permutation(len(split.test))[:100]
            points = split.test[torch.from_numpy(chosen)]
            for hidden in run.track((0, 2, 4, 7), f"{dataset}: models"):
                name = f"MLP-{hidden}" if hidden else "logistic" if classify else "linear"
                model, rate = paper_model(split, hidden, classify=classify, seed=seed)
                run.record(name, "learning rate", rate, seed=seed, dataset=dataset)
                if classify:
                    run.record(name, "test accuracy", accuracy(model, split), seed=seed, dataset=dataset)
                else:
                    run.record(name, "test mean squared error", squared_error(model, split), seed=seed, dataset=dataset)
                ks = range(1, min(11, points.shape[1]) + 1)
                tests, _ = contrast(run, model, points, seed, dataset=dataset, model_name=name, ks=ks)
                if hidden == 2:
                    for method, result in tests.items():
                        curves.setdefault(method, []).append(result)
        perturbation_figure(run, curves, f"{dataset}, MLP-2")


def paper_model(split: Split, hidden: int, *, classify: bool, seed: int) -> tuple[nn.Sequential, float]:
    """A model trained as in the paper, and the learning rate.

    The paper's rate can diverge on deep networks with squared error; it is then halved and the training starts again.
    """
    rate = 0.9 if classify and hidden == 4 else 0.5 if hidden else 0.1 if classify else 0.2
    loss = nn.BCELoss() if classify else nn.MSELoss()
    for _ in range(16):
        model = network(split.train.shape[1], hidden, nn.ReLU if classify else nn.Tanh, classify=classify, seed=seed)
        if train(model, split, loss, rate, epochs=EPOCHS[hidden > 0], seed=seed):
            return model, rate
        rate /= 2
    raise ArithmeticError(f"training diverged at every learning rate down to {2 * rate}")


def recovery(run: Run, split: Split, seed: int) -> None:
    """On a linear model additive methods recover w, multiplicative ones w * x0: the smallest and largest distances."""
    design = np.column_stack([split.train.numpy(), np.ones(len(split.train))])
    fitted = torch.from_numpy(np.linalg.lstsq(design, split.train_target.numpy(), rcond=None)[0])
    w, b = fitted[:-1], fitted[-1]
    generator = torch.Generator().manual_seed(seed)
    right, wrong = [], []
    for method in Method:
        found = explain(lambda x: x @ w + b, split.test, method, n_samples=500, generator=generator)
        slopes, contributions = w.expand(split.test.shape), w * split.test
        truth, other = (slopes, contributions) if method.additive else (contributions, slopes)
        right.append(float((found.attributions - truth).abs().sum(1).median()))
        wrong.append(float((found.attributions - other).abs().sum(1).median()))
        run.record(method, "L1 distance to what it recovers", right[-1], seed=seed, dataset="diabetes")
    run.record("all eight methods", "largest L1 distance to what they recover", max(right), seed=seed)
    run.record("all eight methods", "smallest L1 distance to the other family's answer", min(wrong), seed=seed)


def contrast(
    run: Run,
    model: nn.Module,
    points: Float[Tensor, "batch d"],
    seed: int,
    *,
    dataset: str,
    model_name: str,
    ks: range | None = None,
) -> tuple[dict[str, PerturbationTest], dict[Method, Explanation]]:
    """Bottom-k tests of all methods, and how the two families compare under each kind of change."""
    generator = torch.Generator().manual_seed(seed)
    found = {m: explain(model, points, m, n_samples=1000, generator=generator) for m in Method}
    scores = {str(m): e.attributions for m, e in found.items()}
    scores["random ranking"] = torch.rand(points.shape, generator=generator, dtype=torch.float64)
    repeats = run.pick(quick=10, default=30, paper=100)
    ks = ks or range(1, points.shape[1])  # with all features changed every ranking is the same
    tests = {}
    for name, score in scores.items():
        same_noise = torch.Generator().manual_seed(seed)
        tests[name] = perturbation_test(model, points, score, ks=ks, repeats=repeats, generator=same_noise)
        for kind in KINDS:
            metric = f"bottom-k change of f, {kind}"
            run.record(name, metric, tests[name].average(kind), seed=seed, dataset=dataset, model=model_name)

    def compare(family: str, metric: str, value: float) -> None:
        run.record(family, metric, value, seed=seed, dataset=dataset, model=model_name)

    additive = {k: [tests[m].average(k) for m in ADDITIVE] for k in KINDS}
    multiplicative = {k: [tests[m].average(k) for m in MULTIPLICATIVE] for k in KINDS}
    worst = max(additive["continuous"]) / min(multiplicative["continuous"])
    compare("additive methods", "continuous test: worst / best multiplicative method", worst)
    mean = float(np.mean(multiplicative["binary"]) / np.mean(additive["binary"]))
    compare("multiplicative methods", "binary test: mean / mean of additive methods", mean)
    worst = max(multiplicative["binary"]) / min(additive["binary"])
    compare("multiplicative methods", "binary test: worst / best additive method", worst)
    leaders = [min(Method, key=lambda m: tests[m].average(kind)) for kind in KINDS]
    compare("all eight methods", "methods that are best in both tests", float(leaders[0] == leaders[1]))
    return tests, found


def existing_methods(
    run: Run, model: nn.Module, points: Float[Tensor, "batch d"], found: dict[Method, Explanation], seed: int
) -> None:
    """Cosine distance of LFA to the methods as their own definitions have them, and to captum where it is installed."""
    definitions = textbook(model, points, seed, steps=run.pick(quick=400, default=1000, paper=1000))
    distances = {m: cosine_distance(found[m].attributions, a) for m, a in definitions.items()}
    for m, distance in distances.items():
        run.record(f"LFA, {m}", "cosine distance to the method's own definition", distance, seed=seed)
    deterministic = max(d for m, d in distances.items() if m is not Method.SMOOTHGRAD)
    run.record("LFA, methods without sampling", "cosine distance to the methods' definitions", deterministic, seed=seed)
    for method, attributions in captum_attributions(model, points).items():
        distance = cosine_distance(found[method].attributions, attributions)
        run.record(f"LFA, {method}", "cosine distance to captum", distance, seed=seed)


def textbook(
    model: nn.Module, points: Float[Tensor, "batch d"], seed: int, *, steps: int
) -> dict[Method, Float[Tensor, "batch d"]]:
    """Five of the methods straight from their definitions, one perturbation at a time."""

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(model(x).sum(), x)[0]

    noise = torch.Generator().manual_seed(10_000 + seed)
    smooth = torch.zeros_like(points)
    along = torch.zeros_like(points)
    for i in range(steps):
        draw = 0.1 * torch.randn(points.shape, generator=noise, dtype=torch.float64).to(points)
        smooth += gradient(points + draw) / steps
        along += gradient((i + 0.5) / steps * points) / steps
    occluded = torch.zeros_like(points)
    with torch.no_grad():
        for i in range(points.shape[1]):
            without = points.clone()
            without[:, i] = 0
            occluded[:, i] = (model(points) - model(without))[:, 0]
    return {
        Method.GRADIENT: gradient(points),
        Method.GRADIENT_X_INPUT: points * gradient(points),
        Method.INTEGRATED_GRADIENTS: points * along,
        Method.SMOOTHGRAD: smooth,
        Method.OCCLUSION: occluded,
    }


def captum_attributions(model: nn.Module, points: Float[Tensor, "batch d"]) -> dict[Method, Float[Tensor, "batch d"]]:
    """The same from captum; nothing where it is not installed."""
    try:
        from captum import attr
    except ImportError:
        return {}
    x = points.detach().clone().requires_grad_(True)
    return {
        Method.GRADIENT: attr.Saliency(model).attribute(x, abs=False),
        Method.GRADIENT_X_INPUT: attr.InputXGradient(model).attribute(x),
        Method.INTEGRATED_GRADIENTS: attr.IntegratedGradients(model).attribute(x, n_steps=200),
        Method.OCCLUSION: attr.FeatureAblation(model).attribute(points),
    }


def cosine_distance(a: Float[Tensor, "batch d"], b: Float[Tensor, "batch d"]) -> float:
    """Median over the points; two zero vectors (a point where the network is flat) do not differ."""
    a, b = a.detach().double(), b.detach().double()
    both_zero = (a == 0).all(1) & (b == 0).all(1)
    # Scaled first: saturated outputs make attributions of 1e-10 that a guard against division by zero would hide.
    a, b = (v / v.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) for v in (a, b))
    distance = 1 - torch.cosine_similarity(a, b, dim=1)
    return float(torch.where(both_zero, 0, distance).median())


def matrix(run: Run, model: nn.Module, points: Float[Tensor, "batch d"], seed: int) -> Faithfulness:
    """Every method in every neighbourhood; counts the neighbourhoods whose own method is not the most faithful."""
    generator = torch.Generator().manual_seed(20_000 + seed)
    n = run.pick(quick=1000, default=2000, paper=2000)
    found = {str(m): explain(model, points, m, n_samples=n, generator=generator) for m in Method}
    neighbourhoods = {
        "Gaussian noise": GaussianNoise(sigma=0.1),
        "masks, exp. kernel": BinaryMask(kernel="exponential"),
        "masks, uniform": BinaryMask(),
        "one feature out": LeaveOneOut(),
        "fading": ScaleNoise(),
    }
    table = faithfulness(model, points, found, neighbourhoods, n_samples=n, generator=generator)
    for name, row in zip(table.explanations, table.mean().tolist(), strict=True):
        for neighbourhood, value in zip(table.neighbourhoods, row, strict=True):
            run.record(name, "expected squared error", value, seed=seed, neighbourhood=neighbourhood)
    misses = sum(table.best(z) not in owners for z, owners in OWNERS.items())
    run.record("all eight methods", "neighbourhoods won by another neighbourhood's method", misses, seed=seed)
    return table


def certificates(
    run: Run, model: nn.Module, points: Float[Tensor, "batch d"], found: dict[Method, Explanation], seed: int
) -> None:
    """For every method, the adversarial loss against the least that any linear g must suffer somewhere in the box."""
    violations, ratios = 0, []
    for method in run.pick(quick=[Method.LIME, Method.SMOOTHGRAD], default=list(Method), paper=list(Method)):
        certificate = nfl_certificate(model, points, found[method], (0.0, 1.0), n=256, exchanges=2, seed=seed)
        violations += not certificate.holds
        ratios.append(certificate.loss_at_adv / max(certificate.lower_bound, 1e-12))
        run.record(method, "adversarial squared error", certificate.loss_at_adv, seed=seed)
        run.record(method, "lower bound of d(f, G)", certificate.lower_bound, seed=seed)
    run.record("all eight methods", "violations of the no-free-lunch bound", violations, seed=seed)


def network(
    d: int, hidden: int, activation: Callable[[], nn.Module], *, classify: bool, seed: int, width: int = 8
) -> nn.Sequential:
    """`hidden` layers of 8 units, in float64; without them linear or logistic regression."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for size in [d] + [width] * (hidden - 1) if hidden else []:
            layers += [nn.Linear(size, width), activation()]
        layers.append(nn.Linear(width if hidden else d, 1))
    if classify:
        layers.append(nn.Sigmoid())
    return nn.Sequential(*layers).double()


def classifier(split: Split, hidden: int, *, epochs: int, seed: int) -> nn.Sequential:
    """ReLU network, or logistic regression, fitted by scikit-learn's Adam in minibatches of 64."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    peer = MLPClassifier(
        (8,) * hidden,
        alpha=0,
        batch_size=64,
        learning_rate_init=0.01,
        max_iter=epochs,
        n_iter_no_change=epochs,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of epochs is given
        peer.fit(split.train.numpy(), split.train_target.numpy())
    model = network(split.train.shape[1], hidden, nn.ReLU, classify=True, seed=seed)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, weight, bias in zip(linear, peer.coefs_, peer.intercepts_, strict=True):
            layer.weight.copy_(torch.from_numpy(weight.T.copy()))
            layer.bias.copy_(torch.from_numpy(bias))
    return model


def train(model: nn.Module, split: Split, loss: nn.Module, rate: float, *, epochs: int, seed: int) -> bool:
    """Stochastic gradients as in the paper's code: minibatches of 64, cosine schedule; False if it diverges."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(split.train), generator=order).split(64):
            optimizer.zero_grad()
            answer = model(split.train[rows])[:, 0]
            if not bool(answer.abs().max() < 1e6):
                return False
            loss(answer, split.train_target[rows]).backward()
            optimizer.step()
        schedule.step()
    return True


def accuracy(model: nn.Module, split: Split) -> float:
    with torch.no_grad():
        return float(((model(split.test)[:, 0] > 0.5) == (split.test_target > 0.5)).double().mean())


def squared_error(model: nn.Module, split: Split) -> float:
    with torch.no_grad():
        return float((model(split.test)[:, 0] - split.test_target).square().mean())


def breast_cancer(seed: int) -> Split:
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    return random_split(X, y, seed, scale_target=False)


def diabetes(seed: int) -> Split:
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True)
    return random_split(X, y, seed, scale_target=True)


def random_split(X: Float[ndarray, "rows d"], y: ndarray, seed: int, *, scale_target: bool) -> Split:
    from sklearn.model_selection import train_test_split

    train, test, train_target, test_target = train_test_split(X, y, test_size=0.2, random_state=seed)
    return scaled(train, train_target.astype(float), test, test_target.astype(float), scale_target=scale_target)


def scaled(
    train: Float[ndarray, "rows d"],
    train_target: Float[ndarray, " rows"],
    test: Float[ndarray, "test d"],
    test_target: Float[ndarray, " test"],
    *,
    scale_target: bool,
) -> Split:
    low, span = train.min(0), np.ptp(train, axis=0)
    span[span == 0] = 1
    if scale_target:
        bottom, height = train_target.min(), np.ptp(train_target)
        train_target, test_target = (train_target - bottom) / height, (test_target - bottom) / height
    inside = np.clip((test - low) / span, 0, 1)
    parts = ((train - low) / span, train_target, inside, test_target)
    return Split(*(torch.from_numpy(np.ascontiguousarray(p)) for p in parts))


def load_split(train: Path, test: Path, *, scale_target: bool) -> Split:
    """Two CSV files with one header: numeric features, target in the last column.

    Raises:
        ValueError: the headers differ, a field is no number, or a 0/1 target has other values.
    """
    header, rows = read_table(train)
    other, test_rows = read_table(test)
    if header != other:
        raise ValueError(f"{test} must have the columns of {train}")
    if not scale_target and not np.isin(np.r_[rows[:, -1], test_rows[:, -1]], (0, 1)).all():
        raise ValueError(f"{train}: the target {header[-1]!r} must be 0 or 1")
    return scaled(rows[:, :-1], rows[:, -1], test_rows[:, :-1], test_rows[:, -1], scale_target=scale_target)


def read_table(path: Path) -> tuple[list[str], Float[ndarray, "rows columns"]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = [row for row in csv.reader(file) if row]
    try:
        table = np.array(rows, dtype=float)
    except ValueError as error:
        raise ValueError(f"{path}: every row must hold {len(header)} numbers ({error})") from None
    if table.ndim != 2 or table.shape[1] != len(header) or not np.isfinite(table).all():
        raise ValueError(f"{path}: every row must hold {len(header)} finite numbers")
    return [name.strip() for name in header], table


def perturbation_figure(run: Run, curves: dict[str, list[PerturbationTest]], where: str) -> None:
    figure, axes = canvas(9.4, 4.4, ncols=2)
    for axis, kind in zip(axes, KINDS, strict=True):
        for name, results in curves.items():
            mean = torch.stack([r.mean(kind) for r in results]).mean(0)
            style = {"color": "#7c8591", "linestyle": ":"}
            if name in list(Method):
                family = ADDITIVE if Method(name).additive else MULTIPLICATIVE
                style = {"color": PALETTE[list(Method).index(Method(name))]}
                style["linestyle"] = "--" if family is ADDITIVE else "-"
            axis.plot(results[0].ks, mean, linewidth=1.6, **style)
        change = "set to the baseline" if kind == "binary" else "given noise N(0, 0.1²)"
        axis.set(xlabel=f"k lowest-ranked features, {change}", ylabel="mean change of f", title=f"{kind} change")
    names, lines = [n.replace("_", " ") for n in curves], axes[0].get_lines()
    figure.legend(lines, names, loc="outside lower center", ncols=5, labelcolor=INK, fontsize=9, frameon=False)
    caption = (
        f"{where}: how far f moves when the k features that a method ranks lowest are changed (low is good). Methods "
        "with additive noise (dashed) lead under noise, methods with multiplicative noise (solid) under removal."
    )
    run.figure(figure, f"Perturbation tests, {where}", caption)


def faithfulness_figure(run: Run, tables: list[Faithfulness]) -> None:
    losses = torch.stack([t.mean() for t in tables]).mean(0).numpy()
    relative = losses / np.maximum(losses.max(0), 1e-300)
    figure, axes = canvas(8.2, 3.9)
    axes.imshow(relative, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for row, column in np.ndindex(losses.shape):
        best = losses[row, column] == losses[:, column].min()
        text = f"{losses[row, column]:.3g}" if losses[row, column] > 1e-12 else "0"
        dark = relative[row, column] > 0.7
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            color="white" if dark else "#10243f",
            weight="bold" if best else "normal",
        )
    axes.set_xticks(range(losses.shape[1]), [n.replace(", ", ",\n") for n in tables[0].neighbourhoods])
    axes.set_yticks(range(losses.shape[0]), [n.replace("_", " ") for n in tables[0].explanations])
    axes.grid(False)
    axes.set(xlabel="tested on", ylabel="explained by")
    caption = (
        "Expected squared error of each method's g on fresh perturbations (breast cancer, MLP; mean over points and "
        "seeds; colour is relative to the column). Bold: the most faithful method for those perturbations."
    )
    run.figure(figure, "Faithfulness matrix", caption)
