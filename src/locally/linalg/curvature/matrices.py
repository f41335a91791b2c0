"""The matrices: Hessian, Gauss-Newton, Fisher and empirical Fisher, each by how it is linearised."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from locally.checks import check_count
from locally.linalg.curvature.batches import Batch, Data, Inputs, take
from locally.linalg.curvature.likelihoods import Likelihood
from locally.linalg.curvature.operators import (
    CurvatureOperator,
    Loss,
    Product,
    Reduction,
    add_axis,
    gradient_of,
    pull_back,
)


class Hessian(CurvatureOperator):
    """The Hessian of the loss over the data; symmetric, in general indefinite.

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    >>> H = Hessian(model, nn.MSELoss(reduction="sum"), (X, torch.zeros(2, 1).double()), reduction="sum")
    >>> H(torch.tensor([1.0, 0.0]).double())  # first column of 2 X^T X
    tensor([20., 28.], dtype=torch.float64)
    """

    def __init__(self, model: nn.Module, loss: Loss, data: Data, **options: Any) -> None:
        super().__init__(model, loss, data, **options)

    def _linearise(self, theta: Tensor, inputs: Inputs, targets: Tensor) -> Product:
        stacked = theta.ndim == 2
        gradient = gradient_of(lambda t: self._total_loss(self._outputs(t, inputs), targets, stacked=stacked))
        return pull_back(gradient, theta)[1]  # the Hessian is symmetric: its pull-back is the product itself


class FactoredCurvature(CurvatureOperator):
    """J^T M J, where J is the Jacobian of the outputs and M acts on the outputs, example by example."""

    def _middle(self, outputs: Tensor, targets: Tensor, *, stacked: bool = False) -> Product:
        """U -> M U for one tangent U, shaped like the outputs; summed over nothing, scaled as one example's term.

        `stacked` outputs and tangents have a dimension of batches before that of the examples.
        """
        raise TypeError("FactoredCurvature is abstract: use GaussNewton, Fisher or EmpiricalFisher")

    def _linearise(self, theta: Tensor, inputs: Inputs, targets: Tensor) -> Product:
        outputs, pull = pull_back(lambda t: self._outputs(t, inputs), theta)
        # pull is linear, so pulling back through it once more pushes forward: J v without another forward pass
        _, push = pull_back(pull, torch.zeros_like(outputs))
        middle = self._middle(outputs, targets, stacked=theta.ndim == 2)
        return lambda v: pull(middle(push(v)))

    def dense(self) -> Float[Tensor, "p p"]:
        """The matrix itself, from the Jacobian of every example: a gradient per output, and 2 n C P^2 flops."""
        if self.batch_statistics:
            return super().dense()
        theta = self._flat()
        matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        examples = 0
        for inputs, targets in self.batches.micro(self._rows_at_once()):
            with sdpa_kernel(SDPBackend.MATH):
                J = vmap(jacrev(lambda t, x: self._outputs(t, take(x, add_axis))[0]), in_dims=(None, 0))(theta, inputs)
            outputs = self._outputs(theta, inputs)
            MJ = vmap(self._middle(outputs, targets), in_dims=-1, out_dims=-1)(J)
            matrix += J.flatten(0, -2).T @ MJ.flatten(0, -2)
            examples += len(targets)
        if self.reduction is Reduction.MEAN:
            matrix /= examples
        if not matrix.isfinite().all():
            raise ArithmeticError("the matrix is not finite: the parameters or the data hold NaN or infinity")
        return (matrix + matrix.T) / 2

    def _rows_at_once(self) -> int:
        """Examples whose Jacobians, twice over, fit into the memory budget."""
        inputs, _ = self.batches.first(1)
        with torch.no_grad():
            rows = self._outputs(self._flat(), inputs).numel()
        return max(1, self.memory // (3 * rows * self.shape[0] * self.dtype.itemsize))


class GaussNewton(FactoredCurvature):
    """The generalised Gauss-Newton matrix J^T H_l J, H_l the Hessian of the loss in the outputs.

    Positive semidefinite where the loss is convex in the outputs: the Hessian less the curvature of the network itself,
    and equal to it for a model that is linear in its parameters.

    >>> model = nn.Linear(2, 3).double()
    >>> X, y = torch.ones(4, 2).double(), torch.tensor([0, 1, 2, 0])
    >>> loss = nn.functional.cross_entropy
    >>> v = torch.arange(9.0).double()
    >>> torch.allclose(GaussNewton(model, loss, (X, y))(v), Hessian(model, loss, (X, y))(v))
    True
    """

    def __init__(self, model: nn.Module, loss: Loss, data: Data, **options: Any) -> None:
        super().__init__(model, loss, data, **options)

    def _middle(self, outputs: Tensor, targets: Tensor, *, stacked: bool = False) -> Product:
        return pull_back(gradient_of(lambda o: self._total_loss(o, targets, stacked=stacked)), outputs)[1]


class Fisher(FactoredCurvature):
    """The Fisher information of p(y | model(x)): expected outer products of scores, y drawn from the model.

    Args:
        model, data: as for `CurvatureOperator`; targets are only counted.
        likelihood: `Categorical`, `Bernoulli`, `Gaussian` or anything with their methods.
        samples: None takes the expectation in closed form; k >= 1 draws k targets an example.
        seed: of the draws. The same seed and micro-batches give the same matrix.
        options: keyword arguments of `CurvatureOperator`; reduction="mean" divides by the number of examples.

    >>> from locally.linalg.curvature import Categorical
    >>> model = nn.Linear(2, 3).double()
    >>> X, y = torch.ones(4, 2).double(), torch.tensor([0, 1, 2, 0])
    >>> same = GaussNewton(model, nn.functional.cross_entropy, (X, y)).dense()
    >>> torch.allclose(Fisher(model, Categorical(), (X, y)).dense(), same)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        data: Data,
        *,
        samples: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if samples is not None:
            check_count("samples", samples)
        self.likelihood, self.samples, self.seed = likelihood, samples, seed
        super().__init__(model, None, data, **options)

    def _middle(self, outputs: Tensor, targets: Tensor, *, stacked: bool = False) -> Product:
        if stacked:
            return example_by_example(self._middle(outputs.flatten(0, 1), targets), outputs)
        if self.samples is None:
            return lambda u: self.likelihood.information(outputs, u)
        generator = torch.Generator(outputs.device).manual_seed(self._draw)
        self._draw += 1
        scores = self.likelihood.sample_scores(outputs, self.samples, generator)
        return lambda u: outer_products(scores, u) / len(scores)

    def stacked(self, batches: Batch) -> Product:
        self._draw = self.seed
        return super().stacked(batches)

    def _linearise_all(self, here: tuple[Tensor, ...]) -> Iterator[tuple[Product, int]]:
        self._draw = self.seed
        return super()._linearise_all(here)

    def per_example(self, v: Float[Tensor, " p"]) -> Float[Tensor, "n p"]:
        if self.samples is not None:
            raise ValueError("per_example needs samples=None: draws belong to micro-batches, not to examples")
        return super().per_example(v)

    def dense(self) -> Float[Tensor, "p p"]:
        # drawn targets follow the micro-batches of the products, so the dense matrix is taken from these
        return super().dense() if self.samples is None else CurvatureOperator.dense(self)


