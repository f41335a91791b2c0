"""Wide ReLU networks beside the kernel that they should have: at initialisation, during training, and after it.

The paper's three studies: the kernel on the unit circle over width, trained networks against the predicted band, and
learning along one principal component. The first two have the paper's own set-up; the third uses scikit-learn's digits,
and MNIST at paper scale. That scale also classifies CIFAR-10 with the kernels of convolutional networks (Arora et al.,
arXiv 1904.11955).
"""

import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import norm
from sklearn.datasets import load_digits
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor, nn

from locally.evidence import MissingData, Run
from locally.plots import canvas
from locally.tangent.kernel import InfiniteNetwork, KernelFlow, NTKLinear, PrincipalComponents, empirical_ntk, ensemble
from locally.training.local_learning.images import ImageSet, read_cifar10

BETA = 0.1  # of the biases, everywhere
NETWORK, THEORY, RBF_PROCESS = "ReLU network", "infinite width", "Gaussian process, RBF (scikit-learn)"


@dataclass(frozen=True)
class Convolutional:
    """Images to learn from and to be tested on, and the numbers of convolutions."""

    train: int
    test: int
    depths: Sequence[int]


@dataclass(frozen=True)
class Study:
    """Sizes of one scale."""

    widths: Sequence[int]  # of the kernel study; empty leaves it out
    inits: int  # networks for the spread of the kernel at each width
    trained: Sequence[int]  # of which so many are trained, for each width
    band_widths: Sequence[int]
    band_nets: int
    band_steps: int
    component_widths: Sequence[int]  # empty leaves the study out
    mnist: bool
    convolutional: Convolutional | None = None


def experiment(run: Run) -> None:
    carry_out(
        run,
        run.pick(
            quick=Study((), 0, (), (200,), 40, 150, (), False),
            default=Study((50, 100, 200, 500), 40, (6, 6, 4, 3), (50, 200), 40, 300, (100, 1000), False),
            paper=Study(
                (50, 100, 200, 500, 1000, 2000, 10000),
                10,
                (10,) * 7,
                (50, 1000),
                100,
                1000,
                (100, 1000, 10000),
                True,
                Convolutional(1000, 1000, (5, 10)),
            ),
        ),
    )


def carry_out(run: Run, study: Study) -> None:
    if study.convolutional:
        cifar10(run)  # what is missing is said before hours of work
    bands, curves = run.parallel(partial(one_seed, study=study), run.seeds, "seeds")[-1]
    plot_band(run, bands[max(study.band_widths)])
    if study.widths:
        run.plot_lines("width", "kernel spread", log=True, name="spread", caption=SPREAD_CAPTION)
        run.plot_lines("width", "kernel drift", log=True, name="drift", caption=DRIFT_CAPTION)
    if curves:
        plot_components(run, curves)


def one_seed(run: Run, seed: int, study: Study) -> "tuple[dict[int, Band], dict[int, Curve]]":
    """Records everything; returns what is drawn, by width."""
    if study.convolutional:
        classify(run, cifar10(run), study.convolutional, seed)
    if study.widths:
        kernel_over_width(run, study, seed)
    bands = {w: band(run, w, study, seed) for w in run.track(study.band_widths, "trained networks")}
    curves = {w: component(run, w, study.mnist, seed) for w in run.track(study.component_widths, "components")}
    return bands, curves


SPREAD_CAPTION = "Relative standard deviation of the tangent kernel on the unit circle over initialisations."
DRIFT_CAPTION = "Relative change of the tangent kernel after 200 steps of gradient descent with rate 1."


# The kernel over width ----------------------------------------------------------------------------------------------


def kernel_over_width(run: Run, study: Study, seed: int) -> None:
    """Theta(x0, .) on the circle for networks of four layers, before and after training on f*(x) = x_1 x_2."""
    network = InfiniteNetwork.mlp(3, b_std=BETA)
    x0, curve = circle([0.0]).to(run.device), circle(np.linspace(-math.pi, math.pi, 60)).to(run.device)
    limit = network.ntk(x0.double(), curve.double())[0]
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(100, 2, generator=generator).to(run.device)
    targets = inputs.prod(1, keepdim=True)
    spreads, drifts = [], []
    for width, trained in zip(run.track(study.widths, "widths"), study.trained):
        nets = Networks([2, width, width, width, 1], study.inits, generator, run.device)
        kernels = [empirical_ntk(nets.module(i), x0, curve)[0] for i in range(study.inits)]
        nets.keep(trained)
        # rate 1 is above the stability bound of the narrowest networks' own kernels
        nets.descend(inputs, targets, *((0.5, 400) if width <= 50 else (1.0, 200)))
        after = [empirical_ntk(nets.module(i), x0, curve)[0] for i in range(trained)]
        moved = [float((a - b).norm() / b.norm()) for a, b in zip(after, kernels)]
        K = torch.stack(kernels).double()
        spreads.append(float(K.std(0).square().mean().sqrt() / limit.square().mean().sqrt()))
        drifts.append(math.exp(np.log(moved).mean()))
        error = float((K - limit).square().mean().sqrt() / limit.square().mean().sqrt())
        run.record(NETWORK, "kernel spread", spreads[-1], seed=seed, width=width)
        run.record(NETWORK, "kernel drift", drifts[-1], seed=seed, width=width)
        run.record(NETWORK, "kernel error to the limit", error, seed=seed, width=width)
    for name, values in (("spread", spreads), ("drift", drifts)):
        slope = np.polyfit(np.log(study.widths), np.log(values), 1)[0]
        run.record(NETWORK, f"slope of log kernel {name} over log width", slope, seed=seed)


