"""Five parametrised physics problems whose solution sets no single small basis approximates well.

Each solves its equation for n random parameters: a source on a circle, a turning wind, a range of frequencies, fronts
that travel, a moving weak zone. Where an amplitude is drawn, it runs over decades and its sign may flip, as loads do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numba import njit
from numpy import ndarray
from scipy.linalg import solve_banded
from scipy.sparse.linalg import splu

from locally.checks import check_choice, check_count

Rng = np.random.Generator


@dataclass(frozen=True)
class Simulations:
    """n solved simulations.

    Attributes:
        snapshots: (n, n_dof), or (n, n_dof, t) for trajectories.
        parameters: (n, d) those that change the shape of the solution.
    amplitude: (n,) the parameter that only scales it; None where there is none.
    """

    snapshots: ndarray
    parameters: Float[ndarray, "n d"]
    amplitude: Float[ndarray, " n"] | None = None


def poisson(n: int, rng: Rng, cells: int = 31) -> Simulations:
    """-Laplace u = f on the unit square, u = 0 on its boundary; f a narrow Gaussian on a circle about the centre.

    Second-order finite differences. Parameters: the source's position. Its amplitude spans two decades, either sign.

    >>> poisson(3, np.random.default_rng(0)).snapshots.shape
    (3, 900)
    """
    x, y, laplacian = _square(cells)
    angle = rng.uniform(0, 2 * np.pi, n)
    centre = 0.5 + 0.3 * np.column_stack([np.cos(angle), np.sin(angle)])
    amplitude = _decades(n, rng, signs=True)
    r2 = (x - centre[:, :1]) ** 2 + (y - centre[:, 1:]) ** 2
    f = amplitude[:, None] * np.exp(-r2 / 0.002)
    return Simulations(splu(laplacian).solve(f.T).T, centre, amplitude)


def advection_diffusion(n: int, rng: Rng, cells: int = 31) -> Simulations:
    """b . grad u - 0.02 Laplace u = f on the unit square, u = 0 on its boundary, for unit winds b of any direction.

    First-order upwind differences; f is fixed in the middle, its amplitude spans two decades. Parameters: b.
    """
    x, y, laplacian = _square(cells)
    f = np.exp(-((x - 0.5) ** 2 + (y - 0.5) ** 2) / 0.005)
    m, h = cells - 1, 1 / cells
    angle = rng.uniform(0, 2 * np.pi, n)
    wind = np.column_stack([np.cos(angle), np.sin(angle)])
    amplitude = _decades(n, rng, signs=False)
    backward = sp.diags_array([1.0, -1.0], offsets=[0, -1], shape=(m, m)) / h
    eye = sp.eye_array(m)
    along_x = sp.kron(backward, eye), sp.kron(-backward.T, eye)  # for winds to the right, to the left
    along_y = sp.kron(eye, backward), sp.kron(eye, -backward.T)
    u = np.empty((n, m * m))
    for i, (bx, by) in enumerate(wind):
        A = 0.02 * laplacian + bx * along_x[int(bx < 0)] + by * along_y[int(by < 0)]
        u[i] = amplitude[i] * solve_banded((m, m), _bands(A, m), f)
    return Simulations(u, wind, amplitude)


def helmholtz(n: int, rng: Rng, nodes: int = 300) -> Simulations:
    """-u'' - k^2 (1 + 0.05 i) u = f on (0, 1), u = 0 at both ends, wave numbers k from 5 to 45; the real part of u.

    f is a narrow Gaussian at 0.3 whose amplitude spans two decades, either sign. Parameter: k.
    """
    h = 1 / (nodes + 1)
    x = h * np.arange(1, nodes + 1)
    k = rng.uniform(5, 45, n)
    amplitude = _decades(n, rng, signs=True)
    f = np.exp(-((x - 0.3) ** 2) / 0.001)
    bands = np.full((3, nodes), -1 / h**2, dtype=np.complex128)
    u = np.empty((n, nodes))
    for i in range(n):
        bands[1] = 2 / h**2 - k[i] ** 2 * (1 + 0.05j)
        u[i] = amplitude[i] * solve_banded((1, 1), bands, f).real
    return Simulations(u, k[:, None], amplitude)


def burgers(n: int, rng: Rng, nodes: int = 200, snapshots: int = 25) -> Simulations:
    """u_t + (u^2/2)_x = 0.002 u_xx on (0, 1) up to t = 1: bumps that steepen into fronts; trajectories.

    Conservative upwind and central differences, explicit Euler steps within the CFL limit, u = 0 at both ends.
    Parameters: height 0.3 to 1.2 and position 0.1 to 0.7 of the bump, which has width 0.05.
    """
    h = 1 / (nodes + 1)
    x = h * np.arange(1, nodes + 1)
    height, position = rng.uniform(0.3, 1.2, n), rng.uniform(0.1, 0.7, n)
    u0 = height[:, None] * np.exp(-(((x - position[:, None]) / 0.05) ** 2))
    dt = 0.8 / (1.2 / h + 2 * 0.002 / h**2)
    steps = int(np.ceil(1 / dt / snapshots))
    return Simulations(
        _march_burgers(u0, 1 / (steps * snapshots), h, 0.002, snapshots, steps), np.column_stack([height, position])
    )


def nonlinear_diffusion(n: int, rng: Rng, nodes: int = 200) -> Simulations:
    """-(k(x) (1 + u^2) u')' = q on (0, 1), u = 0 at both ends, with a weak zone k = 1 - 0.98 exp(-((x-c)/0.03)^2).

    Finite volumes. The equation is linear in U = u + u^3/3, its Kirchhoff transform, whatever k: one tridiagonal solve
    for U, then Newton's method on each node's cubic, which is convex for u >= 0, so that it falls to the root from
    above. The load q spans 10^-1 to 10^1.3. Parameters: position c from 0.1 to 0.9 and log10 q.
    """
    h = 1 / (nodes + 1)
    c = rng.uniform(0.1, 0.9, n)
    load = rng.uniform(-1, 1.3, n)
    faces = h * (np.arange(nodes + 1) + 0.5)
    k = 1 - 0.98 * np.exp(-(((faces - c[:, None]) / 0.03) ** 2))
    U = np.empty((n, nodes))
    for i in range(n):
        bands = np.zeros((3, nodes))
        bands[0, 1:] = bands[2, :-1] = -k[i, 1:-1] / h**2
        bands[1] = (k[i, 1:] + k[i, :-1]) / h**2
        U[i] = solve_banded((1, 1), bands, np.full(nodes, 10.0 ** load[i]))
    u = np.minimum(U, np.cbrt(3 * U))  # above the root, from where Newton's method falls monotonically
    for _ in range(60):
        step = (u + u**3 / 3 - U) / (1 + u**2)
        u -= step
        if np.abs(step).max() <= 1e-14 * np.abs(u).max():
            break
    return Simulations(u, np.column_stack([c, load]))


PROBLEMS: dict[str, Callable[[int, Rng], Simulations]] = {
    "Poisson": poisson,
    "advection-diffusion": advection_diffusion,
    "Helmholtz": helmholtz,
    "Burgers": burgers,
    "nonlinear diffusion": nonlinear_diffusion,
}


def simulate(problem: str, n: int, rng: int | Rng) -> Simulations:
    """n simulations of one of the five problems by name: see `PROBLEMS`.

    >>> simulate("Helmholtz", 2, 0).parameters.shape
    (2, 1)
    """
    check_choice("problem", problem, tuple(PROBLEMS))
    check_count("n", n)
    return PROBLEMS[problem](n, np.random.default_rng(rng))


def _square(cells: int) -> tuple[Float[ndarray, " nodes"], Float[ndarray, " nodes"], Any]:
    """Interior nodes of a square grid and the five-point Laplacian (negative) on them."""
    check_count("cells", cells, at_least=2)
    inner = np.arange(1, cells) / cells
    x, y = (v.ravel() for v in np.meshgrid(inner, inner, indexing="ij"))
    T = cells**2 * sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(cells - 1, cells - 1))
    return x, y, sp.csc_array(sp.kronsum(T, T))


def _bands(A: Any, width: int) -> Float[ndarray, "bands n"]:
    coo = sp.coo_array(A)
    bands = np.zeros((2 * width + 1, A.shape[0]))
    bands[width + coo.row - coo.col, coo.col] = coo.data
    return bands


def _decades(n: int, rng: Rng, *, signs: bool) -> Float[ndarray, " n"]:
    amplitude = 10.0 ** rng.uniform(-1, 1, n)
    return amplitude * rng.choice([-1.0, 1.0], n) if signs else amplitude


@njit(cache=True, nogil=True)
@no_type_check
def _march_burgers(u0, dt, h, nu, snapshots, steps):
    """Explicit Euler; u >= 0 travels to the right, so upwind means the node to the left."""
    n, nodes = u0.shape
    found = np.empty((n, nodes, snapshots))
    u = np.empty(nodes + 2)
    new = np.zeros(nodes + 2)
    for i in range(n):
        u[0] = u[-1] = 0.0
        u[1:-1] = u0[i]
        for t in range(snapshots):
            for _ in range(steps):
                for j in range(1, nodes + 1):
                    flux = (u[j] * u[j] - u[j - 1] * u[j - 1]) / (2 * h)
                    new[j] = u[j] + dt * (nu * (u[j + 1] - 2 * u[j] + u[j - 1]) / h**2 - flux)
                u, new = new, u
            found[i, :, t] = u[1:-1]
    return found
