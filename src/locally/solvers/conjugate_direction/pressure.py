"""The front door: pressure systems on any domain, solved with the shipped network or one's own."""

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, nn

from locally.checks import check_finite, check_shape
from locally.solvers.conjugate_direction.checkpoint import load_pretrained
from locally.solvers.conjugate_direction.network import GridDirection
from locally.solvers.conjugate_direction.poisson import Domain
from locally.solvers.conjugate_direction.solver import Callback, ConjugateDirection, Direction, Solution


@dataclass(frozen=True, kw_only=True, eq=False)
class PressureSolver:
    """Solve the Poisson systems of incompressible flow: any grid size, obstacles, free surfaces, closed tanks.

    Args:
        network: maps residual grids to direction grids; the shipped one for the domain's number of axes by default.
        window, rtol, max_iter: as for `ConjugateDirection`.
        odd, mirror: as for `GridDirection`; mirror = False pads with zeros at closed edges too, as the paper does.

    >>> import torch
    >>> domain = Domain.box(40, 30).with_ball((20, 15), 6)  # an obstacle that the network has never seen
    >>> b = torch.as_tensor(domain.fluid, dtype=torch.float64)
    >>> found = PressureSolver(rtol=1e-6).solve(domain, b)
    >>> str(found.status), tuple(found.x.shape), bool(found.iterations < 30)
    ('converged', (40, 30), True)
    """

    network: nn.Module | None = None
    window: int | None = 2
    rtol: float = 1e-4
    max_iter: int = 200
    odd: bool = False
    mirror: bool = True

    def __post_init__(self) -> None:
        self._method(lambda r: r)  # refuses hyper-parameters out of range

    def _method(self, direction: Direction) -> ConjugateDirection:
        return ConjugateDirection(direction=direction, window=self.window, rtol=self.rtol, max_iter=self.max_iter)

    def solve(
        self,
        domain: Domain,
        b: Float[Tensor, "*batch_and_grid"],
        x0: Float[Tensor, "*batch_and_grid"] | None = None,
        *,
        callback: Callback | None = None,
    ) -> Solution:
        """Pressure for the right-hand sides b (*batch, *grid), zero off the fluid; x comes in the same shape.

        Enclosed parts of the fluid, which touch no air, fix their pressure up to a constant: x has mean zero there (for
        x0 = 0). If b does not sum to zero there, no pressure exists, the status is INCONSISTENT and x is the
        least-squares answer.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit, or b is not zero on solids or air.
        """
        if tuple(b.shape[-domain.ndim :]) != domain.shape:
            raise ValueError(f"b must have shape (*batch, *{domain.shape}), got {tuple(b.shape)}")
        if x0 is not None:
            check_shape("x0", x0, tuple(b.shape))
        check_finite("b", b)
        shape = b.shape
        flat = b.reshape(*shape[: -domain.ndim], domain.n)
        domain.check_right_hand_side(flat)
        network = load_pretrained(domain.ndim, device=b.device) if self.network is None else self.network
        found = self._method(GridDirection(network, domain, odd=self.odd, mirror=self.mirror)).solve(
            domain.operator(dtype=b.dtype, device=b.device),
            flat,
            None if x0 is None else x0.reshape(flat.shape),
            null_space=domain.null_space(dtype=b.dtype, device=b.device),
            callback=callback,
        )
        return replace(found, x=found.x.reshape(shape))
