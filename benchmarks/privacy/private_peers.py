"""OpenDP and diffprivlib, in an environment of their own."""

from collections.abc import Callable
from functools import cache
from typing import Any

from benchmarks.peers import answer, ask_in

PACKAGES = ["diffprivlib==0.6.6", "opendp==0.16.0", "scikit-learn==1.5.2"]


def elsewhere() -> Callable[..., Any] | None:
    return ask_in("privacy", PACKAGES, __name__)


def opendp_noise(n: int, scale: float) -> int:
    """Exact discrete Gaussian noise on a vector of n integers."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=int)
    return len(dp.m.make_gaussian(*space, scale=scale)([0] * n))


def diffprivlib_noise(n: int) -> int:
    """Exact discrete Gaussian noise, n integers one by one."""
    mechanism = discrete_gaussian()
    return len([mechanism.randomise(0) for _ in range(n)])


@cache
def discrete_gaussian() -> Any:
    """At (1, 1e-6) and sensitivity 1, a scale of about 4; its own calibration fails at large sensitivities."""
    from diffprivlib.mechanisms import GaussianDiscrete

    return GaussianDiscrete(epsilon=1.0, delta=1e-6, sensitivity=1)


def diffprivlib_regression(table: str, epsilon: float, clip: float, seed: int) -> list[float]:
    """Coefficients for the last column, from a server that sees every record and protects only its answer."""
    import numpy as np
    from diffprivlib.models import LinearRegression

    records = np.clip(np.load(table, allow_pickle=False), -clip, clip)
    bounds = (-clip, clip)
    model = LinearRegression(epsilon=epsilon, bounds_X=bounds, bounds_y=bounds, fit_intercept=False, random_state=seed)
    return model.fit(records[:, :-1], records[:, -1]).coef_.tolist()


if __name__ == "__main__":
    answer(opendp_noise, diffprivlib_noise, diffprivlib_regression)
