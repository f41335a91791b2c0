"""AugLocal beside backpropagation, simpler local rules and activation checkpointing: accuracy and saved activations.

Embedded: scikit-learn's digits, one by one and as pairs whose sum is asked for, with a residual network of ten stages.
Full size: MNIST and CIFAR-10 from the user's folder, with the paper's networks and settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint_sequential

from locally.evidence import MissingData, Run
from locally.training.auxiliary_networks import AugLocal
from locally.training.local_learning import (
    DGL,
    InfoPro,
    LinearHeads,
    LocalLearner,
    PredSim,
    Rule,
    Trainer,
    Trial,
    cifar_resnet,
    epoch_cosine,
    measure_memory,
    saved_peak,
)
from locally.training.local_learning.images import (
    CIFAR_MEAN,
    CIFAR_STD,
    ImageSet,
    crop_and_flip,
    digit_pair_sums,
    digits,
    read_cifar10,
    read_mnist,
)

BP, GREEDY = "back-propagation", "greedy linear heads"
SHALLOW, DEEP = "AugLocal, depth 2", "AugLocal, depth 5"
RULES: Mapping[str, Rule] = {
    BP: LinearHeads(),
    GREEDY: LinearHeads(),
    "DGL": DGL(),
    "PredSim": PredSim(),
    "InfoPro": InfoPro(),
    **{f"AugLocal, depth {d}": AugLocal(depth=d) for d in (1, 2, 3, 5)},
    "next stages, depth 2": AugLocal(depth=2, selection="sequential"),
    "own stage repeated, depth 2": AugLocal(depth=2, selection="repeat"),
}


@dataclass(frozen=True)
class Study:
    """Which methods are trained on one task, and for how long."""

    task: str
    methods: tuple[str, ...]
    pairs: int  # training pairs of digits; 0 for single digits
    epochs: int
    batch: int

    def images(self) -> ImageSet:
        return digit_pair_sums(self.pairs) if self.pairs else digits()


SINGLE, PAIRS = "single digits", "digit-pair sums"
COMPARED = (BP, "DGL", SHALLOW, DEEP)


def experiment(run: Run) -> None:
    everything = tuple(RULES)
    record_memory(run, run.pick(quick=COMPARED, default=everything, paper=everything))
    studies = run.pick(
        quick=[Study(SINGLE, (BP, SHALLOW), pairs=0, epochs=1, batch=64)],
        default=[Study(PAIRS, COMPARED, pairs=2500, epochs=5, batch=128)],
        paper=[
            Study(SINGLE, everything, pairs=0, epochs=15, batch=64),
            Study(PAIRS, everything, pairs=4000, epochs=8, batch=128),
        ],
    )
    for study in studies:
        items = [(study, method, seed) for seed in run.seeds for method in study.methods]
        scores = run.parallel(train_digits, items, study.task)
        found = {(method, seed): score for (_, method, seed), score in zip(items, scores)}
        record_gaps(run, study, found)
    figure(run, studies[-1].task)
    if run.scale == "paper":
        mnist(run)
        cifar(run)


# Digits ---------------------------------------------------------------------------------------------------------------


def trial(method: str, seed: int) -> Trial:
    return Trial(RULES[method], seed=seed, whole=method == BP)


def train_digits(run: Run, item: tuple[Study, str, int]) -> float:
    """Accuracy on the test set after training one method on one seed."""
    study, method, seed = item
    data = study.images().to(run.device)
    accuracy, seconds = trial(method, seed).train(data, epochs=study.epochs, batch=study.batch)
    run.record(method, "milliseconds per step", 1e3 * seconds, seed=seed, task=study.task)
    run.record(method, f"accuracy, {study.task}", accuracy, seed=seed)
    return accuracy


def record_gaps(run: Run, study: Study, found: Mapping[tuple[str, int], float]) -> None:
    references = {BP: "back-propagation's", "DGL": "DGL's", SHALLOW: "that of depth 2"}
    for seed in run.seeds:
        for method in study.methods:
            for reference, name in references.items():
                if reference in study.methods and method != reference:
                    gap = found[method, seed] - found[reference, seed]
                    run.record(method, f"accuracy minus {name}, {study.task}", gap, seed=seed)


def record_memory(run: Run, methods: tuple[str, ...]) -> None:
    """What one step on 32 pairs of digits keeps for its backward passes: exact, the same for all seeds."""
    data = digit_pair_sums(32, 1).to(run.device)
    peaks = {}
    for method in methods:
        fresh = trial(method, 0)
        learner = fresh.learner(fresh.network().to(run.device), data.x)
        peaks[method] = measure_memory(learner, data.x, data.y).saved_peak
    net = trial(BP, 0).network().to(run.device)
    x = data.x.clone().requires_grad_()  # re-entrant checkpoints need an input with a gradient

    def checkpointed() -> None:
        h = checkpoint_sequential(net.stages, 3, x, use_reentrant=True)
        F.cross_entropy(net.head(h), data.y).backward()

    peaks["back-propagation, 3 checkpoints"] = saved_peak(checkpointed, [*net.parameters(), *net.buffers()])
    for method, peak in peaks.items():
        run.record(method, "peak of saved activations, MiB", peak / 2**20)
        run.record(method, "peak of saved activations / back-propagation's", peak / peaks[BP])


def figure(run: Run, task: str) -> None:
    """Accuracy over memory, a dot a seed."""
    from locally.plots import INK, PALETTE, canvas

    ratios = {m.method: m.value for m in run.measures if m.metric == "peak of saved activations / back-propagation's"}
    scores: dict[str, list[float]] = {}
    for m in run.measures:
        if m.metric == f"accuracy, {task}":
            scores.setdefault(m.method, []).append(m.value)
    drawn, axes = canvas(6.8, 3.8)
    for i, (method, values) in enumerate(scores.items()):
        colour, marker = PALETTE[i % len(PALETTE)], "oD"[i // len(PALETTE)]
        axes.plot([ratios[method]] * len(values), values, marker, ms=4, alpha=0.6, color=colour)
        axes.plot(ratios[method], np.mean(values), marker, ms=9, color=colour, label=method)
    axes.axhline(0.1, color=INK, ls=":", lw=1)
    axes.set(
        xlabel="peak of saved activations / back-propagation's",
        ylabel="test accuracy",
        title=f"{task}: accuracy and memory",
        xlim=(0, 1.05),
        ylim=(0, 1),
    )
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption = (
        f"Accuracy on {task} over what a training step keeps for its backward passes, both for the ten-stage residual"
        " network. Small: seeds; large: their mean; dotted: chance. Right and up is back-propagation."
    )
    run.figure(drawn, "accuracy-over-memory", caption)


# Full size ------------------------------------------------------------------------------------------------------------


def mnist(run: Run, epochs: int = 15, depth: int = 20) -> None:
    """A residual network on whatever part of MNIST is there; no claim rests on it."""
    try:
        path = run.data("mnist", "MNIST as IDX files, t10k-images-idx3-ubyte(.gz) and so on")
    except MissingData:
        return
    data = read_mnist(path).to(run.device)
    for seed in run.track(run.seeds, "MNIST"):
        for method in run.track((BP, "DGL", SHALLOW), "methods"):
            net = cifar_resnet(depth, in_channels=1, generator=torch.Generator().manual_seed(seed)).to(run.device)
            learner = trial(method, seed).learner(net, data.x)
            batch = min(128, len(data.x))
            Trainer(epochs=epochs, batch_size=batch, seed=seed).fit(learner, data.x, data.y)
            run.record(method, "test accuracy, MNIST", learner.accuracy(data.x_test, data.y_test), seed=seed)


@dataclass(frozen=True)
class Recipe:
    """The paper's training on CIFAR-10."""

    epochs: int = 400
    batch: int = 1024
    rate: float = 0.8
    depths: tuple[int, ...] = (32, 110)


