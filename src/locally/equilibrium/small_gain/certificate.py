"""The certificate: block weights, margin, Lipschitz constant, step sizes, timescale bands and a safe ball.

For anyone who runs simultaneous gradient play and wants to know before the run that it contracts to one equilibrium.
Source: arXiv 2512.06791 (Small-Gain Nash).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.linalg import LinearOperator

from locally.checks import check_between, check_choice, check_count, check_nonnegative, check_shape
from locally.equilibrium.small_gain import step_sizes
from locally.equilibrium.small_gain.games import Game, check_block_sizes
from locally.equilibrium.small_gain.margins import (
    Coupling,
    GameBounds,
    check_weights,
    lipschitz_from_blocks,
    margin,
    owners,
    signed_margin,
)
from locally.equilibrium.small_gain.perron import balanced_weights, optimal_weights, small_gain, timescale_band
from locally.equilibrium.small_gain.regions import Region
from locally.equilibrium.small_gain.sampling import (
    Deviation,
    JacobianProducts,
    SampledJacobians,
    comparison_jacobian,
    deviation,
    inflate,
    scalar_sizes,
)
from locally.equilibrium.small_gain.signed import optimal_step_weights

STEP_POWER = {"euler": 2, "rk4": 1}
MATRIX_FREE_DIMENSION = 2000


class CertificateStatus(StrEnum):
    """Whether block weights certify the game, and if not, what stands in the way; set by `SmallGainCertifier`."""

    CERTIFIED = "certified"
    NO_CURVATURE = "a player's own curvature is not positive"
    COUPLING_TOO_STRONG = "no block weights certify: the coupling is too strong for the curvature"
    UNSUITABLE_WEIGHTS = "other weights certify, the given ones do not"


@dataclass(frozen=True)
class SGNCertificate:
    """What was certified, in which metric, and what follows for the steps.

    Attributes:
        status: CERTIFIED, or why not.
        weights: w, one for each player; M(w) = blockdiag(w_i I).
        block_sizes: of the Jacobian that was certified.
        margin: alpha, the modulus of strong monotonicity in M(w), after all corrections; not positive: no certificate.
        supremum: bound on the margin of every choice of weights (before the correction for unsampled points in
            "jacobian" mode).
        lipschitz: beta, the Lipschitz constant in M(w); infinite if unknown.
        mu, coupling, own_lipschitz: the bounds on the region that the block certificate rests on.
        euclidean_margin: Rosen's test on the same samples, or on the same bounds where there are no samples.
        small_gain: rho(diag(1/mu) L), below 1 if and only if block bounds certify.
        rigorous: the bounds hold on the whole region up to rounding; otherwise they hold at the samples.
        local: the metric varies over the region, so that finite steps and radii hold in the small only.
        n_samples: Jacobians looked at.
        radius: every start with ||x - x*||_M <= radius stays there; infinite if everything is certified, 0 if the
            region was not shown to hold an equilibrium, None where the region's shape gives none.
        equilibrium_distance: bound on ||centre - x*||_M, from the pseudo-gradient at the centre; None without a centre.
    """

    status: CertificateStatus
    weights: Float[ndarray, " players"]
    block_sizes: tuple[int, ...]
    margin: float
    supremum: float
    lipschitz: float
    mu: Float[ndarray, " players"]
    coupling: Coupling
    own_lipschitz: Float[ndarray, " players"] | None
    euclidean_margin: float
    small_gain: float
    mode: str
    rigorous: bool
    local: bool
    n_samples: int
    radius: float | None = None
    equilibrium_distance: float | None = None

    @property
    def feasible(self) -> bool:
        """Whether the status is CERTIFIED."""
        return self.status is CertificateStatus.CERTIFIED

    @property
    def reason(self) -> str:
        """One sentence with the figures that decided."""
        match self.status:
            case CertificateStatus.CERTIFIED:
                return f"strongly monotone with modulus {self.margin:.6g} in the weighted norm"
            case CertificateStatus.NO_CURVATURE:
                worst = int(np.argmin(self.mu))
                return f"player {worst} has curvature {self.mu[worst]:.6g}, and no weights make up for that"
            case CertificateStatus.COUPLING_TOO_STRONG if self.mode == "jacobian":
                return f"no weights reach a margin above {self.supremum:.6g}, and the best found is {self.margin:.6g}"
            case CertificateStatus.COUPLING_TOO_STRONG:
                return f"the small gain rho(diag(1/mu) L) is {self.small_gain:.6g}, and 1 or more certifies nothing"
            case CertificateStatus.UNSUITABLE_WEIGHTS:
                return f"the given weights have margin {self.margin:.6g}; the best ones reach up to {self.supremum:.6g}"

    @property
    def euler_step_max(self) -> float:
        """Steps below contract; 0 if nothing is certified or the Lipschitz constant is unknown."""
        return self._step(step_sizes.euler_step_max)

    @property
    def euler_step_opt(self) -> float:
        """The step of the best certified factor, half of `euler_step_max`; 0 where that is."""
        return self._step(step_sizes.euler_step_opt)

    @property
    def rk4_step_guideline(self) -> float:
        """The paper's rule of thumb, 2.5 / beta; not a contraction guarantee."""
        return self._step(step_sizes.rk4_guideline)

    @property
    def rk4_step_rigorous(self) -> float:
        """Runge-Kutta steps up to it contract; 0 if nothing is certified or beta is unknown."""
        return self._step(step_sizes.rk4_step_rigorous)

    @property
    def extragradient_step(self) -> float:
        """The step of the extragradient method's bound; 0 if nothing is certified or beta is unknown."""
        return self._step(step_sizes.extragradient_step)

    @property
    def optimistic_step(self) -> float:
        """1 / (4 beta), for the optimistic method; 0 if nothing is certified or beta is unknown."""
        return self._step(step_sizes.optimistic_step)

    @property
    def distortion(self) -> float:
        """sqrt(max w / min w): how much constants may worsen on the way back to the Euclidean norm."""
        return float(np.sqrt(self.weights.max() / self.weights.min()))

    def contraction(self, step: float, method: str = "euler") -> float:
        """Certified factor per step in the M(w)-norm; infinite where none is certified."""
        check_nonnegative("step", step)
        check_choice("method", method, ("euler", "rk4", "extragradient"))
        if not self.feasible or not math.isfinite(self.lipschitz):
            return math.inf
        match method:
            case "euler":
                return step_sizes.euler_contraction(self.margin, self.lipschitz, step)
            case "rk4":
                return step_sizes.rk4_contraction(self.margin, self.lipschitz, step)
            case _:
                return step_sizes.extragradient_contraction(self.margin, self.lipschitz, step)

    def flow_contraction(self, time: float) -> float:
        """exp(-alpha t): factor by which the flow x' = -F(x) brings any two points together."""
        return math.exp(-self.margin * time) if self.feasible else math.inf

    def timescale_band(self, i: int = 0, j: int = 1) -> tuple[float, float] | None:
        """Interval of w_j / w_i for which the block bounds certify, the other weights as they are."""
        return timescale_band(self.mu, self.coupling, i, j, weights=self.weights)

    def norm(self, v: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch"]:
        """||v||_M of vectors in the coordinates that were certified."""
        return np.asarray(np.sqrt(np.square(v) @ self.weights[owners(self.block_sizes)]))

    def metric(self) -> LinearOperator:
        """M(w) as a SciPy linear operator."""
        diagonal = self.weights[owners(self.block_sizes)]
        scale = lambda v: diagonal * np.ravel(v)
        return LinearOperator((len(diagonal),) * 2, matvec=scale, rmatvec=scale, dtype=np.float64)

    def to_json(self) -> str:
        """Everything as strict JSON: infinities as strings, a sparse coupling as triplets."""
        data = {name: _encode(getattr(self, name)) for name in self.__dataclass_fields__}
        return json.dumps(data, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "SGNCertificate":
        """The certificate that `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        for name in ("weights", "mu", "own_lipschitz"):
            if data[name] is not None:
                data[name] = np.array([float(v) for v in data[name]])
        for name in ("margin", "supremum", "lipschitz", "euclidean_margin", "small_gain", "radius"):
            data[name] = None if data[name] is None else float(data[name])
        coupling = data["coupling"]
        if isinstance(coupling, dict):
            index = (np.array(coupling["row"], dtype=int), np.array(coupling["column"], dtype=int))
            data["coupling"] = sp.csr_array((np.array(coupling["value"], dtype=float), index), shape=coupling["shape"])
        else:
            data["coupling"] = np.array(coupling, dtype=float)
        data |= {"status": CertificateStatus(data["status"]), "block_sizes": tuple(data["block_sizes"])}
        return cls(**data)

    def _step(self, rule: Callable[[float, float], float]) -> float:
        return rule(self.margin, self.lipschitz) if self.feasible and math.isfinite(self.lipschitz) else 0.0


@dataclass(frozen=True, kw_only=True)
class SmallGainCertifier:
    """Certify that gradient play contracts, from block bounds or from the Jacobians themselves.

    Args:
        weights: "optimal" for `objective`, "balanced" (as symmetric a coupling as possible), or one positive number for
            each player.
        objective: what optimal weights maximise: "margin", or the step sizes' figures of merit "euler"
            (alpha / beta^2) and "rk4" (alpha / beta).
        mode: "blocks" uses curvatures and coupling norms only, which may come from anywhere and cost O(N^3) after that;
            "jacobian" uses the sampled Jacobians, tighter where rotations and cancellations matter, O(d^3) a sample.
        points_per_dimension: grid of the region's samples, up to 10 dimensions.
        sobol_points: samples above 10 dimensions.
        jacobian_lipschitz: a constant K with ||J(x) - J(y)||_2 <= K ||x - y||_2 on the region, or such constants for
            each block (N x N); makes a sampled certificate rigorous.
        safety: factor >= 1 by which every sampled bound is made worse; for those who have no such constant.
        batch_size: Jacobians in memory at once.
        matrix_free: products instead of Jacobians ("blocks" mode only); default from 2000 dimensions on.
        seed: of the Sobol points.

    Raises:
        ValueError: an option is out of range.

    >>> from locally.equilibrium.small_gain import QuadraticGame
    >>> game = QuadraticGame(np.array([[1.0, 10.0], [0.05, 1.0]]), (1, 1))
    >>> found = SmallGainCertifier().certify(game)
    >>> found.feasible, round(found.margin, 5), round(found.euler_step_max, 5), round(found.euclidean_margin, 3)
    (True, 0.29289, 0.20101, -4.025)
    """

    weights: str | Float[ndarray, " players"] = "optimal"
    objective: str = "margin"
    mode: str = "blocks"
    points_per_dimension: int = 2
    sobol_points: int = 1024
    jacobian_lipschitz: float | Float[ndarray, "players players"] | None = None
    safety: float = 1.0
    batch_size: int = 256
    matrix_free: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            check_choice("weights", self.weights, ("optimal", "balanced"))
        else:
            check_weights(self.weights, len(self.weights))
        check_choice("objective", self.objective, ("margin", *STEP_POWER))
        check_choice("mode", self.mode, ("blocks", "jacobian"))
        for name in ("points_per_dimension", "sobol_points", "batch_size"):
            check_count(name, getattr(self, name))
        check_between("safety", self.safety, 1.0, 1e6)
        if isinstance(self.jacobian_lipschitz, ndarray):
            if not np.isfinite(self.jacobian_lipschitz).all() or (self.jacobian_lipschitz < 0).any():
                raise ValueError("jacobian_lipschitz must be non-negative and finite")
        elif self.jacobian_lipschitz is not None:
            check_nonnegative("jacobian_lipschitz", self.jacobian_lipschitz)
        if self.mode == "jacobian" and self.matrix_free:
            raise ValueError('mode "jacobian" needs explicit Jacobians: matrix_free must not be set with it')

    def certify(
        self,
        game: Game,
        region: Region | None = None,
        *,
        callback: Callable[[int, int], None] | None = None,
    ) -> SGNCertificate:
        """Certify a game on a region; an affine game needs no region and is certified everywhere, exactly.

        Args:
            game: at least one player.
            region: convex; `Box`, `Ball` or `Samples` in the game's dimension.
            callback: sees (samples done, samples) after each batch; the samples are visited more than once.

        Raises:
            ValueError: no region for a game that is not affine, dimensions disagree, or a Jacobian holds NaN.
        """
        self._check_game(game, region)
        points, widening = self._samples(game, region)
        source = self._jacobians(game, points, callback)
        bounds, rosen = source.bounds()
        bounds = inflate(bounds if widening is None else widening.widen(bounds), self.safety)
        weights, supremum, alpha = self._weights(source, bounds, widening)
        beta = source.lipschitz(weights) + (0.0 if widening is None else widening.norm(weights))
        exact = isinstance(source, SampledJacobians) and widening is not None and not game.local
        certificate = self._assemble(
            bounds,
            weights,
            alpha,
            supremum,
            min(beta * self.safety, lipschitz_from_blocks(bounds, weights)),
            block_sizes=game.tangent_sizes,
            euclidean_margin=rosen,
            rigorous=exact,
            local=game.local,
            n_samples=len(source),
        )
        return certificate if game.local else _with_radius(certificate, game, region)

    def certify_bounds(self, bounds: GameBounds, *, block_sizes: Sequence[int] | None = None) -> SGNCertificate:
        """Certify from block bounds alone, wherever they hold; the coupling may be sparse.

        Args:
            bounds: a player count of thousands is fine with a sparse coupling.
            block_sizes: default one dimension a player; used by `metric` and `norm` only.

        Raises:
            ValueError: mode is "jacobian", or objective needs a Lipschitz constant that the bounds do not give.
        """
        players = len(bounds.mu)
        if self.mode == "jacobian":
            raise ValueError('mode must be "blocks" where only block bounds are known, got "jacobian"')
        sizes = scalar_sizes(players) if block_sizes is None else check_block_sizes(block_sizes, None)
        check_shape("block_sizes", np.array(sizes), (players,))
        self._check_players(players)
        bounds = inflate(bounds, self.safety)
        weights, supremum, alpha = self._weights(None, bounds, None)
        return self._assemble(
            bounds,
            weights,
            alpha,
            supremum,
            lipschitz_from_blocks(bounds, weights),
            block_sizes=tuple(sizes),
            euclidean_margin=margin(bounds.mu, bounds.coupling, np.ones(players)),
            rigorous=True,
            local=False,
            n_samples=0,
            radius=np.inf if alpha > 0 else 0.0,
        )

    def _samples(self, game: Game, region: Region | None) -> tuple[ndarray, Deviation | None]:
        """Points, and how far the region's Jacobians can be from theirs (None: unknown)."""
        if game.affine:
            return np.zeros((1, game.dimension)), Deviation(np.zeros((game.players, game.players)), 0.0)
        assert region is not None
        points, covering = region.samples(
            self.points_per_dimension, self.sobol_points, cells=self.jacobian_lipschitz is not None, seed=self.seed
        )
        if self.jacobian_lipschitz is None or covering is None:
            return points, None
        return points, deviation(self.jacobian_lipschitz, covering, game.players)

    def _jacobians(
        self, game: Game, points: ndarray, callback: Callable[[int, int], None] | None
    ) -> SampledJacobians | JacobianProducts:
        free = self.matrix_free
        if free is None:
            free = game.dimension > MATRIX_FREE_DIMENSION and self.mode == "blocks" and not game.affine
        if free:
            return JacobianProducts(game, points, callback=callback)
        return SampledJacobians(game, points, self.batch_size, callback)

    def _weights(
        self, source: SampledJacobians | JacobianProducts | None, bounds: GameBounds, widening: Deviation | None
    ) -> tuple[ndarray, float, float]:
        """Weights, a bound on the margin of all weights, and the margin of these."""
        perron = optimal_weights(bounds.mu, bounds.coupling)
        weights, supremum, kept = perron.weights, perron.supremum, None
        if self.mode == "jacobian":
            assert isinstance(source, SampledJacobians)
            optimum, kept = source.optimal_signed(perron.weights)
            weights, supremum = optimum.weights, optimum.upper_bound
        if isinstance(self.weights, ndarray):
            weights = np.asarray(self.weights, dtype=float)
        elif self.weights == "balanced":
            weights = balanced_weights(bounds.coupling)
        elif self.objective != "margin":
            weights = self._step_weights(source, bounds, weights, kept)
        return weights, supremum, self._margin(source, bounds, widening, weights)

    def _step_weights(
        self,
        source: SampledJacobians | JacobianProducts | None,
        bounds: GameBounds,
        start: ndarray,
        kept: ndarray | None,
    ) -> ndarray:
        power = STEP_POWER[self.objective]
        if kept is not None:
            assert isinstance(source, SampledJacobians)
            sizes: Sequence[int] = source.sizes
            for_margin, for_lipschitz = kept, np.concatenate([kept, source.steepest(start)[None]])
        elif bounds.own_lipschitz is None:
            raise ValueError(f'objective "{self.objective}" needs own_lipschitz in the bounds')
        else:
            sizes = scalar_sizes(len(start))
            for_margin, for_lipschitz = comparison_jacobian(bounds)
        if signed_margin(for_margin, sizes, start) <= 0:
            return start
        return optimal_step_weights(for_margin, for_lipschitz, sizes, start, power=power)

    def _margin(
        self,
        source: SampledJacobians | JacobianProducts | None,
        bounds: GameBounds,
        widening: Deviation | None,
        weights: ndarray,
    ) -> float:
        from_blocks = margin(bounds.mu, bounds.coupling, weights)
        if self.mode == "blocks":
            return from_blocks
        assert source is not None
        signed = source.signed_margin(weights) - (0.0 if widening is None else widening.norm(weights))
        return max(from_blocks, signed - (self.safety - 1) * abs(signed))

    def _assemble(
        self,
        bounds: GameBounds,
        weights: ndarray,
        alpha: float,
        supremum: float,
        beta: float,
        **rest: Any,
    ) -> SGNCertificate:
        gain = small_gain(bounds.mu, bounds.coupling)
        if alpha > 0:
            status = CertificateStatus.CERTIFIED
        elif (bounds.mu <= 0).any():
            status = CertificateStatus.NO_CURVATURE
        elif isinstance(self.weights, ndarray) and supremum > 0:
            status = CertificateStatus.UNSUITABLE_WEIGHTS
        else:
            status = CertificateStatus.COUPLING_TOO_STRONG
        return SGNCertificate(
            status=status,
            weights=weights,
            margin=alpha,
            supremum=max(supremum, alpha),
            lipschitz=beta,
            mu=bounds.mu,
            coupling=bounds.coupling,
            own_lipschitz=bounds.own_lipschitz,
            small_gain=gain,
            mode=self.mode,
            **rest,
        )

    def _check_game(self, game: Game, region: Region | None) -> None:
        if region is None and not game.affine:
            raise ValueError("region must be given for a game whose Jacobian is not constant, got None")
        if region is not None and region.dimension != game.dimension:
            raise ValueError(f"region must have the game's dimension, {game.dimension}, got {region.dimension}")
        self._check_players(game.players)

    def _check_players(self, players: int) -> None:
        if isinstance(self.weights, ndarray):
            check_shape("weights", self.weights, (players,))
        if isinstance(self.jacobian_lipschitz, ndarray):
            check_shape("jacobian_lipschitz", self.jacobian_lipschitz, (players, players))


def _with_radius(certificate: SGNCertificate, game: Game, region: Region | None) -> SGNCertificate:
    """Add the safe ball around the equilibrium, whose distance from the centre the residual there bounds.

    On a ball of radius R around the centre c, strong monotonicity gives <F(x), M (x - c)> >= R (alpha R - ||F(c)||_M),
    so F points outwards on the boundary and has a zero inside once ||F(c)||_M <= alpha R, at most that over alpha
    away.
    """
    if not certificate.feasible:
        return replace(certificate, radius=0.0)
    if region is None:
        return replace(certificate, radius=np.inf)
    residual = certificate.norm(game.pseudo_gradient(region.centre))
    distance = float(residual) / certificate.margin
    inner = region.inner_radius(game.block_sizes, certificate.weights)
    radius = None if inner is None else max(inner - distance, 0.0)
    return replace(certificate, radius=radius, equilibrium_distance=distance)


def _encode(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, ndarray):
        return [_encode(v) for v in value] if value.ndim > 1 else [_encode(float(v)) for v in value]
    if isinstance(value, sp.sparray):
        triplets = sp.coo_array(value)
        row, column = triplets.coords
        shape = list(value.shape)
        return {"row": row.tolist(), "column": column.tolist(), "value": triplets.data.tolist(), "shape": shape}
    if isinstance(value, tuple):
        return list(value)
    return value
