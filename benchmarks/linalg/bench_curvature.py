"""Hessian- and Gauss-Newton-vector products beside one gradient, and beside double backward written by hand.

The figure that matters to Lanczos and conjugate gradients is a product at parameters where one was taken before; the
first one, which linearises, is shown too.
"""

import torch
from torch import Tensor, nn

from benchmarks.harness import Comparison, compare, growth
from locally.linalg.curvature import CurvatureOperator, GaussNewton, Hessian

CROSS_ENTROPY = nn.functional.cross_entropy


def perceptron(width: int = 256, examples: int = 512) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    layers = [nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
    return nn.Sequential(*layers), (torch.randn(examples, 784), torch.randint(10, (examples,)))


def deep() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    layers = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(256, 10)), (torch.randn(512, 256), torch.randint(10, (512,)))


def convolutions() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    layers = [
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 10)),
    ]
    return nn.Sequential(*layers), (torch.randn(128, 1, 28, 28), torch.randint(10, (128,)))


NETWORKS = {"perceptron 784-256-256-10": perceptron, "7 layers of 256": deep, "convolutions on 28 x 28": convolutions}


class ByHand:
    """What one writes without a library."""

    def __init__(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
        self.model, (self.X, self.y) = model, data
        self.parameters = list(model.parameters())

    def gradient(self) -> Tensor:
        loss = CROSS_ENTROPY(self.model(self.X), self.y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)])

    def product(self, v: Tensor) -> Tensor:
        loss = CROSS_ENTROPY(self.model(self.X), self.y)
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True)
        flat = torch.cat([g.flatten() for g in gradients])
        return torch.cat([h.flatten() for h in torch.autograd.grad(flat @ v, self.parameters)])


def main() -> list[Comparison]:
    torch.manual_seed(0)
    found = []
    for name, make in NETWORKS.items():
        model, data = make()
        hand = ByHand(model, data)
        hessian, ggn = Hessian(model, CROSS_ENTROPY, data), GaussNewton(model, CROSS_ENTROPY, data)
        v = torch.randn(hessian.shape[0])
        stack = torch.randn(8, hessian.shape[0])
        assert torch.allclose(hessian(v), hand.product(v), rtol=1e-3, atol=1e-4)

        gradient = ("gradient", hand.gradient)
        double = ("double backward by hand", lambda hand=hand, v=v: hand.product(v))
        product = ("Hessian-vector product", lambda op=hessian, v=v: op(v))
        found += [
            compare(name, product, gradient),
            compare(name, product, double),
            compare(name, ("first product, with linearisation", first(Hessian, model, data, v)), gradient),
            compare(name, ("8 Hessian-vector products at once", lambda op=hessian, s=stack: op(s)), gradient),
            compare(name, ("Gauss-Newton-vector product", lambda op=ggn, v=v: op(v)), gradient),
        ]
    found.append(
        growth("perceptron, over its examples", "Hessian-vector product", (256, 512, 1024, 2048), over_examples)
    )
    return found


def first(kind: type[CurvatureOperator], model: nn.Module, data: tuple[Tensor, Tensor], v: Tensor):
    """A product at parameters that no product was taken at: nothing is kept from the call before."""
    op = kind(model, CROSS_ENTROPY, data)

    def work() -> Tensor:
        op.forget()
        return op(v)

    return work


def over_examples(n: int):
    model, data = perceptron(examples=n)
    op = Hessian(model, CROSS_ENTROPY, data)
    v = torch.randn(op.shape[0])
    return lambda: op(v)


if __name__ == "__main__":
    for comparison in main():
        print(comparison)
