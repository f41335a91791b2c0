"""Local function approximation: the simple model g that is closest to f over a neighbourhood of a point.

One estimator for every explanation method: choose the neighbourhood, the loss and the class of g, and the explanation
is the minimiser. Source: Han, Srinivas, Lakkaraju, arXiv 2206.01254 (NeurIPS 2022), Definition 1.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from locally.checks import check_choice, check_count, check_finite, check_nonnegative
from locally.tangent.explanation import fitting
from locally.tangent.explanation.black_box import BlackBox, Gradient, Output, Points, Target
from locally.tangent.explanation.interpretable import InterpretableModel, LinearModel, LogisticModel
from locally.tangent.explanation.neighbourhoods import Draws, Estimator, Neighbourhood, Space

UserLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
MODELS: dict[str, type[InterpretableModel]] = {"linear": LinearModel, "logistic": LogisticModel}
FLOOR = 0.01


class Loss(StrEnum):
    """What the fit compares: chosen by the caller."""

    SQUARED = "squared"  # values, (g - f)^2
    GRADIENT = "gradient"  # gradients: squared distance of that of g from that of f
    CROSS_ENTROPY = "cross_entropy"  # probabilities, for a logistic g


class Status(StrEnum):
    """How the fit at one point ended; read from `Explanation.status`."""

    FITTED = "fitted"
    RANK_DEFICIENT = "rank deficient: the perturbations do not identify the weights, least-norm solution"
    NOT_CONVERGED = "not converged: the step limit came before the tolerance"


@dataclass(frozen=True, eq=False)
class Explanation:
    """The fitted g at every point, with what is known about its error.

    Attributes:
        attributions: slopes of g over the noise, the explanation that is shown. In `space` "input" they are slopes
            over the features, in "noise" they carry a factor x0 - baseline (contributions).
        intercept: g at noise 0: the value near x0 in the additive family, at the baseline in the multiplicative one.
        std_error: standard error of the attributions from sampling; 0 without sampling, NaN where none is known
            (lasso, or no more draws than parameters).
        effective_sample_size: (sum W)^2 / sum W^2.
        loss: weighted mean loss over the perturbations of the fit; `expected_loss` measures it on fresh ones.
        status: of every point.
        space: coordinates of the attributions.
        estimator: whether the neighbourhood was sampled or taken whole.
        x0, baseline: the points explained, and what removal leads to.
        f_x0: f at the points.
        theta, model, neighbourhood: g itself and where it was fitted.
    """

    attributions: Float[Tensor, "batch q"]
    intercept: Float[Tensor, " batch"]
    std_error: Float[Tensor, "batch q"]
    effective_sample_size: Float[Tensor, " batch"]
    loss: Float[Tensor, " batch"]
    status: tuple[Status, ...]
    space: Space
    estimator: Estimator
    x0: Float[Tensor, "batch d"]
    baseline: Float[Tensor, "batch d"]
    f_x0: Float[Tensor, " batch"]
    theta: Float[Tensor, "batch p"]
    model: InterpretableModel
    neighbourhood: Neighbourhood

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, points: int | slice) -> "Explanation":
        """The explanation of some of the points."""
        if isinstance(points, int):
            points = slice(points, points + 1 or None)
        parts = {n: getattr(self, n)[points] for n, v in vars(self).items() if isinstance(v, Tensor | tuple)}
        return Explanation(**(vars(self) | parts))

    @property
    def values(self) -> Float[ndarray, "batch q"]:
        """The attributions, under the name that shap gives them."""
        return self.attributions.cpu().numpy()

    @property
    def base_values(self) -> Float[ndarray, " batch"]:
        """The intercepts: with KernelSHAP, f at the baseline."""
        return self.intercept.cpu().numpy()

    @property
    def data(self) -> Float[ndarray, "batch d"]:
        """The explained points, as NumPy has them."""
        return self.x0.cpu().numpy()

    def predict(self, noise: Float[Tensor, "shared n q"]) -> Float[Tensor, "batch n"]:
        """g at noise of the neighbourhood that it was fitted in."""
        with torch.no_grad():
            return self.model.predict(self.theta, noise.to(self.theta))

    def predict_at(self, x: Float[Tensor, "batch n d"], *, floor: float = FLOOR) -> Float[Tensor, "batch n"]:
        """g at inputs: the noise that leads to them is found first.

        Within `floor` of the baseline a multiplicative method says nothing about a feature, and its slope fades to 0.
        """
        u = self.neighbourhood.noise_at(self.x0, self.baseline, x, floor)
        return self.model.predict(self.theta, u)

    def to_input_space(self, *, floor: float = FLOOR) -> Float[Tensor, "batch d"]:
        """The attributions as slopes over the input: divided by x0 - baseline in the multiplicative family.

        Args:
            floor: distance from the baseline within which the division fades to 0 instead of blowing up.
        """
        slopes = self.neighbourhood.input_slopes(self.x0, self.baseline, self.attributions.double(), floor)
        return slopes.to(self.attributions.dtype)

    @classmethod
    def from_attributions(
        cls,
        neighbourhood: Neighbourhood,
        x0: Points,
        attributions: Float[ndarray, "batch q"] | Float[Tensor, "batch q"],
        f_x0: Float[ndarray, " batch"] | Float[Tensor, " batch"],
        *,
        baseline: float | Sequence[float] | ndarray | Tensor = 0.0,
    ) -> "Explanation":
        """Attributions of another library as a linear g that agrees with f at x0, to be compared with ours.

        Args:
            neighbourhood: says what the attributions mean, e.g. `GaussianNoise()` for gradients and `BinaryMask()` for
                contributions.
        """
        points = torch.as_tensor(x0)
        w = torch.as_tensor(attributions).to(points)
        check_finite("attributions", w)
        q = neighbourhood.noise_size(points.shape[1])
        if w.shape != (len(points), q):
            raise ValueError(f"attributions must have shape {(len(points), q)}, got {tuple(w.shape)}")
        f = torch.as_tensor(f_x0).to(points)
        origin = f - w.sum(1) if neighbourhood.space is Space.NOISE else f
        nan = torch.full_like(f, math.nan)
        return cls(
            attributions=w,
            intercept=origin,
            std_error=torch.full_like(w, math.nan),
            effective_sample_size=nan,
            loss=nan,
            status=(Status.FITTED,) * len(points),
            space=neighbourhood.space,
            estimator=Estimator.SAMPLED,
            x0=points,
            baseline=as_baseline(baseline, points),
            f_x0=f,
            theta=torch.cat([w, origin[:, None]], 1).double(),
            model=LinearModel(),
            neighbourhood=neighbourhood,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LFA:
    """Explain f near a point by  argmin_g E_xi loss(f, g, x0, xi)  over a class of simple models.

    All points of one call see the same draws (common random numbers): each point is explained without bias, a batch
    gives what a loop gives, and chunks do not matter; the sampling errors of two points are not independent.

    Args:
        neighbourhood: distribution of the perturbations.
        loss: "squared", "gradient" (of f and g over the noise; pinned points play no part in it), "cross_entropy" (for
            a logistic g), or a callable loss(f, g, x0, noise) -> (batch, n) in torch operations, where f and g have
            shape (batch, n).
        model: "linear", "logistic" or an InterpretableModel.
        fit_intercept: whether a linear or logistic g has an intercept. Gradient matching gives a linear g the
            intercept of least squared error, since its loss is blind to it.
        gradient_weight: adds this multiple of the gradient loss to a squared error.
        penalty, alpha: "l2" adds alpha ||w||^2, "l1" (linear g) is the lasso: half the loss plus alpha ||w||_1; both as
            in scikit-learn with weights that sum to one. The intercept is not penalised.
        n_samples: evaluations of f for one point.
        exact: "auto" takes the whole neighbourhood (all masks, quadrature) when n_samples evaluations suffice for it,
            True insists on it, False always samples.
        batch_size: most rows in one call of f.

    Raises:
        ValueError, TypeError: a setting is out of range or two of them contradict each other.
    """

    neighbourhood: Neighbourhood
    loss: Loss | str | UserLoss = Loss.SQUARED
    model: InterpretableModel | str = "linear"
    fit_intercept: bool = True
    gradient_weight: float = 0.0
    penalty: str | None = None
    alpha: float = 0.0
    n_samples: int = 1000
    exact: bool | Literal["auto"] = "auto"
    batch_size: int = 2**16

    def __post_init__(self) -> None:
        if not isinstance(self.neighbourhood, Neighbourhood):
            raise TypeError(f"neighbourhood must be a Neighbourhood, got {type(self.neighbourhood).__name__}")
        if not callable(self.loss):
            check_choice("loss", self.loss, tuple(str(v) for v in Loss))
        if not isinstance(self.model, InterpretableModel):
            check_choice("model", self.model, tuple(MODELS))
        check_choice("penalty", self.penalty, (None, "l1", "l2"))
        check_choice("exact", self.exact, (True, False, "auto"))
        check_nonnegative("alpha", self.alpha)
        check_nonnegative("gradient_weight", self.gradient_weight)
        check_count("n_samples", self.n_samples)
        check_count("batch_size", self.batch_size)
        if (self.penalty is None) != (self.alpha == 0):
            raise ValueError(f"penalty and alpha go together, got {self.penalty!r} and {self.alpha!r}")
        if self.penalty == "l1" and not self._has_closed_form:
            raise ValueError('penalty "l1" needs a linear model with a squared or gradient loss')
        if self.loss == Loss.CROSS_ENTROPY and not isinstance(self._model, LogisticModel):
            raise ValueError('loss "cross_entropy" needs a logistic model')
        if self.gradient_weight and self.loss != Loss.SQUARED:
            raise ValueError("gradient_weight mixes gradients into a squared loss, not into another")

    @property
    def _model(self) -> InterpretableModel:
        return self.model if isinstance(self.model, InterpretableModel) else MODELS[self.model]()

    @property
    def _has_closed_form(self) -> bool:
        return type(self._model) is LinearModel and self.loss in (Loss.SQUARED, Loss.GRADIENT)

    @property
    def needs_gradients(self) -> bool:
        """Whether the loss looks at the gradient of f."""
        return self.loss == Loss.GRADIENT or self.gradient_weight > 0

    def explain(
        self,
        f: Callable[[Any], Any],
        X: Points,
        *,
        target: Target = None,
        baseline: float | Sequence[float] | ndarray | Tensor = 0.0,
        grad: Gradient = None,
        output: Output | str = Output.IDENTITY,
        input_shape: Sequence[int] | None = None,
        n_jobs: int = 1,
        generator: torch.Generator | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> Explanation:
        """Explain every row of X.

        Args:
            f, X, target, grad, output, input_shape, n_jobs: see `BlackBox`. A module is put into eval mode meanwhile.
            baseline: what removed features become: a number, (d,) or (batch, d).
            generator: draws one seed for the call; without it torch's default generator does.
            callback: called with (points done, points in all).

        Returns:
            attributions and errors in the dtype and on the device of X. A rank-deficient fit warns, takes the solution
            of least norm and says so in its status.

        Raises:
            ValueError: bad input, fewer draws than parameters, or weights that are all zero.
            TypeError: gradients are needed and f has none.

        >>> import torch
        >>> from locally.tangent.explanation import LFA, GaussianNoise
        >>> lfa = LFA(neighbourhood=GaussianNoise(sigma=0.5), n_samples=200)
        >>> found = lfa.explain(lambda x: x[:, 0] - 3 * x[:, 1], torch.tensor([[1.0, 2.0]]))
        >>> found.attributions.round(decimals=3)
        tensor([[ 1., -3.]])
        """
        box = BlackBox(
            f,
            X,
            target=target,
            grad=grad,
            output=output,
            input_shape=input_shape,
            batch_size=self.batch_size,
            n_jobs=n_jobs,
        )
        if self.needs_gradients and not box.has_gradient:
            box.values_and_gradients(box.x0[:1, None], slice(0, 1))  # raises, naming the alternatives
        self._refuse_non_probabilities(box.f_x0)
        base = as_baseline(baseline, box.x0)
        seed = draw_seed(generator)
        step = max(1, self.batch_size // self.n_samples)
        parts: list[Explanation] = []
        with box.evaluating():
            for start in range(0, len(box.x0), step):
                points = slice(start, min(start + step, len(box.x0)))
                parts.append(self._explain_chunk(box, points, base[points], seed))
                if callback is not None:
                    callback(points.stop, len(box.x0))
        found = concatenate(parts)
        deficient = sum(s is Status.RANK_DEFICIENT for s in found.status)
        if deficient:
            warnings.warn(
                f"the perturbations do not identify the weights of {deficient} of {len(found)} points: "
                "the solutions of least norm are returned",
                stacklevel=2,
            )
        return found

    def _explain_chunk(self, box: BlackBox, points: slice, baseline: Tensor, seed: int) -> Explanation:
        x0 = box.x0[points]
        draws = take_draws(self.neighbourhood, x0, baseline, self.n_samples, self.exact, seed)
        self._refuse_too_few(draws)
        sample = self._evaluate(box, points, baseline, draws)
        fit = self._fit(sample)
        theta, q = fit.theta, draws.noise.shape[2]
        attributions = self._model.attributions(theta, q)
        with torch.no_grad():
            pointwise = self._losses()[-1](theta, sample)
            intercept = self._model.predict(theta, draws.noise.new_zeros(1, 1, q))[:, 0]
        if isinstance(self._model, LinearModel):
            intercept = theta[:, -1]
        weight = sample.weight
        return Explanation(
            attributions=attributions.to(x0.dtype),
            intercept=intercept.to(x0.dtype),
            std_error=fit.std_error.to(x0.dtype),
            effective_sample_size=(1 / weight.square().sum(1)).expand(len(x0)).to(x0.dtype),
            loss=(weight * pointwise).sum(1).to(x0.dtype),
            status=tuple(status(r, c) for r, c in zip(fit.full_rank.tolist(), fit.converged.tolist(), strict=True)),
            space=self.neighbourhood.space,
            estimator=draws.estimator,
            x0=x0,
            baseline=baseline,
            f_x0=box.f_x0[points].to(x0.dtype),
            theta=theta.detach(),
            model=self._model,
            neighbourhood=self.neighbourhood,
        )

    def _evaluate(self, box: BlackBox, points: slice, baseline: Tensor, draws: Draws) -> fitting.Sample:
        x0, gradients = box.x0[points], None
        x = self.neighbourhood.perturb(x0, baseline, draws.noise)
        if self.needs_gradients:
            values, over_x = box.values_and_gradients(x, points)
            gradients = self.neighbourhood.pullback(x0, baseline, draws.noise, over_x)
        else:
            values = box.values(x, points)
        self._refuse_non_probabilities(values)
        pinned = draws.pinned if self.loss != Loss.GRADIENT else draws.pinned[:0]
        pinned_values = values[:, :0]
        if len(pinned):
            pinned_values = box.values(self.neighbourhood.perturb(x0, baseline, pinned[None]), points)
        return fitting.Sample(
            noise=draws.noise,
            weight=draws.weights(),
            values=values,
            gradients=gradients,
            pinned=pinned,
            pinned_values=pinned_values,
            block=draws.block,
            sampled=draws.estimator is Estimator.SAMPLED,
            x0=x0,
        )

    def _fit(self, sample: fitting.Sample) -> fitting.Fit:
        ridge = self.alpha if self.penalty == "l2" else 0.0
        if self._has_closed_form:
            return fitting.fit_linear(
                sample,
                match_values=self.loss == Loss.SQUARED,
                gradient_weight=1.0 if self.loss == Loss.GRADIENT else self.gradient_weight,
                fit_intercept=self.fit_intercept,
                ridge=ridge,
                lasso=self.alpha if self.penalty == "l1" else 0.0,
            )
        return fitting.fit_by_descent(
            sample, self._model, self._losses(), fit_intercept=self.fit_intercept, ridge=ridge
        )

    def _losses(self) -> list[fitting.PointwiseLoss]:
        """The loss, after those whose minimisers are good places to start from."""
        model = self._model
        if callable(self.loss):
            user = self.loss
            return [lambda theta, s: user(s.values, model.predict(theta, s.noise), s.x0, s.noise)]
        squared, gradient = fitting.squared_error(model), fitting.gradient_error(model)
        chain = [fitting.bernoulli_divergence(model)] if isinstance(model, LogisticModel) else []
        if self.loss == Loss.CROSS_ENTROPY:
            return chain
        if self.loss == Loss.GRADIENT:
            return [*chain, squared, gradient] if chain else [gradient]
        if self.gradient_weight:
            return [*chain, lambda theta, s: squared(theta, s) + self.gradient_weight * gradient(theta, s)]
        return [*chain, squared]

    def _refuse_non_probabilities(self, values: Tensor) -> None:
        if isinstance(self._model, LogisticModel) and not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError("a logistic model needs f in [0, 1], at the points and around them")

    def _refuse_too_few(self, draws: Draws) -> None:
        """Squared errors of a linear g need as many draws as weights; gradients identify them with one."""
        n, q = draws.noise.shape[1:]
        needed = q + int(self.fit_intercept) - len(draws.pinned)
        regularised = self.alpha > 0 or self.needs_gradients
        if isinstance(self._model, LinearModel) and not regularised and n < needed:
            raise ValueError(
                f"n_samples must be at least {needed} to identify {q} weights, got {n}: draw more, group features, "
                'or add a penalty ("l2" or "l1")'
            )


def status(full_rank: bool, converged: bool) -> Status:
    if not converged:
        return Status.NOT_CONVERGED
    return Status.FITTED if full_rank else Status.RANK_DEFICIENT


def take_draws(
    neighbourhood: Neighbourhood,
    x0: Float[Tensor, "batch d"],
    baseline: Float[Tensor, "batch d"],
    n: int,
    exact: bool | Literal["auto"],
    seed: int,
) -> Draws:
    """The whole neighbourhood where that is wanted and affordable, else n draws.

    Raises:
        ValueError: `exact` is True, but n evaluations do not cover the neighbourhood.
    """
    if exact:
        draws = neighbourhood.enumerate(x0, baseline, n)
        if draws is not None:
            return draws
        if exact is True:
            raise ValueError(
                f"exact=True, but n_samples = {n} evaluations do not cover this {type(neighbourhood).__name__} "
                f"in {x0.shape[1]} features"
            )
    return neighbourhood.draw(x0, baseline, n, torch.Generator().manual_seed(seed))


def draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (1,), generator=generator, device=device))


def as_baseline(baseline: float | Sequence[float] | ndarray | Tensor, x0: Tensor) -> Float[Tensor, "batch d"]:
    """The baseline of every point.

    Raises:
        ValueError: it is not finite, or neither a number nor (d,) nor (batch, d).
    """
    base = baseline if isinstance(baseline, Tensor) else torch.as_tensor(np.asarray(baseline, dtype=np.float64))
    check_finite("baseline", base)
    if tuple(base.shape) not in ((), (x0.shape[1],), (1, x0.shape[1]), tuple(x0.shape)):
        raise ValueError(
            f"baseline must be a number or have shape {(x0.shape[1],)} or {tuple(x0.shape)}, got {tuple(base.shape)}"
        )
    return base.to(x0).expand(x0.shape)


def concatenate(parts: list[Explanation]) -> Explanation:
    """One explanation of all points."""
    joined: dict[str, Any] = dict(vars(parts[0]))
    for name, value in joined.items():
        if isinstance(value, Tensor):
            joined[name] = torch.cat([getattr(p, name) for p in parts])
    joined["status"] = tuple(s for p in parts for s in p.status)
    return Explanation(**joined)
