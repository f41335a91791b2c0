"""Linear structural equation models, the interventions that act on them, and how they are observed.

V = B V + N over an acyclic graph, Cov(N) = diag(noise_var), one node is the target Y and is never intervened on.
Source: Parulekar, Shanmugam and Shakkottai, PAC Generalization via Invariant Representations (arXiv 2205.15196).
"""

from bisect import insort
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.causal.invariance.bounds import InterventionFamily
from locally.checks import check_choice, check_count, check_finite, check_nonnegative, check_shape, check_square


class CyclicGraph(ValueError):
    """The coefficients describe a cycle: the moments of its interventions are no polynomial and no bound applies."""


class TargetIntervened(ValueError):
    """An intervention on Y changes the very law that an invariant predictor relies on."""


@dataclass(frozen=True)
class Interventions:
    """A batch of environments, all intervened on at the same sites.

    Attributes:
        sites: nodes whose equations are replaced.
        coefficients: (environments, sites, nodes), the new rows of B at the sites.
        noise_var: (environments, sites), the new noise variances.
    """

    sites: Int[ndarray, " k"]
    coefficients: Float[ndarray, "N k p"]
    noise_var: Float[ndarray, "N k"]

    def __len__(self) -> int:
        return len(self.coefficients)


@dataclass(frozen=True, eq=False)
class LinearSEM:
    """V = B V + N with independent noise of mean zero.

    Args:
        coefficients: B; entry (i, j) is the direct effect of node j on node i.
        noise_var: variances of N, at least 0; that of the target is positive.
        target: index of Y.
        constant: index of a node that is always 1, where there is one (`with_constant`); moments are then about zero.

    Raises:
        CyclicGraph: B has a directed cycle, which the message names.
        ValueError: shapes disagree, NaN or infinity, a negative variance, a target that is no node.

    >>> chain = LinearSEM(np.array([[0.0, 0, 0], [2, 0, 0], [0, 3, 0]]), np.ones(3), target=1)
    >>> chain.covariance()
    array([[ 1.,  2.,  6.],
           [ 2.,  5., 15.],
           [ 6., 15., 46.]])
    """

    coefficients: Float[ndarray, "p p"]
    noise_var: Float[ndarray, " p"]
    target: int
    constant: int | None = None

    def __post_init__(self) -> None:
        check_square("coefficients", self.coefficients)
        check_shape("noise_var", self.noise_var, (len(self.coefficients),))
        check_finite("coefficients", self.coefficients)
        check_finite("noise_var", self.noise_var)
        if not 0 <= self.target < len(self.noise_var):
            raise ValueError(f"target must be one of {len(self.noise_var)} nodes, got {self.target}")
        if (self.noise_var < 0).any() or self.noise_var[self.target] == 0:
            raise ValueError("noise_var must be non-negative, and positive at the target")
        _ = self.order

    @property
    def nodes(self) -> int:
        """Number of nodes, target and constant among them."""
        return len(self.noise_var)

    @property
    def covariates(self) -> Int[ndarray, " d"]:
        """All nodes but the target, in increasing order."""
        return np.delete(np.arange(self.nodes), self.target)

    @cached_property
    def order(self) -> Int[ndarray, " p"]:
        """A topological order of the nodes: the constant, then the smallest index that can come next."""
        waiting = np.count_nonzero(self.coefficients, axis=1)
        order: list[int] = []
        ready = sorted(np.flatnonzero(waiting == 0).tolist(), key=lambda node: node != self.constant)
        while ready:
            node = ready.pop(0)
            order.append(node)
            children = np.flatnonzero(self.coefficients[:, node])
            waiting[children] -= 1
            for child in children[waiting[children] == 0].tolist():
                insort(ready, child)
        if len(order) < self.nodes:
            stuck = sorted(set(range(self.nodes)) - set(order))
            raise CyclicGraph(f"coefficients must describe an acyclic graph, but nodes {stuck} lie on or below a cycle")
        return np.array(order, dtype=np.int64)

    @cached_property
    def total_effects(self) -> Float[ndarray, "p p"]:
        """T = (I - B)^-1; column j is what one unit of noise at j does to every node."""
        return np.linalg.inv(np.eye(self.nodes) - self.coefficients)

    def covariance(self) -> Float[ndarray, "p p"]:
        """T diag(noise_var) T', O(p^3); second moments about zero where there is a constant node."""
        return (self.total_effects * self.noise_var) @ self.total_effects.T

    def parents(self, node: int | np.integer) -> Int[ndarray, " parents"]:
        """Nodes with a direct effect on `node`, ascending."""
        return np.flatnonzero(self.coefficients[node])

    def children(self, node: int | np.integer) -> Int[ndarray, " children"]:
        """Nodes on which `node` has a direct effect, ascending."""
        return np.flatnonzero(self.coefficients[:, node])

    def with_constant(self) -> "LinearSEM":
        """The same model with a node that is always 1, at index 0: its coefficients are the nodes' intercepts.

        With it an intervention may shift means; the certificates then speak of second moments about zero.
        """
        if self.constant is not None:
            return self
        B = np.zeros((self.nodes + 1, self.nodes + 1))
        B[1:, 1:] = self.coefficients
        return LinearSEM(B, np.append(1.0, self.noise_var), self.target + 1, constant=0)

    def intervene(
        self,
        site: int | np.integer,
        coefficients: Float[ndarray, " p"] | None = None,
        noise_var: float | None = None,
        hard: bool = False,
    ) -> "LinearSEM":
        """The model after one intervention.

        Args:
            site: the node; never the target, nor the constant.
            coefficients: its new row of B (default: the old one, or zero for a hard intervention).
            noise_var: its new noise variance (default: the old one).
            hard: cut the node off from its parents; only a coefficient on the constant node may stay.

        Raises:
            TargetIntervened: the site is Y.
            CyclicGraph: the new row closes a cycle.
            ValueError: a hard intervention with parents, a site that is no node, a negative variance.
        """
        self._check_sites(np.array([site]))
        row = np.zeros(self.nodes) if hard else self.coefficients[site]
        if coefficients is not None:
            check_shape("coefficients", coefficients, (self.nodes,))
            others = [j for j in np.flatnonzero(coefficients) if j != self.constant]
            if hard and others:
                raise ValueError(f"coefficients of a hard intervention must be zero, got parents {others}")
            row = coefficients
        B, omega = self.coefficients.copy(), self.noise_var.copy()
        B[site] = row
        omega[site] = omega[site] if noise_var is None else noise_var
        return replace(self, coefficients=B, noise_var=omega)

    def covariances(self, interventions: Interventions) -> Float[ndarray, "N p p"]:
        """Moments of every environment, by one update of rank two a site: O(N k p^2), no inverse for each.

        Site j with its own equation removed leaves R = Cov(V - u V_j), u column j of T; the new equation
        V_j = delta' V + noise then gives R + u (R delta)' + (R delta) u' + (delta' R delta + omega_j) u u'.
        In topological order u is never touched by the sites before.

        Raises:
            CyclicGraph: a site gets a parent that does not come before it in `order`.
            TargetIntervened, ValueError: see `intervene`.
        """
        self._check_sites(interventions.sites)
        check_shape("interventions.coefficients", interventions.coefficients, (None, None, self.nodes))
        rank = np.argsort(self.order)
        Sigma = np.repeat(self.covariance()[None], len(interventions), axis=0)
        for i in np.argsort(rank[interventions.sites]):
            j = int(interventions.sites[i])
            u = self.total_effects[:, j]
            delta = interventions.coefficients[:, i]
            used = np.flatnonzero(delta.any(axis=0))
            later = used[rank[used] >= rank[j]]
            if later.size:
                raise CyclicGraph(
                    f"node {j} gets parents {later.tolist()}, which come after it in the order of the graph"
                )
            of_j = Sigma[:, j]
            delta = delta[:, used]
            along = (of_j[:, used] * delta).sum(axis=1, keepdims=True)
            r = np.matmul(Sigma[:, :, used], delta[:, :, None])[..., 0] - u * along  # R delta: u is 0 at the parents
            own = (r[:, used] * delta).sum(axis=1) + interventions.noise_var[:, i]
            a = r - of_j + (own + of_j[:, j])[:, None] / 2 * u
            change = np.matmul(np.broadcast_to(u, a.shape)[:, :, None], a[:, None, :])
            Sigma += change
            Sigma += change.transpose(0, 2, 1)
        return Sigma

    def sample(self, n: int, rng: np.random.Generator) -> Float[ndarray, "n p"]:
        """n independent rows with Gaussian noise; a constant node is 1 in every row."""
        noise = rng.standard_normal((n, self.nodes)) * np.sqrt(self.noise_var)
        if self.constant is not None:
            noise[:, self.constant] = 1.0
        rows = noise @ self.total_effects.T
        if self.constant is not None:
            rows[:, self.constant] = 1.0  # not 1 up to rounding
        return rows

    def _check_sites(self, sites: Int[ndarray, " k"]) -> None:
        if not ((sites >= 0) & (sites < self.nodes)).all():
            raise ValueError(f"sites must be among {self.nodes} nodes, got {sites.tolist()}")
        if len(set(sites.tolist())) < len(sites):
            raise ValueError(f"sites must be distinct, got {sites.tolist()}")
        if self.target in sites:
            raise TargetIntervened(f"sites must leave the target (node {self.target}) alone, got {sites.tolist()}")
        if self.constant in sites:
            raise ValueError(f"sites must leave the constant (node {self.constant}) alone, got {sites.tolist()}")


