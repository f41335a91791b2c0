"""How faithful an explanation is to f in a neighbourhood, and a ranking of the methods there.

The measure is the expected loss of the fitted g on fresh perturbations, in any neighbourhood, not only in its own.
Source: Han, Srinivas, Lakkaraju, arXiv 2206.01254, sections 4 and 5 (no free lunch, guiding principle).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from locally.checks import check_choice
from locally.tangent.explanation.approximation import FLOOR, LFA, Explanation, Loss, as_baseline, draw_seed, take_draws
from locally.tangent.explanation.black_box import BlackBox, Gradient, Output, Points, Target
from locally.tangent.explanation.interpretable import LinearModel
from locally.tangent.explanation.masks import BinaryMask
from locally.tangent.explanation.methods import Method, local_approximation
from locally.tangent.explanation.neighbourhoods import (
    Draws,
    GaussianNoise,
    MultiplicativeNeighbourhood,
    Neighbourhood,
    ScaleNoise,
)


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Expected losses of several explanations in several neighbourhoods.

    Attributes:
        explanations, neighbourhoods: names of the rows and columns.
        losses: for every explanation, neighbourhood and point. Low is faithful; 0 means that g and f agree.
    """

    explanations: tuple[str, ...]
    neighbourhoods: tuple[str, ...]
    losses: Float[Tensor, "explanations neighbourhoods batch"]

    def mean(self) -> Float[Tensor, "explanations neighbourhoods"]:
        """Mean over the points."""
        return self.losses.mean(2)

    def std_error(self) -> Float[Tensor, "explanations neighbourhoods"]:
        """Standard error of that mean over the points; NaN for a single point."""
        if self.losses.shape[2] < 2:
            return torch.full_like(self.losses[..., 0], torch.nan)
        return self.losses.std(2) / self.losses.shape[2] ** 0.5

    def best(self, neighbourhood: str) -> str:
        """The most faithful explanation in a neighbourhood."""
        column = self.neighbourhoods.index(neighbourhood)
        return self.explanations[int(self.mean()[:, column].argmin())]

    def __str__(self) -> str:
        width = max(map(len, self.explanations))
        columns = [max(9, len(n)) for n in self.neighbourhoods]
        header = " " * width + "".join(f"  {n:>{c}}" for n, c in zip(self.neighbourhoods, columns, strict=True))
        rows = [
            f"{name:<{width}}" + "".join(f"  {v:>{c}.3g}" for v, c in zip(row, columns, strict=True))
            for name, row in zip(self.explanations, self.mean().tolist(), strict=True)
        ]
        return "\n".join([header, *rows])


def expected_loss(
    f: Callable[[Any], Any],
    X: Points,
    explanation: Explanation,
    neighbourhood: Neighbourhood | None = None,
    **options: Any,
) -> Float[Tensor, " batch"]:
    """Loss of one explanation on fresh perturbations, by default of its own neighbourhood: fidelity on held-out draws.

    Options are those of `faithfulness`, with intercept="own" by default.

    >>> from locally.tangent.explanation import explain
    >>> f = lambda x: x[:, 0] - 3 * x[:, 1]
    >>> X = torch.tensor([[1.0, 2.0]])
    >>> bool(expected_loss(f, X, explain(f, X, "lime")).max() < 1e-10)
    True
    """
    options = {"intercept": "own"} | options
    where = explanation.neighbourhood if neighbourhood is None else neighbourhood
    return faithfulness(f, X, {"g": explanation}, {"Z": where}, **options).losses[0, 0]


