"""Data of different kinds at different nodes, and the gradients of a model on them, for all nodes at once."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from locally.checks import check_count, check_nonnegative, check_positive

BLOCK = 64  # steps whose batches are drawn together


def split_dirichlet(
    labels: Int[ndarray, " N"], n_nodes: int, alpha: float, rng: np.random.Generator
) -> list[Int[ndarray, " _"]]:
    """Heterogeneous data: each node draws its own class proportions from Dirichlet(alpha, ..., alpha).

    A node's samples are distinct; those of two nodes may overlap. Small alpha: few classes a node; large: all alike.

    Args:
        labels: class of each sample.
        n_nodes: at least 1; a node gets at most N / n_nodes samples.
        alpha: positive.

    Returns:
        Indices of the samples of each node, at least one.

    >>> parts = split_dirichlet(np.arange(100) % 10, n_nodes=4, alpha=0.5, rng=np.random.default_rng(0))
    >>> len(parts), max(len(part) for part in parts) <= 25
    (4, True)
    """
    check_count("n_nodes", n_nodes)
    check_positive("alpha", alpha)
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    share = len(labels) // n_nodes
    if share < len(classes):
        raise ValueError(f"labels must hold at least {len(classes)} samples a node, got {len(labels)} for {n_nodes}")
    parts = []
    for _ in range(n_nodes):
        wanted = np.floor(rng.dirichlet(np.full(len(classes), alpha)) * share).astype(int)
        parts.append(
            np.concatenate([rng.permutation(members)[:count] for members, count in zip(classes, wanted, strict=True)])
        )
    return parts


def cross_entropy(outputs: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """As in torch.nn.functional, whose own form is not vectorised over nodes but interpreted, five times as slow."""
    return (outputs.logsumexp(-1) - outputs.gather(-1, labels[:, None])[:, 0]).mean()


class ModelProblem:
    """A classifier that honest nodes fit together, each on samples of its own.

    Every batch depends on (seed, node, step) alone, so that a simulation and real processes see the same ones. The
    gradients of all nodes are one vectorised call.

    Args:
        model: any module without running statistics, which would be neither exchanged nor defended: use GroupNorm, or
            BatchNorm with track_running_stats=False. Its parameters are where all nodes start.
        inputs, labels: samples x ..., samples (classes from 0).
        parts: indices of the samples of each honest node.
        batch: samples a gradient, or a function of the step.
        penalty: of the regulariser penalty * ||theta||_2, the norm and not its square, as in the paper's experiments.
        loss: of (outputs, labels), a mean over the batch; cross-entropy by default.
        seed: of the batches.

    Raises:
        ValueError: sizes do not fit, a part is empty, or labels are no classes.
        TypeError: the model keeps running statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Float[Tensor, "N ..."],
        labels: Int[Tensor, " N"],
        parts: Sequence[Int[ndarray, " _"]],
        *,
        batch: int | Callable[[int], int] = 25,
        penalty: float = 0.0,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if len(inputs) != len(labels):
            raise ValueError(f"inputs and labels must have the same length, got {len(inputs)} and {len(labels)}")
        if not parts or any(len(part) == 0 for part in parts):
            raise ValueError("parts must give every node at least one sample")
        if int(labels.min()) < 0:
            raise ValueError("labels must be classes from 0, got a negative one")
        if any(isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats for m in model.modules()):
            raise TypeError("model must not keep running statistics: use GroupNorm or track_running_stats=False")
        check_nonnegative("penalty", penalty)
        if not callable(batch):
            check_count("batch", batch)
        self.model, self.loss, self.penalty, self.seed = model, loss or cross_entropy, penalty, seed
        self.inputs, self.labels = inputs, labels
        self.parts = [np.asarray(part) for part in parts]
        self._batch = batch
        self._classes = int(labels.max()) + 1
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self._drawn: tuple[int, ndarray] = (-1, np.empty(0))

    def start(self) -> Float[Tensor, " D"]:
        """The module's own parameters, flat, in the order that it lists them."""
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def batch_size(self, step: int) -> int:
        """Samples of each node's batch at this step."""
        return self._batch(step) if callable(self._batch) else self._batch

    def with_batch(self, batch: int | Callable[[int], int]) -> "ModelProblem":
        """The same problem with other batches."""
        return ModelProblem(
            self.model,
            self.inputs,
            self.labels,
            self.parts,
            batch=batch,
            penalty=self.penalty,
            loss=self.loss,
            seed=self.seed,
        )

    def samples(self, step: int, nodes: Sequence[int]) -> Int[ndarray, "K batch"]:
        """Which samples these nodes draw at this step, with replacement."""
        if callable(self._batch):
            size = self.batch_size(step)
            drawn = [self.parts[k][self._rng(k, step).integers(len(self.parts[k]), size=size)] for k in nodes]
            return np.stack(drawn)
        block, at = divmod(step, BLOCK)
        if self._drawn[0] != block:
            everyone = [
                part[self._rng(k, block).integers(len(part), size=(BLOCK, self._batch))]
                for k, part in enumerate(self.parts)
            ]
            self._drawn = block, np.stack(everyone, axis=1)
        return self._drawn[1][at, list(nodes)]

    def gradients(
        self, parameters: Float[Tensor, "K D"], step: int, nodes: Sequence[int], *, flipped: bool = False
    ) -> Float[Tensor, "K D"]:
        """As for `Problem`: the mean over each node's batch, with the penalty's gradient where there is one."""
        drawn = torch.from_numpy(self.samples(step, nodes)).to(self.labels.device)
        labels = self.labels[drawn]
        if flipped:
            labels = self._classes - 1 - labels
        if len(nodes) == 1:  # a process of its own: what vectorises over nodes would take longer to load than to run
            alone = parameters[0].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._objective(alone, self.inputs[drawn[0]], labels[0]), alone)
            gradients = gradient[None]
        else:
            gradients = vmap(grad(self._objective), randomness="different")(parameters, self.inputs[drawn], labels)
        if self.penalty > 0:
            norms = parameters.norm(dim=1, keepdim=True).clamp_min(torch.finfo(parameters.dtype).tiny)
            gradients = gradients + self.penalty * parameters / norms
        return gradients

    def accuracies(
        self, parameters: Float[Tensor, "K D"], inputs: Float[Tensor, "M ..."], labels: Int[Tensor, " M"]
    ) -> Float[ndarray, " K"]:
        """Share of these samples that each row of parameters classifies correctly."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                found = [self._outputs(row, inputs).argmax(-1) for row in parameters]
        finally:
            self.model.train(training)
        return np.array([float((f == labels).double().mean()) for f in found])

    def load(self, parameters: Float[Tensor, " D"]) -> nn.Module:
        """The model, with these parameters in it."""
        nn.utils.vector_to_parameters(parameters, self.model.parameters())
        return self.model

    def _rng(self, node: int, block: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, node, block])

    def _outputs(self, parameters: Tensor, inputs: Tensor) -> Tensor:
        named, at = {}, 0
        for name, shape in self._shapes.items():
            named[name] = parameters[at : at + shape.numel()].view(shape)
            at += shape.numel()
        return functional_call(self.model, named, (inputs,))

    def _objective(self, parameters: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self._outputs(parameters, inputs), labels)