@dataclass(frozen=True, eq=False)
class InterventionLaw:
    """The distribution D from which environments come, on a fixed set of sites.

    Args:
        sem: the model before intervention.
        sites: nodes that an environment may change.
        kind: "soft" adds N(0, scale^2) to each coefficient on the site's parents; "hard" cuts each site off with
            probability 1/2; "variance" always cuts it off. All three draw a new noise variance.
        scale: standard deviation of the change of a coefficient.
        noise_range: bounds of the uniform law of new variances.
        shift_scale: standard deviation of a site's new mean (a coefficient on the model's constant node); 0 for none.

    Raises:
        TargetIntervened, ValueError: see `LinearSEM.intervene`; a shift without a constant node.
    """

    sem: LinearSEM
    sites: tuple[int, ...]
    kind: str = "soft"
    scale: float = 1.0
    noise_range: tuple[float, float] = (0.3, 2.5)
    shift_scale: float = 0.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("soft", "hard", "variance"))
        check_nonnegative("scale", self.scale)
        check_nonnegative("shift_scale", self.shift_scale)
        if not 0 <= self.noise_range[0] <= self.noise_range[1] < np.inf:
            raise ValueError(f"noise_range must be 0 <= low <= high, got {self.noise_range}")
        self.sem._check_sites(np.array(self.sites, dtype=np.int64))
        if self.shift_scale and self.sem.constant is None:
            raise ValueError("shift_scale needs a model with a constant node: use sem.with_constant()")

    @property
    def family(self) -> InterventionFamily:
        """What the bounds need to know: number of sites and how many coefficients of each may change."""
        degree = max((len(set(self.sem.parents(j)) - {self.sem.constant}) for j in self.sites), default=0)
        return InterventionFamily(
            sites=len(self.sites), kind=self.kind, in_degree=degree, mean_shifts=self.shift_scale > 0
        )

    def draw(self, n: int, rng: np.random.Generator) -> Interventions:
        """n independent environments."""
        check_count("n", n)
        k = len(self.sites)
        sites = np.array(self.sites, dtype=np.int64)
        rows = np.repeat(self.sem.coefficients[sites][None], n, axis=0)
        if self.kind == "soft":
            parents = self.sem.coefficients[sites] != 0
            if self.sem.constant is not None:
                parents[:, self.sem.constant] = False
            rows += self.scale * rng.standard_normal(rows.shape) * parents
        elif self.kind == "hard":
            rows *= rng.integers(0, 2, size=(n, k, 1))
        else:
            rows *= 0.0
        if self.shift_scale:
            rows[:, :, self.sem.constant] = self.shift_scale * rng.standard_normal((n, k))
        return Interventions(sites, rows, rng.uniform(*self.noise_range, size=(n, k)))


