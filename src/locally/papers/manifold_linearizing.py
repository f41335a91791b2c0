"""Handwritten digits without labels: MLC beside k-means, spectral and sparse subspace clustering, and NMCE.

Also a curve and a blob in the plane, the paper's first picture; at full size MNIST and CIFAR-10 from the user's folder.
Labels are read for scores alone.
"""

import gzip
import io
import math
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score

from locally.evidence import MissingData, Run
from locally.evidence.runs import cores
from locally.plots import PALETTE, canvas
from locally.subspaces.manifold_clustering import (
    CropAndColour,
    Jitter,
    ManifoldLinearizingClustering,
    NeuralManifoldClustering,
    RandomAffine,
    ResNet18,
    SparseSubspaceClustering,
    clustering_accuracy,
    mean_cosine_between,
    numerical_rank,
)

METHOD = "MLC"
START = "spectral clustering at initialisation"
KMEANS = "k-means on the input"
SPECTRAL = "spectral clustering of the input"


@dataclass(frozen=True)
class Study:
    """How long digits are trained on; `nmce` counts the steps of each of its two stages."""

    tcr: int
    mlc: int
    batch: int
    nmce: int
    pursuit: bool  # sparse subspace clustering too


@dataclass(frozen=True)
class Outcome:
    """The two embeddings of one seed."""

    start: ManifoldLinearizingClustering
    mlc: ManifoldLinearizingClustering
    scores: list[tuple[str, str, float]]  # method, metric, value


def experiment(run: Run) -> None:
    studies = {
        "quick": Study(tcr=60, mlc=50, batch=256, nmce=0, pursuit=False),
        "default": Study(tcr=300, mlc=300, batch=300, nmce=100, pursuit=True),
        "paper": Study(tcr=400, mlc=400, batch=300, nmce=100, pursuit=True),
    }
    digits(run, run.pick(**studies))
    plane(run)
    if run.scale == "paper":
        full_size(run)


# Digits ---------------------------------------------------------------------------------------------------------------


def digits(run: Run, study: Study) -> None:
    X, y = load_digits(return_X_y=True)
    X = X / 16
    found = run.parallel(partial(digits_of_seed, study=study), run.seeds, "digits")
    outcomes = dict(zip(run.seeds, found))
    spectral = SpectralClustering(10, affinity="nearest_neighbors", n_neighbors=10, random_state=0).fit(X)
    for seed in run.seeds:
        record_digits(run, outcomes[seed], seed, float(normalized_mutual_info_score(y, spectral.labels_)))
    score_all(run, SPECTRAL, spectral.labels_, y)
    run.plot_bars("accuracy", name="accuracy", title="Clustering 1797 digits", caption=ACCURACY_CAPTION)
    spectra_figure(run, outcomes[run.seeds[0]], y)
    geometry_figure(run, outcomes[run.seeds[0]], y)


def digits_of_seed(run: Run, seed: int, study: Study) -> Outcome:
    X, y = load_digits(return_X_y=True)
    return train_on_digits(study, seed, X / 16, y, run.device)


def train_on_digits(
    study: Study, seed: int, X: Float[ndarray, "n pixels"], y: Int[ndarray, " n"], device: str
) -> Outcome:
    augment = RandomAffine((1, 8, 8))
    setting: dict[str, Any] = {"augment": augment, "batch_size": study.batch, "device": device, "random_state": seed}
    common = setting | {"z_dim": 32, "hidden_dim": 256, "lam": 10.0}
    start = ManifoldLinearizingClustering(10, tcr_steps=study.tcr, mlc_steps=0, **common).fit(X)
    mlc = ManifoldLinearizingClustering(10, tcr_steps=0, mlc_steps=study.mlc, network=start.network_, **common).fit(X)
    labels = {
        METHOD: mlc.labels_,
        START: start.labels_,
        KMEANS: KMeans(10, n_init=10, random_state=seed).fit_predict(X),
        "k-means on MLC's embedding": KMeans(10, n_init=10, random_state=seed).fit_predict(mlc.embedding_),
    }
    if study.nmce:
        nmce = NeuralManifoldClustering(10, start.network_, head_steps=study.nmce, tune_steps=study.nmce, **setting)
        labels["NMCE"] = nmce.fit_predict(X)
    if study.pursuit:
        pursuit = SparseSubspaceClustering(10, n_nonzero=3, random_state=seed)
        labels["SSC-OMP at initialisation"] = pursuit.fit_predict(start.embedding_)
        labels["SSC-OMP on MLC's embedding"] = pursuit.fit_predict(mlc.embedding_)
    scores = [(method, metric, value) for method, found in labels.items() for metric, value in score(found, y)]
    return Outcome(start, mlc, scores)


