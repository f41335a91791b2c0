"""Local rules with and without momentum auxiliary networks, beside backpropagation and the controls of either half.

Embedded: scikit-learn's digits at 8 x 8 and 16 x 16 with a residual network of ten stages, each a block. Full size:
CIFAR-10 from the user's folder with the paper's networks and settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from locally.evidence import Run
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
)
from locally.training.local_learning.images import (
    CIFAR_MEAN,
    CIFAR_STD,
    ImageSet,
    crop_and_flip,
    digits,
    read_cifar10,
)
from locally.training.momentum_auxiliary import MomentumAuxiliary

BP, PLAIN, MAN = "back-propagation", "DGL", "DGL with MAN"
AVERAGE_ONLY, BRANCH_ONLY = "DGL with the average only", "DGL with the trained branch only"
RULES: Mapping[str, Rule] = {
    BP: LinearHeads(),
    PLAIN: DGL(),
    AVERAGE_ONLY: MomentumAuxiliary(base=DGL(), bias=None),
    BRANCH_ONLY: MomentumAuxiliary(base=DGL(), ema=False),
    MAN: MomentumAuxiliary(base=DGL()),
    "DGL with MAN, from copies": MomentumAuxiliary(base=DGL(), init="copy"),
    "PredSim": PredSim(),
    "PredSim with MAN": MomentumAuxiliary(base=PredSim()),
    "InfoPro": InfoPro(),
    "InfoPro with MAN": MomentumAuxiliary(base=InfoPro()),
}


@dataclass(frozen=True)
class Study:
    """Which methods are trained on digits of which size, and for how long."""

    size: int
    methods: tuple[str, ...]
    epochs: int

    @property
    def task(self) -> str:
        return f"{self.size} x {self.size} digits"


def experiment(run: Run) -> None:
    everything = tuple(RULES)
    record_memory(run, run.pick(quick=(BP, PLAIN, BRANCH_ONLY, MAN), default=everything, paper=everything))
    studies = run.pick(
        quick=[Study(8, (PLAIN, MAN), epochs=1)],
        default=[Study(16, (PLAIN, BRANCH_ONLY, MAN), epochs=5)],
        paper=[Study(16, everything, epochs=8), Study(8, everything, epochs=15)],
    )
    for study in studies:
        items = [(study, method, seed) for seed in run.seeds for method in study.methods]
        scores = run.parallel(train_digits, items, study.task)
        found = {(method, seed): score for (_, method, seed), score in zip(items, scores)}
        record_gaps(run, study, found)
    figure(run, studies)
    if run.scale == "paper":
        cifar(run)


# Digits ---------------------------------------------------------------------------------------------------------------


def trial(method: str, seed: int) -> Trial:
    return Trial(RULES[method], seed=seed, whole=method == BP)


def train_digits(run: Run, item: tuple[Study, str, int]) -> float:
    """Accuracy on the test set after training one method on one seed."""
    study, method, seed = item
    data = digits(size=study.size).to(run.device)
    accuracy, seconds = trial(method, seed).train(data, epochs=study.epochs, batch=64)
    run.record(method, "milliseconds per step", 1e3 * seconds, seed=seed, task=study.task)
    run.record(method, f"accuracy, {study.task}", accuracy, seed=seed)
    return accuracy


def record_gaps(run: Run, study: Study, found: Mapping[tuple[str, int], float]) -> None:
    references = {BP: "back-propagation's", PLAIN: "DGL's", BRANCH_ONLY: "that of the trained branch only"}
    for seed in run.seeds:
        for method in study.methods:
            for reference, name in references.items():
                if reference in study.methods and method != reference:
                    gap = found[method, seed] - found[reference, seed]
                    run.record(method, f"accuracy minus {name}, {study.task}", gap, seed=seed)


def record_memory(run: Run, methods: tuple[str, ...]) -> None:
    """What one step on 32 digits keeps for its backward passes: exact, the same for all seeds, at both sizes."""
    for size in (8, 16):
        data = digits(size=size).to(run.device)
        peaks = {}
        for method in methods:
            fresh = trial(method, 0)
            learner = fresh.learner(fresh.network().to(run.device), data.x)
            peaks[method] = measure_memory(learner, data.x[:32], data.y[:32]).saved_peak
        for method, peak in peaks.items():
            run.record(method, "peak of saved activations, MiB", peak / 2**20, size=size)
            run.record(method, "peak of saved activations / back-propagation's", peak / peaks[BP], size=size)


def figure(run: Run, studies: list[Study]) -> None:
    """Accuracy of each method, a dot a seed, for each size."""
    from locally.plots import PALETTE, canvas

    height = 1.4 + 0.35 * len(studies[0].methods)
    drawn, panels = canvas(4.6 * len(studies) + 1.6, height, ncols=len(studies), squeeze=False)
    for axes, study in zip(panels[0], studies):
        for row, method in enumerate(study.methods):
            metric = f"accuracy, {study.task}"
            values = [m.value for m in run.measures if (m.method, m.metric) == (method, metric)]
            colour = PALETTE[row % len(PALETTE)]
            axes.barh(row, np.mean(values), height=0.6, alpha=0.55, color=colour)
            axes.plot(values, [row] * len(values), "o", ms=4, color=colour)
        axes.set_yticks(range(len(study.methods)), study.methods)
        axes.invert_yaxis()
        axes.set(xlabel="test accuracy", title=f"{study.task}, {study.epochs} epochs", xlim=(0, 1))
    caption = (
        "Test accuracy of a ten-stage residual network trained stage by stage, bars for the mean, dots for seeds. The"
        " trained branch only is the control: the same additional stage without the moving average."
    )
    run.figure(drawn, "accuracy", caption)


# Full size ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The paper's training on CIFAR-10: networks, and in how many blocks."""

    epochs: int = 400
    batch: int = 1024
    rate: float = 0.8
    networks: tuple[tuple[int, int], ...] = ((32, 8), (32, 16), (110, 32), (110, 55))
    methods: tuple[str, ...] = (BP, PLAIN, AVERAGE_ONLY, MAN, "InfoPro", "InfoPro with MAN")


