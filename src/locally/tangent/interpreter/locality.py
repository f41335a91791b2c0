"""All columns of a local system from a few products: impulses that do not meet share one."""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Generator, Tensor

MARGIN = 100  # times the rounding of one number: sums over a window round more


def local_columns(
    product: Callable[[Tensor], Tensor],
    x: Float[Tensor, "c h w"],
    outputs: tuple[int, ...],
    reach: int,
    generator: Generator | None,
) -> csr_array:
    """The matrix of `product` (b, C, H, W) to (b, D, s H, s W), each column confined to `reach` pixels around its own.

    Raises:
        ValueError: the shapes do not fit, or the matrix is not that local.
    """
    if (
        x.ndim != 3
        or len(outputs) != 3
        or outputs[1] % x.shape[1]
        or outputs[1] * x.shape[2] != outputs[2] * x.shape[1]
    ):
        raise ValueError(f"module must map images (C, H, W) to (D, s H, s W), got {tuple(x.shape)} to {outputs}")
    channels, height, width = x.shape
    scale, step = outputs[1] // height, 2 * reach + 1
    out_rows, out_columns = torch.arange(outputs[1], device=x.device), torch.arange(outputs[2], device=x.device)
    rows, columns, entries = [], [], []
    for c, top, left in itertools.product(range(channels), range(min(step, height)), range(min(step, width))):
        probe = torch.zeros_like(x)
        probe[c, top::step, left::step] = 1
        answer = product(probe[None])[0]
        # every output pixel lies in the window of one impulse, or of none at the border
        source_row = nearest(out_rows // scale, top, step)
        source_column = nearest(out_columns // scale, left, step)
        inside = (source_row >= 0) & (source_row < height)
        across = (source_column >= 0) & (source_column < width)
        d, i, j = torch.nonzero(answer * inside[:, None] * across, as_tuple=True)
        rows.append((d * outputs[1] + i) * outputs[2] + j)
        columns.append((c * height + source_row[i]) * width + source_column[j])
        entries.append(answer[d, i, j])
    size = (outputs[0] * outputs[1] * outputs[2], channels * height * width)
    index = tuple(torch.cat(part).cpu().numpy() for part in (rows, columns))
    F = csr_array((torch.cat(entries).cpu().numpy(), index), shape=size)
    check_reach(F, product, x, reach, generator)
    return F


def nearest(pixel: Tensor, first: int, step: int) -> Tensor:
    """The impulse at first, first + step, ... that is at most step // 2 away."""
    return torch.div(pixel - first + step // 2, step, rounding_mode="floor") * step + first


def check_reach(
    F: csr_array, product: Callable[[Tensor], Tensor], x: Tensor, reach: int, generator: Generator | None
) -> None:
    """Entries outside of the windows would show in the product with almost every image."""
    v = torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device)
    expected = product(v[None])[0].flatten()
    found = torch.as_tensor(F @ v.flatten().cpu().numpy()).to(expected)
    gap, size = (found - expected).norm(), expected.norm()
    if gap > MARGIN * torch.finfo(x.dtype).eps * size:
        raise ValueError(
            f"reach: the network looks farther than {reach} pixels, products differ by a factor of {gap / size:.2g}"
        )
