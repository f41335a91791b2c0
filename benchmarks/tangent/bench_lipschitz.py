"""Certified constants beside auto_LiRPA: all outputs of perceptrons at equal bounds; branching; growth with the width.

`python -m benchmarks lipschitz`. auto_LiRPA's releases with Jacobian bounds are on no package index: put its package
folder (a checkout of 2026 was used) and `appdirs` and `graphviz` into benchmarks/.peers/auto-lirpa to have it compared.
It is imported from there into a process of its own, since it changes logging and defaults; without it the comparison is
with a loop over outputs, one bound at a time, which is how its example works.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Comparison, compare, growth
from locally.papers.local_lipschitz import nearest_leader, perceptron, train
from locally.tangent.lipschitz import LocalLipschitz, jacobian_bounds, read_module

PEER = Path(__file__).parents[1] / ".peers" / "auto-lirpa"
EPS = 0.1


def main() -> list[Comparison]:
    torch.set_num_threads(1)
    results = [*loops(), *branching(), *normalised(), *growths()]
    if (PEER / "auto_LiRPA").exists():
        results += auto_lirpa()
    else:
        print(f"auto_LiRPA is left out: its package folder is not in {PEER}")
    return results


@cache
def network(name: str) -> tuple[nn.Module, Tensor]:
    """Trained perceptrons, so that many activations are open; a small network of random convolutions."""
    torch.manual_seed(0)
    if name.startswith("perceptron"):
        layers, width = int(name.split()[1]), int(name.split()[3])
        x, y = nearest_leader(10_000, 16, 0)
        net = train(perceptron(16, width, layers + 1, 10, 0), x, y, 4, 0).double()
        return net, torch.full((1, 16), 0.5, dtype=torch.float64)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(392, 10),
    )  # fmt: skip
    return net.double(), torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64)


def radius(name: str) -> float:
    return 2 / 255 if name.startswith("convolutional") else EPS


def certify(name: str, **options: object) -> Callable[[], Tensor]:
    """As a user calls it: reading the module is part of the time."""
    net, x = network(name)
    estimator = LocalLipschitz(samples=1, **options)  # type: ignore[arg-type]
    return lambda: estimator.certify(net, x, radius(name)).per_output


def loops() -> Iterator[Comparison]:
    for name in ("perceptron 3 x 256", "convolutional 32 x 32"):  # auto_LiRPA cannot build the second one's Jacobian
        net, x = network(name)

        def one_by_one(net: nn.Module = net, x: Tensor = x, name: str = name) -> None:
            for row in torch.eye(10, dtype=torch.float64):
                LocalLipschitz(samples=1).certify(net, x, radius(name), spec=row[None])

        yield compare(
            f"all outputs, {name}",
            ("one batch", certify(name)),
            ("loop over outputs", one_by_one),
            rounds=1 if name[0] == "c" else 5,
            warmup=0,
        )


def branching() -> Iterator[Comparison]:
    """What ten seconds of branching leave of the plain bound's distance to the attained value."""
    x, y = nearest_leader(10_000, 16, 0)
    centre = torch.full((1, 16), 0.5, dtype=torch.float64)
    for depth, width in ((3, 64), (4, 32), (6, 32)):
        net = train(perceptron(16, width, depth, 10, 0), x, y, 10, 0)
        plain = LocalLipschitz(samples=6000).certify(net, centre, EPS)
        branched = LocalLipschitz(method="bab", samples=6000, timeout=10.0).certify(net, centre, EPS)
        ratio = (branched.value / plain.value).item()
        detail = {"lower": branched.lower.item(), "status": str(branched.status[0]), "seconds": branched.seconds}
        name = f"bound after at most 10 s, depth {depth}, width {width}"
        yield Comparison(name, "bound", ratio, ratio, ratio, "branch and bound", "plain bound", detail)


