"""The local interaction basis of a network (arXiv 2405.10928): features scaled by what they do to the next layer.

At every cut: whiten the activations (dropping directions that do not vary), turn the whitened directions to the right
singular vectors of the Jacobian to the next cut's features, drop those without effect and scale the others by their
singular values. Built from the last cut backwards, so that neighbouring bases are aligned and interact through few
edges. PCA and neurons are here as the bases to compare with.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locally.checks import check_choice, check_count
from locally.tangent.interaction_basis.folding import Cut, Section, fold
from locally.tangent.interaction_basis.gradients import (
    EdgeFormula,
    Formula,
    Integration,
    Sources,
    integrated_gradients,
    interaction_edges,
    mean_squared_jacobian,
    quadrature,
)
from locally.tangent.interaction_basis.graph import InteractionGraph

Data = Tensor | Iterable
Progress = Callable[[float, str], None]


class Basis(StrEnum):
    """Which features stand at the cuts; chosen by the caller."""

    LIB = "lib"  # the local interaction basis, by the Jacobian to the next cut
    PCA = "pca"  # principal components of the activations
    NEURON = "neuron"  # the activations themselves
    NGF = "ngf"  # naive gradient flow: like lib, but by the Jacobian to the output instead of to the next cut


@dataclass(frozen=True)
class LayerBasis:
    """Features at one cut: fhat = f C with f the activations and a last coordinate 1, and f = fhat C_pinv.

    Attributes:
        layer: name of the cut.
        C, C_pinv: (width, k) and (k, width), C_pinv C = identity. With centring, feature 0 is the constant.
        W, W_pinv: directions that vary, before turning and scaling (for PCA the same as C).
        mean: of the activations, 0 without centring.
        variances: along W, largest first (the constant's stands in front).
        Lambda: eigenvalues of M before small ones are dropped, the second moments of the features; None for bases
            that are not turned.
        fixed: leading features that are kept apart: the constant, and a layer norm's variance behind it.
    """

    layer: str
    C: Float[Tensor, "width k"]
    C_pinv: Float[Tensor, "k width"]
    W: Float[Tensor, "width r"]
    W_pinv: Float[Tensor, "r width"]
    mean: Float[Tensor, " width"]
    variances: Float[Tensor, " r"]
    Lambda: Float[Tensor, " r"] | None
    fixed: int

    @property
    def features(self) -> int:
        """k, the number of features at this cut."""
        return self.C.shape[1]


@dataclass(frozen=True)
class Whitened:
    W: Float[Tensor, "width r"]
    W_pinv: Float[Tensor, "r width"]
    variances: Float[Tensor, " r"]
    fixed: int


class LocalInteractionBasis:
    """Bases for the activations at a network's cuts in which features interact sparsely.

    Args:
        node_layers: where to cut: dotted paths of layers whose inputs are the activations; see `fold` for which models
            and layers, and for names inside a layer norm, an attention or a residual block.
        output: whether the network's output is the last cut.
        basis: "lib", or to compare with "pca", "neuron" (centred if `center`, neither turned nor scaled) or "ngf".
        center: whitening about the mean, with the constant as a feature of its own.
        integration: "gradient" takes the Jacobian at the data, "gauss-legendre" and "trapezoid" average it over
            alpha f for alpha in [0, 1], with `n_intervals` + 1 points.
        n_intervals: at least 0.
        formula: "jacobian", or one of two older forms: "(1-0)*alpha" and "(1-alpha)^2".
        tol: directions with smaller variances or eigenvalues are dropped; "auto" is width * machine epsilon (of the
            dtype in which activations are computed) times the largest, below which float noise lives.
        rotate_output: turn the last cut to its principal directions; otherwise it stays as it is.
        position_sources, feature_sources: draws of random signs in place of sums over output positions and features,
            for long sequences; at least 1, default exact sums.
        batch_size: examples at once, at least 1.
        memory: bytes for blocks of Jacobians, at least 1.
        dtype: of activations and Jacobians; moments and eigenvectors are in float64 anyway.
        random_state: seed of the random signs.

    Attributes:
        chain_: the folded network.
        bases_: name of the cut -> `LayerBasis`, in order.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Cost: two passes for the moments; then for each cut O(N h^2) if the section to the next has a single layer of h
    activations, N Jacobians by formula if it has a single attention, otherwise N backward passes for each feature of
    the next cut; and an eigendecomposition, O(width^3).

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    >>> lib = LocalInteractionBasis(["0", "2", "4"]).fit(net, x)
    >>> lib.bases_["4"].features  # two outputs see two directions, and there is the constant
    3
    >>> features = lib.transform(x, "4")
    >>> torch.allclose((features.T @ features / 500).diag(), lib.bases_["4"].Lambda[:3])
    True
    """

    def __init__(
        self,
        node_layers: Sequence[str],
        *,
        output: bool = True,
        basis: Basis | str = "lib",
        center: bool = True,
        integration: Integration | str = "gradient",
        n_intervals: int = 0,
        formula: Formula | str = "jacobian",
        tol: float | str = "auto",
        rotate_output: bool = False,
        position_sources: int | None = None,
        feature_sources: int | None = None,
        batch_size: int = 512,
        memory: int = 2**24,
        dtype: torch.dtype = torch.float64,
        random_state: int = 0,
    ) -> None:
        if isinstance(node_layers, str) or len(node_layers) < (1 if output else 2):
            raise ValueError(f"node_layers must name {'a cut' if output else 'two cuts'} at least, got {node_layers!r}")
        check_choice("basis", basis, tuple(Basis))
        check_choice("integration", integration, tuple(Integration))
        check_choice("formula", formula, tuple(Formula))
        check_count("n_intervals", n_intervals, at_least=0)
        check_count("batch_size", batch_size)
        check_count("memory", memory)
        check_choice("dtype", dtype, (torch.float32, torch.float64))
        for name, draws in (("position_sources", position_sources), ("feature_sources", feature_sources)):
            if draws is not None:
                check_count(name, draws)
                if Formula(formula) is not Formula.JACOBIAN:
                    raise ValueError(f'{name} goes with formula="jacobian", got "{formula}"')
        if tol != "auto" and (isinstance(tol, str) or not 0 <= tol < float("inf")):
            raise ValueError(f'tol must be "auto" or non-negative and finite, got {tol!r}')
        self.node_layers, self.output = tuple(node_layers), output
        self.basis, self.center = Basis(basis), center
        self.integration, self.n_intervals, self.formula = Integration(integration), n_intervals, Formula(formula)
        self.tol, self.rotate_output = tol, rotate_output
        self.position_sources, self.feature_sources = position_sources, feature_sources
        self.batch_size, self.memory, self.dtype, self.random_state = batch_size, memory, dtype, random_state

    def fit(self, model: nn.Module, data: Data, progress: Progress | None = None) -> "LocalInteractionBasis":
        """Find the bases on data; the model stays as it is.

        Args:
            model: see `fold`.
            data: inputs (N, ...), or something to iterate over again and again, such as a `DataLoader`, that gives
                batches of inputs or tuples that begin with one.
            progress: called with (fraction done, name of the cut).

        Raises:
            ValueError: a layer cannot be folded or a cut is unknown (named by path), activations are not finite.
        """
        self._check_data(data)
        with torch.no_grad():
            example = next(self._batches(data))[:2]
            self.chain_ = fold(model, self.node_layers, example, output=self.output, dtype=self.dtype)
            means, moments = self._moments(data)
            self.bases_: dict[str, LayerBasis] = {}
            cuts = self.chain_.cuts
            for l in reversed(range(len(cuts))):
                if progress is not None:
                    progress((len(cuts) - 1 - l) / len(cuts), cuts[l].name)
                self.bases_[cuts[l].name] = self._basis(l, data, means[l], moments[l])
            self.bases_ = {cut.name: self.bases_[cut.name] for cut in cuts}
            if progress is not None:
                progress(1.0, cuts[0].name)
        return self

    def transform(self, x: Tensor, layer: str) -> Float[Tensor, "n ... k"]:
        """Features of inputs at a cut."""
        l, basis = self._at(layer)
        self._check_data(x)
        with torch.no_grad():
            return self.chain_.advance(self.chain_.start(x), 0, l) @ basis.C.to(self.dtype)

    def inverse_transform(self, features: Float[Tensor, "*n k"], layer: str) -> Float[Tensor, "*n d"]:
        """Activations, without the constant coordinate, that have these features and nothing in dropped directions."""
        l, basis = self._at(layer)
        if features.shape[-1] != basis.features:
            raise ValueError(f"features must have {basis.features} columns at {layer}, got {features.shape[-1]}")
        f = features @ basis.C_pinv.to(features)
        return f[..., :-1] if self.chain_.cuts[l].has_constant else f

    def interaction_graph(
        self, data: Data, *, formula: EdgeFormula | str = "squared", progress: Progress | None = None
    ) -> InteractionGraph:
        """How strongly the features of neighbouring cuts interact on data; points along alpha as in the basis.

        Args:
            data: as for `fit`, from the same distribution.
            formula: "squared", or "functional" of an older form of the method, which can be negative.
            progress: called with (fraction done, name of the cut).
        """
        check_choice("formula", formula, tuple(EdgeFormula))
        self._fitted()
        self._check_data(data)
        cuts, rule = self.chain_.cuts, quadrature(self.integration, self.n_intervals)
        edges = []
        with torch.no_grad():
            for l in range(len(cuts) - 1):
                if progress is not None:
                    progress(l / (len(cuts) - 1), cuts[l].name)
                here, there = self.bases_[cuts[l].name], self._next(l + 1)
                edges.append(
                    interaction_edges(
                        self._section(l),
                        partial(self._activations, data, l),
                        here.C.to(self.dtype),
                        here.C_pinv.to(self.dtype),
                        None if there is None else there.to(self.dtype),
                        rule,
                        EdgeFormula(formula),
                        self.memory,
                    )
                )
        constants = tuple(self.bases_[cut.name].fixed > 0 for cut in cuts)
        return InteractionGraph(tuple(cut.name for cut in cuts), tuple(edges), constants)

    # Steps of the algorithm ------------------------------------------------------------------------------------------

    def _moments(self, data: Data) -> tuple[list[Tensor], list[Tensor]]:
        """Mean of the activations at every cut, and their second moments about it (about 0 without centring)."""
        cuts = self.chain_.cuts
        means = [torch.zeros(cut.width, dtype=torch.float64) for cut in cuts]
        counts = [0] * len(cuts)
        for l, f in self._at_every_cut(data):
            if not f.isfinite().all():
                raise ValueError(f"data: activations at {cuts[l].name} hold NaN or infinity")
            flat = f.flatten(0, -2).double()
            means[l] = means[l].to(f.device) + flat.sum(0)
            counts[l] += len(flat)
        means = [mean / count for mean, count in zip(means, counts)]
        if not self.center:
            means = [torch.zeros_like(mean) for mean in means]
        moments = [torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device) for mean in means]
        for l, f in self._at_every_cut(data):
            flat = f.flatten(0, -2).double() - means[l]
            moments[l] += flat.T @ flat
        return means, [moment / count for moment, count in zip(moments, counts)]

    def _basis(self, l: int, data: Data, mean: Tensor, moment: Tensor) -> LayerBasis:
        cut = self.chain_.cuts[l]
        last = l == len(self.chain_.cuts) - 1
        if (last and not self.rotate_output) or self.basis is Basis.NEURON:
            white = neurons(cut, mean, moment, centred=self.center and not last)
        else:
            white = whiten(cut, mean, moment, centred=self.center, cutoff=self._cutoff)
        if last or self.basis in (Basis.PCA, Basis.NEURON):
            W, W_pinv = white.W, white.W_pinv
            return LayerBasis(cut.name, W, W_pinv, W, W_pinv, mean, white.variances, None, white.fixed)

        # Step B: turn the whitened directions to the right singular vectors of the Jacobian
        R, R_pinv = white.W / white.variances.sqrt(), white.W_pinv * white.variances.sqrt()[:, None]
        M_prime, scale = self._jacobian_moments(l, data)
        eigenvalues, V = masked_eigh(R_pinv @ M_prime @ R_pinv.T, white.fixed)
        # Step C: scale by the effect on the next cut
        if scale is not None:
            eigenvalues = (V.T @ R_pinv @ scale @ R @ V).diag().abs()
            order = eigenvalues[white.fixed :].argsort(descending=True) + white.fixed
            order = torch.cat([torch.arange(white.fixed, device=order.device), order])
            eigenvalues, V = eigenvalues[order], V[:, order]
        keep = eigenvalues > self._cutoff(eigenvalues[white.fixed :])
        keep[: white.fixed] = True
        root = eigenvalues[keep].sqrt()
        root[: white.fixed][root[: white.fixed] == 0] = 1  # a constant without effect stays a feature
        C, C_pinv = R @ V[:, keep] * root, (V[:, keep].T @ R_pinv) / root[:, None]
        return LayerBasis(cut.name, C, C_pinv, white.W, white.W_pinv, mean, white.variances, eigenvalues, white.fixed)

    def _jacobian_moments(self, l: int, data: Data) -> tuple[Tensor, Tensor | None]:
        chain, rule = self.chain_, quadrature(self.integration, self.n_intervals)
        last = len(chain.cuts) - 1
        if self.basis is Basis.NGF:
            section = Section(*(layer for i in range(l, last) for layer in self._section(i)))
            C_next = self._next(last)
        else:
            section, C_next = self._section(l), self._next(l + 1)
        C_next = None if C_next is None else C_next.to(self.dtype)
        batches = partial(self._activations, data, l)
        if self.formula is not Formula.JACOBIAN:
            return integrated_gradients(section, batches, C_next, rule, self.formula)
        sources = None
        if self.position_sources or self.feature_sources:
            generator = torch.Generator().manual_seed(self.random_state + l)
            sources = Sources(self.position_sources, self.feature_sources, generator)
        return mean_squared_jacobian(section, batches, C_next, rule, sources, self.memory), None

    def _cutoff(self, values: Float[Tensor, " r"]) -> float:
        """Below this a variance or an eigenvalue is noise."""
        if not isinstance(self.tol, str):
            return self.tol
        return len(values) * torch.finfo(self.dtype).eps * float(values.max()) if len(values) else 0.0

    # The network -----------------------------------------------------------------------------------------------------

    def _section(self, l: int) -> Section:
        return self.chain_.sections[l]  # type: ignore[return-value]

    def _next(self, l: int) -> Tensor | None:
        """Features at the next cut; None where they are the output itself."""
        cut = self.chain_.cuts[l]
        return None if not cut.has_constant and not self.rotate_output else self.bases_[cut.name].C

    def _at(self, layer: str) -> tuple[int, LayerBasis]:
        self._fitted()
        if layer not in self.bases_:
            raise ValueError(f"layer must be one of {', '.join(self.bases_)}, got {layer!r}")
        return list(self.bases_).index(layer), self.bases_[layer]

    def _fitted(self) -> None:
        if not hasattr(self, "bases_"):
            raise RuntimeError("call fit first")

    # Data ------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _check_data(data: Data) -> None:
        if isinstance(data, Tensor):
            if data.ndim == 0 or len(data) == 0:
                raise ValueError(f"data must hold examples along axis 0, got shape {tuple(data.shape)}")
            if data.is_floating_point() and not data.isfinite().all():
                raise ValueError("data holds NaN or infinity")
        elif not isinstance(data, Iterable) or isinstance(data, Iterator):
            raise TypeError(
                f"data must be a tensor or something to iterate over several times, got {type(data).__name__}"
            )

    def _batches(self, data: Data) -> Iterator[Tensor]:
        if isinstance(data, Tensor):
            yield from data.split(self.batch_size)
            return
        empty = True
        for batch in data:
            empty = False
            yield from (batch if isinstance(batch, Tensor) else batch[0]).split(self.batch_size)
        if empty:
            raise ValueError("data is empty")

    def _activations(self, data: Data, l: int) -> Iterator[Tensor]:
        for x in self._batches(data):
            yield self.chain_.advance(self.chain_.start(x), 0, l)

    def _at_every_cut(self, data: Data) -> Iterator[tuple[int, Tensor]]:
        for x in self._batches(data):
            f = self.chain_.start(x)
            yield 0, f
            for l, section in enumerate(self.chain_.sections):
                f = section(f)
                yield l + 1, f


def whiten(
    cut: Cut,
    mean: Float[Tensor, " width"],
    moment: Float[Tensor, "width width"],
    *,
    centred: bool,
    cutoff: Callable[[Tensor], float],
) -> Whitened:
    """Principal directions that vary; centred, behind the constant, which takes the mean with it."""
    if not centred or not cut.has_constant:
        values, U = masked_eigh(moment, 0)
        keep = values > cutoff(values)
        return Whitened(U[:, keep], U[:, keep].T, values[keep], 0)
    # a layer norm's variance keeps a direction of its own
    alone = [] if cut.variance is None else [cut.variance]
    order = [*alone, *(i for i in range(cut.width - 1) if i not in alone)]
    values, turned = masked_eigh(moment[order][:, order], len(alone))
    U = torch.zeros_like(turned)
    U[order] = turned
    keep = values > cutoff(values)
    fixed = 1 + int(keep[: len(alone)].sum())
    U, values, mu = U[:, keep], values[keep], mean[:-1]
    W = U.new_zeros(cut.width, 1 + U.shape[1])
    W[-1, 0], W[:-1, 1:], W[-1, 1:] = 1, U, -mu @ U
    W_pinv = torch.zeros_like(W.T)
    W_pinv[0, -1], W_pinv[0, :-1], W_pinv[1:, :-1] = 1, mu, U.T
    return Whitened(W, W_pinv, torch.cat([values.new_ones(1), values]), fixed)


def neurons(
    cut: Cut, mean: Float[Tensor, " width"], moment: Float[Tensor, "width width"], *, centred: bool
) -> Whitened:
    """The activations themselves, the constant in front."""
    W = torch.eye(cut.width, dtype=torch.float64, device=mean.device)
    if not cut.has_constant:
        return Whitened(W, W.T.clone(), moment.diag(), 0)
    W_pinv = W.clone()
    if centred:
        W[-1, :-1], W_pinv[-1, :-1] = -mean[:-1], mean[:-1]
    return Whitened(W.roll(1, 1), W_pinv.roll(1, 0), moment.diag().roll(1), 1)


def masked_eigh(matrix: Float[Tensor, "n n"], fixed: int) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Eigenvalues, largest first and round-off below 0 cut away, with the first `fixed` coordinates left alone."""
    inner = matrix[fixed:, fixed:]
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    V = torch.block_diag(torch.eye(fixed, dtype=matrix.dtype, device=matrix.device), vectors.flip(1))
    return torch.cat([matrix.diag()[:fixed], values.flip(0)]).clamp(min=0), V
