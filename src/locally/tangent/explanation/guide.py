"""Which explanation method to choose, given the perturbations that matter: the paper's guiding principle as a function.

The neighbourhood comes first; the method is the one whose perturbations are those. `choose` answers from that alone;
`recommend` measures it on a model. Source: Han, Srinivas, Lakkaraju, arXiv 2206.01254, section 5.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from locally.checks import check_count
from locally.tangent.explanation.approximation import LFA, Loss
from locally.tangent.explanation.masks import BinaryMask, LeaveOneOut
from locally.tangent.explanation.methods import Method, local_approximation
from locally.tangent.explanation.neighbourhoods import (
    GaussianNoise,
    Neighbourhood,
    ScaleNoise,
    Space,
)


class Perturbation(StrEnum):
    """Kinds of change to an input that an explanation may have to be faithful to."""

    INFINITESIMAL = "infinitesimal"  # sensitivity at the input itself
    NOISE = "noise"  # continuous noise added to the features: sensors, rounding, jitter
    FADING = "fading"  # the whole input scaled down to the baseline
    SLIGHT_FADING = "slight fading"  # ... or only a little
    REMOVAL = "removal"  # any features absent, those near the input counting most
    COALITIONS = "coalitions"  # any features absent, contributions that add up to f(x0) - f(baseline)
    ONE_REMOVED = "one removed"  # one feature absent at a time


METHOD_OF = {
    Perturbation.INFINITESIMAL: Method.GRADIENT,
    Perturbation.NOISE: Method.SMOOTHGRAD,
    Perturbation.FADING: Method.INTEGRATED_GRADIENTS,
    Perturbation.SLIGHT_FADING: Method.GRADIENT_X_INPUT,
    Perturbation.REMOVAL: Method.LIME,
    Perturbation.COALITIONS: Method.KERNEL_SHAP,
    Perturbation.ONE_REMOVED: Method.OCCLUSION,
}
REASON = {
    Method.GRADIENT: "only the input itself matters, and the gradient is the exact limit of vanishing noise",
    Method.SMOOTHGRAD: "its mean gradient is the limit of the best linear fit under Gaussian noise, and converges "
    "faster than regression",
    Method.C_LIME: "it fits f under Gaussian noise from values alone",
    Method.INTEGRATED_GRADIENTS: "it matches gradients along the way from the baseline to the input",
    Method.GRADIENT_X_INPUT: "it is the limit of scaling by a factor that goes to 1",
    Method.LIME: "it fits f on masks, weighted by how close they leave the input",
    Method.KERNEL_SHAP: "it fits f on masks under the Shapley kernel and agrees with f at no and at all features",
    Method.OCCLUSION: "it is exact on masks with one feature removed, at one evaluation for each",
}


@dataclass(frozen=True, eq=False)
class Guidance:
    """An answer of `choose`.

    Attributes:
        method: name of the method; None where none of the eight has these perturbations.
        approximation: the LFA to call `explain` on.
        reads: what its attributions are.
        why: one sentence.
        evaluations: of f for each point, None where it depends on the number of features and that is unknown.
        cautions: what to mind.
    """

    method: Method | None
    approximation: LFA
    reads: str
    why: str
    evaluations: int | None
    cautions: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        name = self.method or f"LFA on your {type(self.approximation.neighbourhood).__name__}"
        cost = "as many evaluations as features" if self.evaluations is None else f"{self.evaluations} evaluations"
        kind = "with gradients" if self.approximation.needs_gradients else "without gradients"
        lines = [f"Use {name}: {self.why}.", f"Read as: {self.reads}.", f"Cost: {cost} a point, {kind}."]
        return "\n".join(lines + [f"Mind: {c}." for c in self.cautions])


def choose(
    perturbation: Perturbation | str | Neighbourhood,
    *,
    differentiable: bool = True,
    n_features: int | None = None,
    n_samples: int = 1000,
    **options: Any,
) -> Guidance:
    """The method whose perturbations are the ones that matter, ready to use and with its reasons.

    Args:
        perturbation: a kind of `Perturbation`, or a neighbourhood. One of your own gets an LFA built on it.
        differentiable: whether f has gradients; otherwise squared-error methods take over where they can.
        n_features: d, for the cost and the cautions.
        n_samples: evaluations a point that you can afford.
        options: passed on to `local_approximation` (sigma, width, groups, ...).

    >>> print(choose("noise", differentiable=False, n_features=20, sigma=0.1))
    Use c_lime: it fits f under Gaussian noise from values alone.
    Read as: slopes over the input, in units of f per unit of each feature.
    Cost: 1000 evaluations a point, without gradients.
    Mind: under removed or faded features other methods are more faithful: no explanation is best everywhere.
    """
    check_count("n_samples", n_samples)
    if n_features is not None:
        check_count("n_features", n_features)
    if isinstance(perturbation, Neighbourhood):
        method, lfa = match(perturbation, differentiable, n_samples)
    else:
        method = METHOD_OF[Perturbation(perturbation)]
        if method is Method.SMOOTHGRAD and not differentiable:
            method = Method.C_LIME
        lfa = local_approximation(method, n_samples=n_samples, **options)
    why = "none of the eight methods has these perturbations" if method is None else REASON[method]
    return Guidance(
        method=method,
        approximation=lfa,
        reads=meaning(lfa),
        why=why,
        evaluations=evaluations(lfa, n_features),
        cautions=cautions(lfa, differentiable, n_features),
    )


def match(z: Neighbourhood, differentiable: bool, n_samples: int) -> tuple[Method | None, LFA]:
    """The method that has this neighbourhood, and its LFA on this very one."""
    method: Method | None = None
    if isinstance(z, GaussianNoise):
        at_a_point = z.sigma_is_zero
        method = Method.GRADIENT if at_a_point else Method.SMOOTHGRAD if differentiable else Method.C_LIME
    elif isinstance(z, ScaleNoise):
        method = Method.GRADIENT_X_INPUT if z.low == z.high == 1 else Method.INTEGRATED_GRADIENTS
    elif isinstance(z, LeaveOneOut):
        method = Method.OCCLUSION
    elif isinstance(z, BinaryMask):
        method = Method.KERNEL_SHAP if z.kernel == "shapley" else Method.LIME
    loss = Loss.SQUARED if method is None else method.loss
    return method, LFA(neighbourhood=z, loss=loss, n_samples=n_samples)


def meaning(lfa: LFA) -> str:
    if lfa.neighbourhood.space is Space.INPUT:
        return "slopes over the input, in units of f per unit of each feature"
    return "contributions relative to the baseline, in units of f; a slope times (input - baseline)"


def evaluations(lfa: LFA, d: int | None) -> int | None:
    z = lfa.neighbourhood
    if isinstance(z, LeaveOneOut):
        return None if d is None else z.noise_size(d) + 1
    limit = (isinstance(z, GaussianNoise) and z.sigma_is_zero) or (isinstance(z, ScaleNoise) and z.low == z.high)
    return 1 if limit else lfa.n_samples


def cautions(lfa: LFA, differentiable: bool, d: int | None) -> tuple[str, ...]:
    found = []
    if lfa.needs_gradients and not differentiable:
        found.append('f has no gradients, and no squared error identifies the weights here: pass grad="numeric"')
    if not lfa.needs_gradients and d is not None:
        needed = lfa.neighbourhood.noise_size(d) + 1
        if lfa.n_samples < needed and not isinstance(lfa.neighbourhood, LeaveOneOut):
            found.append(
                f"{lfa.n_samples} evaluations do not identify {needed - 1} weights: group features or penalise"
            )
    if lfa.neighbourhood.space is Space.NOISE:
        found.append("the baseline decides what a removed feature is; one that sits at it gets 0")
        found.append(
            "under noise added to the input other methods are more faithful: no explanation is best everywhere"
        )
    else:
        found.append(
            "under removed or faded features other methods are more faithful: no explanation is best everywhere"
        )
    return tuple(found)