def normalised() -> Iterator[Comparison]:
    """Layer normalisation, which auto_LiRPA's Jacobian bounds do not take: beside intervals on the backward pass."""
    torch.manual_seed(0)
    blocks = [part for _ in range(2) for part in (nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU())]
    net = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.ReLU(), *blocks, nn.Linear(64, 10)).double()
    x = torch.full((1, 16), 0.5, dtype=torch.float64)
    for eps in (1e-4, 1e-3, 1e-2):
        ours, theirs = (LocalLipschitz(method=m, samples=2000).certify(net, x, eps) for m in ("bound", "interval"))
        ratio = (ours.value / theirs.value).item()
        detail = {"bound": ours.value.item(), "lower": ours.lower.item(), "seconds": ours.seconds}
        name = f"three layers of 64 with layer normalisation, eps {eps:g}"
        yield Comparison(name, "bound", ratio, ratio, ratio, "linear bounds", "interval arithmetic", detail)


def growths() -> list[Comparison]:
    def make(width: int) -> Callable[[], object]:
        graph = read_module(perceptron(16, width, 4, 10, 0).double(), (16,))
        x = torch.full((1, 16), 0.5, dtype=torch.float64)
        return lambda: LocalLipschitz(samples=1).certify(graph, x, EPS)

    return [growth("all outputs over width, three hidden layers", "LocalLipschitz", [64, 128, 256], make)]


# auto_LiRPA, in a process of its own ---------------------------------------------------------------------------------


def auto_lirpa() -> Iterator[Comparison]:
    for name in ("perceptron 2 x 64", "perceptron 3 x 256"):
        worker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tangent.bench_lipschitz", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert worker.stdin is not None
        assert worker.stdout is not None

        def ask(what: str, worker: subprocess.Popen[str] = worker) -> list[float]:
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(what + "\n")
            worker.stdin.flush()
            return json.loads(worker.stdout.readline())

        theirs = torch.tensor(ask("bound"), dtype=torch.float64)
        ours = certify(name)()[0]
        gap = float((ours / theirs).max())
        yield Comparison(f"plain bound, {name}", "bound", gap, gap, gap, "LocalLipschitz", "auto_LiRPA")
        yield compare(
            f"all outputs, {name}",
            ("LocalLipschitz", certify(name)),
            ("auto_LiRPA, one output at a time", lambda ask=ask: ask("bound")),  # type: ignore[misc]
            rounds=5,
        )
        net, x = network(name)
        yield compare(
            f"entries of the Jacobian, {name}",
            ("jacobian_bounds", lambda net=net, x=x: jacobian_bounds(net, x, EPS)),  # type: ignore[misc]
            ("auto_LiRPA, all outputs at once", lambda ask=ask: ask("entries")),  # type: ignore[misc]
            rounds=5,
        )
        worker.kill()


def serve(name: str) -> None:
    """Answer "bound" with auto_LiRPA's l_1 bounds for all outputs, one by one as its Jacobian example computes them,
    and "entries" with bounds on the whole Jacobian from one call."""
    import logging

    sys.path.append(str(PEER))
    logging.disable(logging.INFO)
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
    from auto_LiRPA.jacobian import GradNorm, JacobianOP

    class RowNorm(nn.Module):
        def __init__(self, net: nn.Module, row: Tensor) -> None:
            super().__init__()
            self.net, self.row, self.norm = net, row, GradNorm(norm=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(JacobianOP.apply(self.net(x.requires_grad_()).matmul(self.row), x))

    class Entries(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return JacobianOP.apply(self.net(x.requires_grad_()), x)

    def bound(module: nn.Module) -> Tensor:
        bounded = BoundedModule(module, x, bound_opts={"verbosity": 0}, device="cpu")
        box = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, x_L=x - EPS, x_U=x + EPS))
        return bounded.compute_jacobian_bounds(box, optimize=False)[1].detach().flatten()

    torch.set_num_threads(1)
    net, x = network(name)
    eye = torch.eye(10, dtype=torch.float64)
    for line in sys.stdin:
        one_by_one = line.strip() == "bound"
        modules = [RowNorm(net, eye[:, k : k + 1]) for k in range(10)] if one_by_one else [Entries(net)]
        print(json.dumps(torch.cat([bound(module) for module in modules]).tolist()), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
