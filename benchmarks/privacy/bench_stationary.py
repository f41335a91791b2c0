"""Private training beside Opacus: per-example gradients, calibration, gradient norms at equal budget; growth.

`python -m benchmarks stationary`. Opacus runs on the project's own torch: it is put into a folder of its own under
`benchmarks/.peers/` the first time, without its dependencies, and left out with a reason where that fails.
"""

import copy
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Comparison, compare, growth
from locally.papers.dp_stationary_points import convolutional
from locally.privacy.stationary import (
    Accountant,
    Adjacency,
    HardInstance,
    LinearModel,
    Mechanism,
    ModuleObjective,
    NoisyGradientDescent,
    PrivateSpiderBoost,
    Sampling,
    calibrate,
    spent_epsilon,
)

PEERS = Path(__file__).parents[1] / ".peers" / "opacus"
DELTA = 1e-5
LOSS = nn.functional.cross_entropy


def main() -> list[Comparison]:
    torch.set_num_threads(1)
    results = [*linear(), *growths(), *loops()]
    if opacus_is_here():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its remarks on secure random numbers and on hooks of the first layer
            results += [*throughput(), *accounting(), *equal_budget()]
    return results


def opacus_is_here() -> bool:
    if not PEERS.exists():
        packages = ["opacus==1.6.0", "opt-einsum==3.4.0"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS), *packages]
        if subprocess.run(command, check=False).returncode != 0:
            print("Opacus could not be installed: left out")
            return False
    sys.path.append(str(PEERS))
    return True


def networks() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """A small convolutional network and a wide perceptron, each with a batch of images."""
    torch.manual_seed(0)
    images, labels = torch.randn(256, 1, 28, 28), torch.randint(0, 10, (256,))
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))
    return {"convolutional, 26k": (convolutional(), images, labels), "perceptron, 204k": (perceptron, images, labels)}


def clipped_sum(module: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    objective = ModuleObjective(module, LOSS, x, y, lipschitz=1.0, smoothness=1.0)
    w = objective.initial_point()
    return lambda: objective.gradient_sum(w)


def loops() -> Iterator[Comparison]:
    """One clipped sum of 256 per-example gradients: vectorised against a plain loop over examples."""
    for name, (module, x, y) in networks().items():

        def loop(module: nn.Module = module, x: Tensor = x, y: Tensor = y) -> list[Tensor]:
            parameters = list(module.parameters())
            total = [torch.zeros_like(p) for p in parameters]
            for i in range(len(x)):
                gradient = torch.autograd.grad(LOSS(module(x[i : i + 1]), y[i : i + 1]), parameters)
                norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient]))
                scale = (1 / norm).clamp_max(1)
                for t, g in zip(total, gradient):
                    t.add_(g * scale)
            return total

        yield compare(
            f"256 clipped per-example gradients, {name}",
            ("locally", clipped_sum(module, x, y)),
            ("a loop over examples", loop),
            rounds=5,
        )


