"""Games over softmax policies, certified in Fisher geometry, and the mirror certificate of entropy-regularised games.

Natural policy gradient on logits is mirror descent on policies. Near an equilibrium the Fisher certificate bounds it
locally, for normal-form and Markov games alike; for normal-form games the mirror certificate is global. Logits are
ordered by player, then state, then action. Source: arXiv 2512.06791, mirror version; the global step bound is derived
in `MirrorCertificate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_between, check_finite, check_nonnegative, check_positive, check_shape
from locally.equilibrium.small_gain.games import Game
from locally.equilibrium.small_gain.margins import margin as small_gain_margin
from locally.equilibrium.small_gain.margins import rescale
from locally.equilibrium.small_gain.perron import optimal_weights

if TYPE_CHECKING:
    from torch import Tensor


class TabularMarkovGame(Game):
    """Discounted Markov game with one softmax policy for each player and state, entropy-regularised.

    Player i minimises -(sum_{s,a} d(s) pi(a|s) R_i(s,a) + tau sum_s H(pi_i(.|s))), with the normalised discounted
    occupancy d = (1 - gamma) (I - gamma P_pi^T)^{-1} start. The entropy is summed over states as the paper's code does,
    or weighted by the occupancy.

    Args:
        P: transition probabilities, shape (S, A_1, ..., A_N, S).
        R: rewards, shape (S, A_1, ..., A_N) shared by all, or (N, S, A_1, ..., A_N).
        gamma: discount in [0, 1).
        tau: entropy weight, >= 0.
        start: distribution of the first state, default state 0.
        occupancy_weighted_entropy: weight each state's entropy by its occupancy.

    Raises:
        ValueError: shapes disagree, a row of P is no distribution, or a parameter is out of range.
    """

    def __init__(
        self,
        P: ndarray,
        R: ndarray,
        gamma: float,
        tau: float,
        *,
        start: Float[ndarray, " states"] | None = None,
        occupancy_weighted_entropy: bool = False,
        device: str = "cpu",
    ) -> None:
        import torch

        P, R = np.asarray(P, dtype=float), np.asarray(R, dtype=float)
        if P.ndim < 3 or P.shape[0] != P.shape[-1]:
            raise ValueError(f"P must have shape (S, A_1, ..., A_N, S), got {P.shape}")
        actions, players, states = P.shape[1:-1], P.ndim - 2, P.shape[0]
        if R.shape == P.shape[:-1]:
            R = np.broadcast_to(R, (players, *R.shape))
        check_shape("R", R, (players, *P.shape[:-1]))
        check_finite("P", P)
        check_finite("R", R)
        if P.min() < 0 or np.abs(P.sum(axis=-1) - 1).max() > 1e-9:
            raise ValueError("P must hold a probability distribution over next states in its last axis")
        check_between("gamma", gamma, 0, 1 - 1e-12)
        check_nonnegative("tau", tau)
        if start is None:
            start = np.eye(states)[0]
        check_shape("start", start, (states,))
        if start.min() < 0 or abs(start.sum() - 1) > 1e-9:
            raise ValueError("start must be a probability distribution over states")
        as_tensor = lambda a: torch.tensor(np.array(a), dtype=torch.float64, device=device)
        self.P, self.R, self.start = as_tensor(P), as_tensor(R), as_tensor(start)
        self.gamma, self.tau, self.states, self.actions = float(gamma), float(tau), states, actions
        self.occupancy_weighted_entropy = occupancy_weighted_entropy
        self.device = device
        self.block_sizes = tuple(states * a for a in actions)

    def policies(self, theta: Float[ndarray, "*batch d"]) -> list[Float[ndarray, "*batch states actions"]]:
        """Action probabilities of each player."""
        found = []
        for block, actions in zip(np.split(theta, np.cumsum(self.block_sizes)[:-1], axis=-1), self.actions):
            logits = block.reshape(*theta.shape[:-1], self.states, actions)
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            found.append(weights / weights.sum(axis=-1, keepdims=True))
        return found

    def losses(self, theta: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch players"]:
        """What each player minimises."""
        flat = self._map(self._losses, theta.reshape(-1, self.dimension))
        return flat.reshape(*theta.shape[:-1], self.players)

    def pseudo_gradient(self, x: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch d"]:
        return self._map(self._gradient, x.reshape(-1, self.dimension)).reshape(x.shape)

    def jacobian(self, x: Float[ndarray, "samples d"]) -> Float[ndarray, "samples t t"]:
        import torch

        return self._map(torch.func.jacrev(self._gradient), x)

    def fisher(self, theta: Float[ndarray, "samples d"]) -> Float[ndarray, "samples d d"]:
        """diag(p) - p p^T for every player and state, block-diagonal; not weighted by occupancy."""
        return self._map(self._fisher, theta)

    def kl_to(
        self, target: Float[ndarray, " d"], theta: Float[ndarray, "*batch d"], weights: Float[ndarray, " players"]
    ) -> Float[ndarray, "*batch"]:
        """The Lyapunov function sum_i w_i sum_s KL(target_i(.|s) || pi_i(.|s))."""
        total = np.zeros(theta.shape[:-1])
        for w, goal, policy in zip(weights, self.policies(target), self.policies(theta), strict=True):
            total = total + w * (goal * (np.log(goal) - np.log(policy))).sum(axis=(-2, -1))
        return np.asarray(total)

    def _split(self, theta: "Tensor") -> list["Tensor"]:
        import torch

        blocks = torch.split(theta, list(self.block_sizes))
        return [block.reshape(self.states, a) for block, a in zip(blocks, self.actions, strict=True)]

    def _losses(self, theta: "Tensor") -> "Tensor":
        import torch

        log_policies = [torch.log_softmax(logits, dim=-1) for logits in self._split(theta)]
        joint = torch.ones(self.states, 1, dtype=theta.dtype, device=theta.device)
        for log_policy in log_policies:
            joint = (joint[:, :, None] * log_policy.exp()[:, None, :]).flatten(1)
        transition = (joint[:, :, None] * self.P.reshape(self.states, -1, self.states)).sum(dim=1)
        identity = torch.eye(self.states, dtype=theta.dtype, device=theta.device)
        occupancy = (1 - self.gamma) * torch.linalg.solve(identity - self.gamma * transition.T, self.start)
        rewards = (joint * self.R.reshape(self.players, self.states, -1)).sum(dim=-1) @ occupancy
        entropies = torch.stack([-(log_p.exp() * log_p).sum(dim=-1) for log_p in log_policies])
        weighted = entropies @ occupancy if self.occupancy_weighted_entropy else entropies.sum(dim=-1)
        return -(rewards + self.tau * weighted)

    def _gradient(self, theta: "Tensor") -> "Tensor":
        """Each player's gradient in its own logits: one reverse pass over all losses, then the diagonal blocks."""
        import torch

        slopes = torch.func.jacrev(self._losses)(theta)
        ends = [0, *np.cumsum(self.block_sizes).tolist()]
        return torch.cat([slopes[i, low:high] for i, (low, high) in enumerate(pairwise(ends))])

    def _natural(self, theta: "Tensor") -> "Tensor":
        """F^+ g in closed form: diag(p) - p p^T maps g / p - mean(g / p) to g, since g sums to zero in each state."""
        import torch

        natural = []
        for logits, slope in zip(self._split(theta), self._split(self._gradient(theta)), strict=True):
            relative = slope / torch.softmax(logits, dim=-1)
            natural.append((relative - relative.mean(dim=-1, keepdim=True)).flatten())
        return torch.cat(natural)

    def _fisher(self, theta: "Tensor") -> "Tensor":
        import torch

        blocks: list[Tensor] = []
        for logits in self._split(theta):
            p = torch.softmax(logits, dim=-1)
            blocks.extend(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
        return torch.block_diag(*blocks)

    def _map(self, function, points: ndarray) -> ndarray:  # type: ignore[no-untyped-def]
        import torch

        tensor = torch.as_tensor(points, dtype=torch.float64, device=self.device)
        return torch.func.vmap(function)(tensor).detach().cpu().numpy()


class NormalFormGame(TabularMarkovGame):
    """Finite game in normal form over softmax policies, entropy-regularised.

    Player i minimises -(E_x[u_i] + tau H(x_i)); natural policy gradient on its logits is mirror descent on x.

    Args:
        payoffs: one array u_i of shape (A_1, ..., A_N) for each of the N players.
        tau: entropy weight, > 0.

    Raises:
        ValueError: shapes disagree or tau is not positive.

    >>> pennies = np.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> game = NormalFormGame([pennies, -pennies], tau=2.0)
    >>> game.interaction_norms()
    array([[0., 1.],
           [1., 0.]])
    """

    def __init__(self, payoffs: Sequence[ndarray], tau: float, *, device: str = "cpu") -> None:
        check_positive("tau", tau)
        shapes = {np.shape(u) for u in payoffs}
        if len(shapes) != 1 or len(next(iter(shapes))) != len(payoffs):
            raise ValueError(f"payoffs must hold N arrays of one shape (A_1, ..., A_N), got shapes {sorted(shapes)}")
        R = np.stack([np.asarray(u, dtype=float) for u in payoffs])[:, None]
        self.payoffs = R[:, 0]
        super().__init__(np.ones((1, *R.shape[2:], 1)), R, 0.0, tau, device=device)

    def interaction_norms(self) -> Float[ndarray, "players players"]:
        """L_ij with |<u_i-part of x_j - y_j, x_i - y_i>| <= L_ij ||x_j - y_j||_1 ||x_i - y_i||_1 for all policies.

        Differences of policies sum to zero, and the extreme ones move half a unit between two actions; so L_ij is a
        quarter of the largest change of a change, over all actions of the others. At most max |u_i|.
        """
        norms = np.zeros((self.players, self.players))
        for i in range(self.players):
            for j in range(self.players):
                if i != j:
                    u = np.moveaxis(self.payoffs[i], (i, j), (0, 1))
                    own = u[:, None] - u[None, :]
                    norms[i, j] = np.abs(own[:, :, :, None] - own[:, :, None, :]).max() / 4
        return norms


class FisherGeometry(Game):
    """A game over softmax policies as natural policy gradient sees it: for the certifier and for `GradientPlay`.

    Its pseudo-gradient is the natural gradient F^+ g. Its Jacobian is F^{-1/2} J F^{-1/2} on the directions that change
    a policy (logits up to a constant in each state), so that block bounds, margin and Lipschitz constant are those of
    the Fisher metric M(w) = blockdiag(w_i F_i). The metric varies from point to point: certificates are local.

    Args:
        game: a `TabularMarkovGame` or `NormalFormGame`.
        connection: add what the paper's code leaves out, the derivative of the metric along the flow and of F^{-1} in
            the natural gradient. Then a positive margin is contraction of the flow in the Riemannian distance. Both
            vanish at an equilibrium.
    """

    local = True

    def __init__(self, game: TabularMarkovGame, *, connection: bool = False) -> None:
        if not isinstance(game, TabularMarkovGame):
            raise TypeError(f"game must be a TabularMarkovGame, got {type(game).__name__}")
        if min(game.actions) < 2:
            raise ValueError(f"game must give every player at least two actions, got {game.actions}")
        self.game, self.connection = game, connection
        self.block_sizes = game.block_sizes
        self._basis = _mean_free_basis(game.states, game.actions)

    @property
    def tangent_sizes(self) -> tuple[int, ...]:
        return tuple(self.game.states * (a - 1) for a in self.game.actions)

    def pseudo_gradient(self, x: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch d"]:
        return self.game._map(self.game._natural, x.reshape(-1, self.dimension)).reshape(x.shape)

    def jacobian(self, x: Float[ndarray, "samples d"]) -> Float[ndarray, "samples t t"]:
        fisher = self.game.fisher(x)
        form = self._covariant_form(x, fisher) if self.connection else self.game.jacobian(x)
        Q = self._basis
        values, vectors = np.linalg.eigh(Q.T @ fisher @ Q)
        root = (vectors / np.sqrt(values)[:, None, :]) @ vectors.swapaxes(1, 2)
        return root @ (Q.T @ form @ Q) @ root

    def _covariant_form(self, x: ndarray, fisher: ndarray) -> ndarray:
        """F Dv + (1/2) D_v F for the natural gradient v: half the rate at which the flow shrinks the metric."""
        import torch

        game = self.game
        derivative = game._map(torch.func.jacfwd(game._natural), x)
        along = game._map(lambda theta: torch.func.jvp(game._fisher, (theta,), (game._natural(theta),))[1], x)
        return fisher @ derivative + along / 2


@dataclass(frozen=True)
class MirrorCertificate:
    """Global certificate of an entropy-regularised normal-form game in V = sum_i w_i KL(x_i* || x_i).

    With theta = log x, one step of size eta is theta+ = (theta + eta u(x)) / (1 + eta tau), up to constants: natural
    policy gradient of step eta / (1 + eta tau). Pinsker's inequality and Young's give
    V+ (1 + eta c) <= V for c = min(tau, 2 alpha - eta sigma^2), where alpha = tau - lambda_max(sym K),
    sigma = ||K||_2 and K = [sqrt(w_i / w_j) L_ij].
    """

    weights: Float[ndarray, " players"]
    margin: float
    coupling: Float[ndarray, "players players"]
    coupling_norm: float
    tau: float

    @property
    def feasible(self) -> bool:
        """Whether the margin is positive."""
        return self.margin > 0

    @property
    def step_max(self) -> float:
        """Mirror steps eta below contract; infinite without coupling, 0 if nothing is certified."""
        if not self.feasible:
            return 0.0
        return 2 * self.margin / self.coupling_norm**2 if self.coupling_norm > 0 else np.inf

    @property
    def step_opt(self) -> float:
        """A step near the best one, at which c is half its largest value."""
        return self.step_max / 2

    def contraction(self, eta: float) -> float:
        """Certified factor of the Lyapunov function per mirror step; infinite where none is certified."""
        check_nonnegative("eta", eta)
        rate = min(self.tau, 2 * self.margin - eta * self.coupling_norm**2)
        return 1 / (1 + eta * rate) if self.feasible and rate > 0 else np.inf

    def natural_step(self, eta: float) -> float:
        """The natural-policy-gradient step eta / (1 + eta tau) that makes the same move as the mirror step eta."""
        return eta / (1 + eta * self.tau)


def certify_mirror(game: NormalFormGame) -> MirrorCertificate:
    """Certify natural policy gradient globally; feasible if and only if rho(L) < tau.

    >>> pennies = np.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> found = certify_mirror(NormalFormGame([pennies, -pennies], tau=2.0))
    >>> found.feasible, round(found.margin, 6), round(found.step_max, 6)
    (True, 1.0, 2.0)
    """
    coupling = game.interaction_norms()
    mu = np.full(game.players, game.tau)
    weights = optimal_weights(mu, coupling).weights
    norm = float(np.linalg.norm(rescale(coupling, np.sqrt(weights)), 2))
    return MirrorCertificate(weights, small_gain_margin(mu, coupling, weights), coupling, norm, game.tau)


def mirror_step(game: NormalFormGame, theta: Float[ndarray, "*batch d"], eta: float) -> Float[ndarray, "*batch d"]:
    """One mirror-descent step with the entropy taken implicitly; logits come back with mean zero."""
    check_positive("eta", eta)
    natural = FisherGeometry(game).pseudo_gradient(theta)
    return theta - eta / (1 + eta * game.tau) * natural


def _mean_free_basis(states: int, actions: Sequence[int]) -> Float[ndarray, "d t"]:
    """Orthonormal columns that span the logits of mean zero in every player's every state."""
    columns = []
    for count in actions:
        full, _ = np.linalg.qr(np.column_stack([np.ones(count), np.eye(count)[:, 1:]]))
        columns.extend([full[:, 1:]] * states)
    d, t = sum(c.shape[0] for c in columns), sum(c.shape[1] for c in columns)
    basis = np.zeros((d, t))
    row = column = 0
    for block in columns:
        basis[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return basis
