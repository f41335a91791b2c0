"""Certified local Lipschitz constants beside RecurJac, interval arithmetic, layer norms and an exact programme.

The paper's synthetic classifiers (every point takes the label of its nearest leader) with growing depth and width, then
scikit-learn's digits, and monotonicity on its breast cancer data. At full size: MNIST and CIFAR-10 networks.
"""

import gzip
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from locally.evidence import Run, Setting
from locally.tangent.lipschitz import LipschitzResult, LocalLipschitz, monotonicity, read_module

METHODS = {
    "bound propagation": LocalLipschitz(method="bound"),
    "RecurJac": LocalLipschitz(method="recurjac"),
    "interval bound": LocalLipschitz(method="interval"),
    "product of layer norms": LocalLipschitz(method="global"),
}


@dataclass(frozen=True)
class Study:
    """Sizes of one scale. `nets` are (depth, width) of perceptrons; branching may make `domains`
    subdomains for each of them (and take a minute)."""

    nets: tuple[tuple[int, int], ...]
    points: int
    epochs: int
    domains: int
    samples: int
    digits: int  # test images, on three seeds; 0 leaves real data out
    instances: int  # of breast cancer
    exact_width: int = 0  # of a network that the exact programme solves, 0 for none
    images: int = 0  # per image data set at full size


def experiment(run: Run) -> None:
    carry_out(
        run,
        run.pick(
            quick=Study(((3, 32), (6, 32)), 10_000, 3, 100, 1000, digits=0, instances=0, exact_width=8),
            default=Study(
                ((3, 16), (3, 32), (3, 64), (4, 32), (5, 32), (6, 32)), 10_000, 10, 800, 6000, 5, 20, exact_width=8
            ),
            paper=Study(
                ((3, 16), (3, 32), (3, 64), *((d, 32) for d in range(4, 9))), 10_000, 10, 200_000, 6000, 5, 20, 8, 100
            ),
        ),
    )


def carry_out(run: Run, study: Study) -> None:
    run.parallel(partial(of_one_seed, study=study), run.seeds, "synthetic classifiers")
    if study.images:
        image_networks(run, study)
    plot_depth(run)


def of_one_seed(run: Run, seed: int, study: Study) -> None:
    synthetic(run, study, seed)
    if study.exact_width:
        against_exact(run, study, seed)
    if study.digits and seed in run.seeds[:3]:
        digits(run, study, seed)
        monotone_features(run, study, seed)


# Synthetic classifiers -----------------------------------------------------------------------------------------------


def synthetic(run: Run, study: Study, seed: int) -> None:
    x, y = nearest_leader(study.points, 16, seed)
    centre = torch.full((1, 16), 0.5, dtype=torch.float64, device=run.device)
    ratios: dict[tuple[int, int], float] = {}
    gaps: list[float] = []
    disorder = 0
    for depth, width in run.track(study.nets, "depth and width"):
        net = train(perceptron(16, width, depth, 10, seed), x, y, study.epochs, seed).to(run.device)
        setting: Setting = {"network": f"depth {depth}, width {width}", "depth": depth, "width": width}
        found = compare(run, study, net, centre, 0.1, seed, setting)
        disorder += out_of_order(found)
        ratios[depth, width] = float(found["RecurJac"].value / found["bound propagation"].value)
        if undecided(net, centre, 0.1) <= 40:
            plain, branched = (float(found[m].value) for m in ("bound propagation", "branch and bound"))
            gap = plain - float(found["bound propagation"].lower)
            gaps.append((plain - branched) / gap if gap > 1e-9 * plain else 1.0)
    ours = "bound propagation"
    run.record(ours, "instances out of order", disorder, seed=seed)
    wide = [1 / ratio for (_, width), ratio in ratios.items() if width >= 32]
    run.record(ours, "bound / RecurJac's bound", float(np.mean(wide)), seed=seed)
    growth = ratios[6, 32] / ratios[3, 32]
    run.record(ours, "RecurJac's bound / ours at depth 6, over the same ratio at depth 3", growth, seed=seed)
    if gaps:
        share = float(np.mean(gaps))
        run.record("branch and bound", "share of the gap to the sampled lower bound that is closed", share, seed=seed)


def compare(
    run: Run, study: Study, net: nn.Module, x: Tensor, eps: float, seed: int, setting: Setting
) -> dict[str, LipschitzResult]:
    """Every method on one box (or a batch of them); records the mean constants and seconds."""
    ours = {
        "bound propagation": LocalLipschitz(samples=study.samples),
        "branch and bound": LocalLipschitz(method="bab", max_domains=study.domains, samples=study.samples),
    }
    found = {}
    for name, estimator in {**METHODS, **ours}.items():
        found[name] = estimator.certify(net, x, eps, generator=torch.Generator().manual_seed(seed))
        run.record(name, "Lipschitz constant", found[name].value.mean().item(), seed=seed, **setting)
    sampled = found["bound propagation"].lower
    run.record("sampled lower bound", "Lipschitz constant", sampled.mean().item(), seed=seed, **setting)
    run.record("branch and bound", "subdomains", found["branch and bound"].n_domains, seed=seed, **setting)
    return found


