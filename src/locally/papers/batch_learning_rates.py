"""What batches of digits show of a network's curvature, and the learning rates that it survives at each batch size.

Noise matrices against the random-matrix formulas; a network trained in place, its spectra over all data and over
batches beside three predictions; sweeps of learning rates under SGD and Adam; and the learner of rate and momentum
beside fixed ones. The full-size study is the paper's: VGG-16 and a wide residual network on CIFAR-100.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from locally.evidence import Run
from locally.linalg.curvature import Hessian
from locally.linalg.lanczos import SpectralMeasure, spectral_measure
from locally.optimize.batch_curvature import (
    BatchCurvature,
    CurvatureTuner,
    LearningRateSweep,
    largest_adam_learning_rate,
    optimal_heavy_ball,
    spiked_covariance,
    spiked_wigner,
)
from locally.optimize.batch_curvature.images import (
    Examples,
    batches,
    largest_rate,
    optimizer_of,
    read_cifar100,
    train_epochs,
)
from locally.optimize.batch_curvature.networks import WideResNet, perceptron, train_on_all, vgg16
from locally.optimize.batch_curvature.random_matrices import spiked_covariance_top, spiked_wigner_extreme

CROSS_ENTROPY = nn.functional.cross_entropy
SLOPE = "slope of log largest stable learning rate over log batch size"
RATE = "largest stable learning rate"
DIRECTION = "direction-aware prediction"
SINGLE = "direction-aware prediction, one direction alone"
IID = "i.i.d. prediction"
KEPT = "loss at most 1.25 times that of the start"  # fixed before the sweep; the others show how much hangs on it
CRITERIA: dict[str, Callable[[float], float]] = {
    KEPT: lambda start: 1.25 * start,
    "loss at most twice that of the start": lambda start: 2 * start,
    "loss at most 1": lambda start: 1.0,
}
PREDICTIONS = {DIRECTION: "subspace", SINGLE: "direction", IID: "iid"}


@dataclass(frozen=True)
class Study:
    """Sizes of one scale; empty batch sizes leave a part out."""

    draws: int  # of noise matrices, at each spike
    examples: int  # in all random batches of one size together, of which there are between 16 and 128
    batch_sizes: tuple[int, ...]
    sgd: tuple[int, ...]
    adam: tuple[int, ...]
    width: int  # of the network for the timed spectrum


def experiment(run: Run) -> None:
    carry_out(
        run,
        run.pick(
            quick=Study(draws=40, examples=512, batch_sizes=(8, 32, 128), sgd=(), adam=(), width=0),
            default=Study(
                draws=80,
                examples=1024,
                batch_sizes=(4, 8, 16, 32, 128),
                sgd=(1, 2, 4, 8, 16, 64, 512),
                adam=(4, 16, 64, 256),
                width=960,
            ),
            paper=Study(
                draws=1000,
                examples=16384,
                batch_sizes=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
                sgd=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
                adam=(4, 8, 16, 32, 64, 128, 256),
                width=960,
            ),
        ),
    )
    if run.scale == "paper":
        full_size(run)


def carry_out(run: Run, study: Study) -> None:
    run.parallel(partial(of_one_seed, study=study), run.seeds, "batches of digits")
    plot_extremes(run)
    if study.sgd:
        survivors(run, study)
    if study.width:
        timed_spectrum(run, study.width)


def of_one_seed(run: Run, seed: int, study: Study) -> None:
    noise_matrices(run, seed, study.draws)
    batch_spectra(run, seed, study)
    heavy_ball(run, seed)
    if study.sgd:
        learner(run, seed)


# Noise matrices -------------------------------------------------------------------------------------------------------


def noise_matrices(run: Run, seed: int, draws: int) -> None:
    """Means of extreme eigenvalues of spiked Wigner matrices (P = 1000) and sample covariances (P = 400, B = 200).

    Rotations that leave the spike alone turn both into tridiagonal matrices with chi-distributed entries, without
    changing the distribution of their eigenvalues (Dumitriu and Edelman, 2002): thousands are drawn in seconds.
    """
    rng = np.random.default_rng(seed)
    P, b = 1000, 50
    radius = math.sqrt(P / b)
    errors = []
    for ratio in (0.5, 1.0, 1.5, 2.0, 4.0):
        for sign in (1, -1):
            found = [spiked_wigner_extreme(P, b, sign * ratio * radius, rng) for _ in range(draws)]
            predicted = spiked_wigner(sign * ratio * radius, radius).value
            mean = float(np.mean(found))
            errors.append(abs(mean / predicted - 1))
            edge = mean / (2 * radius)
            run.record("Gaussian noise", "extremal eigenvalue / edge", edge, seed=seed, spike=sign * ratio)
    metric = "largest relative error of the extremal eigenvalues, Gaussian noise"
    run.record("random-matrix prediction", metric, max(errors), seed=seed)

    P, B = 400, 200
    errors = []
    for spike in (2.0, 3.0, 8.0):
        mean = float(np.mean([spiked_covariance_top(P, B, spike, rng) for _ in range(draws)]))
        errors.append(abs(mean / spiked_covariance(spike, 1.0, P / B).value - 1))
    metric = "largest relative error of the top eigenvalue, sample covariance"
    run.record("random-matrix prediction", metric, max(errors), seed=seed)


# A network on digits --------------------------------------------------------------------------------------------------


def digits(pool: int = 1, dtype: torch.dtype = torch.float32) -> Examples:
    """scikit-learn's 1797 digits, in [0, 1], averaged over `pool` x `pool` pixels."""
    X, y = load_digits(return_X_y=True)
    images = torch.tensor(X / 16, dtype=dtype).view(-1, 1, 8, 8)
    return nn.functional.avg_pool2d(images, pool).flatten(1), torch.tensor(y)


