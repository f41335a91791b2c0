"""How many environments it takes: families of interventions, their moment lift, and the PAC bounds that follow.

Every equation that an intervention may replace enters the second moments of the model through few numbers. For k sites
in topological order, the last one turns the moments R of the model without its equation into
R + u (R delta)' + (R delta) u' + (delta' R delta + omega) u u' with u fixed, because no site lies downstream. R ranges
over the span of k - 1 sites; its columns at the q parents range over a space of dimension at most q + (k-1)(q + 1),
since every earlier site adds its q parents and one direction u. The moments of the family therefore span

    s_k <= s_{k-1} + min(q s_{k-1}, q + (k-1)(q + 1)) + 1,     s_0 = 1,

a number without the ambient dimension. The gradient of the risk on a representation is linear in them, so "its norm is
at most eps" is a half-space in the products of two of them, whatever the representation: VC dimension
s (s+1)/2 + 1 at most. Source: arXiv 2205.15196; the lift and its constants are derived here.
"""

import math
from dataclasses import dataclass
from typing import Any

from scipy.optimize import brentq
from scipy.stats import beta

from locally.checks import check_between, check_choice, check_count


@dataclass(frozen=True, kw_only=True)
class InterventionFamily:
    """Interventions on a fixed but unknown set of nodes.

    Args:
        sites: how many nodes an environment may change.
        kind: "soft": any coefficients on the site's parents; "hard": the site is cut off from its parents or left as it
            is; "variance": it is always cut off. The noise variance of a site may change in all three.
        in_degree: most parents of a site; needed for "soft" only.
        mean_shifts: sites may also get a new mean; moments are then about zero, with a constant among the nodes.

    >>> InterventionFamily(sites=1, kind="soft", in_degree=2).lift_dimension
    4
    >>> InterventionFamily(sites=2, kind="variance").lift_dimension
    3
    """

    sites: int
    kind: str = "soft"
    in_degree: int | None = None
    mean_shifts: bool = False

    def __post_init__(self) -> None:
        check_count("sites", self.sites, at_least=0)
        check_choice("kind", self.kind, ("soft", "hard", "variance"))
        if self.in_degree is not None:
            check_count("in_degree", self.in_degree, at_least=0)
        elif self.kind == "soft":
            raise ValueError("in_degree must be given for soft interventions: it bounds what they can change")

    @property
    def free_coefficients(self) -> int:
        """Directions in which the equation of one site may move, its noise variance apart."""
        # A hard intervention scales one fixed row by 0 or 1, however long that row is.
        own = {"soft": self.in_degree or 0, "hard": 1, "variance": 0}[self.kind]
        return own + self.mean_shifts

    @property
    def lift_dimension(self) -> int:
        """Bound on the dimension that the second moments of all environments span together."""
        s, q = 1, self.free_coefficients
        for earlier in range(self.sites):
            s += min(q * s, q + earlier * (q + 1)) + 1
        return s

    @property
    def vc_dimension(self) -> int:
        """What `vc_dimension` says of moments that this family spans."""
        return vc_dimension(self.lift_dimension)


def unrestricted_lift_dimension(d: int) -> int:
    """The same for any interventions anywhere on d covariates: all that symmetric moments of d + 1 variables span."""
    check_count("d", d)
    return (d + 1) * (d + 2) // 2


def vc_dimension(lift: int) -> int:
    """Of {environments on which the gap is at most eps} over all representations, for moments that span `lift`."""
    check_count("lift", lift)
    return lift * (lift + 1) // 2 + 1


def pac_environments(vc: int, delta: float, eta: float) -> int:
    """Training environments after which, with probability 1 - eta, every representation within eps on all of them is
    within eps on all but a share delta of the law that they came from.

    The realizable bound max((4/delta) log2(2/eta), (8 vc/delta) log2(13/delta)) of Blumer et al. (1989), Theorem 2.1.

    >>> pac_environments(1, delta=0.1, eta=0.05)
    562
    """
    check_count("vc", vc)
    _check_share("delta", delta)
    _check_share("eta", eta)
    return math.ceil(_pac_environments(vc, delta, eta))


def pac_delta(environments: int, vc: int, eta: float) -> float:
    """Smallest delta for which so many environments are enough; 1 where they are enough for none."""
    check_count("environments", environments)
    check_count("vc", vc)
    _check_share("eta", eta)
    if _pac_environments(vc, 1.0, eta) > environments:
        return 1.0

    def excess(log_delta: float) -> float:
        return math.log(_pac_environments(vc, math.exp(log_delta), eta) / environments)

    root = brentq(excess, math.log(1e-300), 0.0, xtol=1e-12)
    return min(1.0, math.exp(root))


def agnostic_delta(violated_share: float, environments: int, vc: int, eta: float) -> float:
    """Bound on the share of unseen environments beyond eps when `violated_share` of the training ones already are.

    Vapnik's uniform bound: share + sqrt((8/N) (vc log(2 e N / vc) + log(4/eta))), at most 1.
    """
    check_between("violated_share", violated_share, 0.0, 1.0)
    check_count("environments", environments)
    check_count("vc", vc)
    _check_share("eta", eta)
    if environments < vc:
        return 1.0
    growth = vc * math.log(2 * math.e * environments / vc) + math.log(4 / eta)
    return min(1.0, violated_share + math.sqrt(8 * growth / environments))


def finite_class_delta(candidates: int, environments: int, eta: float) -> float:
    """The same for a choice among finitely many (representation, head) pairs that were fixed before these environments
    were seen, all of which the chosen one satisfies: (log candidates + log(1/eta)) / environments, at most 1.

    >>> round(finite_class_delta(820, 100, eta=0.05), 5)
    0.09705
    """
    check_count("candidates", candidates)
    check_count("environments", environments)
    _check_share("eta", eta)
    return min(1.0, (math.log(candidates) + math.log(1 / eta)) / environments)


def holdout_delta(violations: int, environments: int, eta: float) -> float:
    """Clopper-Pearson upper limit at confidence 1 - eta for one pair tried on environments that it never saw.

    >>> round(holdout_delta(0, 59, eta=0.05), 3)
    0.05
    """
    check_count("environments", environments)
    check_count("violations", violations, at_least=0)
    _check_share("eta", eta)
    if violations > environments:
        raise ValueError(f"violations must be at most environments = {environments}, got {violations}")
    if violations == environments:
        return 1.0
    return float(beta.ppf(1 - eta, violations + 1, environments - violations))


def _pac_environments(vc: int, delta: float, eta: float) -> float:
    return max(4 / delta * math.log2(2 / eta), 8 * vc / delta * math.log2(13 / delta))


def _check_share(name: str, value: Any) -> None:
    check_between(name, value, 0.0, 1.0)
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}")