def score(labels: Int[ndarray, " n"], truth: Int[ndarray, " n"]) -> list[tuple[str, float]]:
    nmi = float(normalized_mutual_info_score(truth, labels))
    return [("accuracy", clustering_accuracy(labels, truth)), ("NMI", nmi)]


def score_all(run: Run, method: str, labels: Int[ndarray, " n"], truth: Int[ndarray, " n"], **setting: Any) -> None:
    for metric, value in score(labels, truth):
        run.record(method, metric, value, **setting)


def record_digits(run: Run, outcome: Outcome, seed: int, nmi_on_pixels: float) -> None:
    for method, metric, value in outcome.scores:
        run.record(method, metric, value, seed=seed)
    found = {(method, metric): value for method, metric, value in outcome.scores}
    accuracy = found[METHOD, "accuracy"]
    y = load_digits(return_X_y=True)[1]
    before, after = (shape_of(m.embedding_, y) for m in (outcome.start, outcome.mlc))
    for method, shape in ((START, before), (METHOD, after)):
        for metric, value in shape.items():
            run.record(method, metric, value, seed=seed)
    run.record(METHOD, "membership perplexity", outcome.mlc.membership_perplexity_, seed=seed)
    rank, cosine = "mean class rank", "mean absolute cosine between classes"
    differences = {
        "accuracy minus that of k-means on pixels": accuracy - found[KMEANS, "accuracy"],
        "accuracy minus that of spectral clustering at initialisation": accuracy - found[START, "accuracy"],
        "NMI minus that of spectral clustering on pixels": found[METHOD, "NMI"] - nmi_on_pixels,
        f"{rank} / that at initialisation": after[rank] / before[rank],
        f"{cosine} / that at initialisation": after[cosine] / before[cosine],
        "rank of all samples / dimension": after["rank of all samples"] / outcome.mlc.embedding_.shape[1],
    }
    for metric, value in differences.items():
        run.record(METHOD, metric, value, seed=seed)


def shape_of(Z: Float[ndarray, "n d"], y: Int[ndarray, " n"]) -> dict[str, float]:
    """Ranks at 95 % of the energy and cosines, by true class."""
    rows, labels = torch.as_tensor(Z), torch.as_tensor(y)
    return {
        "mean class rank": float(np.mean([numerical_rank(rows[labels == k]) for k in labels.unique()])),
        "rank of all samples": numerical_rank(rows),
        "mean absolute cosine between classes": mean_cosine_between(rows, labels),
    }


# The plane ------------------------------------------------------------------------------------------------------------


def plane(run: Run) -> None:
    with ThreadPoolExecutor(cores()) as pool:
        pictures = list(run.track(pool.map(on_plane, run.seeds), "a curve and a blob", total=len(run.seeds)))
    for seed, picture in zip(run.seeds, pictures):
        X, y = picture.X, torch.as_tensor(picture.y)
        unit = X / np.linalg.norm(X, axis=1, keepdims=True)
        embeddings = {"input": unit, START: picture.start.embedding_, METHOD: picture.mlc.embedding_}
        for method, Z in embeddings.items():
            value = mean_cosine_between(torch.as_tensor(Z), y)
            run.record(method, "plane: mean absolute cosine between curve and blob", value, seed=seed)
        blobs = KMeans(2, n_init=10, random_state=seed).fit_predict(X)
        for method, labels in ((METHOD, picture.mlc.labels_), (KMEANS, blobs)):
            run.record(method, "plane: accuracy", clustering_accuracy(labels, picture.y), seed=seed)
    plane_figure(run, pictures[0])


@dataclass(frozen=True)
class Picture:
    X: Float[ndarray, "n two"]
    y: Int[ndarray, " n"]
    start: ManifoldLinearizingClustering
    mlc: ManifoldLinearizingClustering


def curve_and_blob(rng: np.random.Generator) -> tuple[Float[ndarray, "n two"], Int[ndarray, " n"]]:
    """100 points along an arc that nearly surrounds 100 around a point."""
    angle = rng.uniform(-2, 2, 100)
    arc = 2 * np.c_[np.cos(angle), np.sin(angle)] + 0.05 * rng.standard_normal((100, 2))
    blob = [0.3, 0.0] + 0.1 * rng.standard_normal((100, 2))
    return np.r_[arc, blob], np.repeat([0, 1], 100)


def on_plane(seed: int) -> Picture:
    X, y = curve_and_blob(np.random.default_rng(seed))
    common: dict[str, Any] = {"z_dim": 3, "hidden_dim": 64, "batch_size": 200, "lam": 10.0, "augment": Jitter(0.05)}
    common["random_state"] = seed
    start = ManifoldLinearizingClustering(2, tcr_steps=60, mlc_steps=0, **common).fit(X)
    mlc = ManifoldLinearizingClustering(2, tcr_steps=0, mlc_steps=40, network=start.network_, **common).fit(X)
    return Picture(X, y, start, mlc)


