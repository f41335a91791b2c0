"""Spectra of full and batch curvature matrices of a network, and the sampling noise along their extreme eigenvectors.

Source: arXiv 2006.09092; stochastic Lanczos quadrature as in `locally.linalg.lanczos`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from locally.checks import check_choice, check_count, check_positive
from locally.linalg.curvature import Batch, CurvatureOperator, Data, GaussNewton, Hessian
from locally.linalg.curvature.batches import Batches, Inputs, take
from locally.linalg.lanczos import ExtremeEigenvalues, SpectralMeasure, lanczos, spectral_measure
from locally.optimize.batch_curvature.report import BatchNoise, CurvatureReport, Noise

Loss = Callable[[Tensor, Tensor], Tensor]
MATRICES: dict[str, type[Hessian] | type[GaussNewton]] = {"hessian": Hessian, "gauss-newton": GaussNewton}


@dataclass(frozen=True)
class BatchExtremes:
    """Extreme eigenvalues of the matrices of random batches, one entry a batch.

    Attributes:
        spectrum: quadrature of the mean spectrum of the batches, from one probe in each.
        batches: rows of the indices of the examples in each batch.
    """

    largest: Float[Tensor, " draws"]
    smallest: Float[Tensor, " draws"]
    spectrum: SpectralMeasure
    batches: Int[Tensor, "draws batch_size"]


@dataclass(frozen=True, kw_only=True)
class BatchCurvature:
    """Measures the curvature of a loss as all the data and as random batches of them show it.

    Args:
        matrix: "hessian" or "gauss-newton".
        steps, probes: of the Lanczos quadrature of the spectrum.
        outliers: eigenvectors of the largest eigenvalues among which the noise is resolved, >= 1; as many as the data
            have classes, usually.
        noise_examples: examples whose own matrices are applied for the noise, >= 2; None takes all. 200 give the noise
            to 5 or 10 %.
        rtol, max_products: for the extreme eigenpairs.
        random_state: seed of probes and samples.
        options: keyword arguments of the curvature operators (parameters, chunk, memory).

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    matrix: str = "hessian"
    steps: int = 60
    probes: int = 4
    outliers: int = 10
    noise_examples: int | None = 200
    rtol: float = 1e-3
    max_products: int = 500
    random_state: int = 0
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_choice("matrix", self.matrix, tuple(MATRICES))
        check_count("steps", self.steps)
        check_count("probes", self.probes)
        if self.noise_examples is not None:
            check_count("noise_examples", self.noise_examples, at_least=2)
        check_count("outliers", self.outliers)
        check_positive("rtol", self.rtol, below=1)
        check_count("max_products", self.max_products, at_least=self.outliers + 1)
        check_count("random_state", self.random_state, at_least=0)

    def operator(self, model: nn.Module, loss: Loss, data: Data) -> CurvatureOperator:
        """The matrix of this model on these data, as the operator that all measurements use."""
        return MATRICES[self.matrix](model, loss, data, **(self.options or {}))

    def measure(
        self,
        model: nn.Module,
        loss: Loss,
        data: Data,
        *,
        callback: Callable[[str, int], None] | None = None,
    ) -> CurvatureReport:
        """Spectrum, extreme eigenvalues and sampling noise at the model's present parameters.

        Costs `steps` * `probes` products for the spectrum, some tens for its ends, and about 4 gradients of an example
        for each of `noise_examples` and each of `outliers` + 3 directions.

        Args:
            model: without dropout or batch norm in training mode, see `CurvatureOperator`.
            loss: mean over examples of a term for each.
            data: one batch (inputs, targets), or a list or loader of batches that does not shuffle.
            callback: called with the name of the phase and the products that it has taken so far.

        Raises:
            ValueError, TypeError: the model or the data cannot be used.
            ArithmeticError: the curvature is not finite.
        """
        op = self.operator(model, loss, data)
        examples = sum(len(targets) for _, targets in op.batches)
        if examples < 2:
            raise ValueError("data holds a single example, which leaves no sampling noise to measure")
        tell = callback or (lambda phase, products: None)
        generator = torch.Generator(op.device).manual_seed(self.random_state)
        spectrum = spectral_measure(
            op,
            steps=self.steps,
            probes=self.probes,
            generator=generator,
            callback=lambda done, _: tell("spectrum", done),
        )
        ends = self._method(op.shape[0]).solve(
            op, generator=generator, callback=lambda done, _: tell("extreme eigenvalues", done)
        )
        noise = self._noise(op, model, loss, ends.vectors, examples, generator, tell)
        return CurvatureReport(
            matrix=self.matrix,
            n_parameters=op.shape[0],
            n_examples=examples,
            outliers=tuple(ends.values[:-1].tolist()),
            smallest=float(ends.values[-1]),
            status=ends.status,
            spectrum=spectrum,
            noise=noise,
        )

    def batch_extremes(
        self, model: nn.Module, loss: Loss, data: Batch, batch_size: int, *, draws: int = 10, at_once: int | None = None
    ) -> BatchExtremes:
        """Extreme eigenvalues of `draws` batches of examples drawn without replacement.

        Small batches of a small network go through Lanczos in one stack, each with the matrix of its own; large ones
        follow each other.

        Args:
            data: all examples as one batch (inputs, targets).
            batch_size: in [1, number of examples].
            at_once: batches in one stack; default as many as 2^28 bytes of basis allow, at most 64.
        """
        check_count("batch_size", batch_size)
        check_count("draws", draws)
        examples = len(data[1])
        if batch_size > examples:
            raise ValueError(f"batch_size must be at most the {examples} examples of data, got {batch_size}")
        op = self.operator(model, loss, data)
        generator = torch.Generator().manual_seed(self.random_state)
        rows = torch.stack([torch.randperm(examples, generator=generator)[:batch_size] for _ in range(draws)])
        steps = min(self.steps, op.shape[0])
        if at_once is None:
            at_once = min(64, max(1, 2**28 // (steps * op.shape[0] * op.dtype.itemsize)))
        seen = []
        for some in rows.to(op.device).split(at_once):
            product = op.stacked((take(data[0], lambda t, s=some: t[s]), data[1][some]))  # type: ignore[misc]
            start = torch.randn(len(some), op.shape[0], generator=generator, dtype=op.dtype).to(op.device)
            seen.append(lanczos(product, start, steps).quadrature())
        nodes, weights, taken = (torch.cat([getattr(m, name) for m in seen]) for name in ("nodes", "weights", "steps"))
        # what pads an exhausted space is no eigenvalue
        real = (taken == steps)[:, None] | (weights > 0)
        largest = nodes.masked_fill(~real, -math.inf).amax(1)
        smallest = nodes.masked_fill(~real, math.inf).amin(1)
        return BatchExtremes(largest, smallest, SpectralMeasure(nodes, weights, taken, op.shape[0]), rows)

    def _method(self, parameters: int) -> ExtremeEigenvalues:
        outliers = max(1, min(self.outliers, parameters - 1))
        return ExtremeEigenvalues(largest=outliers, smallest=1, rtol=self.rtol, max_products=self.max_products)

    def _noise(
        self,
        op: CurvatureOperator,
        model: nn.Module,
        loss: Loss,
        ends: Float[Tensor, "_ p"],
        examples: int,
        generator: Generator,
        tell: Callable[[str, int], None],
    ) -> BatchNoise:
        """Scatter over examples of H_i v, for v the extreme eigenvectors and two random ones."""
        if self.noise_examples is not None and self.noise_examples < examples:
            chosen = torch.randperm(examples, generator=torch.Generator().manual_seed(self.random_state))
            sample = pick_examples(op.batches, chosen[: self.noise_examples].sort().values)
            op = self.operator(model, loss, sample)
        U = ends[:-1]
        columns = []
        for i, u in enumerate(U):
            columns.append(torch.cat([rows @ U.T for rows in op.per_example_blocks(u)]).double())
            tell("sampling noise", i + 1)
        blocks = torch.stack(columns, 2).cpu()
        blocks = blocks - blocks.mean(0)
        n = len(blocks)
        top, bottom = sampling_noise(op, U[0]), sampling_noise(op, ends[-1])
        tell("sampling noise", len(ends) + 1)
        # E ||D z||^2 = ||D||_F^2 = P^2 sigma^2 for z ~ N(0, I)
        random = torch.randn(2, op.shape[0], dtype=op.dtype, device=op.device, generator=generator)
        entry_variance = sum(sampling_noise(op, z).total for z in random) / 2 / op.shape[0] ** 2
        tell("sampling noise", len(ends) + 3)
        inside = float(blocks[:, :, 0].square().sum()) / (n - 1)
        return BatchNoise(entry_variance, top, bottom, (blocks + blocks.mT) / 2, max(top.total - inside, 0.0))


def sampling_noise(op: CurvatureOperator, v: Float[Tensor, " p"]) -> Noise:
    """How the examples' own products with v scatter about their mean: E ||D v||^2 and E (v^T D v)^2.

    Unbiased (divided by n - 1), so that a mean over B of N examples has 1/B - 1/N of it as its variance.
    """
    mean = op(v)
    totals, along = [], []
    for rows in op.per_example_blocks(v):
        scatter = rows - mean
        totals.append(scatter.square().sum(1))
        along.append((scatter @ v).square())
    each = torch.cat(totals).double()
    n = len(each)
    if n < 2:
        raise ValueError("op has a single example, which leaves no sampling noise to measure")
    stderr = float(each.std()) / math.sqrt(n)
    return Noise(float(each.sum()) / (n - 1), float(torch.cat(along).double().sum()) / (n - 1), stderr)


def pick_examples(batches: Batches, chosen: Int[Tensor, " k"]) -> Batch:
    """The examples at ascending indices `chosen` of all batches, as one batch."""
    picked: list[Batch] = []
    for start, (inputs, targets) in _numbered(batches):
        at = chosen[(chosen >= start) & (chosen < start + len(targets))] - start
        if len(at):
            rows = at.to(targets.device)
            picked.append((take(inputs, lambda t, r=rows: t[r]), targets[rows]))  # type: ignore[misc]
    return join([inputs for inputs, _ in picked]), torch.cat([targets for _, targets in picked])


def join(several: list[Any]) -> Inputs:
    """One behind the other: tensors, or tuples or dicts of them."""
    first = several[0]
    if isinstance(first, dict):
        return {name: torch.cat([each[name] for each in several]) for name in first}
    if isinstance(first, Tensor):
        return torch.cat(several)
    return tuple(torch.cat(column) for column in zip(*several))


def _numbered(batches: Batches) -> Iterator[tuple[int, Batch]]:
    start = 0
    for batch in batches:
        yield start, batch
        start += len(batch[1])
