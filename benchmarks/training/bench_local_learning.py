"""Steps of local learning beside backpropagation and PyTorch's checkpointing: time, memory, growth with depth.

Beside each ratio of times stands the ratio of arithmetic: floating-point operations of the convolutions and matrix
products of both steps, forward and backward. It is what a step could reach that had no other costs. A local step saves
the gradients that would cross a border and adds auxiliary networks: small heads come out below 1, while a momentum
auxiliary network adds two stages a block, and a network cut at every stage does most of its work in auxiliary networks.
What a ratio of times has beyond that is normalisation and activations, which are not counted, and calls of operations
on small arrays.

With LOCALLY_DATA naming a folder that holds mnist/, one epoch on MNIST is compared as well.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Comparison, compare, growth
from locally.training.auxiliary_networks import AugLocal
from locally.training.local_learning import (
    DGL,
    LinearHeads,
    LocalLearner,
    Rule,
    Trainer,
    cifar_resnet,
    measure_memory,
    saved_peak,
)
from locally.training.local_learning.images import read_mnist
from locally.training.local_learning.trainer import nesterov
from locally.training.momentum_auxiliary import MomentumAuxiliary

BATCH = 16
RULES: dict[str, tuple[Rule, int | None]] = {
    "linear heads, 4 blocks": (LinearHeads(), 4),
    "DGL, 4 blocks": (DGL(), 4),
    "DGL with MAN, 4 blocks": (MomentumAuxiliary(base=DGL()), 4),
    "AugLocal depth 1, 4 blocks": (AugLocal(depth=1), 4),
    "linear heads, every stage": (LinearHeads(), None),
    "DGL, every stage": (DGL(), None),
    "DGL with MAN, every stage": (MomentumAuxiliary(base=DGL()), None),
    "AugLocal depth 2, every stage": (AugLocal(depth=2), None),
}


def main() -> list[Comparison]:
    return [*steps(), *depths(), *mnist()]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32, generator=rng).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(10, (BATCH,), generator=rng)


def learner(rule: Rule, cuts: int | None, depth: int = 32) -> LocalLearner:
    x, _ = inputs()
    net = cifar_resnet(depth, generator=torch.Generator().manual_seed(0))
    return LocalLearner(net, rule, example=x[:2], classes=10, cuts=cuts).to(memory_format=torch.channels_last)


def step_of(local: LocalLearner) -> Callable[[], object]:
    x, y = inputs()
    optimizer = nesterov(local.trainable())

    def step() -> None:
        local.local_step(x, y)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step(net: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
    x, y = inputs()
    optimizer = nesterov(net.parameters())

    def step() -> None:
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def operations(step: Callable[[], object]) -> int:
    """Floating-point operations of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def steps() -> list[Comparison]:
    """ResNet-32, CIFAR shapes. At most 1.15 times backpropagation's time is the aim where heads are small."""
    x, y = inputs()
    net = learner(LinearHeads(), 1).chain
    bp = ("backpropagation", plain_step(net, net))
    bp_peak, bp_operations = measure_memory(learner(LinearHeads(), 1), x, y).saved_peak, operations(bp[1])
    problem = f"step of ResNet-32, batch {BATCH}"

    def exact(quantity: str, ratio: float, ours: str) -> Comparison:
        return Comparison(problem, quantity, ratio, ratio, ratio, ours, bp[0])

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()  # re-entrant checkpoints need it
        return net.head(checkpoint_sequential(net.stages, 4, x, use_reentrant=True))

    results = []
    for name, (rule, cuts) in RULES.items():
        local = learner(rule, cuts)
        step = step_of(local)
        arithmetic = operations(step) / bp_operations
        results.append(compare(problem, (name, step), bp, rounds=9, arithmetic=arithmetic))
        results.append(exact("arithmetic", arithmetic, name))
        results.append(exact("saved activations", measure_memory(local, x, y).saved_peak / bp_peak, name))
    recomputing = ("4 checkpoints (PyTorch)", plain_step(net, checkpointed))
    results.append(compare(problem, recomputing, bp, rounds=9))
    peak = saved_peak(lambda: F.cross_entropy(checkpointed(x), y).backward(), [*net.parameters(), *net.buffers()])
    results.append(exact("saved activations", peak / bp_peak, recomputing[0]))
    return results


def depths() -> list[Comparison]:
    """Time should grow with depth like backpropagation's, memory not at all."""
    x, y = inputs()
    sizes = [20, 32, 56]
    results = [
        growth("step over depth", name, sizes, lambda depth, rule=rule, cuts=cuts: step_of(learner(rule, cuts, depth)))
        for name, rule, cuts in (("AugLocal depth 2", AugLocal(depth=2), None), ("backpropagation", LinearHeads(), 1))
    ]
    for name, rule, cuts in (("AugLocal depth 2", AugLocal(depth=2), None), ("backpropagation", LinearHeads(), 1)):
        shallow, deep = (measure_memory(learner(rule, cuts, depth), x, y).saved_peak for depth in (20, 56))
        ratio = deep / shallow
        results.append(Comparison("saved activations of ResNet-56 / ResNet-20", "memory", ratio, ratio, ratio, name))
    return results


def mnist() -> list[Comparison]:
    """Test error after one epoch on 8,000 images with ResNet-8 of width 8."""
    folder = Path(os.environ.get("LOCALLY_DATA", "")) / "mnist"
    if "LOCALLY_DATA" not in os.environ or not folder.exists():
        print("MNIST skipped: LOCALLY_DATA names no folder with mnist/")
        return []
    data = read_mnist(folder)
    errors = {}
    for name, rule, cuts in (("AugLocal depth 2", AugLocal(depth=2), None), ("backpropagation", LinearHeads(), 1)):
        net = cifar_resnet(8, width=8, in_channels=1, generator=torch.Generator().manual_seed(0))
        local = LocalLearner(net, rule, example=data.x[:2], classes=10, cuts=cuts)
        Trainer(epochs=1, batch_size=128).fit(local, data.x, data.y)
        errors[name] = 1 - local.accuracy(data.x_test, data.y_test)
    ratio = errors["AugLocal depth 2"] / errors["backpropagation"]
    detail = {"errors": errors}
    return [Comparison("MNIST, 1 epoch", "error", ratio, ratio, ratio, "AugLocal depth 2", "backpropagation", detail)]


if __name__ == "__main__":
    for line in main():
        print(line)
