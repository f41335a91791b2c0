"""What all curvature operators share: linearise a micro-batch once with `torch.func`, apply it to many vectors.

A linearised micro-batch holds the pull-back of the gradient (or of the outputs), so a product pays for one backward
pass through it and not for the forward pass again. Where the linearised data fit into the memory budget they are kept
for the next product at the same parameters.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from locally.checks import check_choice, check_count
from locally.linalg.curvature.batches import Batch, Batches, Data, Inputs, parts, take

Loss = Callable[[Tensor, Tensor], Tensor]
Product = Callable[[Tensor], Tensor]

# Bytes of a linearised micro-batch, and of one product with it, over those that a plain backward pass saves.
LINEARISED, PER_VECTOR = 4, 2


class Reduction(StrEnum):
    """What the loss does over examples, and the operator over the data; chosen by the caller."""

    MEAN = "mean"
    SUM = "sum"


class CurvatureOperator:
    """A symmetric P x P matrix of a model at its present parameters; `op(v)` is its product with v.

    Rows and columns follow `torch.nn.utils.parameters_to_vector` over `parameters`. The sum over micro-batches runs in
    the order of the data. Changed parameters are noticed; the next product is taken at the new ones.

    Args:
        model: called as model(inputs), model(*inputs) for a tuple and model(**inputs) for a dict. Dropout that is
            switched on is refused; so is batch norm in training mode unless `batch_statistics`.
        loss: loss(outputs, targets), the mean or the sum over examples of a term for each example.
        data: one batch as a tuple (inputs, targets), or a list or loader of batches that does not shuffle.
        reduction: "mean" or "sum", what `loss` does over examples and this operator over the data.
        parameters: names as in `model.named_parameters()`; default all that require a gradient.
        chunk: examples in a micro-batch; default as many as `memory` allows.
        memory: bytes for intermediate values, > 0; an estimate from what a backward pass through one example saves.
        batch_statistics: let batch norm normalise by each batch as it comes. Batches are then never divided and running
            statistics stay as they are; the matrix is no longer a sum over examples.

    Raises:
        TypeError, ValueError: the model, the data or an argument cannot be used; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        data: Data,
        *,
        reduction: Reduction | str = Reduction.MEAN,
        parameters: Sequence[str] | None = None,
        chunk: int | None = None,
        memory: int = 2**30,
        batch_statistics: bool = False,
    ) -> None:
        check_choice("reduction", reduction, tuple(Reduction))
        check_count("memory", memory)
        if chunk is not None:
            check_count("chunk", chunk)
        if chunk is not None and batch_statistics:
            raise ValueError("chunk would change the statistics that batch_statistics=True asks for: leave one out")
        self.model, self.loss = model, loss
        self.reduction = Reduction(reduction)
        self.names = select_parameters(model, parameters)
        self.memory, self.batch_statistics = memory, batch_statistics
        own = self._parameters()
        self.shape = (sum(p.numel() for p in own),) * 2
        self.dtype, self.device = own[0].dtype, own[0].device
        refuse_random_modules(model, batch_statistics)
        self.batches = Batches(data, self.device)
        self._check_sum()
        self._per_example = 0.0 if batch_statistics else self._bytes_per_example()
        fits = max(1, int(memory / max((LINEARISED + PER_VECTOR) * self._per_example, 1)))
        self.chunk = None if batch_statistics else chunk or fits
        self._kept: list[tuple[Product, int]] | None = None
        self._kept_at: tuple[Tensor, ...] = ()

    def __call__(self, v: Float[Tensor, "*stack p"]) -> Float[Tensor, "*stack p"]:
        """The product with a vector (p,), or with every row of a stack (k, p).

        Costs about as much as 1.5 to 2.3 gradients a vector once linearised, and 3 to 3.5 for the first. A stack saves
        the fixed cost of small products; convolutions take a stack more slowly than its rows one by one.

        Raises:
            ValueError, TypeError: v has the wrong shape, dtype or device.
            ArithmeticError: the product is not finite.
        """
        self._check_vector(v)
        total: Tensor | None = None
        examples = 0
        for product, n in self._linearised():
            if v.ndim == 1:
                part = product(v)
            else:
                part = torch.cat([vmap(product)(rows) for rows in v.split(self._vectors_at_once(n))])
            total = part if total is None else total + part
            examples += n
            del product
        assert total is not None  # an empty pass is refused
        if self.reduction is Reduction.MEAN:
            total = total / examples
        if not total.sum().isfinite():
            refuse_not_finite(total)
        return total

    def per_example(self, v: Float[Tensor, " p"]) -> Float[Tensor, "n p"]:
        """The products of every example's own matrix with v, one a row; their mean (or sum) is `self(v)`.

        Costs about 4 gradients and n P numbers of memory.
        """
        return torch.cat(list(self.per_example_blocks(v)))

    def per_example_blocks(self, v: Float[Tensor, " p"]) -> Iterator[Float[Tensor, "_ p"]]:
        """The rows of `per_example` a micro-batch at a time, within the memory budget."""
        self._check_vector(v)
        if self.batch_statistics:
            raise ValueError("with batch_statistics=True the matrix is no sum over examples")
        theta = self._flat()

        def one(inputs: Inputs, targets: Tensor) -> Tensor:
            # the pull-back closes over a micro-batch of this single example
            return self._linearise(theta, take(inputs, add_axis), targets[None])(v)

        fits = max(1, self.memory // (8 * self.shape[0] * self.dtype.itemsize))
        for inputs, targets in self.batches.micro(min(self.chunk or fits, fits)):
            with sdpa_kernel(SDPBackend.MATH):
                rows = vmap(one)(inputs, targets)
            if not rows.sum().isfinite():
                refuse_not_finite(rows)
            yield rows

    def stacked(self, batches: Batch) -> Product:
        """Products with the matrices of k batches at once, whatever the operator's own data.

        Args:
            batches: inputs and targets with a leading dimension k before that of the examples.

        Returns:
            A function of a stack (k, p) that multiplies row i by the matrix of batch i. It is linearised once, at the
            present parameters, and holds k times the intermediate values of a batch.
        """
        if self.batch_statistics:
            raise ValueError("with batch_statistics=True batches cannot be stacked: their statistics would be updated")
        refuse_random_modules(self.model, self.batch_statistics)
        inputs, targets = batches
        if len({t.shape[:2] for t in (*parts(inputs), targets)}) > 1 or targets.ndim < 2 or not targets.numel():
            shapes = [tuple(t.shape) for t in (*parts(inputs), targets)]
            raise ValueError(f"batches must share two leading dimensions (k, examples), got shapes {shapes}")
        k, examples = targets.shape[:2]
        theta = self._flat().expand(k, -1)
        with sdpa_kernel(SDPBackend.MATH):
            product = self._linearise(theta, inputs, targets)
        divisor = examples if self.reduction is Reduction.MEAN else 1

        def multiply(v: Tensor) -> Tensor:
            found = product(v.reshape(k, -1)) / divisor
            if not found.sum().isfinite():
                refuse_not_finite(found)
            return found.reshape(v.shape)

        return multiply

    def dense(self) -> Float[Tensor, "p p"]:
        """The matrix itself, P^2 numbers: P products, or one Jacobian where the matrix factors through the outputs."""
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        matrix = self(eye)
        return (matrix + matrix.T) / 2

    def forget(self) -> None:
        """Release what is kept for the next product."""
        self._kept, self._kept_at = None, ()

    def scipy(self) -> LinearOperator:
        """The same matrix for SciPy and anything else that speaks `LinearOperator`; NumPy in, NumPy out."""
        return _AsScipy(self)

    def _linearise(self, theta: Tensor, inputs: Inputs, targets: Tensor) -> Product:
        """v -> the sum over these examples of their matrices times v."""
        raise TypeError("CurvatureOperator is abstract: use Hessian, GaussNewton, Fisher or EmpiricalFisher")

    def _linearised(self) -> Iterable[tuple[Product, int]]:
        """Micro-batches with their number of examples; kept for the next call if they fit into the memory budget."""
        refuse_random_modules(self.model, self.batch_statistics)
        here = tuple(t.detach() for t in [*self.model.parameters(), *self.model.buffers()])  # frozen ones too
        if self._kept is not None and all(torch.equal(a, b) for a, b in zip(here, self._kept_at)):
            return self._kept
        self._kept = None
        return self._linearise_all(tuple(t.clone() for t in here))

    def _linearise_all(self, here: tuple[Tensor, ...]) -> Iterator[tuple[Product, int]]:
        theta = self._flat()
        kept: list[tuple[Product, int]] = []
        examples = 0
        keep = not self.batch_statistics
        for inputs, targets in self.batches.micro(self.chunk):
            n = len(targets)
            examples += n
            keep = keep and (LINEARISED * examples + PER_VECTOR * n) * self._per_example <= self.memory
            if not keep:
                kept.clear()
            with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel that can be differentiated twice
                product = self._linearise(theta, inputs, targets)
            if keep:
                kept.append((product, n))
            yield product, n
            del product  # frees one micro-batch before the next is linearised
        if keep:
            self._kept, self._kept_at = kept, here

    def _outputs(self, theta: Tensor, inputs: Inputs) -> Tensor:
        """The model at the flat parameters theta; buffers are copied, so that running statistics do not move.

        A stack of parameters (k, p) meets a stack of batches, one by one.
        """
        if theta.ndim == 2:
            return vmap(self._outputs)(theta, inputs)
        shapes = [own.shape for own in self._parameters()]
        pieces = theta.split([shape.numel() for shape in shapes])  # one split: its pull-back is a single concatenation
        values = {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, shapes)}
        held = {n: p.detach() for n, p in self.model.named_parameters() if n not in values}
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        arguments: Any = (inputs,) if isinstance(inputs, Tensor) else () if isinstance(inputs, dict) else tuple(inputs)
        words = inputs if isinstance(inputs, dict) else {}
        return functional_call(self.model, (values, held, buffers), arguments, words)

    def _total_loss(self, outputs: Tensor, targets: Tensor, *, stacked: bool = False) -> Tensor:
        """The sum over examples, whatever the loss's own reduction."""
        assert self.loss is not None
        if stacked:
            return vmap(self._total_loss)(outputs, targets).sum()
        scale = len(targets) if self.reduction is Reduction.MEAN else 1
        return scale * self.loss(outputs, targets)

    def _parameters(self) -> list[Tensor]:
        own = dict(self.model.named_parameters())
        return [own[name] for name in self.names]

    def _flat(self) -> Float[Tensor, " p"]:
        return torch.cat([p.detach().reshape(-1) for p in self._parameters()])

    def _check_vector(self, v: Tensor) -> None:
        if v.ndim not in (1, 2) or v.shape[-1] != self.shape[0] or len(v) == 0:
            raise ValueError(f"v must have shape ({self.shape[0]},) or (k, {self.shape[0]}), got {tuple(v.shape)}")
        if v.dtype != self.dtype or v.device != self.device:
            raise TypeError(f"v must be {self.dtype} on {self.device} like the parameters, got {v.dtype} on {v.device}")

    def _check_sum(self) -> None:
        """A random model, or a loss whose terms do not add up over examples, would make every later sum wrong."""
        inputs, targets = self.batches.first(8)
        n = len(targets)
        with torch.no_grad():
            outputs = self._outputs(self._flat(), inputs)
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"model must return a tensor, got {type(outputs).__name__}: wrap it to return its logits"
                )
            again = self._outputs(self._flat(), inputs)
            if not torch.allclose(outputs, again, rtol=1e-3, atol=1e-5, equal_nan=True):
                raise ValueError("model: two calls on the same inputs differ; switch off what is random in it")
            if self.loss is None:
                return
            whole = self.loss(outputs, targets)
            if not isinstance(whole, Tensor):
                raise TypeError(f"loss must return a tensor, got {type(whole).__name__}")
            if whole.ndim:
                raise ValueError(f"loss must return one number, got a tensor of shape {tuple(whole.shape)}")
            if n == 1 or self.batch_statistics or outputs.shape[:1] != (n,):
                return
            halves = sum(self._total_loss(outputs[s], targets[s]) for s in (slice(n // 2), slice(n // 2, None)))
            whole = self._total_loss(outputs, targets)
        # NaN passes: it is the product's business
        if abs(whole - halves) > 1e-3 * abs(whole) + 1e-6:
            raise ValueError(
                f"loss is not the {self.reduction} over examples of a term for each: {n} examples give {whole:.6g}, "
                f"their halves {halves:.6g} together; set reduction, or write the loss as a sum"
            )

    def _bytes_per_example(self) -> float:
        """What a backward pass saves for two examples, less what it saves for one."""
        inputs, targets = self.batches.first(1)
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel() * tensor.element_size()
            return tensor

        sizes = []
        for copies in (1, 2):
            saved = 0
            again = partial(torch.repeat_interleave, repeats=copies, dim=0)
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
                outputs = self._outputs(self._flat().requires_grad_(), take(inputs, again))
                if self.loss is not None:
                    self.loss(outputs, again(targets))
            sizes.append(saved)
        return max(float(sizes[1] - sizes[0]), self.dtype.itemsize)

    def _vectors_at_once(self, examples: int) -> int:
        return max(1, int((self.memory / max(self._per_example * examples, 1) - LINEARISED) / PER_VECTOR))


class _AsScipy(LinearOperator):
    def __init__(self, op: CurvatureOperator) -> None:
        self._op = op
        super().__init__(dtype=torch.empty(0, dtype=op.dtype).numpy().dtype, shape=op.shape)

    def _matvec(self, x: Any) -> Any:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _matmat(self, X: Any) -> Any:
        rows = torch.as_tensor(X.T.copy(), dtype=self._op.dtype, device=self._op.device)
        return self._op(rows).T.cpu().numpy()

    def _adjoint(self) -> LinearOperator:
        return self


def pull_back(function: Product, at: Tensor) -> tuple[Tensor, Product]:
    """function(at), and u -> J^T u there."""
    value, pull = vjp(function, at)[:2]
    return value, lambda u: pull(u)[0]


def gradient_of(function: Product) -> Product:
    def gradient(at: Tensor) -> Tensor:
        value, pull = pull_back(function, at)
        return pull(torch.ones_like(value))

    return gradient


def add_axis(tensor: Tensor) -> Tensor:
    return tensor[None]


def select_parameters(model: nn.Module, names: Sequence[str] | None) -> tuple[str, ...]:
    own = dict(model.named_parameters())
    chosen = tuple(n for n, p in own.items() if p.requires_grad) if names is None else tuple(names)
    if unknown := [n for n in chosen if n not in own]:
        raise ValueError(f"parameters: the model has none called {', '.join(unknown)}")
    if not chosen:
        raise ValueError("parameters: the model has none that require a gradient")
    if len(set(chosen)) != len(chosen):
        raise ValueError("parameters: a name stands there twice")
    kinds = {(own[n].dtype, own[n].device) for n in chosen}
    if len(kinds) > 1:
        raise ValueError(f"parameters: need one dtype and one device, got {sorted(map(str, kinds))}")
    return chosen


def refuse_random_modules(model: nn.Module, batch_statistics: bool) -> None:
    """Dropout has no derivative to speak of; batch norm in training mode ties the examples of a batch together."""
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if module.training and isinstance(module, _DropoutNd) and module.p > 0:
            raise ValueError(f"model: {where} drops at random, so the loss is no function: call model.eval() first")
        ties = module.training or getattr(module, "running_mean", None) is None
        if isinstance(module, _BatchNorm) and ties and not batch_statistics:
            raise ValueError(
                f"model: {where} normalises by batch, so the loss is no sum over examples: call model.eval() first, or "
                "pass batch_statistics=True to take every batch with its own statistics"
            )


def refuse_not_finite(product: Tensor) -> None:
    """Called where the sum over a product is not finite, which is cheap to see; the sum alone may have overflowed."""
    if not product.isfinite().all():
        raise ArithmeticError("the product is not finite: v, the parameters or the data hold NaN or infinity")