@dataclass(frozen=True, eq=False)
class LatentObservation:
    """Linear indirect observation: only X = mixing @ (covariates of a latent model) and Y are seen.

    Args:
        sem: the latent model.
        mixing: (observed, latent covariates), unknown to a learner.

    The moments are a linear image of the latent ones, so every bound that counts sites and in-degrees carries over.
    """

    sem: LinearSEM
    mixing: Float[ndarray, "m d"]

    def __post_init__(self) -> None:
        check_shape("mixing", self.mixing, (None, self.sem.nodes - 1))
        check_finite("mixing", self.mixing)

    @property
    def target(self) -> int:
        """Index of Y among the observed: the last."""
        return len(self.mixing)

    def observe(self, moments: Float[ndarray, "N p p"]) -> Float[ndarray, "N m_plus_1 m_plus_1"]:
        """Moments of (X, Y) from those of the latent nodes."""
        return self._map @ moments @ self._map.T

    def observe_rows(self, rows: Float[ndarray, "n p"]) -> Float[ndarray, "n m_plus_1"]:
        """Samples of (X, Y) from samples of all latent nodes, one a row; Y comes last."""
        return rows @ self._map.T

    @cached_property
    def _map(self) -> Float[ndarray, "m_plus_1 p"]:
        full = np.zeros((len(self.mixing) + 1, self.sem.nodes))
        full[:-1, self.sem.covariates] = self.mixing
        full[-1, self.sem.target] = 1.0
        return full


def random_sem(d: int, in_degree: int, rng: np.random.Generator, target_children: int = 3) -> LinearSEM:
    """A random acyclic model of d covariates around a target in the middle of the order.

    Args:
        d: covariates, at least target_children + 2.
        in_degree: parents of every node (fewer at the start of the order), at least 1.
        target_children: nodes after Y that are its children, whatever their other parents.

    Coefficients are +-U(0.4, 0.9), those of Y in its children +-U(0.6, 1), noise variances U(0.5, 1.5). A forced child
    takes Y in place of one of its parents, so that no node has more than `in_degree`.
    """
    check_count("in_degree", in_degree)
    check_count("target_children", target_children, at_least=0)
    check_count("d", d, at_least=target_children + 2)
    y = min((d + 1) // 2, d - target_children)
    children = rng.choice(np.arange(y + 1, d + 1), size=target_children, replace=False)
    B = np.zeros((d + 1, d + 1))
    for j in range(1, d + 1):
        forced = j in children
        before = np.delete(np.arange(j), y) if forced else np.arange(j)
        parents = rng.choice(before, size=min(in_degree - forced, len(before)), replace=False)
        B[j, parents] = rng.uniform(0.4, 0.9, len(parents)) * rng.choice([-1.0, 1.0], len(parents))
        if forced:
            B[j, y] = rng.uniform(0.6, 1.0) * rng.choice([-1.0, 1.0])
    return LinearSEM(B, rng.uniform(0.5, 1.5, d + 1), target=y)
