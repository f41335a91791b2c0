"""The interpreter beside autograd's Jacobian, captum's votes and SciPy's svds, and the growth of its cost.

An upscaling network of the size that the experiment trains: one product costs a pass of the network.
"""

from collections.abc import Callable

import torch
from scipy.sparse.linalg import svds
from torch import nn

from benchmarks.harness import Comparison, compare, growth
from locally.tangent.interpreter import LinearInterpreter, PixelVotes
from locally.tangent.interpreter.small_networks import Residual


def main() -> list[Comparison]:
    from captum.attr import InputXGradient

    torch.manual_seed(0)
    net, x = upscaler(), torch.rand(1, 1, 20, 20)
    scope = LinearInterpreter(net, x)
    ours = ("locally, captured once", scope.dense)
    title = "F of an upscaler, 400 to 1600 pixels"
    jacobian = lambda: torch.autograd.functional.jacobian(net, x)
    reverse = lambda: torch.func.jacrev(net)(x)
    again = ("locally, captured each time", lambda: LinearInterpreter(net, x).dense())
    results = [
        compare(title, ours, ("torch.autograd.functional.jacobian", jacobian), rounds=3),
        compare(title, again, ("torch.autograd.functional.jacobian", jacobian), rounds=3),
        compare(title, ours, ("torch.func.jacrev", reverse), rounds=3),
        compare(title, ours, ("locally, sparse(7)", lambda: scope.sparse(7)), rounds=3),
    ]
    operator = scope.as_linear_operator()
    top = lambda method: scope.svd(32, method=method, generator=torch.Generator().manual_seed(0))
    theirs = ("SciPy svds on our operator", lambda: svds(operator, k=32, random_state=0))
    for method in ("krylov", "randomized"):
        mine = (f"locally, {method}", lambda method=method: top(method))
        results += [compare("32 largest singular values", mine, theirs, rounds=3)]
    relu = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2304, 10))
    digits = torch.rand(64, 1, 26, 26)
    results.append(
        compare(
            "votes of 64 images",
            ("locally, captured each time", lambda: PixelVotes(relu).attribute(digits, target=0)),
            (
                "captum InputXGradient",
                lambda: InputXGradient(relu).attribute(digits.clone().requires_grad_(), target=0),
            ),
            rounds=5,
        )
    )
    results.append(growth("32 products over pixels", "LinearInterpreter.matvec", [400, 1600, 6400], products))
    results.append(growth("products over their number", "LinearInterpreter.matvec", [8, 32, 128], many))
    for result in results:
        print(result)
    return results


def upscaler(width: int = 12) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), Residual(width), Residual(width),
        nn.Conv2d(width, 4, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip


def products(pixels: int) -> Callable[[], object]:
    side = round(pixels**0.5)
    scope = LinearInterpreter(upscaler(), torch.rand(1, 1, side, side))
    v = torch.rand(32, 1, 1, side, side)
    return lambda: scope.matvec(v)


def many(count: int) -> Callable[[], object]:
    scope = LinearInterpreter(upscaler(), torch.rand(1, 1, 40, 40))
    v = torch.rand(count, 1, 1, 40, 40)
    return lambda: scope.matvec(v)


if __name__ == "__main__":
    main()