def paper_rule(method: str) -> Rule:
    """The rule as the paper runs it; reconstruction and prediction weights of InfoPro as in its code."""
    plain = InfoPro(mean=CIFAR_MEAN, std=CIFAR_STD)
    if method == "InfoPro":
        return plain
    if method == "InfoPro with MAN":
        weights = {"reconstruction": (5.0, 0.0), "prediction": (0.5, 0.0)}
        heads = {"head": "2c2f", "coefficients": "stage", "mean": CIFAR_MEAN, "std": CIFAR_STD}
        return MomentumAuxiliary(base=InfoPro(**weights, **heads))  # type: ignore[arg-type]
    return RULES[method]


def paper_cuts(stages: int, blocks: int) -> int | list[int]:
    """Even blocks, the stem in the first; as many blocks as stages means one for each residual block."""
    return list(range(2, stages)) if blocks == stages else blocks


def cifar(run: Run, recipe: Recipe | None = None) -> None:
    recipe = Recipe() if recipe is None else recipe
    path = run.data("cifar10/cifar10.zip", "CIFAR-10 as train/<class>/*.jpg and test/<class>/*.jpg in one zip file")
    data = read_cifar10(path).to(run.device)
    for depth, blocks in run.track(recipe.networks, "networks"):
        for method in run.track(recipe.methods, f"ResNet-{depth} in {blocks} blocks"):
            for seed in run.track(run.seeds, method):
                train_cifar(run, recipe, data, depth, blocks, method, seed)


def train_cifar(run: Run, recipe: Recipe, data: ImageSet, depth: int, blocks: int, method: str, seed: int) -> None:
    net = cifar_resnet(depth, generator=torch.Generator().manual_seed(seed)).to(run.device)
    generator = torch.Generator().manual_seed(1000 + seed)
    cuts = 1 if method == BP else paper_cuts(len(net.stages), blocks)
    rule = paper_rule(method)
    learner = LocalLearner(net, rule, example=data.x[:2], classes=10, cuts=cuts, generator=generator)
    batch = min(recipe.batch, len(data.x))
    memory = measure_memory(learner, data.x[:batch], data.y[:batch])
    setting: dict[str, str | int] = {"network": f"ResNet-{depth}", "blocks": blocks}
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
    slug = method.replace(" ", "-")
    trainer.fit(learner, data.x, data.y, checkpoint=run.scratch / f"resnet{depth}-{blocks}-{slug}-{seed}.safetensors")
    error = 1 - learner.accuracy(data.x_test, data.y_test)
    run.record(method, f"test error, CIFAR-10, ResNet-{depth} in {blocks} blocks", error, seed=seed)
