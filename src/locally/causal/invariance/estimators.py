"""Invariant predictors from labelled environments, with certificates for unseen ones (arXiv 2205.15196).

Both minimise the mean risk over the training environments among representations whose gap is at most eps in all of
them: over subsets of the covariates, or over all linear maps to a few dimensions.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from sklearn.utils.validation import check_is_fitted

from locally.causal.invariance.bounds import InterventionFamily
from locally.causal.invariance.certificate import Certificate, extrapolation_factor, moment_rank, span_dimension
from locally.causal.invariance.linear import penalised_representation
from locally.causal.invariance.moments import EnvironmentMoments, TooFewEnvironments, bootstrap_radius
from locally.causal.invariance.regressor import EnvironmentRegressor
from locally.causal.invariance.search import InvarianceStatus, search_subsets
from locally.checks import check_between, check_choice, check_count, check_finite, check_nonnegative, check_shape


class NoInvariantRepresentation(UserWarning):
    """No candidate met the constraint; the one with the least gap was kept."""


class ReusedEnvironment(ValueError):
    """A certificate from environments that the predictor was learnt from would certify nothing."""


class InvariantRegressor(EnvironmentRegressor):
    """What both learners share: the gap of new environments and the certificates.

    A subclass sets `representation_` (r, d) and `head_` (r,), in standard units.
    """

    alpha: float
    family: InterventionFamily | None

    def invariance_gap(self, X: Any, y: Any, environments: Any) -> Float[ndarray, " N"]:
        """Gap of every environment in these rows, in order of its label, in the units of training."""
        return self._like(X, y, environments).gaps(self.representation_, self.head_)

    def extrapolation_factor(self, X: Any, y: Any) -> float:
        """Least ||a||_1 with which the moments of this one environment combine those of training; inf where none do.

        Rows have sampling error, which puts their moments off the span: distances of 3 sqrt(d / n) count as none. That
        makes it a measure of how far these rows extrapolate, not a guarantee as for population moments.
        """
        other = self._like(X, y, np.zeros(len(X), dtype=np.int64))
        d, n = other.xy.shape[1], min(float(self.moments_.rows.min()), float(other.rows[0]))
        return extrapolation_factor(self.moments_.second(), other.second()[0], tol=min(3 * math.sqrt(d / n), 0.5))

    def extrapolation_factors(self, covariances: Float[ndarray, "N p p"], target: int) -> Float[ndarray, " N"]:
        """The same for population covariance matrices, for a model fitted by `fit_moments`."""
        check_is_fitted(self)
        training, new = self.moments_.second(), self.moments_.like_covariances(covariances, target).second()
        return np.array([extrapolation_factor(training, moments) for moments in new])

    def unlabelled_extrapolation_factors(self, covariances: Float[ndarray, "N d d"]) -> Float[ndarray, " N"]:
        """The same from covariances of the covariates alone, for environments in which nobody has seen the target.

        Holds for interventions whose moments lie in the span of the training ones, if there the covariates determine
        the rest; for a model fitted by `fit_moments`.

        Raises:
            ValueError: the training moments of the covariates span fewer dimensions than those with the target, so that
                they do not determine them; wrong shape, NaN or infinity.
        """
        check_is_fitted(self)
        moments = self.moments_
        check_shape("covariances", covariances, (None, moments.xy.shape[1], moments.xy.shape[1]))
        check_finite("covariances", covariances)
        alone, together = span_dimension(moments.xx), span_dimension(moments.second())
        if alone < together:
            raise ValueError(
                f"covariances cannot tell how the target moves: without it the training moments span {alone} "
                f"dimensions, with it {together}"
            )
        scale = np.outer(moments.scale[:-1], moments.scale[:-1])
        return np.array([extrapolation_factor(moments.xx, new / scale) for new in covariances])

    def certify(
        self,
        X: Any,
        y: Any,
        environments: Any,
        *,
        level: float | None = None,
        eta: float = 0.05,
        radius: str = "gaussian",
        random_state: Any = None,
    ) -> Certificate:
        """The certificate with a held-out bound: at most a share `holdout` of environments has a gap above `level`.

        An environment counts as a violation unless its gap with the sampling radius is within the level, so that the
        bound is for population gaps. Half of eta goes to the rows, half to the environments.

        Args:
            X, y, environments: rows of environments drawn as those of training were, none of them used in training.
            level: gap that is spoken of; default: that of the training certificate.
            radius: "gaussian", or "bootstrap" for rows that are not.

        Raises:
            ReusedEnvironment: an environment has the label of a training one.
            ValueError: eta is not in (0, 1), a negative level, rows that `fit` would refuse.
        """
        _check_open("eta", eta)
        check_choice("radius", radius, ("gaussian", "bootstrap"))
        held = self._like(X, y, environments)
        if reused := set(held.labels) & set(self.environments_):
            raise ReusedEnvironment(f"environments must be new, but {sorted(map(str, reused))} were used in training")
        if radius == "gaussian":
            radii = held.sampling_radius(self.representation_, self.head_, eta / 2)
        else:
            radii = self._bootstrap(np.asarray(X), np.asarray(y), np.asarray(environments), held, eta / 2, random_state)
        return self._with_holdout(held, radii, level, eta, eta / 2)

    def certify_moments(
        self, covariances: Float[ndarray, "N p p"], target: int, *, level: float | None = None, eta: float = 0.05
    ) -> Certificate:
        """The same from population covariance matrices, which have no sampling error."""
        check_is_fitted(self)
        _check_open("eta", eta)
        held = self.moments_.like_covariances(covariances, target)
        for moments in held.second():
            if (moments == self.moments_.second()).all(axis=(1, 2)).any():
                raise ReusedEnvironment("covariances must be new, but one of them was used in training")
        return self._with_holdout(held, np.zeros(len(held)), level, eta, eta)

    def _with_holdout(
        self, held: EnvironmentMoments, radii: Float[ndarray, " N"], level: float | None, eta: float, share: float
    ) -> Certificate:
        level = self.certificate_.level if level is None else level
        check_nonnegative("level", level)
        gaps = held.gaps(self.representation_, self.head_)
        violations = int((gaps + radii > level).sum())
        return self.certificate_.with_holdout(violations, len(held), level=level, eta=eta, share=share)

    def _bootstrap(
        self, X: ndarray, y: ndarray, labels: ndarray, held: EnvironmentMoments, eta: float, random_state: Any
    ) -> Float[ndarray, " N"]:
        rng = np.random.default_rng(random_state)
        scale, centre = self.moments_.scale, self.moments_.centre
        Z = (X - centre[:-1]) / scale[:-1]
        if held.has_constant:
            Z = np.insert(Z, 0, 1.0, axis=1)
        residual = Z @ (self.representation_.T @ self.head_) - (y - centre[-1]) / scale[-1]
        Z = Z @ self.representation_.T
        each = [labels == name for name in held.labels]
        return np.array([bootstrap_radius(Z[e], residual[e], eta / len(each), rng) for e in each])

    def _finish(
        self,
        moments: EnvironmentMoments,
        Phi: Float[ndarray, "r d"],
        head: Float[ndarray, " r"],
        eps: float,
        status: InvarianceStatus,
        class_size: int | None = None,
        fixed_heads: bool = False,
    ) -> None:
        """Set what both learners report; `moments` are those of the constraint."""
        self.representation_, self.head_, self.eps_, self.status_ = Phi, head, eps, status
        self.feasible_ = status is InvarianceStatus.INVARIANT
        self.gaps_ = moments.gaps(Phi, head)
        # A union over the class: the choice among its members was made on the same rows.
        self.gap_radius_ = moments.sampling_radius(Phi, head, self.alpha / 2 / (class_size or 1))
        self.moment_rank_ = moment_rank(moments)
        self.certificate_ = Certificate.of_training(
            moments,
            level=eps + float(self.gap_radius_.max()),
            violations=int((self.gaps_ > eps).sum()),
            eta=self.alpha,
            family=self.family,
            candidates=class_size if fixed_heads else None,
        )
        self._keep(Phi.T @ head)
        if not self.feasible_:
            warnings.warn(
                f"no candidate has a gap of at most {eps:.3g} in every environment: kept the one whose largest gap is "
                f"{self.gaps_.max():.3g}",
                NoInvariantRepresentation,
                stacklevel=4,
            )


class InvariantSubsetRegressor(InvariantRegressor):
    """The subset of covariates of least mean risk whose pooled least squares is eps-invariant in every environment.

    Parameters
    ----------
    eps : largest gap allowed in an environment, in units of the (standardised) columns, at least 0; "auto": the
        sampling radius of each candidate at confidence 1 - alpha, so that an invariant one is rarely turned away.
    max_size : most covariates in a subset; None for all, at the cost of 2^d subsets or a beam search.
    search : "exhaustive", "beam" or "auto": exhaustive up to 200,000 subsets.
    beam : subsets that beam search keeps from one size to the next.
    head : "pooled" least squares, or "constrained": moved to meet the constraint where that nearly does.
    split : fit heads on every other environment and check them on the rest, which makes the finite-class bound valid.
    fit_intercept : put a constant into every representation, so that environments may shift means.
    standardize : measure gaps in units of the pooled standard deviations.
    family : what the interventions may change, if known; the uniform bounds use it.
    alpha : one minus the confidence of eps="auto" and of the certificate, in (0, 1).
    callback : called with (subsets done, subsets in the class).

    Attributes
    ----------
    support_ : chosen covariates.
    coef_, intercept_ : of all covariates, in the units of the data; zero off the support.
    representation_, head_ : rows of the identity, and weights, in standard units.
    status_, feasible_ : whether any candidate met the constraint.
    eps_, gaps_, gap_radius_ : allowed gap; gap and sampling radius of each environment that was checked.
    risk_ : mean risk over the environments that were checked, in squared units of y.
    moment_rank_ : dimension that the training moments span.
    n_candidates_ : subsets in the class.
    certificate_ : `Certificate` from the training environments; `certify` adds the held-out bound.

    References
    ----------
    Parulekar, Shanmugam, Shakkottai: PAC Generalization via Invariant Representations, ICML 2023, arXiv 2205.15196.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> environments = np.repeat(np.arange(8), 500)
    >>> cause = rng.standard_normal(4000)
    >>> y = cause + rng.standard_normal(4000)
    >>> effect = y * rng.uniform(-2, 2, 8)[environments] + rng.standard_normal(4000)
    >>> model = InvariantSubsetRegressor(alpha=0.01).fit(np.column_stack([cause, effect]), y, environments)
    >>> model.support_, str(model.status_)
    ((0,), 'invariant on every training environment')
    """

    def __init__(
        self,
        eps: float | str = "auto",
        *,
        max_size: int | None = None,
        search: str = "auto",
        beam: int = 50,
        head: str = "pooled",
        split: bool = False,
        fit_intercept: bool = True,
        standardize: bool = True,
        family: InterventionFamily | None = None,
        alpha: float = 0.05,
        callback: Callable[[int, int], None] | None = None,
    ) -> None:
        self.eps = eps
        self.max_size = max_size
        self.search = search
        self.beam = beam
        self.head = head
        self.split = split
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.family = family
        self.alpha = alpha
        self.callback = callback

    def _rows_needed(self, features: int) -> int:
        if self.max_size is not None:
            check_count("max_size", self.max_size, at_least=0)
        size = features if self.max_size is None else min(self.max_size, features)
        return size + self.fit_intercept + 1

    def _fit(self, moments: EnvironmentMoments) -> None:
        check_choice("head", self.head, ("pooled", "constrained"))
        _check_open("alpha", self.alpha)
        heads_from = None
        checked = moments
        if self.split:
            if len(moments) < 4:
                raise TooFewEnvironments(f"environments must be at least 4 to be split, got {len(moments)}")
            heads_from = moments.select(np.arange(0, len(moments), 2))
            checked = moments.select(np.arange(1, len(moments), 2))
        found = search_subsets(
            checked,
            moments.features if self.max_size is None else self.max_size,
            None if self.eps == "auto" else _checked_eps(self.eps),
            heads_from=heads_from,
            eta=self.alpha,
            search=self.search,
            beam=self.beam,
            move_heads=self.head == "constrained",
            callback=self.callback,
        )
        self.support_, self.n_candidates_ = found.support, found.candidates
        columns = [0] if moments.has_constant else []
        columns += [j + moments.has_constant for j in found.support]
        Phi = np.eye(moments.xy.shape[1])[columns]
        # A head that was moved to fit the checked environments is no member of a class fixed before them.
        fixed = self.split and self.head == "pooled"
        self._finish(checked, Phi, found.head, found.eps, found.status, found.candidates, fixed)
        self.risk_ = found.risk * float(moments.scale[-1]) ** 2


class LinearInvariantRepresentation(InvariantRegressor):
    """A linear map of all covariates to `rank` dimensions on which one head is eps-invariant in every environment.

    For covariates that are only seen through a mixture (`LatentObservation`), where no subset of them need be
    invariant. A penalty on gaps above eps grows tenfold from 1 to 1e6. Gaps depend on the row space alone and are
    taken in whitened covariates, so that a mixture of the covariates has the same: eps^2 is about the share of the
    variance of y that another head on the representation could save.

    Parameters
    ----------
    rank : dimensions of the representation, beside the constant; 1 is the constraint behind IRMv1.
    eps : largest gap allowed, in units of the (standardised) target, at least 0.
    restarts : starting points; the first is pooled least squares with the directions in which gradients vary least.
    max_iter : quasi-Newton steps at every weight of the penalty.
    fit_intercept, standardize, family, alpha : see `InvariantSubsetRegressor`.
    random_state : seed of the other starting points.

    Attributes
    ----------
    representation_, head_ : Phi (r, d) with Phi S Phi' = I for the pooled moments S, and weights, in standard units.
    coef_, intercept_, status_, feasible_, eps_, gaps_, gap_radius_, risk_, moment_rank_, certificate_ : see
        `InvariantSubsetRegressor`.

    References
    ----------
    Parulekar, Shanmugam, Shakkottai: PAC Generalization via Invariant Representations, ICML 2023, arXiv 2205.15196.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> environments = np.repeat(np.arange(8), 500)
    >>> cause = rng.standard_normal(4000)
    >>> y = cause + rng.standard_normal(4000)
    >>> effect = y * rng.uniform(-2, 2, 8)[environments] + rng.standard_normal(4000)
    >>> mixed = np.column_stack([cause + effect, cause - effect])
    >>> model = LinearInvariantRepresentation(rank=1, eps=0.1, random_state=0).fit(mixed, y, environments)
    >>> bool(model.feasible_), model.representation_.shape
    (True, (2, 3))
    """

    def __init__(
        self,
        rank: int = 1,
        eps: float = 0.05,
        *,
        restarts: int = 4,
        max_iter: int = 500,
        fit_intercept: bool = True,
        standardize: bool = True,
        family: InterventionFamily | None = None,
        alpha: float = 0.05,
        random_state: Any = None,
    ) -> None:
        self.rank = rank
        self.eps = eps
        self.restarts = restarts
        self.max_iter = max_iter
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.family = family
        self.alpha = alpha
        self.random_state = random_state

    def _fit(self, moments: EnvironmentMoments) -> None:
        check_count("rank", self.rank)
        check_count("restarts", self.restarts)
        check_count("max_iter", self.max_iter)
        if self.rank > moments.features:
            raise ValueError(f"rank must be at most the {moments.features} covariates, got {self.rank}")
        _check_open("alpha", self.alpha)
        eps = _checked_eps(self.eps)
        rng = np.random.default_rng(self.random_state)
        Phi, head = penalised_representation(moments, self.rank, eps, self.restarts, self.max_iter, rng)
        met = moments.gaps(Phi, head).max() <= eps
        self._finish(moments, Phi, head, eps, InvarianceStatus.INVARIANT if met else InvarianceStatus.INFEASIBLE)


def _checked_eps(eps: Any) -> float:
    if isinstance(eps, str):
        raise ValueError(f'eps must be a number of at least 0, got "{eps}"')
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps!r}")
    return float(eps)


def _check_open(name: str, value: float) -> None:
    check_between(name, value, 0.0, 1.0)
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}")
