"""The network that turns residuals into search directions: two grids, residual blocks, any size of grid.

Source: arXiv 2205.10763, architecture figure; the numbers of blocks are those of the authors' networks for 64^3 and
128^3 cells (97,457 and 139,025 parameters).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional

from locally.checks import check_choice, check_count
from locally.solvers.conjugate_direction.poisson import Cell, Domain

Initialisation = Literal["torch", "glorot"]
InputScale = Literal["rms", "unit"]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What a checkpoint needs to rebuild a `DirectionNetwork`.

    Args:
        ndim: 2 or 3.
        channels: of every hidden layer.
        fine_in, coarse, fine_out: residual blocks before the grid is coarsened, on the coarse grid, and after it.
        input_scale: "rms" hands the network inputs of root mean square 1 over the grid, which trains faster and more
            evenly over seeds; "unit" hands it vectors of norm 1 as the paper does.

    Raises:
        ValueError, TypeError: out of range.
    """

    ndim: int = 2
    channels: int = 16
    fine_in: int = 1
    coarse: int = 3
    fine_out: int = 2
    input_scale: InputScale = "rms"

    def __post_init__(self) -> None:
        check_choice("ndim", self.ndim, (2, 3))
        for name in ("channels", "fine_in", "coarse", "fine_out"):
            check_count(name, getattr(self, name))
        check_choice("input_scale", self.input_scale, ("rms", "unit"))

    def to_dict(self) -> dict[str, Any]:
        """Its fields, as a checkpoint keeps them."""
        return asdict(self)


class DirectionNetwork(nn.Module):
    """Maps residual grids to direction grids; invariant to the scale of its input, since it normalises it.

    One convolution, residual blocks, average pooling by two, residual blocks, nearest upsampling beside a skip
    connection, residual blocks, a linear read-out per cell; 3-wide kernels with zero padding and ReLU. Odd sizes are
    padded before pooling and cropped after. A pass costs about 2 * 3^ndim * channels^2 operations per cell and
    convolution.

    Args:
        config: the architecture.
        initialisation: "torch" (Kaiming-uniform) or "glorot" with zero biases, as the authors' code has it.
        generator: of the initial weights; fresh entropy by default.

    >>> net = DirectionNetwork(NetworkConfig(ndim=3))
    >>> sum(p.numel() for p in net.parameters())
    97457
    >>> net(torch.ones(1, 5, 6, 7)).shape
    torch.Size([1, 5, 6, 7])
    """

    def __init__(
        self,
        config: NetworkConfig | None = None,
        *,
        initialisation: Initialisation = "torch",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_choice("initialisation", initialisation, ("torch", "glorot"))
        self.config = config = config or NetworkConfig()
        f = config.channels
        self.lift = convolution(config.ndim, 1, f)
        self.enter = convolution(config.ndim, f, f)
        self.before = nn.Sequential(*(ResidualBlock(config.ndim, f) for _ in range(config.fine_in)))
        self.skip = convolution(config.ndim, f, f)
        self.coarse = nn.Sequential(*(ResidualBlock(config.ndim, f) for _ in range(config.coarse)))
        self.after = nn.Sequential(*(ResidualBlock(config.ndim, f) for _ in range(config.fine_out)))
        self.read = convolution(config.ndim, f, 1, width=1)
        initialise(self, initialisation, generator)

    def forward(self, r: Float[Tensor, "batch *grid"]) -> Float[Tensor, "batch *grid"]:
        if r.ndim != self.config.ndim + 1:
            raise ValueError(
                f"r must have shape (batch, *grid) with {self.config.ndim} grid axes, got {tuple(r.shape)}"
            )
        axes = tuple(range(1, r.ndim))
        norms = torch.linalg.vector_norm(r, dim=axes, keepdim=True)
        if self.config.input_scale == "rms":
            norms = norms / r[0].numel() ** 0.5
        unit = r / torch.where(norms > 0, norms, 1.0)

        a = self.before(functional.relu(self.enter(self.lift(unit[:, None]))))
        fine = functional.relu(self.skip(a))
        a = self.after(fine + upsample(self.coarse(downsample(fine)), fine.shape[2:]))
        return self.read(a)[:, 0]


class ResidualBlock(nn.Module):
    """a <- relu(conv(relu(conv(a)))) + a: the sum comes after the activation."""

    def __init__(self, ndim: int, channels: int):
        super().__init__()
        self.first = convolution(ndim, channels, channels)
        self.second = convolution(ndim, channels, channels)

    def forward(self, a: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.first(a)))) + a