def batch_spectra(run: Run, seed: int, study: Study) -> None:
    """Extreme eigenvalues of batches of every size beside what each model of the noise predicts."""
    data = digits(pool=2, dtype=torch.float64)
    data = (data[0].to(run.device), data[1].to(run.device))
    model = perceptron(16, 16, 10, seed=seed, dtype=torch.float64).to(run.device)
    run.record("network", "loss", train_on_all(model, data, steps=300), seed=seed)
    spectra = {}
    for matrix, name in (("hessian", "Hessian"), ("gauss-newton", "Gauss-Newton")):
        curvature = BatchCurvature(matrix=matrix, steps=40, probes=4, noise_examples=400, random_state=seed)
        report = curvature.measure(model, CROSS_ENTROPY, data)
        errors: dict[str, list[float]] = {method: [] for method in PREDICTIONS}
        for size in study.batch_sizes:
            draws = min(max(study.examples // size, 16), 128)  # the smaller the batches, the wider they scatter
            seen = curvature.batch_extremes(model, CROSS_ENTROPY, data, size, draws=draws)
            top = float(seen.largest.mean())
            setting: dict[str, Any] = {"batch size": size, "matrix": name}
            run.record("measured", "largest eigenvalue", top, seed=seed, **setting)
            run.record("measured", "smallest eigenvalue", float(seen.smallest.mean()), seed=seed, **setting)
            for method, kind in PREDICTIONS.items():
                predicted = report.batch_eigenvalues(size, model=kind)
                run.record(method, "largest eigenvalue", predicted.largest.value, seed=seed, **setting)
                run.record(method, "smallest eigenvalue", predicted.smallest.value, seed=seed, **setting)
                if size >= 8:
                    errors[method].append(abs(predicted.largest.value / top - 1))
        for method, found in errors.items():
            metric = "largest relative error of the top eigenvalue, batch 8 or more"
            run.record(method, metric, max(found), seed=seed, matrix=name)
        run.record("network", "largest eigenvalue over all data", report.largest, seed=seed, matrix=name)
        run.record("network", "batch size at the knee", report.knee, seed=seed, matrix=name)
        if seed == run.seeds[0]:
            spectra[name] = {"all data": (report.spectrum, report.largest)}
            for size in (8, 64):
                mean = curvature.batch_extremes(model, CROSS_ENTROPY, data, size, draws=32).spectrum
                spectra[name][f"batches of {size}"] = mean, report.batch_eigenvalues(size).largest.value
    if spectra:
        plot_spectra(run, spectra)


# Learning rates that training survives --------------------------------------------------------------------------------


def survivors(run: Run, study: Study) -> None:
    """Largest rate at which a trained network keeps its loss (SGD), or a fresh one learns (Adam), at each batch size.

    All seeds step together, each with its own network and batches.
    """
    data = digits()
    data = (data[0].to(run.device), data[1].to(run.device))
    checkpoints = [perceptron(64, 32, 10, seed=seed).to(run.device) for seed in run.seeds]
    losses = [train_on_all(model, data, steps=150) for model in checkpoints]
    reports = []
    for seed, model in zip(run.seeds, checkpoints):
        report = BatchCurvature(steps=30, probes=2, random_state=seed).measure(model, CROSS_ENTROPY, data)
        reports.append(report)
        run.record("SGD", "batch size at the knee", report.knee, seed=seed)

    sgd = LearningRateSweep(optimizer="sgd", steps=200)
    found: dict[str, dict[int, list[float]]] = {criterion: {} for criterion in CRITERIA}
    for size in run.track(study.sgd, "rates of SGD"):
        repeats = 3 if size <= 64 else 1
        grid = half_octaves(-6, 1) if size <= 16 else half_octaves(-0.5, 2)
        starts = torch.stack([flat(model) for model in checkpoints for _ in range(repeats)])
        sweep = sgd.run(
            checkpoints[0], CROSS_ENTROPY, data, grid, size, generators=generators(run, repeats, size), starts=starts
        )
        rows = sweep.losses.view(len(run.seeds), repeats, -1).mean(1)
        for criterion, kept in CRITERIA.items():
            rates = [largest(sweep.rates, own <= kept(loss)) for loss, own in zip(losses, rows)]
            found[criterion][size] = rates
            setting: dict[str, Any] = {"batch size": size, "criterion": criterion}
            for seed, rate in zip(run.seeds, rates):
                run.record("SGD", RATE, rate, seed=seed, **setting)
        for seed, report in zip(run.seeds, reports):
            for method, kind in PREDICTIONS.items():
                rate = report.max_learning_rate(size, model=kind)
                run.record(method, RATE, rate, seed=seed, **{"batch size": size})
    for criterion, by_size in found.items():
        record_slopes(run, "SGD", by_size, [b for b in study.sgd if b <= 16], criterion=criterion)
    for seed, small, large in zip(run.seeds, found[KEPT][64], found[KEPT][512]):
        run.record("SGD", "largest stable learning rate at 512 / at 64", large / small, seed=seed)

    adam = LearningRateSweep(optimizer="adam", steps=150)
    learnt: dict[int, list[float]] = {}
    fresh = [perceptron(64, 32, 10, seed=1000 * seed + i).to(run.device) for seed in run.seeds for i in (1, 2)]
    for size in run.track(study.adam, "rates of Adam"):
        sweep = adam.run(
            fresh[0],
            CROSS_ENTROPY,
            data,
            half_octaves(-5.5, 0) if size < 64 else half_octaves(-3, 0.5),
            size,
            generators=generators(run, 2, size),
            starts=torch.stack([flat(model) for model in fresh]),
        )
        means = sweep.losses.view(len(run.seeds), 2, -1).mean(1)
        learnt[size] = [largest(sweep.rates, own < 1.0) for own in means]
        for seed, rate in zip(run.seeds, learnt[size]):
            run.record("Adam", RATE, rate, seed=seed, **{"batch size": size})
    record_slopes(run, "Adam", learnt, list(study.adam))
    if run.scale == "paper":
        for seed, model in zip(run.seeds, checkpoints):
            rates = [adam_prediction(model, data, size, seed) for size in study.adam]
            slope = np.polyfit(np.log(study.adam), np.log(rates), 1)[0]
            run.record("preconditioned curvature of the trained network", SLOPE, slope, seed=seed)
    plot_rates(run)


def half_octaves(low: float, high: float) -> list[float]:
    return (2.0 ** np.arange(low, high + 0.1, 0.5)).tolist()


def flat(model: nn.Module) -> Float[Tensor, " p"]:
    return parameters_to_vector(model.parameters()).detach()


def generators(run: Run, repeats: int, size: int) -> list[torch.Generator]:
    return [
        torch.Generator().manual_seed(seed * 1_000_003 + 1009 * size + i) for seed in run.seeds for i in range(repeats)
    ]


def largest(rates: Float[Tensor, " rates"], stable: Bool[Tensor, " rates"]) -> float:
    return float(rates[stable].max()) if stable.any() else math.nan


def record_slopes(run: Run, method: str, found: dict[int, list[float]], sizes: Sequence[int], **setting: str) -> None:
    for i, seed in enumerate(run.seeds):
        rates = [found[size][i] for size in sizes]
        run.record(method, SLOPE, np.polyfit(np.log(sizes), np.log(rates), 1)[0], seed=seed, **setting)


def adam_prediction(model: nn.Module, data: Examples, size: int, seed: int, steps: int = 60) -> float:
    """The limit of Adam at the model as it stands: steps of rate zero gather the second moments of batches."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = data
    limits = []
    for step in range(steps):
        rows = torch.randperm(len(targets), generator=generator)[:size]
        optimizer.zero_grad()
        CROSS_ENTROPY(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        if step >= steps - 3:
            op = Hessian(model, CROSS_ENTROPY, (inputs[rows], targets[rows]))
            limits.append(largest_adam_learning_rate(op, optimizer, rtol=1e-2, generator=generator))
    return float(np.exp(np.mean(np.log(limits))))


# The learner ----------------------------------------------------------------------------------------------------------


def heavy_ball(run: Run, seed: int) -> None:
    """A quadratic of condition number 100: the learner's rate and momentum beside gradient descent at its best rate."""
    eigenvalues = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    seen = spectral_measure(eigenvalues.diag(), steps=60, probes=1, generator=generator)
    ball = optimal_heavy_ball(seen.largest, seen.smallest)
    start = torch.randn(100, generator=generator, dtype=torch.float64)
    errors = {}
    for name, lr, momentum in (("learner", ball.lr, ball.momentum), ("gradient descent", 2 / 1.01, 0.0)):
        x, v = start.clone(), torch.zeros_like(start)
        for _ in range(100):
            v = momentum * v + eigenvalues * x
            x = x - lr * v
        errors[name] = float(x.norm() / start.norm())
    metric = "error after 100 steps / gradient descent at its best rate"
    run.record("learner", metric, errors["learner"] / errors["gradient descent"], seed=seed)


def learner(run: Run, seed: int, epochs: int = 8, batch_size: int = 128) -> None:
    """Training loss on digits from rates that are too small, right and too large, set by hand or learnt on the way."""
    data = digits()
    inputs, targets = data[0].to(run.device), data[1].to(run.device)
    for method in ("learner", "fixed rate, momentum 0.9"):
        for lr in (0.001, 0.1, 3.0):
            model = perceptron(64, 32, 10, seed=seed).to(run.device)
            optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
            tuner = CurvatureTuner(optimizer, model, CROSS_ENTROPY, every=14, steps=15, random_state=seed)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(epochs):
                for rows in torch.randperm(len(targets), generator=generator).split(batch_size)[:14]:
                    batch = inputs[rows], targets[rows]
                    if method == "learner":
                        tuner.step(batch)
                    optimizer.zero_grad()
                    CROSS_ENTROPY(model(batch[0]), batch[1]).backward()
                    optimizer.step()
            with torch.no_grad():
                loss = float(CROSS_ENTROPY(model(inputs), targets))
            run.record(method, "training loss", loss, seed=seed, **{"first rate": lr})


# A spectrum at size ---------------------------------------------------------------------------------------------------


def timed_spectrum(run: Run, width: int) -> None:
    """Seconds of stochastic Lanczos quadrature for a network of about a million parameters, on 1024 digits."""
    data = digits()
    inputs, targets = data[0][:1024].to(run.device), data[1][:1024].to(run.device)
    model = perceptron(64, width, width, 10, seed=0).to(run.device)
    train_on_all(model, (inputs, targets), steps=10, lr=0.1)
    op = Hessian(model, CROSS_ENTROPY, (inputs, targets))
    started = perf_counter()
    measure = spectral_measure(op, steps=20, probes=1, generator=torch.Generator(run.device).manual_seed(0))
    seconds = perf_counter() - started
    run.record("Lanczos quadrature", "seconds for a spectrum", seconds, parameters=op.shape[0], steps=20)
    run.record("Lanczos quadrature", "largest eigenvalue", measure.largest, parameters=op.shape[0], steps=20)


# The full-size study --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FullSize:
    """The paper's grid: networks, batch sizes, rates in factors of two, and epochs until a run is judged."""

    networks: dict[str, Callable[[], nn.Module]]
    batch_sizes: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    rates: tuple[float, ...] = tuple(2.0**k for k in range(-16, 2))
    epochs: int = 20
    lanczos: int = 100
    spectra_after: tuple[int, ...] = (0, 25, 300)


def full_size(run: Run, study: FullSize | None = None) -> None:
    study = study or FullSize({"VGG-16": vgg16, "WideResNet-28x10": lambda: WideResNet(28, 10)})
    train = cifar100(run, "train")
    for network, make in study.networks.items():
        for method in ("SGD", "Adam"):
            for seed in run.track(run.seeds, f"{network}, {method}"):
                options: dict[str, Any] = {"rates": study.rates, "epochs": study.epochs, "device": run.device}
                rates = []
                for size in study.batch_sizes:
                    rates.append(largest_rate(make, method, train, size, seed=seed, **options))
                    run.record(method, f"{RATE}, {network}", rates[-1], seed=seed, **{"batch size": size})
                slope = np.polyfit(np.log(study.batch_sizes), np.log(rates), 1)[0]
                run.record(method, f"{SLOPE}, {network}", slope, seed=seed)
        full_size_spectra(run, network, make(), train, study)


def cifar100(run: Run, split: str) -> Examples:
    return read_cifar100(run.data(f"cifar-100-binary/{split}.bin", "CIFAR-100, binary version"))


def full_size_spectra(run: Run, network: str, model: nn.Module, train: Examples, study: FullSize) -> None:
    """Curvature over all data in evaluation mode, as one training goes on, with the noise for batches of any size."""
    model = model.to(run.device)
    optimizer = optimizer_of("SGD", model, 0.01)
    done = 0
    for epoch in run.track(study.spectra_after, f"spectra of {network}"):
        train_epochs(model, optimizer, train, study.batch_sizes[0], epoch - done, seed=epoch)
        done = epoch
        model.eval()
        data = list(batches(train, 512, run.device))
        for matrix in ("hessian", "gauss-newton"):
            curvature = BatchCurvature(matrix=matrix, steps=study.lanczos, probes=1)
            report = curvature.measure(model, CROSS_ENTROPY, data)
            setting: dict[str, Any] = {"network": network, "epoch": epoch, "matrix": matrix}
            run.record("network", "largest eigenvalue over all data", report.largest, **setting)
            run.record("network", "smallest eigenvalue over all data", report.smallest, **setting)
            run.record("network", "batch size at the knee", report.knee, **setting)


# Figures --------------------------------------------------------------------------------------------------------------


def plot_spectra(run: Run, spectra: dict[str, dict[str, tuple[SpectralMeasure, float]]]) -> None:
    """Spectral densities over all data and over batches, with the largest eigenvalue predicted for each."""
    from locally.plots import PALETTE, canvas

    figure, panels = canvas(9.6, 3.8, ncols=2, sharey=True)
    for axes, (name, seen) in zip(panels, spectra.items()):
        low = min(m.smallest for m, _ in seen.values())
        high = max(max(m.largest, top) for m, top in seen.values())
        grid = torch.linspace(low - 0.1 * (high - low), 1.05 * high, 800, dtype=torch.float64)
        for (label, (measure, top)), colour in zip(seen.items(), PALETTE):
            axes.semilogy(grid, measure.density(grid, width=0.01 * (high - low)), color=colour, label=label)
            axes.axvline(top, color=colour, ls=":", lw=1.4)
        axes.set(xlabel=f"eigenvalue of the {name} matrix", ylim=(1e-4, 1e2))
    panels[0].set_ylabel("density")
    panels[1].legend(fontsize=8.5)
    caption = (
        "Spectra of a network trained on digits, by stochastic Lanczos quadrature, over all data and over 32"
        " batches; dotted: the largest eigenvalue over all data, and those predicted for such batches on average."
    )
    run.figure(figure, "spectra", caption)


def plot_extremes(run: Run) -> None:
    """Both ends of the Hessian's spectrum over the batch size: measured, and predicted in three ways."""
    from locally.plots import INK, PALETTE, canvas

    figure, panels = canvas(9.0, 3.8, ncols=2)
    colours = {"measured": INK, **dict(zip(PREDICTIONS, PALETTE))}
    for axes, metric in zip(panels, ("largest eigenvalue", "smallest eigenvalue")):
        for method, colour in colours.items():
            points: dict[int, list[float]] = {}
            for m in run.measures:
                if (m.method, m.metric, m.setting.get("matrix")) == (method, metric, "Hessian"):
                    points.setdefault(int(m.setting["batch size"]), []).append(m.value)
            at = sorted(points)
            style = "o" if method == "measured" else "-"
            axes.plot(at, [np.mean(points[b]) for b in at], style, color=colour, label=method, markersize=4)
        axes.set(xscale="log", xlabel="batch size", ylabel=f"{metric} of the batch Hessian")
    panels[0].legend(fontsize=8.5)
    caption = (
        "Extreme eigenvalues of the Hessians of batches of digits, mean over batches and seeds. Noise of equal variance"
        " in all entries misses almost all of the shift of the largest; noise measured along the outliers gives it."
    )
    run.figure(figure, "batch-eigenvalues", caption)


def plot_rates(run: Run) -> None:
    from locally.plots import PALETTE, canvas

    figure, axes = canvas(7.2, 4.2)
    styles = {
        "SGD": (PALETTE[0], "o-"),
        "Adam": (PALETTE[1], "s-"),
        DIRECTION: (PALETTE[0], "--"),
        SINGLE: (PALETTE[2], ":"),
    }
    for method, (colour, style) in styles.items():
        points: dict[int, list[float]] = {}
        for m in run.measures:
            if (m.method, m.metric) == (method, RATE) and m.setting.get("criterion", KEPT) == KEPT:
                points.setdefault(int(m.setting["batch size"]), []).append(m.value)
        at = sorted(points)
        middle = np.array([np.exp(np.mean(np.log(points[b]))) for b in at])
        label = method if method in ("SGD", "Adam") else f"SGD, {method}"
        axes.loglog(at, middle, style, color=colour, label=label, markersize=4)
        if method in ("SGD", "Adam"):
            axes.fill_between(
                at, [min(points[b]) for b in at], [max(points[b]) for b in at], color=colour, alpha=0.15, lw=0
            )
    axes.set(xlabel="batch size", ylabel=RATE)
    axes.legend(fontsize=8.5)
    caption = (
        "Largest learning rate that training survives, on a grid of half octaves, geometric mean and range over seeds:"
        " SGD from a trained network, Adam from a fresh one; dashed and dotted, what the measured curvature allows SGD."
    )
    run.figure(figure, "learning-rates", caption)