PAPER_RULES: Mapping[int, Mapping[str, Rule]] = {
    depth: {
        BP: LinearHeads(),
        "DGL": DGL(),
        "PredSim": PredSim(),
        "InfoPro": InfoPro(*weights, mean=CIFAR_MEAN, std=CIFAR_STD),
        **{f"AugLocal, depth {d}": AugLocal(depth=d) for d in augmented},
    }
    for depth, weights, augmented in (
        (32, ((5.0, 0.2), (0.05, 0.5)), (2, 3, 4)),
        (110, ((5.0, 0.5), (0.0, 1.0)), (2, 4, 6)),
    )
}


def cifar(run: Run, recipe: Recipe | None = None, methods: Sequence[str] | None = None) -> None:
    """ResNet-32 and ResNet-110, every stage a block; resumes a method's training from the run's folder."""
    recipe = Recipe() if recipe is None else recipe
    path = run.data("cifar10/cifar10.zip", "CIFAR-10 as train/<class>/*.jpg and test/<class>/*.jpg in one zip file")
    data = read_cifar10(path).to(run.device)
    for depth in run.track(recipe.depths, "networks"):
        rules = {m: r for m, r in PAPER_RULES[depth].items() if methods is None or m in methods}
        for method, rule in run.track(list(rules.items()), f"ResNet-{depth}"):
            for seed in run.track(run.seeds, method):
                train_cifar(run, recipe, data, depth, method, rule, seed)


def train_cifar(run: Run, recipe: Recipe, data: ImageSet, depth: int, method: str, rule: Rule, seed: int) -> None:
    net = cifar_resnet(depth, generator=torch.Generator().manual_seed(seed)).to(run.device)
    generator = torch.Generator().manual_seed(1000 + seed)
    cuts = 1 if method == BP else None
    learner = LocalLearner(net, rule, example=data.x[:2], classes=10, cuts=cuts, generator=generator)
    batch = min(recipe.batch, len(data.x))
    memory = measure_memory(learner, data.x[:batch], data.y[:batch])
    setting = {"network": f"ResNet-{depth}"}
    run.record(method, "peak of saved activations, CIFAR-10, MiB", memory.saved_peak / 2**20, seed=seed, **setting)
    if memory.allocator_peak is not None:
        run.record(method, "peak of GPU memory, CIFAR-10, MiB", memory.allocator_peak / 2**20, seed=seed, **setting)
    trainer = Trainer(
        epochs=recipe.epochs,
        batch_size=batch,
        schedule=epoch_cosine(recipe.rate),
        augment=crop_and_flip,
        overlap=run.device != "cpu",
        seed=seed,
    )
    slug = method.replace(", ", "-").replace(" ", "-")
    trainer.fit(learner, data.x, data.y, checkpoint=run.scratch / f"resnet{depth}-{slug}-{seed}.safetensors")
    accuracy = learner.accuracy(data.x_test, data.y_test)
    run.record(method, f"test accuracy, CIFAR-10, ResNet-{depth}", accuracy, seed=seed)