def out_of_order(found: dict[str, LipschitzResult]) -> int:
    """Boxes on which the methods do not come in the order that soundness and tightness demand."""
    order = ("branch and bound", "bound propagation", "RecurJac", "interval bound", "product of layer norms")
    chain = [found["bound propagation"].lower, *(found[name].value for name in order)]
    bad = torch.zeros_like(chain[0], dtype=torch.bool)
    for smaller, larger in zip(chain, chain[1:]):  # noqa: RUF007
        bad |= smaller > larger * (1 + 1e-9)
    return int(bad.sum())


def undecided(net: nn.Module, x: Tensor, eps: float) -> int:
    """Hidden units whose activation is not decided on the box."""
    from locally.tangent.lipschitz.budget import Budget
    from locally.tangent.lipschitz.estimator import forward_bounds, make_box

    graph = read_module(net, tuple(x.shape[1:]), x.device)
    with torch.no_grad():
        bounds = forward_bounds(graph, make_box(x, eps, None, None), Budget(2**30, graph.widest), 0)
    return int(sum((high > low).sum() for low, high in bounds.slopes.values()))


def against_exact(run: Run, study: Study, seed: int) -> None:
    """A network small enough for the mixed-integer programme, which gives the true constant."""
    x, y = nearest_leader(study.points, 16, seed)
    net = train(perceptron(16, study.exact_width, 3, 10, seed), x, y, study.epochs, seed).to(run.device)
    centre = torch.full((1, 16), 0.5, dtype=torch.float64, device=run.device)
    exact = LocalLipschitz(method="exact", timeout=60.0).certify(net, centre, 0.1)
    branched = LocalLipschitz(method="bab").certify(net, centre, 0.1)
    setting = {"network": f"depth 3, width {study.exact_width}"}
    run.record("exact programme", "exact constant", exact.value.item(), seed=seed, **setting)
    run.record(
        "branch and bound", "bound / exact constant", (branched.value / exact.value).item(), seed=seed, **setting
    )


def nearest_leader(points: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Uniform points in the unit cube; 5 d of them lead, each with a random label of 10, and label those nearest."""
    rng = np.random.default_rng([seed, d])
    x = rng.random((points, d))
    leaders = rng.choice(points, 5 * d, replace=False)
    labels = rng.integers(10, size=5 * d)
    squares = (x[leaders] ** 2).sum(1)[None] - 2 * x @ x[leaders].T
    return torch.tensor(x, dtype=torch.float32), torch.tensor(labels[squares.argmin(1)])


def perceptron(inputs: int, width: int, layers: int, outputs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = [inputs, *[width] * (layers - 1), outputs]
    parts: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):  # noqa: RUF007
        parts += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int, lr: float = 1e-3) -> nn.Module:
    """Adam on cross entropy, batches of 256, 70 % of the points; returned in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator)[: int(0.7 * len(x))]
    optimiser = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    net.train()
    for _ in range(epochs):
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(256):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
    return net.eval()


# Real data -----------------------------------------------------------------------------------------------------------


def digits(run: Run, study: Study, seed: int) -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    net = train(perceptron(64, 32, 3, 10, seed), x, y, 40, seed).to(run.device)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[-study.digits :]
    points = x[rows].double().to(run.device)
    for sixteenths in (1, 2):
        setting: Setting = {"network": "digits, 64-32-32-10", "eps": sixteenths / 16}
        found = compare(run, study, net, points, sixteenths / 16, seed, setting)
        run.record("bound propagation", "digits: boxes out of order", out_of_order(found), seed=seed, **setting)


def monotone_features(run: Run, study: Study, seed: int) -> None:
    """How many (instance, feature) pairs are proven monotone, each feature running through its whole range."""
    data, labels = load_breast_cancer(return_X_y=True)
    scaled = (data - data.min(0)) / np.ptp(data, axis=0)
    x, y = torch.tensor(scaled, dtype=torch.float32), torch.tensor(labels)
    net = train(perceptron(30, 64, 4, 2, seed), x, y, 60, seed).to(run.device)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[-study.instances :]
    for name, method in {"bound propagation": "bound", "RecurJac": "recurjac", "interval bound": "interval"}.items():
        table = monotonicity(net, x[rows].double().to(run.device), list(range(30)), target=1, method=method)
        run.record(name, "share of pairs proven monotone", table.proven, seed=seed)


# Full size -----------------------------------------------------------------------------------------------------------