class EmpiricalFisher(FactoredCurvature):
    """Outer products of the examples' own gradients: (1/n) sum_i g_i g_i^T at the targets of the data.

    Not the Fisher matrix: it says nothing about curvature unless the model fits its data (Kunstner et al., 2019).

    >>> model = nn.Linear(1, 1, bias=False).double()
    >>> X = torch.tensor([[1.0], [2.0]]).double()
    >>> loss = lambda outputs, targets: ((outputs - targets) ** 2).sum(1).mean() / 2
    >>> _ = nn.init.ones_(model.weight)
    >>> EmpiricalFisher(model, loss, (X, torch.zeros(2, 1).double())).dense()  # (1^2 + 4^2) / 2
    tensor([[8.5000]], dtype=torch.float64)
    """

    def __init__(self, model: nn.Module, loss: Loss, data: Data, **options: Any) -> None:
        super().__init__(model, loss, data, **options)
        if self.batch_statistics:
            raise ValueError("batch_statistics=True leaves no gradients of single examples to take products of")

    def _middle(self, outputs: Tensor, targets: Tensor, *, stacked: bool = False) -> Product:
        scores = gradient_of(lambda o: self._total_loss(o, targets, stacked=stacked))(outputs)
        if stacked:
            return example_by_example(lambda u: outer_products(scores.flatten(0, 1)[None], u), outputs)
        return lambda u: outer_products(scores[None], u)


def outer_products(scores: Tensor, u: Tensor) -> Tensor:
    """sum_k s_k <s_k, u>, example by example."""
    flat = scores.flatten(2) if scores.ndim > 2 else scores[..., None]
    along = torch.einsum("kno,no->kn", flat, u.reshape(flat.shape[1:]))
    return torch.einsum("kn,kno->no", along, flat).reshape(u.shape)


def example_by_example(middle: Product, outputs: Tensor) -> Product:
    """`middle` of stacked tangents, whose examples do not know which batch they stand in."""
    return lambda u: middle(u.flatten(0, 1)).reshape(outputs.shape)
