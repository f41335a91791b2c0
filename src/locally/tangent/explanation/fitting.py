"""Fit g to f on weighted perturbations: least squares, gradient matching, lasso, and descent for all else.

With a linear g, squared error and gradient matching are one linear least-squares problem, solved by QR with the pinned
points eliminated exactly; every solve is batched over the points that are explained. Source: Han, Srinivas, Lakkaraju,
arXiv 2206.01254, section 3; the closed forms replace the stochastic descent of the authors' code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locally.tangent.explanation.interpretable import InterpretableModel, LinearModel, LogisticModel, project


@dataclass(frozen=True)
class Sample:
    """f on the perturbations of a batch of points.

    Attributes:
        noise, weight: perturbations and normalised weights, shared by the batch where the leading dimension is 1.
        values: f, for every point and perturbation.
        gradients: gradient of f over the noise; None where the loss does not need it.
        pinned, pinned_values: where g must equal f, and f there.
        block: consecutive rows that were drawn together.
        sampled: whether there is sampling error.
        x0: the points themselves, for losses of the user's own.
    """

    noise: Float[Tensor, "shared n q"]
    weight: Float[Tensor, "weighted n"]
    values: Float[Tensor, "batch n"]
    gradients: Float[Tensor, "batch n q"] | None
    pinned: Float[Tensor, "pins q"]
    pinned_values: Float[Tensor, "batch pins"]
    block: int
    sampled: bool
    x0: Float[Tensor, "batch d"]

    def mean_gradient(self) -> Float[Tensor, "batch q"]:
        assert self.gradients is not None
        return torch.einsum("bn,bnq->bq", self.weight.expand(self.values.shape), self.gradients)


@dataclass(frozen=True)
class Fit:
    """theta = (w, b) for linear and logistic g, with the standard error of w, the rank and whether it converged."""

    theta: Float[Tensor, "batch p"]
    std_error: Float[Tensor, "batch q"]
    full_rank: Bool[Tensor, " batch"]
    converged: Bool[Tensor, " batch"]


PointwiseLoss = Callable[[Float[Tensor, "batch p"], Sample], Float[Tensor, "batch n"]]


def squared_error(model: InterpretableModel) -> PointwiseLoss:
    """(f - g)^2 at every perturbation."""
    return lambda theta, s: (s.values - model.predict(theta, s.noise)) ** 2


def gradient_error(model: InterpretableModel) -> PointwiseLoss:
    """||grad f - grad g||^2 over the noise, at every perturbation."""

    def loss(theta: Tensor, s: Sample) -> Tensor:
        assert s.gradients is not None
        return (s.gradients - model.gradient(theta, s.noise)).square().sum(-1)

    return loss


def bernoulli_divergence(model: LogisticModel) -> PointwiseLoss:
    """Cross-entropy of g under f less the entropy of f, so that it vanishes where they agree."""

    def loss(theta: Tensor, s: Sample) -> Tensor:
        logit = project(s.noise, theta[:, :-1]) + theta[:, -1:]
        cross_entropy = torch.nn.functional.softplus(logit) - s.values * logit
        entropy = -torch.xlogy(s.values, s.values) - torch.xlogy(1 - s.values, 1 - s.values)
        return cross_entropy - entropy

    return loss


def fit_linear(
    s: Sample, *, match_values: bool, gradient_weight: float, fit_intercept: bool, ridge: float, lasso: float
) -> Fit:
    """Linear g for  match_values * SE + gradient_weight * GM + penalty, all means weighted.

    Minimises sum_i W_i (f_i - g_i)^2 + gradient_weight sum_i W_i ||grad f_i - w||^2 + ridge ||w||^2 (scikit-learn's
    Ridge with sample weights W) or, with lasso, half the losses plus lasso ||w||_1 (scikit-learn's Lasso). A problem
    without full rank gets the solution of least norm. Costs O(n q^2) a point, once for all points where they share
    noise and weights.

    Raises:
        ValueError: no model of the class passes through the pinned points.
    """
    q = s.noise.shape[2]
    if not match_values:
        return gradient_matching(s, ridge / gradient_weight, lasso / gradient_weight, fit_intercept)
    A, centre = design(s, fit_intercept)
    particular, free = eliminate_pins(s, fit_intercept, A.shape[2])
    root = s.weight.sqrt()[..., None]
    E = torch.eye(q, A.shape[2], dtype=A.dtype, device=A.device)  # picks w out of theta

    rows = [root * (A @ free)]
    targets = [root[..., 0] * (s.values - project(A, particular))]
    if gradient_weight:
        rows.append((math.sqrt(gradient_weight) * E @ free).expand(rows[0].shape[0], -1, -1))
        targets.append(math.sqrt(gradient_weight) * (s.mean_gradient() - particular[:, :q]))
    if ridge:
        rows.append((math.sqrt(ridge) * E @ free).expand(rows[0].shape[0], -1, -1))
        targets.append(-math.sqrt(ridge) * particular[:, :q])
    M, target = torch.cat(rows, 1), torch.cat(targets, 1)
    if lasso:
        theta, converged = fit_lasso(M, target, E @ free, particular[:, :q], lasso)
        theta = particular + theta @ free.T
        std_error = torch.full_like(theta[:, :q], math.nan)
        full_rank = torch.ones_like(converged)
    else:
        solution, inverse, rank = least_squares(M, target)
        theta = particular + solution @ free.T
        full_rank = (rank == free.shape[1]).expand(len(theta))
        converged = torch.ones_like(full_rank)
        std_error = sandwich(s, A, theta, gradient_weight, E, free, inverse)
    if fit_intercept:
        w, b = theta[:, :q], theta[:, q]
        theta = torch.cat([w, (b - (centre * w).sum(1))[:, None]], 1)
    else:
        theta = torch.cat([theta, torch.zeros_like(theta[:, :1])], 1)
    return Fit(theta, std_error, full_rank, converged)


def gradient_matching(s: Sample, ridge: float, lasso: float, fit_intercept: bool) -> Fit:
    """w = sum_i W_i grad f_i (shrunk by a penalty); the loss is blind to b, which then gets its SE-optimal value."""
    mean = s.mean_gradient()
    w = torch.sign(mean) * (mean.abs() - lasso).clamp_min(0) / (1 + ridge)
    weight = s.weight.expand(s.values.shape)
    b = (weight * (s.values - project(s.noise, w))).sum(1) if fit_intercept else torch.zeros_like(w[:, 0])
    if s.sampled and not lasso:
        assert s.gradients is not None
        std_error = block_error(weight[..., None] * (s.gradients - mean[:, None]) / (1 + ridge), s.block, 1)
    else:
        std_error = torch.full_like(w, math.nan if lasso else 0.0)
    yes = torch.ones(len(w), dtype=torch.bool, device=w.device)
    return Fit(torch.cat([w, b[:, None]], 1), std_error, yes, yes)


def design(s: Sample, fit_intercept: bool) -> tuple[Float[Tensor, "shared n p"], Float[Tensor, "centred q"]]:
    """[Z, 1] or Z. Without pins Z is centred, so that a solution of least norm leaves the intercept out of the norm."""
    Z, centre = s.noise, s.noise.new_zeros(1, s.noise.shape[2])
    if fit_intercept and not len(s.pinned):
        centre = (s.weight[..., None] * Z).sum(1)
        Z = Z - centre[:, None]
    return (torch.cat([Z, torch.ones_like(Z[..., :1])], 2) if fit_intercept else Z), centre


def eliminate_pins(
    s: Sample, fit_intercept: bool, p: int, pinned_values: Float[Tensor, "batch pins"] | None = None
) -> tuple[Float[Tensor, "batch p"], Float[Tensor, "p free"]]:
    """One theta that passes through the pinned points, and a basis of the directions that keep it there."""
    y = s.pinned_values if pinned_values is None else pinned_values
    C = torch.cat([s.pinned, torch.ones_like(s.pinned[:, :1])], 1) if fit_intercept else s.pinned
    if not len(C):
        return y.new_zeros(len(y), p), torch.eye(p, dtype=y.dtype, device=y.device)
    U, S, Vh = torch.linalg.svd(C, full_matrices=True)
    rank = int(torch.linalg.matrix_rank(C, rtol=1e-12))
    particular = ((y @ U[:, :rank]) / S[:rank]) @ Vh[:rank]
    if not torch.allclose(particular @ C.T, y, rtol=1e-8, atol=1e-8 * float(1 + y.abs().max())):
        raise ValueError("no model of this class passes through the pinned points: fit_intercept must be True")
    return particular, Vh[rank:].T


def least_squares(
    M: Float[Tensor, "shared rows p"], target: Float[Tensor, "batch rows"]
) -> tuple[Float[Tensor, "batch p"], Float[Tensor, "shared p p"], Int[Tensor, " shared"]]:
    """Least-norm solution, pseudo-inverse of M^T M, and rank, through QR and an SVD of its small factor."""
    if not M.shape[2] or not M.shape[1]:
        empty = M.new_zeros(M.shape[0], M.shape[2], M.shape[2])
        return target.new_zeros(len(target), M.shape[2]), empty, torch.zeros(len(M), dtype=torch.long, device=M.device)
    Q, R = torch.linalg.qr(M)
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    threshold = max(M.shape[1:]) * torch.finfo(M.dtype).eps * S[:, :1]
    kept = S.gt(threshold)
    inverse = torch.where(kept, 1 / S, 0)
    coordinates = project(U.mT, project(Q.mT, target))
    solution = project(Vh.mT, coordinates * inverse)
    return solution, (Vh.mT * inverse[:, None] ** 2) @ Vh, kept.sum(1)


def sandwich(
    s: Sample,
    A: Float[Tensor, "shared n p"],
    theta: Float[Tensor, "batch p"],
    gradient_weight: float,
    E: Float[Tensor, "q p"],
    free: Float[Tensor, "p free"],
    inverse: Float[Tensor, "solved free free"],
) -> Float[Tensor, "batch q"]:
    """Standard error of w under heteroscedastic errors, counted by blocks of dependent draws."""
    q = len(E)
    if not s.sampled or not free.shape[1]:
        return torch.zeros_like(theta[:, :q])
    residual = s.weight * (s.values - project(A, theta))
    influence = residual[..., None] * (A @ (free @ inverse @ (E @ free).T))
    if gradient_weight:
        assert s.gradients is not None
        pull = s.weight[..., None] * (s.gradients - theta[:, None, :q])
        influence = influence + gradient_weight * pull @ ((E @ free) @ inverse @ (E @ free).T)
    return block_error(influence, s.block, free.shape[1])


def block_error(influence: Float[Tensor, "batch n q"], block: int, parameters: int) -> Float[Tensor, "batch q"]:
    """Root of the sum of squared influences, summed within blocks first, with the small-sample factor m / (m - p).

    NaN where there are not more blocks than parameters: then nothing is left to estimate the error from.
    """
    batch, n, q = influence.shape
    if block > 1:
        padding = influence.new_zeros(batch, -n % block, q)
        influence = torch.cat([influence, padding], 1).reshape(batch, -1, block, q).sum(2)
    m = influence.shape[1]
    if m <= parameters:
        return torch.full_like(influence[:, 0], math.nan)
    return (influence.square().sum(1) * m / (m - parameters)).sqrt()


def fit_lasso(
    M: Float[Tensor, "shared rows p"],
    target: Float[Tensor, "batch rows"],
    E: Float[Tensor, "q p"],
    offset: Float[Tensor, "batch q"],
    penalty: float,
    *,
    max_steps: int = 5000,
    tol: float = 1e-9,
) -> tuple[Float[Tensor, "batch p"], Bool[Tensor, " batch"]]:
    """Minimise ||M t - target||^2 / 2 + penalty ||E t + offset||_1 by ADMM, then solve exactly on the found support."""
    H, c = M.mT @ M, project(M.mT, target)
    if not H.shape[1]:
        return c, torch.ones(len(c), dtype=torch.bool, device=c.device)
    rho = (torch.diagonal(H, dim1=1, dim2=2).mean(1) + 1e-12)[:, None]
    factor = torch.linalg.cholesky(H + rho[..., None] * (E.T @ E) + 1e-14 * torch.eye(len(H[0]), device=H.device))
    z = torch.zeros_like(offset)
    u = torch.zeros_like(offset)
    t = torch.zeros_like(c)
    scale = c.abs().amax(1) / rho[:, 0] + offset.abs().amax(1) + 1e-12
    converged = torch.zeros(len(c), dtype=torch.bool, device=c.device)
    for _ in range(max_steps):
        t = torch.cholesky_solve((c + rho * ((z - u - offset) @ E))[..., None], factor)[..., 0]
        v = t @ E.T + offset
        previous, z = z, torch.sign(v + u) * ((v + u).abs() - penalty / rho).clamp_min(0)
        u = u + v - z
        converged = ((v - z).abs().amax(1) + (z - previous).abs().amax(1)) <= tol * scale
        if bool(converged.all()):
            break
    polished = [polish(H[i % len(H)], c[i], E, offset[i], z[i], t[i], penalty) for i in range(len(c))]
    return torch.stack(polished), converged


def polish(H: Tensor, c: Tensor, E: Tensor, offset: Tensor, z: Tensor, t: Tensor, penalty: float) -> Tensor:
    """The minimiser with the signs of z and zeros where z has them, unless that turns a sign."""
    zero = E[z == 0]
    k = len(zero)
    gradient = c - penalty * (torch.sign(z) @ E)
    kkt = torch.cat([torch.cat([H, zero.T], 1), torch.cat([zero, H.new_zeros(k, k)], 1)])
    solution = torch.linalg.lstsq(kkt, torch.cat([gradient, -offset[z == 0]])[:, None]).solution[: len(t), 0]
    signs_hold = bool((torch.sign(E @ solution + offset)[z != 0] == torch.sign(z)[z != 0]).all())
    return solution if signs_hold and bool(solution.isfinite().all()) else t


def fit_by_descent(
    s: Sample,
    model: InterpretableModel,
    losses: list[PointwiseLoss],
    *,
    fit_intercept: bool,
    ridge: float,
    max_steps: int = 300,
) -> Fit:
    """Minimise the weighted mean of the last of `losses` + ridge ||w||^2 by L-BFGS, for any model and smooth loss.

    The earlier losses only lead to a good start: gradient matching of a logistic g is not convex and starts from its
    squared-error fit, which starts from the maximum-likelihood fit.
    """
    batch, q = len(s.values), s.noise.shape[2]
    theta = model.start(batch, q).to(s.values)
    particular, free = torch.zeros_like(theta), torch.eye(theta.shape[1], dtype=theta.dtype, device=theta.device)
    if isinstance(model, LinearModel):
        kept = q + 1 if fit_intercept else q
        pinned_values = model.link(s.pinned_values)
        if not bool(pinned_values.isfinite().all()):
            raise ValueError("f must lie in (0, 1) at the pinned points for a logistic model to pass through them")
        part, basis = eliminate_pins(s, fit_intercept, kept, pinned_values)
        pad = (0, q + 1 - kept)
        particular = torch.nn.functional.pad(part, pad)
        free = torch.nn.functional.pad(basis.T, pad).T
    elif len(s.pinned):
        raise ValueError(f"a {type(model).__name__} cannot be pinned: take a neighbourhood without pinned points")

    def parameters(phi: Tensor) -> Tensor:
        return particular + phi @ free.T

    def penalised(loss: PointwiseLoss) -> Callable[[Tensor], Tensor]:
        return lambda phi: (
            (s.weight * loss(parameters(phi), s)).sum(1)
            + ridge * (model.attributions(parameters(phi), q).square().sum(1))
        )

    phi = (theta - particular) @ torch.linalg.pinv(free).T
    converged = torch.ones(batch, dtype=torch.bool, device=phi.device)
    for loss in losses:
        phi, converged = minimise(penalised(loss), phi, max_steps=max_steps)
    std_error = descent_error(s, model, losses[-1], penalised(losses[-1]), parameters, phi)
    return Fit(parameters(phi), std_error, torch.ones_like(converged), converged)


def minimise(
    objective: Callable[[Float[Tensor, "batch p"]], Float[Tensor, " batch"]],
    start: Float[Tensor, "batch p"],
    *,
    max_steps: int,
    gtol: float = 1e-9,
    memory: int = 10,
) -> tuple[Float[Tensor, "batch p"], Bool[Tensor, " batch"]]:
    """L-BFGS on independent problems side by side, each with its own backtracking step.

    A problem is done when the largest entry of its gradient is gtol times the one at the start (or tiny), or when no
    step decreases it any more in float64.
    """

    def evaluate(t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            t = t.detach().requires_grad_(True)
            value = objective(t)
            (gradient,) = torch.autograd.grad(value.sum(), t)
        return value.detach(), gradient

    theta = start
    if not theta.shape[1]:
        return theta, torch.ones(len(theta), dtype=torch.bool, device=theta.device)
    value, gradient = evaluate(theta)
    # Near the minimum the values differ by less than their rounding, while the gradients still tell the way.
    slack = 4 * torch.finfo(theta.dtype).eps * value.abs()
    target = gtol * gradient.abs().amax(1).clamp_min(1e-6)
    pairs: list[tuple[Tensor, Tensor]] = []
    done = gradient.abs().amax(1) <= target
    stalled = torch.zeros_like(done)
    for _ in range(max_steps):
        if bool((done | stalled).all()):
            break
        direction = -two_loop(gradient, pairs)
        slope = (direction * gradient).sum(1)
        uphill = slope >= 0
        direction = torch.where(uphill[:, None], -gradient, direction)
        slope = torch.where(uphill, -gradient.square().sum(1), slope)
        first = 1 / gradient.norm(dim=1).clamp_min(1) if not pairs else torch.ones_like(value)
        step = torch.where(done | stalled, 0, first)
        for _ in range(30):  # Armijo
            trial = theta + step[:, None] * direction
            trial_value, trial_gradient = evaluate(trial)
            poor = ~(trial_value <= value + 1e-4 * step * slope + slack) & (step > 0)
            if not bool(poor.any()):
                break
            step = torch.where(poor, step / 2, step)
        else:
            trial = torch.where(poor[:, None], theta, trial)
            trial_value = torch.where(poor, value, trial_value)
            trial_gradient = torch.where(poor[:, None], gradient, trial_gradient)
            stalled = stalled | poor
        pairs = [*pairs[-memory + 1 :], (trial - theta, trial_gradient - gradient)]
        theta, value, gradient = trial, trial_value, trial_gradient
        done = gradient.abs().amax(1) <= target
    # Rounding can stop the line search a little above the target; that is as good as float64 gets.
    at_rounding = stalled & (gradient.abs().amax(1) <= 1e3 * target)
    return theta, done | at_rounding


def two_loop(gradient: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Inverse Hessian times gradient from the last steps (Nocedal and Wright, Algorithm 7.4), batched.

    A pair without positive curvature counts as absent for its problem alone.
    """
    r = gradient.clone()
    history: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    gamma = torch.ones_like(gradient[:, 0])
    for step, change in reversed(pairs):
        curvature = (step * change).sum(1)
        usable = curvature > 1e-12 * step.norm(dim=1) * change.norm(dim=1)
        rho = torch.where(usable, 1 / torch.where(usable, curvature, 1), 0)
        alpha = rho * (step * r).sum(1)
        r = r - alpha[:, None] * change
        if not history:
            gamma = torch.where(usable, curvature / change.square().sum(1).clamp_min(1e-300), 1)
        history.append((step, change, rho, alpha))
    r = gamma[:, None] * r
    for step, change, rho, alpha in reversed(history):
        r = r + (alpha - rho * (change * r).sum(1))[:, None] * step
    return r


def descent_error(
    s: Sample,
    model: InterpretableModel,
    loss: PointwiseLoss,
    objective: Callable[[Tensor], Tensor],
    parameters: Callable[[Tensor], Tensor],
    phi: Float[Tensor, "batch free"],
) -> Float[Tensor, "batch q"]:
    """Sandwich standard error of the attributions of an M-estimator: inverse Hessian, scores, inverse Hessian."""
    q, free = s.noise.shape[2], phi.shape[1]
    attributions = lambda p: model.attributions(parameters(p), q)
    if not s.sampled or not free:
        return torch.zeros_like(attributions(phi))
    each = range(free)
    with torch.enable_grad():
        p = phi.detach().requires_grad_(True)
        shown = attributions(p)
        columns = [torch.autograd.grad(shown[:, j].sum(), p, retain_graph=True)[0] for j in range(shown.shape[1])]
        (gradient,) = torch.autograd.grad(objective(p).sum(), p, create_graph=True)
        rows = [torch.autograd.grad(gradient[:, k].sum(), p, retain_graph=True)[0] for k in each]
        # The scores, one perturbation each: differentiate the weighted gradient by the weights.
        weight = s.weight.expand(s.values.shape).clone().requires_grad_(True)
        (total,) = torch.autograd.grad((weight * loss(parameters(p), s)).sum(), p, create_graph=True)
        scores = [torch.autograd.grad(total[:, k].sum(), weight, retain_graph=True)[0] for k in each]
    influence = s.weight[..., None] * torch.stack(scores, -1)
    bread = torch.linalg.pinv(torch.stack(rows, 1), hermitian=True)
    return block_error(influence @ bread @ torch.stack(columns, -1), s.block, free)