def image_networks(run: Run, study: Study) -> None:
    """The paper's MNIST and CIFAR-10 networks, trained here, then bounded around test images."""
    mnist = read_mnist(run.data("mnist", "MNIST's test part as IDX files"))
    cifar = read_cifar(run.data("cifar10/cifar10.zip", "CIFAR-10 as a zip of train/ and test/ folders"))
    networks: dict[str, tuple[Callable[[], nn.Module], Images]] = {
        "MNIST, 3 layers": (lambda: nn.Sequential(nn.Flatten(), *perceptron(784, 20, 3, 10, 0)), mnist),
        "MNIST, 4-layer CNN": (lambda: convolutional(1, 28, [(8, 4), (8, 4)], 100), mnist),
        "CIFAR-10, 4-layer CNN": (lambda: convolutional(3, 32, [(32, 3)] * 2, 256), cifar),
        "CIFAR-10, 6-layer CNN": (lambda: convolutional(3, 32, [(32, 3)] * 4, 256), cifar),
    }
    for seed in run.track(run.seeds, "image networks"):
        for name, (make, images) in networks.items():
            bound_images(run, study, name, make, images, seed)


def bound_images(run: Run, study: Study, name: str, make: Callable[[], nn.Module], images: "Images", seed: int) -> None:
    torch.manual_seed(seed)
    net = train(make(), images.train, images.train_labels, study.epochs, seed).to(run.device)
    points = images.test[: study.images].double().to(run.device)
    for step in (1, 2, 4, 8):
        values = {}
        for method in METHODS:
            chunks = [METHODS[method].certify(net, p, step / 255, clip=(0.0, 1.0)).value for p in points.split(1)]
            values[method] = torch.cat(chunks)
            run.record(
                method, "Lipschitz constant", values[method].mean().item(), seed=seed, network=name, eps=step / 255
            )
        ratio = (values["bound propagation"] / values["interval bound"]).mean().item()
        where = "six-layer CIFAR-10 network" if name.startswith("CIFAR-10, 6") else name
        run.record("bound propagation", f"bound / interval bound, {where}", ratio, seed=seed, eps=step / 255)


def convolutional(channels: int, size: int, layers: list[tuple[int, int]], hidden: int) -> nn.Sequential:
    """Convolutions without padding, stride 1, then two dense layers."""
    parts: list[nn.Module] = []
    for width, kernel in layers:
        parts += [nn.Conv2d(channels, width, kernel), nn.ReLU()]
        channels, size = width, size - kernel + 1
    flat = channels * size * size
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, 10))


@dataclass(frozen=True)
class Images:
    """Values in [0, 1], (n, channels, height, width), and labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor


def read_mnist(folder: Path) -> Images:
    """MNIST's test part in IDX format: its first four fifths train the network, the rest are bounded."""
    raw = {}
    for what, header in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(folder / f"t10k-{what}-ubyte.gz") as file:
            raw[what] = np.frombuffer(file.read(), np.uint8, offset=header)
    labels = torch.tensor(raw["labels-idx1"].astype(np.int64))
    images = torch.tensor(raw["images-idx3"]).view(len(labels), 1, 28, 28).float() / 255
    split = 4 * len(labels) // 5
    return Images(images[:split], labels[:split], images[split:])


def read_cifar(path: Path) -> Images:
    """A zip of train/<class>/*.jpg and test/<class>/*.jpg, classes in alphabetical order."""
    from PIL import Image

    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: list[str] = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            pieces = Path(name).parts
            if len(pieces) < 3 or pieces[-3] not in parts or not name.lower().endswith((".jpg", ".jpeg", ".png")):
                continue
            with Image.open(io.BytesIO(archive.read(name))) as image:
                parts[pieces[-3]].append(np.asarray(image.convert("RGB")))
            if pieces[-3] == "train":
                labels.append(pieces[-2])
    stack = lambda images: torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    classes = {name: k for k, name in enumerate(sorted(set(labels)))}
    return Images(stack(parts["train"]), torch.tensor([classes[name] for name in labels]), stack(parts["test"]))


def plot_depth(run: Run) -> None:
    from locally.plots import canvas

    chosen = [m for m in run.measures if m.metric == "Lipschitz constant" and m.setting.get("width") == 32]
    figure, axes = canvas()
    for method in dict.fromkeys(m.method for m in chosen):
        by_depth: dict[int, list[float]] = {}
        for m in chosen:
            if m.method == method:
                by_depth.setdefault(int(m.setting["depth"]), []).append(m.value)
        depths = sorted(by_depth)
        axes.plot(depths, [np.mean(by_depth[d]) for d in depths], marker="o", markersize=3.5, label=method)
    axes.set(xlabel="depth (width 32)", ylabel="local Lipschitz constant, eps = 0.1", yscale="log")
    axes.legend()
    caption = (
        "Certified upper bounds and the largest slope that sampling found, mean over seeds. All bounds are proofs;"
        " RecurJac and interval arithmetic lose a factor with every layer, bound propagation less of it."
    )
    run.figure(figure, "depth", caption)