def throughput() -> Iterator[Comparison]:
    """The same sum by Opacus's hooks and its optimiser's clipping."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    for name, (module, x, y) in networks().items():
        ours = clipped_sum(module, x, y)
        objective = ModuleObjective(module, LOSS, x, y, lipschitz=1.0, smoothness=1.0)
        w = objective.initial_point()
        hooked = GradSampleModule(copy.deepcopy(module))  # hooks would meet our own calls too
        inner = torch.optim.SGD(hooked.parameters(), lr=0.0)
        optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=len(x))

        def theirs(hooked: nn.Module = hooked, optimizer: object = optimizer, x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            LOSS(hooked(x), y).backward()
            optimizer.clip_and_accumulate()
            return torch.cat([p.summed_grad.reshape(-1) for p in hooked.parameters()])

        torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
        yield compare(f"256 clipped per-example gradients, {name}", ("locally", ours), ("Opacus", theirs), rounds=5)

        def variation(objective: ModuleObjective = objective, w: Tensor = w) -> Tensor:
            return objective.difference_sum(w, w + 0.01, 0.5)

        yield compare(
            f"256 clipped gradient differences, {name}",
            ("locally", variation),
            ("Opacus, one gradient each", theirs),
            rounds=5,
        )


def accounting() -> Iterator[Comparison]:
    """The noise that a budget asks for, and how long finding it takes."""
    from opacus.accountants.utils import get_noise_multiplier

    rate, steps, epsilon = 0.01, 1000, 2.0
    plan = (Mechanism("gradient", 1.0, steps, Sampling.POISSON, rate, 10_000),)
    for accountant, theirs in ((Accountant.RDP, "rdp"), (Accountant.PLD, "prv")):

        def ours(accountant: Accountant = accountant) -> float:
            calibrate.cache_clear()
            (found,) = calibrate(plan, epsilon, DELTA, Adjacency.ADD_REMOVE, accountant)
            return found.noise_multiplier

        def peer(accountant: str = theirs) -> float:
            options = {"target_epsilon": epsilon, "target_delta": DELTA, "sample_rate": rate, "steps": steps}
            return get_noise_multiplier(**options, accountant=accountant, epsilon_tolerance=1e-3)

        name = f"calibration, {accountant}, {steps} Poisson samples at rate {rate}"
        ratio = ours() / peer()
        yield Comparison(name, "noise multiplier", ratio, ratio, ratio, "locally", "Opacus")
        yield compare(name, ("locally", ours), ("Opacus", peer), rounds=3)


def equal_budget() -> Iterator[Comparison]:
    """Mean gradient norm of the iterates at equal (epsilon, delta), adjacency and number of per-example gradients."""
    for epsilon in (1.0, 8.0):
        against_opacus, against_ours = [], []
        for seed in range(3):
            spider, descent, opacus = (train(epsilon, seed) for train in (by_spiderboost, by_descent, by_opacus))
            against_opacus.append(spider / opacus)
            against_ours.append(descent / opacus)
        name = f"digits, perceptron, epsilon {epsilon:g}"
        for label, values in (("Private SpiderBoost", against_opacus), ("noisy gradient descent", against_ours)):
            middle = float(np.median(values))
            yield Comparison(name, "gradient norm", middle, min(values), max(values), label, "Opacus DP-SGD")


CYCLES, PHASE, BATCH = 10, 10, 180  # a phase: an anchor on 10 batches, then 9 times 2 gradients on one


def digits(seed: int) -> tuple[nn.Module, ModuleObjective, Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    x, labels = torch.as_tensor(X).float() / 16, torch.as_tensor(y).long()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    return net, ModuleObjective(net, LOSS, x, labels, lipschitz=1.0, smoothness=1.0), x, labels


def by_spiderboost(epsilon: float, seed: int) -> float:
    method = PrivateSpiderBoost(
        epsilon=epsilon,
        delta=DELTA,
        steps=CYCLES * PHASE,
        phase=PHASE,
        variation_batch=BATCH,
        learning_rate=0.25,
        adjacency=Adjacency.ADD_REMOVE,
        keep_trace=True,
    )
    return mean_norm(digits(seed)[1], method, seed)


def by_descent(epsilon: float, seed: int) -> float:
    method = NoisyGradientDescent(
        epsilon=epsilon,
        delta=DELTA,
        steps=28 * CYCLES,
        batch=BATCH,
        learning_rate=0.25,
        adjacency=Adjacency.ADD_REMOVE,
        keep_trace=True,
    )
    return mean_norm(digits(seed)[1], method, seed)


def mean_norm(objective: ModuleObjective, method: PrivateSpiderBoost | NoisyGradientDescent, seed: int) -> float:
    trace = method.minimize(objective, rng=seed).trace
    assert trace is not None
    points = trace.iterates[1:]
    return float(np.mean([float(objective.exact_gradient(w).norm()) for w in points[:: max(1, len(points) // 20)]]))


def by_opacus(epsilon: float, seed: int) -> float:
    from opacus import PrivacyEngine

    net, objective, x, y = digits(seed)
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    (gradient,) = calibrate(
        (Mechanism("gradient", 1.0, 28 * CYCLES, Sampling.POISSON, 1 / len(loader), len(x)),),
        epsilon,
        DELTA,
        Adjacency.ADD_REMOVE,
    )
    net = copy.deepcopy(net)  # hooks would meet the objective's own calls too
    private, optimizer, loader = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.25),
        data_loader=loader,
        noise_multiplier=gradient.noise_multiplier,
        max_grad_norm=1.0,
        noise_generator=torch.Generator().manual_seed(seed),
    )
    points = []
    for _ in range(math.ceil(28 * CYCLES / len(loader))):
        for a, b in loader:
            optimizer.zero_grad()
            LOSS(private(a), b).backward()
            optimizer.step()
            points.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    assert spent_epsilon((gradient,), DELTA, Adjacency.ADD_REMOVE) <= epsilon
    return float(np.mean([float(objective.exact_gradient(w).norm()) for w in points[:: len(points) // 20]]))


def linear() -> Iterator[Comparison]:
    """Linear models never form a gradient per example: against the products alone, and against vmap's gradients."""
    n, d = 20_000, 100
    model = linear_model(n, d)
    w = torch.full((d,), 0.1)
    v = w + 0.01

    def products() -> Tensor:
        return (model.X @ torch.stack([w, v], 1))[:, 0] @ model.X

    bound = model.difference_bound(float((w - v).norm()))
    one = ("locally", lambda: model.difference_sum(w, v, bound))
    yield compare(f"logistic differences, n = {n:,}, d = {d}", one, ("the two products with X alone", products))

    layer = nn.Sequential(nn.Linear(d, 1, bias=False), nn.Flatten(0))
    bce = nn.functional.binary_cross_entropy_with_logits
    general = ModuleObjective(layer, bce, model.X, model.y, lipschitz=1.0, smoothness=0.25)
    torch.testing.assert_close(general.difference_sum(w, v, bound), one[1](), rtol=1e-3, atol=1e-3)
    peer = ("per-example gradients by vmap", lambda: general.difference_sum(w, v, bound))
    yield compare(f"logistic differences, n = {n:,}, d = {d}", one, peer, rounds=5)