# Full size ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Flat rows with values in [0, 1], and classes."""

    pixels: Float[ndarray, "n pixels"]
    labels: Int[ndarray, " n"]
    shape: tuple[int, int, int]


def full_size(run: Run) -> None:
    """CIFAR-10 as in the paper, then MNIST where the folder has it."""
    cifar = read_cifar(
        run.data("cifar10/cifar10.zip", "CIFAR-10 as train/<class>/*.jpg and test/<class>/*.jpg in a zip")
    )
    cifar_study(run, cifar, Full())
    try:
        mnist = read_mnist(run.data("mnist", "MNIST as gzipped IDX files"))
    except MissingData:
        return
    mnist_study(run, mnist, steps=2000)


@dataclass(frozen=True)
class Full:
    """The paper's network; epochs and rates of the first stage are NMCE's, of the second NMCE's fine-tuning."""

    tcr_epochs: float = 600
    mlc_epochs: float = 40  # a fifteenth of the first stage's time, as the paper reports
    warmup_epochs: float = 10
    batch: int = 1024
    width: int = 64
    hidden: int = 4096
    z_dim: int = 128


def cifar_study(run: Run, images: Images, full: Full) -> None:
    per_epoch = max(len(images.labels) // full.batch, 1)
    for seed in run.track(run.seeds, "CIFAR-10"):
        common: dict[str, Any] = {
            "batch_size": full.batch,
            "augment": CropAndColour(images.shape),
            "optimizer": "lars",
            "cosine": True,
            "device": run.device,
            "amp": run.device != "cpu",
            "random_state": seed,
        }
        start = ManifoldLinearizingClustering(
            10,
            z_dim=full.z_dim,
            hidden_dim=full.hidden,
            backbone=ResNet18(images.shape, full.width, torch.Generator().manual_seed(seed)),
            tcr_steps=int(full.tcr_epochs * per_epoch),
            mlc_steps=0,
            warmup=int(full.warmup_epochs * per_epoch),
            lr_tcr=0.3,
            checkpoint=run.scratch / f"cifar-start-{seed}",
            **common,
        ).fit(images.pixels)
        mlc = ManifoldLinearizingClustering(
            10,
            network=start.network_,
            tcr_steps=0,
            mlc_steps=int(full.mlc_epochs * per_epoch),
            lr_mlc=3e-3,
            checkpoint=run.scratch / f"cifar-{seed}",
            **common,
        ).fit(images.pixels)
        truth = images.labels
        accuracy = clustering_accuracy(mlc.labels_, truth)
        run.record(METHOD, "clustering accuracy, CIFAR-10", accuracy, seed=seed)
        pursuit = SparseSubspaceClustering(10, n_nonzero=3, random_state=seed)
        for method, labels in {
            METHOD: mlc.labels_,
            START: start.labels_,
            "SSC-OMP at initialisation": pursuit.fit_predict(start.embedding_),
            "EnSC at initialisation": elastic_net(seed).fit_predict(start.embedding_),
            "EnSC on MLC's embedding": elastic_net(seed).fit_predict(mlc.embedding_),
        }.items():
            score_all(run, method, labels, truth, seed=seed, data="CIFAR-10")


def mnist_study(run: Run, images: Images, steps: int) -> None:
    for seed in run.track(run.seeds, "MNIST"):
        mlc = ManifoldLinearizingClustering(
            10,
            z_dim=64,
            hidden_dim=512,
            lam=10.0,
            batch_size=500,
            augment=RandomAffine(images.shape, shift=2.0),
            tcr_steps=steps,
            mlc_steps=steps,
            device=run.device,
            random_state=seed,
        ).fit(images.pixels)
        score_all(run, METHOD, mlc.labels_, images.labels, seed=seed, data="MNIST")
        labels = KMeans(10, n_init=10, random_state=seed).fit_predict(images.pixels)
        score_all(run, KMEANS, labels, images.labels, seed=seed, data="MNIST")


def elastic_net(seed: int) -> SparseSubspaceClustering:
    return SparseSubspaceClustering(10, method="elastic net", random_state=seed)


def read_cifar(path: Path, part: str = "train") -> Images:
    """The images `part`/<class>/* of a zip, classes in alphabetical order."""
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{part}/") and n.endswith((".jpg", ".png")))
        if not names:
            raise ValueError(f"{path} holds no images under {part}/")
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    classes = [name.split("/")[1] for name in names]
    height, width = images[0].shape[:2]
    pixels = np.stack(images).transpose(0, 3, 1, 2).reshape(len(images), -1) / np.float32(255)
    return Images(pixels, np.unique(classes, return_inverse=True)[1], (3, height, width))


def read_mnist(folder: Path) -> Images:
    """Training images of the folder where they are, test images otherwise."""
    part = "train" if (folder / "train-images-idx3-ubyte.gz").exists() else "t10k"
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise ValueError(f"{folder} holds {len(images)} images, but {len(labels)} labels")
    return Images(images.reshape(len(images), -1) / np.float32(255), labels.astype(np.int64), (1, *images.shape[1:]))


def read_idx(path: Path, dimensions: int) -> ndarray:
    """Bytes in the IDX format: a magic number that ends in the number of dimensions, sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    start = 4 + 4 * dimensions
    magic, *shape = np.frombuffer(raw[:start], ">i4").tolist()
    if magic != 2048 + dimensions or len(raw) != start + math.prod(shape):
        raise ValueError(f"{path} does not hold bytes of {dimensions} dimensions in the IDX format")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


# Figures --------------------------------------------------------------------------------------------------------------

ACCURACY_CAPTION = (
    "Share of digits with the right label under the best matching of clusters to classes, a dot a seed. Subspaces"
    " through the origin are not blobs: k-means on the trained embedding is the wrong way to read it."
)


def spectra_figure(run: Run, outcome: Outcome, y: Int[ndarray, " n"]) -> None:
    figure, panels = canvas(9.0, 3.6, ncols=2, sharey=True)
    for axes, Z, title in (
        (panels[0], outcome.start.embedding_, "at initialisation (total coding rate)"),
        (panels[1], outcome.mlc.embedding_, "after MLC"),
    ):
        for k in range(10):
            draw_spectrum(axes, Z[y == k], PALETTE[0], "one true class" if k == 0 else None, alpha=0.6)
        draw_spectrum(axes, Z, PALETTE[1], "all samples", lw=2)
        axes.set(xlabel="index", title=title)
        axes.legend()
    panels[0].set_ylabel("singular value / largest")
    caption = (
        "Singular values of the embedding of each true class and of all digits, one seed. Training leaves a class few"
        " directions while all classes together still fill the space."
    )
    run.figure(figure, "spectra", caption)


def draw_spectrum(axes: Any, Z: Float[ndarray, "n d"], colour: str, label: str | None, **style: Any) -> None:
    values = np.linalg.svd(Z, compute_uv=False)
    axes.plot(np.arange(1, len(values) + 1), values / values[0], color=colour, label=label, **style)


def geometry_figure(run: Run, outcome: Outcome, y: Int[ndarray, " n"]) -> None:
    rows = np.concatenate([np.flatnonzero(y == k)[:40] for k in range(10)])
    figure, panels = canvas(9.4, 4.8, ncols=2)
    for axes, Z, title in (
        (panels[0], outcome.start.embedding_, "at initialisation"),
        (panels[1], outcome.mlc.embedding_, "after MLC"),
    ):
        image = axes.imshow(np.abs(Z[rows] @ Z[rows].T), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xticks=range(20, 400, 40), yticks=range(20, 400, 40), xlabel="digit", title=title)
        axes.set_xticklabels(range(10))
        axes.set_yticklabels(range(10))
        axes.grid(False)
    panels[0].set_ylabel("digit")
    figure.colorbar(image, ax=list(panels), label="|cosine|", shrink=0.85)
    run.figure(figure, "cosines", "Absolute cosines between 40 digits of each class, one seed.")


def plane_figure(run: Run, picture: Picture) -> None:
    X, y, Z = picture.X, picture.y, picture.mlc.embedding_
    figure, panels = canvas(9.0, 3.8, ncols=2)
    axis = leading_directions([Z[y == k] for k in (0, 1)])
    flat = Z @ axis.T
    for k, name in ((0, "curve"), (1, "blob")):
        panels[0].scatter(*X[y == k].T, s=10, color=PALETTE[k], label=name)
        panels[1].scatter(*flat[y == k].T, s=10, color=PALETTE[k], label=name)
    panels[0].set(title="input", xlabel="first coordinate", ylabel="second coordinate", aspect="equal")
    panels[1].set(
        title="embedding on the unit sphere",
        xlabel="along the curve's main direction",
        ylabel="along the blob's",
        aspect="equal",
    )
    panels[1].legend(loc="center")
    caption = (
        "A curve and a blob, and their embedding seen along the main direction of each: one plane, one line across."
    )
    run.figure(figure, "plane", caption)


def leading_directions(parts: Iterable[Float[ndarray, "n d"]]) -> Float[ndarray, "parts d"]:
    return np.stack([np.linalg.svd(Z, full_matrices=False)[2][0] for Z in parts])
