"""The inner solve: sketches on the KKT system as far as a residual target asks, MINRES where they do not get there.

The system may be equilibrated first, D Gamma D y = D rhs with z = D y: Kaczmarz then meets rows of equal length.
Targets are residuals of the system as given either way.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.linalg import LinearOperator, minres

from locally.linalg.sketching import (
    CountSketch,
    Gaussian,
    Kaczmarz,
    Rows,
    Sketch,
    SketchAndProject,
    SparseSketch,
    Status,
)
from locally.optimize.constrained.kkt import NewtonSystem, equilibration

RESTARTS = 6  # of MINRES, each from the residual that the one before left
LOOK_EVERY = 10  # steps of MINRES between two looks at the residual that is asked for


class Accuracy(StrEnum):
    """How an inner solve ended."""

    REACHED = "target reached"
    ROUNDING = "as accurate as rounding allows"
    SHORT = "target missed"


def named_sketch(name: str, block_size: int) -> Sketch | Kaczmarz:
    """The sketch behind a name: 'kaczmarz', 'gaussian', 'count' or 'sparse', in blocks of `block_size`."""
    return SKETCHES[name](block_size=block_size)


SKETCHES: dict[str, Callable[..., Any]] = {
    "kaczmarz": Kaczmarz,
    "gaussian": Gaussian,
    "block-gaussian": Gaussian,
    "count": CountSketch,
    "sparse": SparseSketch,
}


@dataclass(eq=False)
class InnerSolve:
    """Warm-started solution of Gamma z = rhs to one residual target after the other.

    Attributes:
        z: the present approximation, 0 at first.
        residual: ||Gamma z - rhs||.
        sketches, multiplications: spent so far.
        fallbacks: times that MINRES had to finish the solve.
        products: products with Gamma that MINRES took.
    """

    system: NewtonSystem
    rhs: Float[ndarray, " d"]
    sketch: Sketch | Kaczmarz
    max_sketches: int
    minres: bool
    rounding: float
    rng: np.random.Generator
    equilibrate: bool = True
    z: Float[ndarray, " d"] = field(init=False)
    residual: float = field(init=False)
    sketches: int = field(default=0, init=False)
    multiplications: int = field(default=0, init=False)
    fallbacks: int = field(default=0, init=False)
    products: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        gamma: Any = self.system.gamma
        self.z = np.zeros_like(self.rhs)
        self.residual = float(np.linalg.norm(self.rhs))
        self.scale = equilibration(gamma) if self.equilibrate else np.ones_like(self.rhs)
        self.scaled: Any = gamma
        if sp.issparse(gamma):
            self.scaled = sp.csr_array(gamma.multiply(self.scale[:, None]).multiply(self.scale))
        elif isinstance(gamma, ndarray):
            self.scaled = self.scale[:, None] * gamma * self.scale
        self.rows = None if isinstance(gamma, LinearOperator) else Rows.of(self.scaled)

    @property
    def floor(self) -> float:
        """What rounding alone may leave of the residual."""
        size = self.system.norm * float(np.linalg.norm(self.z)) + float(np.linalg.norm(self.rhs))
        return self.rounding * float(np.finfo(float).eps) * size

    @property
    def spent(self) -> bool:
        return self.sketches >= self.max_sketches

    def reach(self, target: float) -> Accuracy:
        """Continue from z until ||Gamma z - rhs|| <= target, or as near as can be."""
        if self._open(target) and not self.spent:
            self._sketch(target)
        if self._open(target) and self.minres:
            self._minres(target)
        if self.residual <= target:
            return Accuracy.REACHED
        return Accuracy.SHORT if self._open(target) else Accuracy.ROUNDING

    def _open(self, target: float) -> bool:
        return self.residual > max(target, self.floor)

    def _sketch(self, target: float) -> None:
        """The residual of the equilibrated system bounds the one asked for only up to the spread of the scales: its
        target starts mild and tightens."""
        system = self.scaled if self.rows is None else self.rows
        scaled_target = target * float(self.scale.max())
        while self._open(target) and not self.spent:
            found = SketchAndProject(
                sketch=self.sketch,
                rtol=0.0,
                atol=scaled_target,
                rounding=0.1,
                max_sketches=self.max_sketches - self.sketches,
                random_state=self.rng,
            ).solve(system, self.scale * self.rhs, x0=self.z / self.scale, norm=self.system.norm)
            self.sketches += found.sketches
            self.multiplications += found.multiplications
            if found.status is Status.NOT_FINITE:
                return
            self._move(self.scale * found.x)
            if found.status is Status.ROUNDING:
                return
            scaled_target *= 0.5 * min(target / max(self.residual, target), 1.0)

    def _minres(self, target: float) -> None:
        """MINRES on the equilibrated system, restarted while that still halves the residual."""
        self.fallbacks += 1
        for _ in range(RESTARTS):
            before, start = self.residual, self.z
            gap = self.scale * (self.rhs - self.system.gamma @ start)
            steps = 0

            def look(y: Float[ndarray, " d"], start: Float[ndarray, " d"] = start) -> None:
                nonlocal steps
                steps += 1
                if steps % LOOK_EVERY == 0 and self._gap(start + self.scale * y) <= max(target, self.floor):
                    raise _Enough(start + self.scale * y)

            try:
                # SciPy's own test is relative to ||Gamma|| ||z||: it would end too soon
                y, _ = minres(self.scaled, gap, rtol=1e-15, maxiter=20 * self.rhs.size + 100, callback=look)
                candidate = start + self.scale * y
            except _Enough as enough:
                candidate = enough.z
            self.products += steps + steps // LOOK_EVERY
            if self._gap(candidate) < before:
                self._move(candidate)
            if not self.residual <= before / 2 or not self._open(target):
                return

    def _gap(self, z: Float[ndarray, " d"]) -> float:
        return float(np.linalg.norm(self.system.gamma @ z - self.rhs))

    def _move(self, z: Float[ndarray, " d"]) -> None:
        self.z, self.residual = z, self._gap(z)


class _Enough(Exception):
    """Ends a MINRES run whose iterate z is good enough."""

    def __init__(self, z: Float[ndarray, " d"]) -> None:
        super().__init__()
        self.z = z