def convolution(ndim: int, inputs: int, outputs: int, width: int = 3) -> nn.Conv2d | nn.Conv3d:
    kind = nn.Conv2d if ndim == 2 else nn.Conv3d
    return kind(inputs, outputs, width, padding=width // 2)


def downsample(a: Tensor) -> Tensor:
    """Average over 2 x 2 (x 2) cells; a last odd slice counts as if zeros followed it, as at the edge of the grid."""
    pad = [side for size in reversed(a.shape[2:]) for side in (0, size % 2)]
    a = functional.pad(a, pad) if any(pad) else a
    return functional.avg_pool2d(a, 2) if a.ndim == 4 else functional.avg_pool3d(a, 2)


def upsample(a: Tensor, size: torch.Size) -> Tensor:
    """Every cell twice along each axis, cropped to `size`."""
    a = functional.interpolate(a, scale_factor=2, mode="nearest")
    for axis, length in enumerate(size, start=2):
        a = a.narrow(axis, 0, length)
    return a


def initialise(network: nn.Module, how: Initialisation, generator: torch.Generator | None) -> None:
    """Draw all weights from `generator`, in the order of the layers."""
    generator = generator or torch.Generator().manual_seed(torch.seed())
    for layer in network.modules():
        if not isinstance(layer, nn.Conv2d | nn.Conv3d):
            continue
        assert layer.bias is not None
        if how == "glorot":
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        else:
            fan_in = layer.weight[0].numel()
            nn.init.uniform_(layer.weight, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
            nn.init.uniform_(layer.bias, -(fan_in**-0.5), fan_in**-0.5, generator=generator)


REACH = 8  # cells of mirror image beyond a closed edge; twice as many hardly save an iteration


class GridDirection:
    """A network as the solver wants it: flat residuals (batch, n) in, flat directions out, solids and air masked.

    Computes in the dtype and on the device of the network and hands back those of the residual. The paper's network
    sees the residual alone and pads it with zeros, which stand for open edges. Where the grid is closed (Neumann), the
    residual is continued by its mirror image instead, as the method of images does for the inverse itself; this halves
    the iterations or better and is our addition.

    Args:
        network: maps (batch, *grid) to (batch, *grid).
        domain: the grid; another one than in training will do.
        odd: symmetrise to (f(r) - f(-r)) / 2, at twice the price, so that -b takes the mirrored path of b.
        mirror: continue the residual beyond closed edges.

    Raises:
        ValueError: the network was made for another number of axes.
    """

    def __init__(self, network: nn.Module, domain: Domain, *, odd: bool = False, mirror: bool = True):
        config = getattr(network, "config", None)
        if config is not None and config.ndim != domain.ndim:
            raise ValueError(f"domain has {domain.ndim} axes, but the network was made for {config.ndim}")
        self.network, self.domain, self.odd = network, domain, odd
        weight = next(network.parameters(), torch.empty(0))
        self.dtype, self.device = weight.dtype, weight.device
        self.fluid = torch.as_tensor(domain.fluid, dtype=self.dtype, device=self.device)
        images = [image_indices(domain, axis) for axis in range(domain.ndim)] if mirror else []
        self.images = [(torch.from_numpy(index).to(self.device), inner) for index, inner in images]

    @torch.no_grad()
    def __call__(self, r: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        grid = r.to(device=self.device, dtype=self.dtype).reshape(-1, *self.domain.shape)
        for axis, (index, _) in enumerate(self.images, start=1):
            grid = grid.index_select(axis, index) if len(index) > grid.shape[axis] else grid
        q = self.network(grid)
        if self.odd:
            q = (q - self.network(-grid)) / 2
        for axis, (_, first) in enumerate(self.images, start=1):
            q = q.narrow(axis, first, self.domain.shape[axis - 1])
        return (q * self.fluid).reshape(r.shape).to(device=r.device, dtype=r.dtype)


def image_indices(domain: Domain, axis: int) -> tuple[Int[ndarray, " extended"], int]:
    """Indices along `axis` that continue the grid by up to REACH mirrored cells beyond each closed edge that has fluid;
    and where the grid itself begins among them."""
    size = domain.shape[axis]
    own = np.arange(size)
    first, last = (domain.outside is Cell.SOLID and domain.fluid.take(edge, axis).any() for edge in (0, -1))
    width = min(REACH, size)
    before, after = own[:width][::-1] if first else own[:0], own[-width:][::-1] if last else own[:0]
    return np.concatenate([before, own, after]), len(before)