def circle(angles: Sequence[float] | ndarray) -> Float[Tensor, "n 2"]:
    gamma = torch.as_tensor(np.asarray(angles), dtype=torch.float32)
    return torch.stack([gamma.cos(), gamma.sin()], 1)


class Networks:
    """Many ReLU networks of one shape, trained at once by full-batch gradient descent in batches of matrix products."""

    def __init__(self, sizes: Sequence[int], count: int, generator: torch.Generator, device: str) -> None:
        self.sizes = sizes
        draw = lambda *shape: torch.randn(count, *shape, generator=generator).to(device)
        drawn = [(draw(a, b), draw(1, b)) for a, b in pairwise(sizes)]
        self.weights, self.biases = [w for w, _ in drawn], [b for _, b in drawn]
        self.scales = [1 / math.sqrt(n) for n in sizes[:-1]]

    def keep(self, count: int) -> None:
        """Only the first networks."""
        self.weights, self.biases = [w[:count] for w in self.weights], [b[:count] for b in self.biases]

    def activations(self, points: Float[Tensor, "n d"]) -> list[Float[Tensor, "nets n units"]]:
        """Of every layer, the points first and the outputs last."""
        found = [points.expand(len(self.weights[0]), -1, -1)]
        for weight, bias, scale in zip(self.weights, self.biases, self.scales):
            z = torch.baddbmm(bias, found[-1], weight, beta=BETA, alpha=scale)
            found.append(z.relu_() if len(found) < len(self.weights) else z)
        return found

    def __call__(self, points: Float[Tensor, "n d"]) -> Float[Tensor, "nets n k"]:
        return self.activations(points)[-1]

    def descend(self, points: Tensor, targets: Tensor, rate: float, steps: int) -> None:
        """On the mean over samples of |f - y|^2 / 2.

        By hand and in place: autograd would write and read every gradient once more, and these steps wait for memory.
        """
        for _ in range(steps):
            found = self.activations(points)
            back = (found[-1] - targets) / len(points)
            for layer in reversed(range(len(self.weights))):
                weight, below, scale = self.weights[layer], found[layer], self.scales[layer]
                further = scale * (back @ weight.mT) * (below > 0) if layer else back
                weight.baddbmm_(below.mT, back, alpha=-rate * scale)
                self.biases[layer].sub_(back.sum(1, keepdim=True), alpha=rate * BETA)
                back = further

    def module(self, index: int) -> nn.Sequential:
        """One of them, as the library builds such networks."""
        network = InfiniteNetwork.mlp(len(self.sizes) - 2, b_std=BETA)
        found = network.finite(self.sizes[0], self.sizes[1], self.sizes[-1]).to(self.weights[0].device)
        layers = [part for part in found if isinstance(part, NTKLinear)]
        for layer, weight, bias in zip(layers, self.weights, self.biases):
            assert layer.bias is not None
            layer.weight.data, layer.bias.data = weight[index].T.clone(), bias[index, 0].clone()
        return found


# Trained networks against the predicted band ------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    angles: Float[ndarray, " m"]
    mean: Float[ndarray, " m"]
    deviation: Float[ndarray, " m"]
    networks: Float[ndarray, "nets m"]
    points: Float[ndarray, " n"]
    targets: Float[ndarray, " n"]


