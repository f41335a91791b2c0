"""Products with the Jacobian of a module at a point, many vectors at once, in chunks that fit a memory budget."""

import math
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from locally.checks import check_choice, check_count, check_finite
from locally.tangent.linearization.passes import (
    Product,
    call_with,
    first_line,
    hazard,
    pull_back,
    tapped,
    watched,
)
from locally.tangent.linearization.refusals import check_inputs, refuse_random_modules, select_parameters

T = TypeVar("T")

# Bytes of a linearised chunk, and of one product with it, over those that a plain backward pass saves.
LINEARISED, PER_VECTOR = 2, 2


class Wrt(StrEnum):
    """What a `Linearization` differentiates with respect to; chosen by the caller."""

    INPUTS = "inputs"  # the first input
    PARAMETERS = "parameters"  # all together, flat
    ACTIVATIONS = "activations"  # the output of a submodule, `source`


class Linearization:
    """J, the derivative of a module's output at a point, as an operator on many vectors at once.

    Examples are the rows of the batch and independent of each other, so that for inputs and activations J is block
    diagonal over them; parameters are shared and J stacks one block of rows for each example. Buffers and parameters
    stay as they are, and no hook is left behind.

    Args:
        module: called as module(inputs), or module(*inputs) for a tuple; must return one tensor (N, ...).
        inputs: a tensor (N, ...), or a tuple of tensors that share N. With wrt="inputs" the first is the variable.
        wrt: "inputs", "parameters" or "activations".
        source: dotted path of the submodule whose output is the variable, for wrt="activations". What reaches the
            target on another way, such as a skip connection, is held at its value.
        target: dotted path of the submodule whose output is differentiated; default the module's own.
        at: the value of the variable, where it is not the one that `inputs` and the module lead to: same shape.
        parameters: names as in `module.named_parameters()`; default all that require a gradient. Their flat order is
            that of `torch.nn.utils.parameters_to_vector`.
        memory: bytes for intermediate values, > 0; results come on top. An estimate from what a backward pass saves.
        chunk: examples at once; default as many as `memory` allows.

    Attributes:
        point: where the module is linearised, (N, *shape), or (P,) for parameters.
        value: the output there, (N, *outputs).
        outputs: shape of the output of one example.
        chunk: examples at once.
        per_example: bytes that a backward pass saves for one example.

    Raises:
        TypeError: the module does not return one tensor, or an argument has the wrong type.
        ValueError: an argument is out of range or names no submodule; `memory` cannot hold one example and one vector;
            the module has no derivative of its own (dropout or batch norm in training mode, randomness, examples that
            depend on each other, changes in place, branches on values): the message names the submodule by its path.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> J = Linearization(net, torch.ones(5, 3))
    >>> J.value.shape, J.jvp(torch.ones(7, 5, 3)).shape, J.vjp(torch.ones(5, 2)).shape
    (torch.Size([5, 2]), torch.Size([7, 5, 2]), torch.Size([5, 3]))
    >>> torch.allclose(J.taylor(J.point), J.value)
    True
    >>> Linearization(net, torch.ones(5, 3), wrt="parameters").jacobian().shape
    torch.Size([5, 2, 26])
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Tensor | tuple[Tensor, ...],
        *,
        wrt: Wrt | str = Wrt.INPUTS,
        source: str | None = None,
        target: str | None = None,
        at: Tensor | None = None,
        parameters: Sequence[str] | None = None,
        memory: int = 2**30,
        chunk: int | None = None,
    ) -> None:
        check_choice("wrt", wrt, tuple(Wrt))
        check_count("memory", memory)
        if chunk is not None:
            check_count("chunk", chunk)
        self.module, self.wrt, self.memory = module, Wrt(wrt), memory
        self.source, self.target = source, target
        self._inputs = check_inputs(inputs)
        self._check_paths()
        refuse_random_modules(module)
        self.names = select_parameters(module, parameters) if self.wrt is Wrt.PARAMETERS else ()
        if parameters is not None and self.wrt is not Wrt.PARAMETERS:
            raise ValueError(f'parameters are for wrt="parameters", got wrt="{self.wrt}"')
        with torch.no_grad():
            self.point = self._start(at)
            self._check_derivative()
            self.chunk = self._examples_at_once(chunk)
            self.value = torch.cat([self._work(partial(self._outputs, p, x), p) for p, x in self._chunks()])
        self.outputs = tuple(self.value.shape[1:])

    def jvp(self, v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """J v for every v of a stack: (*stack, *point.shape) to (*stack, N, *outputs).

        One forward pass a chunk for all vectors, and about one more for each vector.

        Raises:
            ValueError, TypeError: v has the wrong shape, dtype or device.
        """
        stack = self._check_vectors("v", v, tuple(self.point.shape))
        parts = []
        for (point, inputs), v_chunk in zip(self._chunks(), self._split(v.reshape(-1, *self.point.shape))):
            push = partial(self._push, partial(self._outputs, inputs=inputs), point)
            parts.append(self._apply(push, v_chunk, point, len(inputs[0])))
        return torch.cat(parts, dim=1).reshape(*stack, *self.value.shape)

    def vjp(self, u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """J^T u for every u of a stack: (*stack, N, *outputs) to (*stack, *point.shape).

        For parameters the sum over examples. One forward pass a chunk, and about two more for each vector.

        Raises:
            ValueError, TypeError: u has the wrong shape, dtype or device.
        """
        stack = self._check_vectors("u", u, tuple(self.value.shape))
        u = u.reshape(-1, *self.value.shape)
        parts, start = [], 0
        for point, inputs in self._chunks():
            n = len(inputs[0])
            pull = self._work(partial(pull_back, partial(self._outputs, inputs=inputs), point), point)
            parts.append(self._apply(pull, u[:, start : start + n], point, n))
            del pull  # frees one chunk's graph before the next is recorded
            start += n
        if self.wrt is Wrt.PARAMETERS:
            return torch.stack(parts).sum(0).reshape(*stack, *self.point.shape)
        return torch.cat(parts, dim=1).reshape(*stack, *self.point.shape)

    def jacobian(self) -> Float[Tensor, "n ..."]:
        """Every example's own Jacobian, (N, *outputs, *shape) or (N, *outputs, P): K backward passes or D forward ones.

        Takes the mode with fewer passes; the result holds N K D numbers.
        """
        return torch.cat([block for _, block in self.jacobian_blocks()])

    def jacobian_blocks(self) -> Iterator[tuple[slice, Float[Tensor, "_ ..."]]]:
        """`jacobian` a block of examples at a time, each block within the memory budget."""
        if self.wrt is Wrt.PARAMETERS:
            yield from self._parameter_blocks()
            return
        k, shape = math.prod(self.outputs), tuple(self.point.shape[1:])
        d = math.prod(shape)
        start = 0
        for point, inputs in self._chunks():
            n = len(inputs[0])
            function = partial(self._outputs, inputs=inputs)
            if k <= d:  # one unit vector for all examples at once, since they are independent
                units = torch.eye(k, dtype=point.dtype, device=point.device).reshape(k, 1, *self.outputs)
                pull = self._work(partial(pull_back, function, point), point)
                rows = self._apply(pull, units.expand(k, n, *self.outputs), point, n)
            else:
                units = torch.eye(d, dtype=point.dtype, device=point.device).reshape(d, 1, *shape)
                rows = self._apply(partial(self._push, function, point), units.expand(d, n, *shape), point, n)
                rows = rows.reshape(d, n, k).permute(2, 1, 0)
            yield slice(start, start + n), rows.reshape(k, n, d).transpose(0, 1).reshape(n, *self.outputs, *shape)
            start += n

    def taylor(self, point: Float[Tensor, "..."]) -> Float[Tensor, "n ..."]:
        """First-order value elsewhere, value + J (point - self.point)."""
        self._check_vectors("point", point, tuple(self.point.shape), stacks=False)
        return self.value + self.jvp(point - self.point)

    def scipy(self) -> LinearOperator:
        """J for SciPy, (N K) x (N D) or (N K) x P with everything flattened in order; NumPy in, NumPy out."""
        return _AsScipy(self)

    # The function that is linearised -------------------------------------------------------------------------------

    def _outputs(self, point: Tensor, inputs: tuple[Tensor, ...]) -> Any:
        """The target's output with the variable at `point` and everything else as it is."""
        values = {n: p.detach() for n, p in self.module.named_parameters()}
        values |= {n: b.clone() for n, b in self.module.named_buffers()}
        put = point if self.wrt is Wrt.ACTIVATIONS else None
        if self.wrt is Wrt.PARAMETERS:
            own = [values[name] for name in self.names]
            pieces = point.split([p.numel() for p in own])  # one split: its pull-back is a single concatenation
            values |= {name: piece.view(p.shape) for name, piece, p in zip(self.names, pieces, own)}
        elif self.wrt is Wrt.INPUTS:
            inputs = (point, *inputs[1:])
        with tapped(self.module, self.source, put, self.target) as seen:
            # a module that changes its input in place must not reach the caller's tensors
            out = call_with(self.module, values, tuple(x.clone() for x in inputs))
        return seen[0] if self.target is not None else out

    def _start(self, at: Tensor | None) -> Tensor:
        match self.wrt:
            case Wrt.PARAMETERS:
                own = dict(self.module.named_parameters())
                here = torch.cat([own[name].detach().reshape(-1) for name in self.names])
            case Wrt.INPUTS:
                here = self._inputs[0]
            case Wrt.ACTIVATIONS:
                with tapped(self.module, None, None, self.source) as seen:
                    self.module(*(x.clone() for x in self._inputs))
                here = self._tensor(seen[0], f"submodule {self.source}")
        if at is not None:
            if at.shape != here.shape or at.dtype != here.dtype or at.device != here.device:
                raise ValueError(
                    f"at must be {here.dtype} of shape {tuple(here.shape)} on {here.device}, got {at.dtype} of shape "
                    f"{tuple(at.shape)} on {at.device}"
                )
            here = at
        if not here.is_floating_point():
            raise TypeError(f'wrt="{self.wrt}": the variable must be floating point, got {here.dtype}')
        check_finite("the point of linearisation", here)
        return here.detach().clone()

    @staticmethod
    def _tensor(value: object, what: str) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} must return a tensor, got {type(value).__name__}: wrap it to return one")
        return value

    def _push(self, function: Product, point: Tensor, v: Tensor) -> Tensor:
        """J v by forward mode; where an operation lacks it, by differentiating the linear map u -> J^T u."""
        try:
            return jvp(function, (point,), (v,))[1]
        except NotImplementedError:
            value, pull = vjp(function, point)[:2]
            return pull_back(lambda u: pull(u)[0], torch.zeros_like(value))(v)

    def _parameter_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        k, p = math.prod(self.outputs), self.point.numel()
        per_row = 2 * p * self.point.element_size() + PER_VECTOR * self.per_example
        per_example = LINEARISED * self.per_example + k * per_row
        if per_example > self.memory:
            raise ValueError(
                f"memory: {self.memory} bytes do not hold the Jacobian of one example ({k} x {p}), which needs about "
                f"{math.ceil(per_example)}: raise it, or use jvp and vjp"
            )
        units = torch.eye(k, dtype=self.point.dtype, device=self.point.device).reshape(k, *self.outputs)

        def rows(*example: Tensor) -> Tensor:
            one = tuple(x[None] for x in example)
            return vmap(pull_back(lambda point: self._outputs(point, one)[0], self.point))(units)

        n, size = len(self._inputs[0]), min(self.chunk, int(self.memory / per_example))
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            inputs = tuple(x[part] for x in self._inputs)
            block = self._work(partial(vmap(rows), *inputs), self.point)
            yield part, block.reshape(len(inputs[0]), *self.outputs, p)

    # Chunks ----------------------------------------------------------------------------------------------------------

    def _chunks(self) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        for start in range(0, len(self._inputs[0]), self.chunk):
            part = slice(start, start + self.chunk)
            point = self.point if self.wrt is Wrt.PARAMETERS else self.point[part]
            yield point, tuple(x[part] for x in self._inputs)

    def _split(self, v: Tensor) -> Iterator[Tensor]:
        """A stack of vectors as each chunk of examples sees it."""
        if self.wrt is Wrt.PARAMETERS:
            return iter([v] * math.ceil(len(self._inputs[0]) / self.chunk))
        return iter(v.split(self.chunk, dim=1))

    def _apply(self, product: Product, vectors: Tensor, point: Tensor, examples: int) -> Tensor:
        free = self.memory - LINEARISED * self.per_example * examples
        count = max(1, int(free / (PER_VECTOR * self.per_example * examples + self._per_vector)))
        return torch.cat([self._work(partial(vmap(product), part), point) for part in vectors.split(count)])

    def _examples_at_once(self, chunk: int | None) -> int:
        """Sizes are what a backward pass saves for two examples less what it saves for one, and the vector itself."""
        sizes = [self._saved(min(copies, len(self._inputs[0]))) for copies in (1, 2)]
        n = len(self._inputs[0])
        item = self.point.element_size()
        own = self.point.numel() if self.wrt is Wrt.PARAMETERS else self.point[0].numel()
        self.per_example = max(sizes[1] - sizes[0] if n > 1 else sizes[0], item, *([own * item] * self._is_local))
        self._per_vector = 0 if self._is_local else 2 * own * item
        least = (LINEARISED + PER_VECTOR) * self.per_example + self._per_vector
        if least > self.memory:
            raise ValueError(
                f"memory: {self.memory} bytes do not hold one example and one vector, which need about "
                f"{math.ceil(least)}"
            )
        fits = int((self.memory - self._per_vector) / ((LINEARISED + PER_VECTOR) * self.per_example))
        return min(n, fits if chunk is None else min(chunk, fits))

    @property
    def _is_local(self) -> bool:
        return self.wrt is not Wrt.PARAMETERS

    def _saved(self, examples: int) -> int:
        inputs = tuple(x[:examples] for x in self._inputs)
        point = (self.point[:examples] if self._is_local else self.point).clone().requires_grad_()
        own = {p.data_ptr() for p in self.module.parameters()}
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += 0 if tensor.data_ptr() in own else tensor.numel() * tensor.element_size()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            self._work(partial(self._outputs, point, inputs), point)
        return saved

    # Refusals --------------------------------------------------------------------------------------------------------

    def _check_paths(self) -> None:
        if (self.source is not None) != (self.wrt is Wrt.ACTIVATIONS):
            raise ValueError(
                f'source names the variable of wrt="activations", got wrt="{self.wrt}" and {self.source!r}'
            )
        known = dict(self.module.named_modules())
        for name, path in (("source", self.source), ("target", self.target)):
            if path is not None and path not in known:
                raise ValueError(f"{name}: the module has no submodule {path!r}")

    def _check_vectors(self, name: str, v: Tensor, shape: tuple[int, ...], stacks: bool = True) -> tuple[int, ...]:
        extra = v.ndim - len(shape)
        if extra < 0 or (extra and not stacks) or tuple(v.shape[extra:]) != shape or v.numel() == 0:
            raise ValueError(
                f"{name} must have shape {'(*stack, ' if stacks else '('}{str(shape)[1:]}, got {tuple(v.shape)}"
            )
        if v.dtype != self.point.dtype or v.device != self.point.device:
            raise TypeError(f"{name} must be {self.point.dtype} on {self.point.device}, got {v.dtype} on {v.device}")
        return tuple(v.shape[:extra])

    def _check_derivative(self) -> None:
        """On two examples: the output is one tensor, the same again, and the same for each example by itself."""
        inputs = tuple(x[:2] for x in self._inputs)
        point = self.point[:2] if self._is_local else self.point
        out = self._work(partial(self._outputs, point, inputs), point)
        self._tensor(out, "the module" if self.target is None else f"submodule {self.target}")
        n = len(inputs[0])
        if out.ndim == 0 or len(out) != n:
            raise ValueError(f"module must return one row for each of {n} examples, got shape {tuple(out.shape)}")
        if not out.isfinite().all():
            raise ValueError("module: the output is not finite at the point of linearisation")
        close = partial(torch.allclose, rtol=1e-3, atol=1e-5 * max(1.0, float(out.abs().max())))
        if not close(out, self._outputs(point, inputs)):
            path = self._first_difference(partial(self._outputs, point, inputs), partial(self._outputs, point, inputs))
            raise ValueError(f"module: two calls differ, beginning at {path}; switch off what is random in it")

        def single(p: Tensor, *example: Tensor) -> Tensor:
            return self._outputs(p[None] if self._is_local else p, tuple(x[None] for x in example))[0]

        each = vmap(single, in_dims=(0 if self._is_local else None, *[0] * len(inputs)))
        apart = self._work(partial(each, point, *inputs), point)
        if not close(out, apart):
            halves = lambda i: self._outputs(
                point[i : i + 1] if self._is_local else point, tuple(x[i : i + 1] for x in inputs)
            )
            path = self._first_difference(partial(self._outputs, point, inputs), lambda: halves(0))
            raise ValueError(f"module: the examples of a batch depend on each other, beginning at {path}")

    def _first_difference(self, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> str:
        """Path of the first submodule whose output for the first example differs between two passes."""
        trails = []
        for work in (one, other):
            with watched(self.module) as trail:
                work()
            trails.append(trail.outputs)
        for (path, a), (_, b) in zip(*trails):
            if a.shape == b.shape and not torch.allclose(a, b, rtol=1e-3, atol=1e-5):
                return path
        return "the module itself"

    def _work(self, work: Callable[[], T], point: Tensor) -> T:
        """Run; if torch refuses, run again under watch to find where, and say it with the submodule's path."""
        with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel that every mode goes through
            try:
                return work()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                with watched(self.module) as trail:
                    try:
                        return work()
                    except RuntimeError:
                        raise ValueError(f"module: {hazard(error)} at {trail.where}: {first_line(error)}") from error


class _AsScipy(LinearOperator):
    def __init__(self, J: Linearization) -> None:
        self._J = J
        shape = (J.value.numel(), J.point.numel())
        super().__init__(dtype=torch.empty(0, dtype=J.point.dtype).numpy().dtype, shape=shape)

    def _product(self, product: Product, X: Any, rows: torch.Size) -> Any:
        stack = torch.as_tensor(X.T.copy(), dtype=self._J.point.dtype, device=self._J.point.device)
        return product(stack.reshape(-1, *rows)).flatten(1).T.cpu().numpy()

    def _matmat(self, X: Any) -> Any:
        return self._product(self._J.jvp, X, self._J.point.shape)

    def _rmatmat(self, X: Any) -> Any:
        return self._product(self._J.vjp, X, self._J.value.shape)

    def _matvec(self, x: Any) -> Any:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _rmatvec(self, x: Any) -> Any:
        return self._rmatmat(x.reshape(-1, 1))[:, 0]
