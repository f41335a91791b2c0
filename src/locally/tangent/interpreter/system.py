"""The linear system that a network is at one input, as an operator to look at from all sides.

Source: Navarrete Michelini, Liu, Lu & Jiang, arXiv 1908.05168: every unit of the network is frozen at what it does to
this input, and the network is replayed on others.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from functools import partial

import numpy as np
import torch
from jaxtyping import Complex, Float
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigs
from torch import Generator, Tensor, nn
from torch.func import vjp, vmap

from locally.checks import check_choice, check_count, check_positive
from locally.tangent.interpreter.actions import NormMean
from locally.tangent.interpreter.decomposition import SVD, Method, of_dense, singular_images
from locally.tangent.interpreter.locality import local_columns
from locally.tangent.interpreter.replay import Constant, Replay, compile_program
from locally.tangent.interpreter.trace import plain_kernels
from locally.tangent.interpreter.votes import Votes
from locally.tangent.linearization import Linearization

Index = int | Sequence[int]
DENSE_EIGENVALUES = 512  # below this many unknowns the whole spectrum costs less than its leading part


class Mode(StrEnum):
    """Which linear map stands for the network at x; chosen by the caller."""

    SECANT = "secant"  # every nonlinear unit by a linear one with the same effect on x
    TANGENT = "tangent"  # the Jacobian


class LinearInterpreter:
    """N(x) = F x + r at each example x of a batch: F as an operator that is never formed, r the part of all constants.

    Every nonlinear unit is replaced by a linear one with the same effect on x: ReLU by its mask, max-pooling by the
    choice that it made, h with h(0) = 0 by h(z) / z, other h by (h(z) - h(0)) / z and the constant h(0), normalisation
    by the standard deviation that it measured, gates and attention weights by their values. For networks of ReLU, leaky
    ReLU and max-pooling F is the Jacobian; otherwise it is not, and F x + r is the output all the same. mode="tangent"
    takes the Jacobian everywhere and r = N(x) - J x.

    Operations are followed wherever they are written, in modules or in functional calls. Examples are rows of the
    batch and independent of each other. The module is left as it is, and no hook stays on it.

    Args:
        module: called as module(inputs), or module(*inputs) for a tuple; returns one tensor (N, ...).
        inputs: (N, ...), or a tuple of tensors that share N; the first is the variable x, the others are held.
        mode: "secant" (the paper's) or "tangent".
        norm_mean: whether layer, group and instance norms subtract the probe's own mean ("linear") or the mean that
            they measured on x, which makes it a constant ("captured").
        target: dotted path of the submodule whose output is interpreted, e.g. the one before a softmax.
        memory: bytes for intermediate values of products; see `Linearization`.
        check: compare F x + r with N(x), and F with its transpose.
        rtol: largest relative error of these comparisons.

    Attributes:
        output, linear_part, residual: N(x), F x and r, (N, *outputs).
        x: the variable, (N, *shape).
        shape, outputs: of one example.
        constants: where r comes from, in the order of the network; empty for mode="tangent".

    Raises:
        TypeError: the module does not return one tensor.
        ValueError: an argument is out of range; the module is in training mode, random, branches on values, ties
            examples together, or has an operation without a linear action on the way to its output. The message names
            the submodule by its path.
        RuntimeError: F x + r differs from N(x), or F from its transpose, by more than rtol.

    A product with F costs one pass of the network, one with its transpose a backward pass; many at once share the
    captured state.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10))
    >>> scope = LinearInterpreter(net, torch.rand(5, 1, 8, 8))
    >>> torch.allclose(scope.linear_part + scope.residual, net(scope.x), atol=1e-6)
    True
    >>> scope.row(3).shape, scope.column((0, 4, 4)).shape, scope.svd(2).S.shape
    (torch.Size([5, 1, 8, 8]), torch.Size([5, 10]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Tensor | tuple[Tensor, ...],
        *,
        mode: Mode | str = Mode.SECANT,
        norm_mean: NormMean | str = NormMean.LINEAR,
        target: str | None = None,
        memory: int = 2**30,
        check: bool = True,
        rtol: float = 1e-4,
    ) -> None:
        check_choice("mode", mode, tuple(Mode))
        check_choice("norm_mean", norm_mean, tuple(NormMean))
        check_positive("rtol", rtol)
        self.module, self.mode, self.norm_mean, self.target = module, Mode(mode), NormMean(norm_mean), target
        self._weights = [*module.parameters(), *module.buffers()]
        self._versions = [w._version for w in self._weights]
        with plain_kernels():
            tangent = Linearization(module, inputs, target=target, memory=memory)  # refuses what cannot be replayed
        self.x = tangent.point
        self.shape, self.outputs = tuple(self.x.shape[1:]), tangent.outputs
        self.constants: tuple[Constant, ...] = ()
        self._state: tuple[Tensor, ...] = ()
        if self.mode is Mode.TANGENT:
            self.system, self.output = tangent, tangent.value
            self.linear_part = tangent.jvp(self.x)
            self.residual = self.output - self.linear_part
            return
        others = () if isinstance(inputs, Tensor) else tuple(i.detach() for i in inputs[1:])
        one = tuple(i[:1] for i in (self.x, *others))
        self._program = compile_program(module, one, self.norm_mean, target)
        self.constants = self._program.constants
        with torch.no_grad():
            self.output, *state = self._program.capture(self.x, *others)
            self._state = tuple(state)
            self.system = Linearization(Replay(self._program), (self.x, *self._state), memory=memory)
            self.linear_part = self.system.value
            self.residual = self._constants_replayed([1.0] * len(self.constants))
        if check:
            self._check(tangent.value, rtol)

    def __repr__(self) -> str:
        return f"LinearInterpreter({type(self.module).__name__}, {self.shape} -> {self.outputs}, {self.mode})"

    def __call__(self, v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """F v + r, the frozen network on another input: (*stack, N, *shape) to (*stack, N, *outputs)."""
        return self.matvec(v) + self.residual

    # The operator ----------------------------------------------------------------------------------------------------

    def matvec(self, v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """F v for every v of a stack: (*stack, N, *shape) to (*stack, N, *outputs).

        Raises:
            ValueError, TypeError: wrong shape, dtype or device.
            RuntimeError: the module's weights have changed since the system was captured.
        """
        self._check_weights()
        return self.system.jvp(v)

    def rmatvec(self, w: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """F^T w for every w of a stack: (*stack, N, *outputs) to (*stack, N, *shape)."""
        self._check_weights()
        return self.system.vjp(w)

    def column(self, index: Index) -> Float[Tensor, "n ..."]:
        """Response to a unit impulse at one input position, (N, *outputs): for upscaling, the filter that acts there.

        Args:
            index: position in one example, one number for each of its dimensions, or one number into it flattened.
        """
        return self.matvec(self._unit("index", index, self.shape))

    def row(self, index: Index) -> Float[Tensor, "n ..."]:
        """What one output looks at, (N, *shape): its weight on every input."""
        return self.rmatvec(self._unit("index", index, self.outputs))

    def dense(self, max_entries: int = 10**8) -> Float[Tensor, "n ..."]:
        """F itself, (N, *outputs, *shape), from columns or rows, whichever are fewer.

        Raises:
            ValueError: it would hold more than `max_entries` numbers.
        """
        entries = len(self.x) * math.prod(self.outputs) * math.prod(self.shape)
        if entries > max_entries:
            raise ValueError(f"max_entries: F holds {entries} numbers, more than {max_entries}")
        self._check_weights()
        return self.system.jacobian()

    def sparse(self, reach: int, *, example: int = 0, generator: Generator | None = None) -> csr_array:
        """F of one example for a network that looks at most `reach` pixels far, as a sparse matrix.

        Impulses 2 reach + 1 apart do not meet, so (2 reach + 1)^2 products for each input channel give all columns.
        For images (C, H, W) to (D, s H, s W); rows and columns are flattened in order.

        Raises:
            ValueError: the shapes are not those of images, or a product with a random image shows that the network
                looks farther than `reach`.
        """
        check_count("reach", reach, at_least=0)
        if not 0 <= example < len(self.x):
            raise ValueError(f"example must lie in [0, {len(self.x)}), got {example}")

        return local_columns(partial(self._one, example), self.x[example], self.outputs, reach, generator)

    def as_linear_operator(self) -> LinearOperator:
        """F for SciPy, block diagonal over the examples, everything flattened in order."""
        self._check_weights()
        return self.system.scipy()

    # Spectra ---------------------------------------------------------------------------------------------------------

    def svd(
        self,
        k: int,
        *,
        method: Method | str = Method.KRYLOV,
        rtol: float | None = None,
        max_steps: int = 50,
        generator: Generator | None = None,
    ) -> SVD:
        """The k largest singular values of every example's F with their images; see `singular_images`."""
        check_count("k", k)
        most = min(math.prod(self.shape), math.prod(self.outputs))
        if k > most:
            raise ValueError(f"k must be at most {most}, got {k}")
        check_choice("method", method, tuple(Method))
        if Method(method) is Method.DENSE:
            F = self.dense().reshape(len(self.x), math.prod(self.outputs), math.prod(self.shape))
            return of_dense(F, k, self.outputs, self.shape)
        return singular_images(
            self.matvec,
            self.rmatvec,
            (len(self.x), *self.shape),
            self.outputs,
            k,
            like=self.x,
            block=method == Method.KRYLOV,
            rtol=rtol,
            max_steps=max_steps,
            generator=generator,
        )

    def eig(self, k: int) -> tuple[Complex[Tensor, "n k"], Complex[Tensor, "n k ..."]]:
        """The k eigenvalues of largest modulus of every example's F and the eigenimages, for F from a shape to itself.

        Eigenimages have norm 1 and are real and positive where they are largest. ARPACK above 512 unknowns.

        Raises:
            ValueError: inputs and outputs differ in shape, or k is out of range.
        """
        check_count("k", k)
        n = math.prod(self.shape)
        if self.shape != self.outputs:
            raise ValueError(f"module must map a shape to itself for eigenvalues, got {self.shape} to {self.outputs}")
        if k > n:
            raise ValueError(f"k must be at most {n}, got {k}")
        pairs = [self._eigenpairs(i, k) for i in range(len(self.x))]
        values = torch.stack([torch.as_tensor(v) for v, _ in pairs])
        images = torch.stack([torch.as_tensor(V.T.copy()) for _, V in pairs])
        peak = images.gather(-1, images.abs().argmax(-1, keepdim=True))
        images = images * (peak.abs() / peak) / images.norm(dim=-1, keepdim=True)
        return values.to(self.x.device), images.reshape(len(self.x), k, *self.shape).to(self.x.device)

    def _eigenpairs(self, example: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        n = math.prod(self.shape)
        if n <= DENSE_EIGENVALUES or k >= n - 1:
            units = torch.eye(n, dtype=self.x.dtype, device=self.x.device).reshape(n, *self.shape)
            F = self._one(example, units).reshape(n, n).T
            values, vectors = np.linalg.eig(F.cpu().numpy())
        else:
            flat = lambda v: self._one(
                example, torch.as_tensor(v, dtype=self.x.dtype, device=self.x.device).reshape(1, *self.shape)
            )
            product = lambda v: flat(v).reshape(-1).cpu().numpy()
            dtype = torch.empty(0, dtype=self.x.dtype).numpy().dtype
            start = np.ones(n, dtype)  # ARPACK would take a random one
            operator = aslinearoperator(LinearOperator((n, n), matvec=product, dtype=dtype))
            values, vectors = eigs(operator, k=k, which="LM", v0=start)
        order = np.argsort(-np.abs(values), kind="stable")[:k]
        return values[order].astype(complex), vectors[:, order].astype(complex)

    def _one(self, example: int, v: Tensor) -> Tensor:
        """F v of one example for a stack of its inputs; the others get zero."""
        stack = torch.zeros(len(v), *self.x.shape, dtype=v.dtype, device=v.device)
        stack[:, example] = v
        return self.matvec(stack)[:, example]

    # Votes and residuals ---------------------------------------------------------------------------------------------

    def votes(self, target: Index | Tensor | None = None) -> Votes:
        """How every pixel and every constant votes on one output of each example; all votes add up to that output.

        A pixel's vote is its value times its weight, `row(target) * x`. A constant has a vote at each position where
        the network adds it.

        Args:
            target: position in the output of one example; a tensor (N,) of one class for each example, where outputs
                are classes; default the largest output.

        Raises:
            ValueError: target is out of range.
        """
        picked = self._targets(target)
        score = (self.output * picked).flatten(1).sum(1)
        pixels = self.rmatvec(picked) * self.x
        bias = (self.residual * picked).flatten(1).sum(1)
        maps = self._constant_votes(picked)
        return Votes(pixels, bias, score, tuple(zip(self.constants, maps)))

    def residual_by_layer(self) -> dict[str, Float[Tensor, "n ..."]]:
        """What the constants of each submodule contribute to r, by path; they add up to r. One pass for each.

        Raises:
            ValueError: mode="tangent", where r is no sum over constants.
        """
        self._check_secant()
        paths = list(dict.fromkeys(c.path for c in self.constants))
        parts = {}
        for path in paths:
            parts[path] = self._constants_replayed([float(c.path == path) for c in self.constants])
        return parts

    def residual_share(self, *, centred: bool = True) -> Float[Tensor, " n"]:
        """|r| / (|r| + |F x|) of each example, in [0, 1]; `centred` over outputs, for scores that a shift leaves alone.

        0 where both are zero.
        """
        sizes = []
        for part in (self.residual, self.linear_part):
            flat = part.flatten(1)
            sizes.append((flat - flat.mean(1, keepdim=True) if centred else flat).norm(dim=1))
        r, linear = sizes
        return torch.where(r + linear == 0, 0, r / (r + linear).clamp_min(torch.finfo(r.dtype).tiny))

    @torch.no_grad()
    def _constants_replayed(self, scales: Sequence[float]) -> Tensor:
        """R scales: a replay on zero with the constants switched on by these factors."""
        self._check_weights()
        if not self.constants:
            return torch.zeros_like(self.output)
        replay = lambda v, *state: self._program.replay(v[None], state, scales)[0]
        zero = torch.zeros_like(self.x)
        parts = [slice(i, i + self.system.chunk) for i in range(0, len(self.x), self.system.chunk)]
        return torch.cat([vmap(replay)(zero[p], *(s[p] for s in self._state)) for p in parts])

    def _constant_votes(self, picked: Tensor) -> list[Tensor]:
        """For each constant, at each position where it is added, its value times the output's weight on it."""
        self._check_secant()
        if not self.constants:
            return []

        def one(w: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            ones = [torch.ones(c.shape, dtype=self.x.dtype, device=self.x.device) for c in self.constants]
            zero = torch.zeros(1, *self.shape, dtype=self.x.dtype, device=self.x.device)
            pull = vjp(lambda *scales: self._program.replay(zero, state, scales)[0], *ones)[1]
            return tuple(g.squeeze(0) for g in pull(w))  # of the one example, where it still stands apart

        parts = [slice(i, i + self.system.chunk) for i in range(0, len(self.x), self.system.chunk)]
        found = [vmap(one)(picked[p], *(s[p] for s in self._state)) for p in parts]
        return [torch.cat(maps) for maps in zip(*found)]

    # Refusals --------------------------------------------------------------------------------------------------------

    def _check(self, output: Tensor, rtol: float) -> None:
        """The system gives back the output, and its two directions are transposes of each other."""
        error = float((self.linear_part + self.residual - output).norm() / output.norm().clamp_min(1e-30))
        if not error <= rtol:
            raise RuntimeError(
                f"F x + r differs from the module's output by a relative error of {error:.3g}, more than rtol = "
                f"{rtol:g}: the module does something that its trace does not show"
            )
        ahead = self.matvec(self.x)
        weights = torch.linspace(1, 2, output.numel(), dtype=output.dtype, device=output.device).reshape(output.shape)
        products = ahead * weights, self.x * self.rmatvec(weights)
        size = max(float(p.abs().sum()) for p in products)
        gap = abs(float(products[0].sum() - products[1].sum()))
        if not max(gap, float((ahead - self.linear_part).norm())) <= rtol * max(size, 1e-30):
            raise RuntimeError(
                f"products with F and its transpose disagree by {gap:.3g}, more than rtol = {rtol:g} times {size:.3g}: "
                "an operation of the module has a wrong derivative in this version of torch"
            )

    def _check_weights(self) -> None:
        if self._versions != [w._version for w in self._weights]:
            raise RuntimeError("the module's weights have changed since its system was captured: capture it again")

    def _check_secant(self) -> None:
        if self.mode is Mode.TANGENT:
            raise ValueError('mode="tangent" has no constants to attribute r to: use mode="secant"')

    def _unit(self, name: str, index: Index, shape: tuple[int, ...]) -> Tensor:
        unit = torch.zeros(math.prod(shape), dtype=self.x.dtype, device=self.x.device)
        unit[flat_index(name, index, shape)] = 1
        return unit.reshape(1, *shape).expand(len(self.x), *shape)

    def _targets(self, target: Index | Tensor | None) -> Tensor:
        """One-hot over the outputs of each example."""
        if target is None:
            flat = self.output.flatten(1).argmax(1)
        elif isinstance(target, Tensor):
            if target.shape != (len(self.x),) or target.is_floating_point():
                raise ValueError(f"target must be integers of shape ({len(self.x)},), got {tuple(target.shape)}")
            flat = torch.as_tensor([flat_index("target", int(t), self.outputs) for t in target])
        else:
            flat = torch.full((len(self.x),), flat_index("target", target, self.outputs))
        picked = torch.zeros(len(self.x), math.prod(self.outputs), dtype=self.x.dtype, device=self.x.device)
        picked[torch.arange(len(self.x)), flat.to(picked.device)] = 1
        return picked.reshape(self.output.shape)


def flat_index(name: str, index: Index, shape: tuple[int, ...]) -> int:
    bounds = (math.prod(shape),) if isinstance(index, int) else shape
    place = (index,) if isinstance(index, int) else tuple(index)
    if len(place) != len(bounds) or not all(0 <= i < b for i, b in zip(place, bounds)):
        raise ValueError(f"{name} must be a position in {shape}, got {index!r}")
    return int(np.ravel_multi_index(place, bounds)) if bounds else 0