def band(run: Run, width: int, study: Study, seed: int) -> Band:
    """Networks trained on four points of the circle, and the distribution that the limit predicts at the same time."""
    points = np.array([-2.5, -0.9, 0.4, 1.7])
    angles = np.linspace(-math.pi, math.pi, 80)
    x, curve = circle(points), circle(angles)
    y = x.prod(1, keepdim=True)
    network = InfiniteNetwork.mlp(3, b_std=BETA)
    K, cross = network.kernel(x.double().numpy()), network.kernel(curve.double().numpy(), x.double().numpy())
    flow = KernelFlow(K.ntk, y.double().numpy())
    prior = network.nngp(curve.double().numpy())
    mean, covariance = ensemble(flow, flow.after(study.band_steps), cross.ntk, K.nngp, cross.nngp, prior)
    deviation = np.sqrt(np.diag(covariance))

    generator = torch.Generator().manual_seed(1000 * seed + width)
    nets = Networks([2, width, width, width, 1], study.band_nets, generator, run.device)
    nets.descend(x.to(run.device), y.to(run.device), 1.0, study.band_steps)
    outputs = nets(curve.to(run.device))[:, :, 0].double().cpu().numpy()
    inside = np.abs(outputs - mean[:, 0]) <= norm.ppf(0.9) * deviation
    share = f"share of curve points inside the predicted 80 % band, width {width}"
    run.record(NETWORK, share, inside.mean(), seed=seed)
    run.record(
        NETWORK, "mean error to the prediction", np.abs(outputs.mean(0) - mean[:, 0]).mean(), seed=seed, width=width
    )
    run.record(NETWORK, "standard deviation", outputs.std(0).mean(), seed=seed, width=width)
    run.record(THEORY, "standard deviation", deviation.mean(), seed=seed, width=width)
    process = GaussianProcessRegressor(ConstantKernel() * RBF(), alpha=1e-8, random_state=seed).fit(x, y[:, 0])
    centre, spread = process.predict(curve, return_std=True)
    inside = np.abs(outputs - centre) <= norm.ppf(0.9) * spread
    run.record(RBF_PROCESS, share, inside.mean(), seed=seed)
    return Band(angles, mean[:, 0], deviation, outputs, points, y[:, 0].numpy())


def plot_band(run: Run, found: Band) -> None:
    figure, axes = canvas()
    low, high = (found.mean + q * norm.ppf(0.9) * found.deviation for q in (-1, 1))
    for row in found.networks[:10]:
        axes.plot(found.angles, row, lw=0.6, color="#7c8591")
    axes.plot(found.angles, found.mean, label="predicted mean")
    axes.fill_between(found.angles, low, high, alpha=0.25, label="predicted 10 % to 90 %")
    axes.plot(found.points, found.targets, "o", label="training points")
    axes.set(xlabel="angle on the circle", ylabel="output")
    axes.legend()
    run.figure(figure, "band", "Ten trained networks (grey) and what the infinite network predicts.")


# Learning along one principal component -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    steps: Sequence[int]
    component: Float[ndarray, " steps"]
    predicted: Float[ndarray, " steps"]


def component(run: Run, width: int, mnist: bool, seed: int) -> Curve:
    """Train towards f0 + v2 / 2, v2 the second principal component, and watch the motion along it and off it."""
    x = images(run, mnist, seed)
    network = InfiniteNetwork.mlp(2, b_std=BETA)
    K = network.ntk(x.numpy())
    found = PrincipalComponents.of(K)
    second = torch.as_tensor(found.vectors[:, 1:2].copy()).float().to(run.device)
    x = x.float().to(run.device)
    net = Networks([x.shape[1], width, width, 1], 1, torch.Generator().manual_seed(seed), run.device)
    start = net(x)[0]
    rate = 0.5 / float(found.values[0])
    marks, along, off, done = (10, 25, 50, 75, 100, 125), [], [], 0
    for steps in run.track(marks, "gradient descent"):
        net.descend(x, start + 0.5 * second, rate, steps - done)
        done = steps
        change = net(x)[0] - start
        coefficient = (change * second).mean()
        along.append(float(coefficient))
        off.append(float((change - coefficient * second).square().mean().sqrt()))
    # gradient descent, not flow: each step keeps 1 - rate w of the residual
    predicted = 0.5 * (1 - (1 - rate * found.values[1]) ** np.array(marks))
    deviation = np.abs(along - predicted).max()
    run.record(NETWORK, f"largest deviation from the predicted decay, width {width}", deviation, seed=seed)
    run.record(NETWORK, "largest orthogonal deviation", max(off), seed=seed, width=width)
    narrow = next(m for m in run.measures if m.seed == seed and m.metric == "largest orthogonal deviation")
    if narrow.setting["width"] != width:
        metric = f"largest orthogonal deviation at width {width} / at width {narrow.setting['width']}"
        run.record(NETWORK, metric, max(off) / narrow.value, seed=seed)
    for index, value in enumerate(found.values[:3].tolist(), 1):
        run.record(THEORY, "eigenvalue of the kernel over n", value, seed=seed, component=index, width=width)
    return Curve(marks, np.array(along), predicted)