def linear_model(n: int, d: int) -> LinearModel:
    generator = torch.Generator().manual_seed(0)
    X = nn.functional.normalize(torch.randn(n, d, generator=generator))
    return LinearModel(X, (X[:, 0] > 0).float(), data_norm=1 + 1e-5)


def growths() -> Iterator[Comparison]:
    method = PrivateSpiderBoost(epsilon=1.0, delta=DELTA, steps=32, phase=8)

    def run_on(model: LinearModel | HardInstance, method: PrivateSpiderBoost = method) -> Callable[[], object]:
        return lambda: method.minimize(model, rng=0)

    yield growth(
        "32 steps of Private SpiderBoost, d = 100: time over examples",
        "locally",
        [10_000, 20_000, 40_000, 80_000],
        lambda n: run_on(linear_model(n, 100)),
    )
    yield growth(
        "32 steps of Private SpiderBoost, n = 5,000: time over dimensions",
        "locally",
        [250, 500, 1000, 2000],
        lambda d: run_on(linear_model(5_000, d)),
    )
    yield growth(
        "Private SpiderBoost on the hard instance: time over steps",
        "locally",
        [500, 1000, 2000, 4000],
        lambda T: run_on(HardInstance(1000, 50, 0), PrivateSpiderBoost(epsilon=1.0, delta=DELTA, steps=T, phase=16)),
    )


if __name__ == "__main__":
    for line in main():
        print(line)