def faithfulness(
    f: Callable[[Any], Any],
    X: Points,
    explanations: Mapping[str, Explanation],
    neighbourhoods: Mapping[str, Neighbourhood],
    *,
    baseline: float | Sequence[float] | ndarray | Tensor = 0.0,
    loss: Loss | str = Loss.SQUARED,
    intercept: Literal["optimal", "own"] = "optimal",
    n_samples: int = 1000,
    exact: bool | Literal["auto"] = "auto",
    target: Target = None,
    grad: Gradient = None,
    output: Output | str = Output.IDENTITY,
    input_shape: Sequence[int] | None = None,
    batch_size: int = 2**16,
    n_jobs: int = 1,
    floor: float = FLOOR,
    generator: torch.Generator | None = None,
) -> Faithfulness:
    """Expected loss of every explanation in every neighbourhood, all of them on the same perturbations.

    Args:
        f, X, target, grad, output, input_shape, batch_size, n_jobs: see `BlackBox`.
        explanations: of the points X.
        neighbourhoods: where to test them.
        baseline: of the test neighbourhoods, as in `LFA.explain`.
        loss: "squared" or "gradient".
        intercept: with a squared error, "optimal" compares slopes alone (each linear g gets the intercept that suits
            the neighbourhood), "own" takes g as fitted.
        n_samples, exact: perturbations a point, as in `LFA`.
        floor: see `Explanation.predict_at`.
        generator: use one that has moved on since the fits, and the perturbations are fresh.

    Raises:
        ValueError: an explanation is not of the points X, or an argument is out of range.

    Complexity: n_samples evaluations of f for each point and neighbourhood, however many explanations there are.
    """
    check_choice("loss", str(loss), (str(Loss.SQUARED), str(Loss.GRADIENT)))
    check_choice("intercept", intercept, ("optimal", "own"))
    if not explanations or not neighbourhoods:
        raise ValueError("explanations and neighbourhoods must hold at least one entry each")
    box = BlackBox(
        f,
        X,
        target=target,
        grad=grad,
        output=output,
        input_shape=input_shape,
        batch_size=batch_size,
        n_jobs=n_jobs,
    )
    for name, e in explanations.items():
        if e.x0.shape != box.x0.shape or not torch.equal(e.x0.to(box.x0), box.x0):
            raise ValueError(f"explanations[{name!r}] is not of the points X")
    base = as_baseline(baseline, box.x0)
    seed = draw_seed(generator)
    step = max(1, batch_size // n_samples)
    losses = torch.empty(len(explanations), len(neighbourhoods), len(box.x0), dtype=torch.float64)
    with box.evaluating():
        for column, z in enumerate(neighbourhoods.values()):
            for start in range(0, len(box.x0), step):
                chunk = slice(start, start + step)
                x0, origin = box.x0[chunk], base[chunk]
                draws = take_draws(z, x0, origin, n_samples, exact, seed)
                x = z.perturb(x0, origin, draws.noise)
                if loss == Loss.GRADIENT:
                    _, over_x = box.values_and_gradients(x, chunk)
                    truth = z.pullback(x0, origin, draws.noise, over_x)
                else:
                    truth = box.values(x, chunk)
                for row, e in enumerate(explanations.values()):
                    part = e[chunk]
                    if loss == Loss.GRADIENT:
                        error = gradient_loss(part, z, draws, x, truth, origin)
                    else:
                        error = squared_loss(part, z, draws, x, truth, intercept, floor)
                    losses[row, column, chunk] = error.cpu()
    return Faithfulness(tuple(explanations), tuple(neighbourhoods), losses)


def squared_loss(
    e: Explanation, z: Neighbourhood, draws: Draws, x: Tensor, truth: Tensor, intercept: str, floor: float
) -> Float[Tensor, " batch"]:
    weight = draws.weights()
    with torch.no_grad():
        if same_coordinates(e.neighbourhood, z):
            residual = truth - e.model.predict(e.theta, draws.noise)
        else:
            residual = truth - e.predict_at(x, floor=floor)
    if intercept == "optimal" and type(e.model) is LinearModel:
        residual = residual - (weight * residual).sum(1, keepdim=True)
    return (weight * residual.square()).sum(1)


def gradient_loss(
    e: Explanation, z: Neighbourhood, draws: Draws, x: Tensor, truth: Tensor, baseline: Tensor
) -> Float[Tensor, " batch"]:
    if same_coordinates(e.neighbourhood, z):
        slopes = e.model.gradient(e.theta, draws.noise)
    else:
        with torch.enable_grad():
            free = x.detach().requires_grad_(True)
            (over_x,) = torch.autograd.grad(e.predict_at(free).sum(), free)
        slopes = z.pullback(e.x0, baseline, draws.noise, over_x.double())
    return (draws.weights() * (truth - slopes).square().sum(-1)).sum(1)


def same_coordinates(fitted: Neighbourhood, tested: Neighbourhood) -> bool:
    """Whether g takes the test's noise as it is, without going through the input."""
    if fitted is tested:
        return True
    if isinstance(fitted, MultiplicativeNeighbourhood) and isinstance(tested, MultiplicativeNeighbourhood):
        return np.array_equal(fitted.groups, tested.groups)  # type: ignore[arg-type]
    return False


@dataclass(frozen=True)
class Ranked:
    """One method in a ranking: mean loss over the points, its standard error, and the excess over the best."""

    method: str
    loss: float
    std_error: float
    excess: float
    excess_error: float  # of the paired difference over the points

    @property
    def tied(self) -> bool:
        """Not distinguishable from the best: the excess is within two of its standard errors."""
        return not self.excess > 2 * self.excess_error


@dataclass(frozen=True)
class Recommendation:
    """Methods by their expected loss in the neighbourhood that matters.

    Attributes:
        ranking: best first.
        reference: loss of the linear g fitted to this very neighbourhood by squared error, about the best that any
            linear explanation can do; NaN where the neighbourhood does not identify one.
        variance: of f over the neighbourhood, the loss of a constant g.
        skipped: methods that could not be tried, with the reason.
    """

    ranking: tuple[Ranked, ...]
    reference: float
    variance: float
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The method in front."""
        return self.ranking[0].method

    @property
    def fits(self) -> bool:
        """Whether the best method leaves no more than twice the reference: else fit an LFA to the neighbourhood."""
        return not self.ranking[0].loss > 2 * self.reference + 1e-9 * self.variance

    def __str__(self) -> str:
        lines = [
            f"Explain with {self.best}: expected loss {self.ranking[0].loss:.3g} of a variance {self.variance:.3g}"
        ]
        for r in self.ranking:
            note = " (tied)" if r.tied and r is not self.ranking[0] else ""
            lines.append(f"  {r.method:<22} {r.loss:10.3g} +- {r.std_error:.2g}{note}")
        lines += [f"  {name:<22} skipped: {why}" for name, why in self.skipped.items()]
        if self.reference == self.reference:
            lines.append(f"  {'LFA on this Z':<22} {self.reference:10.3g} (best linear explanation)")
        if not self.fits:
            lines.append("No listed method fits this neighbourhood: explain with LFA(neighbourhood=...) itself.")
        return "\n".join(lines)


def recommend(
    f: Callable[[Any], Any],
    X: Points,
    neighbourhood: Neighbourhood,
    methods: Sequence[Method | str] | Mapping[str, LFA] = tuple(Method),
    *,
    n_samples: int = 1000,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Recommendation:
    """Fit every method at the points X and rank them by their expected squared error in `neighbourhood`.

    The guiding principle of the paper: choose the perturbations that matter first, then the method that recovers f
    under them. Slopes are compared, each with the intercept that suits the neighbourhood.

    Args:
        f, X: see `BlackBox`.
        neighbourhood: the perturbations that matter.
        methods: names, or LFA instances by name. A name whose perturbations are of the kind of `neighbourhood`
            takes its settings (sigma, kernel width, groups). Those that need gradients are skipped where f has none.
        n_samples: evaluations of f a point, for every fit and for the test.
        options: target, baseline, grad, output, input_shape, n_jobs as in `LFA.explain`.

    >>> from locally.tangent.explanation import GaussianNoise
    >>> f = lambda x: torch.sin(3 * x[:, 0]) + x[:, 1] ** 2
    >>> X = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    >>> recommend(f, X, GaussianNoise(sigma=0.3), generator=torch.Generator().manual_seed(1)).best in (
    ...     "smoothgrad", "c_lime")
    True
    """
    generator = generator or torch.Generator().manual_seed(draw_seed(None))
    if isinstance(methods, Mapping):
        candidates = dict(methods)
    else:
        candidates = {str(m): tuned(Method(m), neighbourhood, n_samples) for m in methods}
    if not candidates:
        raise ValueError("methods must name at least one method")
    box_options = {k: v for k, v in options.items() if k != "baseline"}
    box = BlackBox(f, X, **box_options)
    explanations, skipped = {}, {}
    for name, lfa in candidates.items():
        if lfa.needs_gradients and not box.has_gradient:
            skipped[name] = 'needs gradients (pass grad="numeric" or a callable)'
        else:
            explanations[name] = lfa.explain(f, X, generator=generator, **options)
    if not explanations:
        raise TypeError("f is a NumPy callable and every method asked for needs gradients")
    names = tuple(explanations)
    if n_samples > neighbourhood.noise_size(box.x0.shape[1]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a reference of least norm serves as well
            own = LFA(neighbourhood=neighbourhood, n_samples=n_samples)
            explanations["reference"] = own.explain(f, X, generator=generator, **options)
    explanations["constant"] = constant(explanations[names[0]])
    table = faithfulness(f, X, explanations, {"Z": neighbourhood}, n_samples=n_samples, generator=generator, **options)
    losses = dict(zip(table.explanations, table.losses[:, 0], strict=True))
    order = sorted(names, key=lambda name: float(losses[name].mean()))
    best = losses[order[0]]
    ranking = tuple(
        Ranked(
            name,
            float(losses[name].mean()),
            standard_error(losses[name]),
            float((losses[name] - best).mean()),
            standard_error(losses[name] - best),
        )
        for name in order
    )
    reference = float(losses["reference"].mean()) if "reference" in losses else math.nan
    return Recommendation(ranking, reference, float(losses["constant"].mean()), skipped)


def tuned(method: Method, z: Neighbourhood, n_samples: int) -> LFA:
    """The named method with the settings of the neighbourhood, as far as they are settings of its own."""
    groups = z.groups if isinstance(z, MultiplicativeNeighbourhood) else None
    masks = method in (Method.LIME, Method.KERNEL_SHAP, Method.OCCLUSION)
    lfa = local_approximation(method, n_samples=n_samples, groups=groups if masks else None)
    noisy = method in (Method.C_LIME, Method.SMOOTHGRAD) and isinstance(z, GaussianNoise) and not z.sigma_is_zero
    weighted = method is Method.LIME and isinstance(z, BinaryMask) and z.kernel == "exponential"
    faded = method is Method.INTEGRATED_GRADIENTS and isinstance(z, ScaleNoise) and z.low < z.high
    return replace(lfa, neighbourhood=z) if noisy or weighted or faded else lfa


def constant(e: Explanation) -> Explanation:
    """g that says nothing: all slopes zero."""
    zero = torch.zeros_like(e.x0)
    return Explanation.from_attributions(GaussianNoise(), e.x0, zero, e.f_x0)


def standard_error(v: Float[Tensor, " batch"]) -> float:
    return float(v.std() / len(v) ** 0.5) if len(v) > 1 else 0.0