def images(run: Run, mnist: bool, seed: int) -> Float[Tensor, "n d"]:
    """Centred and of unit norm: 300 digits of 8 x 8, or 512 of MNIST."""
    if mnist:
        raw = read_idx(run.data("mnist/t10k-images-idx3-ubyte.gz", "MNIST's test images in its own IDX format"))
        count, scale = 512, 255.0
    else:
        raw, count, scale = load_digits().images, 300, 16.0
    chosen = np.random.default_rng(seed).choice(len(raw), count, replace=False)
    x = raw[chosen].reshape(count, -1) / scale
    x = x - x.mean()
    return torch.as_tensor(x / np.linalg.norm(x, axis=1, keepdims=True))


def read_idx(path: Path) -> ndarray:
    """Images in the IDX format: a magic number, three sizes, bytes."""
    raw = gzip.decompress(path.read_bytes())
    magic, *shape = np.frombuffer(raw, ">i4", 4).tolist()
    if magic != 2051 or len(raw) != 16 + math.prod(shape):
        raise ValueError(f"{path} does not hold images in the IDX format")
    return np.frombuffer(raw, np.uint8, offset=16).reshape(shape)


def plot_components(run: Run, curves: dict[int, Curve]) -> None:
    figure, axes = canvas()
    for width, curve in curves.items():
        axes.plot(curve.steps, curve.component, marker="o", markersize=3.5, label=f"width {width}")
    axes.plot(curve.steps, curve.predicted, "--", label="predicted")
    axes.set(xlabel="steps of gradient descent", ylabel="learnt of the second component")
    axes.legend()
    run.figure(figure, "component", "Narrow networks learn faster than the fixed kernel says; wide ones follow it.")


# Convolutional kernels on CIFAR-10 -----------------------------------------------------------------------------------

RIDGE = 1e-6  # in multiples of the kernel's mean diagonal
POOLED, FLAT = "convolutional kernel, pooled", "convolutional kernel, flattened"
ACCURACY = "accuracy on CIFAR-10"


def cifar10(run: Run) -> ImageSet:
    """From cifar10/cifar10.zip (train/<class>/*.jpg and test/<class>/*.jpg or .png), or the binary files in cifar10."""
    folder = run.data("cifar10", "CIFAR-10, as cifar10.zip of class folders or in its binary files")
    path = folder / "cifar10.zip"
    try:
        return read_cifar10(path if path.exists() else folder)
    except FileNotFoundError as error:
        raise MissingData(f"{folder} holds neither cifar10.zip nor CIFAR-10's binary files: {error}") from error


def classify(run: Run, data: ImageSet, study: Convolutional, seed: int) -> None:
    """Kernel regression on one-hot classes with networks of He's variance and without biases, as Arora et al. do."""
    generator = torch.Generator().manual_seed(seed)
    rows, tested = (
        torch.randperm(len(y), generator=generator)[:count]
        for y, count in ((data.y, study.train), (data.y_test, study.test))
    )
    x, x_test = (t.double().to(run.device) for t in (data.x[rows], data.x_test[tested]))
    classes = int(data.y.max()) + 1
    targets = np.eye(classes)[data.y[rows].numpy()] - 1 / classes
    truth = data.y_test[tested].numpy()
    he = math.sqrt(2)
    for depth in run.track(study.depths, "depths"):
        reached = {}
        networks = {
            POOLED: InfiniteNetwork.cnn(depth, pooling=True, w_std=he, b_std=0.0),
            FLAT: InfiniteNetwork.cnn(depth, w_std=he, b_std=0.0),
            "dense kernel": InfiniteNetwork.mlp(depth, w_std=he, b_std=0.0),
        }
        for method, network in zip(run.track(list(networks), "kernels"), networks.values()):
            a, b = (x, x_test) if method != "dense kernel" else (x.flatten(1), x_test.flatten(1))
            flow = KernelFlow(network.ntk(a).cpu().numpy(), targets, ridge=RIDGE)
            cross = [network.ntk(part, a).cpu().numpy() for part in run.track(b.split(50), "test images")]
            found = flow.test(math.inf, np.concatenate(cross)).argmax(1)
            reached[method] = float((found == truth).mean())
            run.record(method, ACCURACY, reached[method], seed=seed, depth=depth, examples=len(x))
        run.record(
            POOLED, f"{ACCURACY} above that without pooling", reached[POOLED] - reached[FLAT], seed=seed, depth=depth
        )
    flat, flat_test = (t.flatten(1).cpu().numpy() for t in (x, x_test))
    width = 1 / (flat.shape[1] * flat.var())
    ridge = KernelRidge(kernel="rbf", gamma=width, alpha=RIDGE).fit(flat, targets)
    right = (ridge.predict(flat_test).argmax(1) == truth).mean()
    run.record("kernel ridge, RBF (scikit-learn)", ACCURACY, float(right), seed=seed, examples=len(x))
